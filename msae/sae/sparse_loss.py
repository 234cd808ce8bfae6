"""The loss of the sparse step and all its gradients, by hand, from the entries that are active."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from msae.sae.auxk import AuxK, auxk_level, to_explain
from msae.sae.kernels import compiled
from msae.sae.model import MatryoshkaSAE
from msae.sae.sparse import SparseCode, acts_of, bins_of, sent, sums_by_latent, without_autocast
from msae.sae.sparsity import PENALTIES, count_above, l0_penalty, paid_by_latent

AUXK_ROWS = 512  # at a time: what they need stays in cache


@without_autocast
def sparse_loss(
    sae: MatryoshkaSAE,
    code: SparseCode,
    y: Float[Tensor, "batch d_out"],
    widths: Sequence[int],
    weights: Float[Tensor, " levels"],
    share: float,
    stop_gradient: bool,
    aux: AuxK,
    dead: Bool[Tensor, " d_sae"] | None,
    sparsity_weight: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total with gradient, share · E‖y' − recon_m‖² of each level, aux, sparsity) as in `matryoshka_loss`.

    All gradients are computed here by hand and handed to autograd, which adds them up, reduces them over devices and
    leaves them in `.grad`, as those of the dense step. There is none for x and y.
    """
    use, rows, latents, batch = code.kernels, code.rows, code.latents, len(code.h)
    levels, d_sae = len(widths), sae.d_sae
    bins = bins_of(code, widths)
    W_enc, W_dec, b_dec = sae.W_enc.detach().T, sae.W_dec.detach(), sae.b_dec.detach()

    leaves, coefficient, sparsity = _local(sae, code, widths, weights)
    c = coefficient.detach()
    order, ends = use.by_latent(latents, d_sae)
    scaled, target = (weights * (-2 * share / batch)).tolist(), y - b_dec
    dead = dead if aux.coefficient > 0 else None
    if use is compiled and compiled.able(c, W_dec, target) and (dead is None or (aux.detach and not aux.per_level)):
        outermost = None if dead is None else torch.empty_like(target)
        to_c, to_W_dec, to_b_dec, errors = compiled.decode(
            c, latents, bins, W_dec, target, scaled, stop_gradient, order, ends, outermost
        )
        residuals = [] if outermost is None else [outermost]
        auxiliary, _, to_dead = _auxiliary(sae, code.h, residuals, [d_sae], aux, share, dead)
    else:
        left, errors = use.residuals(c, latents, bins, W_dec, target, levels)
        answering = range(levels) if aux.per_level else [levels - 1]
        residuals, edges = [left[:, level] for level in answering], [widths[level] for level in answering]
        auxiliary, to_residual, to_dead = _auxiliary(sae, code.h, residuals, edges, aux, share, dead)
        to_left = {answering[i]: gradient for i, gradient in to_residual.items()}
        told, to_c = use.tell(left, scaled, stop_gradient, to_left, latents, bins, W_dec)
        to_W_dec = use.rows_sum(told.flatten(0, 1), bins[order], c[order], ends)
        to_b_dec = told[:, 0].sum(0)
    errors = errors * share
    total = (sent(weights, errors) * errors).sum().to(y.dtype) + aux.coefficient * auxiliary

    to_u, to_norm, to_threshold = to_c, None, None  # for BatchTopK and TopK the coefficient is u
    if leaves:
        weight = torch.as_tensor(sparsity_weight, dtype=sparsity.dtype, device=sparsity.device)
        total = total + weight * sparsity.detach()
        outputs, given = (
            ([coefficient, sparsity], [to_c, weight]) if sparsity.requires_grad else ([coefficient], [to_c])
        )
        gradients = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)
        by_name = dict(zip(leaves, gradients, strict=True))
        to_u, to_norm, to_threshold = by_name["u"], by_name.get("norm"), by_name.get("threshold")

    to_W_enc = use.rows_sum(code.h, rows[order], to_u[order], ends)
    to_b_enc = sums_by_latent(latents, to_u, d_sae)
    if to_norm is not None:
        to_W_dec += W_dec * (to_norm / W_dec.norm(dim=1))[:, None]
    for index, *of_dead in to_dead:
        for whole, part in zip((to_W_enc, to_b_enc, to_W_dec), of_dead, strict=True):
            whole.index_add_(0, index, part)
    if sae.apply_b_dec_to_input:
        to_b_dec -= to_b_enc @ W_enc
    known = {sae.W_enc: to_W_enc.T, sae.b_enc: to_b_enc, sae.W_dec: to_W_dec, sae.b_dec: to_b_dec}
    if isinstance(sae.threshold, nn.Parameter):
        assert to_threshold is not None
        known[sae.threshold] = sums_by_latent(latents, to_threshold, d_sae)
    return _Given.apply(total, list(known.values()), *known), errors, auxiliary.detach(), sparsity.detach()


