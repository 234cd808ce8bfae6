"""Rows in memory: the chunks of a source, of which nothing is written."""

import ctypes
import math
import mmap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from msae.data.harvest import directory_of
from msae.data.rows import Rows, Stored, as_array
from msae.data.shards import identity_hash
from msae.sources.int8 import dequantise
from msae.sources.source import Source, Split

CAN_RELEASE = hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap, "MAP_ANONYMOUS")


class MemoryRows(Rows):
    """One hook's rows of some chunks of a source.

    splits: "train" and "val" → the chunks' rows. statistics: E x [d_in] float64 and E‖x‖² of the training rows, None
    where a resumed run has made none of them.
    """

    def __init__(
        self, source: Source, hook_name: str, splits: dict[str, list[Split]], statistics: tuple[Tensor, float] | None
    ) -> None:
        self.hook_name, self.splits, self.truth = hook_name, splits, source.truth()
        self.identity, self.provenance = source.identity(hook_name), source.provenance()
        self.identity_hash = identity_hash(self.identity)
        self.name = directory_of(source, hook_name, "").name
        made = [*splits["train"], *splits["val"]]
        if not made:
            raise ValueError(f"{source.name} holds out no rows; raise data.source.val_fraction or give more text")
        first = made[0].activations[hook_name]
        self.d_in, self.stored_dtype = first.shape[1], first.dtype
        if statistics is not None:
            self.mean, self.mean_square = statistics

    def __str__(self) -> str:
        return f"{self.name} (in memory)"

    def rows(self, split: str) -> list[int]:
        """As `Rows.rows`."""
        return [len(piece.activations[self.hook_name]) for piece in self.splits[split]]

    def read(self, split: str, starts: Tensor, stops: Tensor) -> Stored:
        """As `Rows.read`."""
        first = np.cumsum([0, *self.rows(split)])
        pieces = np.searchsorted(first, starts.numpy(), "right") - 1
        blocks = zip(pieces.tolist(), (starts - first[pieces]).tolist(), (stops - first[pieces]).tolist(), strict=True)
        values = [values_of(piece, self.hook_name) for piece in self.splits[split]]
        return joined([{name: tensor[a:b] for name, tensor in values[i].items()} for i, a, b in blocks])

    def activations(self, split: str, piece: int) -> Tensor:
        """As `Rows.activations`."""
        rows = self.splits[split][piece]
        values, scales = rows.activations[self.hook_name], rows.scales.get(self.hook_name)
        return values if scales is None else dequantise(values, scales)

    def index(self, split: str, piece: int) -> dict[str, Tensor]:
        """As `Rows.index`."""
        return self.splits[split][piece].index


class MappedTensor:
    """A tensor in an anonymous memory map: gone with it, and its first rows sooner (`release`, on Linux).

    What malloc hands out it may keep when it is freed, and training tells it to (`msae.training.memory`).
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if CAN_RELEASE else {}
        count = math.prod(shape)
        self._map = mmap.mmap(-1, max(1, count * dtype.itemsize), **flags)
        whole = torch.frombuffer(self._map, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
        self.tensor = whole.view(*shape)

    def release(self, rows: int) -> None:
        """Give back what lies before this row, which must not be read any more."""
        pages = rows * self.tensor[0].nbytes // mmap.PAGESIZE if rows else 0
        if CAN_RELEASE and pages:
            self._map.madvise(mmap.MADV_DONTNEED, 0, pages * mmap.PAGESIZE)


def trim_malloc() -> None:
    """Hand memory that was freed back to the system (glibc; elsewhere nothing happens)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if CAN_RELEASE else None
    if trim is not None:
        trim(0)


def in_mapped_memory(rows: Split, hook_names: list[str]) -> Split:
    """The same rows of these hooks, in mapped memory."""

    def copied(tensor: Tensor) -> Tensor:
        mapped = MappedTensor(tensor.shape, tensor.dtype).tensor
        np.copyto(as_array(mapped), as_array(tensor))
        return mapped

    activations = {hook: copied(rows.activations[hook]) for hook in hook_names}
    return Split(
        activations, rows.index, {hook: copied(rows.scales[hook]) for hook in hook_names if hook in rows.scales}
    )


def values_of(rows: Split, hook_name: str) -> dict[str, Tensor]:
    """A hook's activations [n, d_in] and, beside int8, scales [n]."""
    scales = rows.scales.get(hook_name)
    return {"activations": rows.activations[hook_name]} | ({} if scales is None else {"scales": scales})


def joined(blocks: Sequence[Mapping[str, Tensor]], as_tensors: bool = False) -> Stored:
    """The rows of all blocks, one after the other: arrays, or tensors on their device."""
    together: Stored = {}
    for name, first in blocks[0].items():
        parts = [block[name] for block in blocks]
        if as_tensors:
            together[name] = torch.cat(parts)
            continue
        mapped = MappedTensor((sum(map(len, parts)), *first.shape[1:]), first.dtype).tensor
        together[name] = np.concatenate([as_array(part) for part in parts], out=as_array(mapped))
    return together
