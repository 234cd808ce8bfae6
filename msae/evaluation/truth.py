"""Figures against known features: how many are recovered, and whether a parent falls silent under its child."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msae.evaluation.matching import CANDIDATES, Match, match, mcc, mcc_chance, mmcs, nearest, pair_cosines, uniqueness
from msae.evaluation.reconstruction import ratio
from msae.hierarchy.edges import Edges, find_edges
from msae.hierarchy.firings import Firings, Readable, collect
from msae.hierarchy.limits import Limits
from msae.sae import MatryoshkaSAE, SparseCode

FLOOR = 0.05  # share of its own maximum up to which a latent counts as silent
RECOVERED = 0.5  # |cos| from which a feature counts as recovered: an absorbed child's is still 1/√2


def true_codes(truth: dict[str, Tensor], start: int, rows: int) -> SparseCode:
    """True values · ‖feature‖ of held-out rows from `start` on, read from the CSR of `truth`; latents are features."""
    offsets = truth["offsets"][start : start + rows + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    feature, norm = truth["feature"][entries].long(), truth["features"].float().norm(dim=1)
    return SparseCode(offsets - offsets[0], feature, truth["value"][entries] * norm[feature], len(norm))


def at_features(code: SparseCode, matching: Match, n: int) -> SparseCode:
    """The code [rows, n] of the features that its latents are matched to; drops latents without a feature."""
    feature = matching.feature_of(code.d_sae)[code.latents]
    return SparseCode(code.offsets, feature, code.acts, n).where(feature >= 0)


# Below, `fires` is the code of latents at their features, `active` the true one; a root's parent is −1.


def firing_scores(fires: SparseCode, active: SparseCode, features: Int[Tensor, " pairs"]) -> dict[str, float]:
    """Precision, recall and F1 of the matched latents' firing against these features' activity, macro-averaged.

    A latent that never fires scores 0, unless its feature is never active either: such pairs do not count.
    """
    hits = fires.where(fires.also_in(active))
    hit, fired, true = (code.fired()[features].double() for code in (hits, fires, active))
    counts = fired + true > 0
    scores = {
        "firing_precision": hit / fired.clamp_min(1),
        "firing_recall": hit / true.clamp_min(1),
        "firing_f1": 2 * hit / (fired + true).clamp_min(1),
    }
    return {name: float(score[counts].mean()) for name, score in scores.items()}


def parent_silent_given_child(
    fires: SparseCode, active: SparseCode, parent: Int[Tensor, " n"], has_latent: Bool[Tensor, " n"]
) -> float:
    """P(parent's latent is silent | parent and child are active), the mean over edges: the absorption hole.

    Only edges count whose features both have a latent: absent is not absorbed. NaN without an edge or row.
    """
    child = active.where(parent[active.latents] >= 0)
    above = replace(child, latents=parent[child.latents])
    both = above.also_in(active)
    rows = child.where(both).fired().double()
    silent = child.where(both & ~above.also_in(fires)).fired()
    edges = (rows > 0) & has_latent & has_latent[parent]
    return float((silent / rows)[edges].mean())


def edge_share(parent: Int[Tensor, " n"], features: Bool[Tensor, " n"]) -> float:
    """The share of edges whose parent and child are both among these features."""
    children = (parent >= 0).nonzero().flatten()
    return float((features[children] & features[parent[children]]).double().mean())


def lean(
    W_dec: Float[Tensor, "d_sae d_in"],
    features: Float[Tensor, "n d_in"],
    matching: Match,
    of: Int[Tensor, " edges"],
    towards: Int[Tensor, " edges"],
) -> Float[Tensor, " counted"]:
    """cos(latent of one feature, another feature) − cos(the two features), for each edge whose first has a latent.

    An exact latent has 0 whatever the angle between the features. A decoder row counts with its sign.
    """
    latent = matching.latent_of(len(features))[of]
    of, towards, latent = of[latent >= 0], features[towards[latent >= 0]], latent[latent >= 0]
    return pair_cosines(W_dec[latent.to(W_dec.device)].cpu(), towards) - pair_cosines(features[of], towards)


def signed_parts(name: str, values: Float[Tensor, " edges"]) -> dict[str, float]:
    """The mean, and the means of the positive and the negative parts, which add up to it."""
    parts = {"": values, "_positive": values.clamp(min=0), "_negative": values.clamp(max=0)}
    return {name + part: float(value.double().mean()) for part, value in parts.items()}


def edge_scores(edges: Edges, matching: Match, parent: Int[Tensor, " n"]) -> dict[str, float]:
    """Precision and recall of the surviving edges among latents against the true ones, through the matching.

    An edge of a latent that stands for no feature is wrong; a true edge of a feature without a latent is missed. NaN
    without any.
    """
    latent = matching.latent_of(len(parent)).tolist()
    true = [(latent[above], latent[child]) for child, above in enumerate(parent.tolist()) if above >= 0]
    kept = edges.survives
    found = list(zip(edges.parent[kept].tolist(), edges.child[kept].tolist(), strict=True))
    right = len(set(true) & set(found))
    return {"edge_precision": ratio(right, len(found)), "edge_recall": ratio(right, len(true))}


def shrinkage(fires: SparseCode, active: SparseCode) -> float:
    """Σ a ‖W_dec row‖ / Σ value ‖feature‖ where the latent and its feature are both active (1: none shrinks)."""
    ours, true = fires.acts[fires.also_in(active)], active.acts[active.also_in(fires)]
    return ratio(float(ours.double().sum()), float(true.double().sum()))


@torch.no_grad()
def truth_metrics(sae: MatryoshkaSAE, rows: Readable, truth: dict[str, Tensor], start: int = 0) -> dict[str, float]:
    """All figures of this file for rows that begin at row `start` of the truth.

    `truth`: features [n, d_in], parent [n] (−1: a root), and the true activations as CSR (offsets, feature, value).
    A latent fires where it exceeds FLOOR of its own maximum, for edges the floor of `Limits`; `l0` counts every active
    latent. Edges are those that survive the default `Limits`.
    """
    W_dec, features, parent = sae.W_dec.detach(), truth["features"].float(), truth["parent"]
    n = len(features)
    near = nearest(W_dec, features, CANDIDATES)
    matching = match(W_dec, features, near)
    (firings,) = collect([sae], rows)
    code, active = firings.code, true_codes(truth, start, firings.rows)
    fires = at_features(code.strong(FLOOR), matching, n)
    limits = Limits()
    edges = find_edges(sae, rows, Firings(code.strong(limits.floor)), limits)
    has_latent = matching.latent_of(n) >= 0
    recovered = torch.zeros(n, dtype=torch.bool).index_fill_(0, matching.feature[matching.cos.abs() >= RECOVERED], True)
    child = (parent >= 0).nonzero().flatten()
    l0, true_l0 = len(code.acts) / code.batch, len(active.acts) / active.batch
    return {
        "mcc": mcc(matching),
        "mcc_chance": mcc_chance(features.to(W_dec.device), sae.d_sae),
        "uniqueness": uniqueness(near),
        "mmcs": mmcs(near),
        **firing_scores(fires, active, matching.feature),
        "parent_silent_given_child": parent_silent_given_child(fires, active, parent, has_latent),
        "parent_silent_given_child_recovered": parent_silent_given_child(fires, active, parent, recovered),
        "edges_matched": edge_share(parent, has_latent),
        "edges_recovered": edge_share(parent, recovered),
        **signed_parts("cos_child_parent", lean(W_dec, features, matching, child, parent[child])),
        **signed_parts("cos_parent_child", lean(W_dec, features, matching, parent[child], child)),
        **edge_scores(edges, matching, parent),
        "l0": l0,
        "true_l0": true_l0,
        "l0_ratio": ratio(l0, true_l0),
        "shrinkage": shrinkage(fires, active),
    }
