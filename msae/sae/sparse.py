"""The training step by work proportional to what is active: all but the encoder's product is sparse."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from msae.sae.auxk import AuxK, auxk_level, to_explain
from msae.sae.kernels import compiled, plain, triton
from msae.sae.model import MatryoshkaSAE
from msae.sae.sparsity import PENALTIES, count_above, jumprelu, l0_penalty, paid_by_latent

KERNELS: dict[str, Any] = {"plain": plain, "compiled": compiled, "triton": triton}
Kernels = Literal["auto", "dense", "plain", "compiled", "triton"]
Function = TypeVar("Function", bound=Callable[..., Any])
SMALLEST = 1 << 24  # multiplications of the encoder below which the dense step is as fast
WORTH_COMPILING = 1 << 28
SAMPLE = 64  # rows of the batch itself that say where the bar of BatchTopK's filter must be
SLACK = (1.3, 2.6, 10.0)  # how many more than wanted the filter is to let through; the next one when it was too few
AUXK_ROWS = 512  # at a time: what they need stays in cache
ROOM = 2  # how many times as many as wanted fit behind a filter that nobody waits for
DENSEST = 1 / 16  # share of active entries above which the dense step is faster


@dataclass
class SparseCode:
    """The entries of a batch that are active, or near enough for a threshold's gradient, by row, then latent.

    rows, latents [n] int64; u [n] = x' W_enc + b_enc of the entry, before × ‖W_dec row‖ where pre is rescaled by it;
    acts [n] ≥ 0 (0 where only near); h = x' [batch, d_in]; d_sae; kernels: which implementation goes on with it.
    """

    rows: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    u: Float[Tensor, " n"]
    acts: Float[Tensor, " n"]
    h: Float[Tensor, "batch d_in"]
    d_sae: int
    kernels: Any

    @property
    def values(self) -> Float[Tensor, " n"]:
        """The activations; entries that are not here are 0."""
        return self.acts

    def fired(self) -> Int[Tensor, " d_sae"]:
        """In how many tokens each latent is active."""
        return _sums(self.latents, (self.acts > 0).long(), self.d_sae)

    def mean_square(self, norm: Float[Tensor, " d_sae"] | float) -> Float[Tensor, " d_sae"]:
        """E (acts · norm)² of each latent."""
        return _sums(self.latents, self.acts.square(), self.d_sae) / len(self.h) * norm**2

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """acts as a matrix."""
        return self.acts.new_zeros(len(self.h), self.d_sae).index_put_((self.rows, self.latents), self.acts)


def choose_kernels(kernels: Kernels, sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"]) -> str:
    """What `auto` stands for: `compiled` on a CPU (`plain` without a compiler); `dense` elsewhere, or if small.

    `triton` is only for who asks for it: compiled for GPUs and tested in Triton's interpreter, it has yet to run on
    one. Raises ValueError where it is not installed or cannot run.
    """
    if kernels == "triton":
        triton.require(sae.W_enc.device)
    if kernels != "auto":
        return kernels
    size = len(x) * sae.W_enc.numel()
    if sae.W_enc.device.type != "cpu" or sae.W_enc.dtype != torch.float32 or size < SMALLEST:
        return "dense"
    return "compiled" if size >= WORTH_COMPILING and compiled.library() is not None else "plain"


def _sums(latents: Tensor, values: Tensor, d_sae: int) -> Tensor:
    """Σ values of each latent, always in the same order: on a GPU index_put_ sorts, index_add_ would not."""
    total = values.new_zeros(d_sae)
    if values.device.type == "cpu":
        return total.index_add_(0, latents, values)
    return total.index_put_((latents,), values, accumulate=True)


def _without_autocast(function: Function) -> Function:
    """Whatever autocast says, the function computes in the type of the weights of its first argument, an SAE."""

    @functools.wraps(function)
    def exactly(sae: MatryoshkaSAE, *given: Any, **named: Any) -> Any:
        with torch.autocast(sae.W_enc.device.type, enabled=False):
            return function(sae, *given, **named)

    return exactly  # type: ignore[return-value]


@torch.no_grad()
def sparse_encode(
    sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"], kernels: str, inference: bool = False
) -> SparseCode | None:
    """The same selection as `select(pre(x))`, or `encode(x)`; None where so much is active that dense is faster.

    BatchTopK keeps k · batch entries exactly, from those above a bar that a sample of the batch's own rows sets so
    low that a few more pass than are wanted; when too few do, the bar is lowered. Ties are broken arbitrarily, by
    `triton` in favour of the first. Under autocast to bfloat16 `triton` multiplies W_enc in bfloat16, the others don't.
    """
    device = sae.W_enc.device.type
    low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return _encode(sae, x, KERNELS[kernels], low, inference)


@_without_autocast
def _encode(sae: MatryoshkaSAE, x: Tensor, use: Any, low: bool, inference: bool) -> SparseCode | None:
    h, W, b = sae.encoder_input(x), sae.W_enc.T, sae.b_enc.detach()
    norm = sae.W_dec.norm(dim=1) if sae.rescale_acts_by_decoder_norm else None
    scale = 1.0 if norm is None else norm
    on_device = use is triton and triton.able(h, W, b)
    if sae.sparsity == "topk":
        flat, u = use.row_survivors(h, W, b, int(sae.k), norm)
        flat, u = flat[~(u <= 0)], u[~(u <= 0)]
    else:
        left, right = (h.bfloat16(), W.bfloat16()) if low and on_device else (h, W)
        sample = h[:: max(1, len(h) // SAMPLE)]
        pre = torch.addmm(b, sample, W.T).mul_(scale)
        if sae.sparsity == "batch_topk" and not inference:
            if on_device:
                return _batch_topk_unseen(sae, pre, h, left, right, b, norm)
            found = _batch_topk(sae, pre, h, use, W, b, scale)
            if found is None:
                return None
            flat, u = found
        else:
            if inference:
                bar = sae.known_threshold().clamp_min(0)
            else:
                bar = sae.threshold - sae.bandwidth / 2 if sae.sparsity == "jumprelu" else torch.zeros_like(b)
            if (pre > bar).sum() > DENSEST * pre.numel():
                return None
            flat, u = use.survivors(left, right, b, bar / scale)
    if not bool(u.isfinite().all()):
        return None  # the dense step knows what becomes of them
    return _code(sae, flat, u, h, use, norm, inference)


def _code(
    sae: MatryoshkaSAE, flat: Tensor, u: Tensor, h: Tensor, use: Any, norm: Tensor | None, inference: bool = False
) -> SparseCode:
    if use is triton or not bool((flat[1:] > flat[:-1]).all()):  # nobody is to wait for that to be seen
        flat, order = flat.sort()
        u = u[order]
    rows = torch.div(flat, sae.d_sae, rounding_mode="floor")
    latents = flat - rows * sae.d_sae
    pre = u if norm is None else u * norm[latents]
    threshold = sae.threshold[latents] if sae.sparsity == "jumprelu" and not inference else None
    return SparseCode(rows, latents, u, _acts(sae, pre, threshold), h, sae.d_sae, use)


def _batch_topk(
    sae: MatryoshkaSAE, sample: Tensor, h: Tensor, use: Any, W: Tensor, b: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor] | None:
    """(row · d_sae + latent, u) of the k · batch largest positive entries, unsorted."""
    wanted = round(sae.k * len(h))
    flat = sample.flatten()
    for slack in SLACK:
        rank = max(1, round(slack * wanted * len(sample) / len(h)))
        if rank > DENSEST * len(flat):
            return None
        bar = flat.topk(rank, sorted=False).values.min()
        if not bar > 0:
            return None
        index, u = use.survivors(h, W, b, (bar / scale).expand_as(b) if isinstance(scale, float) else bar / scale)
        if len(u) >= wanted:
            ranked = u if isinstance(scale, float) else u * scale[index % sae.d_sae]
            kept = ranked.topk(wanted, sorted=False).indices
            chosen = torch.zeros_like(u, dtype=torch.bool).index_fill_(0, kept, True)
            return index[chosen], u[chosen]  # in the order that they came in
    return None


def _batch_topk_unseen(
    sae: MatryoshkaSAE, sample: Tensor, h: Tensor, left: Tensor, right: Tensor, b: Tensor, norm: Tensor | None
) -> SparseCode | None:
    """As `_batch_topk`, of left · right = h · W; the host asks only once, when all is on its way, if it went well."""
    wanted, flat = round(sae.k * len(h)), sample.flatten()
    for slack in SLACK:
        rank = max(1, round(slack * wanted * len(sample) / len(h)))
        if rank > DENSEST * len(flat):
            return None
        bar, room = flat.topk(rank, sorted=False).values.min(), min(round(ROOM * slack * wanted), len(h) * sae.d_sae)
        index, u, count = triton.largest(left, right, b, bar, norm, wanted, room)
        code = _code(sae, index, u, h, triton, norm)
        n, fine = torch.stack([count, ((bar > 0) & u.isfinite().all()).to(count)]).tolist()
        if not fine:
            return None
        if wanted <= n <= room:
            return code
    return None


@_without_autocast
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
    bins = _bins(code, widths)
    W_enc, W_dec, b_dec = sae.W_enc.detach().T, sae.W_dec.detach(), sae.b_dec.detach()

    leaves, coefficient, sparsity = _local(sae, code, widths, weights)
    c = coefficient.detach()
    order, ends = use.by_latent(latents, d_sae)
    scaled, target = (weights * (-2 * share / batch)).tolist(), y - b_dec
    dead = dead if aux.coefficient > 0 else None
    if use is compiled and compiled.able(c, W_dec, target) and (dead is None or (aux.detach and not aux.per_level)):
        outermost = [] if dead is None else [torch.empty_like(target)]
        to_c, to_W_dec, to_b_dec, errors = compiled.decode(
            c, latents, bins, W_dec, target, scaled, stop_gradient, order, ends, *outermost
        )
        auxiliary, _, to_dead = _auxiliary(sae, code.h, outermost, [d_sae][: len(outermost)], aux, share, dead)
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
    total = (_sent(weights, errors) * errors).sum().to(y.dtype) + aux.coefficient * auxiliary

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
    to_b_enc = _sums(latents, to_u, d_sae)
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
        known[sae.threshold] = _sums(latents, to_threshold, d_sae)
    return _Given.apply(total, list(known.values()), *known), errors, auxiliary.detach(), sparsity.detach()


def sparse_errors(
    sae: MatryoshkaSAE, code: SparseCode, y: Float[Tensor, "batch d_out"], widths: Sequence[int]
) -> Float[Tensor, " levels"]:
    """E‖y' − recon_m‖² of each width, float64, without gradient."""
    norm = sae.W_dec.norm(dim=1)[code.latents] if sae.rescale_acts_by_decoder_norm else 1.0
    bins = _bins(code, widths)
    return code.kernels.residuals(code.acts / norm, code.latents, bins, sae.W_dec.detach(), y - sae.b_dec, len(widths))[
        1
    ]


