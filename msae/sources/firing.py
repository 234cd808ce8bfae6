"""Rates of a synthetic world's features, and draws of the active ones, whose work grows with these alone."""

import math

import torch
from torch import Generator, Tensor


def zipf(n: int, exponent: float, most: float, least: float) -> Tensor:
    """Rates [n] from `most` down to `least`, float64: their excess over `least` falls as i^−exponent − n^−exponent."""
    power = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    last = power[-1] if n > 1 else 0
    return least + (most - least) * (power - last) / (1 - last)


def folded_normal_mean(mean: Tensor, std: Tensor) -> Tensor:
    """E|mean + std · randn|."""
    ratio = mean / std.clamp_min(1e-30)
    return std * math.sqrt(2 / math.pi) * (-ratio.square() / 2).exp() + mean * (ratio / math.sqrt(2)).erf()


def intensities(p: Tensor) -> Tensor:
    """−log(1 − p): a Poisson process of this intensity has a point with probability p (1 − 2⁻⁴⁰ where that is 1)."""
    return -torch.log1p(-p.clamp(max=1 - 2**-40))


def cumulative(sizes: Tensor) -> Tensor:
    """Where each of n segments begins that are laid end to end, and where the last one ends [n + 1]."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def bernoulli(edges: Tensor, first: Tensor, each: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Which of the cells first[k]..first[k] + each − 1 are active, for all k: pairs (k, cell), in this order.

    Cells are laid end to end on a line, each as long as its intensity, so that `edges` [cells + 1] is `cumulative`. A
    unit Poisson process on the ranges' lines, made of exponential gaps, hits a cell with its probability: the work is
    that of the hits, not of the cells.
    """
    begin = edges[first]
    length = edges[first + each] - begin
    ends = length.cumsum(0)
    total = float(ends[-1]) if len(ends) else 0.0
    n_points = int(torch.poisson(torch.tensor(total, dtype=torch.float64), generator=generator))
    gaps = -torch.log1p(-torch.rand(n_points + 1, generator=generator, dtype=torch.float64))
    points = gaps.cumsum(0)
    points = points[:-1] * (total / points[-1])
    k = torch.searchsorted(ends, points, right=True).clamp(max=len(ends) - 1)  # clamped: rounding at an end
    cell = torch.searchsorted(edges, points - (ends - length - begin)[k], right=True) - 1
    cell = cell.clamp(first[k], first[k] + each - 1)
    is_new = torch.ones(n_points, dtype=torch.bool)
    is_new[1:] = (k[1:] != k[:-1]) | (cell[1:] != cell[:-1])
    return k[is_new], cell[is_new]


def merge_rows(rows: int, pieces: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge pieces (row, feature, value), each in order of rows, into (offsets, feature, value).

    Each row holds its entries of the first piece, then of the second, and so on.
    """
    counts = torch.stack([torch.bincount(row, minlength=rows) for row, _, _ in pieces])
    offsets = cumulative(counts.sum(0))
    feature, value = offsets.new_empty(int(offsets[-1])), torch.empty(int(offsets[-1]))
    start = offsets[:-1]  # of the piece's entries, in each row
    for (row, features, values), count in zip(pieces, counts, strict=True):
        slots = torch.arange(len(row)) + (start - (count.cumsum(0) - count))[row]
        feature[slots], value[slots] = features, values
        start = start + count
    return offsets, feature, value
