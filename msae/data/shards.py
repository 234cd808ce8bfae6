"""The shard directory: what a harvest writes and everything after it reads.

    <name>-<hook>-<identity hash>/
        manifest.json             identity, statistics, and rows, bytes and checksum of every shard; written last
        train-00000.safetensors   activations [rows, d_in], and for text: sequence [rows], position [rows], tokens
        val-00000.safetensors     the same, from other documents
        chunk-00000.json          what the harvest needs to go on after this chunk
        truth.safetensors         synthetic sources only: the true features

A file gets its name once it is whole and synced, so a name that exists can be trusted. Names follow from split and
number: no path is ever read from a manifest.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT, VERSION = "msae-shards", 1
MANIFEST, TRUTH = "manifest.json", "truth.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomically write JSON."""
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))


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


class Shards:
    """An open shard directory: its manifest, checked cheaply, and its tensors as zero-copy memory maps.

    Opening checks size, dtype, shape and the checksum of both ends of every file (`verify` checks them whole).
    Raises ValueError in one line that names the file, what was found and expected, and what to type next.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.identity: dict[str, Any] = self.manifest["identity"]
        self.d_in: int = self.manifest["d_in"]
        self.entries: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        for entry in self.manifest["shards"]:
            self.entries[entry["split"]].append(entry)
        self._open: dict[tuple[str, int], Any] = {}
        expected = {shard_name(e["split"], e["number"]) for e in self.manifest["shards"]}
        found = {p.name for p in self.directory.glob("*.safetensors")} - {TRUTH}
        if found - expected:
            extra = self.directory / min(found - expected)
            raise ValueError(f"{extra} is not in the manifest; move it away or delete it")
        for entry in self.manifest["shards"]:
            self._check(entry)
        if self.manifest["truth"] is not None:
            self._check_size(self.directory / TRUTH, self.manifest["truth"])
            self._check_ends(self.directory / TRUTH, self.manifest["truth"])

    def rows(self, split: str) -> list[int]:
        """Rows of each shard of a split."""
        return [entry["rows"] for entry in self.entries[split]]

    def activations(self, split: str, shard: int) -> Tensor:
        """Memory-mapped activations [rows, d_in] of the split's shard-th shard, in the storage dtype."""
        return self._tensors(split, shard)["activations"]

    def index(self, split: str, shard: int) -> dict[str, Tensor]:
        """What stands beside the activations: for text `sequence`, `position` [rows] and `tokens` [n_seq, context]."""
        return {name: t for name, t in self._tensors(split, shard).items() if name != "activations"}

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

    def _tensors(self, split: str, shard: int) -> dict[str, Tensor]:
        key = (split, shard)
        if key not in self._open:
            path = self.directory / shard_name(split, self.entries[split][shard]["number"])
            self._open[key] = load_file(path)
        return self._open[key]

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
        try:
            with safe_open(path, framework="pt") as file:
                header = file.get_slice("activations")
                shape, dtype = list(header.get_shape()), header.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it and {AGAIN}") from None
        if shape != [entry["rows"], self.d_in]:
            raise ValueError(
                f"{path} holds {shape}, the manifest says {[entry['rows'], self.d_in]}; delete it and {AGAIN}"
            )
        if str(DTYPES.get(dtype, dtype)) != f"torch.{self.manifest['dtype']}":
            raise ValueError(f"{path} holds {dtype}, the manifest says {self.manifest['dtype']}; delete it and {AGAIN}")
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
    for key in ("identity", "identity_hash", "provenance", "dtype", "hook_name", "truth"):
        manifest[key]
    statistics = manifest["statistics"]
    assert len(statistics["mean"]) == manifest["d_in"], "statistics.mean"
    assert statistics["mean_square"] >= 0, "statistics.mean_square"
