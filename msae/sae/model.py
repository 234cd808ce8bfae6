"""A Matryoshka sparse autoencoder in plain torch (arXiv 2503.17547); with one prefix it is a vanilla one."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from msae.sae.sparsity import batch_topk


def resolve_prefixes(prefixes: Sequence[int | float], d_sae: int) -> list[int]:
    """Cumulative widths as ints: fractions of d_sae (all at most 1.0, at least one a float) or the widths themselves.

    `[0.25, 1.0]` of 64 is `[16, 64]`. Raises ValueError unless they are strictly increasing, positive and end at d_sae.
    """
    if not prefixes:
        raise ValueError(
            f"model.prefixes is empty, expected cumulative widths that end at d_sae={d_sae}, e.g. [{d_sae}]"
        )
    widths = list(prefixes)
    if any(isinstance(p, float) for p in widths):
        if any(not 0 < p <= 1 for p in widths):
            raise ValueError(f"model.prefixes={widths} mixes fractions and widths, expected all in (0, 1] or all ints")
        exact = [p * d_sae for p in widths]
        if any(abs(e - round(e)) > 1e-6 for e in exact):
            raise ValueError(
                f"model.prefixes={widths} of d_sae={d_sae} are not whole widths ({exact}); give the widths as ints"
            )
        widths = [round(e) for e in exact]
    if widths[0] <= 0 or any(a >= b for a, b in pairwise(widths)):
        raise ValueError(f"model.prefixes={widths} must be positive and strictly increasing (cumulative widths)")
    if widths[-1] != d_sae:
        raise ValueError(f"model.prefixes={widths} must end at d_sae={d_sae}; set model.prefixes or model.d_sae")
    return [int(w) for w in widths]


class MatryoshkaSAE(nn.Module):
    """Nested dictionaries: each of the first m latents, m in `prefixes`, reconstructs by itself.

    pre = (s·x − b_dec) W_enc + b_enc,  acts = pre where it exceeds the threshold (BatchTopK while training),
    recon_m = (acts[:m] W_dec[:m] + b_dec) / s   (arXiv 2503.17547, eq. 3–5).

    Shapes: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in] with unit rows, b_dec [d_in], threshold [d_sae].
    `scale` s brings activations to unit variance about their mean while training and is 1 in every saved SAE
    (`fold_scale`), so a saved SAE maps raw activations to raw activations. Raises ValueError for impossible sizes.
    """

    W_enc: nn.Parameter
    threshold: Tensor
    threshold_ema: Tensor
    threshold_weight: Tensor
    scale: Tensor
    tokens_since_fired: Tensor

    # Kept in fp32 (int64) whatever the module is cast to: in bf16 an EMA with rate 0.01 stops moving.
    _EXACT = ("threshold", "threshold_ema", "threshold_weight", "scale")

    def __init__(self, d_in: int, d_sae: int, prefixes: Sequence[int | float], k: float, seed: int = 0) -> None:
        super().__init__()
        if d_in <= 0 or d_sae <= 0:
            raise ValueError(f"d_in={d_in} and d_sae={d_sae} must be positive")
        if not 0 < k <= d_sae:
            raise ValueError(f"model.k={k} must be positive and at most d_sae={d_sae}")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.prefixes = resolve_prefixes(prefixes, d_sae)
        self.metadata: dict[str, Any] = {}

        generator = torch.Generator().manual_seed(seed)
        directions = nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("threshold", torch.full((d_sae,), torch.nan))  # not set yet
        self.register_buffer("threshold_ema", torch.zeros(()))
        self.register_buffer("threshold_weight", torch.zeros(()))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        exact = {name: self._buffers[name] for name in self._EXACT}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            assert before is not None
            assert after is not None
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    # --- encode and decode -------------------------------------------------------------------------------------

    def pre(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Pre-activations (s·x − b_dec) W_enc + b_enc of raw activations x."""
        return (x * self.scale - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"], prefix: int | None = None) -> Float[Tensor, "*batch width"]:
        """Latent activations at inference: pre-activations above the threshold, the first `prefix` of them if given.

        Independent of the rest of the batch and of train() or eval(). Raises ValueError while no threshold is set.
        """
        if torch.isnan(self.threshold[0]):
            raise ValueError("this SAE has no threshold yet; train it or calibrate it before encoding")
        pre = self.pre(x)
        return torch.where(pre > self.threshold.to(pre.dtype), pre.relu(), 0.0)[..., : self._width(prefix)]

    def decode(self, acts: Float[Tensor, "*batch width"], prefix: int | None = None) -> Float[Tensor, "*batch d_in"]:
        """Raw activations (acts[:m] W_dec[:m] + b_dec) / s from the first m = `prefix` latents (all that are given)."""
        width = self._width(prefix if prefix is not None else acts.shape[-1])
        return (acts[..., :width] @ self.W_dec[:width] + self.b_dec) / self.scale

    def forward(self, x: Float[Tensor, "*batch d_in"], prefix: int | None = None) -> Float[Tensor, "*batch d_in"]:
        """decode(encode(x)) at a prefix."""
        return self.decode(self.encode(x, prefix), prefix)

    def decode_prefixes(self, acts: Float[Tensor, "batch d_sae"]) -> list[Float[Tensor, "batch d_in"]]:
        """The reconstruction of every prefix in scaled units (s·x), for the price of one decode: a running sum."""
        sizes = [stop - start for start, stop in pairwise([0, *self.prefixes])]
        recons = []
        recon = self.b_dec.expand(len(acts), -1)
        # split, not slices: the backward of a slice fills a whole [batch, d_sae] with zeros for each of them
        for group, directions in zip(acts.split(sizes, dim=1), self.W_dec.split(sizes), strict=True):
            recon = recon + group @ directions
            recons.append(recon)
        return recons

    def _width(self, prefix: int | None) -> int:
        if prefix is None:
            return self.d_sae
        if not 0 < prefix <= self.d_sae:
            raise ValueError(f"prefix={prefix} must lie between 1 and d_sae={self.d_sae}")
        return prefix

    # --- training state ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_statistics(self, mean: Float[Tensor, " d_in"], mean_square: float) -> None:
        """Start from the data: s = (E‖x‖² − ‖E x‖²)^(−1/2), so that FVU is the loss, and b_dec = s · E x.

        mean = E x [d_in] and mean_square = E‖x‖² in raw units. Raises ValueError if the activations never vary.
        """
        variance = mean_square - float(mean.double().square().sum())
        if not variance > 0:
            raise ValueError(f"the activations have variance {variance:.3g}; there is nothing to reconstruct")
        self.scale.fill_(variance**-0.5)
        self.b_dec.copy_(mean.to(self.b_dec) * self.scale)

    @torch.no_grad()
    def update_threshold(self, acts: Float[Tensor, "batch d_sae"], rate: float) -> None:
        """EMA of the smallest active value, bias-corrected: θ = Σ_i rate (1−rate)^i min_i / (1 − (1−rate)^t)."""
        smallest = torch.where(acts > 0, acts, torch.inf).amin().float()
        seen = torch.isfinite(smallest)
        self.threshold_ema.lerp_(torch.where(seen, smallest, self.threshold_ema), rate)
        self.threshold_weight.lerp_(torch.where(seen, 1.0, self.threshold_weight), rate)
        self.threshold.copy_((self.threshold_ema / self.threshold_weight).expand(self.d_sae))  # 0 / 0: still not set

    @torch.no_grad()
    def update_fired(self, fired: Int[Tensor, " d_sae"], tokens: int) -> None:
        """Count for each latent the tokens since it last fired; fired > 0 where it did among these tokens."""
        self.tokens_since_fired.add_(tokens).masked_fill_(fired > 0, 0)

    def dead(self, dead_after_tokens: int) -> Tensor:
        """Bool [d_sae]: latents that have not fired for at least `dead_after_tokens` tokens."""
        return self.tokens_since_fired >= dead_after_tokens

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring every decoder row to unit norm (after the optimizer step)."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from each row's gradient its part parallel to the row: it would only change the norm."""
        if self.W_dec.grad is not None:
            parallel = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad.addcmul_(parallel, self.W_dec, value=-1)

    @torch.no_grad()
    def fold_scale(self) -> None:
        """Make s = 1 by moving it into the biases and the threshold: b / s, θ / s; the decoder keeps unit rows.

        acts' = acts / s are then in raw units: (x − b_dec/s) W_enc + b_enc/s = pre / s.
        """
        for tensor in (self.b_enc, self.b_dec, self.threshold, self.threshold_ema):
            tensor.div_(self.scale)
        self.scale.fill_(1.0)

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """The active latents of a training batch (BatchTopK with this SAE's k)."""
        return batch_topk(pre, self.k)
