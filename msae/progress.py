"""One progress bar for every long step: amount, rate and time left, quiet where nobody is looking."""

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, what: str, unit: str = "tok", initial: int = 0, disable: bool = False) -> "tqdm[Any]":
    """A bar that counts `unit`s up to `total`; in a log file it prints a line every 30 s instead of ten a second."""
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
