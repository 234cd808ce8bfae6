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
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from msae.data.harvest import (
    GB,
    Record,
    directory_of,
    each_chunk,
    is_whole,
    locked,
    make_directories,
    read_record,
    refuse_full_disk,
    remove_stale,
    write_manifests,
)
from msae.data.shards import MANIFEST, TRUTH, Shards, read_manifest
from msae.data.windows import END, RollingShards, WindowOrder, Windows, read_number
from msae.files import LOCK, checksum, write_json
from msae.progress import is_other_rank, progress, say
from msae.sources.source import Chunk, Source

POLL = 0.02
HEADER = 1024  # bytes of a shard that are not rows, at most


def roll(
    source: Source, hook_names: list[str], root: str | Path, gb: float, show: bool = True
) -> "tuple[dict[str, Shards], Rolling | None]":
    """Open the hooks' shards for training with at most `gb` GB of them on disk, once their first window is whole.

    A whole harvest of the same rows is used instead if it is there, and then nothing rolls. The process holds the
    directories' locks until `Rolling.close`; the other ranks of its run wait for what it writes. Raises ValueError in
    one line for a budget that is too small, another run that has the lock, or windows of another size.
    """
    whole = {hook: directory_of(source, hook, root) for hook in hook_names}
    if all(is_whole(directory) for directory in whole.values()):
        return {hook: Shards(directory) for hook, directory in whole.items()}, None
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
        return rolling.open(show), rolling
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
    """One harvest in windows, of one or two hooks. With `lock` this process makes it, else another rank does."""

    def __init__(
        self, source: Source, directories: dict[str, Path], window: int, budget: float, lock: ExitStack | None
    ) -> None:
        self.source, self.directories, self.budget, self.lock = source, directories, budget, lock
        self.known = Windows(directories, window)
        self.common = self.known.common
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._asked = {0: 0}  # window → the last turn that it was made for
        self._start = self._reading = self._turn = 0  # turns: the first of this reading, that of the reader, and made
        self._world = 1

    # Reading ----------------------------------------------------------------------------------------------------------

    def order(self, seed: int, rank: int, world: int) -> WindowOrder:
        """The order in which this rank reads."""
        return WindowOrder(self, seed, rank, world)

    def wait(self, start: int, rank: int) -> tuple[int, int]:
        """Epoch and window of this place once the window is on disk. Raises what has stopped the harvest."""
        while True:
            alive = self._alive(rank)
            found = self.known.find(start)
            if found is not None and self.known.is_there(found[1]):
                return found
            if self._error is not None:
                raise self._error
            if not alive:
                raise ValueError(f"the harvest into {self.common} has stopped; resume with the same command")
            time.sleep(POLL)

    def _alive(self, rank: int) -> bool:
        """Whether somebody is harvesting."""
        if self.lock is not None:
            waits = rank > 0 and not self._stop.is_set()  # for the first rank to begin
            return waits or (self._thread is not None and self._thread.is_alive())
        try:
            with FileLock(self.common / LOCK, timeout=0):
                return False
        except Timeout:
            return True

    def mark_read(self, turn: int, rank: int) -> None:
        """Note that this rank has read all windows before this one."""
        if rank == 0:
            self._reading = turn
        else:
            write_json(self.common / f"rank-{rank}", {"turn": turn})

    # Making -----------------------------------------------------------------------------------------------------------

    def open(self, show: bool) -> dict[str, Shards]:
        """The hooks' shards, once the first window has been made."""
        manifests = [directory / MANIFEST for directory in self.directories.values()]
        while self.lock is None and not all(path.exists() for path in manifests):
            time.sleep(POLL)
        made = all(path.exists() for path in manifests)
        for path in filter(Path.exists, manifests):
            window = read_manifest(path.parent).window or 0
            if self.lock is None:
                self.known.window = window
            elif window != self.known.window:
                raise ValueError(
                    f"{path.parent} has windows of {window} chunks, data.rolling_gb={self.budget / GB:g} makes them "
                    f"{self.known.window}; set data.rolling_gb as it was, or delete the directory"
                )
        if self.lock is not None:
            remove_stale(self.directories)
            self._discard_damaged()
            self._first_window(("val",) if made else ("train", "val"), made, show)
        self.known.shards = {h: RollingShards(directory, self.order) for h, directory in self.directories.items()}
        self.known.take_in_next()
        return dict(self.known.shards)

    def _discard_damaged(self) -> None:
        """Delete what a killed process may have left beside its record."""
        for directory in self.directories.values():
            for path in directory.glob("train-*.safetensors"):
                record = read_record(directory, number_of(path))
                if record is None or checksum(path) not in [e.xxh3 for e in record.shards if e.split == "train"]:
                    path.unlink()

    def _first_window(self, splits: tuple[str, ...], made: bool, show: bool) -> None:
        """Make what is missing of it, and the manifests, from which a run knows statistics and held-out rows."""
        records: dict[str, list[Record]] = {hook: [] for hook in self.directories}
        rows = self.known.window * self.source.most_rows()[0]
        if show and not made:
            say(
                f"harvest: windows of {self.known.window} chunks, up to {rows:,} rows each, while training reads; "
                f"at most {self.budget / GB:g} GB of shards at once in {self.common}"
            )
        with progress(rows, f"harvest {self.source.name}", disable=not show or made) as bar:
            numbers = range(self.known.window)
            for written in each_chunk(
                self.source, self.directories, numbers, lambda n: self.known.found(n, splits), self._make_room
            ):
                for hook, record in written.items():
                    records[hook].append(record)
                bar.update(record.rows("train"))
        done = len(next(iter(records.values())))
        if not made:
            write_manifests(self.source, self.directories, records, self.known.window)
        if done < self.known.window:
            self._end(done)

    def _end(self, chunks: int) -> None:
        """Note that the source has ended. Raises ValueError if it did not end there the last time."""
        known = read_number(self.common / END, "chunks")
        if known is None:
            write_json(self.common / END, {"chunks": chunks})
        elif known != chunks:
            raise ValueError(
                f"{self.source.name} ended after {chunks} chunks, not after {known} as {self.common / END} says, so it "
                f"gives other rows than before; delete {self.common} and start a new run"
            )

    @contextmanager
    def ahead(self, start: int, stop: int, rank: int, world: int) -> Iterator[None]:
        """While this lasts, a thread makes the windows of rows start … stop, as far ahead as the budget allows."""
        if self.lock is None or rank > 0:
            yield
            return
        assert self._thread is None or not self._thread.is_alive(), "one reading at a time"
        epoch, window = self.known.find(start) or (0, len(self.known.stops))
        for other in range(1, world):  # of the reading before
            (self.common / f"rank-{other}").unlink(missing_ok=True)
        self._start = self._reading = self._turn = self.known.turn(epoch, window)
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
            while not self._pass(epoch, window * self.known.window, stop):
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
            for number in count(first) if self.known.chunks is None else range(first, self.known.chunks):
                self.known.take_in_next()
                window = number // self.known.window
                self._turn = self._asked[window] = self.known.turn(epoch, window)
                before = self.known.stops[window - 1] if 0 < window <= len(self.known.stops) else 0
                if enough := epoch * (self.known.total or 0) + before >= stop:
                    return
                if self._stop.is_set():
                    raise Stopped
                yield number

        record = read_record(self.common, first - 1) if first else None
        if first and record is None:
            raise ValueError(f"{self.common} has lost the record of chunk {first - 1}; delete it and start a new run")
        state = None if record is None else record.state
        for _ in each_chunk(self.source, self.directories, numbers(), self.known.found, self._make_room, state):
            done += 1
        if not enough:
            self._end(done)
            while self.known.take_in_next():
                pass
        return enough

    def _make_room(self, number: int, chunk: Chunk) -> Chunk:
        """What of a chunk is to be written, once that fits the budget."""
        wanted = {"train"}
        if number < self.known.window and self.known.found(number, ("val",)).keys() != self.directories.keys():
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
        unused = {w for w in (number_of(path) // self.known.window for path in paths) if self._asked.get(w, -1) < read}
        if not unused:
            return False
        last = max(unused, key=lambda window: (window - self._turn - 1) % (self.known.count or 1 << 40))
        for path in paths:
            if number_of(path) // self.known.window == last:
                path.unlink()
        return True

    def _read_by(self, rank: int) -> int:
        found = read_number(self.common / f"rank-{rank}", "turn")
        return self._start if found is None else found


class Stopped(Exception):
    """The thread is to end."""


def number_of(path: Path) -> int:
    """The number in the name of a train shard."""
    found = re.fullmatch(r"train-(\d+)", path.stem)
    if found is None:
        raise ValueError(f"{path} is not a shard of a harvest; move it away or delete it")
    return int(found[1])
