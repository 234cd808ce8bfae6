"""Activations that are there already: the rows of a tensor."""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
import xxhash
from torch import Tensor

from msae.seeds import stream
from msae.sources.source import Chunk, Split


class TensorSource:
    """The rows of a tensor [rows, d_in], in an order drawn with `seed`; a share of them is held out.

    Raises ValueError in one line for anything but two dimensions of floating-point numbers.
    """

    name: ClassVar[str] = "tensor"
    hook_names: ClassVar[list[str]] = ["tensor"]
    budget_key: ClassVar[str] = "the number of rows"

    def __init__(self, x: Tensor, val_fraction: float = 0.05, seed: int = 0, chunk_rows: int = 65_536) -> None:
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected floating-point rows [rows, d_in]")
        if not 0 <= val_fraction <= 1:
            raise ValueError(f"val_fraction={val_fraction:g}, expected a share between 0 and 1")
        x = x.detach().cpu()
        self.x = x.float() if x.dtype == torch.float64 else x
        self.settings = {"val_fraction": val_fraction, "seed": seed, "chunk_rows": chunk_rows}
        order = torch.randperm(len(x), generator=stream(seed, "rows of a tensor"))
        held_out = round(val_fraction * len(x))
        self._order = {"val": order[:held_out].split(chunk_rows), "train": order[held_out:].split(chunk_rows)}

    @cached_property
    def _checksum(self) -> str:
        return xxhash.xxh3_64_hexdigest(self.x.contiguous().view(torch.uint8).numpy().data)

    def identity(self, hook_name: str) -> dict[str, Any]:
        content = {"shape": list(self.x.shape), "dtype": str(self.x.dtype), "xxh3": self._checksum}
        return {"source": "tensor", "hook_name": hook_name, **content, **self.settings}

    def provenance(self) -> dict[str, Any]:
        return {}

    def expected_rows(self) -> int:
        return len(self.x)

    def most_rows(self) -> tuple[int, int]:
        return int(self.settings["chunk_rows"]), sum(map(len, self._order["val"]))

    def width(self, hook_name: str) -> int:
        return self.x.shape[1]

    def bytes_per_row(self, hook_name: str) -> int:
        return self.x.shape[1] * self.x.dtype.itemsize

    def truth(self) -> None:
        return None

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        for number in range(state["chunks"] if state else 0, max(map(len, self._order.values()))):
            splits = {
                split: partial(self._rows, order[number]) for split, order in self._order.items() if number < len(order)
            }
            yield Chunk(splits, {"chunks": number + 1})

    def _rows(self, order: Tensor) -> Split:
        return Split({self.hook_names[0]: self.x[order]})
