"""Training rows from a pool of chunks in memory, which a source fills ahead of training.

Each chunk's rows are shuffled and dealt out over the turns in which they are read (`Spread`). What a batch holds is a
pure function of seed, rows and its number, so a resumed run makes the chunks again that were being read, from the
source's state before the first of them, and compares their checksums with those of the first time.
"""

import atexit
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from typing import Any

import torch
import xxhash
from torch import Tensor

from msae.data.harvest import sums
from msae.data.memory import MappedTensor, joined, values_of
from msae.data.order import Pool, Spread
from msae.data.rows import Stored, as_array
from msae.seeds import stream as random_stream
from msae.sources.source import Chunk, Source, Split

STAGED = 16_384  # rows that are copied to a device at once
BEGINNING: dict[str, Any] = {"turn": 0, "part": 0, "row": 0, "source": None, "chunks": None, "checksums": []}


@dataclass
class OpenPass:
    """The training rows of a source's first chunks, the state after them, and the chunks to come of that open pass."""

    held: list[Split]
    state: dict[str, Any]
    chunks: Generator[Chunk, None, None]

    def close(self) -> None:
        """Let the source's model go."""
        self.chunks.close()


class Kept:
    """Shuffled rows: in host memory, or on a device, which gives nothing back before all of them are read."""

    def __init__(self, values: Tensor, order: Tensor, device: str | None) -> None:
        self._mapped = MappedTensor(values.shape, values.dtype) if device is None else None
        if self._mapped is not None:
            self.tensor = self._mapped.tensor
            take_rows(values, order, self.tensor)
            return
        self.tensor = torch.empty(values.shape, dtype=values.dtype, device=device)
        # training waits for each copy, so they are small and from pinned memory
        staged = torch.empty_like(values[:STAGED], pin_memory=self.tensor.is_cuda)
        for some, out in zip(order.split(STAGED), self.tensor.split(STAGED), strict=True):
            out.copy_(take_rows(values, some, staged[: len(some)]))

    def release(self, rows: int) -> None:
        """Give back what lies before this row."""
        if self._mapped is not None:
            self._mapped.release(rows)


def take_rows(values: Tensor, order: Tensor, out: Tensor) -> Tensor:
    """The rows `order` of `values`, in `out`."""
    as_array(values).take(order.numpy(), axis=0, out=as_array(out), mode="clip")
    return out