def _local(
    sae: MatryoshkaSAE, code: SparseCode, widths: Sequence[int], weights: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(what to differentiate by, coefficients of the W_dec rows, sparsity penalty), small enough for autograd."""
    sparsity = code.u.new_zeros(())
    if sae.sparsity in ("batch_topk", "topk"):
        return {}, code.u, sparsity
    leaves = {"u": code.u.detach().requires_grad_()}
    norm = None
    if sae.rescale_acts_by_decoder_norm or sae.sparsity in PENALTIES:
        leaves["norm"] = norm = sae.W_dec.detach().norm(dim=1).requires_grad_()
    if sae.sparsity == "jumprelu":
        leaves["threshold"] = sae.threshold.detach()[code.latents].requires_grad_()
    with torch.enable_grad():
        u, each_norm = leaves["u"], code.u.new_ones(()) if norm is None else norm[code.latents]
        scaled = u * each_norm if sae.rescale_acts_by_decoder_norm else u
        acts = acts_of(sae, scaled, leaves.get("threshold"))
        coefficient = acts / each_norm if sae.rescale_acts_by_decoder_norm else acts
        if sae.sparsity == "jumprelu":
            active = count_above(scaled, leaves["threshold"], sae.bandwidth)
            sparsity = l0_penalty(active.new_zeros(len(code.h)).index_add(0, code.rows, active), sae.k)
        else:
            paying = acts if sae.rescale_acts_by_decoder_norm else acts * each_norm
            paid = sent(paid_by_latent(widths, weights, sae.d_sae), paying)[code.latents]
            sparsity = (PENALTIES[sae.sparsity](paying) * paid).sum() / len(code.h)
    return leaves, coefficient, sparsity


def _auxiliary(
    sae: MatryoshkaSAE,
    h: Tensor,
    residuals: Sequence[Tensor],
    edges: Sequence[int],
    aux: AuxK,
    share: float,
    dead: Tensor | None,
) -> tuple[Tensor, dict[int, Tensor], list[tuple[Tensor, ...]]]:
    """As `auxk_loss` · share; α-weighted gradients for the residuals, by their number, and for the dead latents' rows.

    The dead rows are copied out first, so that their gradients are no larger than they are. A part of the batch at a
    time, so that its activations stay in cache; all at once if the residual is to be trained, for `auxk_level`.
    """
    total, to_residual, to_dead = h.new_zeros(()), dict[int, Tensor](), list[tuple[Tensor, ...]]()
    if dead is None:
        return total, to_residual, to_dead
    share = share if aux.normalise == "none" else 1.0
    for number, (residual, (start, stop)) in enumerate(zip(residuals, pairwise([0, *edges]), strict=True)):
        index = dead[start:stop].nonzero().squeeze(1) + start
        if len(index) == 0 or not (scale := to_explain(residual, aux)) > 0:
            continue
        rows = [t.detach()[index].requires_grad_() for t in (sae.W_enc.T, sae.b_enc, sae.W_dec)]
        sums = [torch.zeros_like(t) for t in rows]
        part = AUXK_ROWS if aux.detach else len(h)
        for here, left in zip(h.split(part), residual.split(part), strict=True):
            left = left.detach().requires_grad_(not aux.detach)
            with torch.enable_grad():
                directions, bias, W_dec = rows
                pre = torch.addmm(bias, here, directions.T)
                if sae.rescale_acts_by_decoder_norm:
                    norm = W_dec.norm(dim=1)
                    pre, W_dec = pre * norm, W_dec / norm[:, None]
                loss = auxk_level(pre, left, W_dec, aux) * (share / (len(h) * scale))
            total = total + loss.detach()
            if loss.requires_grad:
                wanted = rows if aux.detach else [*rows, left]
                gradients = torch.autograd.grad(aux.coefficient * loss, wanted)
                torch._foreach_add_(sums, gradients[:3])
                if not aux.detach:
                    to_residual[number] = gradients[3]
        to_dead.append((index, *sums))
    return total, to_residual, to_dead


class _Given(torch.autograd.Function):
    """A scalar whose gradients are known already; they are handed over, so it can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the sparse step can be differentiated only once"
        if grad.device.type != "cpu" or float(grad) != 1:  # looking at it would make a GPU wait
            torch._foreach_mul_(gradients, grad)
        return (None, None, *gradients)
