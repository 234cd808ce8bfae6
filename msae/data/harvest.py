"""Harvests a source into shard directories: resumable, one writer at a time, the same bytes after any interruption."""

import math
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from msae.data.shards import (
    ADVICE,
    FORMAT,
    MANIFEST,
    TRUTH,
    VERSION,
    Dtype,
    FileEntry,
    Manifest,
    ShardEntry,
    Shards,
    Statistics,
    identity_hash,
    read_manifest,
    write_shard,
)
from msae.files import lock, read_json, write, write_json
from msae.progress import progress, say
from msae.settings import Count, NonNegative, as_plain, settings
from msae.sources.int8 import dequantise
from msae.sources.source import Chunk, Source, Split
from msae.sources.tokens import spare_core

GB = 1e9
SUMMED = 8192  # rows of a block; another number gives other last bits


@settings
class Record:
    """What is known of a written chunk: its shards, the source's state after it, and sums over its training rows."""

    shards: list[ShardEntry]
    state: dict[str, Any]
    sum: list[float] | None
    sum_square: NonNegative
    dtype: Dtype | None = None
    d_in: Count | None = None

    def rows(self, split: str | None = None) -> int:
        """The number of rows in one split, or in both."""
        return sum(entry.rows for entry in self.shards if split in (None, entry.split))


def directory_of(source: Source, hook_name: str, root: str | Path) -> Path:
    """Where this hook's shards are or will be: equal identities share a directory."""
    return Path(root) / f"{source.name}-{hook_name}-{identity_hash(source.identity(hook_name))}"


def harvest(source: Source, root: str | Path, max_disk_gb: float | None = None, show: bool = True) -> dict[str, Shards]:
    """Open the shards of every hook of the source, once one pass over it has written those that are missing.

    A whole directory is used as it is; another is completed from its first missing chunk. Prints the disk need first.
    Raises ValueError in one line when that exceeds `max_disk_gb` or the free space.
    """
    directories = {hook: directory_of(source, hook, root) for hook in source.hook_names}
    missing = {hook: d for hook, d in directories.items() if not is_whole(d)}
    if missing:
        print_disk_need(source, missing, Path(root), max_disk_gb, show)
        with locked(list(missing.values())):
            missing = {hook: d for hook, d in missing.items() if not is_whole(d)}  # another process may have made it
            if missing:
                write_chunks(source, missing, show)
    return {hook: Shards(directory) for hook, directory in directories.items()}


def is_whole(directory: Path) -> bool:
    """Whether there is a manifest and every file in it has its size. Raises ValueError if the manifest is damaged."""
    if not (directory / MANIFEST).exists():
        return False
    manifest = read_manifest(directory)
    has_truth = manifest.truth is None or manifest.truth.is_at(directory / TRUTH)
    return has_truth and all(entry.is_at(directory / entry.name) for entry in manifest.shards)


def print_disk_need(
    source: Source, missing: dict[str, Path], root: Path, max_disk_gb: float | None, show: bool
) -> None:
    """Make the directories and print the disk need. Raises ValueError in one line if it is too much."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for directory in missing.values():
            directory.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {root} ({error}); choose another directory with data.root=…") from None
    on_disk = sum(f.stat().st_size for d in missing.values() for f in d.glob("*.safetensors")) / GB
    free = shutil.disk_usage(root).free / GB
    rows = source.expected_rows()
    need = sum(rows * source.bytes_per_row(hook) for hook in missing) / GB
    if show:
        already = f", {on_disk:.2f} GB of it there" if on_disk else ""
        for directory in missing.values():
            say(f"harvest: up to {rows:,} rows into {directory}")
        say(f"harvest: up to {need:.2f} GB of disk{already}; {free:.1f} GB free")
    if max_disk_gb is not None and need > max_disk_gb:
        raise ValueError(
            f"the harvest needs {need:.2f} GB, data.max_disk_gb allows {max_disk_gb:g}; "
            f"raise it, keep rows in memory alone (data.memory_gb=…), "
            f"or harvest fewer rows ({source.budget_key}={max(1, int(rows * max_disk_gb / need))})"
        )
    if need - on_disk > free:
        raise ValueError(
            f"the harvest needs {need - on_disk:.2f} GB more, {root} has {free:.2f} GB free; choose another disk with "
            f"data.root=…, keep rows in memory alone (data.memory_gb=…), or lower {source.budget_key}"
        )


@contextmanager
def locked(directories: list[Path]) -> Iterator[None]:
    """Hold the directories' locks; wait for another harvester."""
    with ExitStack() as stack:
        for directory in sorted(directories):
            busy = f"harvest: waiting for another process that is writing {directory}"
            stack.callback(lock(directory, busy, True, "choose another data.root=…").release)
        yield


