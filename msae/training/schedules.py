"""What changes over a run, as pure functions of the step: the learning rate, and what the inner levels weigh."""

import math
from typing import Annotated, Literal

from pydantic import Field

from msae.settings import Natural, NonNegative, Share, settings


@settings
class LearningRate:
    """A rise to the learning rate, and a fall from it."""

    warmup_steps: Natural = 1000
    """Steps over which the learning rate rises."""
    warmup_shape: Literal["linear", "cosine"] = "linear"
    """Shape of the rise."""
    warmup_start: Share | None = None
    """Share of lr at the first step; null: as if one step were done."""
    decay_start: Share = 0.8
    """Share of all steps after which lr falls linearly."""
    decay_end: Share = 0.0
    """Share of lr to which it falls."""

    def factor(self, step: int, total: int) -> float:
        """What lr is multiplied by at this step of `total`."""
        warmup, decay_from = min(self.warmup_steps, total), self.decay_start * total
        start, done = self.warmup_start or 0.0, step + (self.warmup_start is None)
        rise = min(1.0, done / warmup) if warmup else 1.0
        if self.warmup_shape == "cosine":
            rise = (1 - math.cos(math.pi * rise)) / 2
        rise = start + (1 - start) * rise
        fall = 1.0 if step < decay_from else (total - step) / max(1.0, total - decay_from)
        return min(rise, self.decay_end + (1 - self.decay_end) * max(0.0, fall))


@settings
class Fading:
    """The weight of all levels but the outermost: 1, then falling, then 0."""

    between: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    """Shares of all steps between which the weight falls; then the outermost level is trained alone. null: never."""
    end: Share = 0.02
    """Weight at the end of the fall, reached by a constant factor a step; 0: linearly."""
    encoder_decay: NonNegative = 0.0
    """Decoupled decay of W_enc, lr · this · W_enc a step, once the weight falls (always, where it never does)."""

    def __post_init__(self) -> None:
        if self.between is not None and self.between[0] > self.between[1]:
            raise ValueError(f"model.fading.between={self.between} must be two shares, the first not after the second")

    def weight(self, step: int, total: int) -> float:
        """The weight at this step of `total`."""
        if self.between is None or step < self.between[0] * total:
            return 1.0
        start, stop = (share * total for share in self.between)
        done = (step - start) / max(1.0, stop - start)
        if done >= 1:
            return 0.0
        return float(self.end**done) if self.end > 0 else 1 - done

    def decay(self, step: int, total: int) -> float:
        """The weight decay of W_enc at this step of `total`."""
        return self.encoder_decay if self.between is None or self.weight(step, total) < 1 else 0.0
