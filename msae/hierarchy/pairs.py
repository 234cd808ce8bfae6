"""Which latents fire together: every pair of which one covers the other, and what chance would make of it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch

from msae.hierarchy.firings import Array, Firings
from msae.progress import progress

CHILDREN = 512  # whose pairs are counted at once: [CHILDREN, d_sae] at most, never d_sae²


@dataclass
class Pairs:
    """Covering pairs: parent and child [n], rows on which both fire, P(a chance parent | child)."""

    parent: Array
    child: Array
    both: Array
    chance: Array

    def where(self, keep: Array) -> "Pairs":
        """Those pairs alone, by mask or in an order."""
        return Pairs(*(getattr(self, field.name)[keep] for field in fields(self)))

    def above(self, counts: Array, lift: float) -> Array:
        """Which pairs fire together at least `lift` times as often as chance has it; `counts` [d_sae] are firings."""
        return self.both >= lift * self.chance * counts[self.child]


def join(pairs: Sequence[Pairs]) -> Pairs:
    """All of these pairs, one after the other."""
    return Pairs(*(np.concatenate([getattr(each, field.name) for each in pairs]) for field in fields(Pairs)))


def covering_pairs(firings: Firings, coverage: float, least: int) -> Pairs:
    """Every pair with P(parent | child) ≥ `coverage` whose parent fires more often, whatever their levels.

    chance = n_parent Σ_child (L0 − 1) / (Σ L0 − n_child) / n_child: the share of the child's rows on which a latent of
    the parent's rate fires when the other active latents of a row are drawn by their rates (the configuration model
    of random graphs). So a row on which much is active counts for less than one on which little is.
    """
    counts, fires = firings.counts, firings.fires
    columns = fires.T.tocsr()

    def covered(start: int) -> Array:
        together = (columns[start : start + CHILDREN] @ fires).tocoo()
        child, parent, both = together.coords[0] + start, together.coords[1], together.data
        covers = (counts[child] >= least) & (counts[parent] > counts[child]) & (both >= coverage * counts[child])
        return np.stack([parent[covers], child[covers], both[covers]]).astype(np.int64)

    starts, parts = range(0, firings.d_sae, CHILDREN), list[Array]()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, progress(firings.d_sae, "pairs", unit="latents") as bar:
        for start, part in zip(starts, pool.map(covered, starts), strict=True):
            parts.append(part)
            bar.update(min(CHILDREN, firings.d_sae - start))
    parent, child, both = np.concatenate(parts, axis=1)
    others = fires.T @ (np.diff(fires.indptr) - 1.0)  # Σ (L0 − 1) over the rows on which each latent fires
    slots = np.maximum(1.0, fires.nnz - counts[child])
    chance = counts[parent] * others[child] / slots / np.maximum(1, counts[child])
    return Pairs(parent, child, both, np.minimum(1.0, chance))


def eligible(counts: Array, level: Array, least: int) -> Array:
    """How many children each latent could have [d_sae]: of its level or a later one, alive, firing less often."""
    alive = counts >= least
    children = np.zeros(len(counts), dtype=np.int64)
    for lowest in np.unique(level):
        rates = np.sort(counts[alive & (level >= lowest)])
        parents = alive & (level == lowest)
        children[parents] = np.searchsorted(rates, counts[parents])
    return children


def false_discovery_rate(p: Array, looked_at: int) -> Array:
    """Benjamini–Yekutieli q of these p-values, the smallest of `looked_at` that depend on each other in any way.

    q_(i) = min_{j ≥ i} p_(j) · m Σ_{k ≤ m} 1/k / j with m = looked_at. A pair that is no candidate counts as p = 1.
    """
    assert len(p) <= looked_at, f"{len(p)} p-values of {looked_at}"
    order = np.argsort(p, kind="stable")
    harmonic = (1 / np.arange(1, looked_at + 1)).sum()
    scaled = p[order] * looked_at * harmonic / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return q


def rate_groups(counts: Array, size: int, least: int) -> Array:
    """Groups of about `size` latents of neighbouring firing rates [d_sae]; those that hardly fire have groups too."""
    order = np.argsort(-counts, kind="stable")
    n = max(1, int((counts >= least).sum()))
    groups = max(1, n // size)
    group = np.empty(len(counts), dtype=np.int64)
    group[order] = np.minimum(np.arange(len(counts)) * groups // n, groups)
    return group
