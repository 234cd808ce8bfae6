"""Whole files: written under a temporary name, synced, renamed; their checksums; the lock of a directory."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from msae.progress import say
from msae.settings import decode

LOCK = ".lock"
ADVICE = "free space or choose another directory"
T = TypeVar("T")


def write(path: Path, fill: Callable[[Path], object], advice: str = ADVICE) -> None:
    """Let `fill` write a temporary file, sync it, and rename it to `path`: any former file stays until then.

    Raises ValueError in one line that ends with `advice` where the disk is full or read-only.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        fill(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)  # or a power cut may undo the renaming
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {error}; {advice}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any, indent: int | None = 1, advice: str = ADVICE) -> None:
    """Write JSON as a whole file."""
    write(path, lambda temporary: temporary.write_text(json.dumps(content, indent=indent) + "\n"), advice)


def read_json(path: Path, cls: type[T], what: str, advice: str, version: int | None = None) -> T:
    """Read a file's JSON object as the dataclass `cls`.

    what: what the file should be, such as `a shard manifest`. version: the newest format version that is understood.
    Raises ValueError in one line that ends with `advice`.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, Mapping):
            raise ValueError(f"it is a {type(content).__name__}, expected an object")
        if version is not None and isinstance(newer := content.get("version"), int) and newer > version:
            advice = "upgrade: pip install -U msae"
            raise ValueError(f"it has format version {newer}, this msae reads up to {version}")
        return decode(cls, content)
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; {advice}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not {what} ({error}); {advice}") from None


def checksum(path: Path) -> str:
    """xxh3-64 of a file."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def checksum_of_ends(path: Path, size: int = 1 << 16) -> str:
    """xxh3-64 of a file's first and last `size` bytes: cheap enough for every opening."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        digest.update(file.read(size))
        file.seek(max(0, path.stat().st_size - size))
        digest.update(file.read(size))
    return digest.hexdigest()


def lock(directory: Path, busy: str, wait: bool = False, advice: str = "choose another directory") -> FileLock:
    """Acquire a directory's lock, which the operating system frees when a process dies.

    While another process holds it, print the line `busy` and wait; without `wait`, raise it as a ValueError. Raises
    ValueError in one line that ends with `advice` where the directory cannot be written to.
    """
    file_lock = FileLock(directory / LOCK)
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise ValueError(busy) from None
        say(busy)
        file_lock.acquire()
    except OSError as error:
        raise ValueError(f"cannot write to {directory} ({error}); {advice}") from None
    return file_lock
