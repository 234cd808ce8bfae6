"""The Matryoshka objective: every prefix reconstructs, dead latents learn from what is left over."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from msae.sae.auxk import AuxK, auxk_loss
from msae.sae.model import MatryoshkaSAE
from msae.sae.sparse import SparseCode, sparse_encode, sparse_errors
from msae.sae.sparse_loss import sparse_loss
from msae.sae.sparsity import PENALTIES, paid_by_latent, quadratic_l0


@dataclass(frozen=True)
class Objective:
    """What is minimised: L = Σ_m w_m (E‖y' − recon_m‖² + λ S_m) + α L_aux + γ L_orth over the levels m.

    The levels are the prefixes, after b_dec alone if `bias_level`. w_m by `reduction` of n levels: 1 (sum), 1/n
    (mean), 1/n² (mean_twice: dictionary_learning weighs, then averages) or as listed; times `balance`^i for the i-th
    level inwards of the outermost (arXiv 2505.11756; 0 is vanilla). With `stop_gradient` each level takes the
    reconstruction of the one before it as a constant. `error` says whether the squared error is summed or averaged
    over d_out. Raises ValueError for negative weights.
    """

    reduction: Literal["sum", "mean", "mean_twice"] | Sequence[float] = "sum"
    balance: float = 1.0
    bias_level: bool = False
    stop_gradient: bool = False
    error: Literal["sum", "mean"] = "sum"
    aux: AuxK = field(default_factory=AuxK)
    orthogonality: float = 0.0  # γ
    orthogonality_chunk: int = 8192

    def __post_init__(self) -> None:
        if self.balance < 0:
            raise ValueError(f"model.balance={self.balance} must not be negative; 1 weighs all levels alike")
        if not isinstance(self.reduction, str) and any(w < 0 for w in self.reduction):
            raise ValueError(f"model.reduction={list(self.reduction)} has a negative weight")

    def weights(self, levels: int) -> Float[Tensor, " levels"]:
        """w_m, float64, from the innermost level to the outermost. Raises ValueError for a list of another length."""
        if isinstance(self.reduction, str):
            power = {"sum": 0, "mean": -1, "mean_twice": -2}[self.reduction]
            weights = torch.full((levels,), float(levels) ** power, dtype=torch.float64)
        elif len(self.reduction) != levels:
            raise ValueError(
                f"model.reduction has {len(self.reduction)} weights for {levels} levels; give one for each prefix"
                + (", the first for b_dec alone" if self.bias_level else "")
            )
        else:
            weights = torch.tensor(list(self.reduction), dtype=torch.float64)
        return weights * self.balance ** torch.arange(levels - 1, -1, -1, dtype=torch.float64)


class DenseCode(NamedTuple):
    """Pre-activations and activations of a batch, [batch, d_sae]."""

    pre: Tensor
    acts: Tensor

    @property
    def values(self) -> Tensor:
        """The activations."""
        return self.acts

    def fired(self) -> Tensor:
        """In how many tokens each latent is active [d_sae]."""
        return (self.acts > 0).sum(0)

    def mean_square(self, norm: Tensor | float) -> Tensor:
        """E (acts · norm)² of each latent [d_sae]."""
        return (self.acts * norm).square().mean(0)

    def dense(self) -> Tensor:
        """The activations as a matrix [batch, d_sae]."""
        return self.acts


@dataclass
class Loss:
    """total: scalar with gradient; the rest without.

    levels: E‖y' − recon_m‖² of each level [levels]; of the outermost alone [1] once the inner ones count for nothing;
    their weighted sum [1] for every prefix. aux, sparsity (before
    λ), orthogonality: scalars. code: which latents are active.
    """

    total: Tensor
    levels: Tensor
    aux: Tensor
    sparsity: Tensor
    orthogonality: Tensor
    code: "DenseCode | SparseCode"

    @property
    def acts(self) -> Tensor:
        """The activations as a matrix [batch, d_sae]."""
        return self.code.dense()


def matryoshka_loss(
    sae: MatryoshkaSAE,
    x: Float[Tensor, "batch d_in"],
    objective: Objective = Objective(),
    dead: Bool[Tensor, " d_sae"] | None = None,
    target: Float[Tensor, "batch d_out"] | None = None,
    prefixes: Sequence[int] | Literal["every"] | None = None,
    sparsity_weight: float | Tensor = 0.0,
    code: DenseCode | SparseCode | None = None,
    inner: float = 1.0,
) -> Loss:
    """L of `Objective` (arXiv 2503.17547, eq. 6) for raw activations x, reconstructing `target` (x unless given).

    One encoder pass and one selection over all latents serve every prefix. `prefixes` are the SAE's unless given (a
    random draw, or "every"). `sparsity_weight` is λ; `code` is what `encode_for_training` gave, here unless given;
    `inner` multiplies w_m of every level but the outermost. This is the reference, densely by autograd; a SparseCode
    gets the same loss and gradients from `sparse_loss`.
    """
    y = sae.normalise_target(x if target is None else target)
    code = code or encode_for_training(sae, x)
    widths = sae.prefixes if prefixes is None else list(range(1, sae.d_sae + 1)) if prefixes == "every" else prefixes
    widths = [0, *widths] if objective.bias_level else list(widths)
    weights = objective.weights(len(widths))
    weights[:-1] *= inner
    if inner == 0 and not (objective.stop_gradient or objective.aux.per_level):
        widths, weights, prefixes = widths[-1:], weights[-1:], None  # the others count for nothing
    share = 1.0 if objective.error == "sum" else 1 / sae.d_out
    if isinstance(code, SparseCode):
        assert prefixes != "every", "every prefix at once has no sparse step"
        total, levels, aux, sparsity = sparse_loss(
            sae, code, y, widths, weights, share, objective.stop_gradient, objective.aux, dead, sparsity_weight
        )
    else:
        arguments = (sae, code, y, widths, weights.to(y.device), share, objective, dead, sparsity_weight)
        total, levels, aux, sparsity = dense_loss(*arguments, every=prefixes == "every")
    orthogonality = total.new_zeros(())
    if objective.orthogonality > 0:
        orthogonality = orthogonality_penalty(sae.W_dec, objective.orthogonality_chunk)
        total = total + objective.orthogonality * orthogonality
    if isinstance(code, DenseCode):
        code = DenseCode(code.pre.detach(), code.acts.detach())
    return Loss(total, levels.detach(), aux.detach(), sparsity.detach(), orthogonality.detach(), code)


def dense_loss(
    sae: MatryoshkaSAE,
    code: DenseCode,
    y: Float[Tensor, "batch d_out"],
    widths: Sequence[int],
    weights: Float[Tensor, " levels"],
    share: float,
    objective: Objective,
    dead: Bool[Tensor, " d_sae"] | None,
    sparsity_weight: float | Tensor,
    every: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, levels, aux, sparsity) of `matryoshka_loss`; the reference that every faster step is held against."""
    pre, acts = code
    if every:
        if objective.stop_gradient or objective.aux.per_level:
            raise ValueError("every prefix at once knows neither stop_gradient nor aux.per_level; use fixed prefixes")
        recons = sae.decode_prefixes(acts, [sae.d_sae])
        levels = every_prefix_error(sae, acts, y, weights, objective.bias_level)[None] * share
        total = levels.sum()
    else:
        recons = sae.decode_prefixes(acts, widths, objective.stop_gradient)
        levels = torch.stack([(y - recon).square().sum(-1).mean() for recon in recons]) * share
        total = (weights.to(levels) * levels).sum()

    aux = total.new_zeros(())
    if dead is not None and objective.aux.coefficient > 0:
        edges = widths if objective.aux.per_level else [sae.d_sae]
        residuals = [y - recon for recon in recons[-len(edges) :]]
        aux = auxk_loss(sae, pre, residuals, edges, dead, objective.aux) * (
            share if objective.aux.normalise == "none" else 1.0
        )
        total = total + objective.aux.coefficient * aux
    sparsity = sparsity_penalty(sae, pre, acts, widths, weights)
    if sae.sparsity in ("jumprelu", *PENALTIES):
        weight = sparsity_weight.to(sparsity) if isinstance(sparsity_weight, Tensor) else sparsity_weight
        total = total + weight * sparsity
    return total, levels, aux, sparsity


