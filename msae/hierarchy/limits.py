"""The tests that try to refute an edge, and where each draws its line."""

import operator
from typing import Any, NamedTuple

import numpy as np

from msae.settings import Count, NonNegative, Share, as_plain, settings

COMPARE = {"≥": operator.ge, "≤": operator.le, "<": operator.lt, "": operator.eq}


@settings
class Limits:
    """What an edge must reach to survive. Every figure is kept, so that a reader can draw the lines elsewhere."""

    floor: Share = 0.02
    """Share of its own maximum below which a latent counts as silent."""
    least: Count = 20
    """Rows on which a latent must fire to be looked at."""
    coverage: Share = 0.5
    """P(parent | child) is at least this, P(child | parent) less."""
    lift: NonNegative = 2.0
    """Coverage is at least this many times that of chance."""
    fdr: Share = 0.01
    """False-discovery rate of coverage above chance."""
    mcs: float = 0.6
    """Directed MCS is at least this."""
    gain: float = 0.01
    """The child explains at least this share of what the parent leaves."""
    z: float = 3.0
    """Removing the parent hurts more than removing another latent by at least this many standard errors."""
    superparent: Share = 0.5
    """A parent covers at most this share of the rarer latents."""
    sibling: float = 0.3
    """Cosine of two children below which they share nothing that the parent lacks."""
    matched: Count = 16
    """Latents of neighbouring firing rates with which a parent is compared."""
    parents: Count = 8
    """Parents of one child that are tested: those with the highest PMI."""


class Test(NamedTuple):
    """A figure of every edge: its name, what it measures, and the line it must reach ("" for a mere figure)."""

    name: str
    says: str
    line: str = ""

    def line_at(self, limits: Limits) -> str:
        """The line with its number, such as ≥ 0.6."""
        return self.line.format(**as_plain(limits))

    def passes(self, figure: np.ndarray[Any, Any], limits: Limits) -> np.ndarray[Any, Any]:
        """Which edges reach the line; NaN does not."""
        sign, _, line = self.line_at(limits).rpartition(" ")
        return COMPARE[sign](figure, float(line))


# In the order of the funnel: the last ones compare an edge with those that remain.
TESTS = {
    "coverage": Test("coverage", "P(parent fires | child fires); the rest are holes", "≥ {coverage}"),
    "pmi": Test("PMI", "pointwise mutual information of the two firing, in bits"),
    "lift": Test("lift", "coverage ÷ that of a chance parent, or of latents that fire as often, if more", "≥ {lift}"),
    "q": Test("q", "false-discovery rate at which coverage is above chance, over all pairs looked at", "≤ {fdr}"),
    "mcs": Test(
        "MCS",
        "directed MCS: cosine of the two activations where the child fires × largest child ÷ largest parent",
        "≥ {mcs}",
    ),
    "gain": Test("gain", "share of what the parent leaves of the child's tokens that the child explains", "≥ {gain}"),
    "harm": Test("harm", "rise of the squared error on the child's tokens without the parent, ÷ Σ ‖x − b_dec‖²"),
    "z": Test(
        "harm z", "standard errors by which that exceeds the harm of removing a latent that fires as often", "≥ {z}"
    ),
    "covers": Test(
        "covers", "share of the rarer latents that the parent covers; a superparent covers most", "≤ {superparent}"
    ),
    "reverse": Test("reverse", "P(child fires | parent fires); if most, the two are one latent split", "< {coverage}"),
    "sibling": Test(
        "sibling",
        "highest cosine of the child with another child, the parent's direction taken out; what siblings share is a "
        "level between that has no latent, or was absorbed",
        "< {sibling}",
    ),
    "between": Test("between", "latents that cover the child and are covered by the parent", "0"),
    "rank": Test("rank", "place among the child's remaining parents, by MCS", "1"),
}
LINES = [key for key, test in TESTS.items() if test.line]  # the figures that can refute an edge
STAGES = ["pairs", *LINES]  # of a funnel
