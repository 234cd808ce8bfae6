"""From a source to shard directories: resumable, one writer at a time, bytes the same however often it was killed."""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from msae.data.shards import (
    FORMAT,
    MANIFEST,
    TRUTH,
    VERSION,
    Shards,
    dequantise,
    identity_hash,
    read_manifest,
    shard_name,
    size_and_checksum,
    write_atomically,
    write_json,
    write_shard,
)
from msae.data.source import Chunk, Source
from msae.data.tokens import spare_core
from msae.progress import progress

GB = 1e9
Record = dict[str, Any]  # what a chunk's JSON file says of it


def directory_of(source: Source, hook_name: str, root: str | Path) -> Path:
    """Where this hook's shards are or will be: the same identity, the same directory."""
    return Path(root) / f"{source.name}-{hook_name}-{identity_hash(source.identity(hook_name))}"


def harvest(source: Source, root: str | Path, max_disk_gb: float | None = None, show: bool = True) -> dict[str, Shards]:
    """Find or make the shards of every hook of the source, in one pass over it, and open them.

    A directory that is whole is used as it is. One that is not is completed from the first missing chunk. Prints the
    disk need first. Raises ValueError in one line when that exceeds `max_disk_gb` or the free space.
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
    """Whether there is a manifest and every shard in it has its size. Raises ValueError if the manifest is corrupt."""
    if not (directory / MANIFEST).exists():
        return False
    manifest = read_manifest(directory)
    truth = manifest["truth"]
    return all(is_there(directory / shard_name(e["split"], e["number"]), e) for e in manifest["shards"]) and (
        truth is None or is_there(directory / TRUTH, truth)
    )


def is_there(path: Path, entry: dict[str, Any]) -> bool:
    return path.exists() and path.stat().st_size == entry["bytes"]


def make_directories(root: Path, directories: dict[str, Path]) -> float:
    """Make the hooks' directories; the GB of shards that are there. Raises ValueError in one line if it cannot."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for directory in directories.values():
            directory.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {root} ({error}); choose another directory with data.root=…") from None
    return sum(f.stat().st_size for d in directories.values() for f in d.glob("*.safetensors")) / GB


def print_disk_need(
    source: Source, missing: dict[str, Path], root: Path, max_disk_gb: float | None, show: bool
) -> None:
    """Say how much the harvest will write, and refuse what does not fit."""
    there = make_directories(root, missing)
    rows = source.expected_rows()
    need = sum(rows * source.bytes_per_row(hook) for hook in missing) / GB
    if show:
        found = f", {there:.2f} GB of it there" if there else ""
        for directory in missing.values():
            print(f"harvest: up to {rows:,} rows into {directory}", file=sys.stderr)
        print(f"harvest: up to {need:.2f} GB of disk{found}; {free_gb(root):.1f} GB free", file=sys.stderr)
    if max_disk_gb is not None and need > max_disk_gb:
        raise ValueError(
            f"the harvest needs {need:.2f} GB, data.max_disk_gb allows {max_disk_gb:g}; "
            f"raise it, keep only a part on disk while training (data.rolling_gb={max_disk_gb:g}), "
            f"or harvest fewer rows ({source.budget_key}={max(1, int(rows * max_disk_gb / need))})"
        )
    refuse_full_disk(need - there, root, source.budget_key)


def free_gb(root: Path) -> float:
    return shutil.disk_usage(root).free / GB


def refuse_full_disk(more: float, root: Path, key: str) -> None:
    """Raise ValueError in one line if `more` GB do not fit on the disk."""
    if more > (free := free_gb(root)):
        raise ValueError(
            f"the harvest needs {more:.2f} GB more, {root} has {free:.2f} GB free; "
            f"choose another disk with data.root=… or lower {key}"
        )


