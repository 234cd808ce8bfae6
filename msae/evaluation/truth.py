"""Figures against known features: how many are recovered, and whether a parent falls silent under its child."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from msae.evaluation.matching import CANDIDATES, Match, match, mcc, mcc_chance, mmcs, nearest, pair_cosines, uniqueness
from msae.evaluation.reconstruction import ratio
from msae.sae import MatryoshkaSAE, SparseCode, encode_sparse

BLOCK = 2**24  # activations that are held densely at once
CHILDREN = 512  # whose pairs are counted at once: [CHILDREN, d_sae] at most, never d_sae²
FLOOR = 0.05  # share of its own maximum up to which a latent counts as silent
RECOVERED = 0.5  # |cos| from which a feature counts as recovered: an absorbed child's is still 1/√2


def true_codes(truth: dict[str, Tensor], start: int, rows: int) -> SparseCode:
    """True values · ‖feature‖ of held-out rows from `start` on, read from the CSR of `truth`; latents are features."""
    offsets = truth["offsets"][start : start + rows + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    feature, norm = truth["feature"][entries].long(), truth["features"].float().norm(dim=1)
    return SparseCode(offsets - offsets[0], feature, truth["value"][entries] * norm[feature], len(norm))


@torch.no_grad()
def latent_codes(sae: MatryoshkaSAE, batches: Tensor | Iterable[Tensor]) -> SparseCode:
    """activation · ‖W_dec row‖ of the latents active at inference, in raw units, on the CPU.

    Encodes rows [rows, d_in], or batches of them, so many at once that `BLOCK` activations are dense.
    """
    norm = torch.as_tensor(sae.contribution_norm() / sae.target_scale).expand(sae.d_sae)
    parts = []
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        for x in batch.split(max(1, BLOCK // sae.d_sae)):
            code = encode_sparse(sae, x.to(sae.W_dec))
            acts = (code.acts * norm[code.latents]).float()
            parts.append(SparseCode(code.offsets.cpu(), code.latents.cpu(), acts.cpu(), sae.d_sae))
    return SparseCode.cat(parts)


def as_csr(code: SparseCode) -> csr_array:
    """The code in SciPy's form [rows, d_sae], which shares its memory."""
    parts = (code.acts.numpy(), code.latents.numpy(), code.offsets.numpy())
    return csr_array(parts, shape=(code.batch, code.d_sae))


def firing_matrix(matrix: csr_array) -> csr_array:
    """1 where the matrix has an entry, int32."""
    ones = np.ones(matrix.nnz, dtype=np.int32)
    return csr_array((ones, matrix.indices, matrix.indptr), shape=matrix.shape)


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


def covering(
    fires: csr_array, coverage: float, least: int, on_children: Callable[[int], object] = lambda n: None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parent, child and rows on which both fire of every pair with P(parent fires | child fires) ≥ `coverage`.

    The parent fires more often, the child at least `least` times. `on_children` is called with how many more latents
    have been looked at as children.
    """
    columns, d_sae = fires.T.tocsr(), fires.shape[1]
    counts = np.diff(columns.indptr)

    def pairs(start: int) -> np.ndarray:
        together = (columns[start : start + CHILDREN] @ fires).tocoo()
        child, parent, both = together.coords[0] + start, together.coords[1], together.data
        covers = (counts[child] >= least) & (counts[parent] > counts[child]) & (both >= coverage * counts[child])
        return np.stack([parent[covers], child[covers], both[covers]]).astype(np.int64)

    parts = []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for part in pool.map(pairs, range(0, d_sae, CHILDREN)):
            parts.append(part)
            on_children(min(CHILDREN, d_sae - CHILDREN * (len(parts) - 1)))
    parent, child, both = np.concatenate(parts, axis=1)
    return parent, child, both


def edges_by_firing(
    code: SparseCode, coverage: float = 0.8, lift: float = 2.0, least: int = 10
) -> Int[Tensor, "edges 2"]:
    """Edges (parent, child) among latents, read off from their firing alone; a child has at most one parent.

    P(parent fires | child fires) ≥ `coverage` and ≥ `lift` · P(parent fires), the parent fires more often, the child
    at least `least` times. Of several such parents the immediate one is that which fires least often.
    """
    fired, (parent, child, both) = code.fired().numpy(), covering(firing_matrix(as_csr(code)), coverage, least)
    above = both * code.batch >= lift * fired[parent] * fired[child]
    parent, child, both = parent[above], child[above], both[above]
    order = np.lexsort((-both, fired[parent], child))
    children, first = np.unique(child[order], return_index=True)
    return torch.from_numpy(np.stack([parent[order][first], children], axis=1))


def edge_scores(edges: Int[Tensor, "edges 2"], matching: Match, parent: Int[Tensor, " n"]) -> dict[str, float]:
    """Precision and recall of edges (parent, child) among latents against the true ones, through the matching.

    An edge of a latent that stands for no feature is wrong; a true edge of a feature without a latent is missed. NaN
    without any.
    """
    latent = matching.latent_of(len(parent)).tolist()
    true = [(latent[above], latent[child]) for child, above in enumerate(parent.tolist()) if above >= 0]
    right = len(set(true) & set(map(tuple, edges.tolist())))
    return {"edge_precision": ratio(right, len(edges)), "edge_recall": ratio(right, len(true))}


def shrinkage(fires: SparseCode, active: SparseCode) -> float:
    """Σ a ‖W_dec row‖ / Σ value ‖feature‖ where the latent and its feature are both active (1: none shrinks)."""
    ours, true = fires.acts[fires.also_in(active)], active.acts[active.also_in(fires)]
    return ratio(float(ours.double().sum()), float(true.double().sum()))


@torch.no_grad()
def truth_metrics(
    sae: MatryoshkaSAE, batches: Tensor | Iterable[Tensor], truth: dict[str, Tensor], start: int = 0
) -> dict[str, float]:
    """All figures of this file for rows [rows, d_in], or batches of them, that begin at row `start` of the truth.

    `truth`: features [n, d_in], parent [n] (−1: a root), and the true activations as CSR (offsets, feature, value).
    A latent fires where it exceeds FLOOR of its own maximum; `l0` counts every active latent.
    """
    W_dec, features, parent = sae.W_dec.detach(), truth["features"].float(), truth["parent"]
    n = len(features)
    near = nearest(W_dec, features, CANDIDATES)
    matching = match(W_dec, features, near)
    code = latent_codes(sae, batches)
    strong, active = code.strong(FLOOR), true_codes(truth, start, code.batch)
    fires = at_features(strong, matching, n)
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
        **edge_scores(edges_by_firing(strong), matching, parent),
        "l0": l0,
        "true_l0": true_l0,
        "l0_ratio": ratio(l0, true_l0),
        "shrinkage": shrinkage(fires, active),
    }
