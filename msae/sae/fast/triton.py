"""The kernels of the sparse step and the optimizer in Triton, for GPUs.

What they cannot do (another device or type) is left to `Plain`, with the same result. Nothing here waits for the device
but `survivors`, and every sum is added up in an order that its entries decide: no atomics. With TRITON_INTERPRET=1, set
before the first use, the same functions run on a CPU, slowly.
"""

import functools
import importlib
import math
from collections.abc import Container
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msae.sae.fast.plain import Decoding, Moments, Plain, Rates

TILES: dict[torch.dtype, dict[str, int]] = {  # of the encoder, whose sums take 64 registers a thread
    torch.float32: {"ROWS": 128, "LATENTS": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 3},
    torch.bfloat16: {"ROWS": 128, "LATENTS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
}
COLUMNS, AT_ONCE = 256, 8  # columns of a program that gathers rows, and how many rows it loads at once
CHUNK = 1024  # what a program of the optimizer takes of a parameter that has no rows to keep whole
WIDEST = 1 << 13  # row that a program of the optimizer can hold
INSTEAD = "use model.kernels=auto"


@functools.cache
def library() -> Any:
    """The Triton functions, imported on first use, so that nobody else needs triton; None where it is not installed."""
    try:
        return importlib.import_module("msae.sae.fast.triton_kernels")
    except ImportError:
        return None


def require(device: torch.device) -> None:
    """Raises ValueError where triton is not installed, or cannot run on this device."""
    if library() is None:
        raise ValueError(f"model.kernels=triton needs the package triton; pip install triton, or {INSTEAD}")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"model.kernels=triton expects compute capability 8.0 or more, {name} has less; {INSTEAD}")
    if device.type != "cuda" and not library().INTERPRETED:
        raise ValueError(f"model.kernels=triton expects the SAE on a CUDA device, it is on {device.type}; {INSTEAD}")


def able(*tensors: Tensor, types: Container[torch.dtype] = (torch.float32,)) -> bool:
    """Whether the Triton functions are there, and take these."""
    fits = all(t.dtype in types and t.is_contiguous() for t in tensors)
    return fits and library() is not None and (tensors[0].is_cuda or library().INTERPRETED)


