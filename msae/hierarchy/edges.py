"""Candidate edges parent → child between the latents of one SAE, and attempts to refute each of them.

All figures follow from which latents fire together and from what they reconstruct; none knows the truth.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch.nn.functional import embedding_bag, normalize

from msae.data.shards import Shards
from msae.hierarchy.firings import Array, Firings, read
from msae.hierarchy.limits import TESTS, Limits
from msae.hierarchy.pairs import Pairs, eligible, false_discovery_rate, rate_groups
from msae.progress import progress
from msae.sae import MatryoshkaSAE

ROWS = 1024  # rows whose activations are looked at once


@dataclass
class Edges:
    """Candidate edges [n]: a figure for each of TESTS, and for those with a line whether it is passed."""

    parent: Array
    child: Array
    holes: Array  # rows on which the child fires and the parent does not
    figures: dict[str, Array]
    passed: dict[str, Array]
    looked_at: int

    @property
    def survives(self) -> Array:
        """Edges that no test refutes [n]; a child has at most one."""
        survives: Array = np.logical_and.reduce(list(self.passed.values()))
        return survives

    def funnel(self) -> dict[str, int]:
        """How many are left after each test, one after the other."""
        left, counts = np.ones(len(self.parent), dtype=bool), {"pairs": self.looked_at}
        for key, passed in self.passed.items():
            left = left & passed
            counts[key] = int(left.sum())
        return counts

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
    counts, rows = firings.counts(), firings.rows
    could = eligible(counts, level, limits.least)
    ordered = level[covering.parent] <= level[covering.child]
    covers = np.bincount(covering.parent[ordered], minlength=firings.d_sae) / np.maximum(1, could)
    pairs, pmi = highest(covering.where(ordered), counts, rows, limits.parents)
    parent, child, n = pairs.parent, pairs.child, counts[pairs.child]
    looked_at = max(len(parent), int(could.sum()))
    coverage = pairs.both / n
    # what a frequent latent covers by chance is no child of its own, nor between others, and not worth a pass
    above = pairs.above(counts, limits.lift)
    related = covering.where(covering.above(counts, limits.lift))
    tested = pairs.where(above)
    s = sum_up(sae, shards, firings, tested, limits)
    largest, directions = firings.largest(), normalize(sae.W_dec.detach().float().cpu(), dim=1).numpy()
    p, c, n_c = tested.parent, tested.child, counts[tested.child]
    cosine = np.fromiter((directions[a] @ directions[b] for a, b in zip(p, c, strict=True)), float, len(p))
    error = np.sqrt(np.maximum(s.harm_square / n_c - (s.harm / n_c) ** 2, 1e-30) / n_c)

    def placed(values: Array) -> Array:
        whole = np.full(len(parent), np.nan)
        whole[above] = values
        return whole

    lift = coverage / np.maximum(1e-12, pairs.chance)
    f = {
        "coverage": coverage,
        "pmi": pmi,
        "lift": np.fmin(lift, placed(tested.both / np.maximum(1e-12, s.matched_fires))),
        "q": false_discovery_rate(binom.sf(pairs.both - 1, n, pairs.chance), looked_at),
        "mcs": placed(s.product / np.sqrt(s.parent_square * s.square[c]) * largest[c] / largest[p]),
        "gain": placed((s.explains[c] - 2 * s.product * cosine) / (s.norm[c] - s.parent_explains)),
        "harm": placed(s.harm / s.norm[c]),
        "z": placed((s.harm - s.matched_harm) / n_c / error),
        "covers": covers[parent],
        "reverse": pairs.both / counts[parent],
        "sibling": placed(sibling_cosines(directions, related, p, c, covers <= limits.superparent)),
        "between": between(related, parent, child),
    }
    passed = {
        "coverage": pairs.both >= limits.coverage * n,
        "lift": f["lift"] >= limits.lift,
        "q": f["q"] <= limits.fdr,
        "mcs": f["mcs"] >= limits.mcs,
        "gain": f["gain"] >= limits.gain,
        "z": f["z"] >= limits.z,
        "covers": f["covers"] <= limits.superparent,
        "reverse": f["reverse"] < limits.coverage,
        "sibling": f["sibling"] < limits.sibling,
        "between": f["between"] == 0,
    }
    f["rank"] = ranks(f["mcs"], child, np.logical_and.reduce(list(passed.values())))
    passed["rank"] = f["rank"] == 1
    assert list(f) == list(TESTS), "a figure without a test"
    return Edges(parent, child, n - pairs.both, f, passed, looked_at)


def highest(pairs: Pairs, counts: Array, rows: int, parents: int) -> tuple[Pairs, Array]:
    """The few parents of each child with the highest PMI = log₂ n_both rows / (n_parent n_child), and these."""
    pmi = np.log2(pairs.both * rows / (counts[pairs.parent] * counts[pairs.child]).astype(np.float64))
    order = np.lexsort((-pmi, pairs.child))
    child = pairs.child[order]
    order = order[np.arange(len(child)) - np.searchsorted(child, child) < parents]
    return pairs.where(order), pmi[order]


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
    """One pass over the rows, whose activations are known by now."""
    d_sae, matrix, counts = firings.d_sae, firings.matrix, firings.counts()
    order = np.argsort(pairs.child, kind="stable")
    parents, column = np.unique(pairs.parent[order], return_inverse=True)
    partner = torch.from_numpy(column)
    first = torch.from_numpy(np.searchsorted(pairs.child[order], np.arange(d_sae + 1)))
    group = torch.from_numpy(rate_groups(counts, limits.matched, limits.least))
    n_groups = int(group.max()) + 1
    partner_group = group[torch.from_numpy(parents)][partner]
    place = torch.full((d_sae,), -1)
    place[torch.from_numpy(parents)] = torch.arange(len(parents))
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
                offsets = torch.from_numpy(matrix.indptr[start : start + len(x) + 1]).long()
                span = slice(int(offsets[0]), int(offsets[-1]))
                latent, a = torch.from_numpy(matrix.indices[span]).long(), torch.from_numpy(matrix.data[span])
                row = torch.arange(len(x)).repeat_interleave(offsets.diff())
                x = x - b_dec
                first_of = offsets[:-1] - offsets[0]
                left = x - embedding_bag(latent, directions, first_of, mode="sum", per_sample_weights=a)
                d = directions[latent]
                explains = 2 * a * (x[row] * d).sum(1) - a.square()
                harm = 2 * a * (left[row] * d).sum(1) + a.square()
                for i, of in enumerate((a.square(), x.square().sum(1)[row], explains)):
                    of_latents[i].index_add_(0, latent, of.double())
                # what parents and groups of latents do on each row, looked up where a child fires
                of_parents, of_groups = torch.zeros(3, len(x), len(parents)), torch.zeros(2, len(x), n_groups)
                known = place[latent] >= 0
                of_parents[:, row[known], place[latent[known]]] = torch.stack([a, explains, harm])[:, known]
                where = row * n_groups + group[latent]
                of_groups.view(2, -1).index_add_(1, where, torch.stack([torch.ones_like(a), harm]))
                many = first[latent + 1] - first[latent]
                entry = torch.arange(len(latent)).repeat_interleave(many)
                pair = torch.arange(len(entry)) - (many.cumsum(0) - many)[entry] + first[latent][entry]
                at = row[entry]
                a_p, e_p, h_p = of_parents[:, at, partner[pair]]
                fires, hurts = of_groups[:, at, partner_group[pair]]
                own = group[latent][entry] == partner_group[pair]  # parent and child are no match of the parent
                fires = fires - (a_p > 0).float() - own.float()
                hurts = hurts - h_p - own * harm[entry]
                for i, of in enumerate((a_p.square(), a_p * a[entry], e_p, h_p, h_p.square(), fires, hurts)):
                    of_pairs[i].index_add_(0, pair, of.double())
                start += len(x)
                bar.update(len(x))
    back = torch.empty_like(of_pairs)
    back[:, torch.from_numpy(order)] = of_pairs
    size = group.bincount(minlength=n_groups).numpy()
    parent_group, child_group = group.numpy()[pairs.parent], group.numpy()[pairs.child]
    back[5:] /= torch.from_numpy(np.maximum(1, size[parent_group] - 1 - (parent_group == child_group)))
    return Sums(*back.numpy(), *of_latents.numpy())


def sibling_cosines(directions: Array, pairs: Pairs, parent: Array, child: Array, wanted: Array) -> Array:
    """The highest cosine of each child with another latent that its parent covers, both without the parent's direction.

    Children of one parent share what lies between them and it: a level that has no latent of its own, or whose latent
    they have absorbed. Only for the parents in `wanted` [d_sae], the others have NaN; −1 for an only child.
    """
    found = np.full(len(parent), np.nan)
    order, edges = np.argsort(pairs.parent, kind="stable"), np.argsort(parent, kind="stable")
    for p in np.unique(parent[wanted[parent]]):
        covered = pairs.child[order[slice(*np.searchsorted(pairs.parent, [p, p + 1], sorter=order))]]
        mine = edges[slice(*np.searchsorted(parent, [p, p + 1], sorter=edges))]
        for start in range(0, len(mine), 1024):
            tested = mine[start : start + 1024]
            a, b = (without(directions[of], directions[p]) for of in (child[tested], covered))
            cosine = a @ b.T
            cosine[child[tested][:, None] == covered[None]] = -1
            found[tested] = cosine.max(axis=1, initial=-1)
    return found


def without(rows: Array, direction: Array) -> Array:
    """Unit rows [n, d] with a unit direction taken out."""
    left = rows - np.outer(rows @ direction, direction)
    return left / np.maximum(1e-12, np.linalg.norm(left, axis=1, keepdims=True))


def between(pairs: Pairs, parent: Array, child: Array) -> Array:
    """How many latents cover the child and are covered by the parent, whatever their levels [edges]."""
    found = set(zip(pairs.parent.tolist(), pairs.child.tolist(), strict=True))
    above: dict[int, list[int]] = {}
    for p, c in found:
        above.setdefault(c, []).append(p)
    edges = zip(parent.tolist(), child.tolist(), strict=True)
    return np.array([sum((p, q) in found for q in above.get(c, []) if q != p) for p, c in edges], dtype=np.int64)


def ranks(score: Array, child: Array, left: Array) -> Array:
    """The place of each edge in `left` among those of its child, the highest score first; 0 for the others."""
    rank = np.zeros(len(child), dtype=np.int64)
    order = np.lexsort((-score, child))
    order = order[left[order]]
    rank[order] = 1 + np.arange(len(order)) - np.searchsorted(child[order], child[order])
    return rank
