"""Sparse codes, and how a batch is encoded into one by work that is sparse in all but the encoder's product."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msae.sae.fast import KERNELS, PLAIN, choose_kernels
from msae.sae.fast.plain import Decoding, Plain, sums_by_bin
from msae.sae.model import MatryoshkaSAE
from msae.sae.no_wait import constant
from msae.sae.objective import Code, DenseCode

AT_ONCE = 1 << 24  # entries that are added up at once
SAMPLE = 64  # rows of the batch itself whose pre-activations set the bar of BatchTopK's filter
SLACK = (1.3, 2.6, 10.0)  # the filter lets through so many times what is needed; the next one where that was too few
ROOM = 2  # memory is set aside for so many times what the filter is to let through
DENSEST = 1 / 16  # share of active entries above which the dense step is faster


@dataclass
class SparseCode:
    """The active entries of a matrix [batch, d_sae], sorted by row, then latent; a true code's latents are features.

    offsets [batch + 1] int64: where each row's entries start and end; latents, acts [n].
    """

    offsets: Int[Tensor, " batch_and_1"]
    latents: Int[Tensor, " n"]
    acts: Float[Tensor, " n"]
    d_sae: int

    @property
    def batch(self) -> int:
        """How many rows."""
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Int[Tensor, " n"]:
        """The row of each entry, int64."""
        numbers = torch.arange(self.batch, device=self.offsets.device)
        return numbers.repeat_interleave(self.offsets.diff(), output_size=len(self.latents))

    def fired(self) -> Int[Tensor, " d_sae"]:
        """In how many rows each latent is active."""
        counts = torch.zeros(self.d_sae, dtype=torch.int64, device=self.acts.device)
        for latents, acts in self._parts():
            counts += sums_by_bin(latents, (acts > 0).long(), self.d_sae)
        return counts

    def mean_square(self, norm: Float[Tensor, " d_sae"] | float) -> Float[Tensor, " d_sae"]:
        """E (acts · norm)² of each latent."""
        return sums_by_bin(self.latents, self.acts.square(), self.d_sae) / self.batch * norm**2

    def largest(self) -> Float[Tensor, " d_sae"]:
        """Each latent's largest activation, 0 where it never fires."""
        maxima = self.acts.new_zeros(self.d_sae)
        for latents, acts in self._parts():
            maxima.scatter_reduce_(0, latents.long(), acts, "amax")
        return maxima

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents and activations in parts: a code may be of a whole data set."""
        return zip(self.latents.split(AT_ONCE), self.acts.split(AT_ONCE), strict=True)

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """The activations as a matrix."""
        return self.acts.new_zeros(self.batch, self.d_sae).index_put_((self.rows, self.latents), self.acts)

    def where(self, keep: Bool[Tensor, " n"]) -> "SparseCode":
        """Only the entries that `keep` marks."""
        kept_before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
        return SparseCode(kept_before[self.offsets], self.latents[keep], self.acts[keep], self.d_sae)

    def strong(self, floor: float) -> "SparseCode":
        """The entries that exceed `floor` × their latent's own maximum."""
        return self.where(self.acts > floor * self.largest()[self.latents])

    def also_in(self, other: "SparseCode") -> Bool[Tensor, " n"]:
        """Which entries are entries of the other code too."""
        return torch.isin(self.rows * self.d_sae + self.latents, other.rows * other.d_sae + other.latents)

    @staticmethod
    def cat(parts: Sequence["SparseCode"]) -> "SparseCode":
        """The rows of several codes, one code after the other."""
        ends = torch.cat([part.offsets.diff() for part in parts]).cumsum(0)
        latents, acts = (torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "acts"))
        return SparseCode(torch.cat([ends.new_zeros(1), ends]), latents, acts, parts[0].d_sae)


