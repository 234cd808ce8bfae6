"""The LightningModule: drives the steps of one SAE, or of several on the same batches, and logs every prefix."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from msae.data.batches import Batch, as_pair
from msae.evaluation.reconstruction import ReconstructionSums
from msae.progress import say
from msae.sae import DictionaryAdam, MatryoshkaSAE
from msae.settings import decode
from msae.training.settings import Recipe
from msae.training.step import METRICS, Moment, Step, summed


class MatryoshkaTraining(L.LightningModule):
    """Trains an SAE by its recipe, or several arms by theirs, each bit for bit as it would be trained alone.

    `recipes`: arm → recipe as a plain tree with d_in (and a transcoder's d_out) set, so that `load_from_checkpoint`
    works under safe loading; one SAE alone has the name "". The loss is the sum of the arms', whose gradient for each
    is that of its own; one optimizer holds theirs; `trainer.loggers` are the arms', in order. An arm that diverges is
    left where it was (`failed`: name → one line) and the others go on; raises ValueError when none is left. All arms'
    graphs are held at once.
    """

    def __init__(self, recipes: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.names = list(recipes)
        steps = []
        for name, plain in recipes.items():
            recipe = decode(Recipe, plain, "model")
            assert recipe.d_in is not None, f"the recipe {name} has no d_in"
            steps.append(Step(recipe, recipe.d_in, recipe.d_out))
        self.steps = nn.ModuleList(steps)
        self.failed: dict[str, str] = {}
        self._clock: tuple[float, int] | None = None  # when and at which step throughput was last measured
        self._sums: dict[str, ReconstructionSums] = {}

    def step(self, name: str = "") -> Step:
        """The step of an arm."""
        step = self.steps[self.names.index(name)]
        assert isinstance(step, Step)
        return step

    @property
    def sae(self) -> MatryoshkaSAE:
        """The SAE of one alone, or of the first arm."""
        return self.step(self.names[0]).sae

    def living(self) -> Iterator[tuple[str, Step]]:
        """The arms that have not failed, by name."""
        for name in self.names:
            if name not in self.failed:
                yield name, self.step(name)

    def _each(self, action: Callable[[str, Step], Any]) -> list[Any]:
        """Do this to every living arm; one that raises ValueError has failed."""
        done = []
        for name, step in list(self.living()):
            try:
                done.append(action(name, step))
            except ValueError as error:
                if len(self.names) - len(self.failed) == 1 or self.trainer.world_size > 1:  # DDP knows no absent arm
                    raise
                self.failed[name] = str(error)
                say(f"arm {name}: {error}")
        return done

    # --- the step -----------------------------------------------------------------------------------------------------

    @property
    def moment(self) -> Moment:
        """Where the run is."""
        return Moment(self.trainer.global_step, self.trainer.max_steps, self.trainer.world_size)

    def configure_optimizers(self) -> Any:
        total = self.trainer.max_steps  # not estimated_stepping_batches: touching that loses the loader's state
        assert total > 0, "training needs trainer.max_steps"
        living = list(self.living())
        optimizer = JointAdam([step.prepare(total) for _, step in living])
        factors: list[Callable[[int], float]] = [partial(s.recipe.schedule.factor, total=total) for _, s in living]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        if self.trainer.is_global_zero:
            for name, step in self.living():
                say(f"{f'arm {name}: ' if name else ''}kernels: {step.kernels}{step.why}")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        at, logging = self.moment, self.should_log()
        rate = self._throughput(batch) if logging else {}

        def one(name: str, step: Step) -> Tensor:
            done = step.loss(*as_pair(batch, step.sae.W_dec), at)
            if logging:
                self._log(name, step.figures(done, at) | rate, at.step + 1)
            return done.loss.total

        return torch.stack(self._each(one)).sum()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        at, logging = self.moment.step + 1, self.should_log()
        super().optimizer_step(*args, **kwargs)

        def one(name: str, step: Step) -> None:
            assert step.optimizer is not None
            if logging:
                step.refuse_divergence(step.optimizer.grad_norm, at)
                self._log(name, {"train/grad_norm": float(step.optimizer.grad_norm)}, at)
            step.after_update()

        self._each(one)

    # --- logging ------------------------------------------------------------------------------------------------------

    def should_log(self) -> bool:
        """On the first and every log_every_n_steps-th optimizer step; on the others nothing is computed for logs."""
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(self.loggers) and (step == 0 or (step + 1) % every == 0)

    def _log(self, name: str, metrics: dict[str, float], step: int) -> None:
        if self.loggers:
            self.loggers[self.names.index(name)].log_metrics(metrics, step=step)

    def _throughput(self, batch: Batch) -> dict[str, float]:
        """Tokens a second since the last time this was asked."""
        trainer, before = self.trainer, self._clock
        now, step = time.perf_counter(), trainer.global_step
        self._clock = (now, step)
        if before is None or step <= before[1]:
            return {}
        tokens = len(batch if isinstance(batch, Tensor) else batch[0]) * trainer.world_size
        steps = (step - before[1]) * trainer.accumulate_grad_batches
        return {"train/tokens_per_s": tokens * steps / (now - before[0])}

    # --- validation: at inference -------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        for name, step in self.living():
            if self.trainer.world_size > 1:  # each rank's own batches moved it since the last step
                torch.distributed.broadcast(step.sae.threshold.data, 0)
            self._sums[name] = ReconstructionSums(step.sae)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._each(lambda name, step: self._sums[name].update(step.sae, *as_pair(batch, step.sae.W_dec)))

    def on_validation_epoch_end(self) -> None:
        for name, step in self.living():
            sae, sums = step.sae, self._sums[name]
            for tensor in sums.tensors.values():
                summed(tensor, self.trainer.world_size)
            seen = sums.metrics()
            for width in sae.prefixes:  # in scaled units, comparable with train/loss
                seen[f"loss/p{width}"] = seen[f"mse/p{width}"] * sae.d_out * float(sae.target_scale) ** 2
            metrics = {f"val/{key}": value for key, value in seen.items() if key.split("/")[0] in METRICS}
            self._log(name, metrics, self.trainer.global_step)
            if len(self.names) == 1:
                self.log_dict(metrics, logger=False)  # for the best checkpoint
        self._clock = None  # validation's time is not training's

    # --- resuming -----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        at = self.trainer.global_step
        self._each(lambda name, step: step.refuse_divergence(step.sae.b_dec, at))  # it would replace a good one
        checkpoint["failed"] = dict(self.failed)
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.failed = dict(checkpoint["failed"])
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], self.device)


class JointAdam(torch.optim.Optimizer):
    """The arms' optimizers as one, for a trainer that wants one; an arm without gradients is passed over."""

    def __init__(self, adams: list[DictionaryAdam]) -> None:
        self.adams = adams
        super().__init__([group for adam in adams for group in adam.param_groups], {})  # the same dicts: one lr

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of each; the closure, which Lightning gives, computes all gradients."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for adam in self.adams:
            if adam.sae.W_dec.grad is not None:
                adam.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"arms": [adam.state_dict() for adam in self.adams]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for adam, state in zip(self.adams, state_dict["arms"], strict=True):
            adam.load_state_dict(state)
        self.param_groups = [group for adam in self.adams for group in adam.param_groups]
