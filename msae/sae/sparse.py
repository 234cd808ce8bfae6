"""What is active, by work that is sparse in all but the encoder's product, and what it reconstructs."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msae.sae.kernels import compiled, plain, triton
from msae.sae.model import MatryoshkaSAE
from msae.sae.sparsity import jumprelu

KERNELS: dict[str, Any] = {"plain": plain, "compiled": compiled, "triton": triton}
Kernels = Literal["auto", "dense", "plain", "compiled", "triton"]
Function = TypeVar("Function", bound=Callable[..., Any])
SMALLEST = 1 << 24  # multiplications of the encoder below which the dense step is as fast
WORTH_COMPILING = 1 << 28
SAMPLE = 64  # rows of the batch itself that say where the bar of BatchTopK's filter must be
SLACK = (1.3, 2.6, 10.0)  # how many more than wanted the filter is to let through; the next one when it was too few
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
        return sums_by_latent(self.latents, (self.acts > 0).long(), self.d_sae)

    def mean_square(self, norm: Float[Tensor, " d_sae"] | float) -> Float[Tensor, " d_sae"]:
        """E (acts · norm)² of each latent."""
        return sums_by_latent(self.latents, self.acts.square(), self.d_sae) / len(self.h) * norm**2

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


def sums_by_latent(latents: Tensor, values: Tensor, d_sae: int) -> Tensor:
    """Σ values of each latent, always in the same order: on a GPU index_put_ sorts, index_add_ would not."""
    total = values.new_zeros(d_sae)
    if values.device.type == "cpu":
        return total.index_add_(0, latents, values)
    return total.index_put_((latents,), values, accumulate=True)


def without_autocast(function: Function) -> Function:
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


@without_autocast
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
    return SparseCode(rows, latents, u, acts_of(sae, pre, threshold), h, sae.d_sae, use)


def _bars(sample: Tensor, wanted: float) -> Iterator[tuple[float, Tensor]]:
    """Each slack and the bar that lets so many times `wanted` of the sample through, while these are few of it."""
    flat = sample.flatten()
    for slack in SLACK:
        rank = max(1, round(slack * wanted))
        if rank > DENSEST * len(flat):
            return
        yield slack, flat.topk(rank, sorted=False).values.min()


def _batch_topk(
    sae: MatryoshkaSAE, sample: Tensor, h: Tensor, use: Any, W: Tensor, b: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor] | None:
    """(row · d_sae + latent, u) of the k · batch largest positive entries, unsorted."""
    wanted = round(sae.k * len(h))
    for _, bar in _bars(sample, wanted * len(sample) / len(h)):
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
    wanted = round(sae.k * len(h))
    for slack, bar in _bars(sample, wanted * len(sample) / len(h)):
        room = min(round(ROOM * slack * wanted), len(h) * sae.d_sae)
        index, u, count = triton.largest(left, right, b, bar, norm, wanted, room)
        code = _code(sae, index, u, h, triton, norm)
        n, fine = torch.stack([count, ((bar > 0) & u.isfinite().all()).to(count)]).tolist()
        if not fine:
            return None
        if wanted <= n <= room:
            return code
    return None


def acts_of(sae: MatryoshkaSAE, pre: Tensor, threshold: Tensor | None) -> Tensor:
    """What the entries' activations are: JumpReLU where there is a threshold to be trained, else ReLU."""
    return pre.relu() if threshold is None else jumprelu(pre, threshold, sae.bandwidth)


@torch.no_grad()
def sparse_errors(
    sae: MatryoshkaSAE, code: SparseCode, y: Float[Tensor, "batch d_out"], widths: Sequence[int]
) -> Float[Tensor, " levels"]:
    """E‖y' − recon_m‖² of each width, float64."""
    return _residuals(sae, code, y - sae.b_dec, widths)[1]


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
    left, _ = _residuals(sae, code, (-sae.b_dec).repeat(len(x), 1), sae.prefixes)
    return code.fired(), list(left.neg_().unbind(1))


@torch.no_grad()
def encode_sparse(
    sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"], kernels: Kernels = "auto"
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Row, latent and activation of the nonzero entries of `encode(x)`, by row, then latent."""
    chosen = choose_kernels(kernels, sae, x)
    code = None if chosen == "dense" else sparse_encode(sae, x, chosen, inference=True)
    if code is not None:
        return code.rows, code.latents, code.acts
    acts = sae.encode(x)
    row, latent = acts.nonzero(as_tuple=True)
    return row, latent, acts[row, latent]


def _residuals(sae: MatryoshkaSAE, code: SparseCode, target: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """target − Σ of what is active up to each width, and its E‖·‖²."""
    norm = sae.W_dec.norm(dim=1)[code.latents] if sae.rescale_acts_by_decoder_norm else 1.0
    W_dec, bins = sae.W_dec.detach(), bins_of(code, widths)
    return code.kernels.residuals(code.acts / norm, code.latents, bins, W_dec, target, len(widths))


def bins_of(code: SparseCode, widths: Sequence[int]) -> Tensor:
    """row · levels + the innermost level of each entry."""
    edges = sent(torch.tensor(list(widths)), code.latents)
    return code.rows * len(widths) + torch.searchsorted(edges, code.latents, right=True)


def sent(tensor: Tensor, to: Tensor) -> Tensor:
    """A small tensor of the host in the type and on the device of another, without waiting for that."""
    return tensor.to(to.device, to.dtype, non_blocking=True)