def write_chunks(source: Source, directories: dict[str, Path], show: bool) -> None:
    """Write the missing chunks, then truth and manifest."""
    for directory in directories.values():
        for stale in directory.glob("*.tmp"):  # of a killed process
            stale.unlink()
    records: dict[str, list[Record]] = {hook: [] for hook in directories}
    with progress(source.expected_rows(), f"harvest {source.name}", disable=not show) as bar:
        for written in each_chunk(source, directories):
            for hook, record in written.items():
                records[hook].append(record)
            bar.update(record.rows())
        if show and bar.n < source.expected_rows():
            bar.total = bar.n
    write_manifests(source, directories, records)


def write_manifests(source: Source, directories: dict[str, Path], records: dict[str, list[Record]]) -> None:
    """Write every hook's manifest, and its truth if the source knows it."""
    truth = source.truth()
    for hook, directory in directories.items():
        if truth is not None:
            write(directory / TRUTH, lambda temporary: save_file(truth, temporary), ADVICE)
        entry = None if truth is None else FileEntry.of(directory / TRUTH)
        write_json(directory / MANIFEST, as_plain(make_manifest(source, hook, records[hook], entry)), advice=ADVICE)


def each_chunk(source: Source, directories: dict[str, Path]) -> Iterator[dict[str, Record]]:
    """Yield each hook's record of every chunk, in turn; one that is not written for every hook is made.

    If a core is free, a thread writes it while the source makes the next one; an error in writing is then raised after
    that.
    """
    chunks: Iterator[Chunk] | None = None
    state: dict[str, Any] | None = None  # after the last one that was found
    writing: Future[dict[str, Record]] | None = None  # never more than one, so that memory is bounded
    with ThreadPoolExecutor(1, "msae-write") as thread:
        for number in count():
            records, chunk, made = find_chunk(directories, number), None, dict[str, Split]()
            if records.keys() == directories.keys():
                chunks, state = None, next(iter(records.values())).state  # the source continues after it
            else:
                chunks = source.chunks(state) if chunks is None else chunks
                chunk = next(chunks, None)
                if chunk is None:
                    break
                made = {split: make() for split, make in chunk.splits.items()}
            if writing is not None:
                yield writing.result()
                writing = None
            if chunk is None:
                yield records
                continue
            task = partial(write_missing, directories, number, records, made, chunk.state)
            del made
            if spare_core():
                writing = thread.submit(task)
            else:
                yield task()
            del task  # no name keeps the rows alive
        if writing is not None:
            yield writing.result()


def write_missing(
    directories: dict[str, Path],
    number: int,
    records: dict[str, Record],
    made: dict[str, Split],
    state: dict[str, Any],
) -> dict[str, Record]:
    """Write a chunk for the hooks that have no record of it, and return the records of all."""
    missing = {hook: directory for hook, directory in directories.items() if hook not in records}
    return records | {hook: write_chunk(d, number, hook, made, state) for hook, d in missing.items()}