@dataclass
class TrainingCode(SparseCode):
    """A batch's code with what its gradients need; entries near enough for a threshold's gradient have acts 0.

    u [n] = x' W_enc + b_enc of the entry, before × ‖W_dec row‖ where pre is rescaled by it; h = x' [batch, d_in];
    kernels: those that compute the rest of the step; in_bfloat16: whether the encoder's product was.
    """

    u: Float[Tensor, " n"]
    h: Float[Tensor, "batch d_in"]
    kernels: Plain
    in_bfloat16: bool = False


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode_for_training(sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"], kernels: str = "dense") -> Code:
    """The training code of raw activations x; sparse if `kernels` says so and it pays."""
    code = sparse_encode(sae, x, kernels)
    if code is not None:
        return code
    pre = sae.pre(x)
    return DenseCode(pre, sae.select(pre))


@torch.no_grad()
def encode_sparse(sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"], kernels: str | None = None) -> SparseCode:
    """The nonzero entries of `encode(x)`, by the SAE's kernels unless others are given."""
    code = sparse_encode(sae, x, choose_kernels(sae, kernels), inference=True)
    if code is not None:
        return code
    acts = sae.encode(x)
    rows, latents = acts.nonzero(as_tuple=True)
    return SparseCode(PLAIN.bin_ends(rows, len(x)), latents, acts[rows, latents], sae.d_sae)


@torch.no_grad()
def sparse_encode(
    sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"], kernels: str, inference: bool = False
) -> TrainingCode | None:
    """The entries of `select(pre(x))`, or of `encode(x)`; None for `dense`, or where too many are active to gain by it.

    BatchTopK keeps k · batch entries exactly, from those above a bar that a sample of the batch's own rows sets so
    low that a few more pass than are needed; when too few do, the bar is lowered. Ties are broken arbitrarily, by
    `triton` in favour of the first. Under autocast to bfloat16 `triton` multiplies W_enc, and AuxK's factors, in
    bfloat16, the others don't.
    """
    if kernels == "dense":
        return None
    device = sae.W_enc.device.type
    in_bfloat16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    with torch.autocast(device, enabled=False):
        screen = Screen(sae, x, KERNELS[kernels], in_bfloat16)
        if inference:
            return sae.sparsity.infer_active(screen, sae.k, sae.known_threshold())
        return sae.sparsity.active(screen, sae.k, sae.threshold)


class Screen:
    """A batch of an SAE, and the selections that a mechanism may ask for (`msae.sae.sparsity.Screen`)."""

    def __init__(self, sae: MatryoshkaSAE, x: Tensor, kernels: Plain, in_bfloat16: bool) -> None:
        self.sae, self.kernels = sae, kernels
        self.h, self.b = sae.encoder_input(x), sae.b_enc.detach()
        self.norm = sae.W_dec.norm(dim=1) if sae.rescale_acts_by_decoder_norm else None
        self.factors = kernels.factors(self.h, sae.W_enc, in_bfloat16)

    def above(self, bar: Tensor) -> TrainingCode | None:
        """Entries whose pre-activation exceeds their latent's bar."""
        sample = self._sample()
        too_many = (sample > bar).sum() > DENSEST * sample.numel()
        bar = bar if self.norm is None else bar / self.norm
        return self._code(self.kernels.survivors(*self.factors, self.b, bar, too_many))

    def largest_of_each_row(self, k: int) -> TrainingCode | None:
        """The k largest positive entries of each row."""
        return self._code(self.kernels.row_survivors(*self.factors, self.b, k, self.norm))

    def largest(self, k: float) -> TrainingCode | None:
        """The k · batch largest positive entries."""
        count = round(k * len(self.h))
        for slack, bar in self._bars(count):
            capacity = min(round(ROOM * slack * count), len(self.h) * self.sae.d_sae)
            flat, u, is_enough = self.kernels.largest(*self.factors, self.b, bar, self.norm, count, capacity)
            code = self._code((flat, u))
            # the host asks only once, when the whole code is on its way to the device
            enough, is_finite = torch.stack([is_enough, (bar > 0) & u.isfinite().all()]).tolist()
            if enough or not is_finite:
                return code if is_finite else None
        return None

    def _sample(self) -> Tensor:
        """Pre-activations of a few rows of the batch."""
        h, W = self.factors
        pre = (h[:: max(1, len(h) // SAMPLE)] @ W.T).to(self.b).add_(self.b)
        return pre if self.norm is None else pre.mul_(self.norm)

    def _bars(self, count: int) -> Iterator[tuple[float, Tensor]]:
        """Each slack, and the bar that lets slack · count entries of the batch through, while these are few of it."""
        sample = self._sample()
        flat, of_sample = sample.flatten(), count * len(sample) / len(self.h)
        for slack in SLACK:
            rank = max(1, round(slack * of_sample))
            if rank > DENSEST * len(flat):
                return
            yield slack, flat.topk(rank, sorted=False).values.min()

    def _code(self, entries: tuple[Tensor, Tensor] | None) -> TrainingCode | None:
        """The code of ascending entries (row · d_sae + latent, u); without any, the dense step is the one to take."""
        if entries is None:
            return None
        sae, (flat, u) = self.sae, entries
        rows = torch.div(flat, sae.d_sae, rounding_mode="floor")
        latents = flat - rows * sae.d_sae
        pre = u if self.norm is None else u * self.norm[latents]
        acts = sae.sparsity.activate(pre, sae.threshold.detach()[latents])
        offsets = self.kernels.bin_ends(rows, len(self.h))
        in_bfloat16 = self.factors[0].dtype == torch.bfloat16
        code = TrainingCode(offsets, latents, acts, sae.d_sae, u, self.h, self.kernels, in_bfloat16)
        code.rows = rows
        return code


# --- reconstruction ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(
    sae: MatryoshkaSAE, x: Float[Tensor, "batch d_in"], kernels: str | None = None
) -> tuple[Int[Tensor, " d_sae"], list[Float[Tensor, "batch d_out"]]]:
    """In how many tokens each latent is active at inference, and every prefix's reconstruction in scaled units (y')."""
    code = sparse_encode(sae, x, choose_kernels(sae, kernels), inference=True)
    if code is None:
        acts = sae.encode(x)
        return (acts > 0).sum(0), sae.decode_prefixes(acts)
    negatives, _ = residuals(sae, code, (-sae.b_dec).repeat(len(x), 1), sae.prefixes)
    return code.fired(), list(negatives.neg_().unbind(1))


@torch.no_grad()
def prefix_errors(sae: MatryoshkaSAE, code: Code, target: Float[Tensor, "batch d_out"]) -> Float[Tensor, " prefixes"]:
    """E‖y' − recon_m‖² of the SAE's own prefixes for a raw target y, float64."""
    y = sae.normalise_target(target)
    if isinstance(code, TrainingCode):
        return residuals(sae, code, y - sae.b_dec, sae.prefixes)[1]
    return torch.stack([(y - recon).double().square().sum(1).mean() for recon in sae.decode_prefixes(code.dense())])


def residuals(
    sae: MatryoshkaSAE, code: TrainingCode, target: Tensor, widths: Sequence[int]
) -> tuple[Float[Tensor, "batch levels d_out"], Float[Tensor, " levels"]]:
    """target − Σ of what is active up to each width, and its E‖·‖² (float64)."""
    norm = sae.W_dec.norm(dim=1)[code.latents] if sae.rescale_acts_by_decoder_norm else 1.0
    return code.kernels.residuals(decoding(sae, code, code.acts / norm, widths), target)


def decoding(
    sae: MatryoshkaSAE, code: TrainingCode, coefficients: Float[Tensor, " n"], widths: Sequence[int]
) -> Decoding:
    """The entries in bins of these widths, with the coefficients of their W_dec rows."""
    edges = constant(widths, code.latents)
    bins = code.rows * len(widths) + torch.searchsorted(edges, code.latents, right=True)
    ends = code.kernels.bin_ends(bins, code.batch * len(widths))
    return Decoding(coefficients, code.latents, bins, ends, sae.W_dec.detach())
