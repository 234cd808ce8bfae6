"""Which latents fire on which rows: one pass over the rows, held as a sparse matrix."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from msae.data.batches import moved
from msae.data.rows import Rows
from msae.progress import progress
from msae.sae import MatryoshkaSAE, SparseCode, encode_sparse

BATCH = 8192  # rows read at once
BLOCK = 2**24  # activations that are held densely at once, so that they stay in a CPU's cache
BLOCK_OF_GPU = 2**26  # the same where each block makes the host wait
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


def pieces(shards: Rows, tokens: int | None) -> list[Piece]:
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


@runtime_checkable
class Readable(Protocol):
    """Rows that can be read more than once."""

    def read(self, what: str) -> Iterator[Tensor]:
        """The rows in batches [n, d_in], in order, while a progress bar says `what` they are read for."""
        ...


class FirstRows:
    """About `tokens` rows of shards (None: all), held-out ones first, in batches [≤ BATCH, d_in] as `Rows.dtype`.

    BOS, padding and special tokens are not among them: the harvest left them out. Raises ValueError in one line if
    there are no rows.
    """

    def __init__(self, shards: Rows, tokens: int | None = None) -> None:
        self.shards, self.pieces = shards, pieces(shards, tokens)
        if not self.pieces:
            raise ValueError(f"tokens={tokens} leaves no rows of {shards}; give tokens=1_000_000, or null: all")

    def __len__(self) -> int:
        return self.pieces[-1].stop

    def read(self, what: str) -> Iterator[Tensor]:
        """The batches, each of one shard."""
        with progress(len(self), what) as bar:
            for piece in self.pieces:
                rows = self.shards.activations(piece.split, piece.shard)
                for start in range(0, piece.rows, BATCH):
                    taken = slice(start, min(start + BATCH, piece.rows))
                    x = rows[taken] if piece.index is None else rows[piece.index[taken]]
                    yield x
                    bar.update(len(x))


@torch.no_grad()
def latent_codes(sae: MatryoshkaSAE, x: Tensor) -> SparseCode:
    """activation · ‖W_dec row‖ of the latents active at inference, in raw units, on the CPU.

    Encodes rows [rows, d_in] where the SAE is, so many at once that `BLOCK` activations are dense. Latents are int32.
    """
    norm = torch.as_tensor(sae.contribution_norm() / sae.target_scale).expand(sae.d_sae)
    block = BLOCK_OF_GPU if norm.is_cuda else BLOCK
    parts = []
    for some in x.split(max(1, block // sae.d_sae)):
        code = encode_sparse(sae, moved(some, sae.W_dec))
        acts = (code.acts * norm[code.latents]).float()
        parts.append(SparseCode(code.offsets.cpu(), code.latents.int().cpu(), acts.cpu(), sae.d_sae))
    return SparseCode.cat(parts)


def as_csr(code: SparseCode) -> csr_array:
    """The code in SciPy's form [rows, d_sae], which shares its memory."""
    parts = (code.acts.numpy(), code.latents.numpy(), code.offsets.numpy())
    return csr_array(parts, shape=(code.batch, code.d_sae))


@dataclass(frozen=True)
class Firings:
    """The code of some rows: activation · ‖decoder row‖ in raw units; latents are int32."""

    code: SparseCode

    @cached_property
    def matrix(self) -> csr_array:
        """The code in SciPy's form."""
        return as_csr(self.code)

    @property
    def fires(self) -> csr_array:
        """1 where a latent fires, int32."""
        ones = np.ones(self.matrix.nnz, dtype=np.int32)
        return csr_array((ones, self.matrix.indices, self.matrix.indptr), shape=self.matrix.shape)

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
        return Firings(SparseCode(*parts, self.d_sae))


def collect(saes: Sequence[MatryoshkaSAE], rows: Readable, floor: float = 0.0) -> list[Firings]:
    """The firings of each SAE, which all encode a batch while it is at hand; 8 bytes for each activation.

    What is at most `floor` of its latent's maximum counts as silent.
    """
    codes: list[list[SparseCode]] = [[] for _ in saes]
    for x in rows.read("encode"):
        for sae, parts in zip(saes, codes, strict=True):
            parts.append(latent_codes(sae, x))
    firings = []
    for parts in codes:
        code = SparseCode.cat(parts)
        parts.clear()  # of 10M tokens a GB and more
        firings.append(Firings(code.strong(floor)))
    return firings
