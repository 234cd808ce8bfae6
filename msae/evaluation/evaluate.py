"""Measures one SAE on held-out rows that its threshold has not seen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msae.data.batches import ValBatches, as_pair
from msae.data.rows import Rows
from msae.evaluation.language_model import Reconstruct, can_replace, cross_entropy_recovered
from msae.evaluation.reconstruction import reconstruction_metrics
from msae.evaluation.truth import truth_metrics
from msae.progress import progress, say
from msae.sae import MatryoshkaSAE, quantile_thresholds
from msae.settings import Count, Natural, settings


@settings
class Evaluation:
    """How much data calibration and evaluation read."""

    ce_sequences: Natural = 64
    """Held-out sequences for the cross-entropies; 0: none."""
    calibration_tokens: Count = 262_144
    """Held-out rows on which thresholds are calibrated, at most half of them."""


@dataclass
class HeldOut:
    """Held-out rows from `start` on, a transcoder's `target` of the same rows, and the language model they are of.

    `load_model` loads it onto a device; without it, and without `ce_sequences`, there are no cross-entropies.
    """

    rows: Rows
    load_model: Callable[[str], Any] | None = None
    start: int = 0
    batch_tokens: int = 4096
    ce_sequences: int = 0
    target: Rows | None = None

    def batches(self) -> ValBatches:
        """The rows, or pairs (x, y)."""
        return ValBatches(self.rows, self.batch_tokens, start=self.start, target=self.target)

    def read(self, what: str) -> Iterator[Tensor]:
        """The rows alone, while a progress bar says `what` they are read for."""
        return with_progress(ValBatches(self.rows, self.batch_tokens, start=self.start), what)


def with_progress(batches: ValBatches, name: str) -> Iterator[Any]:
    """The batches, counted by a progress bar."""
    with progress(batches.tokens, name) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch if isinstance(batch, Tensor) else batch[0]))


@torch.no_grad()
def calibrate(sae: MatryoshkaSAE, batches: ValBatches) -> None:
    """Set the thresholds so that k latents a token are active, on average over these held-out rows.

    `threshold` is for all latents together, `prefix_thresholds` for each prefix alone. Does nothing for a sparsity
    whose threshold is not a calibrated one.
    """
    if sae.sparsity.threshold_is != "calibrated":
        return
    pre = (sae.pre(as_pair(batch, sae.W_dec)[0]) for batch in with_progress(batches, "calibrate"))
    thresholds = quantile_thresholds(pre, sae.k, batches.tokens, sae.prefixes)
    sae.prefix_thresholds.copy_(torch.tensor(thresholds))
    sae.threshold.fill_(thresholds[-1])


@torch.no_grad()
def evaluate(sae: MatryoshkaSAE, held_out: HeldOut) -> dict[str, float]:
    """All figures of all `METRICS`, flat: `val/{name}/p{width}`, and `truth/{name}` where the truth is known.

    `val/l0` is measured at inference; `train/k` is what training selected.
    """
    return {name: value for metric in METRICS for name, value in metric(sae, held_out).items()}


def reconstruction(sae: MatryoshkaSAE, held_out: HeldOut) -> dict[str, float]:
    """`reconstruction_metrics` of every prefix, and k."""
    metrics = reconstruction_metrics(sae, with_progress(held_out.batches(), "evaluate"))
    return {f"val/{name}": value for name, value in metrics.items()} | {"train/k": float(sae.k)}


def against_truth(sae: MatryoshkaSAE, held_out: HeldOut) -> dict[str, float]:
    """`truth_metrics`; none unless the data are synthetic."""
    truth = held_out.rows.truth
    if truth is None:
        return {}
    return {f"truth/{name}": value for name, value in truth_metrics(sae, held_out, truth, held_out.start).items()}


def language_model(sae: MatryoshkaSAE, held_out: HeldOut) -> dict[str, float]:
    """Cross-entropy with each prefix's reconstruction spliced in, over the last held-out sequences."""
    rows, target = held_out.rows, held_out.target
    replaced = (target or rows).hook_name
    if held_out.load_model is None or held_out.ce_sequences == 0 or not can_replace(replaced):
        return {}
    tokens = torch.cat([rows.index("val", i)["tokens"] for i in range(len(rows.rows("val")))])
    reconstruct: dict[str, Reconstruct] = {f"p{w}": partial(sae, prefix=w) for w in sae.prefixes}
    try:
        scores = cross_entropy_recovered(
            held_out.load_model(str(sae.W_dec.device)),
            rows.hook_name,
            reconstruct,
            tokens[-held_out.ce_sequences :].long(),
            rows.identity["dropped_ids"],
            target_hook_name=replaced,
        )
    except ValueError as error:
        if target is None:
            raise
        say(f"no cross-entropy: {error}")  # hours of training are not lost for it
        return {}
    metrics = {f"val/ce/{name}": value for name, value in scores["ce"].items()}
    for kind in ("ce_score", "kl", "kl_score"):
        metrics |= {f"val/{kind}/{name}": scores[kind][name] for name in reconstruct}
    return metrics


# To add a metric, write (sae, held_out) → figures and name it here: metrics.json, TensorBoard and tables then have it.
METRICS: list[Callable[[MatryoshkaSAE, HeldOut], dict[str, float]]] = [reconstruction, against_truth, language_model]
