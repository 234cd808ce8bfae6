"""Memory that the C library would hand back to the kernel at every step, only to ask for it again."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks: a step allocates gigabytes, and mapping them afresh costs a third of its time.

    Measured by benchmarks/step.py. Does nothing where there is no glibc; PyTorch's CUDA memory is not concerned.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