@torch.no_grad()
def reconstruct(
    sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"], kernels: Kernels = "auto"
) -> tuple[Int[Tensor, " d_sae"], list[Float[Tensor, "batch d_out"]]]:
    """In how many tokens each latent is active at inference, and every prefix's reconstruction in scaled units (y')."""
    chosen = choose_kernels(kernels, sae, x)
    code = None if chosen == "dense" else sparse_encode(sae, x, chosen, inference=True)
    if code is None:
        acts = sae.encode(x)
        return (acts > 0).sum(0), sae.decode_prefixes(acts)
    norm = sae.W_dec.norm(dim=1)[code.latents] if sae.rescale_acts_by_decoder_norm else 1.0
    bins, nothing = _bins(code, sae.prefixes), (-sae.b_dec).repeat(len(x), 1)
    levels = len(sae.prefixes)
    left, _ = code.kernels.residuals(code.acts / norm, code.latents, bins, sae.W_dec.detach(), nothing, levels)
    return code.fired(), list(left.neg_().unbind(1))


def _sent(tensor: Tensor, to: Tensor) -> Tensor:
    """A small tensor of the host in the type and on the device of another, without waiting for that."""
    return tensor.to(to.device, to.dtype, non_blocking=True)


def _bins(code: SparseCode, widths: Sequence[int]) -> Tensor:
    """row · levels + the innermost level of each entry."""
    edges = _sent(torch.tensor(list(widths)), code.latents)
    return code.rows * len(widths) + torch.searchsorted(edges, code.latents, right=True)


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
        acts = _acts(sae, scaled, leaves.get("threshold"))
        coefficient = acts / each_norm if sae.rescale_acts_by_decoder_norm else acts
        if sae.sparsity == "jumprelu":
            active = count_above(scaled, leaves["threshold"], sae.bandwidth)
            sparsity = l0_penalty(active.new_zeros(len(code.h)).index_add(0, code.rows, active), sae.k)
        else:
            paying = acts if sae.rescale_acts_by_decoder_norm else acts * each_norm
            paid = _sent(paid_by_latent(widths, weights, sae.d_sae), paying)[code.latents]
            sparsity = (PENALTIES[sae.sparsity](paying) * paid).sum() / len(code.h)
    return leaves, coefficient, sparsity


def _acts(sae: MatryoshkaSAE, pre: Tensor, threshold: Tensor | None) -> Tensor:
    return pre.relu() if threshold is None else jumprelu(pre, threshold, sae.bandwidth)


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
