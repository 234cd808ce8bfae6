"""Sums over the rows on which a child fires, of what its parents and the latents like them do there."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from msae.hierarchy.firings import Array, Firings
from msae.hierarchy.limits import Limits
from msae.hierarchy.pairs import Pairs, rate_groups
from msae.sae import MatryoshkaSAE

ROWS = 1024  # whose parents are looked up at once


@dataclass
class Sums:
    """Sums over the rows on which a pair's child fires, in the notation of `Trial`.

    Of each pair: Σ a_p², Σ a_c a_p, Σ (‖x'‖² − ‖x' − a_p d_p‖²), Σ harm, Σ harm², and of the latents that fire about
    as often as the parent, parent and child left out, their firings and their harm, a latent. Of each child, over the
    rows on which it fires: Σ a², Σ ‖x'‖², Σ (‖x'‖² − ‖x' − a d‖²). And of each pair d_p · d_c.
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
    cosine: Array


class SumUp:
    """Adds up the `Sums` of pairs, which are sorted by child, batch by batch of the rows of the firings."""

    def __init__(self, sae: MatryoshkaSAE, firings: Firings, pairs: Pairs, limits: Limits) -> None:
        assert (np.diff(pairs.child) >= 0).all(), "pairs are sorted by child"
        self.firings, self.pairs, d_sae = firings, pairs, firings.d_sae
        self.directions = normalize(sae.W_dec.detach().float().cpu(), dim=1)
        self.b_dec = sae.unscale(sae.b_dec.detach().float()).cpu()
        self.first_pair = torch.from_numpy(np.searchsorted(pairs.child, np.arange(d_sae + 1)))
        self.is_child = self.first_pair.diff() > 0
        parents, column = (torch.from_numpy(a) for a in np.unique(pairs.parent, return_inverse=True))
        self.column = column  # of each pair's parent among the parents
        self.column_of = torch.full((d_sae,), -1).index_put_((parents,), torch.arange(len(parents)))
        self.entry_of = torch.full((ROWS, max(1, len(parents))), -1, dtype=torch.int32)  # of each parent on each row
        self.group = torch.from_numpy(rate_groups(firings.counts, limits.matched, limits.least))
        self.n_groups = int(self.group.max()) + 1
        self.parent_group = self.group[torch.from_numpy(pairs.parent)]
        self.of_pairs = torch.zeros(7, len(pairs.child), dtype=torch.float64)
        self.of_latents = torch.zeros(4, d_sae, dtype=torch.float64)

    @torch.no_grad()
    def add(self, start: int, x: Tensor) -> None:
        """Add the rows x [rows, d_in], which are those of the firings from `start` on."""
        for rows in x.float().cpu().split(ROWS):
            code = self.firings.code
            offsets = code.offsets[start : start + len(rows) + 1]
            entries = slice(int(offsets[0]), int(offsets[-1]))
            self._add(rows, offsets.diff(), code.latents[entries], code.acts[entries])
            start += len(rows)

    def _add(self, x: Tensor, counts: Tensor, latent: Tensor, a: Tensor) -> None:
        """Add rows [n, d_in] with `counts` [n] entries each."""
        row = torch.arange(len(x)).repeat_interleave(counts)
        has_child = torch.zeros(len(x), dtype=torch.bool).index_fill_(0, row[self.is_child[latent]], True)
        if not has_child.all():  # of strangers few rows are needed
            kept = has_child[row]
            x, counts, latent, a = x[has_child], counts[has_child], latent[kept], a[kept]
            row = torch.arange(len(x)).repeat_interleave(counts)
        if not len(latent):
            return
        x, ends = x - self.b_dec, counts.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends]).int()
        recon = embedding_bag(latent, self.directions, offsets[:-1], mode="sum", per_sample_weights=a)
        square = a.square()
        explains = 2 * a * products(x, self.directions, offsets, latent) - square
        harm = 2 * a * products(x - recon, self.directions, offsets, latent) + square
        add_to(self.of_latents, latent, (square, x.square().sum(1)[row], explains, harm))
        self._add_pairs(row, latent.long(), len(x), torch.stack([a, explains, harm]))

    def _add_pairs(self, row: Tensor, latent: Tensor, rows: int, values: Tensor) -> None:
        """Add to each pair what its parent, and the parent's group, do on the rows on which its child fires."""
        a, _, harm = values
        groups = torch.zeros(2, rows * self.n_groups)
        add_to(groups, row * self.n_groups + self.group[latent], (torch.ones_like(a), harm))
        entry, pair = pairs_of(latent, self.first_pair)
        child_row = row[entry]
        add_to(self.of_pairs[5:], pair, groups[:, child_row * self.n_groups + self.parent_group[pair]])

        parents = (self.column_of[latent] >= 0).nonzero().flatten()
        cell = row[parents] * self.entry_of.shape[1] + self.column_of[latent[parents]]
        entry_of = self.entry_of.view(-1)
        entry_of[cell] = parents.int()
        above = entry_of[child_row * self.entry_of.shape[1] + self.column[pair]]
        entry_of[cell] = -1
        fires = (above >= 0).nonzero().flatten()
        entry, pair, above = entry[fires], pair[fires], above[fires].long()
        a_p, explains_p, harm_p = values[:, above]
        add_to(self.of_pairs[:5], pair, (a_p.square(), a_p * a[entry], explains_p, harm_p, harm_p.square()))

    def sums(self) -> Sums:
        """The sums over all rows that were added."""
        pairs, counts = self.pairs, self.firings.counts
        square, norm, explains, harm = self.of_latents.numpy()
        of_parents, (fires, harms) = self.of_pairs[:5].numpy(), self.of_pairs[5:].numpy()
        parent_group, child_group = self.parent_group.numpy(), self.group.numpy()[pairs.child]
        same = parent_group == child_group  # parent and child are no match of the parent
        group_size = self.group.bincount(minlength=self.n_groups).numpy()
        matched = np.maximum(1, group_size[parent_group] - 1 - same)
        fires = (fires - pairs.both - same * counts[pairs.child]) / matched
        harms = (harms - of_parents[3] - same * harm[pairs.child]) / matched
        latents = torch.from_numpy(pairs.parent).int()
        cosine = products(self.directions, self.directions, self.first_pair.int(), latents).numpy()
        return Sums(*(*of_parents, fires, harms, square, norm, explains, cosine))


def add_to(totals: Tensor, index: Tensor, values: Iterable[Tensor]) -> None:
    """Add each of the values [n] to its total [m] at `index` [n]; in more than one dimension index_add_ is slow."""
    for total, some in zip(totals, values, strict=True):
        total.index_add_(0, index, some.to(total.dtype))


def products(rows: Tensor, directions: Tensor, offsets: Tensor, latents: Tensor) -> Tensor:
    """row · direction of each entry (row, latent) of a sparse matrix [rows, d_sae], by work that is sparse."""
    shape = (len(rows), len(directions))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        at = torch.sparse_csr_tensor(offsets, latents, torch.zeros(len(latents)), shape, check_invariants=False)
        return torch.sparse.sampled_addmm(at, rows, directions.T, beta=0.0).values()


def pairs_of(latent: Tensor, first_pair: Tensor) -> tuple[Tensor, Tensor]:
    """All (entry, pair) whose child is the entry's latent; the pairs of each child begin at its `first_pair`."""
    many = first_pair[latent + 1] - first_pair[latent]
    entry = torch.arange(len(latent)).repeat_interleave(many)
    return entry, torch.arange(len(entry)) - (many.cumsum(0) - many)[entry] + first_pair[latent][entry]
