"""Against known features: which are recovered, by which latents, and whether a parent falls silent under its child."""

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from msae.sae import MatryoshkaSAE


def cosines(W_dec: Float[Tensor, "d_sae d_in"], features: Float[Tensor, "n d_in"]) -> Float[Tensor, "d_sae n"]:
    """cos(decoder row, feature)."""
    return normalize(W_dec.float(), dim=1) @ normalize(features.float(), dim=1).T


def match(cos: Float[Tensor, "d_sae n"]) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Hungarian matching on |cos|: (latents, features), min(d_sae, n) pairs with the largest total."""
    latents, features = linear_sum_assignment(cos.abs().numpy(), maximize=True)
    return torch.as_tensor(latents), torch.as_tensor(features)


def mcc(cos: Float[Tensor, "d_sae n"]) -> float:
    """Mean correlation coefficient: the mean |cos| over the Hungarian matching (0.1–0.4 already by chance)."""
    latents, features = match(cos)
    return float(cos[latents, features].abs().mean())


def uniqueness(cos: Float[Tensor, "d_sae n"]) -> float:
    """Distinct best-matching features / latents."""
    return len(cos.abs().argmax(1).unique()) / len(cos)


def firing_scores(fires: Bool[Tensor, "rows pairs"], active: Bool[Tensor, "rows pairs"]) -> dict[str, float]:
    """Macro-averaged precision, recall and F1 of each latent's firing against its matched feature's activity."""
    hit = (fires & active).sum(0).double()
    precision = hit / fires.sum(0).clamp_min(1)
    recall = hit / active.sum(0).clamp_min(1)
    f1 = 2 * hit / (fires.sum(0) + active.sum(0)).clamp_min(1)
    return {
        "firing_precision": float(precision.mean()),
        "firing_recall": float(recall.mean()),
        "firing_f1": float(f1.mean()),
    }


def parent_silent_given_child(
    fires: Bool[Tensor, "rows n"], active: Bool[Tensor, "rows n"], parent: Int[Tensor, " n"]
) -> float:
    """P(parent's latent is silent | parent and child features are active), the mean over edges: the absorption hole.

    Columns are features, `fires` that of the latent matched to the feature; parent −1 is a root.
    """
    rates = []
    for child in (parent >= 0).nonzero().flatten().tolist():
        both = active[:, child] & active[:, parent[child]]
        if both.any():
            rates.append(1 - float(fires[both, parent[child]].double().mean()))
    return sum(rates) / len(rates) if rates else float("nan")


@torch.no_grad()
def truth_metrics(
    sae: MatryoshkaSAE, x: Float[Tensor, "rows d_in"], truth: dict[str, Tensor], start: int = 0, floor: float = 0.05
) -> dict[str, float]:
    """Every figure of this file for the rows x, whose true activations `truth` holds as CSR from row `start` on.

    A latent fires where it exceeds `floor` of its own maximum. A feature that no latent is matched to never fires.
    """
    features, parent = truth["features"], truth["parent"]
    cos = cosines(sae.W_dec.cpu(), features)
    latents, matched = match(cos)
    acts = torch.cat([sae.encode(part.to(sae.W_dec)).cpu()[:, latents] for part in x.split(8192)])
    strong = acts > floor * acts.amax(0).clamp_min(1e-30)
    fires = torch.zeros(len(x), len(features), dtype=torch.bool)
    fires[:, matched] = strong
    offsets = truth["offsets"][start : start + len(x) + 1]
    row = torch.repeat_interleave(torch.arange(len(x)), offsets.diff())
    active = torch.zeros(len(x), len(features), dtype=torch.bool)
    active[row, truth["feature"][int(offsets[0]) : int(offsets[-1])].long()] = True

    children = (parent >= 0).nonzero().flatten()
    latent_of = torch.full((len(features),), -1)
    latent_of[matched] = latents
    children = children[latent_of[children] >= 0]
    edge_cos = cos[latent_of[children], parent[children]]
    return {
        "mcc": mcc(cos),
        "uniqueness": uniqueness(cos),
        **firing_scores(fires[:, matched], active[:, matched]),
        "parent_silent_given_child": parent_silent_given_child(fires, active, parent),
        "cos_child_parent": float(edge_cos.mean()),
        "cos_child_parent_positive": float(edge_cos.clamp(min=0).mean()),  # absorption: up to 1/√2 for each edge
        "cos_child_parent_negative": float(edge_cos.clamp(max=0).mean()),  # hedging's residue
        "true_l0": float(active.sum(1).double().mean()),
    }
