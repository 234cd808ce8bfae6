"""The LightningModule: holds the SAE, delegates to its loss, keeps the decoder on the sphere, logs every prefix."""

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from msae.evaluation.reconstruction import ReconstructionSums
from msae.sae import Loss, MatryoshkaSAE, matryoshka_loss

METRICS = ("loss", "mse", "fvu", "l0", "dead")


class MatryoshkaTraining(L.LightningModule):
    """Trains a MatryoshkaSAE with Adam, linear warm-up and linear decay, unit-norm decoder rows, AuxK and clipping.

    Units: `warmup_steps` optimizer steps, `decay_start` a share of all steps, `dead_after_tokens` tokens, `k` active
    latents a token, `prefixes` cumulative widths or fractions of d_sae. `threshold_rate` is the EMA's. Every argument
    is a plain value, so `load_from_checkpoint` works under safe loading. `d_in` comes from the shards.
    Raises ValueError for impossible sizes.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        prefixes: list[int | float],
        k: int | float,
        lr: float = 3e-4,
        betas: list[float] = [0.9, 0.999],  # noqa: B006
        warmup_steps: int = 1000,
        decay_start: float = 0.8,
        grad_clip: float = 1.0,
        aux_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after_tokens: int = 10_000_000,
        threshold_rate: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if not 0 <= decay_start <= 1:
            raise ValueError(f"model.decay_start={decay_start} is a share of all steps, expected between 0 and 1")
        for name, value in (("lr", lr), ("grad_clip", grad_clip), ("k_aux", k_aux)):
            if value is not None and value <= 0:
                raise ValueError(f"model.{name}={value} must be positive")
        self.sae = MatryoshkaSAE(d_in, d_sae, prefixes, k, seed)
        self.lr, self.betas, self.warmup_steps, self.decay_start = lr, (betas[0], betas[1]), warmup_steps, decay_start
        self.grad_clip, self.aux_coefficient, self.k_aux = grad_clip, aux_coefficient, k_aux
        self.dead_after_tokens, self.threshold_rate = dead_after_tokens, threshold_rate
        self._clock: tuple[float, int] | None = None  # when and at which step throughput was last measured
        self._sums: ReconstructionSums | None = None

    # --- the step ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch.to(self.sae.W_dec.dtype)
        dead = self.sae.dead(self.dead_after_tokens) if self.aux_coefficient > 0 else None
        loss = matryoshka_loss(self.sae, x, dead, self.aux_coefficient, self.k_aux)
        fired = (loss.acts > 0).sum(0)
        self.sae.update_threshold(loss.acts, self.threshold_rate)
        if self._should_log():
            self._log_step(x, loss, fired)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(fired)
        self.sae.update_fired(fired, len(x) * self.trainer.world_size)
        return loss.total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.sae.project_decoder_gradient()
        # By hand: Lightning's gradient_clip_val refuses fused Adam under bf16-mixed.
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.grad_clip)
        if self._should_log():
            self._refuse_divergence(norm)
            self._send({"train/grad_norm": float(norm)})

    def _refuse_divergence(self, tensor: Tensor) -> None:
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"training diverged by step {self.trainer.global_step + 1}: not a finite number; "
                f"lower model.lr={self.lr} and resume a checkpoint before it, or start again"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.sae.normalise_decoder()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=self.betas, fused=True)
        total = self.trainer.max_steps  # not estimated_stepping_batches: touching that loses the loader's state
        assert total > 0, "training needs trainer.max_steps"
        warmup, decay_from = min(self.warmup_steps, total), self.decay_start * total

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
            fall = 1.0 if step < decay_from else (total - step) / max(1.0, total - decay_from)
            return min(rise, max(0.0, fall))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- logging -----------------------------------------------------------------------------------------------

    def _should_log(self) -> bool:
        """On the first and every log_every_n_steps-th optimizer step; on the others nothing is computed for logs."""
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(self.loggers) and (step == 0 or (step + 1) % every == 0)

    def _send(self, metrics: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step + 1)

    @torch.no_grad()
    def _log_step(self, x: Tensor, loss: Loss, fired: Tensor) -> None:
        sae, trainer = self.sae, self.trainer
        # loss = E‖s·x − recon‖² in scaled units, mse = E‖x − x̂‖² / d_in in raw ones, fvu over this batch's variance
        errors = loss.prefixes.double() / sae.scale.double().square()
        variance = (x - x.mean(0)).double().square().sum(1).mean()
        dead = sae.dead(self.dead_after_tokens).double()
        columns = torch.stack(
            [
                torch.stack([loss.prefixes[i].double(), errors[i] / sae.d_in, errors[i] / variance])
                for i in range(len(sae.prefixes))
            ]
        )
        counts = torch.stack([torch.stack([fired[:w].sum() / len(x), dead[:w].mean()]) for w in sae.prefixes])
        table = torch.cat([columns, counts.double()], 1).tolist()
        metrics = {
            f"train/{name}/p{width}": value
            for width, row in zip(sae.prefixes, table, strict=True)
            for name, value in zip(METRICS, row, strict=True)
        }
        now, step = time.perf_counter(), trainer.global_step
        if self._clock is not None and step > self._clock[1]:
            tokens = len(x) * trainer.world_size * trainer.accumulate_grad_batches * (step - self._clock[1])
            metrics["train/tokens_per_s"] = tokens / (now - self._clock[0])
        self._clock = (now, step)
        metrics |= {
            "train/loss": float(loss.total.detach()),
            "train/aux_loss": float(loss.aux),
            "train/dead_latents": float(dead.sum()),
            "train/threshold": float(sae.threshold[0]),
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        self._send(metrics)

    # --- validation: at inference, by threshold ----------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size > 1:  # each rank's own batches moved it since the last step
            torch.distributed.broadcast(self.sae.threshold, 0)
        self._sums = ReconstructionSums(self.sae)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        assert self._sums is not None
        self._sums.update(self.sae, batch.to(self.sae.W_dec.dtype))

    def on_validation_epoch_end(self) -> None:
        assert self._sums is not None
        if self.trainer.world_size > 1:
            for tensor in self._sums.tensors.values():
                torch.distributed.all_reduce(tensor)
        metrics = self._sums.metrics()
        for width in self.sae.prefixes:  # in scaled units, comparable with train/loss
            metrics[f"loss/p{width}"] = metrics[f"mse/p{width}"] * self.sae.d_in * float(self.sae.scale) ** 2
        kept = {f"val/{key}": value for key, value in metrics.items() if key.split("/")[0] in METRICS}
        self.log_dict(kept)
        self._clock = None  # validation's time is not training's

    # --- resuming ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._refuse_divergence(self.sae.b_enc)  # a checkpoint of it would replace a good one
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], self.device)
