"""Several SAEs on the same batches: a comparison's arms, or a family of widths, sparsities and seeds, in one run."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from msae.data.batches import Batch
from msae.sae import DictionaryAdam
from msae.training.module import MatryoshkaTraining


class Arms(L.LightningModule):
    """Trains each arm as it would be trained alone: bit for bit the same weights, logs in its own logger.

    The loss is the sum of the arms' losses, whose gradient for each arm is that of its own; one optimizer holds
    theirs. `trainer.loggers` are the arms', in order. An arm that diverges is left where it was (`failed`: name → one
    line) and the others go on; raises ValueError when none is left. All arms' graphs are held at once.
    """

    def __init__(self, arms: dict[str, MatryoshkaTraining]) -> None:
        super().__init__()
        assert arms, "no arms"
        self.names = list(arms)
        self.arms = nn.ModuleList(arms.values())
        self.failed: dict[str, str] = {}
        for i, arm in enumerate(arms.values()):
            arm.logger_index = i

    def living(self) -> Iterator[tuple[str, MatryoshkaTraining]]:
        """The arms that have not failed, by name."""
        for name, arm in zip(self.names, self.arms, strict=True):
            if name not in self.failed:
                assert isinstance(arm, MatryoshkaTraining)
                yield name, arm

    def _each(self, action: Callable[[MatryoshkaTraining], Any]) -> list[Any]:
        """Do this to every living arm; one that raises ValueError has failed."""
        done = []
        for name, arm in list(self.living()):
            try:
                done.append(action(arm))
            except ValueError as error:
                if len(self.arms) - len(self.failed) == 1 or self.trainer.world_size > 1:  # DDP knows no absent arm
                    raise
                self.failed[name] = str(error)
                print(f"arm {name}: {error}", file=sys.stderr)
        return done

    def setup(self, stage: str) -> None:
        for _, arm in self.living():
            arm.trainer = self.trainer

    def configure_optimizers(self) -> Any:
        adams, factors = zip(*(arm.build_optimizer() for _, arm in self.living()), strict=True)
        optimizer = JointAdam(list(adams))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, list(factors))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return torch.stack(self._each(lambda arm: arm.training_step(batch, batch_idx))).sum()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.trainer.global_step + 1
        logging = next(self.living())[1].should_log()
        super().optimizer_step(*args, **kwargs)
        self._each(lambda arm: arm.after_step(step, logging))

    def on_validation_epoch_start(self) -> None:
        self._each(lambda arm: arm.on_validation_epoch_start())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._each(lambda arm: arm.validation_step(batch, batch_idx))

    def on_validation_epoch_end(self) -> None:
        self._each(lambda arm: arm.send(arm.validation_metrics(), self.trainer.global_step))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._each(lambda arm: arm.on_save_checkpoint(checkpoint))
        checkpoint["failed"] = dict(self.failed)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.failed = dict(checkpoint["failed"])
        for _, arm in self.living():
            arm.on_load_checkpoint(checkpoint)


class JointAdam(torch.optim.Optimizer):
    """The arms' optimizers as one, for a trainer that wants one; an arm without gradients is passed over."""

    def __init__(self, adams: list[DictionaryAdam]) -> None:
        self.adams = adams
        super().__init__([group for adam in adams for group in adam.param_groups], {})  # the same dicts: one lr

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of each; the closure, which Lightning gives, computes all gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for adam in self.adams:
            if adam.sae.W_dec.grad is not None:
                adam.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Their states, in order."""
        return {"arms": [adam.state_dict() for adam in self.adams]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As each one's own."""
        for adam, state in zip(self.adams, state_dict["arms"], strict=True):
            adam.load_state_dict(state)
        self.param_groups = [group for adam in self.adams for group in adam.param_groups]
