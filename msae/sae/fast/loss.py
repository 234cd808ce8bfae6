"""The loss of a batch; for a sparse code with its gradients by hand, from the entries that are active."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msae.sae.auxk import AuxK, Dead, auxk_level, per_energy
from msae.sae.fast.code import TrainingCode, decoding, encode_for_training
from msae.sae.fast.plain import Decoded, Weights
from msae.sae.model import MatryoshkaSAE
from msae.sae.no_wait import constant
from msae.sae.objective import (
    Code,
    DenseCode,
    Levels,
    Loss,
    Objective,
    Widths,
    dense_loss,
    paid_by,
    with_terms,
)
from msae.sae.sparsity import Entries

AUXK_ROWS = 512  # at a time: what they need stays in cache


def matryoshka_loss(
    sae: MatryoshkaSAE,
    x: Float[Tensor, "batch d_in"],
    objective: Objective = Objective(),  # noqa: B008
    dead: Bool[Tensor, " d_sae"] | Dead | None = None,
    target: Float[Tensor, "batch d_out"] | None = None,
    prefixes: Widths | None = None,
    sparsity_weight: float | Tensor = 0.0,
    code: Code | None = None,
    inner: float = 1.0,
) -> Loss:
    """L of `msae.sae.objective` for raw activations x, reconstructing `target` (x unless given).

    One encoder pass and one selection over all latents serve every level. `prefixes` are the SAE's unless given (a
    random draw, or "every"). `sparsity_weight` is λ; `code` is what `encode_for_training` gave, dense unless given;
    `inner` multiplies w_m of every level but the outermost. A sparse code has the loss and gradients of a dense one.
    """
    y = sae.normalise_target(x if target is None else target)
    code = code or encode_for_training(sae, x)
    dead = Dead(dead) if isinstance(dead, Tensor) else dead
    step = (y, objective.levels(sae, prefixes, inner), objective, dead, sparsity_weight)
    if isinstance(code, TrainingCode):
        with torch.autocast(sae.W_enc.device.type, enabled=False):
            loss = sparse_loss(sae, code, *step)
    else:
        assert isinstance(code, DenseCode), type(code)
        loss = dense_loss(sae, code, *step)
    return with_terms(loss, sae, code, y, objective)


def sparse_loss(
    sae: MatryoshkaSAE,
    code: TrainingCode,
    y: Float[Tensor, "batch d_out"],
    levels: Levels,
    objective: Objective,
    dead: Dead | None = None,
    sparsity_weight: float | Tensor = 0.0,
) -> Loss:
    """As `dense_loss`; with gradients computed here and handed to autograd, so it can be differentiated once.

    Autograd adds them up, reduces them over devices and leaves them in `.grad`. There is none for x and y.
    """
    assert not levels.every, "every prefix at once has no sparse step"
    assert not objective.needs_dense, "a term needs the gradient of every activation"
    latents, d_sae, W_dec = code.latents, sae.d_sae, sae.W_dec.detach()
    leaves, coefficients, penalty = entry_terms(sae, code, levels)
    by_latent = order, ends = code.kernels.by_latent(latents, d_sae)
    decoded, aux = decoder_step(sae, code, coefficients.detach(), by_latent, y, levels, objective, dead)
    errors, grad_u = decoded.errors, decoded.grad_acts
    weights = constant(levels.weights.tolist(), errors)
    total = (weights * errors).sum().to(y.dtype) + objective.aux.coefficient * aux.loss

    of_leaves: dict[str, Tensor] = {}
    if leaves:
        total = total + (sparsity_weight * penalty.detach()).to(total)
        with torch.enable_grad():
            through_entries = (coefficients * grad_u).sum() + sparsity_weight * penalty
        grads = torch.autograd.grad(through_entries, list(leaves.values()), allow_unused=True)
        of_leaves = dict(zip(leaves, grads, strict=True))
        grad_u = of_leaves["u"]

    def gradients(scale: Tensor | None) -> list[Tensor]:
        """Those of the parameters, times `scale`: what is small is multiplied by it before it becomes large."""

        def scaled(tensor: Tensor) -> Tensor:
            return tensor if scale is None else tensor * scale

        of_entries = scaled(grad_u)
        grad_W_enc = code.kernels.sum_rows(code.h, code.rows[order], of_entries[order], ends)
        grad_b_enc = code.kernels.sums(latents, of_entries, by_latent)
        grad_W_dec, grad_b_dec = decoded.grad_W_dec(scale), scaled(decoded.grad_b_dec)
        if (grad_norm := of_leaves.get("norm")) is not None:
            grad_W_dec += W_dec * scaled(grad_norm / W_dec.norm(dim=1))[:, None]
        for index, *of_dead in aux.grad_dead:
            for whole, part in zip((grad_W_enc, grad_b_enc, grad_W_dec), of_dead, strict=True):
                whole.index_add_(0, index, scaled(part))
        if sae.apply_b_dec_to_input:
            grad_b_dec = grad_b_dec - grad_b_enc @ sae.W_enc.detach().T
        of_threshold = of_leaves.get("threshold")
        of_thresholds = [] if of_threshold is None else [code.kernels.sums(latents, scaled(of_threshold), by_latent)]
        return [grad_W_enc.T, grad_b_enc, grad_W_dec, grad_b_dec, *of_thresholds]

    parameters: list[Tensor] = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    if "threshold" in leaves:
        parameters.append(sae.threshold)
    total = KnownGradients.apply(total, gradients, *parameters)
    return Loss(total, errors, aux.loss, penalty.detach(), {}, code)


# --- what is active ---------------------------------------------------------------------------------------------------


def entry_terms(
    sae: MatryoshkaSAE, code: TrainingCode, levels: Levels
) -> tuple[dict[str, Tensor], Float[Tensor, " n"], Float[Tensor, ""]]:
    """(leaves, coefficients of the W_dec rows, penalty): small enough for autograd, which differentiates by the leaves.

    No leaves where an entry passes as it is and costs nothing: its coefficient is then u.
    """
    sparsity, is_rescaled = sae.sparsity, sae.rescale_acts_by_decoder_norm
    if sparsity.is_plain:
        return {}, code.u, code.u.new_zeros(())
    leaves = {"u": code.u.detach().requires_grad_()}
    norm, threshold = code.u.new_ones(()), sae.threshold.detach()[code.latents]
    if is_rescaled or sparsity.has_penalty:
        leaves["norm"] = sae.W_dec.detach().norm(dim=1).requires_grad_()
    if sparsity.threshold_is == "learned":
        leaves["threshold"] = threshold.requires_grad_()

    def by_row(values: Tensor) -> Tensor:
        return values.new_zeros(code.batch).index_add(0, code.rows, values)

    with torch.enable_grad():
        if "norm" in leaves:
            norm = leaves["norm"][code.latents]
        pre = leaves["u"] * norm if is_rescaled else leaves["u"]
        acts = sparsity.activate(pre, threshold)
        penalty = pre.new_zeros(())
        if sparsity.has_penalty:
            paid = paid_by(levels, code.latents, pre)
            entries = Entries(pre, acts, 1.0 if is_rescaled else norm, threshold, paid, by_row, code.batch)
            penalty = sparsity.penalty(entries, sae.k)
        coefficients = acts / norm if is_rescaled else acts
    return leaves, coefficients, penalty


# --- the decoder ------------------------------------------------------------------------------------------------------


class Auxiliary(NamedTuple):
    """AuxK's loss, and α times its gradients.

    grad_residuals: by the residual's number; grad_dead: (dead latents, of their rows of W_encᵀ, b_enc and W_dec).
    """

    loss: Tensor
    grad_residuals: dict[int, Tensor]
    grad_dead: list[tuple[Tensor, ...]]


def decoder_step(
    sae: MatryoshkaSAE,
    code: TrainingCode,
    coefficients: Float[Tensor, " n"],
    by_latent: tuple[Int[Tensor, " n"], Int[Tensor, " d_sae_and_1"]],
    y: Float[Tensor, "batch d_out"],
    levels: Levels,
    objective: Objective,
    dead: Dead | None,
) -> tuple[Decoded, Auxiliary]:
    """The errors and gradients of the decoder, and AuxK.

    In one pass where there is a kernel for it and AuxK needs only the last residual.
    """
    kernels, aux, share, widths = code.kernels, objective.aux, objective.share(sae), levels.widths
    entries, target = decoding(sae, code, coefficients, widths), y - sae.b_dec.detach()
    factors = (levels.weights * (-2 * share / code.batch)).tolist()
    chain = (Weights(factors, constant(factors, target)), objective.stop_gradient)
    dead = dead if aux.coefficient > 0 else None

    if dead is None or (aux.detach and not aux.per_level):
        outermost = None if dead is None else torch.empty_like(target)
        decoded = kernels.decode(entries, target, *chain, by_latent, outermost)
        if decoded is not None:
            of_levels = [] if outermost is None else [outermost]
            auxiliary = sparse_auxk(sae, code.h, of_levels, [sae.d_sae], aux, share, dead, code.in_bfloat16)
            return decoded._replace(errors=decoded.errors * share), auxiliary

    residuals, errors = kernels.residuals(entries, target)
    numbers = range(len(widths)) if aux.per_level else [len(widths) - 1]  # of the levels that AuxK reconstructs
    of_levels, groups = [residuals[:, level] for level in numbers], [widths[level] for level in numbers]
    auxiliary = sparse_auxk(sae, code.h, of_levels, groups, aux, share, dead, code.in_bfloat16)
    others = {numbers[i]: gradient for i, gradient in auxiliary.grad_residuals.items()}
    gradients, dots = kernels.decoder_backward(entries, residuals, *chain, others)
    return kernels.decoded(entries, gradients, errors * share, dots, by_latent), auxiliary


def sparse_auxk(
    sae: MatryoshkaSAE,
    h: Float[Tensor, "batch d_in"],
    residuals: Sequence[Tensor],
    widths: Sequence[int],
    aux: AuxK,
    share: float,
    dead: Dead | None,
    in_bfloat16: bool = False,
) -> Auxiliary:
    """As `auxk_loss`, with gradients.

    The dead rows are copied out first, so that their gradients are no larger than they are. A CPU takes a part of the
    batch at a time, so that its activations stay in cache; but all at once if the residual is to be trained. Products
    are in bfloat16 where the encoder's were.
    """
    loss, grad_residuals, grad_dead = h.new_zeros(()), dict[int, Tensor](), list[tuple[Tensor, ...]]()
    if dead is None:
        return Auxiliary(loss, grad_residuals, grad_dead)
    share = share if aux.normalise == "none" else 1.0
    for number, (residual, index) in enumerate(zip(residuals, dead.groups(widths), strict=True)):
        if len(index) == 0:
            continue
        weight = per_energy(residual, aux) * (share / len(h))
        rows = [t.detach()[index].requires_grad_() for t in (sae.W_enc.T, sae.b_enc, sae.W_dec)]
        sums = [torch.zeros_like(t) for t in rows]
        size = AUXK_ROWS if aux.detach and h.device.type == "cpu" else len(h)
        for inputs, e in zip(h.split(size), residual.split(size), strict=True):
            e = e.detach().requires_grad_(not aux.detach)
            with torch.enable_grad(), torch.autocast(h.device.type, torch.bfloat16, enabled=in_bfloat16):
                directions, bias, W_dec = rows
                pre = torch.addmm(bias, inputs, directions.T)
                if sae.rescale_acts_by_decoder_norm:
                    norm = W_dec.norm(dim=1)
                    pre, W_dec = pre * norm, W_dec / norm[:, None]
                part = auxk_level(pre, e, W_dec, aux) * weight
            loss = loss + part.detach()
            gradients = torch.autograd.grad(aux.coefficient * part, rows if aux.detach else [*rows, e])
            torch._foreach_add_(sums, gradients[:3])
            if not aux.detach:
                grad_residuals[number] = gradients[3]
        grad_dead.append((index, *sums))
    return Auxiliary(loss, grad_residuals, grad_dead)


class KnownGradients(torch.autograd.Function):
    """A scalar whose gradients, times a factor, are known; they are handed over, so it can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any, total: Tensor, gradients: Callable[[Tensor | None], list[Tensor]], *parameters: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the sparse step can be differentiated only once"
        is_one = grad.device.type == "cpu" and float(grad) == 1  # looking at it would make a GPU wait
        with torch.autocast(grad.device.type, enabled=False):
            return (None, None, *gradients(None if is_one else grad))
