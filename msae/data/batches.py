"""Batches of rows: every row once an epoch, mixed; a batch is a function of its number alone."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from msae.data.order import ShardOrder
from msae.data.rows import Rows, Stored, take

Batch = Tensor | tuple[Tensor, Tensor]  # x, or (x, y) where there is a target y
Job = list[tuple[Future[list[Stored]], Tensor]]  # parts of a batch: a pool of x (and y), and which of its rows to take
Item = TypeVar("Item")
Made = TypeVar("Made")


def moved(x: Tensor, like: Tensor) -> Tensor:
    """x in the type and on the device of `like`: moved first, in the few bytes in which rows are kept, then converted.

    From pinned memory this does not wait for the device; PyTorch keeps such memory until it has been read.
    """
    return x.to(like.device, non_blocking=like.is_cuda).to(like.dtype)


def as_pair(batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) in the type and on the device of `like`; y is x itself where the batch has no target."""
    if isinstance(batch, Tensor):
        x = moved(batch, like)
        return x, x
    x, y = batch
    return moved(x, like), moved(y, like)


def room_for(n: int, rows: Rows) -> Tensor:
    """Memory for a batch [n, d_in] of rows; pinned if this process uses CUDA, since copies from it do not wait."""
    return torch.empty(n, rows.d_in, dtype=rows.dtype, pin_memory=torch.cuda.is_initialized())


def as_batch(rows: list[Tensor]) -> Batch:
    """The batch of x, or of x and y."""
    return rows[0] if len(rows) == 1 else (rows[0], rows[1])


def sides(rows: Rows, target: Rows | None) -> list[Rows]:
    """The rows of x, and those of y if there is a target.

    Raises ValueError unless both hold the same rows in the same order, as one harvest makes them. Compares identity,
    rows of every piece, and the index of each split's first and last piece.
    """
    if target is None:
        return [rows]
    a, b = rows.identity, target.identity
    differs = [f"identity.{key}" for key in sorted((a.keys() | b.keys()) - {"hook_name"}) if a.get(key) != b.get(key)]
    for split in ("val",) if rows.is_endless else ("train", "val"):
        sizes = rows.rows(split)
        if sizes != target.rows(split):
            differs.append(f"{split} rows")
        elif sizes and not all(same(rows.index(split, i), target.index(split, i)) for i in {0, len(sizes) - 1}):
            differs.append(f"{split} index")
    if differs:
        raise ValueError(
            f"{rows} and {target} are not of the same rows ({', '.join(differs)} differ); "
            "delete the wrong one and harvest both hooks in one command, with both in data.source.hook_names"
        )
    return [rows, target]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sample(rows: Rows, n: int, seed: int) -> Tensor:
    """`n` training rows [n, d_in] from all over those that are there: the first of their order."""
    order = ShardOrder(rows.rows("train"), seed)
    out = torch.empty(n, rows.d_in, dtype=rows.dtype)
    done = 0
    for pool, index in order.parts(0, n):
        take(rows.read("train", *order.blocks(pool)), index, out[done : done + len(index)])
        done += len(index)
    return out


class TrainBatches:
    """Training batches x [batch_tokens, d_in] of one rank, made ahead by `threads`, resumable at any batch.

    `length` is the number of batches until training ends. With `target` rows that go with these, batches are pairs
    (x [batch_tokens, d_in], y [batch_tokens, d_out]).

    One thread reads the next pool of rows while `threads` copy batches out of this one and training works, so memory is
    that of up to four pools, whatever the size of the data.
    """

    def __init__(
        self,
        rows: Rows,
        batch_tokens: int,
        length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 4,
        *,
        target: Rows | None = None,
        threads: int = 2,
    ) -> None:
        self.sides, self.batch_tokens, self.length = sides(rows, target), batch_tokens, length
        self.seed, self.world, self.prefetch, self.threads = seed, world, prefetch, threads
        self.feed = rows.feed(self.sides, batch_tokens, seed, rank, world)
        self.position = 0  # batches consumed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, "msae-prefetch") as reader, self.feed.ahead(self.position, self.length):
            for batch in prefetched(self._take, self._jobs(reader), self.prefetch, self.threads):
                self.position += 1
                yield batch

    def _jobs(self, reader: ThreadPoolExecutor) -> Iterator[Job]:
        """The parts of every batch to come; the pool after the one in use is being read."""
        numbers = range(self.position, self.length)
        pools = (pool for pool, _ in groupby(pool for number in numbers for pool, _ in self.feed.parts(number)))
        reading = (reader.submit(self.feed.read, pool) for pool in pools)
        ahead, in_use = deque(islice(reading, 1)), None
        for number in numbers:
            job: Job = []
            for pool, index in self.feed.parts(number):
                if pool != in_use:
                    ahead.extend(islice(reading, 1))
                    in_use, stored = pool, ahead.popleft()
                job.append((stored, index))
            yield job

    def _take(self, job: Job) -> Batch:
        batch = []
        for side, rows in enumerate(self.sides):
            parts = [stored.result()[side] for stored, _ in job]
            if isinstance(first := parts[0]["activations"], Tensor):
                out = first.new_empty(self.batch_tokens, rows.d_in, dtype=rows.dtype)
            else:
                out = room_for(self.batch_tokens, rows)
            indices = [index for _, index in job]
            for stored, index, block in zip(parts, indices, out.split([len(i) for i in indices]), strict=True):
                take(stored, index, block)
            batch.append(out)
        return as_batch(batch)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch, the same on every rank, and what its rows depend on."""
        return {"position": self.position, **self._depends_on(), "feed": self.feed.state(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError if the next batches would have other rows."""
        expected = {"target": None, **self._depends_on()}  # the checkpoint alone may have a target
        for key, value in expected.items():
            if state.get(key) != value:
                raise ValueError(
                    f"the checkpoint was made with {key}={state.get(key)}, this run has {key}={value}, so the batches "
                    "would differ; resume with the settings of its config.yaml or start a new run"
                )
        self.position = state["position"]
        self.feed.resume(self.position, state.get("feed", {}))

    def _depends_on(self) -> dict[str, Any]:
        hashes = [rows.identity_hash for rows in self.sides]
        return {
            "batch_tokens": self.batch_tokens,
            "world_size": self.world,
            "data_seed": self.seed,
            **dict(zip(("shards", "target"), hashes, strict=False)),
            **self.feed.depends_on,
        }


class ValBatches:
    """The held-out rows start … stop in their order, every `world`-th batch for this rank; the last may be smaller.

    With `target` rows that go with these, batches are pairs as those of `TrainBatches`.
    """

    def __init__(
        self,
        rows: Rows,
        batch_tokens: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        stop: int | None = None,
        *,
        target: Rows | None = None,
    ) -> None:
        sizes = rows.rows("val")
        stop = sum(sizes) if stop is None else min(stop, sum(sizes))
        if stop <= start:
            raise ValueError(f"{rows} has no validation rows between {start} and {stop}; harvest more of them")
        self.sides, self.tokens = sides(rows, target), stop - start
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
        batch = [room_for(int(stop - start), rows) for rows in self.sides]
        for rows, out in zip(self.sides, batch, strict=True):
            take(rows.read("val", start, stop), torch.arange(len(out)), out)
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
