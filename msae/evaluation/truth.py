"""Against known features: which are recovered, by which latents, and whether a parent falls silent under its child."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from msae.evaluation.matching import (
    CANDIDATES,
    Match,
    match,
    mcc,
    mcc_chance,
    mmcs,
    nearest,
    pair_cosines,
    uniqueness,
)
from msae.sae import MatryoshkaSAE, encode_sparse

BLOCK = 2**24  # activations held densely at once
RECOVERED = 0.5  # |cos| from which a feature counts as recovered: an absorbed child's is still 1/√2


class Codes(NamedTuple):
    """The active entries of a [rows, size] matrix, each once; values are activation · ‖direction‖."""

    row: Int[Tensor, " entries"]
    index: Int[Tensor, " entries"]  # type: ignore[assignment]  # not tuple's method
    value: Float[Tensor, " entries"]
    rows: int
    size: int

    def where(self, keep: Bool[Tensor, " entries"]) -> "Codes":
        """Those entries alone."""
        return Codes(self.row[keep], self.index[keep], self.value[keep], self.rows, self.size)

    def also_in(self, other: "Codes") -> Bool[Tensor, " entries"]:
        """Which entries are active in the other codes too."""
        return torch.isin(self.row * self.size + self.index, other.row * other.size + other.index)

    def row_counts(self) -> Float[Tensor, " size"]:
        """Rows in which each index is active."""
        return self.index.bincount(minlength=self.size).double()


def true_codes(truth: dict[str, Tensor], start: int = 0, rows: int | None = None) -> Codes:
    """The held-out rows' true activations from row `start` on, from the CSR of `truth`."""
    stop = len(truth["offsets"]) if rows is None else start + rows + 1
    offsets = truth["offsets"][start:stop]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    feature, norm = truth["feature"][entries].long(), truth["features"].float().norm(dim=1)
    row = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    return Codes(row, feature, truth["value"][entries] * norm[feature], len(offsets) - 1, len(norm))


