"""The kernels of the sparse step and the optimizer in Triton, for GPUs.

What they cannot do (another device or type) is left to `Plain`, with the same result. Nothing here waits for the device
but `survivors`, and every sum is added up in an order that its entries decide: no atomics. With TRITON_INTERPRET=1, set
before the first use, the same functions run on a CPU, slowly.
"""

import functools
import importlib
import math
from collections.abc import Container
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from msae.sae.fast.plain import Decoded, Decoding, Moments, Plain, Rates, Weights

TILES: dict[torch.dtype, dict[str, int]] = {  # of the encoder, whose sums take 64 registers a thread
    torch.float32: {"ROWS": 128, "LATENTS": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 3},
    torch.bfloat16: {"ROWS": 128, "LATENTS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
}
COLUMNS, AT_ONCE = 256, 8  # columns of a program that gathers rows, and how many rows it loads at once
PRODUCT, STRETCH = 1 << 26, 4096  # sums held of a product, and how many of a row a program filters
PLACES = 1 << 32  # entries of a batch that can be told apart beside 32 bits of a value
HAS_OUT_DTYPE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # of torch.mm, on CUDA
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
    if device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device():
        raise ValueError(f"model.kernels=triton expects the current CUDA device, not {device}; set that first")
    if device.type != "cuda" and not library().INTERPRETED:
        raise ValueError(f"model.kernels=triton expects the SAE on a CUDA device, it is on {device.type}; {INSTEAD}")


def able(*tensors: Tensor, types: Container[torch.dtype] = (torch.float32,)) -> bool:
    """Whether the Triton functions are there, and take these."""
    fits = all(t.dtype in types and t.is_contiguous() for t in tensors)
    return fits and library() is not None and (tensors[0].is_cuda or library().INTERPRETED)


def gathering(d: int) -> tuple[int, dict[str, int]]:
    """How many programs gather a row of d columns, and the constants of each."""
    columns = min(COLUMNS, 1 << (d - 1).bit_length())
    return -(-d // columns), {"COLUMNS": columns, "AT_ONCE": max(AT_ONCE, 256 // columns)}


def launching(tensor: Tensor, whole: bool) -> tuple[tuple[int], int, dict[str, int]]:
    """(grid, d, constants) of the optimizer's programs: one for each whole row, or for each d = CHUNK numbers."""
    d = tensor.shape[1] if whole else CHUNK
    columns = 1 << (d - 1).bit_length()
    return (-(-tensor.numel() // d),), d, {"COLUMNS": columns, "num_warps": max(1, min(16, columns // 256))}


def multiplied(h: Tensor, W: Tensor) -> Float[Tensor, "rows d_sae"]:
    """h Wᵀ in float32, of factors that may be bfloat16."""
    if h.dtype == torch.float32:
        return h @ W.T
    if h.is_cuda and HAS_OUT_DTYPE:
        return torch.mm(h, W.T, out_dtype=torch.float32)
    return h.float() @ W.float().T


def rounds_to_tf32() -> bool:
    """Whether PyTorch was told that products of float32 on a GPU may be rounded to TF32."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # newer, and not to be mixed with the older
    return setting == "tf32" if setting is not None else torch.get_float32_matmul_precision() != "highest"


def filtered(
    h: Tensor,
    W: Tensor,
    b: Tensor,
    bar: Tensor,
    capacity: int,
    product: bool = False,
    registers: int | None = None,
) -> tuple[Int[Tensor, " capacity"], Float[Tensor, " capacity"], Int[Tensor, ""]]:
    """As `exceeding`, in an order of chance, then zeros; how many there are, which may be more than `capacity`.

    h and W may be bfloat16: products are added up in float32 all the same. One kernel multiplies and filters, with so
    many registers a thread at most; with `product`, and of float32 that is not rounded, PyTorch multiplies, so many
    rows at a time that PRODUCT sums are held, and a kernel filters these.
    """
    (batch, d), d_sae = h.shape, len(W)
    if library().INTERPRETED:  # which takes the bits of bfloat16 for whole numbers
        h, W = h.float(), W.float()
    flat, u = h.new_zeros(capacity, dtype=torch.int64), h.new_zeros(capacity, dtype=torch.float32)
    out = flat, u, h.new_zeros((), dtype=torch.int64)
    precision = "tf32" if rounds_to_tf32() else "ieee"
    if product or (h.dtype == torch.float32 and precision == "ieee" and not library().INTERPRETED):
        rows = max(1, PRODUCT // d_sae)
        for row in range(0, batch, rows):
            sums = multiplied(h[row : row + rows], W)
            stretches, constants = -(-d_sae // STRETCH), {"LATENTS": STRETCH, "num_warps": 8}
            library().screen[len(sums), stretches](sums, b, bar, *out, row, d_sae, capacity, **constants)
        return out
    tile = TILES[h.dtype] | ({"maxnreg": registers} if registers else {})
    grid = (-(-batch // tile["ROWS"]) * -(-d_sae // tile["LATENTS"]),)
    library().survivors[grid](h, W, b, bar, *out, batch, d_sae, capacity, D=d, PRECISION=precision, **tile)
    return out


class Half(NamedTuple):
    """A bfloat16 copy of a parameter's rows, and what tells whether the parameter was written since."""

    rows: Tensor
    written: tuple[int, int]


HALVES = WeakTensorKeyDictionary()  # parameter → Half


class Triton(Plain):
    """`Plain` in Triton; the host waits for the device once in a step, to learn whether enough was found.

    Ways of which only a GPU can tell the fastest: with `product` PyTorch multiplies by the encoder instead of
    one kernel that also filters; with `two_passes` each level's residuals are written before any gradient is taken.
    `registers` bounds those of a thread of the one kernel, so that two programs share a processor.
    """

    def __init__(self, product: bool = False, two_passes: bool = False, registers: int | None = None) -> None:
        self.product, self.two_passes, self.registers = product, two_passes, registers

    # --- the encoder --------------------------------------------------------------------------------------------------

    def factors(self, h: Tensor, W_enc: Tensor, in_bfloat16: bool) -> tuple[Tensor, Tensor]:
        """The copy of W_enc is the one that the optimizer wrote, unless anything else has written W_enc since."""
        W = W_enc.detach().T
        if not (in_bfloat16 and able(h, W)):
            return h, W
        half, written = HALVES.get(W_enc), (W_enc._version, W_enc.data_ptr())
        if half is None or half.written != written:
            half = HALVES[W_enc] = Half(W.bfloat16(), written)
        return h.bfloat16(), half.rows

    def half_of(self, parameter: Tensor) -> Tensor | None:
        half = HALVES.get(parameter)
        if half is None or half.rows.device != parameter.device:
            return None
        HALVES[parameter] = half._replace(written=(parameter._version, parameter.data_ptr()))
        return half.rows

    def survivors(
        self, h: Tensor, W: Tensor, b: Tensor, bar: Tensor, unless: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Once more where there are more than expected."""
        bar = bar.contiguous()
        if not (able(b, bar) and able(h, W, types=TILES)):
            return super().survivors(h, W, b, bar, unless)
        capacity = max(1, len(h) * len(W) // 64)
        while True:
            flat, u, count = filtered(h, W, b, bar, capacity, self.product, self.registers)
            stops = ~u.isfinite().all() if unless is None else unless | ~u.isfinite().all()
            n, is_none = torch.stack([count, stops.long()]).tolist()
            if is_none:
                return None
            if n <= capacity:
                flat, order = flat[:n].sort()
                return flat, u[order]
            capacity = n

    def largest(
        self, h: Tensor, W: Tensor, b: Tensor, bar: Tensor, norm: Tensor | None, count: int, capacity: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Without asking the device how many there are: not enough if more than `capacity`, too.

        Ranked by one number that no two entries share, the value's bits before the place's, so that the order of chance
        does not matter: of equal values the first are taken.
        """
        entries = len(h) * len(W)
        if entries > PLACES or not (able(b) and able(h, W, types=TILES)):
            return super().largest(h.to(b.dtype), W.to(b.dtype), b, bar, norm, count, capacity)
        bars = bar.expand_as(b).contiguous() if norm is None else bar / norm
        flat, u, n = filtered(h, W, b, bars, capacity, self.product, self.registers)
        ranked = u if norm is None else u * norm[flat % len(W)]
        bits = ranked.abs().view(torch.int32).long()  # of positive numbers in the order of these; NaN is the largest
        kept = ((bits << 32) | (PLACES - 1 - flat)).topk(min(count, capacity), sorted=False).indices
        places = flat[kept]
        _, order = (places.int() if entries <= 1 << 31 else places).sort()  # half as many digits
        return places[order], u[kept][order], (n >= count) & (n <= capacity)

    def multiply(self, h: Tensor, W: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return super().multiply(h, W, b, out) if h.dtype == out.dtype else multiplied(h, W).add_(b)

    # --- the decoder --------------------------------------------------------------------------------------------------

    def by_latent(self, latents: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
        ascending, order = latents.int().sort(stable=True)
        return order, self.bin_ends(ascending.long(), d_sae)

    def bin_ends(self, bins: Tensor, count: int) -> Tensor:
        """Without asking the device how many bins there are."""
        return torch.searchsorted(bins, torch.arange(count + 1, device=bins.device))

    def residuals(self, code: Decoding, target: Tensor) -> tuple[Tensor, Tensor]:
        if not able(code.acts, code.W_dec, target):
            return super().residuals(code, target)
        (batch, d), (blocks, constants) = target.shape, gathering(target.shape[1])
        levels = (len(code.ends) - 1) // batch
        residuals, squares = target.new_empty(batch, levels, d), target.new_empty(blocks, batch, levels)
        arguments = (code.acts, code.latents, code.ends, code.W_dec, target, residuals, squares, d)
        library().residuals[batch, blocks](*arguments, LEVELS=levels, **constants)
        return residuals, squares.double().sum(0).mean(0)

    def decoder_backward(
        self, code: Decoding, residuals: Tensor, weights: Weights, stop_gradient: bool, others: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if others or not able(residuals, code.W_dec):
            return super().decoder_backward(code, residuals, weights, stop_gradient, others)
        (batch, levels, d), n = residuals.shape, len(code.latents)
        blocks, constants = gathering(d)
        dots = residuals.new_empty(blocks, n)
        arguments = (residuals, weights.device, code.latents, code.ends, code.W_dec, dots, n, d)
        flags = {"LEVELS": levels, "STOP_GRADIENT": stop_gradient}
        library().decoder_backward[batch, blocks](*arguments, **flags, **constants)
        return residuals, dots.sum(0)

    def decode(
        self,
        code: Decoding,
        target: Tensor,
        weights: Weights,
        stop_gradient: bool,
        by_latent: tuple[Tensor, Tensor],
        outermost: Tensor | None,
    ) -> Decoded | None:
        """A program takes its part of the residuals back while it is in cache, with the rows of W_dec."""
        if self.two_passes or not able(code.acts, code.W_dec, target):
            return None
        (batch, d), levels, n = target.shape, len(weights.host), len(code.latents)
        blocks, constants = gathering(d)
        gradients, squares = target.new_empty(batch, levels, d), target.new_empty(blocks, batch, levels)
        dots = target.new_empty(blocks, n)
        last = target if outermost is None else outermost
        arguments = (code.acts, code.latents, code.ends, code.W_dec, target, weights.device)
        flags = {"LEVELS": levels, "STOP_GRADIENT": stop_gradient, "OUTERMOST": outermost is not None}
        library().decode[batch, blocks](*arguments, gradients, squares, dots, last, n, d, **flags, **constants)
        return self.decoded(code, gradients, squares.double().sum(0).mean(0), dots.sum(0), by_latent)

    def sums(self, bins: Tensor, values: Tensor, by_bin: tuple[Tensor, Tensor]) -> Tensor:
        """As rows of one number."""
        order, ends = by_bin
        one, place = values.new_ones(1, 1), torch.zeros_like(bins)
        return self.sum_rows(one, place, values[order], ends)[:, 0]

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

    def adam(
        self,
        W: Tensor,
        grad: Tensor,
        moments: Moments,
        scale: Tensor,
        rates: Rates,
        unit_norm: bool,
        half: Tensor | None = None,
    ) -> None:
        (lr, beta1, beta2, eps), (grid, d, constants) = rates, launching(W, unit_norm)
        logs = (math.log2(beta) if beta else -math.inf for beta in (beta1, beta2))
        numbers = (W.numel(), d, lr, eps, *logs, 1 - beta1, beta2, 1 - beta2)
        tensors = (W, grad, moments.mean, moments.square_mean, W if half is None else half, scale, moments.step)
        library().adam[grid](*tensors, *numbers, UNIT_NORM=unit_norm, HALF=half is not None, **constants)
