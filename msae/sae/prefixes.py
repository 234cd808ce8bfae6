"""The nested widths of a Matryoshka SAE: fixed, drawn anew at each step, or all of them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch

from msae.settings import Count, settings


@settings
class PrefixSampling:
    """Which prefixes a training step has; figures and files always have those of `model.prefixes`."""

    kind: Literal["fixed", "random", "every"] = "fixed"
    """`fixed`: model.prefixes; `random`: drawn anew each step, short ones most often; `every`: all widths."""
    n_prefixes: Count | None = None
    """How many a random draw has; null: as many as model.prefixes."""


def resolve_prefixes(prefixes: Sequence[int | float], d_sae: int) -> list[int]:
    """Cumulative widths as ints: fractions of d_sae (all at most 1.0, at least one a float) or the widths themselves.

    `[0.25, 1.0]` of 64 is `[16, 64]`. Raises ValueError unless they are strictly increasing, positive and end at d_sae.
    """
    if not prefixes:
        raise ValueError(f"model.prefixes is empty, expected cumulative widths that end at d_sae, e.g. [{d_sae}]")
    widths = list(prefixes)
    if any(isinstance(p, float) for p in widths):
        if any(not 0 < p <= 1 for p in widths):
            raise ValueError(f"model.prefixes={widths} mixes fractions and widths, expected all in (0, 1] or all ints")
        exact = [p * d_sae for p in widths]
        if any(abs(e - round(e)) > 1e-6 for e in exact):
            raise ValueError(f"model.prefixes={widths} of d_sae={d_sae} are not whole widths ({exact}); give ints")
        widths = [round(e) for e in exact]
    if widths[0] <= 0 or any(a >= b for a, b in pairwise(widths)):
        raise ValueError(f"model.prefixes={widths} must be positive and strictly increasing (cumulative widths)")
    if widths[-1] != d_sae:
        raise ValueError(f"model.prefixes={widths} must end at d_sae={d_sae}; set model.prefixes or model.d_sae")
    return [int(w) for w in widths]


def pareto_prefixes(d_sae: int, n: int, generator: torch.Generator, power: float = 0.5) -> list[int]:
    """n increasing widths: n − 1 drawn without replacement from 1 … d_sae − 1, then d_sae (random prefixes).

    P(m) ∝ m^power − (m − 1)^power, about m^(power − 1): short prefixes are drawn most often (arXiv 2503.17547 and
    noanabeshima/matryoshka-saes, power 1/2). Raises ValueError unless 1 ≤ n ≤ d_sae.
    """
    if not 1 <= n <= d_sae:
        raise ValueError(f"model.sampling.n_prefixes={n} must lie between 1 and d_sae={d_sae}")
    if n == 1:
        return [d_sae]
    density = (torch.arange(d_sae, dtype=torch.float64) ** power).diff()
    drawn = torch.multinomial(density, n - 1, replacement=False, generator=generator) + 1
    return [*sorted(drawn.tolist()), d_sae]