def encode_for_training(
    sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"], kernels: str = "dense"
) -> DenseCode | SparseCode:
    """What is active for raw activations x, selected as in training; sparse if `kernels` says so and it pays."""
    code = None if kernels == "dense" else sparse_encode(sae, x, kernels)
    if code is not None:
        return code
    pre = sae.pre(x)
    return DenseCode(pre, sae.select(pre))


@torch.no_grad()
def prefix_errors(
    sae: MatryoshkaSAE, code: DenseCode | SparseCode, target: Float[Tensor, "batch d_out"]
) -> Float[Tensor, " prefixes"]:
    """E‖y' − recon_m‖² of the SAE's own prefixes for a raw target y, float64."""
    y = sae.normalise_target(target)
    if isinstance(code, SparseCode):
        return sparse_errors(sae, code, y, sae.prefixes)
    return torch.stack([(y - recon).double().square().sum(1).mean() for recon in sae.decode_prefixes(code.acts)])


def sparsity_penalty(
    sae: MatryoshkaSAE,
    pre: Float[Tensor, "batch d_sae"],
    acts: Float[Tensor, "batch d_sae"],
    widths: Sequence[int],
    weights: Float[Tensor, " levels"],
) -> Float[Tensor, ""]:
    """Σ_m w_m S_m with S_m = E Σ_{j<m} φ(a_j ‖W_dec,j‖) for `l1` and `log`; the quadratic L0 penalty for `jumprelu`.

    The weights are those of the reconstruction, so a latent pays once for every level that it serves. Zero for
    `batch_topk` and `topk`.
    """
    if sae.sparsity == "jumprelu":
        return quadratic_l0(pre, sae.threshold.to(pre.dtype), sae.bandwidth, sae.k)
    if sae.sparsity not in PENALTIES:
        return pre.new_zeros(())
    if not sae.rescale_acts_by_decoder_norm:
        acts = acts * sae.W_dec.norm(dim=1)
    each = PENALTIES[sae.sparsity](acts).mean(0)
    return (each * paid_by_latent(widths, weights, sae.d_sae).to(each)).sum()


