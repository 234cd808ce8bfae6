"""Which kernels `auto` takes on a GPU: what was timed on cards, by `benchmarks/gpu.py`, after it proved them exact."""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("measured.json")


class Timed(NamedTuple):
    """Milliseconds of a step on a card, and with what it was timed."""

    card: str
    capability: str
    torch: str
    triton: str
    precision: str
    d_in: int
    d_sae: int
    batch: int
    dense_ms: float
    triton_ms: float

    @property
    def gain(self) -> float:
        """How many times as fast `triton` was."""
        return self.dense_ms / self.triton_ms


class Choice(NamedTuple):
    """The kernels, and why these."""

    kernels: str
    why: str


@functools.lru_cache
def choose(card: str, capability: str, d_in: int, d_sae: int) -> Choice:
    """`triton` where it gained at the nearest size in every batch and precision timed, else `dense`.

    On this card, or else on others of its compute capability. An SAE of less than a quarter of the weights of any that
    was timed is dense.
    """
    timed = [Timed(**entry) for entry in json.loads(TABLE.read_text())]
    of_card = [t for t in timed if t.card == card] or [t for t in timed if t.capability == capability]
    if not of_card:
        return Choice("dense", f"triton was not timed on {card}: python benchmarks/gpu.py, or model.kernels=triton")

    def distance(t: Timed) -> float:
        return abs(math.log(t.d_in * t.d_sae / (d_in * d_sae)))

    nearest = min(map(distance, of_card))
    at_size = [t for t in of_card if distance(t) == nearest]
    worst = min(at_size, key=lambda t: t.gain)
    size = f"{worst.d_in} × {worst.d_sae:,} on {worst.card}"
    if 4 * d_in * d_sae < min(t.d_in * t.d_sae for t in of_card):
        return Choice("dense", f"far smaller than what was timed, {size}")
    if worst.gain <= 1:
        return Choice("dense", f"triton took {1 / worst.gain:.2f} × as long at {size}")
    return Choice("triton", f"{worst.gain:.2f} × as fast as dense at {size}")
