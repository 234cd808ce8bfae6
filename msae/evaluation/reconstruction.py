"""Reconstruction metrics of every prefix, streamed in float64 over a whole set and never averaged over batches."""

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
        n = len(sae.prefixes)
        device = sae.W_dec.device
        shapes = {
            "tokens": (),
            "nonzero": (),
            "y": (sae.d_out,),
            "y_square": (),
            "error": (n,),
            "recon_square": (n,),
            "product": (n,),
            "cosine": (n,),
            "norm_ratio": (n,),
            "fired": (sae.d_sae,),
        }
        self.tensors = {name: torch.zeros(s, dtype=torch.float64, device=device) for name, s in shapes.items()}

    @torch.no_grad()
    def update(
        self, sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> None:
        """Add a batch of raw activations, encoded as at inference, reconstructing `target` (x unless given)."""
        fired, recons = reconstruct(sae, x)
        exact = (x if target is None else target).double()
        norm = exact.norm(dim=1)
        nonzero = norm > 0  # a direction and a ratio of norms only exist there
        t = self.tensors
        t["tokens"] += len(x)
        t["nonzero"] += nonzero.sum()
        t["y"] += exact.sum(0)
        t["y_square"] += exact.square().sum()
        t["fired"] += fired
        for i, scaled in enumerate(recons):
            recon = sae.unscale(scaled.double())
            product, recon_norm = (exact * recon).sum(1), recon.norm(dim=1)
            t["error"][i] += (exact - recon).square().sum()
            t["recon_square"][i] += recon.square().sum()
            t["product"][i] += product.sum()
            t["cosine"][i] += (product / (norm * recon_norm).clamp_min(1e-30))[nonzero].sum()
            t["norm_ratio"][i] += (recon_norm / norm)[nonzero].sum()

    def metrics(self) -> dict[str, float]:
        """Flat `name/p{width}` for every prefix.

        Of the target y (= x but for a transcoder): mse = E‖y − ŷ‖² / d_out;  fvu = E‖y − ŷ‖² / (E‖y‖² − ‖E y‖²);
        l0 = active latents a token;  dead = share of latents that never fired;
        cosine = E cos(y, ŷ);  l2_ratio = E ‖ŷ‖/‖y‖ (both over y ≠ 0);  bias = E‖ŷ‖² / E⟨y, ŷ⟩ (1: no shrinkage);
        dense_1pct, dense_10pct = share of latents firing on more tokens.
        """
        t = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        tokens, nonzero = float(t["tokens"]), max(1.0, float(t["nonzero"]))
        assert tokens > 0, "no batch was added"
        variance = float(t["y_square"] - t["y"].square().sum() / tokens)
        density = t["fired"] / tokens
        out: dict[str, float] = {}
        for i, width in enumerate(self.prefixes):
            error, product = float(t["error"][i]), float(t["product"][i])
            values = {
                "mse": error / (tokens * self.d_out),
                "fvu": error / variance if variance > 0 else float("nan"),
                "l0": float(density[:width].sum()),
                "dead": float((density[:width] == 0).double().mean()),
                "cosine": float(t["cosine"][i]) / nonzero,
                "l2_ratio": float(t["norm_ratio"][i]) / nonzero,
                "bias": float(t["recon_square"][i]) / product if product else float("nan"),
                "dense_1pct": float((density[:width] > 0.01).double().mean()),
                "dense_10pct": float((density[:width] > 0.1).double().mean()),
            }
            out |= {f"{name}/p{width}": value for name, value in values.items()}
        return out


def reconstruction_metrics(sae: MatryoshkaSAE, batches: Iterable[Batch]) -> dict[str, float]:
    """`ReconstructionSums.metrics` over all batches of raw activations, or of pairs (x, target)."""
    sums = ReconstructionSums(sae)
    for batch in batches:
        sums.update(sae, *as_pair(batch, sae.W_dec))
    return sums.metrics()
