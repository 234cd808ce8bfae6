"""Checkpoints that survive: written atomically, the one before kept, a truncated one passed over."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from msae.files import write
from msae.progress import say
from msae.runs import Run, last_run, open_run

NEEDED = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "rng"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes whole files; the run's last checkpoint becomes the previous one before a new one takes its name."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)

        def fill(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # given a path, torch makes a RuntimeError of a full disk
                torch.save(checkpoint, file)
            last, previous = self.run.last_checkpoint, self.run.previous_checkpoint
            if path.name == last.name and path.exists():  # a second name rather than a new one: last is always there
                previous.unlink(missing_ok=True)
                os.link(path, previous)

        write(path, fill, "free space, then resume with ckpt_path=last")


def checkpoint_callbacks(run: Run, every_steps: int, best: str | None) -> list[ModelCheckpoint]:
    """Lightning's ModelCheckpoint: the last every so many steps, and the best by a metric if one is given."""
    shared: dict[str, Any] = {"dirpath": run.checkpoints, "enable_version_counter": False, "save_top_k": 1}
    last = ModelCheckpoint(filename=run.last_checkpoint.stem, every_n_train_steps=every_steps, **shared)
    return [last] if best is None else [last, ModelCheckpoint(filename="best", monitor=best, mode="min", **shared)]


def find_checkpoint(ckpt_path: str | None, run_dir: str | None, runs: str, name: str) -> Path | None:
    """The checkpoint to resume: `last` is that of run_dir or of the newest run of this name; else a run or a file."""
    if ckpt_path is None:
        return None
    given = Path(ckpt_path)
    if ckpt_path == "last":
        run = last_run(name, runs) if run_dir is None else Run(run_dir)
    elif given.is_file():  # this one, not the run's last
        if problem := unreadable(given):
            raise ValueError(f"ckpt_path: {problem}; give ckpt_path=last or a checkpoint of a run")
        return given
    else:
        run = Run(given)
    if not run.checkpoints.is_dir():
        raise ValueError(f"ckpt_path: {run} is not a run directory with checkpoints/; see ls {runs}")
    return resume_from(run)


def run_of(checkpoint: Path) -> Run:
    """The run that a checkpoint belongs to."""
    return open_run(checkpoint.parent.parent)


def resume_from(run: Run) -> Path:
    """The newest readable checkpoint of a run: the last, or the previous one with a line that says so.

    Raises ValueError in one line if neither can be read.
    """
    problems: list[str] = []
    for path in (run.last_checkpoint, run.previous_checkpoint):
        problem = unreadable(path) if path.exists() else f"{path.name} is missing"
        if problem is None:
            for line in problems:
                say(f"resume: {line}; going on from {path}")
            return path
        problems.append(problem)
    raise ValueError(
        f"no checkpoint in {run.checkpoints} can be read ({'; '.join(problems)}); start a new run without ckpt_path"
    )


def unreadable(path: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None if it can."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated zip, a foreign pickle: torch raises many kinds
        return f"{path} cannot be read ({str(error).splitlines()[0]})"
    return None if checkpoint.keys() >= NEEDED else f"{path} is not a training checkpoint"
