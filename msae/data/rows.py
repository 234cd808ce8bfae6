"""Rows of activations as training and everything after it reads them, wherever they are: on disk or in memory."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from msae.data.order import Pool, ShardOrder
from msae.sources.int8 import dequantise

Array = np.ndarray[Any, Any]
# activations [n, d_in] as they are kept, beside int8 scales [n]: arrays (bfloat16 as int16), or tensors on a device
Stored = dict[str, Any]
ROWS = ("activations", "scales")


class Feed(Protocol):
    """The rows of one rank's training batches, in pools of which each is read once, in turn."""

    @property
    def depends_on(self) -> dict[str, Any]:
        """What the batches depend on besides seed, rows, and their size."""

    def parts(self, number: int) -> list[tuple[Pool, Tensor]]:
        """The pools that batch `number` draws from, and which of their rows [n], in turn."""

    def read(self, pool: Pool) -> list[Stored]:
        """A pool's rows, of x and of the target if there is one."""

    def ahead(self, first: int, stop: int) -> AbstractContextManager[None]:
        """While this context lasts, the rows of batches first … stop − 1 are made."""

    def state(self, number: int) -> dict[str, Any]:
        """What `resume` needs besides the number of the next batch; JSON."""

    def resume(self, number: int, state: dict[str, Any]) -> None:
        """Go on with batch `number`."""


class Rows(ABC):
    """The rows of one hook in two splits, "train" and "val", each in pieces: shards on disk, chunks in memory.

    mean [d_in] float64, mean_square: E x and E‖x‖² of the training rows. truth: the features of a synthetic source.
    """

    name: str  # of the shard directory that these rows have or would have
    hook_name: str
    identity: dict[str, Any]
    identity_hash: str
    provenance: dict[str, Any]
    d_in: int
    stored_dtype: torch.dtype
    mean: Tensor
    mean_square: float
    truth: dict[str, Tensor] | None
    is_endless = False  # whether training goes on to rows that are not here yet

    def __str__(self) -> str:
        return self.name

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows in batches."""
        return torch.float32 if self.stored_dtype == torch.int8 else self.stored_dtype

    def feed(self, sides: "Sequence[Rows]", batch_tokens: int, seed: int, rank: int, world: int) -> Feed:
        """The batches of `sides`: these rows, and those of the target if there is one."""
        return WholeFeed(sides, batch_tokens, seed, rank, world)

    @abstractmethod
    def rows(self, split: str) -> list[int]:
        """The number of rows in each piece of a split."""

    @abstractmethod
    def read(self, split: str, starts: Tensor, stops: Tensor) -> Stored:
        """Blocks of rows start … stop, one after the other, as they are kept; `take` makes them `dtype`.

        Rows are numbered through all pieces of the split; a block lies in one piece.
        """

    @abstractmethod
    def activations(self, split: str, piece: int) -> Tensor:
        """All activations [rows, d_in] of one piece, as `dtype`."""

    @abstractmethod
    def index(self, split: str, piece: int) -> dict[str, Tensor]:
        """What lies beside the activations: for text `sequence`, `position` [rows] and `tokens` [n_seq, context]."""


class WholeFeed:
    """Batches of rows that are all there.

    Batch b of rank r holds the positions (b·world + r)·batch_tokens to (b·world + r + 1)·batch_tokens of `ShardOrder`,
    so ranks never overlap. Ranks read the same pools: once from each machine's disk, then from its page cache.
    """

    def __init__(self, sides: Sequence[Rows], batch_tokens: int, seed: int, rank: int, world: int) -> None:
        self.sides, self.batch_tokens, self.rank, self.world = sides, batch_tokens, rank, world
        self.order = ShardOrder(sides[0].rows("train"), seed)
        assert self.order.total >= batch_tokens * world, "fewer rows than a batch: see Activations.steps"

    @property
    def depends_on(self) -> dict[str, Any]:
        return {"row_order": f"{self.order.block}x{self.order.pool}"}

    def parts(self, number: int) -> list[tuple[Pool, Tensor]]:
        start = (number * self.world + self.rank) * self.batch_tokens
        return self.order.parts(start, start + self.batch_tokens)

    def read(self, pool: Pool) -> list[Stored]:
        return [side.read("train", *self.order.blocks(pool)) for side in self.sides]

    def ahead(self, first: int, stop: int) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self, number: int) -> dict[str, Any]:
        epoch, row = divmod(number * self.world * self.batch_tokens, self.order.total)
        return {"epoch": epoch, "row": row}  # for people: the number is enough

    def resume(self, number: int, state: dict[str, Any]) -> None:
        pass


def take(stored: Stored, index: Tensor, out: Tensor) -> None:
    """Copy the stored rows `index` [n] int64 into `out` [n, d_in], dequantised.

    NumPy does it in the calling thread; torch would start a team of threads for each of its callers.
    """
    rows = stored["activations"]
    if isinstance(rows, Tensor):  # on a GPU
        index = index.to(rows.device, non_blocking=True)  # what it reads from has been copied when this returns
        some = rows.index_select(0, index)
        out.copy_(some if "scales" not in stored else some * stored["scales"][index, None])
    elif "scales" not in stored:
        rows.take(index.numpy(), axis=0, out=as_array(out), mode="clip")  # mode "raise" would copy once more
    else:
        for part, block in zip(index.split(256), out.split(256), strict=True):  # fits a core's cache
            q = torch.from_numpy(rows.take(part.numpy(), axis=0, mode="clip"))
            dequantise(q, torch.from_numpy(stored["scales"].take(part.numpy())), block)


def as_array(tensor: Tensor) -> Array:
    """The same memory as a NumPy array, bfloat16 as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
