"""Which latents fire on which rows: one pass over the shards, held as a sparse matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from msae.data.shards import Shards
from msae.evaluation.truth import latent_codes
from msae.progress import progress
from msae.sae import MatryoshkaSAE

BATCH = 8192  # rows encoded at once
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Piece:
    """Rows of one shard: all of them, or those in `index`; the first is row `start` of the firings."""

    split: str
    shard: int
    start: int
    rows: int
    index: Tensor | None = None

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + self.rows


def pieces(shards: Shards, tokens: int | None) -> list[Piece]:
    """Held-out rows first, then training rows, until there are `tokens` (None: all).

    Of text the last shard gives whole sequences, so that a context has all of its activations; a few more rows.
    """
    found: list[Piece] = []
    start = 0
    for split in ("val", "train"):
        for shard, rows in enumerate(shards.rows(split)):
            left = rows if tokens is None else tokens - start
            if left <= 0:
                return found
            index = None
            if rows > left:
                beside = shards.index(split, shard)
                index = torch.arange(left)
                if "sequence" in beside:
                    sequence = beside["sequence"].long()
                    last = int(torch.searchsorted(sequence.bincount().cumsum(0), left))
                    index = (sequence <= last).nonzero().flatten()
            found.append(Piece(split, shard, start, rows if index is None else len(index), index))
            start = found[-1].stop
    return found


def read(shards: Shards, piece: Piece, batch: int = BATCH) -> Iterator[Tensor]:
    """The piece's activations [≤ batch, d_in] in float32, in order."""
    rows = shards.activations(piece.split, piece.shard)
    for start in range(0, piece.rows, batch):
        stop = min(start + batch, piece.rows)
        yield (rows[start:stop] if piece.index is None else rows[piece.index[start:stop]]).float()


@dataclass(frozen=True)
class Firings:
    """Activations [rows, d_sae] × ‖decoder row‖, in raw units, sparse by row; a row's latents are in order."""

    matrix: csr_array
    pieces: list[Piece]

    @property
    def rows(self) -> int:
        """Tokens, or rows of synthetic data."""
        return int(self.matrix.shape[0])

    @property
    def d_sae(self) -> int:
        """Latents."""
        return int(self.matrix.shape[1])

    def counts(self) -> Array:
        """Rows on which each latent fires [d_sae] int64."""
        return np.bincount(self.matrix.indices, minlength=self.d_sae)

    def largest(self) -> Array:
        """Each latent's maximum [d_sae], 0 where it never fires."""
        most = np.zeros(self.d_sae, dtype=np.float32)
        np.maximum.at(most, self.matrix.indices, self.matrix.data)
        return most

    def strong(self, floor: float) -> "Firings":
        """Without what is at most `floor` of its latent's maximum."""
        keep = self.matrix.data > floor * self.largest()[self.matrix.indices]
        offsets = np.concatenate([[0], keep.cumsum()])[self.matrix.indptr]
        matrix = csr_array((self.matrix.data[keep], self.matrix.indices[keep], offsets), shape=self.matrix.shape)
        return Firings(matrix, self.pieces)

    def shuffled(self, seed: int, block: int = 2**16) -> "Firings":
        """Every latent's firings moved by an offset of its own within each block of rows, as if latents were strangers.

        Rates, activations and what a latent's firings have to do with each other stay; what two latents have to do
        with each other goes.
        """
        random = np.random.default_rng(seed)
        indices, data = np.empty_like(self.matrix.indices), np.empty_like(self.matrix.data)
        offsets = np.empty_like(self.matrix.indptr)
        for start in range(0, self.rows, block):
            part = self.matrix[start : start + block].tocoo()
            offset = random.integers(0, part.shape[0], self.d_sae)
            row = (part.coords[0] + offset[part.coords[1]]) % part.shape[0]
            moved = csr_array((part.data, (row, part.coords[1])), shape=part.shape)
            moved.sort_indices()
            first = self.matrix.indptr[start]  # a block keeps its firings, and so its place
            indices[first : first + moved.nnz], data[first : first + moved.nnz] = moved.indices, moved.data
            offsets[start : start + len(moved.indptr)] = first + moved.indptr
        return Firings(csr_array((data, indices, offsets), shape=self.matrix.shape), self.pieces)


def collect(sae: MatryoshkaSAE, shards: Shards, tokens: int | None = None, floor: float = 0.0) -> Firings:
    """Encode up to about `tokens` rows, held-out ones first; 8 bytes for each activation.

    What is at most `floor` of its latent's maximum counts as silent. BOS, padding and special tokens are not among the
    rows: the harvest left them out.
    """
    parts = pieces(shards, tokens)
    if not parts:
        raise ValueError(f"tokens={tokens} leaves no rows of {shards.directory}; give tokens=1_000_000, or null: all")
    rows = parts[-1].stop
    latents, values, counts = [], [], []
    with progress(rows, "encode") as bar:
        for piece in parts:
            for x in read(shards, piece):
                codes = latent_codes(sae, x)
                latents.append(codes.index.int().numpy())
                values.append(codes.value.numpy())
                counts.append(codes.row.bincount(minlength=codes.rows).numpy())
                bar.update(len(x))
    offsets = np.concatenate([[0], np.concatenate(counts).cumsum()])
    indices = np.concatenate(latents)
    latents.clear()  # of 10M tokens a GB and more
    data = np.concatenate(values)
    values.clear()
    matrix = csr_array((data, indices, offsets), shape=(rows, sae.d_sae))
    return Firings(matrix, parts).strong(floor)
