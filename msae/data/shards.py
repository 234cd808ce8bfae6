"""The shard directory: what a harvest writes and everything after it reads.

    <name>-<hook>-<identity hash>/
        manifest.json             identity, statistics, and rows, bytes and checksum of every shard; written last
        train-00000.safetensors   activations [rows, d_in], and for text: sequence [rows], position [rows], tokens;
                                  activations in int8 have scales [rows] beside them
        val-00000.safetensors     the same, from other documents
        chunk-00000.json          what the harvest needs to go on after this chunk
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
from functools import cached_property
from io import FileIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from msae.data.rolling import Rolling

FORMAT, VERSION = "msae-shards", 2  # shards without int8 rows say 1: an older msae reads them
MANIFEST, TRUTH = "manifest.json", "truth.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}
ROWS = ("activations", "scales")  # the tensors of a shard that are read row by row; the others are its index
Array = np.ndarray[Any, Any]
Stored = dict[str, Array]  # activations [n, d_in] as in the file (bfloat16 as int16) and, beside int8, scales [n]
AGAIN = "run the same python -m msae.harvest command to make it again"


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:05d}.safetensors"


def identity_hash(identity: dict[str, Any]) -> str:
    """Twelve hex digits of the SHA-256 of the identity's canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name, sync, rename. Raises ValueError in one line when the disk is full or read-only."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write {path}: {error}; free space or choose another data.root, then run the same command to go on"
        ) from error


def write_json(path: Path, content: dict[str, Any], indent: int | None = 1) -> None:
    """Atomically write JSON."""
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=indent) + "\n"))


