"""Nested widths: fractions and ints, what is refused, and random draws."""

import math

import pytest
import torch

from msae.sae import MatryoshkaSAE, pareto_prefixes, resolve_prefixes


@pytest.mark.parametrize(
    ("prefixes", "widths"),
    [
        ([64], [64]),
        ([1.0], [64]),
        ([16, 32, 64], [16, 32, 64]),
        ([0.25, 0.5, 1.0], [16, 32, 64]),
        ([0.25, 1], [16, 64]),
        ((1 / 64, 1.0), [1, 64]),
        ([1, 64], [1, 64]),
    ],
)
def test_fractions_and_widths_become_widths(prefixes, widths) -> None:
    resolved = resolve_prefixes(prefixes, 64)
    assert resolved == widths
    assert all(type(width) is int for width in resolved)


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([], "is empty"),
        ([32, 16, 64], "strictly increasing"),
        ([16, 16, 64], "strictly increasing"),
        ([0.5, 0.25, 1.0], "strictly increasing"),
        ([16, 128], "must end at d_sae=64"),
        ([16, 32], "must end at d_sae=64"),
        ([0.25, 0.5], "must end at d_sae=64"),
        ([0.3, 1.0], "not whole widths"),
        ([0, 64], "positive"),
        ([-16, 64], "positive"),
        ([0.0, 1.0], r"all in \(0, 1\]"),
        ([math.nan, 1.0], r"all in \(0, 1\]"),
        ([0.25, 64], "mixes fractions and widths"),
        ([16.0, 64.0], "mixes fractions and widths"),
    ],
)
def test_impossible_prefixes_are_refused(prefixes, message) -> None:
    with pytest.raises(ValueError, match=rf"^model\.prefixes[^\n]*{message}[^\n]*$"):
        MatryoshkaSAE(4, 64, prefixes, 2)


def test_random_prefixes_increase_and_end_at_the_width() -> None:
    generator, draws = torch.Generator().manual_seed(0), set()
    for n in (1, 2, 5, 16):
        for _ in range(50):
            widths = pareto_prefixes(16, n, generator)
            assert len(widths) == n
            assert resolve_prefixes(widths, 16) == widths  # which must increase and end at 16
            draws.add(tuple(widths))
    assert tuple(range(1, 17)) in draws
    assert len(draws) > 50
    assert pareto_prefixes(1, 1, generator) == [1]


@pytest.mark.parametrize("n", [0, -1, 17])
def test_an_impossible_number_of_random_prefixes_is_refused(n) -> None:
    with pytest.raises(ValueError, match=rf"^model\.sampling\.n_prefixes={n} must lie between 1 and d_sae=16$"):
        pareto_prefixes(16, n, torch.Generator())
