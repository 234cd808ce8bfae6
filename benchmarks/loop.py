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
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from reader import CHUNK, Made
from step import cpu_model

from msae.config import compose
from msae.data.datamodule import ActivationData
from msae.data.source import Chunk, Split
from msae.sae import DictionaryAdam, choose_kernels, encode_for_training, matryoshka_loss
from msae.training.job import build_module, build_trainer, quiet_lightning
from msae.training.memory import keep_freed_memory
from msae.training.module import MatryoshkaTraining

VAL_ROWS = 65_536


class Noise(Made):
    """Rows of noise, the first of which are held out too."""

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        for number, chunk in enumerate(super().chunks(state)):
            if number == 0:
                chunk.splits["val"] = Split({"hook": chunk.splits["train"].activations["hook"][:VAL_ROWS]})
            yield chunk


class Rounds(L.Callback):
    """Stops the clock of the run after every `steps` steps, and takes as many bare ones."""

    def __init__(self, steps: int, directory: Path) -> None:
        self.steps, self.directory, self.begun = steps, directory, 0.0
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.checkpoint = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.steps:
            return
        seconds = (time.perf_counter() - self.begun) / self.steps
        assert isinstance(module, MatryoshkaTraining)
        step = bare_step(module, batch.to(torch.float32))
        step()
        begun = time.perf_counter()
        for _ in range(self.steps):
            step()
        if batch_idx > self.steps:  # the first round warms up
            self.loop.append(seconds)
            self.bare.append((time.perf_counter() - begun) / self.steps)
        del step
        self.begun = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.checkpoint = timed(lambda: trainer.save_checkpoint(self.directory / "timed.ckpt"))


def bare_step(module: MatryoshkaTraining, x: torch.Tensor) -> Any:
    """A step of a copy of the module's SAE as it is now, on its own and on these rows; weights stay where they are."""
    sae = copy.deepcopy(module.sae)
    kernels = choose_kernels(module.kernels, sae, x)
    optimizer = DictionaryAdam(sae, 0.0, module.betas, module.grad_clip, module.decoder, kernels)

    def step() -> None:
        optimizer.zero_grad()
        code = encode_for_training(sae, x, kernels)
        loss = matryoshka_loss(sae, x, module.objective, dead=sae.dead(module.dead_after_tokens), code=code)
        loss.total.backward()
        sae.update_threshold(code.values.detach(), module.threshold_rate)
        sae.update_fired(code.fired(), len(x))
        optimizer.step()

    return step


def timed(what: Any) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    what()
    return time.perf_counter() - begun


def measure(arguments: argparse.Namespace, directory: Path) -> None:
    """One run, then the table."""
    a = arguments
    steps = (a.rounds + 2) * a.steps
    rows = max(CHUNK, min(steps * a.batch, a.rows))
    root, sizes = directory / "shards", [f"model.d_sae={a.d_sae}", f"model.k={a.k}"]
    given = [*sizes, f"model.prefixes={a.prefixes}"] if a.prefixes else sizes
    cfg = compose("train", ["+experiment=gpt2_l8", *given, f"tokens={steps * a.batch}"])
    validate_every, cfg.trainer.val_check_interval = cfg.trainer.val_check_interval, None
    data = ActivationData(Noise(rows, a.d_in), root=str(root), batch_tokens=a.batch)
    module = build_module(cfg, data)
    run = directory / "run"
    trainer = build_trainer(cfg, data, module, run)
    rounds = Rounds(a.steps, run)
    trainer.callbacks.append(rounds)  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=data)
    checkpoint, validation = rounds.checkpoint, timed(lambda: trainer.validate(module, datamodule=data, verbose=False))
    kernels = choose_kernels(module.kernels, module.sae, torch.empty(a.batch, a.d_in))
    loop, bare = statistics.median(rounds.loop), statistics.median(rounds.bare)
    print(
        f"{cpu_model()}, {os.cpu_count()} cores; batch {a.batch}, d_in {a.d_in}, d_sae {a.d_sae}, k {a.k}, kernels "
        f"{kernels}; {len(rounds.loop)} × {a.steps} steps"
    )
    rare = checkpoint / cfg.checkpoint_every_steps + validation / validate_every
    share = statistics.median(b / o for b, o in zip(rounds.bare, rounds.loop, strict=True))
    whole = statistics.median(b / (o + rare) for b, o in zip(rounds.bare, rounds.loop, strict=True))
    print(f"{'bare step':44}{bare * 1e3:9.2f} ms")
    print(f"{'step of the run':44}{loop * 1e3:9.2f} ms   {share:.1%} of the bare step's rate")
    print(f"{f'checkpoint {checkpoint:.2f} s, validation {validation:.2f} s':44}{rare * 1e3:9.2f} ms a step")
    print(f"{'all together':44}{(loop + rare) * 1e3:9.2f} ms   {whole:.1%} of the bare step's rate")


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
    arguments = parser.parse_args()
    keep_freed_memory()
    quiet_lightning()
    with tempfile.TemporaryDirectory() as directory:
        measure(arguments, Path(directory))


if __name__ == "__main__":
    sys.exit(main())
