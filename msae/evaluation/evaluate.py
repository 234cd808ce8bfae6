"""Everything measured about one exported SAE, on held-out rows that its threshold has not seen."""

import sys
from functools import partial

import torch

from msae.data.batches import ValBatches, as_pair
from msae.data.bridge import load_bridge
from msae.data.language_model import LanguageModelSource
from msae.data.shards import Shards
from msae.data.source import Source
from msae.evaluation.language_model import Reconstruct, can_replace, cross_entropy_recovered
from msae.evaluation.reconstruction import ReconstructionSums
from msae.evaluation.truth import truth_metrics
from msae.progress import progress
from msae.sae import MatryoshkaSAE, quantile_thresholds


@torch.no_grad()
def calibrate(sae: MatryoshkaSAE, batches: ValBatches) -> None:
    """Set the thresholds so that exactly k latents a token are active, on average over these held-out rows.

    `threshold` for all latents together, `prefix_thresholds` for each prefix alone. An SAE that selects while training
    as it does at inference (`topk`, a ReLU, JumpReLU) keeps what it has.
    """
    if sae.sparsity != "batch_topk":
        return
    with progress(batches.tokens, "calibrate") as bar:

        def pre_activations():  # type: ignore[no-untyped-def]
            for batch in batches:
                x, _ = as_pair(batch, sae.W_dec)
                yield sae.pre(x)
                bar.update(len(x))

        thresholds = quantile_thresholds(pre_activations(), sae.k, batches.tokens, sae.prefixes)
    sae.prefix_thresholds.copy_(torch.tensor(thresholds))
    sae.threshold.fill_(thresholds[-1])


def evaluate(
    sae: MatryoshkaSAE,
    shards: Shards,
    source: Source,
    hook_name: str,
    start: int,
    batch_tokens: int,
    ce_sequences: int,
    target: Shards | None = None,
) -> dict[str, float]:
    """Flat metrics: `val/{name}/p{width}` of the held-out rows from `start` on, `truth/…` where the truth is known.

    A transcoder's `target` has the same rows at the hook that it reconstructs.

    For a language model also `val/ce_score/p{width}` and the cross-entropies behind it, over `ce_sequences` held-out
    sequences (0: none). `val/l0` is inference by threshold; `train/k` what training selected.
    """
    batches = ValBatches(shards, batch_tokens, start=start, target=target)
    sums = ReconstructionSums(sae)
    with progress(batches.tokens, "evaluate") as bar:
        for batch in batches:
            x, y = as_pair(batch, sae.W_dec)
            sums.update(sae, x, y)
            bar.update(len(x))
    metrics = {f"val/{name}": value for name, value in sums.metrics().items()} | {"train/k": float(sae.k)}
    truth = shards.truth
    if truth is not None:
        rows = (as_pair(batch, sae.W_dec)[0] for batch in batches)
        metrics |= {f"truth/{name}": value for name, value in truth_metrics(sae, rows, truth, start).items()}
    if isinstance(source, LanguageModelSource) and ce_sequences > 0:
        at = hook_name if target is None else target.manifest["hook_name"]
        if can_replace(at):
            try:
                metrics |= language_model_metrics(sae, shards, source, hook_name, at, ce_sequences)
            except ValueError as error:
                if target is None:
                    raise
                print(f"no cross-entropy: {error}", file=sys.stderr)  # after hours of training, nothing else is lost
    return metrics


def language_model_metrics(
    sae: MatryoshkaSAE, shards: Shards, source: LanguageModelSource, hook_name: str, at: str, sequences: int
) -> dict[str, float]:
    """Cross-entropy with each prefix's reconstruction in place of the hook `at`, over the last held-out sequences."""
    tokens = torch.cat([shards.index("val", i)["tokens"] for i in range(len(shards.rows("val")))])[-sequences:].long()
    bridge = load_bridge(
        source.model,
        device=str(sae.W_dec.device),
        dtype=source.model_dtype,
        compatibility_mode=source.compatibility_mode,
        revision=source.revision,
        tokenizer=source.tokenizer,
    )
    reconstruct: dict[str, Reconstruct] = {f"p{w}": partial(sae, prefix=w) for w in sae.prefixes}
    found = cross_entropy_recovered(
        bridge, hook_name, reconstruct, tokens, shards.identity["dropped_ids"], target_hook_name=at
    )
    metrics = {f"val/ce/{name}": value for name, value in found["ce"].items()}
    for kind in ("ce_score", "kl", "kl_score"):
        metrics |= {f"val/{kind}/{name}": value for name, value in found[kind].items() if name in reconstruct}
    return metrics
