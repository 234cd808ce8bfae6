"""Batches from shards: every row once an epoch, mixed across shards; a batch is a function of its number alone."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from msae.data.order import Pool
from msae.data.shards import Shards, Stored, take

Batch = Tensor | tuple[Tensor, Tensor]  # x, or (x, y) where there is a target y
Job = list[tuple[Future[list[Stored]], Tensor]]  # parts of a batch: a pool of x (and y), and which of its rows to take
Item = TypeVar("Item")
Made = TypeVar("Made")


def as_pair(batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) in the type and on the device of `like`; y is x itself where the batch has no target."""
    if isinstance(batch, Tensor):
        x = batch.to(like)
        return x, x
    x, y = batch
    return x.to(like), y.to(like)


def as_batch(rows: list[Tensor]) -> Batch:
    """The batch of x, or of x and y."""
    return rows[0] if len(rows) == 1 else (rows[0], rows[1])


def sides(shards: Shards, target: Shards | None) -> list[Shards]:
    """The shards of x, and those of y if there is a target.

    Raises ValueError unless both hold the same rows in the same order, as one harvest writes them. Compares identity,
    rows of every shard, and the index of each split's first and last shard.
    """
    if target is None:
        return [shards]
    a, b = shards.identity, target.identity
    differs = [f"identity.{key}" for key in sorted((a.keys() | b.keys()) - {"hook_name"}) if a.get(key) != b.get(key)]
    for split in shards.entries:
        rows = shards.rows(split)
        if rows != target.rows(split):
            differs.append(f"{split} rows")
        elif shards.is_partial and split == "train":
            continue  # both hooks are written together, and not all of it is on disk
        elif rows and not all(same(shards.index(split, i), target.index(split, i)) for i in {0, len(rows) - 1}):
            differs.append(f"{split} index")
    if differs:
        raise ValueError(
            f"{shards.directory} and {target.directory} are not of the same rows ({', '.join(differs)} differ); "
            "delete the wrong one and harvest both hooks in one command, with both in data.source.hook_names"
        )
    return [shards, target]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TrainBatches:
    """Training batches x [batch_tokens, d_in] of one rank, made ahead by `threads`, resumable at any batch.

    Batch b of rank r holds the row order's positions (b·world + r)·batch_tokens to (b·world + r + 1)·batch_tokens, so
    ranks never overlap. `length` is the number of batches until training ends. With `target` shards of the same rows,
    batches are pairs (x [batch_tokens, d_in], y [batch_tokens, d_out]).

    One thread reads the next pool of rows from disk while `threads` copy batches out of this one and training works, so
    memory is that of up to four pools (`ShardOrder`), whatever the size of the data. Ranks read the same pools: once
    from each machine's disk, then from its page cache. A rolling harvest (`msae.data.rolling`) is read window by
    window, while the next ones are made.
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
        assert sum(shards.rows("train")) >= batch_tokens * world, "fewer rows than a batch: see Activations.steps"
        self.sides, self.batch_tokens, self.length = sides(shards, target), batch_tokens, length
        self.seed, self.rank, self.world, self.prefetch, self.threads = seed, rank, world, prefetch, threads
        self.order = shards.order(seed, rank, world)
        self.position = 0  # batches consumed

    def __len__(self) -> int:
        return self.length

    def batch(self, number: int) -> Batch:
        """Batch `number` of this rank, as `Shards.dtype`. Reads every pool that it draws from."""
        start = self._start(number)
        with ThreadPoolExecutor(1) as reader, self.order.ahead(start, start + self.batch_tokens):
            return self._take([(reader.submit(self._read, pool), index) for pool, index in self._parts(number)])

    def __iter__(self) -> Iterator[Batch]:
        start, stop = (number * self.world * self.batch_tokens for number in (self.position, self.length))
        with ThreadPoolExecutor(1, "msae-prefetch") as reader, self.order.ahead(start, stop):
            for batch in prefetched(self._take, self._jobs(reader), self.prefetch, self.threads):
                self.position += 1
                yield batch

    def _start(self, number: int) -> int:
        return (number * self.world + self.rank) * self.batch_tokens

    def _parts(self, number: int) -> list[tuple[Pool, Tensor]]:
        return self.order.parts(self._start(number), self._start(number) + self.batch_tokens)

    def _jobs(self, reader: ThreadPoolExecutor) -> Iterator[Job]:
        """The parts of every batch to come; the pool after the one in use is being read."""
        numbers = range(self.position, self.length)
        pools = (pool for pool, _ in groupby(pool for number in numbers for pool, _ in self._parts(number)))
        reading = (reader.submit(self._read, pool) for pool in pools)
        ahead, in_use = deque(islice(reading, 1)), None
        for number in numbers:
            job: Job = []
            for pool, index in self._parts(number):
                if pool != in_use:
                    ahead.extend(islice(reading, 1))
                    in_use, stored = pool, ahead.popleft()
                job.append((stored, index))
            yield job

    def _read(self, pool: Pool) -> list[Stored]:
        return [shards.read("train", *self.order.blocks(pool)) for shards in self.sides]

    def _take(self, job: Job) -> Batch:
        batch = [torch.empty(self.batch_tokens, shards.d_in, dtype=shards.dtype) for shards in self.sides]
        for side, rows in enumerate(batch):
            for (stored, index), block in zip(job, rows.split([len(index) for _, index in job]), strict=True):
                take(stored.result()[side], index, block)
        return as_batch(batch)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch, the same on every rank, and what its rows depend on."""
        epoch, row = self.order.where(self.position * self.world * self.batch_tokens)
        return {"epoch": epoch, "row": row, "position": self.position, **self._depends_on(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError if the next batches would have other rows."""
        expected = {"target": None, **self._depends_on(state["position"])}  # the checkpoint alone may have a target
        for key, value in expected.items():
            if state.get(key) != value:
                raise ValueError(
                    f"the checkpoint was made with {key}={state.get(key)}, this run has {key}={value}, so the batches "
                    "would differ; resume with the settings of its config.yaml or start a new run"
                )
        self.position = state["position"]

    def _depends_on(self, position: int) -> dict[str, Any]:
        hashes = [shards.manifest.identity_hash for shards in self.sides]
        return {
            "batch_tokens": self.batch_tokens,
            "world_size": self.world,
            "data_seed": self.seed,
            **dict(zip(("shards", "target"), hashes, strict=False)),
            **self.order.depends_on(position * self.world * self.batch_tokens),
        }


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
        self.sides, self.tokens = sides(shards, target), stop - start
        spans, first = [], 0
        for size in sizes:  # a batch lies in one shard
            low, high = max(start, first), min(stop, first + size)
            spans += [(a, min(a + batch_tokens, high)) for a in range(low, high, batch_tokens)]
            first += size
        self.spans = spans[rank::world]

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Batch]:
        return prefetched(self._batch, self.spans, 2)

    def _batch(self, span: tuple[int, int]) -> Batch:
        start, stop = torch.tensor(span).split(1)
        batch = [torch.empty(int(stop - start), shards.d_in, dtype=shards.dtype) for shards in self.sides]
        for shards, rows in zip(self.sides, batch, strict=True):
            take(shards.read("val", start, stop), torch.arange(len(rows)), rows)
        return as_batch(batch)


def prefetched(make: Callable[[Item], Made], items: Iterable[Item], depth: int, threads: int = 1) -> Iterator[Made]:
    """make(item) for each item, in order, made up to `depth` ahead by `threads`; raises what `make` raises."""
    rest, made = iter(items), deque[Future[Made]]()
    with ThreadPoolExecutor(threads, "msae-prefetch") as executor:
        try:
            made.extend(executor.submit(make, item) for item in islice(rest, depth))
            while made:
                made.extend(executor.submit(make, item) for item in islice(rest, 1))
                yield made.popleft().result()
        finally:  # not shutdown(cancel_futures=True), which fails when the interpreter ends
            for future in made:
                future.cancel()
