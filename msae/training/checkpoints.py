"""Checkpoints that survive: written atomically, the one before kept, a truncated one passed over."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Temporary name, sync, rename; `last.ckpt` becomes `previous.ckpt` before a new one takes its name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ValueError(f"cannot write {path}: {error}; free space, then resume with ckpt_path=last") from error
        if path.name == LAST and path.exists():  # a second name rather than a new one: there always is a last.ckpt
            path.with_name(PREVIOUS).unlink(missing_ok=True)
            os.link(path, path.with_name(PREVIOUS))
        os.replace(temporary, path)


def checkpoint_callbacks(directory: Path, every_steps: int, best: str | None) -> list[ModelCheckpoint]:
    """Lightning's ModelCheckpoint: `last.ckpt` every so many steps, and `best.ckpt` by a metric if one is given."""
    shared: dict[str, Any] = {"dirpath": directory, "enable_version_counter": False}
    last = ModelCheckpoint(filename="last", every_n_train_steps=every_steps, save_top_k=1, **shared)
    if best is None:
        return [last]
    return [last, ModelCheckpoint(filename="best", monitor=best, mode="min", save_top_k=1, **shared)]


def resume_from(directory: Path) -> Path:
    """The newest readable checkpoint of a run: last.ckpt, or previous.ckpt with a line that says so.

    Raises ValueError in one line if neither can be read.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        path = directory / name
        if not path.exists():
            problems.append(f"{name} is missing")
            continue
        problem = unreadable(path)
        if problem is None:
            for line in problems:
                print(f"resume: {line}; going on from {path}", file=sys.stderr)
            return path
        problems.append(problem)
    raise ValueError(
        f"no checkpoint in {directory} can be read ({'; '.join(problems)}); start a new run without ckpt_path"
    )


def unreadable(path: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None if it can."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated zip, a foreign pickle: torch raises many kinds
        return f"{path} cannot be read ({str(error).splitlines()[0]})"
    needed = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "rng"}
    return None if needed <= checkpoint.keys() else f"{path} is not a training checkpoint"
