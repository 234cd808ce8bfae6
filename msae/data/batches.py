"""Batches from shards: every row once an epoch, mixed across shards, any batch computable from its number alone."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from msae.data.seeds import stream
from msae.data.shards import Shards, Stored, take

if TYPE_CHECKING:
    from msae.data.rolling import WindowOrder

Batch = Tensor | tuple[Tensor, Tensor]  # x, or (x, y) where there is a target y
Pool = tuple[int, ...]  # epoch, window of a rolling harvest, number in it
Job = list[tuple[Future[list[Stored]], Tensor]]  # parts of a batch: a pool's rows (and the target's), those to take
Given = TypeVar("Given")
Made = TypeVar("Made")


def as_pair(batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) in the type and on the device of `like`; y is x itself where the batch has no target."""
    if isinstance(batch, Tensor):
        x = batch.to(like)
        return x, x
    x, y = batch
    return x.to(like), y.to(like)


def from_both(read: Callable[[Shards], Tensor], shards: Shards, target: Shards | None) -> Batch:
    """The same reading of the shards, and of the target's if there is one."""
    return read(shards) if target is None else (read(shards), read(target))


def check_same_rows(shards: Shards, target: Shards) -> None:
    """Raise ValueError unless both directories hold the same rows in the same order, as one harvest writes them.

    Compared are what they were made from, the rows of every shard, and the index of each split's first and last shard.
    """
    a, b = shards.identity, target.identity
    differs = [f"identity.{key}" for key in sorted((a.keys() | b.keys()) - {"hook_name"}) if a.get(key) != b.get(key)]
    for split in shards.entries:
        rows = shards.rows(split)
        if rows != target.rows(split):
            differs.append(f"{split} rows")
        elif shards.rolling is not None and split == "train":
            continue  # both hooks are written together, and not all of it is there
        elif rows and not all(same(shards.index(split, i), target.index(split, i)) for i in {0, len(rows) - 1}):
            differs.append(f"{split} index")
    if differs:
        raise ValueError(
            f"{shards.directory} and {target.directory} are not of the same rows ({', '.join(differs)} differ); "
            "delete the wrong one and harvest both hooks in one command, with both in data.source.hook_names"
        )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class RowOrder:
    """The endless sequence of row numbers in which training reads a split of `shard_rows` rows per shard.

    An epoch is a seeded permutation of blocks of `block` neighbouring rows; `pool` blocks at a time (from all over the
    shards) have their rows permuted together. Epochs follow one another without a gap, so every row comes exactly
    once an epoch whatever the batch size, and `rows(start, stop)` is a pure function of (seed, start, stop).

    Of the pairs of rows in a batch, 1 in `pool` is from one block, and so may be from one text; what is read at once
    from a disk is `block` rows; what is held in memory is some pools. benchmarks/reader.py measures their worth.
    """

    def __init__(self, shard_rows: list[int], seed: int | str, block: int = 128, pool: int = 256) -> None:
        self.seed, self.block, self.pool = seed, block, pool
        sizes = torch.tensor([0, *shard_rows])
        self._first = sizes.cumsum(0)  # first row of each shard
        self._first_block = (-(-sizes // block)).cumsum(0)  # blocks never straddle shards: the last may be shorter
        self.total = int(self._first[-1])
        # What the batches that follow need again:
        self._epoch = lru_cache(2)(self._make_epoch)
        self._shuffle = lru_cache(4)(self._make_shuffle)

    def rows(self, start: int, stop: int) -> Tensor:
        """Row numbers [stop − start] int64 at these places of the endless sequence."""
        return torch.cat([numbered(*self.blocks(pool))[index] for pool, index in self.parts(start, stop)])

    def parts(self, start: int, stop: int) -> list[tuple[Pool, Tensor]]:
        """The pools that these places fall into, and which of the rows of its blocks in file order each one takes."""
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
        """First row, and the one after the last, of each block of a pool, in file order."""
        epoch, number = pool
        order, _ = self._epoch(epoch)
        return self._spans(order[number * self.pool : (number + 1) * self.pool].sort().values)

    def where(self, start: int) -> tuple[int, int]:
        """The epoch of a place of the sequence, and the place in it."""
        return divmod(start, self.total)

    def fixed(self, start: int) -> dict[str, Any]:
        """What the rows before this place depend on beside seed and shards."""
        return {"row_order": f"{self.block}x{self.pool}"}

    def ahead(self, start: int, stop: int) -> AbstractContextManager[None]:
        """While this lasts, the rows between these places are made: nothing to do where they are."""
        return nullcontext()

    def _spans(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        shard = torch.searchsorted(self._first_block, blocks, right=True) - 1
        starts = self._first[shard] + (blocks - self._first_block[shard]) * self.block
        return starts, (starts + self.block).minimum(self._first[shard + 1])

    def _make_epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The epoch's blocks in their order, and how many of its rows stand in each pool and the ones before it."""
        order = torch.randperm(int(self._first_block[-1]), generator=stream(self.seed, "blocks", epoch))
        starts, stops = self._spans(order)
        places = (stops - starts).cumsum(0)
        return order, torch.cat([places[self.pool - 1 : -1 : self.pool], places[-1:]])

    def _make_shuffle(self, epoch: int, number: int, rows: int) -> Tensor:
        return torch.randperm(rows, generator=stream(self.seed, "rows", epoch, number))


def numbered(starts: Tensor, stops: Tensor) -> Tensor:
    """The numbers of all rows of blocks start … stop."""
    sizes = stops - starts
    return torch.arange(int(sizes.sum())) + (starts - sizes.cumsum(0) + sizes).repeat_interleave(sizes)


class TrainBatches:
    """Training batches [batch_tokens, d_in] of one rank, prefetched by `threads`, resumable at any batch.

    Batch b of rank r holds places (b·world + r)·batch_tokens … of the row order, so ranks never overlap. The state is
    {epoch, position} of the next batch, the same on every rank. `length` is the number of batches until training ends.
    With `target` shards of the same rows, batches are pairs (x [batch_tokens, d_in], y [batch_tokens, d_out]).

    A thread reads the next pool of rows from disk while `threads` copy batches out of this one and the training works,
    so memory is that of up to four pools (`RowOrder`), whatever the size of the data. Ranks read the same pools: from
    disk once on each machine, from the page cache each. Shards of a rolling harvest (`msae.data.rolling`) are read
    window by window, while the coming ones are made.
    """

    def __init__(
        self,
        shards: Shards,
        batch_tokens: int,
        length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 4,
        *,
        target: Shards | None = None,
        threads: int = 2,
    ) -> None:
        sizes = shards.rows("train")
        if sum(sizes) < batch_tokens * world:
            raise ValueError(
                f"{shards.directory} has {sum(sizes)} training rows, fewer than one batch of {batch_tokens} × {world}; "
                "lower data.batch_tokens or harvest more (data.source.tokens)"
            )
        if target is not None:
            check_same_rows(shards, target)
        self.shards, self.target, self.batch_tokens, self.length = shards, target, batch_tokens, length
        self.seed, self.rank, self.world, self.prefetch, self.threads = seed, rank, world, prefetch, threads
        self.order: RowOrder | WindowOrder
        self.order = RowOrder(sizes, seed) if shards.rolling is None else shards.rolling.order(seed, rank, world)
        self.position = 0  # batches consumed

    def __len__(self) -> int:
        return self.length

    def batch(self, number: int) -> Batch:
        """Batch `number` of this rank, as `Shards.dtype`. Reads all of the pools that it takes its rows from."""
        start, stop = self._places(number)
        with ThreadPoolExecutor(1) as reader, self.order.ahead(start, stop):
            return self._take([(reader.submit(self._read, pool), index) for pool, index in self._parts(number)])

    def __iter__(self) -> Iterator[Batch]:
        start, stop = self.position * self.world * self.batch_tokens, self.length * self.world * self.batch_tokens
        with ThreadPoolExecutor(1, "msae-prefetch") as reader, self.order.ahead(start, stop):
            for batch in prefetched(self._take, self._jobs(reader), self.prefetch, self.threads):
                self.position += 1
                yield batch

    def _places(self, number: int) -> tuple[int, int]:
        start = (number * self.world + self.rank) * self.batch_tokens
        return start, start + self.batch_tokens

    def _parts(self, number: int) -> list[tuple[Pool, Tensor]]:
        return self.order.parts(*self._places(number))

    def _jobs(self, reader: ThreadPoolExecutor) -> Iterator[Job]:
        """For every batch to come the pools, being read, and which of their rows it takes."""
        numbers = range(self.position, self.length)
        wanted = (pool for pool, _ in groupby(pool for number in numbers for pool, _ in self._parts(number)))
        reading = (reader.submit(self._read, pool) for pool in wanted)
        ahead, held = deque(islice(reading, 1)), None
        for number in numbers:
            job: Job = []
            for pool, index in self._parts(number):
                if pool != held:
                    ahead.extend(islice(reading, 1))
                    held, stored = pool, ahead.popleft()
                job.append((stored, index))
            yield job

    def _read(self, pool: Pool) -> list[Stored]:
        both = [self.shards] if self.target is None else [self.shards, self.target]
        return [shards.read("train", *self.order.blocks(pool)) for shards in both]

    def _take(self, job: Job) -> Batch:
        def gather(shards: Shards, which: int) -> Tensor:
            out = torch.empty(self.batch_tokens, shards.d_in, dtype=shards.dtype)
            for (stored, index), block in zip(job, out.split([len(index) for _, index in job]), strict=True):
                take(stored.result()[which], index, block)
            return out

        x = gather(self.shards, 0)
        return x if self.target is None else (x, gather(self.target, 1))

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts, and what that place depends on."""
        epoch, row = self.order.where(self.position * self.world * self.batch_tokens)
        return {"epoch": epoch, "row": row, "position": self.position, **self._fixed(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError if that place means other rows here."""
        fixed = {"target": None, **self._fixed(state["position"])}  # None: the checkpoint alone may have a target
        for key, here in fixed.items():
            if state.get(key) != here:
                raise ValueError(
                    f"the checkpoint was made with {key}={state.get(key)}, this run has {key}={here}, so the batches "
                    "would differ; resume with the settings of its config.yaml or start a new run"
                )
        self.position = state["position"]

    def _fixed(self, position: int) -> dict[str, Any]:
        fixed = {
            "batch_tokens": self.batch_tokens,
            "world_size": self.world,
            "data_seed": self.seed,
            "shards": self.shards.manifest["identity_hash"],
            **self.order.fixed(position * self.world * self.batch_tokens),
        }
        return fixed if self.target is None else {**fixed, "target": self.target.manifest["identity_hash"]}


class ValBatches:
    """The held-out rows start … stop in file order, every `world`-th batch for this rank; the last may be smaller.

    With `target` shards of the same rows, batches are pairs as those of `TrainBatches`.
    """

    def __init__(
        self,
        shards: Shards,
        batch_tokens: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        stop: int | None = None,
        *,
        target: Shards | None = None,
    ) -> None:
        sizes = shards.rows("val")
        stop = sum(sizes) if stop is None else min(stop, sum(sizes))
        if stop <= start:
            raise ValueError(
                f"{shards.directory} has no validation rows between {start} and {stop}; harvest more of them"
            )
        if target is not None:
            check_same_rows(shards, target)
        self.shards, self.target, self.batch_tokens, self.tokens = shards, target, batch_tokens, stop - start
        spans, first = [], 0
        for size in sizes:
            low, high = max(0, start - first), min(size, stop - first)
            spans += [(first + a, first + min(a + batch_tokens, high)) for a in range(low, high, batch_tokens)]
            first += size
        self.spans = spans[rank::world]

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Batch]:
        return prefetched(self._batch, self.spans, 2)

    def _batch(self, span: tuple[int, int]) -> Batch:
        start, stop = (torch.tensor([place]) for place in span)

        def read(shards: Shards) -> Tensor:
            out = torch.empty(int(stop - start), shards.d_in, dtype=shards.dtype)
            take(shards.read("val", start, stop), torch.arange(len(out)), out)
            return out

        return from_both(read, self.shards, self.target)


def prefetched(make: Callable[[Given], Made], given: Iterable[Given], depth: int, threads: int = 1) -> Iterator[Made]:
    """make(g) for each g, in order, made up to `depth` ahead by threads, whose errors are raised here."""
    rest, made = iter(given), deque[Future[Made]]()
    with ThreadPoolExecutor(threads, "msae-prefetch") as executor:
        try:
            made.extend(executor.submit(make, g) for g in islice(rest, depth))
            while made:
                made.extend(executor.submit(make, g) for g in islice(rest, 1))
                yield made.popleft().result()
        finally:  # not by shutdown(cancel_futures=True), which fails when the interpreter ends
            for future in made:
                future.cancel()