class PoolFeed:
    """One rank's batches from its own part of a stream: chunks rank, rank + world, … of each pass over the source.

    A thread makes the chunk that the next turn begins with while this one is read. Passes follow one another without a
    gap, so the last chunks of one mix with the first of the next.
    """

    def __init__(
        self,
        source: Source,
        hooks: list[str],
        spread: Spread,
        open_pass: OpenPass | None,
        device: str | None,
        batch_tokens: int,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        self.source, self.hooks, self.spread, self.open_pass, self.device = source, hooks, spread, open_pass, device
        self.batch_tokens, self.seed, self.rank, self.world = batch_tokens, seed, rank, world
        self._shuffle = lru_cache(4)(self._make_shuffle)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._halted = threading.Event()  # of the thread: one that ends late must not touch what follows
        self._turn = self._first_turn = 0  # the one being read, and that of the first batch
        self._begin(0, BEGINNING)

    @property
    def depends_on(self) -> dict[str, Any]:
        return {"row_order": f"{self.spread.held} chunks held, {self.spread.parts} pools a turn"}

    # Reading ----------------------------------------------------------------------------------------------------------

    def parts(self, number: int) -> list[tuple[Pool, Tensor]]:
        parts, start, stop = [], number * self.batch_tokens, (number + 1) * self.batch_tokens
        while start < stop:
            with self._changed:
                while start >= self._starts[-1]:
                    self._append_pool()
                k = bisect_right(self._starts, start) - 1
                pool, first, size = self._pools[k], self._starts[k], self._starts[k + 1] - self._starts[k]
            index = self._shuffle(pool, size)[start - first :][: stop - start]
            parts.append((pool, index))
            start += len(index)
        return parts

    def read(self, pool: Pool) -> list[Stored]:
        turn, _ = pool
        blocks: list[list[dict[str, Tensor]]] = [[] for _ in self.hooks]
        with self._changed:
            if turn != self._turn:
                self._turn = turn
                self._let_go()
                self._changed.notify_all()
            for chunk in self.spread.chunks(turn):
                start, stop = self._span(chunk, pool)
                for of_hook, kept in zip(blocks, self._kept[chunk], strict=True):
                    of_hook.append({name: rows.tensor[start:stop] for name, rows in kept.items()})
        return [joined(of_hook, as_tensors=self.device is not None) for of_hook in blocks]

    def _let_go(self) -> None:
        """Give back the memory of what was read before this turn."""
        for chunk in list(self._kept):
            if chunk < self.spread.chunks(self._turn)[0]:
                del self._kept[chunk]
                continue
            for rows in (rows for of_hook in self._kept[chunk] for rows in of_hook.values()):
                rows.release(self._span(chunk, (self._turn, 0))[0] if self._turn > self.spread.first_turn(chunk) else 0)

    def _append_pool(self) -> None:
        """Take in the next pool once all of its chunks are here. Raises what has stopped the source."""
        last = self._pools[-1:]
        turn, part = last[0] if last else self._before_first
        turn, part = (turn, part + 1) if part + 1 < self.spread.parts else (turn + 1, 0)
        chunks = self.spread.chunks(turn)
        self._changed.wait_for(lambda: self._pools[-1:] != last or chunks[-1] in self._sizes or not self._is_making())
        if self._pools[-1:] != last:  # another thread has taken it in meanwhile
            return
        if chunks[-1] not in self._sizes:
            raise self._error or ValueError(f"{self.source.name} has stopped; resume with the same command")
        spans = [self._span(chunk, (turn, part)) for chunk in chunks]
        self._pools.append((turn, part))
        self._starts.append(self._starts[-1] + sum(stop - start for start, stop in spans))

    def _span(self, chunk: int, pool: Pool) -> tuple[int, int]:
        return self.spread.rows(chunk, self._sizes[chunk], *pool)

    def _make_shuffle(self, pool: Pool, rows: int) -> Tensor:
        return torch.randperm(rows, generator=random_stream(self.seed, "pool", *pool))

    # Making -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def ahead(self, first: int, stop: int) -> Iterator[None]:
        self._begin(first, self._state(first))
        self._halted = threading.Event()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        arguments = (stop, self._halted, device)
        self._thread = threading.Thread(target=self._run, args=arguments, name="msae-pool", daemon=True)
        atexit.register(self.halt)
        self._thread.start()
        try:
            yield
        finally:
            self.halt()

    def halt(self) -> None:
        """Stop making chunks, at the latest when the one in hand is made, but do not wait for that for long."""
        with self._changed:
            self._halted.set()
            self._kept.clear()
            self._changed.notify_all()
        atexit.unregister(self.halt)
        if self._thread is not None:
            self._thread.join(10)
        if self.open_pass is not None:
            self.open_pass.close()
            self.open_pass = None

    def _is_making(self) -> bool:
        return (
            self._thread is not None and self._thread.is_alive() and self._error is None and not self._halted.is_set()
        )

    def _begin(self, number: int, state: dict[str, Any]) -> None:
        """Stand before batch `number` with nothing in memory."""
        turn, part = state["turn"], state["part"]
        self._at = number, state
        self._before_first = (turn, part - 1) if part else (turn - 1, self.spread.parts - 1)
        self._starts, self._pools = [number * self.batch_tokens - state["row"]], list[Pool]()
        self._turn = self._first_turn = turn
        self._sizes: dict[int, int] = {}
        self._sources: dict[int, dict[str, Any] | None] = {}  # the source's state before each chunk
        self._checksums: list[str] = list(state["checksums"])  # of the chunks of a pass, as far as it has come
        self._chunks: int | None = state["chunks"]  # of a pass, once it has come to its end
        self._kept: dict[int, list[dict[str, Kept]]] = {}  # chunk → shuffled rows of each hook
        self._error: BaseException | None = None

    def _run(self, stop: int, halted: threading.Event, device: int | None) -> None:
        """Make chunks, each when the turn before its first one is read, until the rows of `stop` batches are here.

        On this rank's GPU, if it has one: every thread begins on the first of the machine.
        """
        if device is not None:
            torch.cuda.set_device(device)
        first = self.spread.chunks(self._turn)[0]
        made = self._made(first, halted)
        try:
            for chunk in count(first):
                turn = self.spread.first_turn(chunk)
                with self._changed:
                    self._changed.wait_for(partial(self._may_make, turn, halted))
                    is_enough = turn > self._first_turn and self._begins(turn) >= stop * self.batch_tokens
                    if halted.is_set() or is_enough:
                        return
                state, rows = next(made)
                kept = self._shuffled(chunk, rows)
                with self._changed:
                    if halted.is_set():
                        return
                    self._sources[chunk], self._sizes[chunk] = state, len(rows.activations[self.hooks[0]])
                    self._kept[chunk] = kept
                    self._let_go()
                    self._changed.notify_all()
                del rows, kept
        except BaseException as error:  # raised again where the rows are waited for
            with self._changed:
                if not halted.is_set():
                    self._error = error
                    self._changed.notify_all()
        finally:
            made.close()

    def _may_make(self, turn: int, halted: threading.Event) -> bool:
        return halted.is_set() or turn <= self._turn + 1

    def _begins(self, turn: int) -> int:
        """The position at which a turn begins whose chunks are here but for the last."""
        while self._pools[-1:] < [(turn - 1, self.spread.parts - 1)]:
            self._append_pool()
        return self._starts[-1]

    def _made(self, chunk: int, halted: threading.Event) -> Generator[tuple[dict[str, Any] | None, Split], None, None]:
        """The rows of every chunk of this rank from this one on, pass after pass, and the source's state before each.

        Raises ValueError in one line where a pass gives other rows than it did before.
        """
        number, state, chunks = 0, self._at[1]["source"], None
        place = chunk if self._chunks is None else chunk % self._chunks  # in the pass
        open_pass, self.open_pass = self.open_pass, None
        if open_pass is not None and chunk > 0:
            open_pass.held.clear()
            open_pass.close()
        elif open_pass is not None:
            while open_pass.held:
                yield (
                    None,
                    self._checked(place, open_pass.held.pop(0), halted),
                )  # the state before these is never asked for
                place += 1
            number, state, chunks = place, open_pass.state, open_pass.chunks
        elif state is not None:
            number = self.rank  # modulo world: the state is that before a chunk of this rank
        while True:
            for each in self.source.chunks(state) if chunks is None else chunks:
                if number % self.world == self.rank and "train" in each.splits:
                    yield state, self._checked(place, each.splits["train"](), halted)
                    place += 1
                state, number = each.state, number + 1
                del each  # it knows the model
            self._end_pass(place)
            number, state, chunks, place = 0, None, None, 0

    def _checked(self, place: int, rows: Split, halted: threading.Event) -> Split:
        """The same rows. Raises ValueError if they are not finite, or not those that the chunk had before."""
        digest = xxhash.xxh3_64()
        for hook in self.hooks:
            sums(hook, rows)
            for tensor in values_of(rows, hook).values():
                digest.update(as_array(tensor.contiguous()).data)
        checksum = digest.hexdigest()
        with self._changed:
            if halted.is_set():
                return rows
            if place == len(self._checksums) and self._chunks is not None:
                raise ValueError(
                    f"{self.source.name} has more than {place} chunks, where it ended before, so it gives other rows; "
                    "start a new run"
                )
            if place == len(self._checksums):
                self._checksums.append(checksum)
            elif self._checksums[place] != checksum:
                raise ValueError(
                    f"chunk {place} of {self.source.name} was made again and came out with checksum {checksum}, "
                    f"not {self._checksums[place]}: the source gives other rows than before (another device, library "
                    "or text?), so what was trained on them cannot go on; start a new run"
                )
        return rows

    def _end_pass(self, chunks: int) -> None:
        name = self.source.name
        if chunks == 0:
            raise ValueError(f"{name} has no chunk for rank {self.rank} of {self.world}; make chunks smaller")
        if self._chunks not in (None, chunks) or (self._chunks is None and chunks != len(self._checksums)):
            raise ValueError(
                f"{name} ended after {chunks} chunks, not after {self._chunks or len(self._checksums)} as before, so "
                "it gives other rows; start a new run"
            )
        self._chunks = chunks

    def _shuffled(self, chunk: int, rows: Split) -> "list[dict[str, Kept]]":
        """A chunk's rows of every hook, in the order in which the turns read them."""
        order = torch.randperm(len(rows.activations[self.hooks[0]]), generator=random_stream(self.seed, "chunk", chunk))
        return [
            {name: Kept(values, order, self.device) for name, values in values_of(rows, hook).items()}
            for hook in self.hooks
        ]

    # Going on ---------------------------------------------------------------------------------------------------------

    def state(self, number: int) -> dict[str, Any]:
        own = self._state(number)
        if self.world == 1:
            return own
        states: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(states, own)  # Lightning asks every rank, and writes that of the first
        return {"ranks": states}

    def resume(self, number: int, state: dict[str, Any]) -> None:
        self._begin(number, state["ranks"][self.rank] if "ranks" in state else state)

    def _state(self, number: int) -> dict[str, Any]:
        """This rank's own; forgets what only earlier batches need."""
        if number == self._at[0]:
            return self._at[1]
        position = number * self.batch_tokens
        with self._changed:
            while position > self._starts[-1]:
                self._append_pool()
            k = bisect_left(self._starts, position) - 1  # at its end rather than before the next, which may not be here
            assert k >= 0, f"batch {number} lies before batch {self._at[0]}"
            (turn, part), row = self._pools[k], position - self._starts[k]
            source = self._sources[self.spread.chunks(turn)[0]]
            del self._pools[:k], self._starts[:k]
            for chunk in [c for c in self._sources if c < self.spread.chunks(turn)[0]]:
                del self._sources[chunk]
            shared = {"chunks": self._chunks, "checksums": list(self._checksums)}
        return {"turn": turn, "part": part, "row": row, "source": source, **shared}
