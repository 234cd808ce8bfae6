"""Steps a second of a whole training run, beside those of the bare step that it takes.

    python benchmarks/loop.py                                             # GPT-2's width
    python benchmarks/loop.py --d-in 20 --d-sae 32 --k 2 --batch 512 --steps 500   # what the loop itself costs
    python benchmarks/loop.py --device cuda --kernels triton --precision bf16-mixed

The run is that of `python -m msae.train +experiment=gpt2_l8`, on rows of noise: Lightning's loop, the DataModule on
shards in a temporary directory, the progress bar, logging every 50 steps, the learning rate's schedule. After every
--steps steps it waits while a copy of its SAE takes as many bare steps on the batch in memory: forward, loss, backward,
optimizer, threshold, dead latents. Checkpoints and validation are rarer than that, so each is timed by itself and its
share of a step added. Printed are medians of --rounds rounds and of their ratios. Lines of the run go to stderr. On a
GPU a clock is read only when the device has done all it was given.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import lightning as L
import torch
from machine import cpu_model
from reader import CHUNK, Made

from msae.cli.command import compose, plain
from msae.data.activations import Activations
from msae.data.datamodule import ActivationData
from msae.runs import Run
from msae.sae.fast import Kernels
from msae.settings import changed, decode
from msae.training.job import build_module, build_trainer, quiet_lightning, start_from
from msae.training.memory import keep_freed_memory
from msae.training.module import MatryoshkaTraining
from msae.training.settings import Train
from msae.training.step import Moment, Step

VAL_ROWS = 65_536
ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}  # Lightning's names


class Sizes(NamedTuple):
    """Of a run; `rows` at most on disk, `steps` of a round, `prefixes` of the experiment unless given, as [4,20]."""

    d_in: int = 768
    d_sae: int = 12_288
    prefixes: str | None = None
    k: int = 32
    batch: int = 4096
    rows: int = 1_048_576
    steps: int = 50
    rounds: int = 5


class Measured(NamedTuple):
    """Seconds of a step in each round, of the run and of a bare one.

    Seconds of a checkpoint, of a validation, and of both a step on average (`rare`).
    """

    kernels: str
    loop: list[float]
    bare: list[float]
    checkpoint: float
    validation: float
    rare: float

    def share(self, rare: bool = False) -> float:
        """The run's rate as a share of the bare step's, with checkpoints and validation or without."""
        more = self.rare if rare else 0.0
        return statistics.median(bare / (loop + more) for bare, loop in zip(self.bare, self.loop, strict=True))


class Rounds(L.Callback):
    """Stops the clock of the run after every `steps` steps, and takes as many bare ones."""

    def __init__(self, steps: int, checkpoint: Path) -> None:
        self.steps, self.checkpoint, self.begun = steps, checkpoint, 0.0
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.checkpoint_seconds = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.steps:
            return
        wait()
        loop = (time.perf_counter() - self.begun) / self.steps
        assert isinstance(module, MatryoshkaTraining)
        bfloat16 = trainer.precision == "bf16-mixed"
        bare = seconds_of_bare_steps(module.step(), batch.to(torch.float32), self.steps, bfloat16)
        if batch_idx > self.steps:  # the first round warms up
            self.loop.append(loop)
            self.bare.append(bare)
        self.begun = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.checkpoint_seconds = seconds(lambda: trainer.save_checkpoint(self.checkpoint))


def seconds_of_bare_steps(of_run: Step, x: torch.Tensor, steps: int, bfloat16: bool = False) -> float:
    """Seconds a step of a copy of the run's SAE as it is now, on its own and on these rows; its weights stay."""
    step, moment = Step(of_run.recipe, of_run.sae.d_in).to(x.device), Moment(0, total=10**6)
    step.load_state_dict(of_run.state_dict())
    optimizer = step.prepare(moment.total)
    optimizer.param_groups[0]["lr"] = 0.0

    def take(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
                loss = step.loss(x, x, moment).loss.total
            loss.backward()
            optimizer.step()
            step.after_update()

    take(1)
    return seconds(lambda: take(steps)) / steps


def wait() -> None:
    """Until the GPU, if one is used, has done all it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any]) -> float:
    """Seconds that a call takes, with all that it gives the device to do."""
    wait()
    begun = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begun


def measure(
    sizes: Sizes, directory: Path, device: str = "cpu", kernels: str = "auto", precision: str = "32-true"
) -> Measured:
    """One run in a directory, in which another one finds its shards."""
    tokens = (sizes.rounds + 2) * sizes.steps * sizes.batch
    rows = min(tokens, sizes.rows)
    settings: dict[str, Any] = {
        "model.d_sae": sizes.d_sae,
        "model.k": sizes.k,
        "data.batch_tokens": sizes.batch,
        "tokens": tokens,
    }
    settings |= {"model.kernels": kernels, "trainer.precision": precision}
    settings |= {"trainer.accelerator": ACCELERATORS[device], "data.root": directory / "shards"}
    settings |= {"model.prefixes": sizes.prefixes} if sizes.prefixes else {}
    config = plain(compose("train", ["+experiment=gpt2_l8", *(f"{key}={value}" for key, value in settings.items())]))
    validate_every, config["trainer"]["val_check_interval"] = config["trainer"]["val_check_interval"], None
    train = decode(Train, config)
    noise = Made(rows, sizes.d_in, chunk=min(rows, CHUNK), val_rows=min(rows, VAL_ROWS))
    activations = Activations(changed(train.data, source=noise))
    data, module = ActivationData(activations), build_module({"": train.model}, activations)
    start_from(module, activations)
    with tempfile.TemporaryDirectory(dir=directory) as run:
        trainer = build_trainer(train, activations, module, Run(run))
        rounds = Rounds(sizes.steps, Path(run) / "timed.ckpt")
        trainer.callbacks.append(rounds)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
        validation = seconds(lambda: trainer.validate(module, datamodule=data, verbose=False))
    rare = rounds.checkpoint_seconds / train.checkpoint_every_steps + validation / validate_every
    return Measured(module.step().kernels, rounds.loop, rounds.bare, rounds.checkpoint_seconds, validation, rare)


def print_table(sizes: Sizes, device: str, precision: str, measured: Measured) -> None:
    """The share of the bare step's rate, without what is rare and with it."""
    milliseconds = statistics.median(measured.loop) * 1e3
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()}, {os.cpu_count()} cores"
    print(
        f"{machine}; batch {sizes.batch}, d_in {sizes.d_in}, d_sae {sizes.d_sae}, k {sizes.k}, {precision}, kernels "
        f"{measured.kernels}; {len(measured.loop)} × {sizes.steps} steps\n"
        f"{'bare step':44}{statistics.median(measured.bare) * 1e3:9.2f} ms\n"
        f"{'step of the run':44}{milliseconds:9.2f} ms   {measured.share():.1%} of the bare step's rate\n"
        f"{f'checkpoint {measured.checkpoint:.2f} s, validation {measured.validation:.2f} s':44}"
        f"{measured.rare * 1e3:9.2f} ms a step\n"
        f"{'all together':44}{milliseconds + measured.rare * 1e3:9.2f} ms   {measured.share(rare=True):.1%} of the "
        "bare step's rate"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Sizes()
    parser.add_argument("--d-in", type=int, default=default.d_in)
    parser.add_argument("--d-sae", type=int, default=default.d_sae)
    parser.add_argument("--prefixes", help="of the model; its own five unless given, as [4,20]")
    parser.add_argument("--k", type=int, default=default.k)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--rows", type=int, default=default.rows, help="at most, on disk")
    parser.add_argument("--steps", type=int, default=default.steps, help="of a round")
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--device", choices=[*ACCELERATORS], default="cpu")
    parser.add_argument("--kernels", choices=get_args(Kernels), default="auto")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; use --device cpu")
    keep_freed_memory()
    quiet_lightning()
    sizes = Sizes(*(getattr(a, name) for name in Sizes._fields))
    with tempfile.TemporaryDirectory() as directory:
        measured = measure(sizes, Path(directory), a.device, a.kernels, a.precision)
    print_table(sizes, a.device, a.precision, measured)


if __name__ == "__main__":
    main()
