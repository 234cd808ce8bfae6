"""Everything that decides a training run: the keys of `model`, and those beside it."""

import math
from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from msae.data.activations import Data
from msae.evaluation.evaluate import Evaluation
from msae.sae.fast import Kernels
from msae.sae.fast.adam import Adam, Decoder
from msae.sae.initial import Init
from msae.sae.model import Normalise
from msae.sae.objective import Objective
from msae.sae.prefixes import PrefixSampling
from msae.sae.sparsity import BatchTopK, Penalty, SparsitySetting
from msae.settings import Count, Natural, Positive, Share, settings
from msae.training.schedules import Fading, LearningRate

FOLDED_AFTER_TRAINING = ("free", "unit_norm_before_step")


@settings
class Dead:
    """When a latent is dead."""

    after_tokens: Count = 10_000_000
    """Tokens without firing after which a latent is dead."""
    after_steps: Count | None = None
    """Batches without firing; null: tokens count."""
    includes_batch: bool = False
    """Count the current batch too; else only those before it."""


@settings
class Recipe:
    """How one SAE is made and trained."""

    d_sae: Count
    """Number of latents."""
    prefixes: list[int | float]
    """Cumulative widths that reconstruct by themselves, as ints or fractions of d_sae; the last is d_sae."""
    k: Annotated[int | float, Field(gt=0)]
    """Active latents of a token, on average over the batch; what is steered towards, where sparsity is learned."""
    sparsity: SparsitySetting = field(default_factory=BatchTopK)
    """What selects: batch_topk, topk, jumprelu, l1, log."""
    lr: Positive | None = 3e-4
    """Learning rate; null: 2e-4 / √(d_sae / 2¹⁴) (arXiv 2406.04093)."""
    seed: int = 0
    """Seed of the initial weights and of random prefixes."""
    kernels: Kernels = "auto"
    """How a step is computed, with the same loss and gradients."""
    d_in: Count | None = None
    """Width of the input; null: that of the shards."""
    d_out: Count | None = None
    """Width of a transcoder's target; null: that of its shards."""
    decoder: Decoder = "unit_norm"
    """Rows of unit norm after the step, only before it, free (penalties take the norm in), or acts rescaled by it."""
    normalise: Normalise = "unit_variance"
    """E‖x'‖² = 1, E‖x'‖² = d_in, variance 1, variance 1 about mean 0, or activations as they are."""
    apply_b_dec_to_input: bool = True
    """Subtract b_dec from the input of the encoder."""
    encoder_bias: bool = True
    """Train b_enc."""
    threshold_rate: Share = 0.01
    """Rate of the average of the smallest active values, which is the threshold while training."""
    resort_rate: Share | None = None
    """Rate of the average of use by which latents are re-sorted after each step; null: never."""
    init: Init = field(default_factory=Init)
    sampling: PrefixSampling = field(default_factory=PrefixSampling)
    objective: Objective = field(default_factory=Objective)
    penalty: Penalty = field(default_factory=Penalty)
    fading: Fading = field(default_factory=Fading)
    schedule: LearningRate = field(default_factory=LearningRate)
    adam: Adam = field(default_factory=Adam)
    dead: Dead = field(default_factory=Dead)

    def __post_init__(self) -> None:
        if self.decoder.startswith("unit_norm") and self.init.decoder_norm != 1:
            raise ValueError(f"model.init.decoder_norm={self.init.decoder_norm} needs model.decoder=free or rescaled")
        if self.sparsity.threshold_is == "unused" and self.decoder in FOLDED_AFTER_TRAINING:
            raise ValueError(
                f"model.sparsity={self.sparsity.name} with model.decoder={self.decoder} cannot be exported; "
                "use rescaled"
            )
        if self.sampling.kind == "every" and (self.objective.stop_gradient or self.objective.aux.per_level):
            raise ValueError(
                "model.sampling.kind=every knows neither objective.stop_gradient nor objective.aux.per_level; use fixed"
            )

    @property
    def learning_rate(self) -> float:
        """lr, or what it is by default for this width."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(self.d_sae / 2**14)


@settings
class Train:
    """`python -m msae.train`."""

    name: str
    """Name of the run directory, runs/<name>-<time>."""
    tokens: Natural
    """Training budget, rounded up to whole steps."""
    model: Recipe
    data: Data
    trainer: dict[str, Any]
    """Arguments of Lightning's Trainer, whose class is `_target_`."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    arms: dict[str, dict[str, Any] | None] | None = None
    """Several SAEs trained on the same batches: what differs in the model of each, and a preset."""
    grid: dict[str, list[Any]] | None = None
    """Keys of the model, each with several values: trains the model, or every arm, in every combination."""
    seed: int = 0
    """Seed of everything that has none of its own."""
    runs: str = "runs"
    """Directory of the runs."""
    run_dir: str | None = None
    """The run's own directory; null: a new one under `runs`."""
    ckpt_path: str | None = None
    """Resume: last, a run directory, or a checkpoint."""
    checkpoint_every_steps: Count = 1000
    """Steps between checkpoints."""