@torch.no_grad()
def latent_codes(sae: MatryoshkaSAE, batches: Tensor | Iterable[Tensor]) -> Codes:
    """The latents active at inference on rows [rows, d_in], or on batches of them; `BLOCK` activations are dense."""
    norm = (1 if sae.rescale_acts_by_decoder_norm else sae.W_dec.norm(dim=1)) / sae.target_scale
    norm = norm.expand(sae.d_sae)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    rows = 0
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        for x in batch.split(max(1, BLOCK // sae.d_sae)):
            row, latent, acts = encode_sparse(sae, x.to(sae.W_dec))
            parts.append(((row + rows).cpu(), latent.cpu(), (acts * norm[latent]).float().cpu()))
            rows += len(x)
    row, latent, value = (torch.cat(part) for part in zip(*parts, strict=True))
    return Codes(row, latent, value, rows, sae.d_sae)


def firing(codes: Codes, floor: float = 0.05) -> Codes:
    """The entries that exceed `floor` of their latent's own maximum."""
    most = torch.zeros(codes.size).scatter_reduce_(0, codes.index, codes.value, "amax")
    return codes.where(codes.value > floor * most[codes.index])


def at_features(codes: Codes, found: Match, n: int) -> Codes:
    """Latents' codes [rows, d_sae] as codes [rows, n] of the features they are matched to; the others are left out."""
    feature = found.feature_of(codes.size)[codes.index]
    return Codes(codes.row, feature, codes.value, codes.rows, n).where(feature >= 0)


# Below, `fires` are the codes of latents at their features, `active` the true ones, and parent −1 is a root.


def firing_scores(fires: Codes, active: Codes, features: Int[Tensor, " pairs"]) -> dict[str, float]:
    """Precision, recall and F1 of the matched latents' firing against these features' activity, macro-averaged.

    A latent that never fires has 0, but where its feature is never active either there is nothing to average.
    """
    hit, fired, true = (c.row_counts()[features] for c in (fires.where(fires.also_in(active)), fires, active))
    seen = fired + true > 0
    scores = {
        "firing_precision": hit / fired.clamp_min(1),
        "firing_recall": hit / true.clamp_min(1),
        "firing_f1": 2 * hit / (fired + true).clamp_min(1),
    }
    return {name: float(score[seen].mean()) for name, score in scores.items()}


def parent_silent_given_child(
    fires: Codes, active: Codes, parent: Int[Tensor, " n"], has_latent: Bool[Tensor, " n"] | None = None
) -> float:
    """P(parent's latent is silent | parent and child are active), the mean over edges: the absorption hole.

    Edges count where both features have a latent: what is absent is not absorbed. NaN without an edge or a row.
    """
    child = active.where(parent[active.index] >= 0)
    above = child._replace(index=parent[child.index])
    both = above.also_in(active)
    seen = child.where(both).row_counts()
    silent = child.where(both & ~above.also_in(fires)).row_counts()
    edges = seen > 0
    if has_latent is not None:
        edges &= has_latent & has_latent[parent]
    return float((silent / seen)[edges].mean())


def edge_share(parent: Int[Tensor, " n"], of: Bool[Tensor, " n"]) -> float:
    """The share of edges whose parent and child are both of these features."""
    children = (parent >= 0).nonzero().flatten()
    return float((of[children] & of[parent[children]]).double().mean())


def lean(
    W_dec: Float[Tensor, "d_sae d_in"],
    features: Float[Tensor, "n d_in"],
    found: Match,
    of: Int[Tensor, " edges"],
    towards: Int[Tensor, " edges"],
) -> Float[Tensor, " counted"]:
    """cos(latent of one feature, another feature) − cos(the two features), for each edge whose first has a latent.

    An exact latent has 0 whatever angle the features have. The sign of a decoder row counts as it is.
    """
    latent = found.latent_of(len(features))[of]
    of, towards, latent = of[latent >= 0], features[towards[latent >= 0]], latent[latent >= 0]
    return pair_cosines(W_dec[latent.to(W_dec.device)].cpu(), towards) - pair_cosines(features[of], towards)


def signed_parts(name: str, values: Float[Tensor, " edges"]) -> dict[str, float]:
    """The mean, and the means of the positive and of the negative part, which add up to it."""
    parts = {"": values, "_positive": values.clamp(min=0), "_negative": values.clamp(max=0)}
    return {name + part: float(value.double().mean()) for part, value in parts.items()}


def edges_by_firing(
    codes: Codes, coverage: float = 0.8, lift: float = 2.0, least: int = 10, block: int = 1024
) -> Int[Tensor, "edges 2"]:
    """Candidate edges (parent, child) among latents from their firing alone, at most one parent a child.

    P(parent fires | child fires) ≥ `coverage` and ≥ `lift` · P(parent fires), the parent fires more often, the child
    at least `least` times. Of several such parents the one that fires least often is the immediate one.
    """
    ones = np.ones(len(codes.row), dtype=np.int32)
    fires = csr_array((ones, (codes.row.numpy(), codes.index.numpy())), shape=(codes.rows, codes.size))
    columns, fired = fires.tocsc(), codes.row_counts().numpy()
    edges = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, codes.size, block):
        together = (columns[:, start : start + block].T @ fires).tocoo()
        child, parent, n = together.row + start, together.col, together.data
        keep = (fired[child] >= least) & (fired[parent] > fired[child]) & (n >= coverage * fired[child])
        keep &= n * codes.rows >= lift * fired[parent] * fired[child]
        child, parent, n = child[keep], parent[keep], n[keep]
        order = np.lexsort((-n, fired[parent], child))
        children, first = np.unique(child[order], return_index=True)
        edges.append(np.stack([parent[order][first], children], axis=1).astype(np.int64))
    return torch.from_numpy(np.concatenate(edges))


def edge_scores(edges: Int[Tensor, "edges 2"], found: Match, parent: Int[Tensor, " n"]) -> dict[str, float]:
    """Precision and recall of edges (parent, child) among latents against the true ones, through the matching.

    An edge with a latent that stands for no feature is wrong, a true one whose feature has no latent missed. NaN
    without any.
    """
    latent = found.latent_of(len(parent)).tolist()
    true = [(latent[above], latent[child]) for child, above in enumerate(parent.tolist()) if above >= 0]
    right = len(set(true) & {(a, b) for a, b in edges.tolist()})
    return {
        "edge_precision": right / len(edges) if len(edges) else float("nan"),
        "edge_recall": right / len(true) if true else float("nan"),
    }


def shrinkage(fires: Codes, active: Codes) -> float:
    """Σ a ‖W_dec row‖ / Σ value ‖feature‖ where the latent and its feature are both active (1: none shrinks)."""
    there = active.value[active.also_in(fires)].double().sum()
    return float(fires.value[fires.also_in(active)].double().sum() / there)


@torch.no_grad()
def truth_metrics(
    sae: MatryoshkaSAE,
    batches: Tensor | Iterable[Tensor],
    truth: dict[str, Tensor],
    start: int = 0,
    floor: float = 0.05,
) -> dict[str, float]:
    """Every figure of this file for rows [rows, d_in] or batches of them, which `truth` knows from row `start` on.

    `truth`: features [n, d_in], parent [n] (−1: a root), and the true activations as CSR (offsets, feature, value).
    A latent fires where it exceeds `floor` of its own maximum; `l0` counts all that are active.
    """
    W_dec, features, parent = sae.W_dec.detach(), truth["features"].float(), truth["parent"]
    n = len(features)
    near = nearest(W_dec, features, CANDIDATES)
    found = match(W_dec, features, near)
    codes = latent_codes(sae, batches)
    strong, active = firing(codes, floor), true_codes(truth, start, codes.rows)
    fires = at_features(strong, found, n)
    has_latent = found.latent_of(n) >= 0
    recovered = torch.zeros(n, dtype=torch.bool).index_fill_(0, found.feature[found.cos.abs() >= RECOVERED], True)
    child = (parent >= 0).nonzero().flatten()
    l0, true_l0 = len(codes.row) / codes.rows, len(active.row) / active.rows
    return {
        "mcc": mcc(found),
        "mcc_chance": mcc_chance(features.to(W_dec.device), sae.d_sae),
        "uniqueness": uniqueness(near),
        "mmcs": mmcs(near),
        **firing_scores(fires, active, found.feature),
        "parent_silent_given_child": parent_silent_given_child(fires, active, parent, has_latent),
        "parent_silent_given_child_recovered": parent_silent_given_child(fires, active, parent, recovered),
        "edges_matched": edge_share(parent, has_latent),
        "edges_recovered": edge_share(parent, recovered),
        **signed_parts("cos_child_parent", lean(W_dec, features, found, child, parent[child])),
        **signed_parts("cos_parent_child", lean(W_dec, features, found, parent[child], child)),
        **edge_scores(edges_by_firing(strong), found, parent),
        "l0": l0,
        "true_l0": true_l0,
        "l0_ratio": l0 / true_l0 if true_l0 else float("nan"),
        "shrinkage": shrinkage(fires, active),
    }
