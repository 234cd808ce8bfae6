"""What changes over a run, as pure functions of the step: the learning rate, and what the inner levels weigh."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearningRate:
    """A rise over `warmup_steps` from `start` (null: as if one step were done), a fall from `decay_start` to `end`.

    `start` and `end` are shares of the learning rate, `decay_start` is one of all steps.
    """

    warmup_steps: int
    shape: Literal["linear", "cosine"]
    start: float | None
    decay_start: float
    end: float

    def factor(self, step: int, total: int) -> float:
        """What lr is multiplied by at this step of `total`."""
        warmup, decay_from = min(self.warmup_steps, total), self.decay_start * total
        start, done = self.start or 0.0, step + (self.start is None)
        rise = min(1.0, done / warmup) if warmup else 1.0
        if self.shape == "cosine":
            rise = (1 - math.cos(math.pi * rise)) / 2
        rise = start + (1 - start) * rise
        fall = 1.0 if step < decay_from else (total - step) / max(1.0, total - decay_from)
        return min(rise, self.end + (1 - self.end) * max(0.0, fall))


@dataclass(frozen=True)
class Fading:
    """The weight of all levels but the outermost: 1 up to the first of two shares of all steps, 0 from the second on.

    Between them it falls to `end`, by a constant factor a step (linearly if `end` is 0). `between` null: always 1.
    """

    between: list[float] | None
    end: float

    def weight(self, step: int, total: int) -> float:
        """The weight at this step of `total`."""
        if self.between is None or step < self.between[0] * total:
            return 1.0
        start, stop = (share * total for share in self.between)
        done = (step - start) / max(1.0, stop - start)
        if done >= 1:
            return 0.0
        return float(self.end**done) if self.end > 0 else 1 - done
