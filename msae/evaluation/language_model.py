"""A language model's loss with reconstructions in place of its activations."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msae.evaluation.reconstruction import ratio
from msae.progress import progress
from msae.sources.bridge import check_hook_name
from msae.sources.tokens import keep_mask

Reconstruct = Callable[[Tensor], Tensor]


def can_replace(hook_name: str) -> bool:
    """Whether a reconstruction at the hook reaches the rest of the model: not at resid_mid.

    In transformer_lens 4 that is the second norm's input, and the skip connection carries the original on.
    """
    return not hook_name.endswith("hook_resid_mid")


def check_can_replace(hook_name: str) -> None:
    """Raises ValueError in one line for a hook through which nothing can be replaced."""
    if not can_replace(hook_name):
        raise ValueError(f"{hook_name} can be read but not replaced; evaluate at hook_resid_pre or hook_resid_post")


@torch.no_grad()
def cross_entropy_recovered(
    bridge: Any,
    hook_name: str,
    reconstruct: dict[str, Reconstruct],
    tokens: Int[Tensor, "n_seq context"],
    special_ids: Iterable[int],
    batch: int = 8,
    target_hook_name: str | None = None,
) -> dict[str, Any]:
    """Cross-entropy (nats a token) and KL(original ‖ spliced) with each reconstruction in place of the hook.

    ce_score = (CE_zero − CE_sae) / (CE_zero − CE_orig) and kl_score = 1 − KL_sae / KL_zero: 1 is lossless, 0 is as
    bad as zeros in place of the activations. Only kept positions are replaced: BOS, padding and special tokens stay
    as they are. Predictions of t + 1 from t count where both are kept; sums are float64.

    A function in `reconstruct` maps rows [n, d_in] float32 to [n, d_out]; [heads, d_head] is flattened for it. With a
    `target_hook_name` (a transcoder) it reads `hook_name` and its result, or zeros, replaces the target; without one
    d_out = d_in. Returns {"ce": {"orig", "zero", name…}, "ce_score": {name…}, "kl": {"zero", name…},
    "kl_score": {name…}, "tokens": n}.

    Raises ValueError for a hook that the model does not have or through which nothing can be replaced, a target
    that is computed before the input, a name that is taken, or tokens without two kept ones in a row.
    """
    replaced = target_hook_name or hook_name
    for name in (hook_name, replaced):
        check_hook_name(bridge, name)
    check_can_replace(replaced)
    if reserved := {"orig", "zero"} & set(reconstruct):
        raise ValueError(f"the reconstructions' names {sorted(reserved)} are taken; rename them")
    special = list(special_ids)
    splices: dict[str, Reconstruct | None] = {"zero": None, **reconstruct}
    ce = dict.fromkeys(["orig", *splices], 0.0)
    kl = dict.fromkeys(splices, 0.0)
    count = 0
    with progress(tokens.numel(), "cross-entropy") as bar:
        for sequences in tokens.long().to(bridge.cfg.device).split(batch):
            keep = keep_mask(sequences, special)
            scored = keep[:, :-1] & keep[:, 1:]
            targets = sequences[:, 1:][scored]
            original = log_probabilities(bridge(sequences), scored)
            ce["orig"] += negative_log_likelihood(original, targets)
            for name, function in splices.items():
                hooks = splice(function, keep, hook_name, replaced)
                spliced = log_probabilities(bridge.run_with_hooks(sequences, fwd_hooks=hooks), scored)
                ce[name] += negative_log_likelihood(spliced, targets)
                kl[name] += kl_divergence(original, spliced)
            count += len(targets)
            bar.update(sequences.numel())
    if count == 0:
        raise ValueError(f"none of {tokens.numel()} tokens is kept together with its next; give other text")
    ce, kl = ({name: total / count for name, total in totals.items()} for totals in (ce, kl))
    return {
        "ce": ce,
        "ce_score": {name: ratio(ce["zero"] - ce[name], ce["zero"] - ce["orig"]) for name in reconstruct},
        "kl": kl,
        "kl_score": {name: 1 - ratio(kl[name], kl["zero"]) for name in reconstruct},
        "tokens": count,
    }


def splice(
    function: Reconstruct | None, keep: Tensor, hook_name: str, replaced: str
) -> list[tuple[str, Callable[..., Tensor | None]]]:
    """Hooks that put function(rows read at `hook_name`), or zeros without a function, in place of the hook `replaced`.

    Only the rows at `keep` [batch, pos] are replaced. Where the two hooks are one, it is read before it is replaced.
    """
    read: list[Tensor] = []

    def read_rows(value: Tensor, hook: Any) -> None:
        read[:] = [value.flatten(2)[keep].float()]

    def replace_rows(value: Tensor, hook: Any) -> Tensor:
        if not read:
            raise ValueError(
                f"{replaced} is computed before {hook_name} and cannot be reconstructed from it; "
                "set data.target_hook_name to a later hook"
            )
        flat = value.flatten(2).clone()
        old = flat[keep]
        new = torch.zeros_like(old) if function is None else function(read[0])
        assert new.shape == old.shape, f"reconstruction has shape {tuple(new.shape)}, expected {tuple(old.shape)}"
        flat[keep] = new.to(flat.dtype)
        return flat.view_as(value)

    return [(hook_name, read_rows), (replaced, replace_rows)]


def log_probabilities(logits: Float[Tensor, "batch pos vocab"], scored: Tensor) -> Float[Tensor, "n vocab"]:
    """log softmax of the logits at the scored positions [batch, pos − 1], float32."""
    return logits[:, :-1][scored].float().log_softmax(-1)


def negative_log_likelihood(log_probs: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]) -> float:
    """−Σ log p(target), summed in float64."""
    return -float(log_probs.gather(1, targets[:, None]).double().sum())


def kl_divergence(p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> float:
    """Σ_rows Σ_v p (log p − log q) of log-probabilities, summed in float64."""
    return float((p.exp() * (p - q)).sum(-1).double().sum())
