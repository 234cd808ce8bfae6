"""The DataModule: a run's activations as batches for a Lightning trainer."""

import lightning as L

from msae.data.activations import Activations
from msae.data.batches import TrainBatches, ValBatches


class ActivationData(L.LightningDataModule):
    """Batches x [batch_tokens, d_in] of activations, or pairs (x, y [batch_tokens, d_out]) where there is a target."""

    def __init__(self, activations: Activations) -> None:
        super().__init__()
        self.activations = activations

    def train_dataloader(self) -> TrainBatches:
        trainer, a = self.trainer, self.activations
        assert trainer is not None
        assert trainer.max_steps > 0, "training needs trainer.max_steps (see msae/training/job.py)"
        length = trainer.max_steps * trainer.accumulate_grad_batches
        ranks = (trainer.global_rank, trainer.world_size)
        return TrainBatches(a.rows, a.data.batch_tokens, length, a.data.seed, *ranks, a.data.prefetch, target=a.target)

    def val_dataloader(self) -> ValBatches:
        trainer, a = self.trainer, self.activations
        ranks = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        return ValBatches(a.rows, a.data.batch_tokens, *ranks, stop=a.data.val_rows, target=a.target)

    def teardown(self, stage: str) -> None:
        """Make no more rows when training ends or fails."""
        self.activations.close()

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")
