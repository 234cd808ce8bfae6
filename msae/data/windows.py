"""A rolling harvest as training reads it: which windows are known by the records of their chunks, and their order.

Windows are numbered within an epoch; a turn counts them through the epochs.
"""

import json
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from torch import Tensor

from msae.data.harvest import Record, find_chunk, read_record
from msae.data.order import Pool, RowOrder, ShardOrder
from msae.data.shards import ShardEntry, Shards

END = "end.json"


class RollingShards(Shards):
    """Shards of which training rows come and go; `make_order` gives the order in which they are read."""

    is_partial = True

    def __init__(self, directory: Path, make_order: Callable[[int, int, int], RowOrder]) -> None:
        self.make_order = make_order
        super().__init__(directory)

    def order(self, seed: int, rank: int, world: int) -> RowOrder:
        """The order window by window."""
        return self.make_order(seed, rank, world)

    def append(self, split: str, entries: list[ShardEntry]) -> None:
        """Take in shards that were made since the opening."""
        self.entries[split] += entries
        self.first[split] = np.cumsum([0, *self.rows(split)])


class Maker(Protocol):
    """Who makes windows while they are read (`msae.data.rolling.Rolling`)."""

    known: "Windows"

    def wait(self, start: int, rank: int) -> tuple[int, int]:
        """Epoch and window of this place, once the window is on disk."""

    def mark_read(self, turn: int, rank: int) -> None:
        """Note that this rank has read all windows before this one."""

    def ahead(self, start: int, stop: int, rank: int, world: int) -> AbstractContextManager[None]:
        """While this lasts, the windows of rows start … stop are made."""


