"""The machine below a benchmark: its processor, and the memory that this process has of it (Linux)."""

import ctypes
from pathlib import Path

GIB = 2**30


def cpu_model() -> str:
    """The name that the kernel gives the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def resident(kind: str) -> int:
    """Bytes of resident memory: VmRSS all of it, VmHWM its highest, RssAnon without mapped files, RssFile these."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024


def release_freed_memory() -> None:
    """Hand freed memory back, so that a process that waits holds little, and start measuring the highest anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