def every_prefix_error(
    sae: MatryoshkaSAE,
    acts: Float[Tensor, "batch d_sae"],
    y: Float[Tensor, "batch d_out"],
    weights: Float[Tensor, " levels"],
    bias_level: bool,
    rows: int = 256,
) -> Float[Tensor, ""]:
    """Σ_m w_m E‖y' − recon_m‖² over all widths m = (0,) 1 … d_sae, by work proportional to L0 (arXiv 2512.02194).

    A token's reconstruction changes only at its active latents, so the widths between two of them share one error,
    which is counted with the sum of their weights. Rows are taken `rows` at a time and recomputed in the backward.
    """
    start = weights[0] if bias_level else weights.new_zeros(())
    upto = torch.cat([weights.new_zeros(1), weights[int(bias_level) :]]).cumsum(0) + start  # of widths 0 … m
    parts = zip(sae._normed(acts).split(rows), y.split(rows), strict=True)
    errors = [checkpoint(_runs, a, t, sae.W_dec, sae.b_dec, upto, use_reentrant=False) for a, t in parts]
    return torch.stack(errors).sum() / len(acts)


def _runs(acts: Tensor, y: Tensor, W_dec: Tensor, b_dec: Tensor, upto: Tensor) -> Tensor:
    """The weighted error of these rows: one error for each run of widths between two active latents."""
    active = acts.detach() > 0
    most = max(1, int(active.sum(1).max()))
    d_sae = acts.shape[1]
    # active latents first, in their order; then some that are not, whose share is nothing
    latent = torch.where(active, torch.arange(d_sae, device=acts.device), d_sae).topk(most, largest=False).values
    latent = latent.sort(1).values
    index = latent.clamp_max(d_sae - 1)
    value = acts.gather(1, index) * (latent < d_sae)
    sums = (value[..., None] * W_dec[index]).cumsum(1)
    last = torch.full_like(latent[:, :1], d_sae)
    weight = upto[torch.cat([latent, last], 1)]  # widths up to and with each run's last
    weight = weight.diff(dim=1, prepend=torch.zeros_like(weight[:, :1])).to(acts.dtype)
    before = (y - b_dec)[:, None]
    return (weight * torch.cat([before, before - sums], 1).square().sum(2)).sum()


def orthogonality_penalty(W_dec: Float[Tensor, "d_sae d_out"], chunk: int) -> Float[Tensor, ""]:
    """Mean over latents i of max_{j≠i} cos²(W_dec,i, W_dec,j), j in the same chunk (OrtSAE, arXiv 2509.22033).

    Latents are dealt into random chunks of at most `chunk`, anew at each call, so the cost is linear in d_sae.
    """
    rows = normalize(W_dec, dim=1)
    n = len(rows)
    order = torch.randperm(n, device=rows.device) if n > chunk else torch.arange(n, device=rows.device)
    total = rows.new_zeros(())
    for part in rows[order].split(chunk):
        if len(part) > 1:
            cosine = (part @ part.T).fill_diagonal_(0.0)
            total = total + cosine.square().amax(1).sum()
    return total / n
