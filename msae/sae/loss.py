"""The Matryoshka objective: every prefix reconstructs, dead latents learn from what is left over."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from msae.sae.model import MatryoshkaSAE


@dataclass
class Loss:
    """total: scalar with gradient. prefixes [n_prefixes]: E‖s·x − recon_m‖². aux: scalar. acts [batch, d_sae]."""

    total: Tensor
    prefixes: Tensor
    aux: Tensor
    acts: Tensor


def matryoshka_loss(
    sae: MatryoshkaSAE,
    x: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"] | None = None,
    aux_coefficient: float = 1 / 32,
    k_aux: int | None = None,
) -> Loss:
    """L = Σ_m E‖s·x − recon_m‖² + α L_aux over the prefixes m (arXiv 2503.17547, eq. 6).

    The squared error is summed over d_in and averaged over the batch. s is the SAE's scale: with activations of unit
    variance each prefix's term is its FVU. One encoder pass and one BatchTopK over all latents serve every prefix.
    """
    target = x * sae.scale
    pre = sae.pre(x)
    acts = sae.select(pre)
    recons = sae.decode_prefixes(acts)
    prefixes = torch.stack([(target - recon).square().sum(-1).mean() for recon in recons])
    aux = prefixes.new_zeros(())
    if dead is not None and aux_coefficient > 0:
        aux = auxk_loss(
            sae, pre, (target - recons[-1]).detach(), dead, max(1, sae.d_in // 2) if k_aux is None else k_aux
        )
    return Loss(prefixes.sum() + aux_coefficient * aux, prefixes.detach(), aux.detach(), acts.detach())


def auxk_loss(
    sae: MatryoshkaSAE,
    pre: Float[Tensor, "batch d_sae"],
    residual: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """E‖e − ê‖² / E‖e‖²: the k_aux largest dead latents of each token reconstruct the residual e (arXiv 2406.04093).

    e = s·x − recon is a constant here (detached by the caller), ê = Σ acts W_dec without b_dec, which e already
    contains. Zero when no latent is dead or nothing is left to explain.
    """
    index = dead.nonzero().squeeze(1)
    energy = residual.square().sum()
    if len(index) == 0 or not energy > 0:
        return pre.new_zeros(())
    pre_dead = pre[:, index]
    values, chosen = pre_dead.topk(min(k_aux, len(index)), dim=1, sorted=False)
    acts = torch.zeros_like(pre_dead).scatter(1, chosen, values.relu())
    return (residual - acts @ sae.W_dec[index]).square().sum() / energy
