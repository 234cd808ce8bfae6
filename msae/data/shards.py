"""The shard directory, which a harvest writes and everything after it reads.

    <name>-<hook>-<identity hash>/
        manifest.json             identity, statistics, and rows, bytes and checksum of every shard; written last
        train-00000.safetensors   activations [rows, d_in], and for text: sequence [rows], position [rows], tokens;
                                  activations in int8 have scales [rows] beside them
        val-00000.safetensors     the same, from other documents
        chunk-00000.json          what the harvest needs to continue after this chunk
        truth.safetensors         synthetic sources only: the true features

A file gets its name once it is whole and synced, so a name that exists can be trusted. Names follow from split and
number: no path is ever read from a manifest.
"""

import hashlib
import json
import math
import os
import weakref
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from io import FileIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import Self

from msae.data.rows import ROWS, Array, Rows, Stored, as_array
from msae.files import checksum, checksum_of_ends, read_json, write
from msae.settings import Count, Natural, NonNegative, settings
from msae.sources.int8 import dequantise

FORMAT, VERSION = "msae-shards", 2  # shards without int8 rows say 1: an older msae reads them
MANIFEST, TRUTH = "manifest.json", "truth.safetensors"
Dtype = Literal["float32", "bfloat16", "float16", "int8"]
IN_HEADER: dict[Dtype, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
ADVICE = "free space or choose another data.root, then run the same command to continue"
AGAIN = "run the same python -m msae.harvest command to make it again"


@settings
class FileEntry:
    """What the manifest says of a file."""

    bytes: Natural
    xxh3: str
    xxh3_ends: str

    @classmethod
    def of(cls, path: Path, **more: Any) -> Self:
        """The entry of an existing file."""
        return cls(bytes=path.stat().st_size, xxh3=checksum(path), xxh3_ends=checksum_of_ends(path), **more)

    def is_at(self, path: Path) -> bool:
        """Whether a file of this size is at `path`."""
        return path.exists() and path.stat().st_size == self.bytes


@settings
class ShardEntry(FileEntry):
    """What the manifest says of a shard."""

    split: Literal["train", "val"]
    number: Natural
    rows: Natural

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)


@settings
class Statistics:
    """The number of training rows, their mean E x and their mean square E‖x‖²."""

    rows: Natural
    mean: list[float]
    mean_square: NonNegative


@settings
class Manifest:
    """The content of manifest.json."""

    format: str
    version: Count
    identity_hash: str
    identity: dict[str, Any]
    provenance: dict[str, Any]
    hook_name: str
    dtype: Dtype
    d_in: Count
    truth: FileEntry | None
    statistics: Statistics
    shards: list[ShardEntry]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format is {self.format}, expected {FORMAT}")
        if len(self.statistics.mean) != self.d_in:
            raise ValueError(f"statistics.mean has {len(self.statistics.mean)} numbers, d_in is {self.d_in}")
        if len({entry.name for entry in self.shards}) < len(self.shards):
            raise ValueError("a shard is listed twice")


def read_manifest(directory: Path) -> Manifest:
    """Read a shard directory's manifest. Raises ValueError in one line if it is missing or damaged."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} has no {MANIFEST}, so its harvest has not finished; {AGAIN}")
    return read_json(path, Manifest, "a shard manifest", f"delete it and {AGAIN}", VERSION)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.safetensors"


def identity_hash(identity: dict[str, Any]) -> str:
    """Twelve hex digits of the SHA-256 of the identity's canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def write_shard(directory: Path, split: str, number: int, tensors: dict[str, Tensor]) -> ShardEntry:
    """Write one shard and return its manifest entry."""
    path = directory / shard_name(split, number)
    write(path, lambda p: save_file({k: t.contiguous() for k, t in tensors.items()}, p), ADVICE)
    return ShardEntry.of(path, split=split, number=number, rows=len(tensors["activations"]))


