"""One whole training run: find or make the shards, train, calibrate, export `sae/`, evaluate."""

import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from msae import __version__
from msae.data.activations import Activations
from msae.data.batches import ValBatches, sample
from msae.data.datamodule import ActivationData
from msae.evaluation.evaluate import Evaluation, HeldOut, calibrate, evaluate
from msae.evaluation.pictures import truth_pictures
from msae.progress import say
from msae.runs import Arm, Run, new_run
from msae.sae import MatryoshkaSAE, fold_decoder_norm, load_sae, save_sae
from msae.sae.fast import triton
from msae.settings import as_plain, build, changed, check_target, flat
from msae.sources.language_model import LanguageModelSource
from msae.training.callbacks import PrefixCharts, SaveWhenStopping, TokenProgress
from msae.training.checkpoints import AtomicCheckpointIO, checkpoint_callbacks, find_checkpoint, run_of
from msae.training.memory import keep_freed_memory
from msae.training.module import MatryoshkaTraining
from msae.training.settings import Recipe, Train
from msae.training.step import Step

OURS = ("max_steps", "max_epochs", "callbacks", "plugins", "logger", "fast_dev_run")  # keys of the trainer


def train(
    plan: Train, arms: list[Arm], recipes: dict[str, Recipe], config: Mapping[str, Any], job: Path | None = None
) -> tuple[Run, dict[str, dict[str, float]], dict[str, str]]:
    """Train these recipes, by arm ("" for one SAE alone), on the same batches, and leave a run directory.

    `config` is what is kept of the composed configuration, `job` the directory of a sweep's job. Returns the run, the
    metrics of each arm, and why arms failed. Raises ValueError in one line.
    """
    quiet_lightning()
    keep_freed_memory()
    started = time.perf_counter()
    refuse_impossible(plan, recipes)
    checkpoint = find_checkpoint(plan.ckpt_path, plan.run_dir, plan.runs, plan.name)
    if checkpoint is not None:
        run_of(checkpoint).refuse_other_settings(config)
    activations = Activations(plan.data, resuming=checkpoint is not None)
    try:
        module = build_module(recipes, activations)
        if checkpoint is None:
            start_from(module, activations)
        check_held_out(activations, plan.tokens)
        run = run_of(checkpoint) if checkpoint else new_run(plan.name, plan.runs, plan.run_dir, job)
        if checkpoint is None:
            run.write_config(config)
        trainer = build_trainer(plan, activations, module, run)
        if trainer.is_global_zero:
            say(f"run: {run}" + (f" ({len(recipes)} arms)" if arms else ""))
        fit(trainer, module, activations, checkpoint, run)
        if not trainer.is_global_zero:
            return run, {}, {}
        metrics = Ending(plan, activations, module, trainer, run, started).write(arms)
        return run, metrics, module.failed
    finally:
        activations.close()


