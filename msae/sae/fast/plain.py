"""The kernels of the sparse step in PyTorch's own operators: any device, float32 or float64."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from msae.sae.no_wait import true_places

ROWS, LATENTS = 2048, 1024  # of a tile: 8 MB of float32, which stays in cache between the product and the filter

Inputs = Float[Tensor, "batch d_in"]
Encoder = Float[Tensor, "d_sae d_in"]
PerLatent = Float[Tensor, " d_sae"]
Indices = Int[Tensor, " n"]
Values = Float[Tensor, " n"]
Ends = Int[Tensor, " bins_and_1"]
Decoder = Float[Tensor, "d_sae d_out"]
Target = Float[Tensor, "batch d_out"]
Residuals = Float[Tensor, "batch levels d_out"]
Errors = Float[Tensor, " levels"]
Rows = Float[Tensor, "rows d"]
Scalar = Float[Tensor, ""]


@dataclass
class Decoding:
    """The entries of a batch in ascending bins row · levels + the innermost level that has the latent; and W_dec.

    acts, latents, bins [n]; ends [batch · levels + 1]: where each bin's entries start and end.
    """

    acts: Values
    latents: Indices
    bins: Indices
    ends: Ends
    W_dec: Decoder


class Weights(NamedTuple):
    """The factor of each level's residual in the gradient, on the host and [levels] on the device."""

    host: list[float]
    device: Tensor


class Decoded(NamedTuple):
    """E‖·‖² of each level, and the gradients of acts [n], W_dec (times a factor if given) and b_dec [d_out]."""

    errors: Tensor
    grad_acts: Tensor
    grad_W_dec: Callable[[Tensor | None], Tensor]
    grad_b_dec: Tensor


class Rates(NamedTuple):
    """Adam's learning rate, decay rates and ε."""

    lr: float
    beta1: float
    beta2: float
    eps: float


class Moments(NamedTuple):
    """Adam's averages of a parameter's gradient and of its square, and the number of steps in them."""

    mean: Rows
    square_mean: Rows
    step: Scalar


