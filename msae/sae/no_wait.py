"""What would make the host wait for a device, done without."""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def constant(numbers: Sequence[float], like: Tensor) -> Tensor:
    """A few numbers of the host in the type and on the device of a tensor; sent there once, if they recur."""
    return _constant(tuple(numbers), like.dtype, like.device)


@functools.lru_cache(64)
def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # training may meet what validation has made
        return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def true_places(flags: Bool[Tensor, " n"], number: int | None) -> Int[Tensor, " number"]:
    """Where flags are true, ascending; the host need not wait to learn it if it knows the `number` of them."""
    if number is None:
        return flags.nonzero().squeeze(1)
    return flags.to(torch.uint8).argsort(descending=True, stable=True)[:number]
