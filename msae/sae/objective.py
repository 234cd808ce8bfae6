"""The Matryoshka objective, densely and by autograd: the reference of every faster step.

    L = Σ_m w_m E‖y' − recon_m‖² + λ S + α L_aux + Σ_t γ_t L_t        recon_m = acts[:m] W_dec[:m] + b_dec

over the levels m: the prefixes (arXiv 2503.17547, eq. 6), after b_dec alone if `bias_level`. S is the penalty of the
SAE's sparsity mechanism, L_aux AuxK of dead latents, L_t the further terms of `TERMS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from msae.sae.auxk import AuxK, Dead, auxk_loss
from msae.sae.model import MatryoshkaSAE
from msae.sae.no_wait import constant
from msae.sae.sparsity import Entries
from msae.settings import NonNegative, settings


class Loss(NamedTuple):
    """L with its gradient, and its parts without.

    levels: E‖y' − recon_m‖² of each level [levels]; of the outermost alone [1] once the inner ones count for nothing;
    their weighted sum [1] for every width. aux, sparsity (before λ) and each of `terms` (before γ): scalars.
    """

    total: Tensor
    levels: Tensor
    aux: Tensor
    sparsity: Tensor
    terms: Mapping[str, Tensor]
    code: "Code"


def dense_loss(
    sae: MatryoshkaSAE,
    code: "DenseCode",
    y: Float[Tensor, "batch d_out"],
    levels: "Levels",
    objective: "Objective",
    dead: Dead | None = None,
    sparsity_weight: float | Tensor = 0.0,
) -> Loss:
    """L before `with_terms`, for y' and what is active; `dead` latents take part in AuxK, `sparsity_weight` is λ."""
    errors, recons = squared_errors(sae, code, y, levels, objective)
    total = errors.sum() if levels.every else (constant(levels.weights.tolist(), errors) * errors).sum()

    aux = total.new_zeros(())
    if dead is not None and objective.aux.coefficient > 0:
        widths = levels.widths if objective.aux.per_level else [sae.d_sae]
        residuals = [y - recon for recon in recons[-len(widths) :]]
        aux = auxk_loss(sae, code.pre, residuals, widths, dead, objective.aux, objective.share(sae))
        total = total + objective.aux.coefficient * aux

    penalty = total.new_zeros(())
    if sae.sparsity.has_penalty:
        penalty = sae.sparsity.penalty(entries(sae, code, levels), sae.k)
        total = total + (sparsity_weight * penalty).to(total)  # λ may be float64
    return Loss(total, errors.detach(), aux.detach(), penalty.detach(), {}, code.detach())


def with_terms(loss: Loss, sae: MatryoshkaSAE, code: "Code", y: Tensor, objective: "Objective") -> Loss:
    """L with Σ_t γ_t L_t added."""
    terms = {name: TERMS[name].loss(sae, code, y) for name, weight in objective.terms.items() if weight}
    total = loss.total
    for name, term in terms.items():
        total = total + objective.terms[name] * term
    return loss._replace(total=total, terms={name: term.detach() for name, term in terms.items()})


# --- levels -----------------------------------------------------------------------------------------------------------

Widths = Sequence[int] | Literal["every"]


class Levels(NamedTuple):
    """The widths of a step's levels, the weight w_m of each (float64), and whether these are all widths at once."""

    widths: list[int]
    weights: Float[Tensor, " levels"]
    every: bool = False


