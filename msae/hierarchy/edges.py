"""Candidate edges parent → child between the latents of one SAE, and attempts to refute each of them.

All figures follow from which latents fire together and from what they reconstruct; none knows the truth.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from msae.data.shards import Shards
from msae.hierarchy.firings import Array, Firings, read
from msae.hierarchy.limits import LINES, TESTS, Limits
from msae.hierarchy.pairs import Pairs, eligible, false_discovery_rate, rate_groups
from msae.progress import progress
from msae.sae import MatryoshkaSAE

ROWS = 1024  # rows whose activations are read at once
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


def grade(sae: MatryoshkaSAE, shards: Shards, firings: Firings, covering: Pairs, level: Array, limits: Limits) -> Edges:
    """Test every candidate: the covering pairs whose parent is of the child's level or of an earlier one.

    With sums over the rows on which the child fires, x' = x − b_dec, a activations and d unit decoder rows:
    - lift = coverage / max(chance, coverage by latents of the parent's firing rate); q from the binomial tail of the
      firings in common at that chance, over all pairs which the order allows.
    - mcs = Σ a_c a_p / √(Σ a_c² Σ a_p²) · max a_c / max a_p   (arXiv 2503.17547, appendix F).
    - gain = 1 − Σ ‖x' − a_p d_p − a_c d_c‖² / Σ ‖x' − a_p d_p‖²   (after the reconstruction condition of 2605.07922).
    - harm = Σ (‖r + a_p d_p‖² − ‖r‖²) / Σ ‖x'‖² of the residual r of all latents; z compares its mean with that of
      matched latents.
    Where coverage is below `limits.lift` · chance, the figures that need activations are NaN.
    """
    counts = firings.counts
    ordered = covering.where(level[covering.parent] <= level[covering.child])
    possible = eligible(counts, level, limits.least)
    covers = np.bincount(ordered.parent, minlength=firings.d_sae) / np.maximum(1, possible)
    pairs, pmi = highest(ordered, counts, firings.rows, limits.parents)
    parent, child, n = pairs.parent, pairs.child, counts[pairs.child]
    looked_at = int(possible.sum())
    coverage = pairs.both / n
    # What a frequent latent covers by chance is no child of its own, nor between others, and not worth a pass.
    above = pairs.above(counts, limits.lift)
    related = covering.where(covering.above(counts, limits.lift))
    tested = pairs.where(above)
    s = sum_up(sae, shards, firings, tested, limits)
    largest, directions = firings.largest, normalize(sae.W_dec.detach().float().cpu(), dim=1).numpy()
    p, c, n_c = tested.parent, tested.child, counts[tested.child]
    cosine = np.fromiter((directions[a] @ directions[b] for a, b in zip(p, c, strict=True)), float, len(p))
    error = np.sqrt(np.maximum(s.harm_square / n_c - (s.harm / n_c) ** 2, 1e-30) / n_c)

    def of_all(values: Array) -> Array:
        figure = np.full(len(parent), np.nan)
        figure[above] = values
        return figure

    f = {
        "coverage": coverage,
        "pmi": pmi,
        "lift": np.fmin(
            coverage / np.maximum(1e-12, pairs.chance), of_all(tested.both / np.maximum(1e-12, s.matched_fires))
        ),
        "q": false_discovery_rate(binom.sf(pairs.both - 1, n, pairs.chance), looked_at),
        "mcs": of_all(s.product / np.sqrt(s.parent_square * s.square[c]) * largest[c] / largest[p]),
        "gain": of_all((s.explains[c] - 2 * s.product * cosine) / (s.norm[c] - s.parent_explains)),
        "harm": of_all(s.harm / s.norm[c]),
        "z": of_all((s.harm - s.matched_harm) / n_c / error),
        "covers": covers[parent],
        "reverse": pairs.both / counts[parent],
        "sibling": of_all(sibling_cosines(directions, related, p, c, covers <= limits.superparent)),
        "between": between(related, parent, child),
    }
    passed = {key: TESTS[key].passes(f[key], limits) for key in LINES if key in f}
    f["rank"] = ranks(f["mcs"], child, np.logical_and.reduce(list(passed.values())))
    passed["rank"] = TESTS["rank"].passes(f["rank"], limits)
    assert list(f) == list(TESTS), "a figure without a test"
    return Edges(parent, child, n - pairs.both, f, passed, looked_at)


def highest(pairs: Pairs, counts: Array, rows: int, parents: int) -> tuple[Pairs, Array]:
    """The few parents of each child with the highest PMI = log₂ n_both rows / (n_parent n_child), and their PMI."""
    pmi = np.log2(pairs.both * rows / (counts[pairs.parent] * counts[pairs.child]).astype(np.float64))
    order = np.lexsort((-pmi, pairs.child))
    order = order[place_in_run(pairs.child[order]) < parents]
    return pairs.where(order), pmi[order]


def place_in_run(ascending: Array) -> Array:
    """0, 1, … within each run of equal values."""
    return np.arange(len(ascending)) - np.searchsorted(ascending, ascending)


@dataclass
class Sums:
    """Sums over the rows on which a pair's child fires, in the notation of `grade`.

    Of each pair: Σ a_p², Σ a_c a_p, Σ (‖x'‖² − ‖x' − a_p d_p‖²), Σ harm, Σ harm², and of the latents that fire about
    as often as the parent, parent and child left out, their firings and their harm, a latent. Of each latent, over the
    rows on which it fires: Σ a², Σ ‖x'‖², Σ (‖x'‖² − ‖x' − a d‖²).
    """

    parent_square: Array
    product: Array
    parent_explains: Array
    harm: Array
    harm_square: Array
    matched_fires: Array
    matched_harm: Array
    square: Array
    norm: Array
    explains: Array


@torch.no_grad()
def sum_up(sae: MatryoshkaSAE, shards: Shards, firings: Firings, pairs: Pairs, limits: Limits) -> Sums:
    """One pass over the rows, whose codes are known by now; pairs are sorted by child."""
    d_sae, code = firings.d_sae, firings.code
    assert (np.diff(pairs.child) >= 0).all(), "pairs are sorted by child"
    first_pair = torch.from_numpy(np.searchsorted(pairs.child, np.arange(d_sae + 1)))
    parents, column = (torch.from_numpy(a) for a in np.unique(pairs.parent, return_inverse=True))
    column_of = torch.full((d_sae,), -1).index_put_((parents,), torch.arange(len(parents)))
    group = torch.from_numpy(rate_groups(firings.counts, limits.matched, limits.least))
    n_groups = int(group.max()) + 1
    parent_group = group[parents][column]
    directions = normalize(sae.W_dec.detach().float().cpu(), dim=1)
    b_dec = sae.unscale(sae.b_dec.detach().float()).cpu()
    of_pairs = torch.zeros(7, len(pairs.child), dtype=torch.float64)
    of_latents = torch.zeros(3, d_sae, dtype=torch.float64)
    if not len(pairs.child):
        return Sums(*of_pairs.numpy(), *of_latents.numpy())
    with progress(firings.rows, "test") as bar:
        for piece in firings.pieces:
            start = piece.start
            for x in read(shards, piece, ROWS):
                offsets = code.offsets[start : start + len(x) + 1]
                entries = slice(int(offsets[0]), int(offsets[-1]))
                latent, a = code.latents[entries].long(), code.acts[entries]
                row = torch.arange(len(x)).repeat_interleave(offsets.diff())
                x = x - b_dec
                recon = embedding_bag(latent, directions, offsets[:-1] - offsets[0], mode="sum", per_sample_weights=a)
                residual = x - recon
                d = directions[latent]
                explains = 2 * a * (x[row] * d).sum(1) - a.square()
                harm = 2 * a * (residual[row] * d).sum(1) + a.square()
                for total, values in zip(of_latents, (a.square(), x.square().sum(1)[row], explains), strict=True):
                    total.index_add_(0, latent, values.double())
                # What parents and groups of latents do on each row, to be looked up where a child fires.
                of_parents, of_groups = torch.zeros(3, len(x), len(parents)), torch.zeros(2, len(x), n_groups)
                is_parent = column_of[latent] >= 0
                at, to = row[is_parent], column_of[latent[is_parent]]
                of_parents[:, at, to] = torch.stack([a, explains, harm])[:, is_parent]
                flat = row * n_groups + group[latent]
                of_groups.view(2, -1).index_add_(1, flat, torch.stack([torch.ones_like(a), harm]))
                entry, pair = pairs_of(latent, first_pair)
                a_p, explains_p, harm_p = of_parents[:, row[entry], column[pair]]
                fires, harms = of_groups[:, row[entry], parent_group[pair]]
                same_group = group[latent][entry] == parent_group[pair]  # parent and child are no match of the parent
                fires = fires - (a_p > 0).float() - same_group.float()
                harms = harms - harm_p - same_group * harm[entry]
                sums = (a_p.square(), a_p * a[entry], explains_p, harm_p, harm_p.square(), fires, harms)
                for total, values in zip(of_pairs, sums, strict=True):
                    total.index_add_(0, pair, values.double())
                start += len(x)
                bar.update(len(x))
    group_size, child_group = group.bincount(minlength=n_groups), group[torch.from_numpy(pairs.child)]
    of_pairs[5:] /= (group_size[parent_group] - 1 - (parent_group == child_group).long()).clamp_min(1)
    return Sums(*of_pairs.numpy(), *of_latents.numpy())


def pairs_of(latent: Tensor, first_pair: Tensor) -> tuple[Tensor, Tensor]:
    """All (entry, pair) whose child is the entry's latent; the pairs of each child begin at its `first_pair`."""
    many = first_pair[latent + 1] - first_pair[latent]
    entry = torch.arange(len(latent)).repeat_interleave(many)
    return entry, torch.arange(len(entry)) - (many.cumsum(0) - many)[entry] + first_pair[latent][entry]


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
