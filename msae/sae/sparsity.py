"""Which latents are active, what that costs and how it is saved: a class for each mechanism."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, InstanceOf, PlainSerializer, WithJsonSchema
from torch import Tensor, nn

from msae.settings import NonNegative, Positive, Share, as_plain, as_typed, decode, settings

SPARSITIES: dict[str, type["Sparsity"]] = {}  # every subclass, by its name


class Entries(NamedTuple):
    """The entries that a penalty charges: all of a batch [batch, d_sae], or only the active ones [n].

    norm (‖W_dec row‖, 1 where acts are rescaled by it), threshold and paid (Σ_m w_m of the levels that a latent serves)
    are those of each entry's latent; `by_row` sums entries by row [batch].
    """

    pre: Tensor
    acts: Tensor
    norm: Tensor | float
    threshold: Tensor
    paid: Tensor
    by_row: Callable[[Tensor], Tensor]
    batch: int

    @property
    def contribution(self) -> Tensor:
        """acts · ‖W_dec row‖: the length of what each entry adds to the reconstruction."""
        return self.acts * self.norm


@runtime_checkable
class Screen(Protocol):
    """Selections by sparse work (`msae.sae.fast.code.Screen`); each is None where dense work is faster."""

    def above(self, bar: Tensor) -> Any:
        """The entries whose pre-activation exceeds their latent's bar [d_sae]."""

    def largest(self, k: float) -> Any:
        """The k · batch largest positive entries of the batch."""

    def largest_of_each_row(self, k: int) -> Any:
        """The k largest positive entries of each row."""


