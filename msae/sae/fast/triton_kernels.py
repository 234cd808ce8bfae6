"""The Triton functions that `triton.py` launches, with the names of its methods; capitals are compile-time constants.

Offsets that may exceed 2³¹ are int64: indices in memory are, program numbers are converted. no_type_check: type checks
at run time would wrap functions whose source Triton reads.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def store_survivors(sums, row, latent, b, bar, flat, values, count, batch, d_sae, capacity):
    """Add b to the sums of these rows and latents, and store those that exceed their bar side by side in the output."""
    is_latent = latent < d_sae
    u = sums + tl.load(b + latent, is_latent, 0.0)[None, :]
    is_below = u <= tl.load(bar + latent, is_latent, 0.0)[None, :]  # not >: NaN survives
    keep = ~is_below & (row < batch)[:, None] & is_latent[None, :]
    rank = tl.cumsum(keep.to(tl.int32), 1)
    of_row = tl.max(rank, 1)
    slot = (tl.cumsum(of_row, 0) - of_row)[:, None] + rank - 1
    begin = tl.atomic_add(count, tl.sum(of_row, 0).to(tl.int64), sem="relaxed")
    room = tl.maximum(tl.minimum(capacity - begin, 1 << 30), 0).to(tl.int32)
    stored = keep & (slot < room)
    tl.store(flat + begin + slot, row.to(tl.int64)[:, None] * d_sae + latent[None, :], stored)
    tl.store(values + begin + slot, u, stored)


@triton.jit
@no_type_check
def survivors(
    h,  # [batch, D], float32 or bfloat16, as W
    W,  # [d_sae, D]
    b,  # [d_sae]
    bar,  # [d_sae]
    flat,  # [capacity], out
    values,  # [capacity], out
    count,  # [], in: 0, out: how many survive, whether there is room for them or not
    batch,
    d_sae,
    capacity,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of h Wᵀ + b, compared with the bars in quarters, because all at once would not fit into registers.

    Tiles that run together share latents: W is read once, and h, the smaller, from the cache.
    """
    down = tl.cdiv(batch, ROWS)
    row = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    latent = tl.program_id(0) // down * LATENTS + tl.arange(0, LATENTS)
    column = tl.arange(0, DEPTH)
    # rows and latents beyond the last wrap around to the first: one mask less in the loop
    from_h = h + (row % batch).to(tl.int64)[:, None] * D + column[None, :]
    from_W = W + (latent % d_sae).to(tl.int64)[None, :] * D + column[:, None]
    sums = tl.zeros((ROWS, LATENTS), tl.float32)
    for start in range(0, D, DEPTH):
        inside = column < D - start
        inputs = tl.load(from_h + start, inside[None, :], 0.0)
        directions = tl.load(from_W + start, inside[:, None], 0.0)
        sums = tl.dot(inputs, directions, sums, input_precision=PRECISION)
    latent = tl.program_id(0) // down * LATENTS + 2 * tl.arange(0, LATENTS // 4)
    even, odd = tl.split(tl.reshape(sums, (ROWS, LATENTS // 2, 2)))
    low, high = tl.split(tl.permute(tl.reshape(even, (ROWS, 2, LATENTS // 4)), (0, 2, 1)))
    store_survivors(low, row, latent, b, bar, flat, values, count, batch, d_sae, capacity)
    store_survivors(high, row, latent + LATENTS // 2, b, bar, flat, values, count, batch, d_sae, capacity)
    low, high = tl.split(tl.permute(tl.reshape(odd, (ROWS, 2, LATENTS // 4)), (0, 2, 1)))
    store_survivors(low, row, latent + 1, b, bar, flat, values, count, batch, d_sae, capacity)
    store_survivors(high, row, latent + LATENTS // 2 + 1, b, bar, flat, values, count, batch, d_sae, capacity)


@triton.jit
@no_type_check
def screen(
    sums,  # [rows, d_sae], h Wᵀ of some rows
    b,  # [d_sae]
    bar,  # [d_sae]
    flat,  # [capacity], out
    values,  # [capacity], out
    count,  # [], in and out
    first,  # number of the first row
    d_sae,
    capacity,
    LATENTS: tl.constexpr,
):
    """A stretch of one row, compared with its bars."""
    row = tl.program_id(0).to(tl.int64)
    latent = tl.program_id(1) * LATENTS + tl.arange(0, LATENTS)
    is_latent = latent < d_sae
    u = tl.load(sums + row * d_sae + latent, is_latent, 0.0) + tl.load(b + latent, is_latent, 0.0)
    is_below = u <= tl.load(bar + latent, is_latent, 0.0)  # not >: NaN survives
    keep = ~is_below & is_latent
    rank = tl.cumsum(keep.to(tl.int32), 0)
    number = tl.max(rank, 0).to(tl.int64)
    begin = tl.atomic_add(count, number, mask=number > 0, sem="relaxed")
    slot = begin + rank - 1
    stored = keep & (slot < capacity)
    tl.store(flat + slot, (first + row) * d_sae + latent, stored)
    tl.store(values + slot, u, stored)


@triton.jit
@no_type_check
def weighted_rows(table, index, weights, entry, end, column, inside, d, AT_ONCE: tl.constexpr):
    """Σ weights · table[index] over the entries from `entry` to `end`, in an order that only they decide."""
    sums = tl.zeros((AT_ONCE, column.shape[0]), tl.float32)
    while entry < end:  # a range of loaded numbers fails in the interpreter of some versions
        entries = entry + tl.arange(0, AT_ONCE)
        is_entry = entries < end
        rows = tl.load(index + entries, is_entry, 0)
        weight = tl.load(weights + entries, is_entry, 0.0)
        mask = is_entry[:, None] & inside[None, :]
        sums += weight[:, None] * tl.load(table + rows[:, None] * d + column[None, :], mask, 0.0)
        entry += AT_ONCE
    return tl.sum(sums, 0)


@triton.jit
@no_type_check
def sum_rows(
    table,  # [rows, d]
    index,  # [n]
    weights,  # [n]
    ends,  # [bags + 1]
    out,  # [bags, d]
    d,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """A block of columns of one bag."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    entry, end = tl.load(ends + bag), tl.load(ends + bag + 1)
    sums = weighted_rows(table, index, weights, entry, end, column, inside, d, AT_ONCE)
    tl.store(out + bag * d + column, sums, inside)


@triton.jit
@no_type_check
def forward(
    acts, latents, ends, W_dec, target, residuals, squares, d, row, block, column, inside, LEVELS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Residuals of one row, level by level, in some columns, and their squares; the last residual is returned."""
    residual = tl.load(target + row * d + column, inside, 0.0)
    for level in range(LEVELS):
        bin = row * LEVELS + level
        entry, end = tl.load(ends + bin), tl.load(ends + bin + 1)
        residual -= weighted_rows(W_dec, latents, acts, entry, end, column, inside, d, AT_ONCE)
        tl.store(residuals + bin * d + column, residual, inside)
        tl.store(squares + block * tl.num_programs(0) * LEVELS + bin, tl.sum(residual * residual, 0))
    return residual


@triton.jit
@no_type_check
def backward(
    residuals, weights, latents, ends, W_dec, dots, n, d, row, block, column, inside, LEVELS: tl.constexpr,
    STOP_GRADIENT: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Gradients of one row in place of its residuals, from the outermost level inwards; and each entry's product."""
    gradient = tl.zeros((COLUMNS,), tl.float32)
    for inwards in range(LEVELS):
        level = LEVELS - 1 - inwards
        bin = row * LEVELS + level
        of_level = tl.load(residuals + bin * d + column, inside, 0.0) * tl.load(weights + level)
        gradient = of_level if STOP_GRADIENT else gradient + of_level
        tl.store(residuals + bin * d + column, gradient, inside)
        entry, end = tl.load(ends + bin), tl.load(ends + bin + 1)
        while entry < end:
            entries = entry + tl.arange(0, AT_ONCE)
            is_entry = entries < end
            rows = tl.load(latents + entries, is_entry, 0)
            mask = is_entry[:, None] & inside[None, :]
            directions = tl.load(W_dec + rows[:, None] * d + column[None, :], mask, 0.0)
            tl.store(dots + block.to(tl.int64) * n + entries, tl.sum(directions * gradient[None, :], 1), is_entry)
            entry += AT_ONCE


@triton.jit
@no_type_check
def residuals(
    acts,  # [n]
    latents,  # [n]
    ends,  # [batch · levels + 1]
    W_dec,  # [d_sae, d]
    target,  # [batch, d]
    residuals,  # [batch, levels, d], out
    squares,  # [blocks, batch, levels], out
    d,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """A block of columns of one row, level by level."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    forward(acts, latents, ends, W_dec, target, residuals, squares, d, row, block, column, inside, LEVELS, AT_ONCE)


@triton.jit
@no_type_check
def decoder_backward(
    residuals,  # [batch, levels, d], in; out: the gradients
    weights,  # [levels]
    latents,  # [n]
    ends,  # [batch · levels + 1]
    W_dec,  # [d_sae, d]
    dots,  # [blocks, n], out
    n,
    d,
    LEVELS: tl.constexpr,
    STOP_GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """A block of columns of one row, from the outermost level inwards."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    backward(
        residuals, weights, latents, ends, W_dec, dots, n, d, row, block, column, inside, LEVELS, STOP_GRADIENT,
        COLUMNS, AT_ONCE,
    )  # fmt: skip


@triton.jit
@no_type_check
def decode(
    acts,  # [n]
    latents,  # [n]
    ends,  # [batch · levels + 1]
    W_dec,  # [d_sae, d]
    target,  # [batch, d]
    weights,  # [levels]
    gradients,  # [batch, levels, d], out
    squares,  # [blocks, batch, levels], out
    dots,  # [blocks, n], out
    outermost,  # [batch, d], out
    n,
    d,
    LEVELS: tl.constexpr,
    STOP_GRADIENT: tl.constexpr,
    OUTERMOST: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """A block of columns of one row, level by level and back."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    residual = forward(
        acts, latents, ends, W_dec, target, gradients, squares, d, row, block, column, inside, LEVELS, AT_ONCE
    )
    if OUTERMOST:
        tl.store(outermost + row * d + column, residual, inside)
    tl.debug_barrier()  # the same program reads what it has just written
    backward(
        gradients, weights, latents, ends, W_dec, dots, n, d, row, block, column, inside, LEVELS, STOP_GRADIENT,
        COLUMNS, AT_ONCE,
    )  # fmt: skip


@triton.jit
@no_type_check
def project(
    grad,  # [rows, d] of `size` numbers, in and out
    W,  # [rows, d]
    squares,  # [rows], out
    size,
    d,
    ALONG: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row, or a stretch of d numbers: ‖·‖², after its part along W's row is removed if ALONG."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    at = row * d + column
    inside = (column < d) & (at < size)
    g = tl.load(grad + at, inside, 0.0)
    if ALONG:
        w = tl.load(W + at, inside, 0.0)
        g -= tl.sum(g * w, 0) * w
        tl.store(grad + at, g, inside)
    tl.store(squares + row, tl.sum(g * g, 0))


@triton.jit
@no_type_check
def adam(
    W,  # [rows, d] of `size` numbers, in and out, as the averages
    grad,
    mean,
    square_mean,
    half,  # out, if HALF: W in bfloat16
    scale,  # [], float64
    step,  # []
    size,
    d,
    lr,
    eps,
    log_beta1,  # base 2
    log_beta2,
    new1,  # 1 − β1, the weight of the new gradient, which float32 would not have exactly
    beta2,
    new2,
    UNIT_NORM: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row, or a stretch of d numbers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    at = row * d + column
    inside = (column < d) & (at < size)
    t = tl.load(step).to(tl.float64)  # 1 − βᵗ is small at first: float32 has few digits of it
    step_size = (lr / (1 - tl.exp2(t * log_beta1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp2(t * log_beta2)).to(tl.float32)
    g = tl.load(grad + at, inside, 0.0) * tl.load(scale).to(tl.float32)
    m = tl.load(mean + at, inside, 0.0)
    m += new1 * (g - m)
    v = beta2 * tl.load(square_mean + at, inside, 0.0) + new2 * g * g
    w = tl.load(W + at, inside, 0.0) - step_size * m / (tl.sqrt(v) / root + eps)
    if UNIT_NORM:
        w /= tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-12)
    tl.store(mean + at, m, inside)
    tl.store(square_mean + at, v, inside)
    tl.store(W + at, w, inside)
    if HALF:
        tl.store(half + at, w.to(tl.bfloat16), inside)


INTERPRETED = not isinstance(survivors, triton.JITFunction)  # TRITON_INTERPRET=1