def quiet_lightning() -> None:
    """Lightning's advertisements, hardware listing and advice on DataLoaders are not for the users of this command."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def refuse_impossible(plan: Train, recipes: dict[str, Recipe]) -> None:
    """Refuse what would only fail after the shards are made. Raises ValueError in one line."""
    for name, recipe in recipes.items():
        try:
            Step(recipe, d_in=1)  # sizes that do not fit each other are the same for any input
        except ValueError as error:
            raise ValueError(f"arm {name}: {error}" if name else str(error)) from None
    check_target(plan.trainer, "trainer")
    for key in OURS:
        if plan.trainer.get(key) is not None:
            raise ValueError(f"trainer.{key} is set by msae; the length of training is tokens=…, drop trainer.{key}")
    if str(plan.trainer.get("precision")) in ("16", "16-mixed", "16-true"):
        raise ValueError("trainer.precision=16 needs loss scaling, which clipping here does not know; use bf16-mixed")
    if any(recipe.kernels == "triton" for recipe in recipes.values()):
        on_gpu = torch.cuda.is_available() and plan.trainer.get("accelerator") in ("auto", "gpu", "cuda")
        triton.require(torch.device("cuda" if on_gpu else "cpu"))


def check_held_out(activations: Activations, tokens: int) -> None:
    """Refuse what would only fail after the run directory is made. Raises ValueError in one line."""
    activations.steps(tokens)
    if (held_out := sum(activations.rows.rows("val"))) < 2:
        raise ValueError(
            f"{activations.rows} has {held_out} held-out rows, expected at least 2 to calibrate and "
            "evaluate on; raise data.source.val_fraction or give more text"
        )


def build_module(recipes: dict[str, Recipe], activations: Activations) -> MatryoshkaTraining:
    """The LightningModule for these rows."""
    rows, target = activations.rows, activations.target
    plain = {}
    for name, recipe in recipes.items():
        if target is None and recipe.d_out is not None:
            raise ValueError(
                f"model.d_out={recipe.d_out} is of a transcoder; name what it reconstructs with data.target_hook_name=…"
            )
        for key, of in (("d_in", rows), ("d_out", target)):
            if of is not None and getattr(recipe, key) not in (None, of.d_in):
                raise ValueError(
                    f"{of} has {key}={of.d_in}, the model expects {getattr(recipe, key)}; "
                    f"drop model.{key} or harvest another hook"
                )
        plain[name] = as_plain(changed(recipe, d_in=rows.d_in, d_out=None if target is None else target.d_in))
    return MatryoshkaTraining(plain)


def start_from(module: MatryoshkaTraining, activations: Activations) -> None:
    """Start every SAE from the mean and variance of the training rows; a resumed run has them in its checkpoint."""
    rows, target = activations.rows, activations.target
    of_target = None if target is None else (target.mean, target.mean_square)
    some: Tensor | None = None
    if any(step.recipe.init.b_dec == "geometric_median" for _, step in module.living()):
        some = sample(target or rows, activations.data.batch_tokens, activations.data.seed).to(module.sae.W_dec)
    for _, step in module.living():
        step.start_from((rows.mean, rows.mean_square), of_target, some)


def build_trainer(plan: Train, activations: Activations, module: MatryoshkaTraining, run: Run) -> L.Trainer:
    """The configured Trainer with this project's callbacks and checkpoints, and a logger for each arm.

    One SAE alone also keeps its best checkpoint; of several arms there is no best.
    """
    on_mac = plan.trainer.get("accelerator") == "auto" and torch.backends.mps.is_available()
    logs = [run.arm(name).tensorboard for name in module.names]
    alone = f"val/fvu/p{module.sae.d_sae}" if module.names == [""] else None
    trainer: L.Trainer = build(
        # MPS has no float64, which the statistics are kept in
        {**plan.trainer, **({"accelerator": "cpu"} if on_mac else {})},
        "trainer",
        max_epochs=-1,
        logger=[TensorBoardLogger(log.parent, name="", version=log.name, default_hp_metric=False) for log in logs],
        plugins=[AtomicCheckpointIO(run)],
        callbacks=[
            SaveWhenStopping(run.last_checkpoint),
            TokenProgress(),
            PrefixCharts(),
            *checkpoint_callbacks(run, plan.checkpoint_every_steps, alone),
        ],
    )
    steps = activations.steps(plan.tokens, trainer.world_size, trainer.accumulate_grad_batches)
    trainer.fit_loop.epoch_loop.max_steps = steps
    return trainer


def fit(
    trainer: L.Trainer, module: MatryoshkaTraining, activations: Activations, checkpoint: Path | None, run: Run
) -> None:
    """Train to the end; a signal ends the process after a checkpoint, with a line that says how to go on."""
    path = str(checkpoint) if checkpoint else None
    try:
        trainer.fit(module, datamodule=ActivationData(activations), ckpt_path=path, weights_only=True)
    except BaseException as error:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        stop = next(callback.stopped for callback in callbacks if isinstance(callback, SaveWhenStopping))
        if stop is None:
            raise
        if error is not stop:  # Lightning and loggers put things away on the way here
            say(f"while stopping: {type(error).__name__}: {error}")
        say(f"{stop}\nresume with the same command and run_dir={run} ckpt_path=last")
        raise SystemExit(stop.exit_code) from None
    module.to(trainer.strategy.root_device)  # Lightning moved it to the CPU


def export(step: Step, activations: Activations, run: Run, evaluation: Evaluation) -> dict[str, float]:
    """Calibrate on the first half of the held-out rows, export, and measure what was exported on the second half."""
    rows, sae, data = activations.rows, step.sae, activations.data
    middle = sum(rows.rows("val")) // 2
    if step.recipe.decoder == "unit_norm_before_step":  # the last step left them off 1 by that step
        fold_decoder_norm(sae)
    stop = min(middle, evaluation.calibration_tokens)
    calibrate(sae, ValBatches(rows, data.batch_tokens, stop=stop))
    if step.recipe.decoder == "free":  # training selects by pre without norms: the calibrated threshold takes them in
        fold_decoder_norm(sae)
    save_sae(sae, run.sae_directory, sae_metadata(activations, step.recipe))
    exported = load_sae(run.sae_directory, sae.W_dec.device)
    exported.kernels = sae.kernels
    load_model = data.source.load_model if isinstance(data.source, LanguageModelSource) else None
    held_out = HeldOut(rows, load_model, middle, data.batch_tokens, evaluation.ce_sequences, activations.target)
    return evaluate(exported, held_out)


def sae_metadata(activations: Activations, recipe: Recipe) -> dict[str, Any]:
    """What a user of the SAE must know about the activations it was trained on, under SAELens's names, and how."""
    rows, target = activations.rows, activations.target
    identity, provenance = rows.identity, rows.provenance
    return {
        "model_name": provenance.get("model", identity.get("source")),
        "hook_name": rows.hook_name,
        "hook_head_index": None,
        "context_size": identity.get("context"),
        "prepend_bos": identity.get("prepend_bos"),
        "dataset_path": provenance.get("text"),
        "seqpos_slice": [None],
        **({"hook_name_out": target.hook_name} if target is not None else {}),
        "trained_with": f"msae {__version__}",
        "training_architecture_details": {
            "decoder_init_norm": recipe.init.decoder_norm,
            "aux_loss_coefficient": recipe.objective.aux.coefficient,
            "use_matryoshka_aux_loss": recipe.objective.aux.per_level,
            "rescale_acts_by_decoder_norm": recipe.decoder == "rescaled",
            "topk_threshold_lr": recipe.threshold_rate,
        },
        "msae": {"training": as_plain(recipe)},
        "shards": {"identity_hash": rows.identity_hash, "identity": identity},
    }


