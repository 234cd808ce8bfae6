"""Batches from shards: every row once an epoch, mixed across shards, any batch computable from its number alone."""

import threading
from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from typing import Any, TypeVar

import torch
from torch import Tensor

from msae.data.seeds import stream
from msae.data.shards import Shards

Batch = Tensor | tuple[Tensor, Tensor]  # x, or (x, y) where there is a target y
Item = TypeVar("Item")


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
    """

    def __init__(self, shard_rows: list[int], seed: int, block: int = 256, pool: int = 64) -> None:
        self.total = sum(shard_rows)
        self.seed, self.pool = seed, pool
        starts, stops, first = [], [], 0
        for rows in shard_rows:  # blocks never straddle shards: the last block of a shard may be shorter
            edges = torch.arange(0, rows, block)
            starts.append(first + edges)
            stops.append(first + (edges + block).clamp_max(rows))
            first += rows
        self.starts, self.stops = torch.cat(starts), torch.cat(stops)
        self._epoch = -1
        self._pool_key = (-1, -1)

    def rows(self, start: int, stop: int) -> Tensor:
        """Row numbers [stop − start] int64 at these places of the endless sequence."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.total)
            part = self._from_pool(epoch, offset)[: stop - start]
            parts.append(part)
            start += len(part)
        return torch.cat(parts)

    def _from_pool(self, epoch: int, offset: int) -> Tensor:
        """The rest, from `offset` rows into the epoch, of the pool that this place falls into."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.starts), generator=stream(self.seed, "blocks", epoch))
            sizes = (self.stops - self.starts)[self._order]
            self._ends = sizes.cumsum(0)[self.pool - 1 :: self.pool].contiguous()
            if len(self._ends) == 0 or self._ends[-1] < self.total:
                self._ends = torch.cat([self._ends, torch.tensor([self.total])])
        number = int(torch.searchsorted(self._ends, offset, right=True))
        if (epoch, number) != self._pool_key:
            self._pool_key = (epoch, number)
            blocks = self._order[number * self.pool : (number + 1) * self.pool].tolist()
            rows = torch.cat([torch.arange(int(self.starts[b]), int(self.stops[b])) for b in blocks])
            shuffle = torch.randperm(len(rows), generator=stream(self.seed, "rows", epoch, number))
            self._rows = rows[shuffle]
        first = int(self._ends[number - 1]) if number else 0
        return self._rows[offset - first :]


class TrainBatches:
    """Training batches [batch_tokens, d_in] of one rank, prefetched by a thread, resumable at any batch.

    Batch b of rank r holds places (b·world + r)·batch_tokens … of the row order, so ranks never overlap. The state is
    {epoch, position} of the next batch, the same on every rank. `length` is the number of batches until training ends.
    With `target` shards of the same rows, batches are pairs (x [batch_tokens, d_in], y [batch_tokens, d_out]).
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
        self.seed, self.rank, self.world, self.prefetch = seed, rank, world, prefetch
        self.order = RowOrder(sizes, seed)
        self.first = torch.tensor([0, *sizes]).cumsum(0)  # first row number of each shard
        self.position = 0  # batches consumed

    def __len__(self) -> int:
        return self.length

    def batch(self, number: int) -> Batch:
        """Batch `number` of this rank, in the storage dtype; rows within it stand in file order (a batch is a set)."""
        start = (number * self.world + self.rank) * self.batch_tokens
        rows = self.order.rows(start, start + self.batch_tokens).sort().values
        counts = torch.searchsorted(rows, self.first)
        spans = list(zip(self.first.tolist(), counts.tolist(), counts[1:].tolist(), strict=False))

        def gather(shards: Shards) -> Tensor:
            parts = [
                shards.activations("train", shard)[rows[a:b] - first]
                for shard, (first, a, b) in enumerate(spans)
                if b > a
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return from_both(gather, self.shards, self.target)

    def __iter__(self) -> Iterator[Batch]:
        for batch in prefetched((self.batch(n) for n in range(self.position, self.length)), self.prefetch):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts, and what that place depends on."""
        epoch, row = divmod(self.position * self.world * self.batch_tokens, self.order.total)
        return {"epoch": epoch, "row": row, "position": self.position, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError if that place means other rows here."""
        for key, here in {"target": None, **self._fixed()}.items():  # None: the checkpoint alone may have a target
            if state.get(key) != here:
                raise ValueError(
                    f"the checkpoint was made with {key}={state.get(key)}, this run has {key}={here}, so the batches "
                    "would differ; resume with the settings of its config.yaml or start a new run"
                )
        self.position = state["position"]

    def _fixed(self) -> dict[str, Any]:
        fixed = {
            "batch_tokens": self.batch_tokens,
            "world_size": self.world,
            "data_seed": self.seed,
            "shards": self.shards.manifest["identity_hash"],
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
        for shard, size in enumerate(sizes):
            low, high = max(0, start - first), min(size, stop - first)
            spans += [(shard, a, min(a + batch_tokens, high)) for a in range(low, high, batch_tokens)]
            first += size
        self.spans = spans[rank::world]

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Batch]:
        return prefetched((self._batch(*span) for span in self.spans), 2)

    def _batch(self, shard: int, a: int, b: int) -> Batch:
        return from_both(lambda shards: shards.activations("val", shard)[a:b].clone(), self.shards, self.target)


def prefetched(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, made ahead by one thread; its errors are raised here, and it ends when the consumer does."""
    queue: Queue[tuple[Item | None, BaseException | None]] = Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: tuple[Item | None, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                put((item, None))
            put((None, None))
        except BaseException as error:  # handed to the consumer
            put((None, error))

    thread = threading.Thread(target=work, daemon=True, name="msae-prefetch")
    thread.start()
    try:
        while True:
            try:
                item, error = queue.get(timeout=10)
            except Empty:
                assert thread.is_alive(), "the prefetch thread died without a word"
                continue
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        thread.join()
