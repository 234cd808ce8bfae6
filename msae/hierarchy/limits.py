"""The tests that try to refute an edge, and where each draws its line."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Limits:
    """What an edge must reach to survive. Every figure is kept, so that a reader can draw the lines elsewhere."""

    floor: float = 0.02  # share of its own maximum below which a latent counts as silent
    least: int = 20  # rows on which a latent must fire to be looked at
    coverage: float = 0.5  # P(parent | child) is at least this, P(child | parent) less
    lift: float = 2.0
    fdr: float = 0.01
    mcs: float = 0.6
    gain: float = 0.01
    z: float = 3.0
    superparent: float = 0.5
    sibling: float = 0.3
    matched: int = 16  # latents of neighbouring firing rates among which a parent is compared
    parents: int = 8  # candidates of one child that are tested: those with the highest PMI

    def __post_init__(self) -> None:
        for key in ("least", "matched", "parents"):
            if getattr(self, key) < 1:
                raise ValueError(f"limits.{key}={getattr(self, key)} must be at least 1")


class Test(NamedTuple):
    """A figure of every edge: its name, what it is, and what an edge must have (nothing for a mere figure)."""

    name: str
    says: str
    line: str = ""


# The funnel, in this order; the last ones compare an edge with those that are left.
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
    "rank": Test("rank", "place among the child's parents that are left, by MCS", "1"),
}
