"""Opens a source without a disk: its first chunks are made, and training reads the others as they come."""

import math
import os
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from msae.data.harvest import GB, directory_of, is_whole, sums, without_training_rows
from msae.data.memory import CAN_RELEASE, MemoryRows, in_mapped_memory, trim_malloc
from msae.data.order import Spread
from msae.data.pool import OpenPass, PoolFeed
from msae.data.rows import Feed, Rows
from msae.data.shards import Shards
from msae.progress import is_other_rank, progress, say
from msae.sources.source import Chunk, Source, Split

POOL_ROWS = 32_768  # rows that are shuffled together, about
BESIDE = 5  # chunks in memory beside those held: two in the source that makes one, its shuffled copy, pools, slack


def open_stream(
    source: Source,
    hook_names: list[str],
    root: str | Path,
    gb: float,
    device: str | None = None,
    resuming: bool = False,
    show: bool = True,
) -> "tuple[dict[str, Rows], Stream | None]":
    """Open the hooks' rows in at most `gb` GB of memory, once the source's first chunks are there.

    A whole harvest of the same rows is used instead if it is there, and then nothing streams. A resumed run makes the
    held-out rows alone, unless all rows fit. Raises ValueError in one line for a budget that is too small or more than
    the machine has, and for a source without training rows.
    """
    directories = {hook: directory_of(source, hook, root) for hook in hook_names}
    if all(is_whole(directory) for directory in directories.values()):
        if show and not is_other_rank():
            say(f"memory: not used, all rows are in {' and '.join(map(str, directories.values()))}")
        return {hook: Shards(directory) for hook, directory in directories.items()}, None
    stream = Stream(
        source, hook_names, spread_of(source, hook_names, gb, gives_back=CAN_RELEASE and device is None), device
    )
    return dict(stream.open(resuming, show and not is_other_rank())), stream


