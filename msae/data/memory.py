"""Rows in memory: the chunks of a source, of which nothing is written."""

import numpy as np
import torch
from torch import Tensor

from msae.data.rows import Rows, Stored, as_array
from msae.data.shards import identity_hash
from msae.sources.int8 import dequantise
from msae.sources.source import Source, Split


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
        self.name = f"{source.name}-{hook_name}-{self.identity_hash}"
        first = next(piece for pieces in splits.values() for piece in pieces).activations[hook_name]
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
        return joined([stored(self.splits[split][i], self.hook_name, slice(a, b)) for i, a, b in blocks])

    def activations(self, split: str, piece: int) -> Tensor:
        """As `Rows.activations`."""
        rows = self.splits[split][piece]
        values, scales = rows.activations[self.hook_name], rows.scales.get(self.hook_name)
        return values if scales is None else dequantise(values, scales)

    def index(self, split: str, piece: int) -> dict[str, Tensor]:
        """As `Rows.index`."""
        return self.splits[split][piece].index


def stored(rows: Split, hook_name: str, some: slice | Tensor, device: str | None = None) -> Stored:
    """Some of a chunk's rows: a view if they are a slice, else a copy. With a device, tensors on it."""
    tensors = {"activations": rows.activations[hook_name], "scales": rows.scales.get(hook_name)}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if device is not None:
        return {name: tensor[some].to(device) for name, tensor in given.items()}
    return {name: as_array(t)[some if isinstance(some, slice) else some.numpy()] for name, t in given.items()}


def joined(blocks: list[Stored]) -> Stored:
    """The rows of all blocks, one after the other."""
    names = blocks[0].keys()
    if isinstance(blocks[0]["activations"], Tensor):
        return {name: torch.cat([block[name] for block in blocks]) for name in names}
    return {name: np.concatenate([block[name] for block in blocks]) for name in names}