@settings
class Sparsity:
    """A sparsity mechanism. To add one, subclass this with a `name` and `select`; every other default is safe.

    - `select` selects while training. At inference a latent is active above `threshold`, unless `infer` is overridden.
    - `active` and `infer_active` select the same by sparse work. A subclass that overrides `select` without `active`,
      or `infer` without `infer_active`, takes the dense path.
    - `penalty` is S of the objective, which λ multiplies.
    - `threshold_is` `calibrated` (not set at first; an average of the smallest active values while training, then set
      on held-out rows so that k latents are active on average), `learned`, `zero`, or `unused`: latents are ranked.
    - `architecture` is SAELens's name for what inference does, `trained_as` its name for what training does.
    Fields are settings of the mechanism, as in `model.sparsity={name: jumprelu, bandwidth: 0.01}`.
    """

    name: ClassVar[str] = ""
    threshold_is: ClassVar[Literal["calibrated", "learned", "zero", "unused"]] = "calibrated"
    architecture: ClassVar[str] = "jumprelu"
    trained_as: ClassVar[str] = "standard"

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            SPARSITIES[cls.name] = cls
        for dense, sparse in (("select", "active"), ("infer", "infer_active")):
            if dense in vars(cls) and sparse not in vars(cls):
                setattr(cls, sparse, Sparsity.active)

    def select(
        self, pre: Float[Tensor, "*batch d_sae"], k: float, threshold: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Activations of a training batch."""
        raise NotImplementedError(f"{type(self).__name__} has no select")

    def activate(self, pre: Tensor, threshold: Tensor) -> Tensor:
        """Activations of selected entries, of any shape."""
        return pre.relu()

    def penalty(self, entries: Entries, k: float) -> Float[Tensor, ""]:
        """S, before λ."""
        return entries.pre.new_zeros(())

    def infer(
        self, pre: Float[Tensor, "*batch d_sae"], k: float, threshold: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Activations at inference, which do not depend on the rest of the batch."""
        return torch.where(pre > threshold.to(pre.dtype), pre.relu(), 0.0)

    def active(self, screen: Screen, k: float, threshold: Tensor) -> Any:
        """The code of what `select` selects, by sparse work; None where dense work is faster or the only way."""
        return None

    def infer_active(self, screen: Screen, k: float, threshold: Tensor) -> Any:
        """The code of what `infer` selects, by sparse work."""
        return screen.above(threshold.clamp_min(0))

    def first_threshold(self) -> float:
        """Every latent's threshold at the start: NaN where it is not set yet."""
        return 0.0 if self.threshold_is == "zero" else math.nan

    @property
    def has_penalty(self) -> bool:
        """Whether training pays for what is active."""
        return type(self).penalty is not Sparsity.penalty

    @property
    def is_plain(self) -> bool:
        """Whether a selected entry passes unchanged and costs nothing: its gradient is that of pre."""
        return not self.has_penalty and type(self).activate is Sparsity.activate


class BatchTopK(Sparsity):
    """The k · tokens largest pre-activations of the batch (Bussmann et al. 2024, arXiv 2412.06410)."""

    name = "batch_topk"
    trained_as = "matryoshka_batchtopk"

    def select(self, pre: Tensor, k: float, threshold: Tensor) -> Tensor:
        return batch_topk(pre, k)

    def active(self, screen: Screen, k: float, threshold: Tensor) -> Any:
        return screen.largest(k)


class TopK(Sparsity):
    """The k largest pre-activations of each token, at inference too (Gao et al. 2024, arXiv 2406.04093)."""

    name = "topk"
    threshold_is = "unused"
    architecture = trained_as = "topk"

    def select(self, pre: Tensor, k: float, threshold: Tensor) -> Tensor:
        return topk(pre, int(k))

    infer = select

    def active(self, screen: Screen, k: float, threshold: Tensor) -> Any:
        return screen.largest_of_each_row(int(k))

    infer_active = active


@settings
class JumpReLU(Sparsity):
    """pre · H(pre − θ) with θ learned and a quadratic penalty on L0 (arXiv 2407.14435; Gemma Scope 2)."""

    name = "jumprelu"
    threshold_is = "learned"
    trained_as = "jumprelu"

    threshold_init: NonNegative = 0.001
    """θ of every latent at the start."""
    bandwidth: Positive = 0.001
    """ε of the straight-through gradients: the width around θ in which they are felt."""

    def select(self, pre: Tensor, k: float, threshold: Tensor) -> Tensor:
        return jumprelu(pre, threshold.to(pre.dtype), self.bandwidth)

    def activate(self, pre: Tensor, threshold: Tensor) -> Tensor:
        return jumprelu(pre, threshold, self.bandwidth)

    def first_threshold(self) -> float:
        return self.threshold_init

    def penalty(self, entries: Entries, k: float) -> Tensor:
        active = count_above(entries.pre, entries.threshold, self.bandwidth)
        return l0_penalty(entries.by_row(active), k)

    def active(self, screen: Screen, k: float, threshold: Tensor) -> Any:
        return screen.above(threshold - self.bandwidth / 2)


class L1(Sparsity):
    """A ReLU that pays Σ_m w_m E Σ_{j<m} φ(a_j ‖W_dec,j‖) with φ(a) = a: a latent pays for each level it serves."""

    name = "l1"
    threshold_is = "zero"
    architecture = "standard"

    @staticmethod
    def cost(contribution: Tensor) -> Tensor:
        """φ."""
        return contribution

    def select(self, pre: Tensor, k: float, threshold: Tensor) -> Tensor:
        return pre.relu()

    def penalty(self, entries: Entries, k: float) -> Tensor:
        return (self.cost(entries.contribution) * entries.paid).sum() / entries.batch

    def active(self, screen: Screen, k: float, threshold: Tensor) -> Any:
        return screen.above(torch.zeros_like(threshold))


class Log(L1):
    """As `L1` with φ(a) = log(a + 0.1) − log 0.1 (the code of noanabeshima/matryoshka-saes)."""

    name = "log"

    @staticmethod
    def cost(contribution: Tensor) -> Tensor:
        return (contribution + 0.1).log() - math.log(0.1)


def sparsity_of(setting: Any) -> Sparsity:
    """The mechanism that a name, or {name: …, settings}, describes. Raises ValueError in one line."""
    if isinstance(setting, Sparsity):
        return setting
    values = dict(setting) if isinstance(setting, dict) else {"name": setting}
    name = values.pop("name", BatchTopK.name)
    if name not in SPARSITIES:
        raise ValueError(f"model.sparsity={as_typed(name)}: expected {' | '.join(SPARSITIES)}")
    if values and not fields(SPARSITIES[name]):
        raise ValueError(f"unknown key model.sparsity.{next(iter(values))}; {name} has no settings")
    return decode(SPARSITIES[name], values, "model.sparsity")


def sparsity_as_plain(sparsity: Sparsity) -> Any:
    """The setting of a mechanism, which `sparsity_of` decodes: its name, or {name: …, settings} if it has any."""
    values = as_plain(sparsity)
    return {"name": sparsity.name, **values} if values else sparsity.name


SparsitySetting = Annotated[
    InstanceOf[Sparsity],
    BeforeValidator(sparsity_of),
    PlainSerializer(sparsity_as_plain),
    WithJsonSchema({"title": "a mechanism, or {name: …} with its settings"}),
]


# --- selections -------------------------------------------------------------------------------------------------------


def batch_topk(pre: Float[Tensor, "*batch d_sae"], k: float) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k · tokens largest positive pre-activations of the whole batch, set all others to zero.

    BatchTopK (Bussmann et al. 2024, arXiv 2412.06410, eq. 4). Every position of the leading dimensions is a token: of
    [sequences, positions, d_sae] k · sequences · positions entries are kept. Each of several devices selects within
    its own batch. Gradients reach only the kept entries.
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


# --- straight-through gradients to thresholds (Rajamanoharan et al. 2024, arXiv 2407.14435) ---------------------------


class _Jump(torch.autograd.Function):
    """pre (or 1, if `is_step`) where pre > θ, with K((pre − θ)/ε) = 1 within half a bandwidth ε of the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, is_step: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.is_step = bandwidth, is_step
        return (pre > threshold).to(pre.dtype) if is_step else torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        pre, threshold = ctx.saved_tensors
        height = torch.ones_like(threshold) if ctx.is_step else threshold
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        grad_threshold = (-height / ctx.bandwidth * near * grad).sum_to_size(threshold.shape)
        return None if ctx.is_step else grad * (pre > threshold), grad_threshold, None, None


def jumprelu(pre: Float[Tensor, "*batch d"], threshold: Float[Tensor, " d"], bandwidth: float) -> Tensor:
    """pre · H(pre − θ), with ∂/∂θ = −θ/ε · K((pre − θ)/ε), K the rectangle (arXiv 2407.14435, eq. 11)."""
    return _Jump.apply(pre, threshold, bandwidth, False)


def count_above(pre: Float[Tensor, "*batch d"], threshold: Float[Tensor, " d"], bandwidth: float) -> Tensor:
    """H(pre − θ), with ∂/∂θ = −K((pre − θ)/ε)/ε and no gradient to pre."""
    return _Jump.apply(pre, threshold, bandwidth, True)


def l0_penalty(l0: Float[Tensor, "*batch"], target: float) -> Float[Tensor, ""]:
    """E (2 / L0*) (L0 − L0*)² (Gemma Scope 2)."""
    return (2 / target * (l0 - target).square()).mean()


# --- λ ----------------------------------------------------------------------------------------------------------------


@settings
class Penalty:
    """The weight λ of the sparsity penalty over a run; k is the target L0."""

    weight: NonNegative = 1.0
    """λ at the end of the warm-up."""
    warmup_steps: NonNegative = 0
    """Steps over which λ rises linearly from 0; below 1: a share of all steps."""
    control: Share = 0.0
    """λ is multiplied by 1 ± this at each step, towards k active latents (Nabeshima: 3e-4)."""

    def steps(self, total: int) -> int:
        """The warm-up in steps of a run of `total`."""
        return round(self.warmup_steps * total) if self.warmup_steps < 1 else min(round(self.warmup_steps), total)


class L0Controller(nn.Module):
    """The weight λ of the sparsity penalty: a linear warm-up, then × (1 ± rate) a step towards the target L0.

    λ grows while L0 ≥ target and shrinks while it is less (Nabeshima's controller, rate 3e-4); rate 0 keeps it.
    `start` is λ at the end of the warm-up of `warmup_steps`. It moves once a step, however many batches the step has.
    The state [3] is the number of moves up, of moves down, and the step of the last one.
    """

    moves: Tensor

    def __init__(self, start: float, target: float, rate: float = 0.0, warmup_steps: int = 0) -> None:
        super().__init__()
        self.start, self.target, self.rate, self.warmup_steps = start, target, rate, warmup_steps
        self.register_buffer("moves", torch.zeros(3, dtype=torch.int64))  # ints: a cast to bfloat16 leaves them alone

    @torch.no_grad()
    def forward(self, l0: Tensor, step: int) -> Tensor:
        """λ of this step, counted from 1, whose batch has `l0` active latents a token; a float64 scalar."""
        if step <= self.warmup_steps:
            return self.weight * (step / self.warmup_steps)
        up, is_new = l0 >= self.target, step > self.moves[2]
        self.moves += torch.stack([up & is_new, ~up & is_new, (step - self.moves[2]) * is_new])
        return self.weight

    @property
    def weight(self) -> Tensor:
        """start · (1 + rate)^up · (1 − rate)^down."""
        up, down, _ = self.moves.double()
        return self.start * (1 + self.rate) ** up * (1 - self.rate) ** down


# --- thresholds for inference -----------------------------------------------------------------------------------------


@torch.no_grad()
def quantile_thresholds(
    batches: Iterable[Float[Tensor, "_ d_sae"]], k: float, tokens: int, widths: Sequence[int]
) -> list[float]:
    """For each width m the threshold that on average k of a token's first m pre-activations exceed.

    That is the (k · tokens + 1)-th largest of all, and at least 0, since a latent is never negative. Exact in one pass
    that holds k · tokens numbers for each width, however they are spread over the batches. `tokens` is the number of
    rows of all batches together. Raises ValueError if there are none.
    """
    if tokens <= 0:
        raise ValueError("there are no held-out rows to calibrate the threshold on; harvest more of them")
    count = round(k * tokens) + 1
    largest = [torch.empty(0)] * len(widths)
    bars = [0.0] * len(widths)
    for pre in batches:
        for i, width in enumerate(widths):
            group = pre[:, :width]
            merged = torch.cat([largest[i].to(pre.device), group[group > bars[i]].float()])
            largest[i] = merged.topk(count, sorted=False).values if len(merged) > count else merged
            if len(largest[i]) == count:
                bars[i] = float(largest[i].min())
    return bars