@dataclass
class Ending:
    """What a trained run leaves: `sae/`, figures and pictures of every arm, and what tells the arms apart."""

    plan: Train
    activations: Activations
    module: MatryoshkaTraining
    trainer: L.Trainer
    run: Run
    started: float  # time.perf_counter()

    def write(self, arms: list[Arm]) -> dict[str, dict[str, float]]:
        """Write all of it; the metrics of each arm."""
        data, trainer = self.plan.data, self.trainer
        per_step = data.batch_tokens * trainer.world_size * trainer.accumulate_grad_batches
        tokens = {"train/tokens": float(trainer.global_step * per_step)}
        metrics = {}
        for name, step in self.module.living():
            if name:
                say(f"arm {name}")
            of_arm = export(step, self.activations, self.run.arm(name), self.plan.evaluation) | tokens
            metrics[name] = of_arm if name else of_arm | {"seconds": time.perf_counter() - self.started}
            self.report(name, step, metrics[name])
        if arms:
            self.run.write_arms([changed(arm, error=self.module.failed.get(arm.name)) for arm in arms])
            if self.activations.rows.truth is not None:
                with SummaryWriter(self.run.tensorboard) as writer:
                    self.draw({name: step.sae for name, step in self.module.living()}, self.run, writer)
            self.run.write_metrics(tokens | {"seconds": time.perf_counter() - self.started})
        return metrics

    def report(self, name: str, step: Step, metrics: dict[str, float]) -> None:
        """An arm's figures as metrics.json, in TensorBoard beside the settings, and its pictures."""
        run, logger = self.run.arm(name), self.trainer.loggers[self.module.names.index(name)]
        assert isinstance(logger, TensorBoardLogger)
        run.write_metrics({key: value for key, value in metrics.items() if math.isfinite(value)})
        settings = {key: value for key, value in flat(as_plain(step.recipe)).items() if key != "d_in"}
        settings |= {"tokens": self.plan.tokens, "batch_tokens": self.plan.data.batch_tokens}
        settings["shards"] = self.activations.rows.name
        final = {f"final/{key}": value for key, value in metrics.items()}
        logger.log_metrics(final, self.trainer.global_step)
        inner = tuple(f"/p{width}" for width in step.sae.prefixes[:-1])  # too many columns beside hyperparameters
        logger.log_hyperparams(settings, {key: value for key, value in final.items() if not key.endswith(inner)})
        self.draw({run.path.name: step.sae}, run, logger.experiment)
        logger.finalize("success")

    def draw(self, saes: dict[str, MatryoshkaSAE], run: Run, writer: SummaryWriter) -> None:
        """The pictures of these SAEs beside the truth, if it is known."""
        if self.activations.rows.truth is not None:
            for name, figure in truth_pictures(saes, self.activations.rows).items():
                figure.savefig(run.picture(name), dpi=150)
                writer.add_figure(name, figure, self.trainer.global_step)