@settings
class Objective:
    """What is minimised."""

    reduction: Literal["sum", "mean", "mean_twice"] | list[NonNegative] = "sum"
    """w_m of n levels: 1, 1/n, 1/n² (dictionary_learning weighs, then averages), or a list, innermost first."""
    balance: NonNegative = 1.0
    """w_m is multiplied by this for each level inwards of the outermost (arXiv 2505.11756); 0 is vanilla."""
    bias_level: bool = False
    """b_dec alone is a level too."""
    stop_gradient: bool = False
    """Each level takes the reconstruction of the one before it as a constant."""
    error: Literal["sum", "mean"] = "sum"
    """The squared error is summed or averaged over d_out."""
    aux: AuxK = field(default_factory=AuxK)
    terms: dict[str, NonNegative] = field(default_factory=dict)
    """γ of further terms, such as {orthogonality: 0.25} (OrtSAE, arXiv 2509.22033)."""

    def __post_init__(self) -> None:
        if unknown := sorted(self.terms.keys() - TERMS):
            raise ValueError(f"model.objective.terms has {unknown[0]}; there is {', '.join(TERMS)}")

    @property
    def needs_dense(self) -> bool:
        """Whether a term needs the gradient of every activation."""
        return any(TERMS[name].needs_dense for name in self.terms)

    def levels(self, sae: MatryoshkaSAE, prefixes: Widths | None = None, inner: float = 1.0) -> Levels:
        """The levels of a step: the SAE's prefixes unless others are given; `inner` × w_m of all but the outermost.

        Raises ValueError for a list of weights of another length, and for options that every width at once excludes.
        """
        every = prefixes == "every"
        widths = [*range(1, sae.d_sae + 1)] if prefixes == "every" else [*(prefixes or sae.prefixes)]
        widths = [0, *widths] if self.bias_level else widths
        weights = self.weights(len(widths))
        weights[:-1] *= inner
        needs_each = self.stop_gradient or self.aux.per_level
        if every and needs_each:
            raise ValueError("every prefix at once knows neither stop_gradient nor aux.per_level; use fixed prefixes")
        if inner == 0 and not needs_each:  # the others count for nothing
            return Levels(widths[-1:], weights[-1:])
        return Levels(widths, weights, every)

    def weights(self, levels: int) -> Float[Tensor, " levels"]:
        """w_m, float64, from the innermost level to the outermost. Raises ValueError for a list of another length."""
        if isinstance(self.reduction, str):
            power = {"sum": 0, "mean": -1, "mean_twice": -2}[self.reduction]
            weights = torch.full((levels,), float(levels) ** power, dtype=torch.float64)
        elif len(self.reduction) != levels:
            raise ValueError(
                f"model.objective.reduction has {len(self.reduction)} weights for {levels} levels; give one for each "
                "prefix" + (", the first for b_dec alone" if self.bias_level else "")
            )
        else:
            weights = torch.tensor(self.reduction, dtype=torch.float64)
        return weights * self.balance ** torch.arange(levels - 1, -1, -1, dtype=torch.float64)

    def share(self, sae: MatryoshkaSAE) -> float:
        """What multiplies a squared error that is summed over d_out."""
        return 1.0 if self.error == "sum" else 1 / sae.d_out


def squared_errors(
    sae: MatryoshkaSAE, code: "DenseCode", y: Tensor, levels: Levels, objective: Objective
) -> tuple[Float[Tensor, " levels"], list[Float[Tensor, "batch d_out"]]]:
    """E‖y' − recon_m‖² and recon_m of each level; for every width at once Σ_m w_m E‖·‖² [1] and the outermost."""
    share = objective.share(sae)
    if levels.every:
        error = every_prefix_error(sae, code.acts, y, levels.weights.to(y.device), objective.bias_level)
        return error[None] * share, sae.decode_prefixes(code.acts, [sae.d_sae])
    recons = sae.decode_prefixes(code.acts, levels.widths, objective.stop_gradient)
    return torch.stack([(y - recon).square().sum(-1).mean() for recon in recons]) * share, recons


# --- codes, and what a penalty sees of them ---------------------------------------------------------------------------


@runtime_checkable
class Code(Protocol):
    """The activations of a batch, dense or sparse."""

    @property
    def acts(self) -> Tensor:
        """The activations of every entry, or of those that are active."""

    def fired(self) -> Int[Tensor, " d_sae"]:
        """In how many tokens each latent is active."""

    def mean_square(self, norm: Tensor | float) -> Float[Tensor, " d_sae"]:
        """E (acts · norm)² of each latent."""

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """The activations as a matrix."""