def write_chunk(directory: Path, number: int, hook_name: str, made: dict[str, Split], state: dict[str, Any]) -> Record:
    """Write one chunk's shards, then its record: a chunk without a record does not count.

    Raises ValueError in one line if rows are not finite.
    """
    fields: dict[str, Any] = {"shards": [], "state": state, "sum": None, "sum_square": 0.0}
    for split, rows in made.items():
        activations, scales = rows.activations[hook_name], rows.scales.get(hook_name)
        total, square = sums(hook_name, rows)
        tensors = {"activations": activations, **rows.index} | ({} if scales is None else {"scales": scales})
        fields["shards"].append(write_shard(directory, split, number, tensors))
        fields |= {"dtype": str(activations.dtype).removeprefix("torch."), "d_in": activations.shape[1]}
        if split == "train":
            fields |= {"sum": total.tolist(), "sum_square": square}
    record = Record(**fields)
    write_json(directory / record_name(number), as_plain(record), advice=ADVICE)
    return record


def record_name(number: int) -> str:
    return f"chunk-{number:05d}.json"


def read_record(directory: Path, number: int) -> Record | None:
    """A chunk's record, or None if it is missing or damaged."""
    try:
        record = read_json(directory / record_name(number), Record, "a record", "")
    except ValueError:
        return None
    return record if all(entry.number == number for entry in record.shards) else None


def find_chunk(directories: dict[str, Path], number: int) -> dict[str, Record]:
    """The records of a chunk for the hooks that have every shard on disk, in its size."""
    records = {hook: read_record(directory, number) for hook, directory in directories.items()}
    return {
        hook: record
        for hook, record in records.items()
        if record and all(entry.is_at(directories[hook] / entry.name) for entry in record.shards)
    }


def sums(hook_name: str, rows: Split) -> tuple[Tensor, float]:
    """Σ x [d_in] and Σ‖x‖² in float64 of a hook's rows as they will be read, some at a time to save memory.

    Raises ValueError in one line if rows are not finite.
    """
    activations, scales = rows.activations[hook_name], rows.scales.get(hook_name)
    assert (scales is not None) == (activations.dtype == torch.int8), "scales go with int8 rows, and only with them"
    total, square = activations.new_zeros(activations.shape[1]).double(), 0.0
    for start in range(0, len(activations), SUMMED):
        some = slice(start, start + SUMMED)
        with np.errstate(invalid="ignore"):  # 0 · scale of a row that is not finite
            exact = (activations[some] if scales is None else dequantise(activations[some], scales[some])).double()
        total += exact.sum(0)
        square += float(exact.square().sum())
    if not math.isfinite(square):
        raise ValueError(
            f"{hook_name} has rows with NaN or Inf, which no SAE can learn; "
            "set data.source.model_dtype=float32, or check the model's weights"
        )
    return total, square


def without_training_rows(source: Source) -> ValueError:
    """The error of a source that gave none."""
    return ValueError(f"the source {source.name} gave no training rows; give it more text or raise {source.budget_key}")


def make_manifest(source: Source, hook_name: str, records: list[Record], truth: FileEntry | None) -> Manifest:
    """The manifest of these chunks. Raises ValueError if they have no training row."""
    rows = sum(record.rows("train") for record in records)
    if rows == 0:
        raise without_training_rows(source)
    dtype, d_in = next((r.dtype, r.d_in) for r in records if r.dtype is not None and r.d_in is not None)
    columns = zip(*(record.sum for record in records if record.sum is not None), strict=True)
    identity = source.identity(hook_name)
    return Manifest(
        format=FORMAT,
        version=VERSION if dtype == "int8" else 1,
        identity_hash=identity_hash(identity),
        identity=identity,
        provenance=source.provenance(),
        hook_name=hook_name,
        dtype=dtype,
        d_in=d_in,
        truth=truth,
        statistics=Statistics(
            rows=rows,
            mean=[sum(column) / rows for column in columns],
            mean_square=sum(record.sum_square for record in records) / rows,
        ),
        shards=[entry for record in records for entry in record.shards],
    )
