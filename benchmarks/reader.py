"""Rows a second, memory, cold reads and the quality of the shuffle of the reader of shards (msae.data.batches).

    python benchmarks/reader.py [--rows 1048576] [--d-in 768] [--batch 4096] [--rounds 5] [--threads 1 2 4]

Shards are made in a temporary directory (`--directory` says where), chunk by chunk as a harvest writes them. The
alternatives of a table run in turn, round by round; medians are printed. No accelerator is used.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from msae.data.batches import RowOrder, TrainBatches
from msae.data.harvest import harvest
from msae.data.seeds import stream
from msae.data.shards import Shards, quantise
from msae.data.source import Chunk, Split
from msae.training.memory import keep_freed_memory

CHUNK = 262_144  # tokens, the default of a harvest
COLUMNS = ["document", "position", "by document", "by position"]  # of the rows that tell how well they are shuffled


class Made:
    """Chunks of `chunk` rows of noise, or, where d_in is 0, rows that say which document and position they are of.

    Their columns are the document, the position in a sequence of 128, and two values with a mean of 0 and a variance
    of 1: one that all rows of a document share, one that all rows of a position share. `shuffled`: within a chunk, as
    a harvest writes rows.
    """

    name, budget_key, hook_names = "made", "rows", ("hook",)

    def __init__(
        self, rows: int, d_in: int, dtype: torch.dtype = torch.bfloat16, shuffled: bool = True, chunk: int = CHUNK
    ) -> None:
        self.rows, self.width, self.dtype, self.shuffled, self.chunk = rows, d_in, dtype, shuffled, chunk

    def identity(self, hook_name: str) -> dict[str, Any]:
        return {name: str(value) for name, value in vars(self).items()}

    def provenance(self) -> dict[str, Any]:
        return {}

    def expected_rows(self) -> int:
        return self.rows

    def d_in(self, hook_name: str) -> int:
        return self.width or len(COLUMNS)

    def bytes_per_row(self, hook_name: str) -> int:
        return self.d_in(hook_name) * self.dtype.itemsize + 4

    def truth(self) -> None:
        return None

    def documents(self, number: int) -> Tensor:
        """Rows of one chunk of documents of 50 to 2000 tokens, most of them short."""
        generator = stream(0, "documents", number)
        lengths = (50 * 40 ** torch.rand(CHUNK // 50, generator=generator)).long()
        document = torch.arange(len(lengths)).repeat_interleave(lengths)[:CHUNK]
        position = torch.arange(CHUNK) % 128
        effect = torch.randn(len(lengths), generator=generator)
        by_position = torch.linspace(-1, 1, 128) * 3**0.5
        columns = [number * CHUNK // 50 + document, position, effect[document], by_position[position]]
        rows = torch.stack([column.float() for column in columns], dim=1)
        return rows[torch.randperm(CHUNK, generator=generator)] if self.shuffled else rows

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        noise = torch.randn(self.chunk, self.width, generator=stream(0, "noise"))
        q, scales = quantise(noise) if self.dtype == torch.int8 else (noise.to(self.dtype), None)
        for number in range(self.rows // self.chunk):
            if self.width == 0:
                q = self.documents(number)
            yield Chunk({"train": Split({"hook": q}, scales={} if scales is None else {"hook": scales})}, {})


def make(root: Path, *given: Any) -> Shards:
    return harvest(Made(*given), root, show=False)["hook"]


def files(shards: Shards) -> list[Path]:
    return sorted(shards.directory.glob("*.safetensors"))


def warm(shards: Shards) -> None:
    """Read every file once, so that all of it is in the page cache."""
    for path in files(shards):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


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
        batches.order = RowOrder(sizes, 0, block, pool)
    return batches


def in_file_order(shards: Shards, batch: int) -> Iterator[Tensor]:
    """A plain memory map, block after block."""
    for shard, rows in enumerate(shards.rows("train")):
        mapped = shards.activations("train", shard)
        for start in range(0, rows, batch):
            yield mapped[start : start + batch].clone()


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
    start, rows = time.perf_counter(), 0
    for batch in batches:
        rows += len(batch)
    return rows / (time.perf_counter() - start)


def throughput(shards: Shards, many: Shards, small: Shards, batch: int, threads: list[int], rounds: int) -> None:
    ways: dict[str, Callable[[], Iterable[Tensor]]] = {
        "memory map in file order": lambda: in_file_order(shards, batch),
        "one permutation of all rows": lambda: perfectly_shuffled(shards, batch),
    }
    for kind, some in {"": shards, f", {len(many.rows('train'))} shards": many, ", int8": small}.items():
        for n in threads:
            ways[f"ours, {n} threads{kind}"] = lambda n=n, some=some: reader(some, batch, n)  # type: ignore[misc]
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(rows_per_second(way()))
    print(f"\n{'':32}million rows/s from page cache (least … most)")
    for name, values in found.items():
        middle, low, high = (f(values) / 1e6 for f in (statistics.median, min, max))
        print(f"{name:32}{middle:5.2f} ({low:.2f} … {high:.2f})")


def memory(kind: str) -> float:
    """MB of this process's memory, RssAnon or RssFile."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024 / 1e6