@contextmanager
def locked(directories: list[Path], wait: bool = True) -> Iterator[None]:
    """Hold the directories' locks; a killed process lets go of its lock by itself.

    Waits for another harvester. Raises ValueError in one line if it is not to `wait`, or cannot lock.
    """
    with ExitStack() as stack:
        for directory in sorted(directories):
            lock = FileLock(directory / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    raise ValueError(
                        f"another run is using {directory}; wait for its end, choose another data.root, "
                        "or share a whole harvest (data.rolling_gb=null)"
                    ) from None
                print(f"harvest: waiting for another process that is writing {directory}", file=sys.stderr)
                lock.acquire()
            except OSError as error:
                raise ValueError(f"cannot write to {directory} ({error}); choose another data.root=…") from None
            stack.callback(lock.release)
        yield


def write_chunks(source: Source, directories: dict[str, Path], show: bool) -> None:
    """Write what is missing, chunk by chunk, then truth and manifest."""
    remove_stale(directories)
    records: dict[str, list[Record]] = {hook: [] for hook in directories}

    def find(number: int) -> dict[str, Record | None]:
        return {hook: found_whole(directory, number) for hook, directory in directories.items()}

    with progress(source.expected_rows(), f"harvest {source.name}", disable=not show) as bar:
        for written in each_chunk(source, directories, count(), find):
            for hook, record in written.items():
                records[hook].append(record)
            bar.update(sum(entry["rows"] for entry in record["shards"]))
        if show and bar.n < source.expected_rows():
            bar.total = bar.n
    write_manifests(source, directories, records)


def remove_stale(directories: dict[str, Path]) -> None:
    """Delete what a killed process was writing."""
    for directory in directories.values():
        for stale in directory.glob("*.tmp"):
            stale.unlink()


def write_manifests(
    source: Source, directories: dict[str, Path], records: dict[str, list[Record]], window: int | None = None
) -> None:
    """Write every hook's truth, if the source knows it, and manifest; that of a rolling harvest names its window."""
    truth = source.truth()
    for hook, directory in directories.items():
        manifest = make_manifest(source, hook, records[hook])
        if window is not None:  # only held-out rows stay
            manifest |= {"window": window, "shards": [e for e in manifest["shards"] if e["split"] == "val"]}
        if truth is not None:
            write_atomically(directory / TRUTH, lambda p: save_file(truth, p))
            manifest["truth"] = size_and_checksum(directory / TRUTH)
        write_json(directory / MANIFEST, manifest)


def each_chunk(
    source: Source,
    directories: dict[str, Path],
    numbers: Iterable[int],
    find: Callable[[int], dict[str, Record | None]],
    before_writing: Callable[[int, Chunk], Chunk] = lambda number, chunk: chunk,
    state: dict[str, Any] | None = None,
) -> Iterator[dict[str, Record]]:
    """The hooks' records of the chunks of these successive numbers, until the source ends; `state` is that before.

    What `find` does not find is made, and written as `before_writing` gives it back. If a core is free for that, a
    chunk is written in a thread while the source makes the next one; what writing raises is then raised after that.
    """
    chunks: Iterator[Chunk] | None = None
    writing: Future[dict[str, Record]] | None = None  # never more than one, so that memory is bounded
    with ThreadPoolExecutor(1, "msae-write") as thread:
        for number in numbers:
            chunk, found = None, find(number)
            there = next(iter(found.values()))
            if there is not None and all(found.values()):
                chunks, state = None, there["state"]  # what is there is skipped, the source goes on after it
            else:
                chunks = source.chunks(state) if chunks is None else chunks
                chunk = next(chunks, None)
                if chunk is None:
                    break
            if writing is not None:
                yield writing.result()
                writing = None
            if chunk is not None:
                chunk = before_writing(number, chunk)
            if spare_core():
                writing = thread.submit(write_missing, directories, number, found, chunk)
            else:
                yield write_missing(directories, number, found, chunk)
        if writing is not None:
            yield writing.result()


def write_missing(
    directories: dict[str, Path], number: int, found: dict[str, Record | None], chunk: Chunk | None
) -> dict[str, Record]:
    """The records of a chunk, those that were found and, for the hooks without one, of what is written now."""
    records = {}
    for hook, directory in directories.items():
        record = found[hook]
        if record is None:
            assert chunk is not None, f"chunk {number} of {hook} was neither found nor made"
            record = write_chunk(directory, number, hook, chunk)
        records[hook] = record
    return records


def write_chunk(directory: Path, number: int, hook_name: str, chunk: Chunk) -> dict[str, Any]:
    """Write one chunk's shards, then its record: a chunk without a record does not count.

    A chunk that had a record must come out as it was, or ValueError is raised in one line.
    """
    record: dict[str, Any] = {"shards": [], "state": chunk.state, "sum": None, "sum_square": 0.0}
    for split, rows in chunk.splits.items():
        activations, scales = rows.activations[hook_name], rows.scales.get(hook_name)
        tensors = {"activations": activations, **rows.index}
        assert (scales is not None) == (activations.dtype == torch.int8), "scales go with int8 rows, and only with them"
        if scales is not None:
            if not scales.isfinite().all():
                raise ValueError(
                    f"{hook_name} has rows with NaN or Inf, which int8 cannot hold; "
                    "set data.source.model_dtype=float32, or check the model's weights"
                )
            tensors["scales"] = scales
        record["dtype"], record["d_in"] = str(activations.dtype).removeprefix("torch."), activations.shape[1]
        record["shards"].append(write_shard(directory, split, number, tensors))
        if split == "train":
            total, square = sums(activations, scales)
            record["sum"], record["sum_square"] = total.tolist(), square
    before = read_record(directory, number)
    if before is None:
        write_json(directory / record_name(number), record)
        return record
    for entry in record["shards"]:
        if entry not in before["shards"]:
            path = directory / shard_name(entry["split"], number)
            path.unlink()
            raise ValueError(
                f"{path} was made again and came out with checksum {entry['xxh3']}, not as {record_name(number)} says: "
                "the source gives other rows than before (another device, library or text?), so what was trained on "
                f"them cannot go on; delete {directory} and start a new run"
            )
    return before


def record_name(number: int) -> str:
    return f"chunk-{number:05d}.json"


def read_record(directory: Path, number: int) -> Record | None:
    """A chunk's record, or None if it is missing or damaged."""
    try:
        record = json.loads((directory / record_name(number)).read_text())
        sound = all(
            e["split"] in ("train", "val") and e["number"] == number and {"rows", "bytes", "xxh3"} <= e.keys()
            for e in record["shards"]
        )
        return record if sound and {"state", "sum", "sum_square"} <= record.keys() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def found_whole(directory: Path, number: int) -> Record | None:
    """A chunk's record, or None unless the chunk is there as a whole: then it is made again."""
    record = read_record(directory, number)
    return record if record is not None and is_complete(directory, record) else None


def is_complete(directory: Path, record: Record, splits: Iterable[str] = ("train", "val")) -> bool:
    """Whether every shard of these splits is there in its size."""
    wanted = [entry for entry in record["shards"] if entry["split"] in splits]
    return all(is_there(directory / shard_name(entry["split"], entry["number"]), entry) for entry in wanted)


def sums(activations: Tensor, scales: Tensor | None = None, rows: int = 8192) -> tuple[Tensor, float]:
    """Σ x [d_in] and Σ‖x‖² in float64 of rows as they will be read, in blocks that stay small."""
    total = activations.new_zeros(activations.shape[1]).double()
    square = 0.0
    for start in range(0, len(activations), rows):
        block = activations[start : start + rows]
        exact = (block if scales is None else dequantise(block, scales[start : start + rows])).double()
        total += exact.sum(0)
        square += float(exact.square().sum())
    return total, square


def make_manifest(source: Source, hook_name: str, records: list[Record]) -> dict[str, Any]:
    """The manifest that the chunks' records add up to. Raises ValueError if there is no training row."""
    shards = [entry for record in records for entry in record["shards"]]
    rows = sum(entry["rows"] for entry in shards if entry["split"] == "train")
    if rows == 0:
        raise ValueError(
            f"the source {source.name} gave no training rows; give it more text or raise {source.budget_key}"
        )
    with_rows = [record for record in records if record["sum"] is not None]
    mean = [sum(column) / rows for column in zip(*(record["sum"] for record in with_rows), strict=True)]
    identity = source.identity(hook_name)
    return {
        "format": FORMAT,
        "version": VERSION if with_rows[0]["dtype"] == "int8" else 1,
        "identity_hash": identity_hash(identity),
        "identity": identity,
        "provenance": source.provenance(),
        "hook_name": hook_name,
        "dtype": with_rows[0]["dtype"],
        "d_in": with_rows[0]["d_in"],
        "truth": None,
        "statistics": {
            "rows": rows,
            "mean": mean,
            "mean_square": sum(record["sum_square"] for record in records) / rows,
        },
        "shards": shards,
    }