class Plain:
    """The sparse step's inner loops, and the reference of every subclass, which overrides what it does faster.

    An entry is a pair (row, latent): `flat` is row · d_sae + latent, u = h·W + b its pre-activation before × norm.
    """

    # --- the encoder --------------------------------------------------------------------------------------------------

    def factors(self, h: Inputs, W_enc: Tensor, in_bfloat16: bool) -> tuple[Tensor, Tensor]:
        """h and W, the rows of W_encᵀ, as they are to be multiplied: in bfloat16 where that is asked for and supported.

        W_enc [d_in, d_sae] is the parameter itself.
        """
        return h, W_enc.detach().T

    def survivors(
        self, h: Inputs, W: Encoder, b: PerLatent, bar: PerLatent, unless: Bool[Tensor, ""] | None = None
    ) -> tuple[Indices, Values] | None:
        """(flat, u) of all entries whose u exceeds the latent's bar, ascending.

        None where `unless` is true, or an entry is not finite.
        """
        if unless is not None and bool(unless):
            return None
        flat, u = self.exceeding(h, W, b, bar)
        return (flat, u) if bool(u.isfinite().all()) else None

    def exceeding(self, h: Inputs, W: Encoder, b: PerLatent, bar: PerLatent) -> tuple[Indices, Values]:
        """As `survivors`; NaN exceeds every bar, so that it cannot go unnoticed.

        In tiles, so that batch × d_sae is never held.
        """
        d_sae, width, bar = len(W), min(len(W), LATENTS), bar.contiguous()  # an expanded one takes longer to compare
        buffer = h.new_empty(min(len(h), ROWS) * width)
        flags = torch.empty_like(buffer, dtype=torch.bool)
        flats, values = [], []
        for latent in range(0, d_sae, width):
            directions, bias, bars = (t[latent : latent + width] for t in (W, b, bar))
            for row in range(0, len(h), ROWS):
                inputs = h[row : row + ROWS]
                shape = (len(inputs), len(directions))
                size = shape[0] * shape[1]
                u = torch.addmm(bias, inputs, directions.T, out=buffer[:size].view(shape))
                passes = torch.le(u, bars, out=flags[:size].view(shape)).logical_not_()
                index = _true(passes.view(-1))
                values.append(u.view(-1)[index])
                row_in_tile = torch.div(index, shape[1], rounding_mode="floor")
                flats.append(index + row_in_tile * (d_sae - shape[1]) + (row * d_sae + latent))
        flat, u = torch.cat(flats), torch.cat(values)
        if width == d_sae:
            return flat, u
        flat, order = flat.sort()
        return flat, u[order]

    def largest(
        self, h: Inputs, W: Encoder, b: PerLatent, bar: Scalar, norm: PerLatent | None, count: int, capacity: int
    ) -> tuple[Indices, Values, Bool[Tensor, ""]]:
        """(flat, u) of the `count` largest entries (after × norm) above a positive bar, and whether so many are above.

        Ascending; if not so many are above, the entries mean nothing. NaN is the largest. `capacity` bounds how many
        may be above, where memory for them is set aside.
        """
        if not bar > 0:
            return torch.empty_like(b[:0], dtype=torch.int64), b[:0], b.new_zeros((), dtype=torch.bool)
        flat, u = self.exceeding(h, W, b, bar.expand_as(b) if norm is None else bar / norm)
        if len(u) < count:
            return flat, u, b.new_zeros((), dtype=torch.bool)
        ranked = u if norm is None else u * norm[flat % len(W)]
        kept = torch.zeros_like(u, dtype=torch.bool)
        kept.index_fill_(0, ranked.topk(count, sorted=False).indices, True)
        return flat[kept], u[kept], b.new_ones((), dtype=torch.bool)

    def row_survivors(
        self, h: Inputs, W: Encoder, b: PerLatent, k: int, norm: PerLatent | None
    ) -> tuple[Indices, Values] | None:
        """(flat, u) of each row's k largest positive entries (after × norm), ascending; None where one is not finite.

        Whole rows at a time.
        """
        d_sae = len(W)
        rows = max(1, (1 << 28 if h.is_cuda else ROWS * LATENTS * 2) // d_sae)
        buffer = b.new_empty(min(rows, len(h)), d_sae)
        flats, values = [], []
        for row in range(0, len(h), rows):
            inputs = h[row : row + rows]
            u = self.multiply(inputs, W, b, buffer[: len(inputs)])
            ranked = u if norm is None else u * norm
            kept = ranked.topk(min(k, d_sae), dim=1, sorted=False).indices.sort(1).values
            starts = torch.arange(row, row + len(inputs), device=h.device)[:, None] * d_sae
            flats.append((kept + starts).flatten())
            values.append(u.gather(1, kept).flatten())
        flat, u = torch.cat(flats), torch.cat(values)
        keep = ~(u <= 0)  # NaN too
        number, is_finite = torch.stack([keep.sum(), (u.isfinite() | ~keep).all()]).tolist()
        if not is_finite:
            return None
        index = true_places(keep, number if keep.is_cuda else None)
        return flat[index], u[index]

    def multiply(self, h: Inputs, W: Encoder, b: PerLatent, out: Float[Tensor, "batch d_sae"]) -> Tensor:
        """h Wᵀ + b, into `out` where that is faster."""
        return torch.addmm(b, h, W.T, out=out)

    # --- the decoder --------------------------------------------------------------------------------------------------

    def by_latent(self, latents: Indices, d_sae: int) -> tuple[Indices, Ends]:
        """The order that sorts ascending entries by latent, and where each latent's start and end: rows ascend."""
        return latents.argsort(stable=True), self.bin_ends(latents, d_sae)

    def bin_ends(self, bins: Indices, count: int) -> Ends:
        """Where the entries of each of `count` bins, which ascend, start and end."""
        ends = torch.bincount(bins, minlength=count).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends])

    def residuals(self, code: Decoding, target: Target) -> tuple[Residuals, Errors]:
        """target − Σ acts W_dec of the latents up to each level, and its E‖·‖² (float64).

        One embedding bag for each bin serves all levels.
        """
        batch, d = target.shape
        residuals = self.sum_rows(code.W_dec, code.latents, code.acts, code.ends).view(batch, -1, d)
        torch.sub(target, residuals[:, 0], out=residuals[:, 0])
        for level in range(1, residuals.shape[1]):
            torch.sub(residuals[:, level - 1], residuals[:, level], out=residuals[:, level])
        return residuals, torch.linalg.vector_norm(residuals, dim=2).double().square().mean(0)

    def decoder_backward(
        self, code: Decoding, residuals: Residuals, weights: Weights, stop_gradient: bool, others: dict[int, Target]
    ) -> tuple[Residuals, Values]:
        """Gradient with respect to what each level's latents add, in place of `residuals`; and to each entry's act.

        The first is Σ (weights · residuals − others) over the levels that contain the latent, of its innermost alone
        with `stop_gradient`; the second is ⟨the first, W_dec row⟩. `others` are further gradients, by level.
        """
        levels = residuals.shape[1]
        for level in range(levels - 1, -1, -1):
            residuals[:, level].mul_(weights.host[level])
            if level in others:
                residuals[:, level].sub_(others[level])
            if level < levels - 1 and not stop_gradient:
                residuals[:, level].add_(residuals[:, level + 1])
        return residuals, self._dots(code, residuals.flatten(0, 1))

    def _dots(self, code: Decoding, table: Rows) -> Values:
        """⟨table row of the entry's bin, W_dec row of its latent⟩."""
        if table.device.type != "cpu":
            parts = zip(code.bins.split(4096), code.latents.split(4096), strict=True)
            return torch.cat([torch.linalg.vecdot(table[i], code.W_dec[j]) for i, j in parts])
        zeros, shape = torch.zeros_like(code.acts), (len(table), len(code.W_dec))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "sparse CSR is in beta"
            mask = torch.sparse_csr_tensor(code.ends, code.latents, zeros, shape)
            return torch.sparse.sampled_addmm(mask, table, code.W_dec.T, beta=0.0).values()

    def sum_rows(self, table: Rows, index: Indices, weights: Values, ends: Ends) -> Float[Tensor, "bins d"]:
        """Σ weights · table[index] over each bin's entries."""
        return embedding_bag(index, table, ends, mode="sum", per_sample_weights=weights, include_last_offset=True)

    def sums(self, bins: Indices, values: Values, by_bin: tuple[Indices, Ends]) -> Float[Tensor, " bins"]:
        """Σ values of each bin; `by_bin` is the order that sorts them by bin, and where each bin's start and end."""
        return sums_by_bin(bins, values, len(by_bin[1]) - 1)

    def decode(
        self,
        code: Decoding,
        target: Target,
        weights: Weights,
        stop_gradient: bool,
        by_latent: tuple[Indices, Ends],
        outermost: Target | None,
    ) -> Decoded | None:
        """All of the decoder's step in one pass; None where there is no such kernel.

        The last level's residual is written into `outermost`.
        """
        return None

    def decoded(
        self, code: Decoding, gradients: Residuals, errors: Errors, dots: Values, by_latent: tuple[Indices, Ends]
    ) -> Decoded:
        """The decoder's step from what `decoder_backward` gives."""
        order, ends = by_latent

        def grad_W_dec(scale: Tensor | None) -> Tensor:
            acts = code.acts if scale is None else code.acts * scale
            return self.sum_rows(gradients.flatten(0, 1), code.bins[order], acts[order], ends)

        return Decoded(errors, dots, grad_W_dec, gradients[:, 0].sum(0))

    # --- the optimizer ------------------------------------------------------------------------------------------------

    def can_step(self, *tensors: Tensor) -> bool:
        """Whether `project` and `adam` are faster here than PyTorch's, and take parameters and gradients like these."""
        return False

    def project(self, grad: Rows, W: Rows | None) -> Float[Tensor, " parts"]:
        """‖·‖² (float64) of parts of grad, after each row's part along W's unit row is removed in place if W is given.

        That part would only change the row's norm.
        """
        if W is not None:
            grad.addcmul_((grad * W).sum(1, keepdim=True), W, value=-1)
        return torch.linalg.vector_norm(grad, dim=1).double().square()

    def adam(
        self,
        W: Rows,
        grad: Rows,
        moments: Moments,
        scale: Scalar,
        rates: Rates,
        unit_norm: bool,
        half: Tensor | None = None,
    ) -> None:
        """Adam's update with the gradient × scale, then rows of unit norm if asked for: one pass over memory.

        `half` [rows, d], if given, gets the new W in bfloat16.
        """
        raise NotImplementedError("PyTorch's own Adam takes this place; see can_step")

    def half_of(self, parameter: Tensor) -> Tensor | None:
        """The bfloat16 copy of a parameter's rows that `factors` multiplies, to be written by `adam`; None: no copy."""
        return None


def _true(flags: Bool[Tensor, " n"]) -> Int[Tensor, " true"]:
    """Where flags are true, few of which are: eight at a time are compared as one number."""
    if len(flags) % 8:
        return flags.nonzero().squeeze(1)
    eights = flags.view(torch.int64).nonzero()
    row, column = flags.view(-1, 8)[eights.squeeze(1)].nonzero(as_tuple=True)
    return eights.squeeze(1)[row] * 8 + column


def sums_by_bin(bins: Indices, values: Tensor, count: int) -> Tensor:
    """Σ values of each bin, the same each time: of floats a GPU sorts them for index_put_, not for index_add_."""
    total = values.new_zeros(count)
    if values.device.type == "cpu" or not values.is_floating_point():
        return total.index_add_(0, bins, values)
    return total.index_put_((bins,), values, accumulate=True)
