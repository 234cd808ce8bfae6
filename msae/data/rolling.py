"""A harvest that goes on while training reads it, and keeps no more than some windows of its rows on disk.

    <name>-<hook>-<identity hash>-rolling/
        manifest.json             of the first window: its statistics and held-out rows, and the size of a window
        val-00000.safetensors     the held-out rows of the first window; they stay
        train-00012.safetensors   the chunks of the windows that are read now and next
        chunk-00000.json          the record of every chunk that was ever made; they stay
        end.json                  how many chunks there are, once the source has come to its end
        rank-1                    what this rank reads (the first rank has no such file)

A window is so many successive chunks that three of them and all held-out rows fit the budget: one is read while the
next ones are made. What is read is deleted only when room is needed. A chunk whose record is there but whose rows are
not is made again from the state before it, and refused if it comes out other than it was.
"""

import atexit
import json
import math
import re
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from torch import Tensor

from msae.data.batches import Pool, RowOrder
from msae.data.harvest import (
    GB,
    Record,
    directory_of,
    each_chunk,
    is_complete,
    is_whole,
    locked,
    make_directories,
    read_record,
    refuse_full_disk,
    remove_stale,
    write_manifests,
)
from msae.data.shards import MANIFEST, TRUTH, Shards, checksum, read_manifest, write_json
from msae.data.source import Chunk, Source
from msae.progress import progress
from msae.ranks import is_other_rank

END, POLL = "end.json", 0.02
HEADER = 1024  # bytes of a shard that are not rows, at most


def roll(source: Source, hook_names: list[str], root: str | Path, gb: float, show: bool = True) -> dict[str, Shards]:
    """Open the hooks' shards for training with at most `gb` GB of them on disk, once their first window is whole.

    A whole harvest of the same rows is used instead if it is there. The process holds the directories' locks until
    `Rolling.close`; the other ranks of its run wait for what it writes. Raises ValueError in one line for a budget that
    is too small, another run that has the lock, or windows of another size.
    """
    whole = {hook: directory_of(source, hook, root) for hook in hook_names}
    if all(is_whole(directory) for directory in whole.values()):
        return {hook: Shards(directory) for hook, directory in whole.items()}
    directories = {hook: directory.with_name(directory.name + "-rolling") for hook, directory in whole.items()}
    window, lock = 0, None
    if not is_other_rank():
        window = window_chunks(source, hook_names, gb)
        most = min(gb, sum(source.expected_rows() * source.bytes_per_row(hook) for hook in hook_names) / GB)
        refuse_full_disk(most - make_directories(Path(root), directories), Path(root), "data.rolling_gb")
        lock = ExitStack()
        lock.enter_context(locked(list(directories.values()), wait=False))
    rolling = Rolling(source, directories, window, gb * GB, lock)
    try:
        return rolling.open(show)
    except BaseException:
        rolling.close()
        raise


