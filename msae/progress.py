"""Progress of long work on stderr: a bar, a line, and which process of a distributed run may write them."""

import os
import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, what: str, unit: str = "tok", initial: int = 0, disable: bool = False) -> "tqdm[Any]":
    """A bar that counts `unit`s up to `total`; in a log file it prints a line every 30 s instead of five a second."""
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        unit_scale=True,
        disable=disable,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )


def say(line: str) -> None:
    """Print a line to stderr at once."""
    print(line, file=sys.stderr, flush=True)


def is_other_rank() -> bool:
    """Whether this process is not the first of its run; launchers say so in the environment."""
    return any(int(os.environ.get(v, 0)) > 0 for v in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
