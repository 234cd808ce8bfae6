"""The LightningModule: holds the SAE, delegates to its loss, keeps the decoder on the sphere, logs every prefix."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from msae.data.batches import Batch, as_pair
from msae.data.seeds import stream
from msae.evaluation.reconstruction import ReconstructionSums
from msae.sae import (
    AuxK,
    DenseCode,
    DictionaryAdam,
    L0Controller,
    Loss,
    MatryoshkaSAE,
    Objective,
    SparseCode,
    choose_kernels,
    encode_for_training,
    geometric_median,
    matryoshka_loss,
    pareto_prefixes,
    prefix_errors,
)
from msae.sae.adam import Decoder
from msae.sae.initial import Init
from msae.sae.model import Normalise, Sparsity
from msae.sae.sparse import Kernels
from msae.training.schedules import Fading, LearningRate

METRICS = ("loss", "mse", "fvu", "l0", "dead")
FOLDED_AFTER_TRAINING = ("free", "unit_norm_before_step")
WITH_PENALTY = ("jumprelu", "l1", "log")


class MatryoshkaTraining(L.LightningModule):
    """Trains a MatryoshkaSAE with Adam, warm-up, decay and clipping; `Objective` and `AuxK` say what is minimised.

    - SAE: see `MatryoshkaSAE`; k is the wanted L0 for every `sparsity`. `normalise` and where `b_dec_init` starts:
      `set_statistics`. `decoder`: rows of unit norm after the step (the published recipe), only before it
      (`unit_norm_before_step`), `free` (a penalty on acts then takes the norm in), or acts `rescaled` by the norm.
    - `prefix_sampling`: the `prefixes`; `random` draws `n_prefixes` anew each step; `every` takes all widths. What is
      logged and exported are the `prefixes` in any case.
    - `inner_decay`: two shares of all steps, between which the weight of all levels but the outermost falls from 1 to
      `inner_end`, by a constant factor a step (linearly to 0); after it the outermost is trained alone. null: never.
      `encoder_decay`: decoupled weight decay of W_enc (arXiv 1711.05101), lr · encoder_decay · W_enc a step, once that
      weight has begun to fall (from the start where it never does).
    - λ of a sparsity penalty: `sparsity_weight`, after `sparsity_warmup_steps` (below 1: a share of all steps), then
      moved by `sparsity_control` a step towards k active latents.
    - `resort_rate`: re-sort latents by their use after each step, rate of its EMA; null: never.
    - `lr` (null: 2e-4 / √(d_sae / 2¹⁴), arXiv 2406.04093) is reached after `warmup_steps`, linearly or by a cosine; the
      first step has `warmup_start` · lr (null: lr / warmup_steps, as if one step were done). It falls linearly from
      `decay_start`, a share of all steps, to `decay_end` · lr.
    - A latent is dead after `dead_after_tokens` without firing, or `dead_after_steps` batches if given; these are
      counted up to the batch, or with it (`dead_includes_batch`). `threshold_rate` is the EMA's.
    - `kernels`: how a step is computed, with the same loss and gradients (`choose_kernels`).
    Every argument is a plain value, so `load_from_checkpoint` works under safe loading. `d_in` (and `d_out`, of a
    transcoder) come from the shards. Raises ValueError for impossible sizes and combinations.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        prefixes: list[int | float],
        k: int | float,
        d_out: int | None = None,
        sparsity: Sparsity = "batch_topk",
        decoder: Decoder = "unit_norm",
        normalise: Normalise = "unit_variance",
        apply_b_dec_to_input: bool = True,
        encoder_bias: bool = True,
        init: Init = "tied",
        decoder_init_norm: float = 1.0,
        b_dec_init: Literal["zero", "mean", "geometric_median"] = "mean",
        threshold_init: float = 0.001,
        bandwidth: float = 0.001,
        threshold_rate: float = 0.01,
        prefix_sampling: Literal["fixed", "random", "every"] = "fixed",
        n_prefixes: int | None = None,
        reduction: Literal["sum", "mean", "mean_twice"] | list[float] = "sum",
        balance: float = 1.0,
        bias_level: bool = False,
        inner_decay: list[float] | None = None,
        inner_end: float = 0.02,
        stop_gradient: bool = False,
        error: Literal["sum", "mean"] = "sum",
        aux: AuxK | dict[str, Any] | None = None,
        dead_after_tokens: int = 10_000_000,
        dead_after_steps: int | None = None,
        dead_includes_batch: bool = False,
        sparsity_weight: float = 1.0,
        sparsity_warmup_steps: int | float = 0,
        sparsity_control: float = 0.0,
        orthogonality: float = 0.0,
        orthogonality_chunk: int = 8192,
        resort_rate: float | None = None,
        lr: float | None = 3e-4,
        betas: list[float] = [0.9, 0.999],  # noqa: B006
        warmup_steps: int = 1000,
        warmup_shape: Literal["linear", "cosine"] = "linear",
        warmup_start: float | None = None,
        decay_start: float = 0.8,
        decay_end: float = 0.0,
        grad_clip: float = 1.0,
        encoder_decay: float = 0.0,
        kernels: Kernels = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        aux = asdict(aux) if isinstance(aux, AuxK) else dict(aux or {})  # hyperparameters are plain
        self.save_hyperparameters(logger=False)
        for name, value in (
            *(("decay_start", decay_start), ("decay_end", decay_end), ("warmup_start", warmup_start)),
            *(("threshold_rate", threshold_rate), ("resort_rate", resort_rate), ("sparsity_control", sparsity_control)),
            *(("inner_end", inner_end), *(("inner_decay", share) for share in inner_decay or ())),
        ):
            if value is not None and not 0 <= value <= 1:
                what = "a share of all steps" if name in ("decay_start", "inner_decay") else "a share"
                raise ValueError(f"model.{name}={value} is {what}, expected between 0 and 1")
        for name, value in (
            *(("lr", lr), ("grad_clip", grad_clip), ("bandwidth", bandwidth), ("dead_after_steps", dead_after_steps)),
            *(("orthogonality_chunk", orthogonality_chunk), ("decoder_init_norm", decoder_init_norm)),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"model.{name}={value} must be positive")
        for name, value in (
            *(("sparsity_weight", sparsity_weight), ("sparsity_warmup_steps", sparsity_warmup_steps)),
            *(("orthogonality", orthogonality), ("warmup_steps", warmup_steps), ("encoder_decay", encoder_decay)),
        ):
            if value < 0:
                raise ValueError(f"model.{name}={value} must not be negative")
        if inner_decay is not None and (len(inner_decay) != 2 or inner_decay[0] > inner_decay[1]):
            raise ValueError(f"model.inner_decay={inner_decay} must be two shares of all steps, the first not after it")
        if decoder.startswith("unit_norm") and decoder_init_norm != 1:
            raise ValueError(f"model.decoder_init_norm={decoder_init_norm} needs model.decoder=free or rescaled")
        if sparsity == "topk" and decoder in FOLDED_AFTER_TRAINING:
            raise ValueError(f"model.sparsity=topk with model.decoder={decoder} cannot be exported; use rescaled")
        self.sae = MatryoshkaSAE(
            d_in,
            d_sae,
            prefixes,
            k,
            seed,
            d_out=d_out,
            sparsity=sparsity,
            rescale_acts_by_decoder_norm=decoder == "rescaled",
            apply_b_dec_to_input=apply_b_dec_to_input,
            encoder_bias=encoder_bias,
            init=init,
            decoder_init_norm=decoder_init_norm,
            threshold_init=threshold_init,
            bandwidth=bandwidth,
        )
        self.objective = Objective(
            reduction=reduction,
            balance=balance,
            bias_level=bias_level,
            stop_gradient=stop_gradient,
            error=error,
            aux=AuxK(**aux),
            orthogonality=orthogonality,
            orthogonality_chunk=orthogonality_chunk,
        )
        self.seed, self.prefix_sampling = seed, prefix_sampling
        self.n_prefixes = n_prefixes if n_prefixes is not None else len(self.sae.prefixes)
        if prefix_sampling != "every":
            self.objective.weights(len(self._widths(0)) + bias_level)  # now, not at the first step
        elif stop_gradient or self.objective.aux.per_level:
            raise ValueError("model.prefix_sampling=every knows neither stop_gradient nor aux.per_level; use fixed")
        self.controller = L0Controller(sparsity_weight, k, sparsity_control)
        self.sparsity_warmup_steps = sparsity_warmup_steps
        self.decoder, self.normalise, self.b_dec_init, self.resort_rate = decoder, normalise, b_dec_init, resort_rate
        self.fading, self.encoder_decay = Fading(inner_decay, inner_end), encoder_decay
        self.lr = lr if lr is not None else 2e-4 / math.sqrt(d_sae / 2**14)
        self.betas, self.grad_clip = (betas[0], betas[1]), grad_clip
        self.schedule = LearningRate(warmup_steps, warmup_shape, warmup_start, decay_start, decay_end)
        self.dead_after_tokens, self.dead_after_steps = dead_after_tokens, dead_after_steps
        self.dead_includes_batch = dead_includes_batch
        self.threshold_rate, self.kernels = threshold_rate, kernels
        self.logger_index: int | None = None  # which of the trainer's loggers is this one's; null: all
        self._adam: DictionaryAdam | None = None
        self._clock: tuple[float, int] | None = None  # when and at which step throughput was last measured
        self._sums: ReconstructionSums | None = None

    def start_from(
        self,
        statistics: tuple[Tensor, float],
        target: tuple[Tensor, float] | None = None,
        first_batch: Tensor | None = None,
    ) -> None:
        """Normalise by (E x, E‖x‖²) of the input (and of a transcoder's target) and set b_dec as `b_dec_init` says.

        `first_batch` [n, d_out] of raw target activations is what the geometric median is taken of.
        """
        self.sae.set_statistics(*statistics, normalise=self.normalise, target=target)
        if self.b_dec_init == "zero":
            self.sae.b_dec.data.zero_()
        elif self.b_dec_init == "geometric_median":
            assert first_batch is not None, "the geometric median needs a batch"
            self.sae.b_dec.data.copy_(geometric_median(self.sae.normalise_target(first_batch.to(self.sae.W_dec))))

    # --- the step ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = as_pair(batch, self.sae.W_dec)
        sae, world = self.sae, self.trainer.world_size
        widths = self._widths(self.trainer.global_step)
        code = encode_for_training(sae, x, "dense" if widths == "every" else choose_kernels(self.kernels, sae, x))
        fired = code.fired()
        everywhere = fired.clone()
        if world > 1:
            torch.distributed.all_reduce(everywhere)
        weight: Tensor | float = 0.0
        if sae.sparsity in WITH_PENALTY:
            weight = self.controller(everywhere.sum() / (len(x) * world), self.trainer.global_step + 1)
        if self.dead_includes_batch:
            sae.update_fired(everywhere, len(x) * world)
        dead = self._dead(len(x)) if self.objective.aux.coefficient > 0 else None
        inner = self.fading.weight(self.trainer.global_step, self.trainer.max_steps)
        assert self._adam is not None, "training needs its optimizer"
        self._adam.encoder_decay = self.encoder_decay if inner < 1 or self.fading.between is None else 0.0
        loss = matryoshka_loss(sae, x, self.objective, dead, y, widths, weight, code, inner)
        if sae.sparsity == "batch_topk":
            sae.update_threshold(code.values.detach(), self.threshold_rate)
        if self.resort_rate is not None:
            self._update_use(code)
        if self.should_log():
            self._log_step(x, y, loss, fired, weight)
        if not self.dead_includes_batch:
            sae.update_fired(everywhere, len(x) * world)
        return loss.total

    def _widths(self, step: int) -> list[int] | Literal["every"]:
        """The prefixes of this step, a pure function of the seed and the step."""
        if self.prefix_sampling == "random":
            return pareto_prefixes(self.sae.d_sae, self.n_prefixes, stream(self.seed, "prefixes", step))
        return "every" if self.prefix_sampling == "every" else self.sae.prefixes

    def _dead(self, batch_tokens: int) -> Tensor:
        after = self.dead_after_tokens
        if self.dead_after_steps is not None:
            after = self.dead_after_steps * batch_tokens * self.trainer.world_size
        return self.sae.dead(after)

    def _update_use(self, code: DenseCode | SparseCode) -> None:
        use = code.mean_square(1.0 if self.sae.rescale_acts_by_decoder_norm else self.sae.W_dec.detach().norm(dim=1))
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(use)
            use /= self.trainer.world_size
        assert self.resort_rate is not None
        self.sae.update_use(use.detach(), self.resort_rate)

    def refuse_divergence(self) -> None:
        """Raises ValueError in one line if the weights are no longer finite."""
        self._refuse_divergence(self.sae.b_dec, self.trainer.global_step)

    def _refuse_divergence(self, tensor: Tensor, step: int) -> None:
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"training diverged by step {step}: not a finite number; "
                f"lower model.lr={self.lr} and resume a checkpoint before it, or start again"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step, logging = self.trainer.global_step + 1, self.should_log()
        super().optimizer_step(*args, **kwargs)
        self.after_step(step, logging)

    def after_step(self, step: int, logging: bool) -> None:
        """What follows the optimizer's update number `step`."""
        adam = self._adam
        assert adam is not None
        if logging:
            self._refuse_divergence(adam.grad_norm, step)
            self.send({"train/grad_norm": float(adam.grad_norm)}, step)
        if self.sae.sparsity == "jumprelu":  # below zero the gate would let negative pre-activations through
            self.sae.threshold.data.clamp_(min=0)
        if self.resort_rate is not None:
            self.sae.permute(self.sae.use.argsort(descending=True, stable=True), adam)

    def configure_optimizers(self) -> Any:
        optimizer, factor = self.build_optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def build_optimizer(self) -> tuple[DictionaryAdam, Callable[[int], float]]:
        """Adam for the trainer's number of steps, and what its lr is multiplied by at each step."""
        large = self.kernels == "auto" and self.sae.W_enc.numel() >= 1 << 18  # less is not worth a compiler's seconds
        kernels = "compiled" if large else self.kernels
        self._adam = DictionaryAdam(self.sae, self.lr, self.betas, self.grad_clip, self.decoder, kernels)
        total = self.trainer.max_steps  # not estimated_stepping_batches: touching that loses the loader's state
        assert total > 0, "training needs trainer.max_steps"
        share = self.sparsity_warmup_steps
        self.controller.warmup_steps = round(share * total) if share < 1 else min(round(share), total)
        return self._adam, lambda step: self.schedule.factor(step, total)

    # --- logging -----------------------------------------------------------------------------------------------

    def should_log(self) -> bool:
        """On the first and every log_every_n_steps-th optimizer step; on the others nothing is computed for logs."""
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(self.loggers) and (step == 0 or (step + 1) % every == 0)

    def send(self, metrics: dict[str, float], step: int) -> None:
        """To this SAE's loggers."""
        for logger in self.loggers if self.logger_index is None else [self.loggers[self.logger_index]]:
            logger.log_metrics(metrics, step=step)

    @torch.no_grad()
    def _log_step(self, x: Tensor, y: Tensor, loss: Loss, fired: Tensor, weight: Tensor | float) -> None:
        sae, trainer, adam = self.sae, self.trainer, self._adam
        assert adam is not None
        # loss = E‖y' − recon‖² in scaled units, mse = E‖y − ŷ‖² / d_out in raw ones, fvu over this batch's variance
        losses = prefix_errors(sae, loss.code, y)
        errors = losses / sae.target_scale.double().square()
        variance = (y - y.mean(0)).double().square().sum(1).mean()
        dead = self._dead(len(x)).double()
        columns = torch.stack([losses, errors / sae.d_out, errors / variance], 1)
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
            **({"train/threshold": float(sae.threshold.mean())} if sae.sparsity != "topk" else {}),
            **({"train/sparsity": float(loss.sparsity), "train/sparsity_weight": float(weight)} if weight else {}),
            **({"train/orthogonality": float(loss.orthogonality)} if self.objective.orthogonality else {}),
            **({"train/inner": self.fading.weight(step, trainer.max_steps)} if self.fading.between else {}),
            "train/lr": adam.param_groups[0]["lr"],
        }
        self.send(metrics, step + 1)

    # --- validation: at inference, by threshold ----------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size > 1:  # each rank's own batches moved it since the last step
            torch.distributed.broadcast(self.sae.threshold.data, 0)
        self._sums = ReconstructionSums(self.sae)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self._sums is not None
        self._sums.update(self.sae, *as_pair(batch, self.sae.W_dec))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.validation_metrics())

    def validation_metrics(self) -> dict[str, float]:
        """`val/{name}/p{width}` over the batches that validation has seen on all ranks."""
        assert self._sums is not None
        if self.trainer.world_size > 1:
            for tensor in self._sums.tensors.values():
                torch.distributed.all_reduce(tensor)
        metrics = self._sums.metrics()
        for width in self.sae.prefixes:  # in scaled units, comparable with train/loss
            metrics[f"loss/p{width}"] = metrics[f"mse/p{width}"] * self.sae.d_out * float(self.sae.target_scale) ** 2
        self._clock = None  # validation's time is not training's
        return {f"val/{key}": value for key, value in metrics.items() if key.split("/")[0] in METRICS}

    # --- resuming ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.refuse_divergence()  # a checkpoint of it would replace a good one
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], self.device)