def write_shard(directory: Path, split: str, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write one shard and return its manifest entry: split, number, rows, bytes, xxh3."""
    path = directory / shard_name(split, number)
    write_atomically(path, lambda p: save_file({k: t.contiguous() for k, t in tensors.items()}, p))
    entry = {"split": split, "number": number, "rows": len(tensors["activations"])}
    return entry | size_and_checksum(path)


def size_and_checksum(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: bytes, xxh3."""
    return {"bytes": path.stat().st_size, "xxh3": checksum(path), "xxh3_ends": checksum_of_ends(path)}


def checksum_of_ends(path: Path, size: int = 1 << 16) -> str:
    """xxh3-64 of a file's first and last 64 KiB: cheap enough for every opening."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        digest.update(file.read(size))
        file.seek(max(0, path.stat().st_size - size))
        digest.update(file.read(size))
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """xxh3-64 of a file."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(q [rows, d_in] int8, scales [rows] float32): scale = max|x| / 127 of its row, q = round(x / scale).

    |x − q · scale| ≤ scale / 2, up to the 2⁻¹⁶ of scale that float32 rounds. Works on any device. A row with NaN or Inf
    gets a scale that is not finite: a harvest refuses to write it.
    """
    rows = rows.float()
    scales = (rows.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros is zeros
    return (rows / scales[:, None]).round().to(torch.int8), scales


def dequantise(q: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """q · scale [rows, d_in] float32, into `out` if given, of tensors on the CPU."""
    out = torch.empty(q.shape) if out is None else out
    values = out.numpy()  # as in `take`, without torch's threads; a product of mixed types would be slower
    values[...] = q.numpy()
    values *= scales.numpy()[:, None]
    return out


def take(stored: Stored, index: Tensor, out: Tensor) -> None:
    """Copy rows `index` [n] int64 of stored ones into `out` [n, d_in], dequantised, in the calling thread alone.

    Torch would start a team of threads of its own in every thread that does this.
    """
    rows = stored["activations"]
    if "scales" not in stored:
        rows.take(index.numpy(), axis=0, out=as_array(out), mode="clip")  # mode "raise" would copy once more
        return
    for some, block in zip(index.split(256), out.split(256), strict=True):  # they stay in a core's cache
        part = torch.from_numpy(rows.take(some.numpy(), axis=0, mode="clip"))
        dequantise(part, torch.from_numpy(stored["scales"].take(some.numpy())), block)


def as_array(tensor: Tensor) -> Array:
    """The same memory for NumPy, which has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Shards:
    """An open shard directory: its manifest, checked cheaply, and its rows.

    Opening checks size, dtype, shape and the checksum of both ends of every file (`verify` checks them whole).
    Raises ValueError in one line that names the file, what was found and expected, and what to type next.
    """

    def __init__(self, directory: str | Path, rolling: "Rolling | None" = None) -> None:
        self.directory, self.rolling = Path(directory), rolling
        self.manifest = read_manifest(self.directory)
        if rolling is None and "window" in self.manifest:
            raise ValueError(
                f"{self.directory} is a rolling harvest, of which only some windows are on disk; "
                "train on it with the same data.rolling_gb, or harvest the whole with data.rolling_gb=null"
            )
        self.identity: dict[str, Any] = self.manifest["identity"]
        self.d_in: int = self.manifest["d_in"]
        self.entries: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        for entry in self.manifest["shards"]:
            self.entries[entry["split"]].append(entry)
        self.first = {s: np.cumsum([0, *self.rows(s)]) for s in self.entries}  # number of each shard's first row
        self._open: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._begins: dict[tuple[str, int], dict[str, int]] = {}
        self._free: list[Array] = []
        expected = {shard_name(e["split"], e["number"]) for e in self.manifest["shards"]}
        found = {p.name for p in self.directory.glob("*.safetensors" if rolling is None else "val-*")} - {TRUTH}
        if found - expected:
            extra = self.directory / min(found - expected)
            raise ValueError(f"{extra} is not in the manifest; move it away or delete it")
        for entry in self.manifest["shards"]:
            self._check(entry)
        if self.manifest["truth"] is not None:
            self._check_size(self.directory / TRUTH, self.manifest["truth"])
            self._check_ends(self.directory / TRUTH, self.manifest["truth"])

    def rows(self, split: str) -> list[int]:
        """Rows of each shard of a split; while a rolling harvest is in its first pass, of the windows made so far."""
        return [entry["rows"] for entry in self.entries[split]]

    def append(self, split: str, entries: list[dict[str, Any]]) -> None:
        """Take in shards that a rolling harvest has made since the opening."""
        self.entries[split] += entries
        self.first[split] = np.cumsum([0, *self.rows(split)])

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type of the activations in the files."""
        found: torch.dtype = getattr(torch, self.manifest["dtype"])
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The type of rows as they are given out: that of the files, float32 where it is int8."""
        return torch.float32 if self.stored_dtype == torch.int8 else self.stored_dtype

    def activations(self, split: str, shard: int) -> Tensor:
        """All activations [rows, d_in] of the split's shard-th shard: a zero-copy memory map, or dequantised int8."""
        tensors = self._tensors(split, shard)
        rows = tensors["activations"]
        return dequantise(rows, tensors["scales"]) if rows.dtype == torch.int8 else rows

    def read(self, split: str, starts: Tensor, stops: Tensor) -> Stored:
        """Blocks of rows start … stop, one after the other, as they are stored; `take` makes them `dtype`.

        Rows are numbered through all shards of the split; a block lies in one shard. Files are read, not mapped: what
        is mapped counts as this process's memory until all of the data is. All blocks are asked for before one is
        waited for. Raises ValueError where a file has become shorter.
        """
        rows, dtype = int((stops - starts).sum()), as_array(torch.empty(0, dtype=self.stored_dtype)).dtype
        found: Stored = {"activations": self._memory((rows, self.d_in), dtype)}
        if self.stored_dtype == torch.int8:
            found["scales"] = np.empty(rows, np.float32)
        into = {name: memoryview(array.reshape(-1).view(np.uint8).data) for name, array in found.items()}
        if hasattr(os, "posix_fadvise"):
            for file, _, begin, size, _ in self._pieces(split, starts, stops, found):
                os.posix_fadvise(file.fileno(), begin, size, os.POSIX_FADV_WILLNEED)
        for file, name, begin, size, place in self._pieces(split, starts, stops, found):
            file.seek(begin)
            if file.readinto(into[name][place : place + size]) != size:
                raise ValueError(f"{file.name} has become shorter; {AGAIN}")
        return found

    def _memory(self, shape: tuple[int, int], dtype: Any) -> Array:
        """Memory that is used again once this array is gone: new pages take the kernel longer than to fill them."""
        size = math.prod(shape) * dtype.itemsize
        whole = self._free.pop() if self._free else np.empty(size, np.uint8)
        whole = whole if len(whole) >= size else np.empty(size, np.uint8)
        array = whole[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._free.append, whole).atexit = False  # so hold this array, not a view of it
        return array

    def _pieces(
        self, split: str, starts: Tensor, stops: Tensor, found: Stored
    ) -> Iterator[tuple[FileIO, str, int, int, int]]:
        """Of every block and tensor the open file, the tensor's name, first byte, bytes, and their place in `found`."""
        shards = np.searchsorted(self.first[split], starts.numpy(), side="right") - 1
        places = (stops - starts).cumsum(0) - (stops - starts)
        blocks = zip(shards.tolist(), starts.tolist(), stops.tolist(), places.tolist(), strict=True)
        for shard, of_shard in groupby(blocks, key=itemgetter(0)):
            begins, first = self._header(split, shard), int(self.first[split][shard])
            with open(self._path(split, shard), "rb", buffering=0) as file:  # open now only: there may be thousands
                for _, start, stop, place in of_shard:
                    for name, array in found.items():
                        size = array.strides[0]
                        yield file, name, begins[name] + (start - first) * size, (stop - start) * size, place * size

    def index(self, split: str, shard: int) -> dict[str, Tensor]:
        """What stands beside the activations: for text `sequence`, `position` [rows] and `tokens` [n_seq, context]."""
        return {name: tensor for name, tensor in self._tensors(split, shard).items() if name not in ROWS}

    @cached_property
    def mean(self) -> Tensor:
        """E x [d_in] over the training rows, float64."""
        return torch.tensor(self.manifest["statistics"]["mean"], dtype=torch.float64)

    @cached_property
    def mean_square(self) -> float:
        """E‖x‖² over the training rows."""
        return float(self.manifest["statistics"]["mean_square"])

    @cached_property
    def truth(self) -> dict[str, Tensor] | None:
        """The true features of a synthetic source, or None."""
        return None if self.manifest["truth"] is None else load_file(self.directory / TRUTH)

    def verify(self, on_bytes: Callable[[int], object] = lambda n: None) -> None:
        """Compare every file's checksum with the manifest. Raises ValueError that names the first one that differs."""
        files = [(shard_name(entry["split"], entry["number"]), entry) for entry in self.manifest["shards"]]
        if self.manifest["truth"] is not None:
            files.append((TRUTH, self.manifest["truth"]))
        for name, entry in files:
            path = self.directory / name
            found = checksum(path)
            if found != entry["xxh3"]:
                raise ValueError(
                    f"{path} has checksum {found}, the manifest says {entry['xxh3']}; delete it and {AGAIN}"
                )
            on_bytes(entry["bytes"])

    def _path(self, split: str, shard: int) -> Path:
        return self.directory / shard_name(split, self.entries[split][shard]["number"])

    def _tensors(self, split: str, shard: int) -> dict[str, Tensor]:
        key = (split, shard)
        if key not in self._open:
            self._open[key] = load_file(self._path(split, shard))
        return self._open[key]

    def _header(self, split: str, shard: int) -> dict[str, int]:
        """The byte at which each tensor begins in its file."""
        key = (split, shard)
        if key not in self._begins:
            with open(self._path(split, shard), "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            self._begins[key] = {name: 8 + size + header[name]["data_offsets"][0] for name in ROWS if name in header}
        return self._begins[key]

    def _check_size(self, path: Path, entry: dict[str, Any]) -> None:
        if not path.exists():
            raise ValueError(f"{path} is missing; {AGAIN}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{path} has {size} bytes, the manifest says {entry['bytes']}; {AGAIN}")

    def _check_ends(self, path: Path, entry: dict[str, Any]) -> None:
        if checksum_of_ends(path) != entry["xxh3_ends"]:
            raise ValueError(f"{path} differs from what was harvested (checksum of its ends); delete it and {AGAIN}")

    def _check(self, entry: dict[str, Any]) -> None:
        path = self.directory / shard_name(entry["split"], entry["number"])
        self._check_size(path, entry)
        quantised = self.manifest["dtype"] == "int8"
        try:
            with safe_open(path, framework="pt") as file:
                header = file.get_slice("activations")
                shape, dtype = list(header.get_shape()), header.get_dtype()
                if quantised:
                    header = file.get_slice("scales")
                    scales = (list(header.get_shape()), header.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it and {AGAIN}") from None
        if shape != [entry["rows"], self.d_in]:
            raise ValueError(
                f"{path} holds {shape}, the manifest says {[entry['rows'], self.d_in]}; delete it and {AGAIN}"
            )
        if str(DTYPES.get(dtype, dtype)) != f"torch.{self.manifest['dtype']}":
            raise ValueError(f"{path} holds {dtype}, the manifest says {self.manifest['dtype']}; delete it and {AGAIN}")
        if quantised and scales != ([entry["rows"]], "F32"):
            raise ValueError(f"{path} has scales {scales}, expected {[entry['rows']]} F32; delete it and {AGAIN}")
        self._check_ends(path, entry)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest as JSON. Raises ValueError in one line if there is none, or it is corrupt or of a newer version."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{directory} has no {MANIFEST}, so its harvest has not finished; {AGAIN}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is corrupt ({error}); delete it and {AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not a shard manifest; delete it and {AGAIN}")
    try:
        if manifest["version"] > VERSION:
            raise ValueError(
                f"{path} has format version {manifest['version']}, this msae reads up to {VERSION}; "
                "upgrade: pip install -U msae"
            )
        check_manifest(manifest)
    except (KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is corrupt (wrong or missing: {error}); delete it and {AGAIN}") from None
    return manifest


def check_manifest(manifest: dict[str, Any]) -> None:
    """Everything the reader relies on. Raises KeyError, TypeError or AssertionError that name what is wrong."""
    seen = set()
    for entry in manifest["shards"]:
        numbers = [entry[key] for key in ("number", "rows", "bytes")]
        assert entry["split"] in ("train", "val"), entry
        assert all(type(n) is int and n >= 0 for n in numbers), entry
        assert all(isinstance(entry[key], str) for key in ("xxh3", "xxh3_ends")), entry
        assert (entry["split"], entry["number"]) not in seen, f"{entry} twice"
        seen.add((entry["split"], entry["number"]))
    window = manifest.get("window", 1)
    assert type(window) is int, "window"
    assert window > 0, "window"
    for key in ("identity", "identity_hash", "provenance", "dtype", "hook_name", "truth"):
        manifest[key]
    statistics = manifest["statistics"]
    assert len(statistics["mean"]) == manifest["d_in"], "statistics.mean"
    assert statistics["mean_square"] >= 0, "statistics.mean_square"
