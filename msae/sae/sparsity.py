"""Which latents are active and what that costs: BatchTopK, TopK, JumpReLU, L1 and log penalties, the L0 controller."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def batch_topk(pre: Float[Tensor, "*batch d_sae"], k: float) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k · tokens largest positive pre-activations of the whole batch, set all others to zero.

    BatchTopK (Bussmann et al. 2024, arXiv 2412.06410, eq. 4). A token is every position of the leading dimensions,
    so a [sequences, positions, d_sae] input keeps k · sequences · positions entries. Under several devices each one
    selects within its own batch. Gradients reach the kept entries alone.
    """
    acts = pre.relu().flatten()
    tokens = pre.numel() // pre.shape[-1]
    keep = min(round(k * tokens), acts.numel())
    values, index = acts.topk(keep, sorted=False)
    return torch.zeros_like(acts).scatter(0, index, values).view_as(pre)


def topk(pre: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k largest positive pre-activations of each token (Gao et al. 2024, arXiv 2406.04093, eq. 2)."""
    values, index = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, index, values.relu())


# --- JumpReLU: straight-through gradients to the thresholds (Rajamanoharan et al. 2024, arXiv 2407.14435) ---------


def _near(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel K((pre − θ) / ε): 1 within half a bandwidth of the threshold."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        to_threshold = -threshold / ctx.bandwidth * _near(pre, threshold, ctx.bandwidth) * grad
        return grad * (pre > threshold), to_threshold.reshape(-1, pre.shape[-1]).sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        to_threshold = -_near(pre, threshold, ctx.bandwidth) / ctx.bandwidth * grad
        return None, to_threshold.reshape(-1, pre.shape[-1]).sum(0), None


def jumprelu(
    pre: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "*batch d_sae"]:
    """pre · H(pre − θ), with ∂/∂θ = −θ/ε · K((pre − θ)/ε), K the rectangle (arXiv 2407.14435, eq. 11)."""
    return _JumpReLU.apply(pre, threshold, bandwidth)


def quadratic_l0(
    pre: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float, target: float
) -> Float[Tensor, ""]:
    """E (2 / L0*) (L0 − L0*)², L0 = Σ H(pre − θ), with ∂H/∂θ = −K((pre − θ)/ε)/ε (Gemma Scope 2's penalty)."""
    return l0_penalty(count_above(pre, threshold, bandwidth).sum(-1), target)


def count_above(
    pre: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "*batch d_sae"]:
    """H(pre − θ), with the gradient above."""
    return _Step.apply(pre, threshold, bandwidth)


def l0_penalty(l0: Float[Tensor, "*batch"], target: float) -> Float[Tensor, ""]:
    """E (2 / L0*) (L0 − L0*)²."""
    return (2 / target * (l0 - target).square()).mean()


# --- penalties on the activations of each latent ------------------------------------------------------------------


def l1(acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """a, which is |a| for activations that are never negative."""
    return acts


def log(acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """log(a + 0.1) − log 0.1 (the code of noanabeshima/matryoshka-saes)."""
    return (acts + 0.1).log() - math.log(0.1)


PENALTIES = {"l1": l1, "log": log}


def paid_by_latent(widths: Sequence[int], weights: Float[Tensor, " levels"], d_sae: int) -> Float[Tensor, " d_sae"]:
    """Σ_m w_m of the levels m that a latent serves: latent j is in every level wider than j."""
    ends = torch.tensor(list(widths), device=weights.device)
    at = torch.zeros(d_sae + 1, dtype=weights.dtype, device=weights.device).index_add_(0, ends, weights)
    return at[1:].flip(0).cumsum(0).flip(0)


class L0Controller(nn.Module):
    """The weight λ of the sparsity penalty: a linear warm-up, then × (1 ± rate) a step towards the wanted L0.

    λ grows while L0 ≥ target and shrinks while it is less (Nabeshima's controller, rate 3e-4); rate 0 keeps it.
    `start` is λ at the end of the warm-up of `warmup_steps`. It moves once a step, however many batches the step has.
    The state is the number of moves up and down, and the step of the last one, [3].
    """

    moves: Tensor

    def __init__(self, start: float, target: float, rate: float = 0.0, warmup_steps: int = 0) -> None:
        super().__init__()
        self.start, self.target, self.rate, self.warmup_steps = start, target, rate, warmup_steps
        self.register_buffer("moves", torch.zeros(3, dtype=torch.int64))  # whole numbers: no cast can touch them

    @torch.no_grad()
    def forward(self, l0: Tensor, step: int) -> Tensor:
        """λ of this step, counted from 1, whose batch has `l0` active latents a token; a float64 scalar."""
        if step <= self.warmup_steps:
            return self.weight * (step / self.warmup_steps)
        up, due = l0 >= self.target, step > self.moves[2]
        self.moves += torch.stack([up & due, ~up & due, (step - self.moves[2]) * due])
        return self.weight

    @property
    def weight(self) -> Tensor:
        """start · (1 + rate)^up · (1 − rate)^down."""
        up, down, _ = self.moves.double()
        return self.start * (1 + self.rate) ** up * (1 - self.rate) ** down


# --- thresholds for inference -------------------------------------------------------------------------------------


@torch.no_grad()
def quantile_thresholds(
    batches: Iterable[Float[Tensor, "_ d_sae"]], k: float, tokens: int, widths: Sequence[int]
) -> list[float]:
    """For each width the threshold above which k of its first pre-activations a token lie on average.

    That is the (k · tokens + 1)-th largest of all. Exact in one streaming pass that holds k · tokens numbers for each
    width, however they are spread over the batches. `tokens` is the number of rows that the batches hold together.
    At least 0, since a latent is never negative. Raises ValueError if there are no tokens.
    """
    if tokens <= 0:
        raise ValueError("there are no held-out rows to calibrate the threshold on; harvest more of them")
    wanted = round(k * tokens) + 1
    largest = [torch.empty(0)] * len(widths)
    bars = [0.0] * len(widths)
    for pre in batches:
        for i, width in enumerate(widths):
            group = pre[:, :width]
            merged = torch.cat([largest[i].to(pre.device), group[group > bars[i]].float()])
            largest[i] = merged.topk(wanted, sorted=False).values if len(merged) > wanted else merged
            if len(largest[i]) == wanted:
                bars[i] = float(largest[i].min())
    return bars
