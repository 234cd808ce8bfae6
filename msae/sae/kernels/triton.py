"""The sparse step's inner loops and the optimizer for GPUs, in Triton; the functions of `plain`.

What they cannot do (another device or type) `plain` does, with the same result. Nothing here waits for the device but
`survivors`, and every sum is added up in an order that its entries decide: no atomics. With TRITON_INTERPRET=1, set
before the first use, the same functions run on a CPU, slowly.
"""

import functools
import importlib
import math
from collections.abc import Container, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msae.sae.kernels import plain

TILES: dict[torch.dtype, dict[str, int]] = {  # of the encoder, whose sums take 64 registers a thread
    torch.float32: {"ROWS": 128, "LATENTS": 128, "DEPTH": 32, "num_warps": 8, "num_stages": 3},
    torch.bfloat16: {"ROWS": 128, "LATENTS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
}
COLUMNS, AT_ONCE = 256, 8  # columns of a program that gathers rows, and how many rows it asks memory for at once
CHUNK = 1024  # what a program of the optimizer takes of a parameter that has no rows to keep whole
WIDEST = 1 << 13  # row that a program of the optimizer can hold
INSTEAD = "use model.kernels=auto"

row_survivors = plain.row_survivors


@functools.cache
def library() -> Any:
    """The Triton functions; on first use, because only who asks for them needs triton. None where it is not."""
    try:
        return importlib.import_module("msae.sae.kernels.triton_kernels")
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
    """Whether the Triton functions can take these, and are there."""
    fits = all(t.dtype in types and t.is_contiguous() for t in tensors)
    return fits and library() is not None and (tensors[0].is_cuda or library().INTERPRETED)


def width(d: int) -> dict[str, int]:
    """How many columns of a row a program takes that gathers rows."""
    return {"COLUMNS": min(COLUMNS, 1 << (d - 1).bit_length()), "AT_ONCE": AT_ONCE}


def filtered(
    h: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_sae"],
    bar: Float[Tensor, " d_sae"],
    capacity: int,
) -> tuple[Int[Tensor, " capacity"], Float[Tensor, " capacity"], Int[Tensor, ""]]:
    """As `plain.survivors`, in an order of chance, then zeros; how many there are, which may be more than had room.

    h and W may be bfloat16: products are added up in float32 all the same.
    """
    (batch, d), d_sae = h.shape, len(W)
    if library().INTERPRETED:  # which takes the bits of bfloat16 for whole numbers
        h, W = h.float(), W.float()
    flat, values = h.new_zeros(capacity, dtype=torch.int64), h.new_zeros(capacity, dtype=torch.float32)
    count, tile = h.new_zeros((), dtype=torch.int64), TILES[h.dtype]
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    grid = (-(-batch // tile["ROWS"]) * -(-d_sae // tile["LATENTS"]),)
    arguments = (h, W, b, bar, flat, values, count, batch, d_sae, d, capacity)
    library().survivors[grid](*arguments, PRECISION=precision, **tile)
    return flat, values, count


def survivors(
    h: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_sae"],
    bar: Float[Tensor, " d_sae"],
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """As `plain.survivors`; once more where there are more than was thought."""
    bar = bar.contiguous()
    if not (able(b, bar) and able(h, W, types=TILES)):
        return plain.survivors(h, W, b, bar)
    capacity = max(1, len(h) * len(W) // 64)
    while True:
        flat, values, count = filtered(h, W, b, bar, capacity)
        if (n := int(count)) <= capacity:
            return flat[:n], values[:n]
        capacity = n


def largest(
    h: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_sae"],
    bar: Float[Tensor, ""],
    scale: Float[Tensor, " d_sae"] | None,
    wanted: int,
    capacity: int,
) -> tuple[Int[Tensor, " wanted"], Float[Tensor, " wanted"], Int[Tensor, ""]]:
    """(row · d_sae + latent, h·W + b) of the `wanted` largest (after × scale) above a positive bar; how many there are.

    The first ones mean something only if there are at least `wanted` and at most `capacity` of the last. The order of
    chance is undone before anything depends on it: by the first sort the second, a stable one, meets equal values in
    ascending order, so of these the first are taken. NaN is larger than all.
    """
    bars = bar.expand_as(b).contiguous() if scale is None else bar / scale
    flat, u, count = filtered(h, W, b, bars, capacity)
    flat, order = flat.sort()
    u = u[order]
    ranked = u if scale is None else u * scale[flat % len(W)]
    kept = ranked.argsort(descending=True, stable=True)[:wanted]
    return flat[kept], u[kept], count


def by_latent(latents: Int[Tensor, " n"], d_sae: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " d_sae_and_1"]]:
    """As `plain.by_latent`."""
    ascending, order = latents.sort(stable=True)
    return order, bin_ends(ascending, d_sae)


def bin_ends(bins: Int[Tensor, " n"], count: int) -> Int[Tensor, " count_and_1"]:
    """As `plain.bin_ends`, without asking the device how many bins there are."""
    return torch.searchsorted(bins, torch.arange(count + 1, device=bins.device))


def residuals(
    acts: Float[Tensor, " n"],
    latents: Int[Tensor, " n"],
    bins: Int[Tensor, " n"],
    W_dec: Float[Tensor, "d_sae d_out"],
    target: Float[Tensor, "batch d_out"],
    levels: int,
) -> tuple[Float[Tensor, "batch levels d_out"], Float[Tensor, " levels"]]:
    """As `plain.residuals`."""
    if not able(acts, W_dec, target):
        return plain.residuals(acts, latents, bins, W_dec, target, levels)
    batch, d = target.shape
    columns = width(d)
    blocks = -(-d // columns["COLUMNS"])
    left, squares = target.new_empty(batch, levels, d), target.new_empty(blocks, batch, levels)
    ends = bin_ends(bins, batch * levels)
    library().residuals[batch, blocks](acts, latents, ends, W_dec, target, left, squares, levels, d, **columns)
    return left, squares.double().sum(0).mean(0)


def tell(
    left: Float[Tensor, "batch levels d_out"],
    weights: Sequence[float],
    stop_gradient: bool,
    more: dict[int, Float[Tensor, "batch d_out"]],
    latents: Int[Tensor, " n"],
    bins: Int[Tensor, " n"],
    W_dec: Float[Tensor, "d_sae d_out"],
) -> tuple[Float[Tensor, "batch levels d_out"], Float[Tensor, " n"]]:
    """As `plain.tell`."""
    if more or not able(left, W_dec):
        return plain.tell(left, weights, stop_gradient, more, latents, bins, W_dec)
    (batch, levels, d), n = left.shape, len(latents)
    columns = width(d)
    blocks = -(-d // columns["COLUMNS"])
    dots, ends = left.new_empty(blocks, n), bin_ends(bins, batch * levels)
    scales = torch.tensor(weights, dtype=left.dtype).to(left.device, non_blocking=True)
    library().tell[batch, blocks](
        left, scales, latents, ends, W_dec, dots, n, levels, d, STOP_GRADIENT=stop_gradient, **columns
    )
    return left, dots.sum(0)


def rows_sum(
    table: Float[Tensor, "rows d"],
    index: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    offsets: Int[Tensor, " bags_and_1"],
) -> Float[Tensor, "bags d"]:
    """As `plain.rows_sum`, always in the same order."""
    if not able(table, weights):
        return plain.rows_sum(table, index, weights, offsets)
    bags, d = len(offsets) - 1, table.shape[1]
    out, columns = table.new_empty(bags, d), width(d)
    library().rows_sum[bags, -(-d // columns["COLUMNS"])](table, index, weights, offsets, out, d, **columns)
    return out


# --- the optimizer ----------------------------------------------------------------------------------------------------


def able_to_step(*tensors: Float[Tensor, "rows d"]) -> bool:
    """Whether the optimizer can take these."""
    return able(*tensors) and all(t.shape[1] <= WIDEST for t in tensors if len(t) > 1)


def launch(tensor: Float[Tensor, "rows d"], whole: bool) -> tuple[tuple[int], int, dict[str, int]]:
    """(grid, d, settings) of a program for each whole row, or for each d = CHUNK numbers."""
    d = tensor.shape[1] if whole else CHUNK
    columns = 1 << (d - 1).bit_length()
    return (-(-tensor.numel() // d),), d, {"COLUMNS": columns, "num_warps": max(1, min(16, columns // 256))}


def project(grad: Float[Tensor, "rows d"], W: Float[Tensor, "rows d"] | None) -> Float[Tensor, " parts"]:
    """‖·‖² (float64) of parts of grad, each row after its part along W's unit row is removed in place if W is given."""
    grid, d, settings = launch(grad, W is not None)
    squares = grad.new_empty(grid)
    arguments = (grad, grad if W is None else W, squares, grad.numel(), d)
    library().project[grid](*arguments, ALONG=W is not None, **settings)
    return squares.double()


def adam(
    W: Float[Tensor, "rows d"],
    grad: Float[Tensor, "rows d"],
    state: tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"]],
    scale: Float[Tensor, ""],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: Float[Tensor, ""],
    unit_norm: bool,
) -> None:
    """Adam's update with the gradient × scale, then rows of unit norm if wanted: one pass over memory."""
    (beta1, beta2), (grid, d, settings) = betas, launch(W, unit_norm)
    logs = (math.log2(beta) if beta else -math.inf for beta in betas)
    numbers = (W.numel(), d, lr, eps, *logs, 1 - beta1, beta2, 1 - beta2)
    library().adam[grid](W, grad, *state, scale, step, *numbers, UNIT_NORM=unit_norm, **settings)
