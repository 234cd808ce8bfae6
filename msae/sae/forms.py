"""Other forms of the same SAE: folded to raw units or unit rows, truncated to a prefix, its latents re-sorted."""

import copy

import torch
from jaxtyping import Int
from torch import Tensor

from msae.sae.model import MatryoshkaSAE


@torch.no_grad()
def truncate(sae: MatryoshkaSAE, prefix: int, own_threshold: bool = False) -> MatryoshkaSAE:
    """A smaller SAE of the first `prefix` latents, a copy; its codes are those of encode(x, prefix).

    With `own_threshold` its threshold is the one at which these latents alone have k active (calibrated for the
    widths in `prefixes`). Where inference ranks latents, it takes k of these. Raises ValueError for impossible widths.
    """
    width = sae.width(prefix)
    inner = [p for p in sae.prefixes if p < width]
    small = MatryoshkaSAE(sae.d_in, width, [*inner, width], min(sae.k, width), **sae.options())
    state = sae.state_dict()
    for name, axis in sae.LATENT_AXIS.items():
        state[name] = state[name].narrow(axis, 0, width)
    common = sae.prefix_thresholds[-1]  # `threshold` before decoder norms were folded into it
    state["prefix_thresholds"] = torch.stack([*sae.prefix_thresholds[: len(inner)], common])
    small.to(sae.W_dec).load_state_dict(state)
    small.metadata = copy.deepcopy(sae.metadata)
    if own_threshold:
        if width not in sae.prefixes or torch.isnan(own := sae.prefix_thresholds[sae.prefixes.index(width)]):
            raise ValueError(f"no threshold is calibrated for {width} latents alone; they are for {sae.prefixes}")
        is_common = bool((sae.threshold == common).all())
        small.threshold.copy_(own if is_common else small.threshold * (own / common))
        small.prefix_thresholds[-1] = own
    return small


@torch.no_grad()
def fold_decoder_norm(sae: MatryoshkaSAE) -> None:
    """Give every decoder row unit norm n → 1 without changing what comes out: acts × n, W_dec / n.

    W_enc, b_enc and the threshold are multiplied by n; not where pre was rescaled by n, whose units they have.
    Raises ValueError where inference ranks latents that are not rescaled: others would be the largest.
    """
    if sae.ranks_at_inference and not sae.rescale_acts_by_decoder_norm:
        raise ValueError(f"folding decoder norms would change which latents a {sae.sparsity.name} SAE selects")
    norm = sae.W_dec.norm(dim=1).clamp_min(1e-12)
    sae.W_dec.div_(norm[:, None])
    sae.W_enc.mul_(norm)
    sae.b_enc.mul_(norm)
    if not sae.rescale_acts_by_decoder_norm:
        sae.threshold.mul_(norm)
    sae.rescale_acts_by_decoder_norm = False


@torch.no_grad()
def fold(sae: MatryoshkaSAE) -> None:
    """Fold normalisation (and rescaled decoder norms) into the weights: s = 1, μ = 0, raw activations in and out.

    acts become acts / s_y, in raw units, and the decoder keeps its rows:
    W_enc s / s_y,  b_dec / s_y + μ_y,  θ / s_y,  b_enc / s_y (− μ W_enc where b_dec is not applied to the input).
    """
    if sae.rescale_acts_by_decoder_norm:
        fold_decoder_norm(sae)
    ratio = sae.scale / sae.target_scale
    if float(ratio) != 1:
        sae.W_enc.mul_(ratio)
    for tensor in (sae.b_enc, sae.b_dec, sae.threshold, sae.prefix_thresholds, sae.threshold_ema):
        tensor.div_(sae.target_scale)
    if not sae.apply_b_dec_to_input and bool(sae.mean.any()):
        sae.b_enc.sub_((sae.mean.double() @ sae.W_enc.double()).to(sae.b_enc))
    sae.b_dec.add_(sae.target_mean)
    sae.scale.fill_(1.0), sae.mean.zero_()
    sae.target_scale.fill_(1.0), sae.target_mean.zero_()


@torch.no_grad()
def folded_copy(sae: MatryoshkaSAE, rescaled: bool = False) -> MatryoshkaSAE:
    """A float32 copy on the CPU that maps raw activations to raw ones, for files of any format.

    acts × ‖W_dec row‖ is folded too, unless the file can say that pre-activations are `rescaled` and nothing else has
    to be folded; a tensor that needs no folding keeps every bit.
    """
    folded = copy.deepcopy(sae).float().cpu()
    scales, means = (folded.scale, folded.target_scale), (folded.mean, folded.target_mean)
    if any(float(s) != 1 for s in scales) or any(bool(m.any()) for m in means):
        fold(folded)
    elif folded.rescale_acts_by_decoder_norm and not rescaled:
        fold_decoder_norm(folded)
    return folded


@torch.no_grad()
def permute(sae: MatryoshkaSAE, order: Int[Tensor, " d_sae"], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Re-sort the latents: latent i becomes what latent order[i] was, in weights, EMAs, counters and Adam's state.

    Every tensor of the optimizer's state that has a parameter's shape moves with that parameter.
    """
    for name, axis in sae.LATENT_AXIS.items():
        tensor = getattr(sae, name)
        state = {} if optimizer is None else optimizer.state.get(tensor, {})
        for t in (tensor.detach(), *state.values()):
            if isinstance(t, Tensor) and t.shape == tensor.shape:
                t.copy_(t.index_select(axis, order))
