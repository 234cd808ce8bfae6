"""A Matryoshka sparse autoencoder in plain torch (arXiv 2503.17547); with one prefix it is a vanilla one."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from msae.sae.initial import InitialWeights, initial_weights
from msae.sae.prefixes import resolve_prefixes
from msae.sae.sparsity import BatchTopK, Sparsity, sparsity_of

Normalise = Literal["none", "unit_mean_square", "unit_rms", "unit_variance", "centred"]


class MatryoshkaSAE(nn.Module):
    """Nested dictionaries: each of the first m latents, m in `prefixes`, reconstructs by itself.

    x' = s (x − μ),  pre = (x' − b_dec) W_enc + b_enc,  acts = pre where it is selected,
    recon_m = acts[:m] W_dec[:m] + b_dec,  which reconstructs y' = s_y (y − μ_y)   (arXiv 2503.17547, eq. 3–5).

    Shapes: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], threshold [d_sae].
    - An autoencoder has y = x. With `d_out` it is a transcoder: y is another activation, with s_y and μ_y of its own,
      and b_dec is not subtracted from the input (`apply_b_dec_to_input`).
    - `sparsity` selects, while training and at inference: a mechanism of `msae.sae.sparsity`, or its name.
    - `rescale_acts_by_decoder_norm`: pre is multiplied by ‖W_dec row‖ and the decoder used as if its rows had norm 1.
    - `scale` s and `mean` μ normalise activations while training; `fold` moves them into the weights, and a saved SAE
      maps raw activations to raw activations.
    - `kernels` says how batches are computed (`msae.sae.fast`); it is no part of the SAE.
    Raises ValueError for impossible sizes.
    """

    W_enc: nn.Parameter
    threshold: Tensor
    prefix_thresholds: Tensor
    threshold_ema: Tensor
    threshold_weight: Tensor
    scale: Tensor
    mean: Tensor
    output_scale: Tensor
    output_mean: Tensor
    tokens_since_fired: Tensor
    use: Tensor

    # Never in less than fp32, whatever the module is cast to: in bf16 an EMA with rate 0.01 stops moving.
    _EXACT = (
        *("threshold", "prefix_thresholds", "threshold_ema", "threshold_weight", "use"),
        *("scale", "mean", "output_scale", "output_mean"),
    )
    LATENT_AXIS: ClassVar = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "tokens_since_fired": 0, "use": 0}

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        prefixes: Sequence[int | float],
        k: float,
        seed: int = 0,
        d_out: int | None = None,
        sparsity: Sparsity | str | dict[str, Any] = BatchTopK.name,
        rescale_acts_by_decoder_norm: bool = False,
        apply_b_dec_to_input: bool = True,
        encoder_bias: bool = True,
        init: InitialWeights = "tied",
        decoder_init_norm: float = 1.0,
    ) -> None:
        super().__init__()
        if d_in <= 0 or d_sae <= 0:
            raise ValueError(f"d_in={d_in} and d_sae={d_sae} must be positive")
        if not 0 < k <= d_sae:
            raise ValueError(f"model.k={k} must be positive and at most d_sae={d_sae}")
        self.sparsity = sparsity_of(sparsity)
        if self.ranks_at_inference and k != int(k):
            raise ValueError(f"model.k={k} must be whole with model.sparsity={self.sparsity.name}: k of each token")
        self.d_in, self.d_sae, self.d_out, self.k = d_in, d_sae, d_out or d_in, k
        self.is_transcoder = d_out is not None
        self.rescale_acts_by_decoder_norm = rescale_acts_by_decoder_norm
        self.apply_b_dec_to_input = apply_b_dec_to_input and not self.is_transcoder
        self.prefixes = resolve_prefixes(prefixes, d_sae)
        self.metadata: dict[str, Any] = {}
        self.kernels = "auto"

        W_enc, W_dec = initial_weights(d_in, d_sae, d_out, init, decoder_init_norm, seed)
        self.W_enc, self.W_dec = nn.Parameter(W_enc), nn.Parameter(W_dec)
        self.b_enc = nn.Parameter(torch.zeros(d_sae), requires_grad=encoder_bias)
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        threshold = torch.full((d_sae,), self.sparsity.first_threshold())
        if self.sparsity.threshold_is == "learned":
            self.threshold = nn.Parameter(threshold)
        else:
            self.register_buffer("threshold", threshold)

        self.register_buffer("prefix_thresholds", torch.full((len(self.prefixes),), torch.nan))
        self.register_buffer("threshold_ema", torch.zeros(()))
        self.register_buffer("threshold_weight", torch.zeros(()))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("use", torch.zeros(d_sae))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("mean", torch.zeros(d_in))
        if self.is_transcoder:
            self.register_buffer("output_scale", torch.ones(()))
            self.register_buffer("output_mean", torch.zeros(self.d_out))

    @property
    def ranks_at_inference(self) -> bool:
        """Whether inference takes each token's largest latents instead of those above a threshold."""
        return self.sparsity.threshold_is == "unused"

    @property
    def target_scale(self) -> Tensor:
        """s_y: an autoencoder's is that of its input."""
        return self.output_scale if self.is_transcoder else self.scale

    @property
    def target_mean(self) -> Tensor:
        """μ_y [d_out]: an autoencoder's is that of its input."""
        return self.output_mean if self.is_transcoder else self.mean

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, besides sizes, that decide how this SAE encodes and decodes."""
        return {
            "d_out": self.d_out if self.is_transcoder else None,
            "sparsity": self.sparsity,
            "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "encoder_bias": self.b_enc.requires_grad,
        }

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        exact = {name: getattr(self, name).detach() for name in self._EXACT if hasattr(self, name)}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if torch.finfo(after.dtype).bits < 32:
                after.data = before.to(after.device, torch.float32)
        return self

    # --- encode and decode --------------------------------------------------------------------------------------------

    def pre(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Pre-activations (s (x − μ) − b_dec) W_enc + b_enc of raw activations x, × ‖W_dec row‖ where rescaled."""
        pre = self.encoder_input(x) @ self.W_enc + self.b_enc
        return pre * self.W_dec.norm(dim=1) if self.rescale_acts_by_decoder_norm else pre

    def encoder_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """s (x − μ) − b_dec, or s (x − μ) where b_dec is not applied to the input."""
        x = (x - self.mean).mul_(self.scale).to(self.W_enc.dtype)  # in place: one copy of the batch less
        return x.sub_(self.b_dec) if self.apply_b_dec_to_input else x

    def select(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations of a training batch."""
        return self.sparsity.select(pre, self.k, self.threshold)

    def encode(self, x: Float[Tensor, "*batch d_in"], prefix: int | None = None) -> Float[Tensor, "*batch width"]:
        """Latent activations at inference, of the first `prefix` latents if given.

        Independent of the rest of the batch and of train() or eval(). Raises ValueError while no threshold is set.
        """
        pre, width = self.pre(x), self.width(prefix)
        return self.sparsity.infer(pre, self.k, self.known_threshold())[..., :width]

    def known_threshold(self) -> Float[Tensor, " d_sae"]:
        """The threshold at inference. Raises ValueError while none is set, unless none is used."""
        if not self.ranks_at_inference and torch.isnan(self.threshold[0]):
            raise ValueError("this SAE has no threshold yet; train it or calibrate it before encoding")
        return self.threshold

    def decode(self, acts: Float[Tensor, "*batch width"], prefix: int | None = None) -> Float[Tensor, "*batch d_out"]:
        """Raw activations (acts[:m] W_dec[:m] + b_dec) / s + μ from the first m = `prefix` latents, or all in acts."""
        width = self.width(prefix if prefix is not None else acts.shape[-1])
        return self.unscale(self.coefficients(acts)[..., :width] @ self.W_dec[:width] + self.b_dec)

    def forward(self, x: Float[Tensor, "*batch d_in"], prefix: int | None = None) -> Float[Tensor, "*batch d_out"]:
        """decode(encode(x)) at a prefix."""
        return self.decode(self.encode(x, prefix), prefix)

    def decode_prefixes(
        self, acts: Float[Tensor, "batch d_sae"], prefixes: Sequence[int] | None = None, stop_gradient: bool = False
    ) -> list[Float[Tensor, "batch d_out"]]:
        """The reconstruction of every prefix in scaled units (y'), for the price of one decode: a running sum.

        `prefixes` are this SAE's unless given, and end at d_sae; 0 is b_dec alone. With `stop_gradient` each level
        takes the one before it as a constant.
        """
        prefixes = self.prefixes if prefixes is None else prefixes
        assert prefixes[-1] == self.d_sae, f"prefixes {prefixes} do not end at {self.d_sae}"
        # split, not slices: the backward of a slice fills a whole [batch, d_sae] with zeros for each of them
        sizes = [stop - start for start, stop in pairwise([0, *prefixes])]
        groups = zip(self.coefficients(acts).split(sizes, dim=1), self.W_dec.split(sizes), strict=True)
        recons: list[Tensor] = []
        recon = self.b_dec.expand(len(acts), -1)
        for group, directions in groups:
            if stop_gradient and recons:
                recon = recon.detach()
            recon = recon + group @ directions
            recons.append(recon)
        return recons

    def normalise_target(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        """y' = s_y (y − μ_y), what the decoder reconstructs."""
        return (y - self.target_mean).mul_(self.target_scale).to(y.dtype)

    def unscale(self, recon: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        """Raw units: recon / s_y + μ_y."""
        return (recon / self.target_scale + self.target_mean).to(recon.dtype)

    def coefficients(self, acts: Tensor) -> Tensor:
        """The coefficients of W_dec's rows: acts, ÷ ‖W_dec row‖ where they were rescaled by it."""
        if not self.rescale_acts_by_decoder_norm:
            return acts
        return acts * (1 / self.W_dec[: acts.shape[-1]].norm(dim=1))

    def contribution_norm(self) -> Tensor | float:
        """‖W_dec row‖ [d_sae], or 1 where acts are rescaled by it: acts × this are the lengths of what latents add."""
        return 1.0 if self.rescale_acts_by_decoder_norm else self.W_dec.norm(dim=1)

    def width(self, prefix: int | None) -> int:
        """The width of a prefix, d_sae if None. Raises ValueError for an impossible one."""
        if prefix is None:
            return self.d_sae
        if not 0 < prefix <= self.d_sae:
            raise ValueError(f"prefix={prefix} must lie between 1 and d_sae={self.d_sae}")
        return prefix

    # --- training state -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_statistics(
        self,
        mean: Float[Tensor, " d_in"],
        mean_square: float,
        normalise: Normalise = "unit_variance",
        target: tuple[Tensor, float] | None = None,
    ) -> None:
        """Set s and μ from E x [d_in] and E‖x‖² in raw units, b_dec to E y'; a transcoder's `target` has those of y.

        none: s = 1. unit_mean_square: E‖x'‖² = 1. unit_rms: E‖x'‖² = d_in. unit_variance: E‖x' − E x'‖² = 1, so that
        the loss is the FVU. centred: that, and μ = E x (else μ = 0).
        Raises ValueError if the activations never vary or are all zero.
        """
        mean = mean.to(self.mean.device)
        self._normalise(self.scale, self.mean, mean, mean_square, normalise)
        if self.is_transcoder:
            assert target is not None, "a transcoder needs the statistics of its target"
            mean, mean_square = target[0].to(self.mean.device), target[1]
            self._normalise(self.target_scale, self.target_mean, mean, mean_square, normalise)
        self.b_dec.copy_(self.normalise_target(mean))

    def _normalise(self, scale: Tensor, shift: Tensor, mean: Tensor, mean_square: float, normalise: Normalise) -> None:
        variance = mean_square - float(mean.double().square().sum())
        if not variance > 0:
            raise ValueError(f"the activations have variance {variance:.3g}; there is nothing to reconstruct")
        units = {"none": 1.0, "unit_mean_square": mean_square, "unit_rms": mean_square / len(mean)}
        scale.fill_(units.get(normalise, variance) ** -0.5)
        shift.copy_(mean if normalise == "centred" else torch.zeros_like(mean))

    @torch.no_grad()
    def update_threshold(self, acts: Float[Tensor, "*entries"], rate: float) -> None:
        """EMA of the smallest active value, bias-corrected: θ = Σ_i rate (1−rate)^i min_i / (1 − (1−rate)^t)."""
        smallest = torch.where(acts > 0, acts, torch.inf).amin().float()
        any_active = torch.isfinite(smallest)
        self.threshold_ema.lerp_(torch.where(any_active, smallest, self.threshold_ema), rate)
        self.threshold_weight.lerp_(torch.where(any_active, 1.0, self.threshold_weight), rate)
        self.threshold.copy_((self.threshold_ema / self.threshold_weight).expand(self.d_sae))  # 0 / 0: still not set

    @torch.no_grad()
    def update_fired(self, fired: Int[Tensor, " d_sae"], tokens: int) -> None:
        """Count the tokens since each latent last fired; fired > 0 where it fired among these `tokens`."""
        self.tokens_since_fired.add_(tokens).masked_fill_(fired > 0, 0)

    @torch.no_grad()
    def update_use(self, mean_square_acts: Float[Tensor, " d_sae"], rate: float) -> None:
        """EMA from 0 of E (a ‖W_dec row‖)², what a latent contributes; only its order matters, so no correction."""
        self.use.lerp_(mean_square_acts.to(self.use), rate)

    def dead(self, dead_after_tokens: int) -> Tensor:
        """Bool [d_sae]: latents that have not fired for at least `dead_after_tokens` tokens."""
        return self.tokens_since_fired >= dead_after_tokens

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring every decoder row to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
