"""Steps a second of a whole training run, beside those of the bare step that it takes.

    python benchmarks/loop.py                                             # GPT-2's width
    python benchmarks/loop.py --d-in 20 --d-sae 32 --k 2 --batch 512 --steps 500   # what the loop itself costs

The run is that of `python -m msae.train +experiment=gpt2_l8`, on rows of noise: Lightning's loop, the DataModule on
shards in a temporary directory, the progress bar, logging every 50 steps, the learning rate's schedule. After every
--steps steps it waits while a copy of its SAE takes as many bare steps on the batch in memory: forward, loss, backward,
optimizer, threshold, dead latents. Checkpoints and validation are rarer than that, so each is timed by itself and its
share of a step added. Printed are medians of --rounds rounds and of their ratios. Lines of the run go to stderr.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from machine import cpu_model
from reader import CHUNK, Made

from msae.cli.command import compose, plain
from msae.data.activations import Activations
from msae.data.datamodule import ActivationData
from msae.runs import Run
from msae.settings import changed, decode
from msae.training.job import build_module, build_trainer, quiet_lightning, start_from
from msae.training.memory import keep_freed_memory
from msae.training.module import MatryoshkaTraining
from msae.training.settings import Train
from msae.training.step import Moment, Step

VAL_ROWS = 65_536


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
        loop = (time.perf_counter() - self.begun) / self.steps
        assert isinstance(module, MatryoshkaTraining)
        bare = seconds_of_bare_steps(module.step(), batch.to(torch.float32), self.steps)
        if batch_idx > self.steps:  # the first round warms up
            self.loop.append(loop)
            self.bare.append(bare)
        self.begun = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.checkpoint_seconds = seconds(lambda: trainer.save_checkpoint(self.checkpoint))


def seconds_of_bare_steps(of_run: Step, x: torch.Tensor, steps: int) -> float:
    """Seconds a step of a copy of the run's SAE as it is now, on its own and on these rows; its weights stay."""
    step, moment = Step(of_run.recipe, of_run.sae.d_in), Moment(0, total=10**6)
    step.load_state_dict(of_run.state_dict())
    optimizer = step.prepare(moment.total)
    optimizer.param_groups[0]["lr"] = 0.0

    def take(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            step.loss(x, x, moment).loss.total.backward()
            optimizer.step()
            step.after_update()

    take(1)
    return seconds(lambda: take(steps)) / steps


def seconds(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(a: argparse.Namespace, directory: Path) -> None:
    """One run, then the table."""
    tokens = (a.rounds + 2) * a.steps * a.batch
    rows = min(tokens, a.rows)
    settings = {"model.d_sae": a.d_sae, "model.k": a.k, "data.batch_tokens": a.batch, "tokens": tokens}
    settings |= {"data.root": directory / "shards", **({"model.prefixes": a.prefixes} if a.prefixes else {})}
    config = plain(compose("train", ["+experiment=gpt2_l8", *(f"{key}={value}" for key, value in settings.items())]))
    validate_every, config["trainer"]["val_check_interval"] = config["trainer"]["val_check_interval"], None
    train, run = decode(Train, config), Run(directory / "run")
    noise = Made(rows, a.d_in, chunk=min(rows, CHUNK), val_rows=min(rows, VAL_ROWS))
    activations = Activations(changed(train.data, source=noise))
    data, module = ActivationData(activations), build_module({"": train.model}, activations)
    start_from(module, activations)
    trainer = build_trainer(train, activations, module, run)
    rounds = Rounds(a.steps, directory / "timed.ckpt")
    trainer.callbacks.append(rounds)  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=data)
    validation = seconds(lambda: trainer.validate(module, datamodule=data, verbose=False))
    checkpoint, loop, bare = rounds.checkpoint_seconds, rounds.loop, rounds.bare
    rare = checkpoint / train.checkpoint_every_steps + validation / validate_every
    share, whole = (statistics.median(b / (o + more) for b, o in zip(bare, loop, strict=True)) for more in (0, rare))
    milliseconds = statistics.median(loop) * 1e3
    print(
        f"{cpu_model()}, {os.cpu_count()} cores; batch {a.batch}, d_in {a.d_in}, d_sae {a.d_sae}, k {a.k}, kernels "
        f"{module.step().kernels}; {len(loop)} × {a.steps} steps\n"
        f"{'bare step':44}{statistics.median(bare) * 1e3:9.2f} ms\n"
        f"{'step of the run':44}{milliseconds:9.2f} ms   {share:.1%} of the bare step's rate\n"
        f"{f'checkpoint {checkpoint:.2f} s, validation {validation:.2f} s':44}{rare * 1e3:9.2f} ms a step\n"
        f"{'all together':44}{milliseconds + rare * 1e3:9.2f} ms   {whole:.1%} of the bare step's rate"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--prefixes", help="of the model; its own five unless given, as [4,20]")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1_048_576, help="at most, on disk")
    parser.add_argument("--steps", type=int, default=50, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    keep_freed_memory()
    quiet_lightning()
    with tempfile.TemporaryDirectory() as directory:
        measure(a, Path(directory))


if __name__ == "__main__":
    main()
