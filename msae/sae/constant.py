"""Numbers of the host that a device computes with."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def constant(numbers: Sequence[float], like: Tensor) -> Tensor:
    """A few numbers of the host in the type and on the device of a tensor; sent there once, if they recur."""
    return _constant(tuple(numbers), like.dtype, like.device)


@functools.lru_cache(64)
def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # training may meet what validation has made
        return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
