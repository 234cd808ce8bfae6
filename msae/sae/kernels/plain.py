"""The sparse step's inner loops in PyTorch's own operators: any device, float32 or float64."""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

ROWS, LATENTS = 2048, 1024  # of a tile: 8 MB of float32, which stays in cache between the product and the filter


def survivors(
    h: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_sae"],
    bar: Float[Tensor, " d_sae"],
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """(row · d_sae + latent, h·W + b) of all pairs whose value exceeds the latent's bar, in any order.

    In tiles, so that batch × d_sae is never held. NaN is a survivor, so that it cannot go unnoticed.
    """
    d_sae, width, bar = len(W), min(len(W), LATENTS), bar.contiguous()  # one that is expanded takes longer to compare
    buffer = h.new_empty(min(len(h), ROWS) * width)
    above = torch.empty_like(buffer, dtype=torch.bool)
    flats, values = [], []
    for left in range(0, d_sae, width):
        directions, bias, bars = (t[left : left + width] for t in (W, b, bar))
        for top in range(0, len(h), ROWS):
            part = h[top : top + ROWS]
            shape = (len(part), len(directions))
            size = shape[0] * shape[1]
            pre = torch.addmm(bias, part, directions.T, out=buffer[:size].view(shape))
            over = torch.le(pre, bars, out=above[:size].view(shape)).logical_not_()
            index = _true(over.view(-1))
            values.append(pre.view(-1)[index])
            row = torch.div(index, shape[1], rounding_mode="floor")
            flats.append(index + row * (d_sae - shape[1]) + (top * d_sae + left))
    return torch.cat(flats), torch.cat(values)


def _true(flags: Tensor) -> Tensor:
    """Where flags are true, few of which are: eight at a time are looked at as one number."""
    if len(flags) % 8:
        return flags.nonzero().squeeze(1)
    eights = flags.view(torch.int64).nonzero()
    row, column = flags.view(-1, 8)[eights.squeeze(1)].nonzero(as_tuple=True)
    return eights.squeeze(1)[row] * 8 + column


def row_survivors(
    h: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_sae"],
    k: int,
    norm: Float[Tensor, " d_sae"] | None,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """(row · d_sae + latent, h·W + b) of each row's k largest (after × norm), in any order; whole rows at a time."""
    d_sae = len(W)
    rows = max(1, ROWS * LATENTS * 2 // d_sae)
    buffer = h.new_empty(min(rows, len(h)), d_sae)
    flats, values = [], []
    for top in range(0, len(h), rows):
        part = h[top : top + rows]
        pre = torch.addmm(b, part, W.T, out=buffer[: len(part)])
        kept = _largest(pre if norm is None else pre * norm, k)
        flats.append((kept + torch.arange(top, top + len(part), device=h.device)[:, None] * d_sae).flatten())
        values.append(pre.gather(1, kept).flatten())
    return torch.cat(flats), torch.cat(values)


def _largest(pre: Tensor, k: int) -> Tensor:
    """Columns [rows, k] of each row's k largest.

    The k-th largest of the maxima of groups of columns is at most the k-th largest of all, so what lies below it
    needs no sorting.
    """
    rows, width = pre.shape
    group = max(1, width // (8 * k))
    if group == 1 or k >= width:
        return pre.topk(min(k, width), dim=1, sorted=False).indices
    whole = width // group * group
    maxima = pre[:, :whole].view(rows, -1, group).amax(2)
    bar = maxima.topk(k, dim=1).values[:, -1:]
    row, column = (~(pre < bar)).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=rows)
    slot = torch.arange(len(row), device=pre.device) - (counts.cumsum(0) - counts)[row]
    columns = torch.zeros(rows, int(counts.max()), dtype=torch.int64, device=pre.device)
    values = torch.full(columns.shape, -torch.inf, dtype=pre.dtype, device=pre.device)
    columns[row, slot], values[row, slot] = column, pre[row, column]
    return columns.gather(1, values.topk(k, dim=1, sorted=False).indices)


def by_latent(latents: Int[Tensor, " n"], d_sae: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " d_sae_and_1"]]:
    """The order that sorts entries by latent, rows ascending, and where each latent's entries start and end."""
    return latents.argsort(stable=True), bin_ends(latents, d_sae)


def residuals(
    acts: Float[Tensor, " n"],
    latents: Int[Tensor, " n"],
    bins: Int[Tensor, " n"],
    W_dec: Float[Tensor, "d_sae d_out"],
    target: Float[Tensor, "batch d_out"],
    levels: int,
) -> tuple[Float[Tensor, "batch levels d_out"], Float[Tensor, " levels"]]:
    """target − Σ acts W_dec of the latents up to each level, and its E‖·‖² (float64).

    `bins` = row · levels + the entry's innermost level, ascending: one embedding bag for each serves all levels.
    """
    batch = len(target)
    left = rows_sum(W_dec, latents, acts, bin_ends(bins, batch * levels)).view(batch, levels, -1)
    torch.sub(target, left[:, 0], out=left[:, 0])
    for level in range(1, levels):
        torch.sub(left[:, level - 1], left[:, level], out=left[:, level])
    return left, torch.linalg.vector_norm(left, dim=2).double().square().mean(0)


def tell(
    left: Float[Tensor, "batch levels d_out"],
    weights: Sequence[float],
    stop_gradient: bool,
    more: dict[int, Float[Tensor, "batch d_out"]],
    latents: Int[Tensor, " n"],
    bins: Int[Tensor, " n"],
    W_dec: Float[Tensor, "d_sae d_out"],
) -> tuple[Float[Tensor, "batch levels d_out"], Float[Tensor, " n"]]:
    """What the latents of each level are told, in place of `left`, and ⟨that, W_dec row⟩ for each entry.

    That is Σ (weights · left − more) over the levels that contain the latent; of its innermost alone with
    `stop_gradient`.
    """
    levels = left.shape[1]
    for level in range(levels - 1, -1, -1):
        left[:, level].mul_(weights[level])
        if level in more:
            left[:, level].sub_(more[level])
        if level < levels - 1 and not stop_gradient:
            left[:, level].add_(left[:, level + 1])
    return left, _dots(left.flatten(0, 1), latents, bins, W_dec)


def _dots(table: Tensor, latents: Tensor, bins: Tensor, W_dec: Tensor) -> Tensor:
    if table.device.type != "cpu":
        parts = zip(bins.split(4096), latents.split(4096), strict=True)
        return torch.cat([torch.linalg.vecdot(table[i], W_dec[j]) for i, j in parts])
    zeros = table.new_zeros(len(latents))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "sparse CSR is in beta"
        wanted = torch.sparse_csr_tensor(bin_ends(bins, len(table)), latents, zeros, (len(table), len(W_dec)))
        return torch.sparse.sampled_addmm(wanted, table, W_dec.T, beta=0.0).values()


def bin_ends(bins: Int[Tensor, " n"], count: int) -> Int[Tensor, " count_and_1"]:
    """Where each bin's entries start and end, of entries in ascending order of their bins."""
    ends = torch.bincount(bins, minlength=count).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def rows_sum(
    table: Float[Tensor, "rows d"],
    index: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    offsets: Int[Tensor, " bags_and_1"],
) -> Float[Tensor, "bags d"]:
    """Σ weights · table[index] over each bag's entries."""
    return embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
