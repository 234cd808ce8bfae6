"""The same objective by sparse work, and the one choice of the kernels that do it.

`plain` is PyTorch's own operators, the reference of the others; `compiled` is C++ for this CPU, `triton` is for GPUs.
"""

import functools
from typing import Literal

import torch

from msae.sae.fast import compiled, measured, triton
from msae.sae.fast.compiled import Compiled
from msae.sae.fast.measured import Choice
from msae.sae.fast.plain import Plain
from msae.sae.fast.triton import Triton
from msae.sae.model import MatryoshkaSAE

Kernels = Literal["auto", "dense", "plain", "compiled", "triton"]
PLAIN = Plain()
KERNELS: dict[str, Plain] = {"dense": PLAIN, "plain": PLAIN, "compiled": Compiled(), "triton": Triton()}
SMALLEST = 1 << 14  # weights of the encoder below which dense steps are as fast
WORTH_COMPILING = 1 << 18


def choose_kernels(sae: MatryoshkaSAE, kernels: str | None = None) -> str:
    """Which kernels compute this SAE on its device, a function of its size, device and type: `sae.kernels` by default.

    `auto` is `compiled` on a CPU (`plain` without a compiler), on a GPU what was faster there (`measured`), and `dense`
    for a small SAE, another device or type. Raises ValueError where `triton` cannot run.
    """
    kernels, device = kernels or sae.kernels, sae.W_enc.device
    if kernels == "triton":
        triton.require(device)
    return automatic(sae).kernels if kernels == "auto" else kernels


def automatic(sae: MatryoshkaSAE) -> Choice:
    """What `auto` is for this SAE, and on a GPU why."""
    weight = sae.W_enc
    if weight.dtype != torch.float32 or weight.numel() < SMALLEST or weight.device.type not in ("cpu", "cuda"):
        return Choice("dense", "")
    if weight.device.type == "cuda":
        return on_gpu(weight.device, *weight.shape)
    is_large = weight.numel() >= WORTH_COMPILING and compiled.library() is not None
    return Choice("compiled" if is_large else "plain", "")


@functools.lru_cache
def on_gpu(device: torch.device, d_in: int, d_sae: int) -> Choice:
    """What `auto` is on this GPU, and why; asked for at every step."""
    try:
        triton.require(device)
    except ValueError as error:
        return Choice("dense", str(error))
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return measured.choose(torch.cuda.get_device_name(device), capability, d_in, d_sae)
