"""Candidate edges parent → child between the latents of one SAE, and attempts to refute each of them.

All figures follow from which latents fire together and from what they reconstruct; none knows the truth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from msae.hierarchy.firings import Array, Firings, Readable
from msae.hierarchy.limits import LINES, TESTS, Limits
from msae.hierarchy.pairs import Pairs, covering_pairs, eligible, false_discovery_rate, join
from msae.hierarchy.sums import Sums, SumUp
from msae.sae import MatryoshkaSAE

CHILDREN = 1024  # of a parent, compared with their siblings at once


@dataclass
class Edges:
    """Candidate edges [n]: the figures of TESTS, and for those with a line whether it is passed."""

    parent: Array
    child: Array
    holes: Array  # rows on which the child fires and the parent does not
    figures: dict[str, Array]
    passed: dict[str, Array]
    looked_at: int

    @property
    def survives(self) -> Array:
        """Edges that no test refutes [n]; a child has at most one."""
        return np.logical_and.reduce(list(self.passed.values()))

    def funnel(self) -> dict[str, int]:
        """How many edges remain after each test, one after the other."""
        remaining = np.logical_and.accumulate(list(self.passed.values())).sum(axis=1)
        return dict(zip(["pairs", *self.passed], [self.looked_at, *remaining.tolist()], strict=True))

    def parents(self, d_sae: int) -> Array:
        """The surviving parent of each latent [d_sae], −1 without one."""
        parent = np.full(d_sae, -1, dtype=np.int64)
        parent[self.child[self.survives]] = self.parent[self.survives]
        return parent


@dataclass
class Candidates:
    """The covering pairs that an order of the latents allows, of each child the few with the highest PMI."""

    pairs: Pairs
    pmi: Array
    above: Array  # [n] more often together than chance has it
    covers: Array  # [d_sae] share of the rarer latents that each covers
    looked_at: int

    @property
    def tested(self) -> Pairs:
        """What a frequent latent covers by chance is no child of its own, and not worth a pass."""
        return self.pairs.where(self.above)


def candidates(covering: Pairs, firings: Firings, level: Array, limits: Limits) -> Candidates:
    """The covering pairs whose parent is of the child's level or of an earlier one."""
    counts = firings.counts
    ordered = covering.where(level[covering.parent] <= level[covering.child])
    possible = eligible(counts, level, limits.least)
    covers = np.bincount(ordered.parent, minlength=firings.d_sae) / np.maximum(1, possible)
    pairs, pmi = highest(ordered, counts, firings.rows, limits.parents)
    return Candidates(pairs, pmi, pairs.above(counts, limits.lift), covers, int(possible.sum()))


class Trial:
    """Tests of the covering pairs of one SAE's firings, under each of several orders of its latents.

    An order is the level of each latent [d_sae]; candidates are the covering pairs whose parent is of the child's level
    or of an earlier one. With sums over the rows on which the child fires, x' = x − b_dec, a activations and d unit
    decoder rows:
    - lift = coverage / max(chance, coverage by latents of the parent's firing rate); q from the binomial tail of the
      firings in common at that chance, over all pairs which the order allows.
    - mcs = Σ a_c a_p / √(Σ a_c² Σ a_p²) · max a_c / max a_p   (arXiv 2503.17547, appendix F).
    - gain = 1 − Σ ‖x' − a_p d_p − a_c d_c‖² / Σ ‖x' − a_p d_p‖²   (after the reconstruction condition of 2605.07922).
    - harm = Σ (‖r + a_p d_p‖² − ‖r‖²) / Σ ‖x'‖² of the residual r of all latents; z compares its mean with that of
      matched latents.
    Where coverage is below `limits.lift` · chance, the figures that need activations are NaN.
    """

    def __init__(
        self, sae: MatryoshkaSAE, firings: Firings, covering: Pairs, orders: Sequence[Array], limits: Limits
    ) -> None:
        self.firings, self.covering, self.limits = firings, covering, limits
        self.candidates = [candidates(covering, firings, level, limits) for level in orders]
        every = join([each.tested for each in self.candidates])
        _, once = np.unique(self._key(every), return_index=True)
        self.sum_up = SumUp(sae, firings, every.where(once), limits)  # one for all orders

    def _key(self, pairs: Pairs) -> Array:
        """Numbers that sort pairs by child, then parent."""
        return pairs.child * self.firings.d_sae + pairs.parent

    def edges(self) -> list[Edges]:
        """The edges of each order, once all rows were added to the sums."""
        sums = self.sum_up.sums()
        return [self._edges(each, sums) for each in self.candidates]

    def _edges(self, candidates: Candidates, s: Sums) -> Edges:
        pairs, above, limits = candidates.pairs, candidates.above, self.limits
        parent, child, counts, tested = pairs.parent, pairs.child, self.firings.counts, candidates.tested
        n, coverage = counts[child], pairs.both / counts[child]
        at = np.searchsorted(self._key(self.sum_up.pairs), self._key(tested))  # of each tested pair in the sums
        p, c, n_c = tested.parent, tested.child, counts[tested.child]
        largest, directions = self.firings.largest, self.sum_up.directions.numpy()
        # What a frequent latent covers by chance is no child of its own, nor between others.
        related = self.covering.where(self.covering.above(counts, limits.lift))
        harm = s.harm[at]
        error = np.sqrt(np.maximum(s.harm_square[at] / n_c - (harm / n_c) ** 2, 1e-30) / n_c)

        def of_all(values: Array) -> Array:
            figure = np.full(len(parent), np.nan)
            figure[above] = values
            return figure

        by_matched = tested.both / np.maximum(1e-12, s.matched_fires[at])
        explained = s.explains[c] - 2 * s.product[at] * s.cosine[at]
        f = {
            "coverage": coverage,
            "pmi": candidates.pmi,
            "lift": np.fmin(coverage / np.maximum(1e-12, pairs.chance), of_all(by_matched)),
            "q": false_discovery_rate(binom.sf(pairs.both - 1, n, pairs.chance), candidates.looked_at),
            "mcs": of_all(s.product[at] / np.sqrt(s.parent_square[at] * s.square[c]) * largest[c] / largest[p]),
            "gain": of_all(explained / (s.norm[c] - s.parent_explains[at])),
            "harm": of_all(harm / s.norm[c]),
            "z": of_all((harm - s.matched_harm[at]) / n_c / error),
            "covers": candidates.covers[parent],
            "reverse": pairs.both / counts[parent],
            "sibling": of_all(sibling_cosines(directions, related, p, c, candidates.covers <= limits.superparent)),
            "between": between(related, parent, child),
        }
        passed = {key: TESTS[key].passes(f[key], limits) for key in LINES if key in f}
        f["rank"] = ranks(f["mcs"], child, np.logical_and.reduce(list(passed.values())))
        passed["rank"] = TESTS["rank"].passes(f["rank"], limits)
        assert list(f) == list(TESTS), "a figure without a test"
        return Edges(parent, child, n - pairs.both, f, passed, candidates.looked_at)


