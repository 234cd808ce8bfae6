"""Reconstruction metrics of every prefix, summed in float64 over a whole set and never averaged over batches."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from msae.data.batches import Batch, as_pair
from msae.sae import MatryoshkaSAE, reconstruct


class ReconstructionSums:
    """Running sums from which the metrics of every prefix follow; `tensors` may be added up across processes."""

    def __init__(self, sae: MatryoshkaSAE) -> None:
        self.prefixes, self.d_out = sae.prefixes, sae.d_out
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("tokens", "nonzero", "y_square"), ()),
            **dict.fromkeys(("error", "recon_square", "product", "cosine", "norm_ratio"), (len(sae.prefixes),)),
            "y": (sae.d_out,),
            "fired": (sae.d_sae,),
        }
        zeros = torch.zeros((), dtype=torch.float64, device=sae.W_dec.device)
        self.tensors = {name: zeros.new_zeros(shape) for name, shape in shapes.items()}

    @torch.no_grad()
    def update(
        self, sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> None:
        """Add a batch of raw activations, encoded as at inference, reconstructing `target` (x unless given)."""
        fired, recons = reconstruct(sae, x)
        y = (x if target is None else target).double()
        norm = y.norm(dim=1)
        nonzero = norm > 0  # a direction and a ratio of norms exist only there; to index by it would make a GPU wait
        sums = self.tensors
        sums["tokens"] += len(x)
        sums["nonzero"] += nonzero.sum()
        sums["y"] += y.sum(0)
        sums["y_square"] += y.square().sum()
        sums["fired"] += fired
        for i, scaled in enumerate(recons):
            recon = sae.unscale(scaled.double())
            product, recon_norm = (y * recon).sum(1), recon.norm(dim=1)
            sums["error"][i] += (y - recon).square().sum()
            sums["recon_square"][i] += recon.square().sum()
            sums["product"][i] += product.sum()
            cosine = product / (norm * recon_norm).clamp_min(1e-30)
            sums["cosine"][i] += torch.where(nonzero, cosine, 0.0).sum()
            sums["norm_ratio"][i] += torch.where(nonzero, recon_norm / norm, 0.0).sum()

    def metrics(self) -> dict[str, float]:
        """Flat `name/p{width}` for every prefix.

        Of the target y (= x but for a transcoder): mse = E‖y − ŷ‖² / d_out;  fvu = E‖y − ŷ‖² / (E‖y‖² − ‖E y‖²);
        l0 = active latents a token;  dead = share of latents that never fired;
        cosine = E cos(y, ŷ);  l2_ratio = E ‖ŷ‖/‖y‖ (both over y ≠ 0);  bias = E‖ŷ‖² / E⟨y, ŷ⟩ (1: no shrinkage);
        dense_1pct, dense_10pct = share of latents firing on more tokens.
        """
        sums = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        tokens, nonzero = float(sums["tokens"]), max(1.0, float(sums["nonzero"]))
        assert tokens > 0, "no batch was added"
        variance = max(0.0, float(sums["y_square"] - sums["y"].square().sum() / tokens))
        density = sums["fired"] / tokens
        metrics: dict[str, float] = {}
        for i, width in enumerate(self.prefixes):
            error, of_prefix = float(sums["error"][i]), density[:width]
            values = {
                "mse": error / (tokens * self.d_out),
                "fvu": ratio(error, variance),
                "l0": float(of_prefix.sum()),
                "dead": float((of_prefix == 0).double().mean()),
                "cosine": float(sums["cosine"][i]) / nonzero,
                "l2_ratio": float(sums["norm_ratio"][i]) / nonzero,
                "bias": ratio(float(sums["recon_square"][i]), float(sums["product"][i])),
                "dense_1pct": float((of_prefix > 0.01).double().mean()),
                "dense_10pct": float((of_prefix > 0.1).double().mean()),
            }
            metrics |= {f"{name}/p{width}": value for name, value in values.items()}
        return metrics


def reconstruction_metrics(sae: MatryoshkaSAE, batches: Iterable[Batch]) -> dict[str, float]:
    """`ReconstructionSums.metrics` over all batches of raw activations, or of pairs (x, target)."""
    sums = ReconstructionSums(sae)
    for batch in batches:
        sums.update(sae, *as_pair(batch, sae.W_dec))
    return sums.metrics()


def ratio(part: float, whole: float) -> float:
    """part / whole, NaN where the whole is 0."""
    return part / whole if whole else float("nan")
