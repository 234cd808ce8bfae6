"""AuxK: dead latents reconstruct the residual of the living (Gao et al. 2024, arXiv 2406.04093, section A.2)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msae.sae.model import MatryoshkaSAE
from msae.sae.no_wait import true_places
from msae.settings import Count, NonNegative, settings


@settings
class AuxK:
    """AuxK of dead latents: its weight α, how many latents take part, and what they reconstruct."""

    coefficient: NonNegative = 1 / 32
    """α; 0: none."""
    k: Count | None = None
    """Dead latents that each token activates; null: d_out / 2."""
    per_level: bool = False
    """The dead of each level's own group reconstruct that level's residual; else all reconstruct the outermost's."""
    detach: bool = True
    """The residual is a constant."""
    normalise: Literal["energy", "variance", "none"] = "energy"
    """Divide by E‖e‖², by E‖e − E e‖², or not."""
    relu: bool = True
    """Activations cannot be negative."""
    scale_by_dead: bool = False
    """Multiply by min(dead / k, 1)."""


class Dead:
    """Which latents are dead. Their number sets out for the host at once, so that it is there when it is needed."""

    def __init__(self, mask: Bool[Tensor, " d_sae"]) -> None:
        self.mask = mask
        self._number = mask.sum().to("cpu", non_blocking=True)  # pinned, if it comes from a GPU
        self._sent = torch.cuda.Event() if mask.is_cuda else None
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(mask.device))

    def latents(self) -> Int[Tensor, " dead"]:
        """The dead latents, ascending."""
        if self._sent is None:
            return true_places(self.mask, None)
        self._sent.synchronize()
        return true_places(self.mask, int(self._number))

    def groups(self, widths: Sequence[int]) -> list[Int[Tensor, " dead"]]:
        """The dead latents of the group that ends at each of these cumulative widths."""
        latents = self.latents()
        if len(widths) == 1:
            return [latents]
        ends = torch.searchsorted(latents, torch.tensor(widths, device=latents.device)).tolist()
        return [latents[start:stop] for start, stop in pairwise([0, *ends])]


def auxk_loss(
    sae: MatryoshkaSAE,
    pre: Float[Tensor, "batch d_sae"],
    residuals: Sequence[Float[Tensor, "batch d_out"]],
    widths: Sequence[int],
    dead: Dead,
    aux: AuxK,
    share: float = 1.0,
) -> Float[Tensor, ""]:
    """Σ over levels of E‖e − ê‖² (÷ E‖e‖²): the k largest dead latents of each token reconstruct the residual e.

    The group that ends at each of the cumulative `widths` reconstructs one of `residuals`; [d_sae] is one group of all.
    e = y' − recon, ê = Σ acts W_dec without b_dec, which is in recon already. Zero where no latent is dead or e is 0.
    With `normalise` none it is multiplied by `share`, as the errors of the levels are.
    """
    share = share if aux.normalise == "none" else 1.0
    total = pre.new_zeros(())
    for index, residual in zip(dead.groups(widths), residuals, strict=True):
        if len(index) > 0:
            W_dec = sae.W_dec[index]
            if sae.rescale_acts_by_decoder_norm:
                W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
            loss = auxk_level(pre[:, index], residual, W_dec, aux)
            total = total + loss * (per_energy(residual, aux) / len(residual))
    return total * share


def per_energy(residual: Float[Tensor, "batch d_out"], aux: AuxK) -> Float[Tensor, ""]:
    """1 / the divisor of `aux.normalise`, without gradient: E‖e‖², E‖e − E e‖² or 1; 0 where that is 0."""
    e = residual.detach()
    if aux.normalise == "none":
        return e.new_ones(())
    energy = (e - e.mean(0) if aux.normalise == "variance" else e).square().sum(1).mean()
    return torch.where(energy > 0, 1 / energy, 0.0)


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
    loss = (e - acts @ W_dec).square().sum()
    if not aux.detach:  # without an activation this would train the residual alone, a second time
        loss = loss * acts.any()
    return loss * min(len(W_dec) / k, 1.0) if aux.scale_by_dead else loss