def window_chunks(source: Source, hook_names: list[str], gb: float) -> int:
    """The chunks in a window. Raises ValueError if not even windows of one chunk fit the budget."""
    row = sum(source.bytes_per_row(hook) for hook in hook_names)
    headers = len(hook_names) * HEADER
    chunk, val = (rows * row + headers for rows in source.most_rows())
    chunks = int((gb * GB - val) // (3 * (chunk + headers)))  # a chunk may have held-out rows of its own
    if chunks < 1:
        need = (val + 3 * (chunk + headers)) / GB
        digits = 2 - math.floor(math.log10(need))
        raise ValueError(
            f"data.rolling_gb={gb:g} is too small for the held-out rows and three chunks; "
            f"set it to {math.ceil(need * 10**digits) / 10**digits:g} or more, or make chunks smaller"
        )
    return chunks


class Rolling:
    """One harvest in windows, of one or two hooks. With `lock` this process makes it, else another rank does.

    Windows are numbered within an epoch; a turn counts them through the epochs.
    """

    def __init__(
        self, source: Source, directories: dict[str, Path], window: int, budget: float, lock: ExitStack | None
    ) -> None:
        self.source, self.directories, self.window, self.budget, self.lock = source, directories, window, budget, lock
        self.place = next(iter(directories.values()))  # of what is written once and not for each hook
        self.shards: dict[str, Shards] = {}
        self.chunks: int | None = None  # of an epoch, once the source has come to its end
        self.sizes: list[list[int]] = []  # rows of each chunk of each window that is known
        self.stops: list[int] = []  # the row after each of them
        self._digests: list[str] = []  # of the checksums of all chunks up to and with each window
        self._knowing, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._asked = {0: 0}  # window → the last turn that it was made for
        self._start = self._reading = self._turn = 0  # turns: the first of this reading, that of the reader, and made
        self._world = 1

    # What is known --------------------------------------------------------------------------------------------------

    @property
    def windows(self) -> int | None:
        """Windows of an epoch, None until that is known."""
        return None if self.chunks is None else -(-self.chunks // self.window)

    @property
    def total(self) -> int | None:
        """Rows of an epoch, None until that is known."""
        return self.stops[-1] if self.stops and len(self.stops) == self.windows else None

    def learn(self) -> bool:
        """Take in the next window if all of its chunks have been made."""
        with self._knowing:
            if self.chunks is None:
                self.chunks = read_number(self.place / END, "chunks")
            first = len(self.stops) * self.window
            stop = first + self.window if self.chunks is None else min(first + self.window, self.chunks)
            records: dict[str, list[Record]] = {hook: [] for hook in self.directories}
            for number in reversed(range(first, stop)):  # the last is missing longest
                for hook, directory in self.directories.items():
                    record = read_record(directory, number)
                    if record is None:
                        return False
                    records[hook].insert(0, record)
            if first >= stop:
                return False
            checksums = self._digests[-1] if self._digests else ""
            for hook, found in records.items():
                entries = [entry for record in found for entry in record["shards"] if entry["split"] == "train"]
                self.shards[hook].append("train", entries)
                checksums += "".join(entry["xxh3"] for entry in entries)
            self._digests.append(xxhash.xxh3_64_hexdigest(checksums.encode()))
            self.sizes.append([entry["rows"] for entry in entries])
            self.stops.append((self.stops[-1] if self.stops else 0) + sum(self.sizes[-1]))
            return True

    def find(self, start: int) -> tuple[int, int] | None:
        """Epoch and window of this place of the endless sequence of rows, None as long as that is not known."""
        while (total := self.total) is None and (not self.stops or start >= self.stops[-1]):
            if not self.learn():
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
        return window if epoch == 0 else epoch * (self.windows or 0) + window

    # Reading --------------------------------------------------------------------------------------------------------

    def order(self, seed: int, rank: int, world: int) -> "WindowOrder":
        """The order in which this rank reads."""
        return WindowOrder(self, seed, rank, world)

    def wait(self, start: int, rank: int) -> tuple[int, int]:
        """Epoch and window of this place once the window is on disk. Raises what has stopped the harvest."""
        while True:
            alive = self._alive(rank)
            found = self.find(start)
            if found is not None and self._is_there(found[1]):
                return found
            if self._error is not None:
                raise self._error
            if not alive:
                raise ValueError(f"the harvest into {self.place} has stopped; resume with the same command")
            time.sleep(POLL)

    def _alive(self, rank: int) -> bool:
        """Whether somebody is harvesting."""
        if self.lock is not None:
            waits = rank > 0 and not self._stop.is_set()  # for the first rank to begin
            return waits or (self._thread is not None and self._thread.is_alive())
        try:
            with FileLock(self.place / ".lock", timeout=0):
                return False
        except Timeout:
            return True

    def _is_there(self, window: int) -> bool:
        first = window * self.window
        numbers = range(first, first + self.window if self.chunks is None else min(first + self.window, self.chunks))
        return all(None not in self._found(number).values() for number in numbers)

    def _found(self, number: int, splits: tuple[str, ...] = ("train",)) -> dict[str, Record | None]:
        """The records of a chunk's hooks, None where there is none, or shards of these splits are missing."""
        records = {hook: read_record(directory, number) for hook, directory in self.directories.items()}
        return {h: r if r and is_complete(self.directories[h], r, splits) else None for h, r in records.items()}

    def reads(self, turn: int, rank: int) -> None:
        """Note that this rank has read all windows before this one."""
        if rank == 0:
            self._reading = turn
        else:
            write_json(self.place / f"rank-{rank}", {"turn": turn})

    # Making ---------------------------------------------------------------------------------------------------------

    def open(self, show: bool) -> dict[str, Shards]:
        """The hooks' shards, once the first window has been made."""
        manifests = [directory / MANIFEST for directory in self.directories.values()]
        while self.lock is None and not all(path.exists() for path in manifests):
            time.sleep(POLL)
        made = all(path.exists() for path in manifests)
        for path in filter(Path.exists, manifests):
            window = read_manifest(path.parent).get("window", 0)
            if self.lock is None:
                self.window = window
            elif window != self.window:
                raise ValueError(
                    f"{path.parent} has windows of {window} chunks, data.rolling_gb={self.budget / GB:g} makes them "
                    f"{self.window}; set data.rolling_gb as it was, or delete the directory"
                )
        if self.lock is not None:
            remove_stale(self.directories)
            self._discard_damaged()
            self._first_window(("val",) if made else ("train", "val"), made, show)
        self.shards = {hook: Shards(directory, self) for hook, directory in self.directories.items()}
        self.learn()
        return self.shards

    def _discard_damaged(self) -> None:
        """Delete what a killed process may have left beside its record."""
        for directory in self.directories.values():
            for path in directory.glob("train-*.safetensors"):
                record = read_record(directory, number_of(path)) or {"shards": []}
                if checksum(path) not in [e["xxh3"] for e in record["shards"] if e["split"] == "train"]:
                    path.unlink()

    def _first_window(self, splits: tuple[str, ...], made: bool, show: bool) -> None:
        """Make what is missing of it, and the manifests, from which a run knows statistics and held-out rows."""
        records: dict[str, list[Record]] = {hook: [] for hook in self.directories}
        rows = self.window * self.source.most_rows()[0]
        if show and not made:
            print(
                f"harvest: windows of {self.window} chunks, up to {rows:,} rows each, while training reads; "
                f"at most {self.budget / GB:g} GB of shards at once in {self.place}",
                file=sys.stderr,
            )
        with progress(rows, f"harvest {self.source.name}", disable=not show or made) as bar:
            numbers = range(self.window)
            for written in each_chunk(
                self.source, self.directories, numbers, lambda n: self._found(n, splits), self._make_room
            ):
                for hook, record in written.items():
                    records[hook].append(record)
                bar.update(sum(entry["rows"] for entry in record["shards"] if entry["split"] == "train"))
        done = len(next(iter(records.values())))
        if not made:
            write_manifests(self.source, self.directories, records, self.window)
        if done < self.window:
            self._end(done)

    def _end(self, chunks: int) -> None:
        """Note that the source has ended. Raises ValueError if it did not end there the last time."""
        known = read_number(self.place / END, "chunks")
        if known is None:
            write_json(self.place / END, {"chunks": chunks})
        elif known != chunks:
            raise ValueError(
                f"{self.source.name} ended after {chunks} chunks, not after {known} as {self.place / END} says, so it "
                f"gives other rows than before; delete {self.place} and start a new run"
            )

    @contextmanager
    def ahead(self, start: int, stop: int, rank: int, world: int) -> Iterator[None]:
        """While this lasts, a thread makes the windows of rows start … stop, as far ahead as the budget allows."""
        if self.lock is None or rank > 0:
            yield
            return
        assert self._thread is None or not self._thread.is_alive(), "one reading at a time"
        epoch, window = self.find(start) or (0, len(self.stops))
        for other in range(1, world):  # of the reading before
            (self.place / f"rank-{other}").unlink(missing_ok=True)
        self._start = self._reading = self._turn = self.turn(epoch, window)
        self._error, self._asked, self._world = None, {}, world
        self._stop.clear()
        self._thread = threading.Thread(
            target=self._harvest, args=(epoch, window, stop), name="msae-rolling", daemon=True
        )
        atexit.register(self.halt)
        self._thread.start()
        try:
            yield
            if world > 1:  # others may not have come as far
                self._thread.join()
        finally:
            self.halt()

    def halt(self) -> None:
        """Stop making windows, at the latest when the chunk in hand is made, but do not wait for that for long."""
        self._stop.set()
        atexit.unregister(self.halt)
        if self._thread is not None:
            self._thread.join(10)
            if not self._thread.is_alive():
                self._thread = None

    def close(self) -> None:
        """Let go of the directories; a thread that is still busy keeps them until the process ends."""
        self.halt()
        if self.lock is not None and self._thread is None:
            self.lock.close()

    def _harvest(self, epoch: int, window: int, stop: int) -> None:
        try:
            while not self._pass(epoch, window * self.window, stop):
                epoch, window = epoch + 1, 0
        except Stopped:
            pass
        except BaseException as error:  # raised again where the rows are waited for
            self._error = error

    def _pass(self, epoch: int, first: int, stop: int) -> bool:
        """Make the chunks of an epoch from this one on; whether these were all that is wanted."""
        done, enough = first, False

        def numbers() -> Iterator[int]:
            nonlocal enough
            for number in count(first) if self.chunks is None else range(first, self.chunks):
                self.learn()
                window = number // self.window
                self._turn = self._asked[window] = self.turn(epoch, window)
                before = self.stops[window - 1] if 0 < window <= len(self.stops) else 0
                if enough := epoch * (self.total or 0) + before >= stop:
                    return
                if self._stop.is_set():
                    raise Stopped
                yield number

        record = read_record(self.place, first - 1) if first else {"state": None}
        if record is None:
            raise ValueError(f"{self.place} has lost the record of chunk {first - 1}; delete it and start a new run")
        for _ in each_chunk(self.source, self.directories, numbers(), self._found, self._make_room, record["state"]):
            done += 1
        if not enough:
            self._end(done)
            while self.learn():
                pass
        return enough

    def _make_room(self, number: int, chunk: Chunk) -> Chunk:
        """What of a chunk is to be written, once that fits the budget."""
        wanted = {"train"}
        if number < self.window and None in self._found(number, ("val",)).values():
            wanted.add("val")
        splits = {split: rows for split, rows in chunk.splits.items() if split in wanted}
        need, (most, _) = 0, self.source.most_rows()
        for split, rows in splits.items():
            found = len(rows.activations[next(iter(self.directories))])
            assert split == "val" or found <= most, f"a chunk of {found} rows, the source promised at most {most}"
            index = sum(t.nbytes for t in rows.index.values())
            need += sum(rows.activations[hook].nbytes + index + HEADER for hook in self.directories)
            need += sum(rows.scales[hook].nbytes for hook in self.directories if hook in rows.scales)
        while self._used() + need > self.budget:
            if self._stop.is_set():
                raise Stopped
            if not self._delete_one():
                self._stop.wait(POLL)
        return Chunk(splits, chunk.state)

    def _used(self) -> int:
        files = (path for directory in self.directories.values() for path in directory.glob("*.safetensors"))
        return sum(path.stat().st_size for path in files if path.name != TRUTH)

    def _delete_one(self) -> bool:
        """Delete the window that is needed last, of those that no rank will read before they are asked for again."""
        read = self._reading
        for rank in range(1, self._world):
            read = min(read, self._read_by(rank))
        paths = [path for directory in self.directories.values() for path in directory.glob("train-*.safetensors")]
        unused = {w for w in (number_of(path) // self.window for path in paths) if self._asked.get(w, -1) < read}
        if not unused:
            return False
        last = max(unused, key=lambda window: (window - self._turn - 1) % (self.windows or 1 << 40))
        for path in paths:
            if number_of(path) // self.window == last:
                path.unlink()
        return True

    def _read_by(self, rank: int) -> int:
        found = read_number(self.place / f"rank-{rank}", "turn")
        return self._start if found is None else found


class Stopped(Exception):
    """The thread is to end."""


class WindowOrder:
    """The endless sequence of row numbers in which training reads a rolling harvest: `RowOrder` window by window.

    Every row comes once an epoch, mixed with those of its window. A place's rows are a pure function of (seed, the
    rows of the windows, place), known once its window has been made; `parts` waits for that.
    """

    def __init__(self, rolling: Rolling, seed: int, rank: int, world: int) -> None:
        self.rolling, self.seed, self.rank, self.world = rolling, seed, rank, world
        self._within = lru_cache(4)(self._make)
        self._there = self._read = (-1, -1)  # epoch and window: the last waited for, the last read

    def parts(self, start: int, stop: int) -> list[tuple[Pool, Tensor]]:
        """As `RowOrder.parts`; a pool has its window in the middle."""
        parts: list[tuple[Pool, Tensor]] = []
        while start < stop:
            found = self.rolling.find(start)
            if found is None or found > self._there:  # those before may be read and gone
                self._there = found = self.rolling.wait(start, self.rank)
            epoch, window = found
            order, first = self._within(window)
            inside = epoch * order.total + (start - epoch * (self.rolling.total or 0)) - first
            for (_, number), index in order.parts(inside, min(inside + stop - start, (epoch + 1) * order.total)):
                parts.append(((epoch, window, number), index))
                start += len(index)
        return parts

    def blocks(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """As `RowOrder.blocks`. Called as each pool is read, in order: so the windows before it have been read."""
        epoch, window, number = pool
        if self._read != (epoch, window):
            self._read = (epoch, window)
            self.rolling.reads(self.rolling.turn(epoch, window), self.rank)
        order, first = self._within(window)
        starts, stops = order.blocks((epoch, number))
        return starts + first, stops + first

    def where(self, start: int) -> tuple[int, int]:
        """As `RowOrder.where`."""
        total = self.rolling.total
        return (0, start) if total is None else divmod(start, total)

    def fixed(self, start: int) -> dict[str, Any]:
        """As `RowOrder.fixed`; what was read is known by its checksums."""
        order, _ = self._within(0)
        windows = f"{order.block}x{order.pool} in windows of {self.rolling.window} chunks"
        return {"row_order": windows, "chunks_read": self.rolling.digest(start)}

    def ahead(self, start: int, stop: int) -> Any:
        """As `RowOrder.ahead`."""
        self._there = self._read = (-1, -1)
        return self.rolling.ahead(start, stop, self.rank, self.world)

    def _make(self, window: int) -> tuple[RowOrder, int]:
        """The order within a window, and its first row."""
        rolling = self.rolling
        first = rolling.stops[window - 1] if window else 0
        return RowOrder(rolling.sizes[window], f"{self.seed}/window/{window}"), first


def read_number(path: Path, key: str) -> int | None:
    """A number in a small JSON file, None where there is no such file."""
    try:
        return int(json.loads(path.read_text())[key])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt ({error}); delete {path.parent} and start a new run") from None


def number_of(path: Path) -> int:
    """The number in the name of a train shard."""
    found = re.fullmatch(r"train-(\d+)", path.stem)
    if found is None:
        raise ValueError(f"{path} is not a shard of a harvest; move it away or delete it")
    return int(found[1])
