"""The same objective by sparse work, and the one choice of the kernels that do it.

`plain` is PyTorch's own operators, the reference of the others; `compiled` is C++ for this CPU, `triton` is for GPUs.
"""

from typing import Literal

import torch

from msae.sae.fast import compiled, triton
from msae.sae.fast.compiled import Compiled
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

    `auto` is `compiled` on a CPU (`plain` without a compiler), `dense` for a small SAE, another device or type.
    `triton` is used only on request: compiled for GPUs and tested in Triton's interpreter, it has yet to run on one.
    Raises ValueError where `triton` cannot run.
    """
    kernels, weight = kernels or sae.kernels, sae.W_enc
    if kernels == "triton":
        triton.require(weight.device)
    if kernels != "auto":
        return kernels
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < SMALLEST:
        return "dense"
    return "compiled" if weight.numel() >= WORTH_COMPILING and compiled.library() is not None else "plain"