class DenseCode(NamedTuple):
    """Pre-activations and activations of a batch, [batch, d_sae]."""

    pre: Tensor
    acts: Tensor

    def fired(self) -> Tensor:
        return (self.acts > 0).sum(0)

    def mean_square(self, norm: Tensor | float) -> Tensor:
        return (self.acts * norm).square().mean(0)

    def dense(self) -> Tensor:
        return self.acts

    def detach(self) -> "DenseCode":
        """Without gradient."""
        return DenseCode(self.pre.detach(), self.acts.detach())


def entries(sae: MatryoshkaSAE, code: DenseCode, levels: Levels) -> Entries:
    """Every entry of a dense code, for a penalty."""
    paid = paid_by(levels, torch.arange(sae.d_sae, device=code.acts.device), code.acts)
    threshold = sae.threshold.to(code.pre.dtype)
    return Entries(
        code.pre, code.acts, sae.contribution_norm(), threshold, paid, lambda values: values.sum(-1), len(code.acts)
    )


def paid_by(levels: Levels, latents: Int[Tensor, " n"], like: Tensor) -> Float[Tensor, " n"]:
    """Σ_m w_m of the levels m that each of these latents serves: latent j is in every level wider than j."""
    from_here_on = [*levels.weights.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    return constant(from_here_on, like)[torch.searchsorted(constant(levels.widths, latents), latents, right=True)]


# --- every width at once ----------------------------------------------------------------------------------------------


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
    first = weights[0] if bias_level else weights.new_zeros(())
    cumulative = torch.cat([weights.new_zeros(1), weights[int(bias_level) :]]).cumsum(0) + first  # Σ w of 0 … m
    parts = zip(sae.coefficients(acts).split(rows), y.split(rows), strict=True)
    errors = [checkpoint(_run_errors, a, t, sae.W_dec, sae.b_dec, cumulative, use_reentrant=False) for a, t in parts]
    return torch.stack(errors).sum() / len(acts)


def _run_errors(acts: Tensor, y: Tensor, W_dec: Tensor, b_dec: Tensor, cumulative: Tensor) -> Tensor:
    """The weighted error of these rows: one error for each run of widths between two active latents."""
    active, d_sae = acts.detach() > 0, acts.shape[1]
    most = max(1, int(active.sum(1).max()))
    # each row's active latents in order, then d_sae in place of those that it has fewer than the row with most
    latent = torch.where(active, torch.arange(d_sae, device=acts.device), d_sae).topk(most, largest=False).values
    latent = latent.sort(1).values
    index = latent.clamp_max(d_sae - 1)
    value = acts.gather(1, index) * (latent < d_sae)
    recons = (value[..., None] * W_dec[index]).cumsum(1)
    widths = torch.cat([latent, torch.full_like(latent[:, :1], d_sae)], 1)  # the last of each run
    weights = cumulative[widths].diff(dim=1, prepend=cumulative.new_zeros(len(acts), 1)).to(acts.dtype)
    residual = (y - b_dec)[:, None]
    return (weights * torch.cat([residual, residual - recons], 1).square().sum(2)).sum()


# --- further terms ----------------------------------------------------------------------------------------------------


def orthogonality_penalty(W_dec: Float[Tensor, "d_sae d_out"], chunk: int = 8192) -> Float[Tensor, ""]:
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


class Term(NamedTuple):
    """A further term of the objective: loss(sae, code, y') → scalar; whether it needs the dense code's gradient."""

    loss: Callable[[MatryoshkaSAE, Code, Tensor], Tensor]
    needs_dense: bool = False


# To add a term, write loss(sae, code, y') and give it a name here; model.objective.terms has its weight.
TERMS: dict[str, Term] = {"orthogonality": Term(lambda sae, code, y: orthogonality_penalty(sae.W_dec))}