def grade(rows: Readable, trials: Sequence[Trial]) -> list[list[Edges]]:
    """The edges of each trial and order: one pass over the rows of the firings, whose codes are known by now."""
    if any(len(trial.sum_up.pairs.child) for trial in trials):
        start = 0
        for x in rows.read("test"):
            for trial in trials:
                trial.sum_up.add(start, x)
            start += len(x)
    return [trial.edges() for trial in trials]


def find_edges(sae: MatryoshkaSAE, rows: Readable, firings: Firings, limits: Limits) -> Edges:
    """The edges between an SAE's latents by all tests, without controls; the firings are of these rows."""
    covering = covering_pairs(firings, limits.coverage, limits.least)
    ((edges,),) = grade(rows, [Trial(sae, firings, covering, [levels(sae.prefixes)], limits)])
    return edges


def levels(prefixes: Sequence[int]) -> Array:
    """The first prefix that holds each latent [d_sae]: 0, 1, …"""
    return np.searchsorted(prefixes, np.arange(prefixes[-1]), side="right")


def highest(pairs: Pairs, counts: Array, rows: int, parents: int) -> tuple[Pairs, Array]:
    """The few parents of each child with the highest PMI = log₂ n_both rows / (n_parent n_child), and their PMI."""
    pmi = np.log2(pairs.both * rows / (counts[pairs.parent] * counts[pairs.child]).astype(np.float64))
    order = np.lexsort((-pmi, pairs.child))
    order = order[place_in_run(pairs.child[order]) < parents]
    return pairs.where(order), pmi[order]


def place_in_run(ascending: Array) -> Array:
    """0, 1, … within each run of equal values."""
    return np.arange(len(ascending)) - np.searchsorted(ascending, ascending)


def sibling_cosines(directions: Array, pairs: Pairs, parent: Array, child: Array, asked: Array) -> Array:
    """The highest cosine of each child with another latent that its parent covers, both without the parent's direction.

    Children of one parent share what lies between them and it: a level that has no latent of its own, or whose latent
    they have absorbed. Only for the parents in `asked` [d_sae], the others have NaN; −1 for an only child.
    """
    cosines = np.full(len(parent), np.nan)
    order, edges = np.argsort(pairs.parent, kind="stable"), np.argsort(parent, kind="stable")
    for p in np.unique(parent[asked[parent]]):
        covered = pairs.child[order[slice(*np.searchsorted(pairs.parent, [p, p + 1], sorter=order))]]
        of_parent = edges[slice(*np.searchsorted(parent, [p, p + 1], sorter=edges))]
        for start in range(0, len(of_parent), CHILDREN):
            tested = of_parent[start : start + CHILDREN]
            a, b = (without(directions[latents], directions[p]) for latents in (child[tested], covered))
            cosine = a @ b.T
            cosine[child[tested][:, None] == covered[None]] = -1
            cosines[tested] = cosine.max(axis=1, initial=-1)
    return cosines


def without(rows: Array, direction: Array) -> Array:
    """Unit rows [n, d] with a unit direction taken out, at unit length again."""
    rest = rows - np.outer(rows @ direction, direction)
    return rest / np.maximum(1e-12, np.linalg.norm(rest, axis=1, keepdims=True))


def between(pairs: Pairs, parent: Array, child: Array) -> Array:
    """How many latents cover the child and are covered by the parent, whatever their levels [edges]."""
    known = set(zip(pairs.parent.tolist(), pairs.child.tolist(), strict=True))
    above: dict[int, list[int]] = {}
    for p, c in known:
        above.setdefault(c, []).append(p)
    edges = zip(parent.tolist(), child.tolist(), strict=True)
    return np.array([sum((p, q) in known for q in above.get(c, [])) for p, c in edges], dtype=np.int64)


def ranks(score: Array, child: Array, passing: Array) -> Array:
    """The place of each `passing` edge among those of its child, the highest score first; 0 for the others."""
    rank = np.zeros(len(child), dtype=np.int64)
    order = np.lexsort((-score, child))
    order = order[passing[order]]
    rank[order] = 1 + place_in_run(child[order])
    return rank