class Windows:
    """What is known of a rolling harvest's windows of so many chunks, of one or two hooks.

    sizes: the rows of each chunk of each window; stops: the row after each window; chunks: of an epoch, once the source
    has come to its end.
    """

    def __init__(self, directories: dict[str, Path], window: int) -> None:
        self.directories, self.window = directories, window
        self.common = next(iter(directories.values()))  # where what is not of one hook is written
        self.shards: dict[str, RollingShards] = {}
        self.chunks: int | None = None
        self.sizes: list[list[int]] = []
        self.stops: list[int] = []
        self._digests: list[str] = []  # of the checksums of all chunks up to and with each window
        self._taking_in = threading.Lock()

    @property
    def count(self) -> int | None:
        """Windows of an epoch, None until that is known."""
        return None if self.chunks is None else -(-self.chunks // self.window)

    @property
    def total(self) -> int | None:
        """Rows of an epoch, None until that is known."""
        return self.stops[-1] if self.stops and len(self.stops) == self.count else None

    def numbers(self, window: int) -> range:
        """The chunks of a window."""
        first, stop = window * self.window, (window + 1) * self.window
        return range(first, stop if self.chunks is None else min(stop, self.chunks))

    def take_in_next(self) -> bool:
        """Take in the next window if all of its chunks have been made."""
        with self._taking_in:
            if self.chunks is None:
                self.chunks = read_number(self.common / END, "chunks")
            numbers = self.numbers(len(self.stops))
            records: dict[str, list[Record]] = {hook: [] for hook in self.directories}
            for number in reversed(numbers):  # the last is missing longest
                for hook, directory in self.directories.items():
                    record = read_record(directory, number)
                    if record is None:
                        return False
                    records[hook].insert(0, record)
            if not numbers:
                return False
            checksums = self._digests[-1] if self._digests else ""
            for hook, found in records.items():
                entries = [entry for record in found for entry in record.shards if entry.split == "train"]
                self.shards[hook].append("train", entries)
                checksums += "".join(entry.xxh3 for entry in entries)
            self._digests.append(xxhash.xxh3_64_hexdigest(checksums.encode()))
            self.sizes.append([entry.rows for entry in entries])
            self.stops.append((self.stops[-1] if self.stops else 0) + sum(self.sizes[-1]))
            return True

    def find(self, start: int) -> tuple[int, int] | None:
        """Epoch and window of this place of the endless sequence of rows, None as long as that is not known."""
        while (total := self.total) is None and (not self.stops or start >= self.stops[-1]):
            if not self.take_in_next():
                return None
        epoch, row = (0, start) if total is None else divmod(start, total)
        return epoch, bisect_right(self.stops, row)

    def digest(self, start: int) -> str | None:
        """Of the checksums of the chunks up to the one before this place, None if that is not known."""
        if start > 0 and self.find(start - 1) is None:
            return None
        read = start if self.total is None else min(start, self.total)
        return self._digests[bisect_left(self.stops, read)]

    def turn(self, epoch: int, window: int) -> int:
        """The number of a window, counted through the epochs."""
        return window if epoch == 0 else epoch * (self.count or 0) + window

    def is_there(self, window: int) -> bool:
        """Whether all of a window's rows are on disk."""
        return all(self.found(number).keys() == self.directories.keys() for number in self.numbers(window))

    def found(self, number: int, splits: tuple[str, ...] = ("train",)) -> dict[str, Record]:
        """The records of a chunk's hooks, without those of which shards of these splits are missing."""
        return find_chunk(self.directories, number, splits)


class WindowOrder:
    """The endless sequence of row numbers in which training reads a rolling harvest: `ShardOrder` window by window.

    Every row comes once an epoch, mixed with those of its window. A place's rows are a pure function of (seed, the
    rows of the windows, place), known once its window has been made; `parts` waits for that.
    """

    def __init__(self, rolling: Maker, seed: int, rank: int, world: int) -> None:
        self.rolling, self.known, self.seed, self.rank, self.world = rolling, rolling.known, seed, rank, world
        self._within = lru_cache(4)(self._make)
        self._there = self._read = (-1, -1)  # epoch and window: the last waited for, the last read

    def parts(self, start: int, stop: int) -> list[tuple[Pool, Tensor]]:
        """As `RowOrder.parts`; a pool has its window in the middle."""
        parts: list[tuple[Pool, Tensor]] = []
        while start < stop:
            found = self.known.find(start)
            if found is None or found > self._there:  # those before may be read and gone
                self._there = found = self.rolling.wait(start, self.rank)
            epoch, window = found
            order, first = self._within(window)
            inside = epoch * order.total + (start - epoch * (self.known.total or 0)) - first
            for (_, number), index in order.parts(inside, min(inside + stop - start, (epoch + 1) * order.total)):
                parts.append(((epoch, window, number), index))
                start += len(index)
        return parts

    def blocks(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """As `RowOrder.blocks`. Called as each pool is read, in order: so the windows before it have been read."""
        epoch, window, number = pool
        if self._read != (epoch, window):
            self._read = (epoch, window)
            self.rolling.mark_read(self.known.turn(epoch, window), self.rank)
        order, first = self._within(window)
        starts, stops = order.blocks((epoch, number))
        return starts + first, stops + first

    def where(self, start: int) -> tuple[int, int]:
        """As `RowOrder.where`."""
        total = self.known.total
        return (0, start) if total is None else divmod(start, total)

    def depends_on(self, start: int) -> dict[str, Any]:
        """As `RowOrder.depends_on`; what was read is known by its checksums."""
        order, _ = self._within(0)
        windows = f"{order.block}x{order.pool} in windows of {self.known.window} chunks"
        return {"row_order": windows, "chunks_read": self.known.digest(start)}

    def ahead(self, start: int, stop: int) -> Any:
        """As `RowOrder.ahead`."""
        self._there = self._read = (-1, -1)
        return self.rolling.ahead(start, stop, self.rank, self.world)

    def _make(self, window: int) -> tuple[ShardOrder, int]:
        """The order within a window, and its first row."""
        first = self.known.stops[window - 1] if window else 0
        return ShardOrder(self.known.sizes[window], f"{self.seed}/window/{window}"), first


def read_number(path: Path, key: str) -> int | None:
    """A number in a small JSON file, None where there is no such file."""
    try:
        return int(json.loads(path.read_text())[key])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt ({error}); delete {path.parent} and start a new run") from None
