"""Which latents fire on which rows: one pass over the shards, held as a sparse matrix."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from msae.data.shards import Shards
from msae.evaluation.truth import as_csr, firing_matrix, latent_codes
from msae.progress import progress
from msae.sae import MatryoshkaSAE, SparseCode

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
    """Held-out rows first, then training rows, until there are `tokens` (None: all)."""
    parts: list[Piece] = []
    start = 0
    for split in ("val", "train"):
        for shard, rows in enumerate(shards.rows(split)):
            missing = rows if tokens is None else tokens - start
            if missing <= 0:
                return parts
            index = first_rows(shards.index(split, shard), missing) if missing < rows else None
            parts.append(Piece(split, shard, start, rows if index is None else len(index), index))
            start = parts[-1].stop
    return parts


def first_rows(index: dict[str, Tensor], n: int) -> Tensor:
    """The first `n` rows of a shard; of text whole sequences, so that a context has all of its activations."""
    if "sequence" not in index:
        return torch.arange(n)
    sequence = index["sequence"].long()
    last = int(torch.searchsorted(sequence.bincount().cumsum(0), n))
    return (sequence <= last).nonzero().flatten()


def read(shards: Shards, piece: Piece, batch: int = BATCH) -> Iterator[Tensor]:
    """The piece's activations [≤ batch, d_in] in float32, in order."""
    rows = shards.activations(piece.split, piece.shard)
    for start in range(0, piece.rows, batch):
        stop = min(start + batch, piece.rows)
        yield (rows[start:stop] if piece.index is None else rows[piece.index[start:stop]]).float()


@dataclass(frozen=True)
class Firings:
    """The code of rows of some shards: activation · ‖decoder row‖ in raw units; latents are int32."""

    code: SparseCode
    pieces: list[Piece]

    @cached_property
    def matrix(self) -> csr_array:
        """The code in SciPy's form."""
        return as_csr(self.code)

    @property
    def fires(self) -> csr_array:
        """1 where a latent fires."""
        return firing_matrix(self.matrix)

    @property
    def rows(self) -> int:
        """Tokens, or rows of synthetic data."""
        return self.code.batch

    @property
    def d_sae(self) -> int:
        """Latents."""
        return self.code.d_sae

    @cached_property
    def counts(self) -> Array:
        """Rows on which each latent fires [d_sae] int64."""
        return self.code.fired().numpy()

    @cached_property
    def largest(self) -> Array:
        """Each latent's maximum [d_sae], 0 where it never fires."""
        return self.code.largest().numpy()

    def shuffled(self, seed: int, block: int = 2**16) -> "Firings":
        """Move every latent's firings by an offset of its own within each block of rows, as if latents were strangers.

        Rates, activations and what a latent's firings have to do with each other stay; what two latents have to do
        with each other goes.
        """
        random = np.random.default_rng(seed)
        latents, acts = np.empty_like(self.matrix.indices), np.empty_like(self.matrix.data)
        offsets = np.empty_like(self.matrix.indptr)
        for start in range(0, self.rows, block):
            part = self.matrix[start : start + block].tocoo()
            row, latent = part.coords
            row = (row + random.integers(0, part.shape[0], self.d_sae)[latent]) % part.shape[0]
            moved = csr_array((part.data, (row, latent)), shape=part.shape)  # sorted within each row
            first = self.matrix.indptr[start]  # a block has as many firings as before, so they have the same place
            latents[first : first + moved.nnz], acts[first : first + moved.nnz] = moved.indices, moved.data
            offsets[start : start + len(moved.indptr)] = first + moved.indptr
        parts = (torch.from_numpy(offsets).long(), torch.from_numpy(latents), torch.from_numpy(acts))
        return Firings(SparseCode(*parts, self.d_sae), self.pieces)


def collect(sae: MatryoshkaSAE, shards: Shards, tokens: int | None = None, floor: float = 0.0) -> Firings:
    """Encode about `tokens` rows (None: all), held-out ones first; 8 bytes for each activation.

    What is at most `floor` of its latent's maximum counts as silent. BOS, padding and special tokens are not among the
    rows: the harvest left them out. Raises ValueError in one line if there are no rows.
    """
    parts = pieces(shards, tokens)
    if not parts:
        raise ValueError(f"tokens={tokens} leaves no rows of {shards.directory}; give tokens=1_000_000, or null: all")
    codes = list[SparseCode]()
    with progress(parts[-1].stop, "encode") as bar:
        for piece in parts:
            for x in read(shards, piece):
                code = latent_codes(sae, x)
                codes.append(replace(code, latents=code.latents.int()))
                bar.update(len(x))
    code = SparseCode.cat(codes)
    codes.clear()  # of 10M tokens a GB and more
    return Firings(code.strong(floor), parts)
