"""How an SAE starts: directions of encoder and decoder, and where b_dec begins."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from msae.settings import Positive, settings

InitialWeights = Literal["tied", "tied_uniform", "uniform", "normal"]


@settings
class Init:
    """How an SAE starts."""

    weights: InitialWeights = "tied"
    """`tied`, `tied_uniform`: W_enc = W_decᵀ, drawn normal or uniform; `normal`, `uniform`: W_enc as drawn."""
    decoder_norm: Positive = 1.0
    """Norm of the decoder's rows; 1 unless `decoder` leaves norms free."""
    b_dec: Literal["zero", "mean", "geometric_median"] = "mean"
    """Where b_dec begins: 0, E y', or the geometric median of the first batch."""


def initial_weights(
    d_in: int, d_sae: int, d_out: int | None, init: InitialWeights, decoder_norm: float, seed: int
) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, "d_sae d_out"]]:
    """W_enc and W_dec from one draw R [d_sae, d_in], whose directions W_dec has, with rows of norm `decoder_norm`.

    `tied`, `tied_uniform`: W_enc = W_decᵀ, with R normal or uniform. `normal`: W_enc = Rᵀ ~ N(0, 1/d_in).
    `uniform`: W_enc = Rᵀ ~ U(±√(6/d_sae)). For a transcoder (d_out not None) W_dec has random directions of its own.
    W_enc lies in memory latent by latent (a transposed view), so that a latent's gradient is one whole row.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(d: int) -> Tensor:
        if init in ("tied", "normal"):
            return torch.randn(d_sae, d, generator=generator) / math.sqrt(d)
        bound = math.sqrt(6 / d_sae)  # Kaiming's for a weight [d, d_sae]
        return (2 * torch.rand(d_sae, d, generator=generator) - 1) * bound

    drawn = draw(d_in)
    W_dec = normalize(drawn, dim=1) * decoder_norm
    W_enc = W_dec.clone().T if init.startswith("tied") else drawn.T
    if d_out is not None:
        W_dec = normalize(draw(d_out), dim=1) * decoder_norm
    return W_enc, W_dec


def geometric_median(
    points: Float[Tensor, "n d"], iterations: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " d"]:
    """argmin_m Σ ‖x − m‖ by Weiszfeld's iteration from the mean, until m moves less than `tolerance`."""
    median = points.mean(0)
    for _ in range(iterations):
        distance = (points - median).norm(dim=1)
        weights = torch.where(distance > 0, 1 / distance, 0)  # a point at the median must not hold it there
        if not weights.any():
            break
        previous, median = median, (weights @ points) / weights.sum()
        if (median - previous).norm() < tolerance:
            break
    return median
