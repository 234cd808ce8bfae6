"""Everything measured about one exported SAE, on held-out rows that its threshold has not seen."""

from functools import partial

import torch

from msae.data.batches import ValBatches
from msae.data.bridge import load_bridge
from msae.data.language_model import LanguageModelSource
from msae.data.shards import Shards
from msae.data.source import Source
from msae.evaluation.language_model import Reconstruct, can_replace, cross_entropy_recovered
from msae.evaluation.reconstruction import ReconstructionSums
from msae.evaluation.truth import truth_metrics
from msae.progress import progress
from msae.sae import MatryoshkaSAE, quantile_threshold


@torch.no_grad()
def calibrate(sae: MatryoshkaSAE, batches: ValBatches) -> float:
    """Set the threshold so that exactly k latents a token are active, on average over these held-out rows."""
    with progress(batches.tokens, "calibrate") as bar:

        def pre_activations():  # type: ignore[no-untyped-def]
            for batch in batches:
                yield sae.pre(batch.to(sae.W_dec))
                bar.update(len(batch))

        threshold = quantile_threshold(pre_activations(), sae.k, batches.tokens)
    sae.threshold.fill_(threshold)
    return threshold


def evaluate(
    sae: MatryoshkaSAE,
    shards: Shards,
    source: Source,
    hook_name: str,
    start: int,
    batch_tokens: int,
    ce_sequences: int,
) -> dict[str, float]:
    """Flat metrics: `val/{name}/p{width}` of the held-out rows from `start` on, `truth/…` where the truth is known.

    For a language model also `val/ce_score/p{width}` and the cross-entropies behind it, over `ce_sequences` held-out
    sequences (0: none). `val/l0` is inference by threshold; `train/k` what training selected.
    """
    batches = ValBatches(shards, batch_tokens, start=start)
    sums = ReconstructionSums(sae)
    with progress(batches.tokens, "evaluate") as bar:
        for batch in batches:
            sums.update(sae, batch.to(sae.W_dec))
            bar.update(len(batch))
    metrics = {f"val/{name}": value for name, value in sums.metrics().items()} | {"train/k": float(sae.k)}
    if shards.truth is not None:
        rows = torch.cat([shards.activations("val", i) for i in range(len(shards.rows("val")))])
        metrics |= {
            f"truth/{name}": value for name, value in truth_metrics(sae, rows[start:], shards.truth, start).items()
        }
    if isinstance(source, LanguageModelSource) and ce_sequences > 0 and can_replace(hook_name):
        metrics |= language_model_metrics(sae, shards, source, hook_name, ce_sequences)
    return metrics


def language_model_metrics(
    sae: MatryoshkaSAE, shards: Shards, source: LanguageModelSource, hook_name: str, sequences: int
) -> dict[str, float]:
    """Cross-entropy with each prefix's reconstruction spliced into the model, over the last held-out sequences."""
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
    found = cross_entropy_recovered(bridge, hook_name, reconstruct, tokens, shards.identity["dropped_ids"])
    metrics = {f"val/ce/{name}": value for name, value in found["ce"].items()}
    for kind in ("ce_score", "kl", "kl_score"):
        metrics |= {f"val/{kind}/{name}": value for name, value in found[kind].items() if name in reconstruct}
    return metrics