def peak_memory(shards: Shards, batch: int) -> None:
    """The most memory of one epoch above that of the start, in MB; run in a process of its own."""
    before = {kind: memory(kind) for kind in ("RssAnon", "RssFile")}
    peak = dict(before)
    for _ in reader(shards, batch):
        peak = {kind: max(value, memory(kind)) for kind, value in peak.items()}
    size = sum(path.stat().st_size for path in files(shards)) / 1e6
    print(f"{size:10,.0f} {peak['RssAnon'] - before['RssAnon']:10,.0f} {peak['RssFile'] - before['RssFile']:10,.0f}")


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


def cold(shards: Shards, batch: int, rounds: int) -> None:
    """How much of the time that a disk takes is hidden behind a consumer that takes as long, or twice as long."""
    print(
        "\nfrom disk, after the first batch    read alone   consumer alone   both   of the reading hidden   first batch"
    )
    ways = {(ask, times): [] for ask in (False, True) for times in (1, 2)}  # type: ignore[var-annotated]
    for _ in range(rounds):
        for (ask, times), found in ways.items():
            _, alone, count = seconds_cold(shards.directory, batch, 0, ask)
            start = time.perf_counter()
            for _ in range(count):
                time.sleep(times * alone / count)
            consumer = time.perf_counter() - start
            first, both, _ = seconds_cold(shards.directory, batch, times * alone / count, ask)
            found.append([alone, consumer, both, (alone + consumer - both) / alone, first])
    for (ask, _), found in ways.items():
        alone, consumer, both, hidden, first = torch.tensor(found).median(0).values.tolist()
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
    ways: dict[str, Callable[[], Iterable[Tensor]]] = {
        "text order": lambda: in_file_order(text, batch),
        "file order": lambda: in_file_order(shuffled, batch),
    }
    for order in orders:
        ways[f"ours {order}"] = lambda order=order: reader(shuffled, batch, order=order)  # type: ignore[misc]
    ways["ours"] = lambda: reader(shuffled, batch)
    ways["perfect"] = lambda: perfectly_shuffled(shuffled, batch)
    rows = torch.cat([shuffled.activations("train", i) for i in range(len(shuffled.rows("train")))])
    mean, std = rows.double().mean(0), rows.double().std(0)
    print(
        f"\npairs of rows of one batch of {batch}, of {len(rows):,} rows: how many of a million are of one document or"
    )
    print("position; correlation · 10⁶ (and the variance of a batch's mean by it: 1 if rows were independent)")
    print(f"{'':14}{'same document':>14}{'same position':>14}{'by document':>24}{'by position':>24}")
    for name, way in ways.items():
        figures = []
        for x in way():
            z = (x.double() - mean) / std
            figures.append([same_pairs(x[:, 0]), same_pairs(x[:, 1]), correlation(z[:, 2]), correlation(z[:, 3])])
        document, position, by_document, by_position = torch.tensor(figures).mean(0).tolist()
        print(f"{name:14}{document * 1e6:14.1f}{position * 1e6:14.1f}", end="")
        for rho in (by_document, by_position):
            print(f"{rho * 1e6:15.1f} ({1 + (batch - 1) * rho:6.3f})", end="")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1 << 20, help="for speed and memory, a multiple of 262144")
    parser.add_argument("--text-rows", type=int, default=1 << 24, help="for the quality of the shuffle")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--orders", nargs="*", default=["256x64"], help="other block and pool sizes to compare")
    parser.add_argument("--directory", help="where the temporary directory is made")
    parser.add_argument("--only", nargs="+", choices=["speed", "memory", "cold", "quality"])
    parser.add_argument("--memory", help="measure the memory that an epoch of these shards takes, in this process")
    given = parser.parse_args()
    wanted = given.only or ["speed", "memory", "cold", "quality"]
    keep_freed_memory()  # as training does
    if given.memory:
        return peak_memory(Shards(given.memory), given.batch)
    print(f"{os.cpu_count()} CPUs, batches of {given.batch} × {given.d_in}")
    with tempfile.TemporaryDirectory(dir=given.directory) as temporary:
        root = Path(temporary)
        if {"speed", "memory", "cold"} & set(wanted):
            shards = make(root, given.rows, given.d_in)
            warm(shards)
        if "speed" in wanted:
            many = make(root, given.rows // 4, given.d_in, torch.bfloat16, True, given.batch // 4)
            small = make(root, given.rows, given.d_in, torch.int8)
            warm(many)
            warm(small)
            throughput(shards, many, small, given.batch, given.threads, given.rounds)
        if "memory" in wanted:
            print("\nMB of data    private     mapped (the most of an epoch, above the start)", flush=True)
            for rows in (given.rows // 4, given.rows):
                directory = make(root, rows, given.d_in).directory
                command = [sys.executable, __file__, "--batch", str(given.batch), "--memory", str(directory)]
                subprocess.run(command, check=True)
        if "cold" in wanted:
            directory = shards.directory
            del shards  # what is mapped is not evicted
            cold(Shards(directory), given.batch, 3)
        if "quality" in wanted:
            shuffled = make(root, given.text_rows, 0, torch.float32)
            text = make(root, given.text_rows, 0, torch.float32, False)
            quality(shuffled, text, given.batch, given.orders)


if __name__ == "__main__":
    main()
