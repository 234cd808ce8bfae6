"""What surrounds the steps: token progress, stopping on a signal, TensorBoard's overlaid prefix charts."""

import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from msae.progress import progress
from msae.training.step import METRICS


class Interrupted(BaseException):
    """Training stopped on a signal, after a checkpoint at the end of a step."""

    def __init__(self, signum: int, step: int, checkpoint: Path) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}; saved {checkpoint}")
        self.exit_code = 128 + signum


class SaveWhenStopping(L.Callback):
    """A checkpoint at the last step; SIGTERM or Ctrl-C makes the step in progress the last, then raises Interrupted.

    A second Ctrl-C stops at once, as it does without this callback.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._received = 0
        self.stopped: Interrupted | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):  # Lightning puts back what was there before fit
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: object) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = signum

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        received = self._received
        if trainer.world_size > 1:
            received = signal.SIGTERM if trainer.strategy.reduce_boolean_decision(bool(received), all=False) else 0
        if received:
            trainer.save_checkpoint(self.checkpoint)
            self.stopped = Interrupted(received, trainer.global_step, self.checkpoint)
            raise self.stopped

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.checkpoint)  # ModelCheckpoint saves on multiples alone


class TokenProgress(L.Callback):
    """A bar over the token budget with the rate, the time left and the widest prefix's loss."""

    REFRESH_STEPS = 50

    def __init__(self) -> None:
        self._bar = progress(0, "train", disable=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batch_tokens = trainer.datamodule.activations.data.batch_tokens  # type: ignore[attr-defined]
        self.tokens_per_step = batch_tokens * trainer.world_size * trainer.accumulate_grad_batches
        self._shown = trainer.global_step
        self._bar = progress(
            trainer.max_steps * self.tokens_per_step,
            "train",
            initial=self._shown * self.tokens_per_step,
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step - self._shown >= self.REFRESH_STEPS or step == trainer.max_steps:
            self._bar.set_postfix(loss=f"{float(outputs['loss']):.4g}", refresh=False)
            self._bar.update((step - self._shown) * self.tokens_per_step)
            self._shown = step

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._bar.close()  # before anything is said about it

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.close()


class PrefixCharts(L.Callback):
    """TensorBoard's custom scalars: one chart a metric, the prefixes laid over one another."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layout = {
            split: {name: ["Multiline", [rf"{split}/{name}/p\d+"]] for name in METRICS} for split in ("train", "val")
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout)