def gathering(d: int) -> tuple[int, dict[str, int]]:
    """How many programs gather a row of d columns, and the constants of each."""
    columns = min(COLUMNS, 1 << (d - 1).bit_length())
    return -(-d // columns), {"COLUMNS": columns, "AT_ONCE": AT_ONCE}


def launching(tensor: Tensor, whole: bool) -> tuple[tuple[int], int, dict[str, int]]:
    """(grid, d, constants) of the optimizer's programs: one for each whole row, or for each d = CHUNK numbers."""
    d = tensor.shape[1] if whole else CHUNK
    columns = 1 << (d - 1).bit_length()
    return (-(-tensor.numel() // d),), d, {"COLUMNS": columns, "num_warps": max(1, min(16, columns // 256))}


def filtered(
    h: Tensor, W: Tensor, b: Tensor, bar: Tensor, capacity: int
) -> tuple[Int[Tensor, " capacity"], Float[Tensor, " capacity"], Int[Tensor, ""]]:
    """As `survivors`, in an order of chance, then zeros; how many there are, which may be more than `capacity`.

    h and W may be bfloat16: products are added up in float32 all the same.
    """
    (batch, d), d_sae = h.shape, len(W)
    if library().INTERPRETED:  # which takes the bits of bfloat16 for whole numbers
        h, W = h.float(), W.float()
    flat, u = h.new_zeros(capacity, dtype=torch.int64), h.new_zeros(capacity, dtype=torch.float32)
    count, tile = h.new_zeros((), dtype=torch.int64), TILES[h.dtype]
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    grid = (-(-batch // tile["ROWS"]) * -(-d_sae // tile["LATENTS"]),)
    arguments = (h, W, b, bar, flat, u, count, batch, d_sae, d, capacity)
    library().survivors[grid](*arguments, PRECISION=precision, **tile)
    return flat, u, count


class Triton(Plain):
    """`Plain` in Triton; the host waits for the device once in a step, in `Screen.largest`."""

    def factors(self, h: Tensor, W: Tensor, in_bfloat16: bool) -> tuple[Tensor, Tensor]:
        return (h.bfloat16(), W.bfloat16()) if in_bfloat16 and able(h, W) else (h, W)

    def survivors(self, h: Tensor, W: Tensor, b: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
        """Once more where there are more than expected."""
        bar = bar.contiguous()
        if not (able(b, bar) and able(h, W, types=TILES)):
            return super().survivors(h, W, b, bar)
        capacity = max(1, len(h) * len(W) // 64)
        while True:
            flat, u, count = filtered(h, W, b, bar, capacity)
            if (n := int(count)) <= capacity:
                return flat[:n], u[:n]
            capacity = n

    def largest(
        self, h: Tensor, W: Tensor, b: Tensor, bar: Tensor, norm: Tensor | None, count: int, capacity: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Without asking the device how many there are: not enough if more than `capacity`, too. NaN is the largest.

        The order of chance is undone before anything depends on it: by the first sort the second, a stable one, meets
        equal values in ascending order, so of these the first are taken.
        """
        if not (able(b) and able(h, W, types=TILES)):
            return super().largest(h, W, b, bar, norm, count, capacity)
        flat, u, n = filtered(h, W, b, bar.expand_as(b).contiguous() if norm is None else bar / norm, capacity)
        flat, u = self.ascending(flat, u)
        ranked = u if norm is None else u * norm[flat % len(W)]
        kept = ranked.argsort(descending=True, stable=True)[:count]
        return flat[kept], u[kept], (n >= count) & (n <= capacity)

    def ascending(self, flat: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted in any case: to see whether they are, the host would have to wait."""
        flat, order = flat.sort()
        return flat, u[order]

    def by_latent(self, latents: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
        ascending, order = latents.sort(stable=True)
        return order, self.bin_ends(ascending, d_sae)

    def bin_ends(self, bins: Tensor, count: int) -> Tensor:
        """Without asking the device how many bins there are."""
        return torch.searchsorted(bins, torch.arange(count + 1, device=bins.device))

    def residuals(self, code: Decoding, target: Tensor) -> tuple[Tensor, Tensor]:
        if not able(code.acts, code.W_dec, target):
            return super().residuals(code, target)
        (batch, d), (blocks, constants) = target.shape, gathering(target.shape[1])
        levels = (len(code.ends) - 1) // batch
        residuals, squares = target.new_empty(batch, levels, d), target.new_empty(blocks, batch, levels)
        arguments = (code.acts, code.latents, code.ends, code.W_dec, target, residuals, squares, levels, d)
        library().residuals[batch, blocks](*arguments, **constants)
        return residuals, squares.double().sum(0).mean(0)

    def decoder_backward(
        self, code: Decoding, residuals: Tensor, weights: list[float], stop_gradient: bool, others: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if others or not able(residuals, code.W_dec):
            return super().decoder_backward(code, residuals, weights, stop_gradient, others)
        (batch, levels, d), n = residuals.shape, len(code.latents)
        blocks, constants = gathering(d)
        dots = residuals.new_empty(blocks, n)
        scales = torch.tensor(weights, dtype=residuals.dtype).to(residuals.device, non_blocking=True)
        arguments = (residuals, scales, code.latents, code.ends, code.W_dec, dots, n, levels, d)
        library().decoder_backward[batch, blocks](*arguments, STOP_GRADIENT=stop_gradient, **constants)
        return residuals, dots.sum(0)

    def sum_rows(self, table: Tensor, index: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Always in the same order."""
        if not able(table, weights):
            return super().sum_rows(table, index, weights, ends)
        bins, d = len(ends) - 1, table.shape[1]
        blocks, constants = gathering(d)
        out = table.new_empty(bins, d)
        library().sum_rows[bins, blocks](table, index, weights, ends, out, d, **constants)
        return out

    def can_step(self, *tensors: Tensor) -> bool:
        """Whether a program can hold their rows, too."""
        return able(*tensors) and all(t.shape[1] <= WIDEST for t in tensors if len(t) > 1)

    def project(self, grad: Tensor, W: Tensor | None) -> Tensor:
        grid, d, constants = launching(grad, W is not None)
        squares = grad.new_empty(grid)
        arguments = (grad, grad if W is None else W, squares, grad.numel(), d)
        library().project[grid](*arguments, ALONG=W is not None, **constants)
        return squares.double()

    def adam(self, W: Tensor, grad: Tensor, moments: Moments, scale: Tensor, rates: Rates, unit_norm: bool) -> None:
        (lr, beta1, beta2, eps), (grid, d, constants) = rates, launching(W, unit_norm)
        logs = (math.log2(beta) if beta else -math.inf for beta in (beta1, beta2))
        numbers = (W.numel(), d, lr, eps, *logs, 1 - beta1, beta2, 1 - beta2)
        library().adam[grid](
            W, grad, moments.mean, moments.square_mean, scale, moments.step, *numbers, UNIT_NORM=unit_norm, **constants
        )
