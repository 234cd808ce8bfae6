"""Which features of a synthetic world are active: rates, and drawing by them with work for the active ones alone."""

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


def bernoulli(cumulative: Tensor, first: Tensor, each: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Which of the cells first[k]..first[k] + each − 1 are active, for all k: pairs (k, cell), in this order.

    Cells are laid end to end on a line, each as long as its intensity, the difference of `cumulative` [cells + 1]; a
    unit Poisson process on the line, made of exponential gaps, hits a cell with its probability. So the work is that of
    the hits, not of the cells.
    """
    low = cumulative[first]
    size = cumulative[first + each] - low
    ends = size.cumsum(0)
    total = float(ends[-1]) if len(ends) else 0.0
    points = int(torch.poisson(torch.tensor(total, dtype=torch.float64), generator=generator))
    gaps = -torch.log1p(-torch.rand(points + 1, generator=generator, dtype=torch.float64))
    place = gaps.cumsum(0)
    place = place[:-1] * (total / place[-1])
    k = torch.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)  # clamped: rounding at an end
    cell = torch.searchsorted(cumulative, place - (ends - size - low)[k], right=True) - 1
    cell = cell.clamp(first[k], first[k] + each - 1)
    new = torch.ones(points, dtype=torch.bool)
    new[1:] = (k[1:] != k[:-1]) | (cell[1:] != cell[:-1])
    return k[new], cell[new]


def merged(rows: int, pieces: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, feature, value of pieces (row, feature, value) that are each ordered by row; a row keeps their order."""
    counts = [torch.bincount(row, minlength=rows) for row, _, _ in pieces]
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    offsets[1:] = torch.stack(counts).sum(0).cumsum(0)
    feature, value = offsets.new_empty(int(offsets[-1])), torch.empty(int(offsets[-1]))
    start = offsets[:-1]  # of the piece, in each row
    for (row, features, values), count in zip(pieces, counts, strict=True):
        place = torch.arange(len(row)) + (start - (count.cumsum(0) - count))[row]
        feature[place], value[place] = features, values
        start = start + count
    return offsets, feature, value
