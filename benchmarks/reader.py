"""Rows a second, memory, cold reads and the quality of the shuffle of the reader of shards (msae.data.batches).

    python benchmarks/reader.py [--rows 1048576] [--d-in 768] [--batch 4096] [--rounds 5] [--threads 1 2 4]
    python benchmarks/reader.py --only speed --device cuda      # and what arrives on a GPU

Shards are made in a temporary directory (`--directory` says where), chunk by chunk as a harvest writes them. The
alternatives of a table run in turn, round by round; medians are printed. With --device cuda our batches are copied to
the GPU too, from pinned memory as training does it and from pageable memory, and each copy is waited for.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from machine import resident
from torch import Tensor

from msae.data import batches as of_msae
from msae.data.batches import TrainBatches, moved
from msae.data.harvest import harvest
from msae.data.order import ShardOrder
from msae.data.shards import Shards
from msae.seeds import stream
from msae.sources.int8 import quantise
from msae.sources.source import Chunk, Split
from msae.training.memory import keep_freed_memory

CHUNK = 262_144  # tokens, the default of a harvest
COLUMNS = ["document", "position", "by document", "by position"]  # of the rows that tell how well they are shuffled
Ways = dict[str, Callable[[], Iterable[Tensor]]]


@dataclass
class Made:
    """Chunks of `chunk` rows of noise, or, where d_in is 0, rows that say which document and position they are of.

    Their columns are the document, the position in a sequence of 128, and two values with a mean of 0 and a variance
    of 1: one that all rows of a document share, one that all rows of a position share. `shuffled`: within a chunk, as
    a harvest writes rows. The first `val_rows` rows are held out too.
    """

    rows: int
    d_in: int
    dtype: torch.dtype = torch.bfloat16
    shuffled: bool = True
    chunk: int = CHUNK
    val_rows: int = 0

    name, budget_key, hook_names = "made", "rows", ("hook",)

    def identity(self, hook_name: str) -> dict[str, Any]:
        return {name: str(value) for name, value in vars(self).items()}

    def provenance(self) -> dict[str, Any]:
        return {}

    def expected_rows(self) -> int:
        return self.rows + self.val_rows

    def most_rows(self) -> tuple[int, int]:
        return self.chunk, self.val_rows

    def width(self, hook_name: str) -> int:
        return self.d_in or len(COLUMNS)

    def bytes_per_row(self, hook_name: str) -> int:
        return self.width(hook_name) * self.dtype.itemsize + 4

    def truth(self) -> None:
        return None

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        rows = torch.randn(self.chunk, self.d_in, generator=stream(0, "noise"))
        rows, scales = quantise(rows) if self.dtype == torch.int8 else (rows.to(self.dtype), None)
        for number in range(self.rows // self.chunk):
            if self.d_in == 0:
                rows = self.documents(number)
            splits = {"train": partial(Split, {"hook": rows}, scales={} if scales is None else {"hook": scales})}
            if self.val_rows and number == 0:
                splits["val"] = partial(Split, {"hook": rows[: self.val_rows]})
            yield Chunk(splits, {})

    def documents(self, number: int) -> Tensor:
        """Rows of one chunk of documents of 50 to 2000 tokens, most of them short."""
        generator = stream(0, "documents", number)
        lengths = (50 * 40 ** torch.rand(self.chunk // 50, generator=generator)).long()
        document = torch.arange(len(lengths)).repeat_interleave(lengths)[: self.chunk]
        position = torch.arange(self.chunk) % 128
        by_document = torch.randn(len(lengths), generator=generator)
        by_position = torch.linspace(-1, 1, 128) * 3**0.5
        columns = [number * self.chunk // 50 + document, position, by_document[document], by_position[position]]
        rows = torch.stack([column.float() for column in columns], dim=1)
        return rows[torch.randperm(self.chunk, generator=generator)] if self.shuffled else rows


def make(root: Path, *sizes: Any) -> Shards:
    return harvest(Made(*sizes), root, show=False)["hook"]


def files(shards: Shards) -> list[Path]:
    return sorted(shards.directory.glob("*.safetensors"))


def warm(shards: Shards) -> Shards:
    """Read every file once, so that all of it is in the page cache."""
    for path in files(shards):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return shards


def evict(shards: Shards) -> None:
    """Drop the files from the page cache; they must not be mapped."""
    for path in files(shards):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reader(shards: Shards, batch: int, threads: int = 2, order: str | None = None) -> TrainBatches:
    """One epoch of training batches."""
    sizes = shards.rows("train")
    batches = TrainBatches(shards, batch, sum(sizes) // batch, 0, threads=threads)
    if order is not None:
        block, pool = map(int, order.split("x"))
        batches.feed.order = ShardOrder(sizes, 0, block, pool)
    return batches


def arriving(batches: Iterable[Tensor], device: str) -> Iterator[Tensor]:
    """The batches on a device, each once it is there."""
    like: Tensor | None = None
    for batch in batches:
        like = torch.empty(0, dtype=batch.dtype, device=device) if like is None else like
        arrived = moved(batch, like)
        if arrived.is_cuda:
            torch.cuda.synchronize()
        yield arrived


@contextmanager
def pageable() -> Iterator[None]:
    """Batches in memory that is not pinned, for a while."""
    with patch.object(of_msae, "room_for", lambda n, rows: torch.empty(n, rows.d_in, dtype=rows.dtype)):
        yield


def from_pageable(batches: Iterable[Tensor], device: str) -> Iterator[Tensor]:
    """The batches on a device, from memory that is not pinned."""
    with pageable():
        yield from arriving(batches, device)


def in_file_order(shards: Shards, batch: int) -> Iterator[Tensor]:
    """A plain memory map, block after block."""
    for shard in range(len(shards.rows("train"))):
        for block in shards.activations("train", shard).split(batch):
            yield block.clone()


def perfectly_shuffled(shards: Shards, batch: int) -> Iterator[Tensor]:
    """One permutation of all rows, of memory maps."""
    sizes = shards.rows("train")
    first = torch.tensor([0, *sizes]).cumsum(0)
    order = torch.randperm(sum(sizes), generator=stream(0, "perfect"))
    for start in range(0, len(order) - batch + 1, batch):
        rows = order[start : start + batch].sort().values
        edges = torch.searchsorted(rows, first).tolist()
        out = torch.empty(batch, shards.d_in, dtype=shards.dtype)
        for shard, (a, b) in enumerate(pairwise(edges)):
            torch.index_select(shards.activations("train", shard), 0, rows[a:b] - first[shard], out=out[a:b])
        yield out


# --- throughput and memory -----------------------------------------------------------------------------------------


def rows_per_second(batches: Iterable[Tensor]) -> float:
    start = time.perf_counter()
    rows = sum(len(batch) for batch in batches)
    return rows / (time.perf_counter() - start)


def throughput(
    shards: Shards, many: Shards, small: Shards, batch: int, threads: list[int], rounds: int, device: str
) -> None:
    ways: Ways = {
        "memory map in file order": partial(in_file_order, shards, batch),
        "one permutation of all rows": partial(perfectly_shuffled, shards, batch),
    }
    for kind, of in {"": shards, f", {len(many.rows('train'))} shards": many, ", int8": small}.items():
        for n in threads:
            ways[f"ours, {n} threads{kind}"] = ours = partial(reader, of, batch, n)
            if device != "cpu":
                ways[f"ours, {n} threads{kind}, to the GPU"] = lambda ours=ours: arriving(ours(), device)
                ways[f"… from pageable memory, {n}{kind}"] = lambda ours=ours: from_pageable(ours(), device)
    rates = [{name: rows_per_second(way()) / 1e6 for name, way in ways.items()} for _ in range(rounds)]
    print(f"\n{'':44}million rows/s from page cache (least … most)")
    for name in ways:
        middle, low, high = (f(rate[name] for rate in rates) for f in (statistics.median, min, max))
        print(f"{name:44}{middle:5.2f} ({low:.2f} … {high:.2f})")


def peak_memory(shards: Shards, batch: int) -> None:
    """Print the most memory of one epoch above that of the start, in MB; run in a process of its own."""
    kinds = ("RssAnon", "RssFile")
    before = {kind: resident(kind) for kind in kinds}
    peak = dict(before)
    for _ in reader(shards, batch):
        peak = {kind: max(peak[kind], resident(kind)) for kind in kinds}
    sizes = [sum(path.stat().st_size for path in files(shards)), *(peak[kind] - before[kind] for kind in kinds)]
    print(" ".join(f"{size / 1e6:10,.0f}" for size in sizes))


# --- cold reads ----------------------------------------------------------------------------------------------------


def seconds_cold(directory: Path, batch: int, sleep: float, ask: bool) -> tuple[float, float, int]:
    """Seconds to the first batch and from there to the last of an epoch from disk, each used for `sleep` seconds."""
    shards = Shards(directory)
    evict(shards)
    times = [time.perf_counter()]
    with patch("os.posix_fadvise", os.posix_fadvise if ask else lambda *_: None):
        for _ in reader(shards, batch):
            times.append(time.perf_counter())
            time.sleep(sleep)
    return times[1] - times[0], time.perf_counter() - times[1], len(times) - 1


def cold(directory: Path, batch: int, rounds: int) -> None:
    """How much of the time that a disk takes is hidden behind a consumer that takes as long, or twice as long."""
    print(
        "\nfrom disk, after the first batch    read alone   consumer alone   both   of the reading hidden   first batch"
    )
    figures: dict[tuple[bool, int], list[list[float]]] = {(ask, n): [] for ask in (False, True) for n in (1, 2)}
    for _ in range(rounds):
        for (ask, times_as_long), of in figures.items():
            _, alone, count = seconds_cold(directory, batch, 0, ask)
            sleep = times_as_long * alone / count
            start = time.perf_counter()
            for _ in range(count):
                time.sleep(sleep)
            consumer = time.perf_counter() - start
            first, both, _ = seconds_cold(directory, batch, sleep, ask)
            of.append([alone, consumer, both, (alone + consumer - both) / alone, first])
    for (ask, _), of in figures.items():
        alone, consumer, both, hidden, first = torch.tensor(of).median(0).values.tolist()
        name = "a pool asked for at once" if ask else "one block at a time"
        print(f"{name:32}{alone:12.2f} s{consumer:15.2f} s{both:7.2f} s{hidden:18.0%}{first:18.2f} s")


# --- quality of the shuffle ----------------------------------------------------------------------------------------


def same_pairs(labels: Tensor) -> float:
    """Share of the pairs of rows with equal labels [n]."""
    counts = labels.long().unique(return_counts=True)[1].double()
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def correlation(values: Tensor) -> float:
    """Mean product of the pairs of values [n] of mean 0 and variance 1: their correlation."""
    values = values.double()
    return float((values.sum() ** 2 - values.square().sum()) / (len(values) * (len(values) - 1)))


def quality(shuffled: Shards, text: Shards, batch: int, orders: list[str]) -> None:
    ways: Ways = {
        "text order": partial(in_file_order, text, batch),
        "file order": partial(in_file_order, shuffled, batch),
        **{f"ours {order}": partial(reader, shuffled, batch, order=order) for order in orders},
        "ours": partial(reader, shuffled, batch),
        "perfect": partial(perfectly_shuffled, shuffled, batch),
    }
    rows = torch.cat([shuffled.activations("train", i) for i in range(len(shuffled.rows("train")))])
    mean, std = rows.double().mean(0), rows.double().std(0)
    print(
        f"\npairs of rows of one batch of {batch}, of {len(rows):,} rows: how many of a million are of one document or"
        "\nposition; correlation · 10⁶ (and the variance of a batch's mean by it: 1 if rows were independent)"
        f"\n{'':14}{'same document':>14}{'same position':>14}{'by document':>24}{'by position':>24}"
    )
    for name, way in ways.items():
        figures = []
        for x in way():
            z = (x.double() - mean) / std
            figures.append([same_pairs(x[:, 0]), same_pairs(x[:, 1]), correlation(z[:, 2]), correlation(z[:, 3])])
        document, position, *correlations = (torch.tensor(figures).mean(0) * 1e6).tolist()
        variances = "".join(f"{rho:15.1f} ({1 + (batch - 1) * rho / 1e6:6.3f})" for rho in correlations)
        print(f"{name:14}{document:14.1f}{position:14.1f}{variances}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1 << 20, help="for speed and memory, a multiple of 262144")
    parser.add_argument("--text-rows", type=int, default=1 << 24, help="for the quality of the shuffle")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--orders", nargs="*", default=["256x64"], help="other block and pool sizes to compare")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where batches go, for speed")
    parser.add_argument("--directory", help="where the temporary directory is made")
    parts = ["speed", "memory", "cold", "quality"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--memory", help="measure the memory that an epoch of these shards takes, in this process")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; use --device cpu")
    if a.device == "cuda":
        torch.cuda.init()  # the reader pins its batches where CUDA is in use
    keep_freed_memory()  # as training does
    if a.memory:
        return peak_memory(Shards(a.memory), a.batch)
    print(f"{os.cpu_count()} CPUs, batches of {a.batch} × {a.d_in}")
    with tempfile.TemporaryDirectory(dir=a.directory) as temporary:
        root = Path(temporary)
        if "speed" in a.only:
            shards = warm(make(root, a.rows, a.d_in))
            many = warm(make(root, a.rows // 4, a.d_in, torch.bfloat16, True, a.batch // 4))
            small = warm(make(root, a.rows, a.d_in, torch.int8))
            throughput(shards, many, small, a.batch, a.threads, a.rounds, a.device)
            del shards, many, small  # what is mapped is not evicted
        if "memory" in a.only:
            print("\nMB of data    private     mapped (the most of an epoch, above the start)", flush=True)
            for rows in (a.rows // 4, a.rows):
                directory = make(root, rows, a.d_in).directory
                command = [sys.executable, __file__, "--batch", str(a.batch), "--memory", str(directory)]
                subprocess.run(command, check=True)
        if "cold" in a.only:
            cold(make(root, a.rows, a.d_in).directory, a.batch, 3)
        if "quality" in a.only:
            shuffled, text = (make(root, a.text_rows, 0, torch.float32, is_shuffled) for is_shuffled in (True, False))
            quality(shuffled, text, a.batch, a.orders)


if __name__ == "__main__":
    main()
