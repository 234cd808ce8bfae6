"""AuxK: dead latents reconstruct what the living leave over (Gao et al. 2024, arXiv 2406.04093, section A.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from msae.sae.model import MatryoshkaSAE


@dataclass(frozen=True)
class AuxK:
    """α L_aux: how much, with how many latents, of what.

    coefficient α. k: latents a token, d_out / 2 if None. per_level: the dead of each level's own group reconstruct
    what that level leaves (else all of them what the outermost leaves). detach: the residual is a constant.
    normalise: divide by E‖e‖² (energy), by E‖e − E e‖² (variance) or not. relu: activations cannot be negative.
    scale_by_dead: times min(dead / k, 1). Raises ValueError for a negative coefficient or k < 1.
    """

    coefficient: float = 1 / 32
    k: int | None = None
    per_level: bool = False
    detach: bool = True
    normalise: Literal["energy", "variance", "none"] = "energy"
    relu: bool = True
    scale_by_dead: bool = False

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise ValueError(f"model.aux.coefficient={self.coefficient} must not be negative")
        if self.k is not None and self.k < 1:
            raise ValueError(f"model.aux.k={self.k} must be at least 1")


def auxk_loss(
    sae: MatryoshkaSAE,
    pre: Float[Tensor, "batch d_sae"],
    residuals: Sequence[Float[Tensor, "batch d_out"]],
    edges: Sequence[int],
    dead: Bool[Tensor, " d_sae"],
    aux: AuxK,
) -> Float[Tensor, ""]:
    """Σ over levels of E‖e − ê‖² (÷ E‖e‖²): the k largest dead latents of each token reconstruct the residual e.

    `edges` are the cumulative widths whose groups answer for `residuals`; [d_sae] is one level of all latents.
    e = y' − recon, ê = Σ acts W_dec without b_dec, which e already contains. Zero where no latent is dead or nothing
    is left to explain.
    """
    total = pre.new_zeros(())
    for (start, stop), residual in zip(pairwise([0, *edges]), residuals, strict=True):
        index = dead[start:stop].nonzero().squeeze(1) + start
        if len(index) > 0:
            W_dec = sae.W_dec[index]
            if sae.rescale_acts_by_decoder_norm:
                W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
            scale = to_explain(residual, aux)
            if scale > 0:
                total = total + auxk_level(pre[:, index], residual, W_dec, aux) / (len(residual) * scale)
    return total


def to_explain(residual: Float[Tensor, "batch d_out"], aux: AuxK) -> Float[Tensor, ""]:
    """What `aux.normalise` divides by, without gradient: E‖e‖², E‖e − E e‖² or 1."""
    e = residual.detach()
    if aux.normalise == "none":
        return e.new_ones(())
    return (e - e.mean(0) if aux.normalise == "variance" else e).square().sum(1).mean()


def auxk_level(
    pre: Float[Tensor, "rows dead"],
    residual: Float[Tensor, "rows d_out"],
    W_dec: Float[Tensor, "dead d_out"],
    aux: AuxK,
) -> Float[Tensor, ""]:
    """Σ ‖e − ê‖² over some rows of one level, from the dead latents' own pre-activations and (normed) decoder rows."""
    k = max(1, W_dec.shape[1] // 2) if aux.k is None else aux.k
    e = residual.detach() if aux.detach else residual
    values, chosen = pre.topk(min(k, len(W_dec)), dim=1, sorted=False)
    acts = torch.zeros_like(pre).scatter(1, chosen, values.relu() if aux.relu else values)
    if not aux.detach and not acts.any():  # else the residual alone would be trained a second time
        return pre.new_zeros(())
    loss = (e - acts @ W_dec).square().sum()
    return loss * min(len(W_dec) / k, 1.0) if aux.scale_by_dead else loss
