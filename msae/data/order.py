"""The order in which training reads rows: a pure function of (seed, epoch, index), so that resuming computes it."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from msae.seeds import stream

Pool = tuple[int, int]  # rows shuffled together: epoch and number in it, or turn and part of a `Spread`


class ShardOrder:
    """The endless sequence of row numbers in which training reads a split of `shard_rows` rows per shard.

    An epoch is a seeded permutation of blocks of `block` neighbouring rows; `pool` blocks at a time (from all over the
    shards) have their rows permuted together. Epochs follow one another without a gap, so every row comes exactly
    once an epoch whatever the batch size, and the rows at positions start … stop are a pure function of these and seed.

    Of the pairs of rows in a batch, 1 in `pool` is from one block, and so may be from one text. One read from the disk
    is `block` rows; memory holds a few pools. benchmarks/reader.py measures what other sizes cost.
    """

    def __init__(self, shard_rows: list[int], seed: int | str, block: int = 128, pool: int = 256) -> None:
        self.seed, self.block, self.pool = seed, block, pool
        sizes = torch.tensor([0, *shard_rows])
        self._first = sizes.cumsum(0)  # first row of each shard
        self._first_block = (-(-sizes // block)).cumsum(0)  # blocks never straddle shards: the last may be shorter
        self.total = int(self._first[-1])
        # The next batches need these again:
        self._epoch = lru_cache(2)(self._make_epoch)
        self._shuffle = lru_cache(4)(self._make_shuffle)

    def parts(self, start: int, stop: int) -> list[tuple[Pool, Tensor]]:
        """The pools that positions start … stop of the sequence draw from, and the rows [n] each gives, in turn.

        Rows of a pool are counted through its blocks in file order.
        """
        parts: list[tuple[Pool, Tensor]] = []
        while start < stop:
            epoch, offset = divmod(start, self.total)
            _, ends = self._epoch(epoch)
            number = int(torch.searchsorted(ends, offset, right=True))
            first = int(ends[number - 1]) if number else 0
            index = self._shuffle(epoch, number, int(ends[number]) - first)[offset - first :][: stop - start]
            parts.append(((epoch, number), index))
            start += len(index)
        return parts

    def blocks(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """The first row of each of a pool's blocks, and the row after its last, in file order."""
        epoch, number = pool
        order, _ = self._epoch(epoch)
        return self._spans(order[number * self.pool : (number + 1) * self.pool].sort().values)

    def _spans(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The first row of each block, and the row after its last."""
        shard = torch.searchsorted(self._first_block, blocks, right=True) - 1
        starts = self._first[shard] + (blocks - self._first_block[shard]) * self.block
        return starts, (starts + self.block).minimum(self._first[shard + 1])

    def _make_epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The epoch's blocks in their order, and the position in the epoch at which each pool ends."""
        order = torch.randperm(int(self._first_block[-1]), generator=stream(self.seed, "blocks", epoch))
        starts, stops = self._spans(order)
        ends = (stops - starts).cumsum(0)
        return order, torch.cat([ends[self.pool - 1 : -1 : self.pool], ends[-1:]])

    def _make_shuffle(self, epoch: int, number: int, rows: int) -> Tensor:
        return torch.randperm(rows, generator=stream(self.seed, "rows", epoch, number))


@dataclass(frozen=True)
class Spread:
    """How chunks that come one after the other are spread over the pools in which their rows are read.

    `held` chunks are there at the start. A turn reads as many rows as a chunk has, in `parts` pools, and one new chunk
    comes with every turn but the first. It is read in equal shares over the next `span` = 2 `held` − 1 turns; the first
    ones in shares that fall as (span − turn), so that each turn has rows of `span` chunks or all that have come, while
    no more than `held` chunks are left to read at its start.
    """

    held: int
    parts: int

    @property
    def span(self) -> int:
        """The turns over which a chunk is read."""
        return 2 * self.held - 1

    def first_turn(self, chunk: int) -> int:
        """The first turn that reads from a chunk."""
        return max(0, chunk - self.held + 1)

    def chunks(self, turn: int) -> range:
        """The chunks that a turn reads from."""
        return range(max(0, turn + self.held - self.span) if turn >= self.span else 0, turn + self.held)

    def rows(self, chunk: int, size: int, turn: int, part: int) -> tuple[int, int]:
        """The rows start … stop, of `size` shuffled ones, that this chunk gives to this pool."""
        return self._until(chunk, size, turn, part), self._until(chunk, size, turn, part + 1)

    def _until(self, chunk: int, size: int, turn: int, part: int) -> int:
        """How many rows of the chunk have been read before this part of the turn."""
        turn, n = turn - self.first_turn(chunk), self.span
        if chunk >= self.held:
            return size * (turn * self.parts + part) // (n * self.parts)
        read = turn * (2 * n - turn + 1) // 2  # Σ_{t < turn} (n − t), of n (n + 1) / 2 shares
        return size * (read * self.parts + (n - turn) * part) // (n * self.held * self.parts)