def spread_of(source: Source, hook_names: list[str], gb: float, gives_back: bool = True) -> Spread:
    """How many chunks `gb` GB hold. Raises ValueError in one line if it is too small or more than there is.

    Unless memory gives back what has been read of a chunk, all of `Spread.span` chunks are there whole.
    """
    row = sum(source.bytes_per_row(hook) for hook in hook_names)
    most, val = source.most_rows()
    held = int((gb * GB - val * row) // (most * row)) - BESIDE
    if held < 1:
        need = (val + (1 + BESIDE) * most) * row / GB
        digits = 2 - math.floor(math.log10(need))
        raise ValueError(
            f"data.memory_gb={gb:g} is too small for the held-out rows and {1 + BESIDE} chunks; "
            f"set it to {math.ceil(need * 10**digits) / 10**digits:g} or more, or make chunks smaller"
        )
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB if hasattr(os, "sysconf") else math.inf
    if min(gb, source.expected_rows() * row / GB) > has:
        raise ValueError(f"data.memory_gb={gb:g}, this machine has {has:.1f} GB; set it to less, or harvest to disk")
    held = held if gives_back else (held + 1) // 2
    return Spread(held, max(4, math.ceil(most / POOL_ROWS)))  # four pools, which are read ahead, are a chunk at most


def enough_gb(source: Source) -> float:
    """The memory that holds every row of the source's first hook."""
    most, val = source.most_rows()
    chunks = -(-source.expected_rows() // most) + 1
    return (val + (chunks + BESIDE) * most) * source.bytes_per_row(source.hook_names[0]) / GB * 1.001


class Stream:
    """A source of which the first chunks are in memory, and the `feed` that goes on after them."""

    def __init__(self, source: Source, hook_names: list[str], spread: Spread, device: str | None) -> None:
        self.source, self.hook_names, self.spread, self.device = source, hook_names, spread, device
        self.feed: PoolFeed | None = None
        self.open_pass: OpenPass | None = None
        self.is_whole = False

    def open(self, resuming: bool, show: bool) -> "dict[str, StreamedRows]":
        """Make the first chunks: as many as are held, or all that there are."""
        chunks = self.source.chunks(None)
        first = list(islice(chunks, self.spread.held))  # none of their rows are made yet
        coming = next(chunks, None)
        self.is_whole = coming is None
        splits = self._made(first, ("val",) if resuming and not self.is_whole else ("train", "val"), show)
        if coming is not None and splits["train"]:
            self.open_pass = OpenPass(splits["train"], first[-1].state, chained(coming, chunks))
        statistics = {hook: statistics_of(splits["train"], hook) for hook in self.hook_names}
        trim_malloc()  # what the source took in this thread: another one makes the other chunks
        return {hook: StreamedRows(self, hook, splits, statistics[hook]) for hook in self.hook_names}

    def _made(self, chunks: list[Chunk], wanted: Sequence[str], show: bool) -> dict[str, list[Split]]:
        """The chunks' rows by split."""
        splits: dict[str, list[Split]] = {"train": [], "val": []}
        most, val = self.source.most_rows()
        expected = min(self.source.expected_rows(), len(chunks) * most + val) if "train" in wanted else val
        if show and not self.is_whole:
            say(f"memory: holds {len(chunks)} × up to {most:,} rows, which mix over {self.spread.span} × as many")
        with progress(expected, f"fill from {self.source.name}", disable=not show) as bar:
            for chunk in chunks:
                for split in (s for s in wanted if s in chunk.splits):
                    rows = in_mapped_memory(chunk.splits[split](), self.hook_names)
                    for hook in self.hook_names if split == "val" else []:
                        sums(hook, rows)  # finite; those of training rows are asked for below
                    splits[split].append(rows)
                    bar.update(len(rows.activations[self.hook_names[0]]))
            bar.total = bar.n
        if "train" in wanted and not splits["train"]:
            raise without_training_rows(self.source)
        return splits

    def close(self) -> None:
        """Stop making chunks, and let the source's model go."""
        if self.feed is not None:
            self.feed.halt()
        if self.open_pass is not None:
            self.open_pass.close()


class StreamedRows(MemoryRows):
    """One hook's rows of the chunks with which a stream begins; training takes them as it reads on."""

    def __init__(
        self, stream: Stream, hook_name: str, splits: dict[str, list[Split]], statistics: tuple[Tensor, float] | None
    ) -> None:
        super().__init__(stream.source, hook_name, splits, statistics)
        self.stream, self.is_endless = stream, not stream.is_whole

    def feed(self, sides: Sequence[Rows], batch_tokens: int, seed: int, rank: int, world: int) -> Feed:
        """As `Rows.feed`: of all rows if they are here, else of chunks that come while training reads."""
        stream = self.stream
        if stream.is_whole:
            return super().feed(sides, batch_tokens, seed, rank, world)
        device = f"cuda:{torch.cuda.current_device()}" if stream.device == "cuda" else stream.device
        hooks = [side.hook_name for side in sides]
        open_pass, stream.open_pass = stream.open_pass, None
        if open_pass is not None and world > 1:  # they are of all ranks
            open_pass.held.clear()
            open_pass.close()
            open_pass = None
        stream.feed = PoolFeed(stream.source, hooks, stream.spread, open_pass, device, batch_tokens, seed, rank, world)
        return stream.feed


def chained(first: Chunk, rest: Iterator[Chunk]) -> Generator[Chunk, None, None]:
    """The first and the rest, which ends with this generator."""
    try:
        yield first
        del first
        yield from rest
    finally:
        rest.close()  # type: ignore[attr-defined]


def statistics_of(chunks: list[Split], hook_name: str) -> tuple[Tensor, float] | None:
    """E x [d_in] float64 and E‖x‖² of the chunks' rows, None of none. Raises ValueError if they are not finite."""
    found = [sums(hook_name, rows) for rows in chunks]
    rows = sum(len(rows.activations[hook_name]) for rows in chunks)
    if not rows:
        return None
    return torch.stack([total for total, _ in found]).cumsum(0)[-1] / rows, sum(square for _, square in found) / rows