class Shards(Rows):
    """An open shard directory: its manifest and its rows.

    Opening checks size, dtype, shape and the checksum of both ends of every file; `verify` checks whole files.
    Raises ValueError in one line that names the file, what it holds, what was expected, and what to type next.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.name, self.hook_name, self.d_in = self.directory.name, self.manifest.hook_name, self.manifest.d_in
        self.identity, self.identity_hash = self.manifest.identity, self.manifest.identity_hash
        self.provenance = self.manifest.provenance
        self.stored_dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        self.mean = torch.tensor(self.manifest.statistics.mean, dtype=torch.float64)
        self.mean_square = self.manifest.statistics.mean_square
        self.entries = {split: [e for e in self.manifest.shards if e.split == split] for split in ("train", "val")}
        self.first = {s: np.cumsum([0, *self.rows(s)]) for s in self.entries}  # number of each shard's first row
        self._tensors = cache(lambda split, shard: load_file(self._path(split, shard)))
        self._begins = cache(self._read_header)
        self._free: list[Array] = []
        on_disk = {path.name for path in self.directory.glob("*.safetensors")}
        if extra := on_disk - self.files().keys() - {TRUTH}:
            raise ValueError(f"{self.directory / min(extra)} is not in the manifest; move it away or delete it")
        for name, entry in self.files().items():
            self._check_file(self.directory / name, entry)
        for shard in self.manifest.shards:
            self._check_content(self.directory / shard.name, shard)

    def __str__(self) -> str:
        return str(self.directory)

    def files(self) -> dict[str, FileEntry]:
        """Name → entry of every file in the manifest."""
        truth = {} if self.manifest.truth is None else {TRUTH: self.manifest.truth}
        return {entry.name: entry for entry in self.manifest.shards} | truth

    def rows(self, split: str) -> list[int]:
        """As `Rows.rows`."""
        return [entry.rows for entry in self.entries[split]]

    def activations(self, split: str, shard: int) -> Tensor:
        """As `Rows.activations`: a zero-copy memory map, or dequantised int8."""
        tensors = self._tensors(split, shard)
        rows = tensors["activations"]
        return dequantise(rows, tensors["scales"]) if rows.dtype == torch.int8 else rows

    def read(self, split: str, starts: Tensor, stops: Tensor) -> Stored:
        """As `Rows.read`. Raises ValueError where a file has become shorter.

        Files are read, not mapped, since mapped pages would count as this process's memory until that is all of the
        data. All blocks are requested from the disk before the first is waited for.
        """
        rows, dtype = int((stops - starts).sum()), as_array(torch.empty(0, dtype=self.stored_dtype)).dtype
        stored: dict[str, Array] = {"activations": self._memory((rows, self.d_in), dtype)}
        if self.stored_dtype == torch.int8:
            stored["scales"] = np.empty(rows, np.float32)
        memory = {name: memoryview(array.reshape(-1).view(np.uint8).data) for name, array in stored.items()}
        if hasattr(os, "posix_fadvise"):
            for file, _, begin, size, _ in self._pieces(split, starts, stops, stored):
                os.posix_fadvise(file.fileno(), begin, size, os.POSIX_FADV_WILLNEED)
        for file, name, begin, size, offset in self._pieces(split, starts, stops, stored):
            file.seek(begin)
            if file.readinto(memory[name][offset : offset + size]) != size:
                raise ValueError(f"{file.name} has become shorter; {AGAIN}")
        return stored

    def _memory(self, shape: tuple[int, int], dtype: Any) -> Array:
        """An array whose memory is reused once it is gone: the kernel needs longer for new pages than to fill them."""
        size = math.prod(shape) * dtype.itemsize
        whole = self._free.pop() if self._free else np.empty(size, np.uint8)
        whole = whole if len(whole) >= size else np.empty(size, np.uint8)
        array = whole[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._free.append, whole).atexit = False  # hold this array, not a view of it
        return array

    def _pieces(
        self, split: str, starts: Tensor, stops: Tensor, stored: dict[str, Array]
    ) -> Iterator[tuple[FileIO, str, int, int, int]]:
        """For each block and tensor: open file, tensor's name, first byte, bytes, and their offset in `stored`."""
        shards = np.searchsorted(self.first[split], starts.numpy(), side="right") - 1
        offsets = (stops - starts).cumsum(0) - (stops - starts)
        blocks = zip(shards.tolist(), starts.tolist(), stops.tolist(), offsets.tolist(), strict=True)
        for shard, in_shard in groupby(blocks, key=itemgetter(0)):
            begins, first = self._begins(split, shard), int(self.first[split][shard])
            with open(self._path(split, shard), "rb", buffering=0) as file:  # one at a time: there may be thousands
                for _, start, stop, offset in in_shard:
                    for name, array in stored.items():
                        size = array.strides[0]
                        yield file, name, begins[name] + (start - first) * size, (stop - start) * size, offset * size

    def index(self, split: str, shard: int) -> dict[str, Tensor]:
        """As `Rows.index`."""
        return {name: tensor for name, tensor in self._tensors(split, shard).items() if name not in ROWS}

    @cached_property
    def truth(self) -> dict[str, Tensor] | None:  # type: ignore[override]
        return None if self.manifest.truth is None else load_file(self.directory / TRUTH)

    def verify(self, on_bytes: Callable[[int], object] = lambda n: None) -> None:
        """Compare every file's checksum with the manifest. Raises ValueError that names the first that differs."""
        for name, entry in self.files().items():
            path = self.directory / name
            if (actual := checksum(path)) != entry.xxh3:
                raise ValueError(f"{path} has checksum {actual}, the manifest says {entry.xxh3}; delete it and {AGAIN}")
            on_bytes(entry.bytes)

    def _path(self, split: str, shard: int) -> Path:
        return self.directory / self.entries[split][shard].name

    def _read_header(self, split: str, shard: int) -> dict[str, int]:
        """The byte at which each tensor begins in its file."""
        with open(self._path(split, shard), "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        return {name: 8 + size + header[name]["data_offsets"][0] for name in ROWS if name in header}

    def _check_file(self, path: Path, entry: FileEntry) -> None:
        if not path.exists():
            raise ValueError(f"{path} is missing; {AGAIN}")
        if not entry.is_at(path):
            raise ValueError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry.bytes}; {AGAIN}")
        if checksum_of_ends(path) != entry.xxh3_ends:
            raise ValueError(f"{path} differs from what was harvested (checksum of its ends); delete it and {AGAIN}")

    def _check_content(self, path: Path, entry: ShardEntry) -> None:
        """Check the shape and type of the tensors that are read row by row."""
        expected = {"activations": ([entry.rows, self.d_in], IN_HEADER[self.manifest.dtype])}
        if self.manifest.dtype == "int8":
            expected["scales"] = ([entry.rows], "F32")
        try:
            with safe_open(path, framework="pt") as file:
                for name, (shape, dtype) in expected.items():
                    header = file.get_slice(name)
                    if (header.get_shape(), header.get_dtype()) != (shape, dtype):
                        raise ValueError(
                            f"{path} holds {name} {header.get_shape()} {header.get_dtype()}, the manifest says {shape} "
                            f"{dtype}; delete it and {AGAIN}"
                        )
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it and {AGAIN}") from None
