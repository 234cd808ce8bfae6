"""The body of `python -m msae.train`: find or make the shards, train, calibrate, export `sae/`, evaluate."""

import json
import logging
import math
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from msae import __version__
from msae.config import arm_models, describe_arms, explain, in_sweep, refuse_other_settings, run_directory
from msae.data.batches import TrainBatches, ValBatches
from msae.data.datamodule import ActivationData
from msae.data.shards import Shards, write_json
from msae.evaluation.evaluate import calibrate, evaluate
from msae.evaluation.pictures import truth_pictures
from msae.sae import load_sae, save_sae
from msae.sae.kernels import triton
from msae.training.arms import Arms
from msae.training.callbacks import Interrupted, PrefixCharts, SaveWhenStopping, TokenProgress
from msae.training.checkpoints import LAST, AtomicCheckpointIO, checkpoint_callbacks, resume_from, unreadable
from msae.training.memory import keep_freed_memory
from msae.training.module import MatryoshkaTraining


def run(cfg: DictConfig) -> None:
    """One whole run, as the checked configuration says."""
    quiet_lightning()
    keep_freed_memory()
    started = time.perf_counter()
    checkpoint = find_checkpoint(cfg.ckpt_path, cfg.run_dir, cfg.runs, cfg.name)
    if checkpoint is not None:
        refuse_other_settings(checkpoint.parent.parent / "config.yaml", cfg)
    data: ActivationData = instantiate(cfg.data)
    try:
        train(cfg, data, checkpoint, started)
    finally:
        data.close()


def train(cfg: DictConfig, data: ActivationData, checkpoint: Path | None, started: float) -> None:
    """From the shards to the report."""
    models = arm_models(cfg)
    if any(model.get("kernels") == "triton" for model in models.values()):
        on_gpu = torch.cuda.is_available() and cfg.trainer.get("accelerator") in ("auto", "gpu", "cuda")
        triton.require(torch.device("cuda" if on_gpu else "cpu"))
    modules = {}
    for name, model in models.items():
        try:
            modules[name] = build_module(model, data)
        except Exception as error:
            line = explain(error)
            if not name or line is None:  # alone, or a bug
                raise
            raise ValueError(f"arm {name}: {line}") from error
    check_budget(cfg, data)
    run = checkpoint.parent.parent if checkpoint else run_directory(cfg.name, cfg.runs, cfg.run_dir)
    if checkpoint is None:
        OmegaConf.save(OmegaConf.merge(cfg, {"run_dir": None, "ckpt_path": None}), run / "config.yaml", resolve=True)
    together = Arms(modules) if "" not in modules else None
    module = modules[""] if together is None else together
    trainer = build_trainer(cfg, data, modules, run)
    if trainer.is_global_zero:
        say(f"run: {run}" + (f" ({len(modules)} arms)" if together else ""))
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
    except Interrupted as stop:
        say(f"{stop}\nresume with the same command and run_dir={run} ckpt_path=last")
        raise SystemExit(stop.exit_code) from None
    if not trainer.is_global_zero:
        return
    module.to(trainer.strategy.root_device)  # Lightning moved it to the CPU
    tokens = trainer.global_step * data.batch_tokens * trainer.world_size * trainer.accumulate_grad_batches
    if together is None:
        metrics = finish(modules[""], data, run, cfg)
        metrics |= {"train/tokens": float(tokens), "seconds": time.perf_counter() - started}
        report(metrics, trainer.loggers[0], modules[""], data.shards, run, cfg, trainer.global_step)
        print_table(metrics, modules[""].sae.prefixes)
        say(f"sae:     {run / 'sae'}\nmetrics: {run / 'metrics.json'}\ncharts:  tensorboard --logdir {run.parent}")
    else:
        finish_arms(together, trainer, data, run, cfg, tokens, started)


def finish_arms(
    together: Arms, trainer: L.Trainer, data: ActivationData, run: Path, cfg: DictConfig, tokens: int, started: float
) -> None:
    """Every arm's `sae/`, metrics and pictures in its own directory, then arms.json, pictures and a table of all."""
    table: dict[str, dict[str, float]] = {}
    for name, arm in together.living():
        say(f"arm {name}")
        metrics = finish(arm, data, run / name, cfg) | {"train/tokens": float(tokens)}
        assert arm.logger_index is not None
        report(metrics, trainer.loggers[arm.logger_index], arm, data.shards, run / name, cfg, trainer.global_step)
        widest = f"/p{arm.sae.d_sae}"
        table[name] = {key.removesuffix(widest): value for key, value in metrics.items()}
    described = [{**arm, "error": together.failed.get(arm["name"])} for arm in describe_arms(cfg)]
    (run / "arms.json").write_text(json.dumps(described, indent=2) + "\n")
    if data.shards.truth is not None:
        pictures = truth_pictures({name: arm.sae for name, arm in together.living()}, data.shards)
        with SummaryWriter(run / "tensorboard") as writer:
            for name, figure in pictures.items():
                figure.savefig(run / f"{name}.png", dpi=150)
                writer.add_figure(name, figure, trainer.global_step)
    write_json(run / "metrics.json", {"train/tokens": float(tokens), "seconds": time.perf_counter() - started})
    print_arms(table)
    say(f"arms:    {run / 'arms.json'}\ncharts:  tensorboard --logdir {run}")
    if together.failed and not in_sweep():  # a sweep counts them itself
        raise SystemExit(1)


def quiet_lightning() -> None:
    """Lightning's advertisements, hardware listing and advice on DataLoaders are not for the users of this command."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def find_checkpoint(ckpt_path: str | None, run_dir: str | None, runs: str, name: str) -> Path | None:
    """The checkpoint to resume: `last` is that of run_dir or of the newest run of this name; else a run or a file."""
    if ckpt_path is None:
        return None
    if ckpt_path == "last" and run_dir is None:
        of_this_name = re.compile(rf"{re.escape(name)}-\d{{8}}-\d{{6}}(-\d+)?")
        found = [p.parent.parent for p in Path(runs).glob(f"*/checkpoints/{LAST}")]
        found = [run for run in found if of_this_name.fullmatch(run.name)]
        if not found:
            raise ValueError(
                f"ckpt_path=last: no run of {name} under {runs}/ has a checkpoint; give run_dir=… or drop ckpt_path"
            )
        directory = max(found, key=lambda run: (run / "checkpoints" / LAST).stat().st_mtime)
    else:
        directory = Path(run_dir if ckpt_path == "last" and run_dir else ckpt_path)
        if directory.is_file():  # this one, not the run's last
            if problem := unreadable(directory):
                raise ValueError(f"ckpt_path: {problem}; give ckpt_path=last or a checkpoint of a run")
            return directory
    if not (directory / "checkpoints").is_dir():
        raise ValueError(f"ckpt_path: {directory} is not a run directory with checkpoints/; see ls {runs}")
    return resume_from(directory / "checkpoints")


def check_budget(cfg: DictConfig, data: ActivationData) -> None:
    """Refuse what would only fail after the run directory is made, or after training. Raises ValueError in one line."""
    data.steps(cfg.tokens)
    held_out = sum(data.shards.rows("val"))
    if held_out < 2:
        raise ValueError(
            f"{data.shards.directory} has {held_out} held-out rows, expected at least 2 to calibrate and evaluate on; "
            "raise data.source.val_fraction or give more text"
        )
    if cfg.evaluation.calibration_tokens <= 0:
        raise ValueError("evaluation.calibration_tokens must be positive")
    for key in ("max_steps", "max_epochs", "callbacks", "plugins", "logger", "fast_dev_run"):
        if cfg.trainer.get(key) is not None:
            raise ValueError(f"trainer.{key} is set by msae; the length of training is tokens=…, drop trainer.{key}")
    if str(cfg.trainer.get("precision")) in ("16", "16-mixed", "16-true"):
        raise ValueError("trainer.precision=16 needs loss scaling, which clipping here does not know; use bf16-mixed")


def build_module(model: DictConfig, data: ActivationData) -> MatryoshkaTraining:
    """The LightningModule for these shards, starting from their mean and variance."""
    shards, target = data.shards, data.target_shards
    if target is None and model.get("d_out") is not None:
        raise ValueError(
            f"model.d_out={model.d_out} is of a transcoder; name what it reconstructs with data.target_hook_name=…"
        )
    for key, of in (("d_in", shards), ("d_out", target)):
        wanted = model.get(key)
        if of is not None and wanted not in (None, of.d_in):
            raise ValueError(
                f"shards in {of.directory} have {key}={of.d_in}, the model expects {wanted}; "
                f"drop model.{key} or harvest another hook"
            )
    sizes = {"d_in": shards.d_in, "d_out": target.d_in if target is not None else None}
    module: MatryoshkaTraining = instantiate(model, **sizes)
    of_target = (target.mean, target.mean_square) if target is not None else None
    first = None
    if module.b_dec_init == "geometric_median":
        batch = TrainBatches(target or shards, data.batch_tokens, 1, data.seed).batch(0)
        first = batch if isinstance(batch, Tensor) else batch[1]
    module.start_from((shards.mean, shards.mean_square), of_target, first)
    return module


def build_trainer(
    cfg: DictConfig, data: ActivationData, modules: dict[str, MatryoshkaTraining], run: Path
) -> L.Trainer:
    """The configured Trainer with this project's callbacks and checkpoints, and a logger for each arm.

    One SAE alone also keeps its best checkpoint; of several arms there is no best.
    """
    checkpoints = run / "checkpoints"
    on_mac = cfg.trainer.get("accelerator") == "auto" and torch.backends.mps.is_available()
    best = f"val/fvu/p{modules[''].sae.d_sae}" if "" in modules else None
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        **({"accelerator": "cpu"} if on_mac else {}),  # MPS has no float64, which the statistics are kept in
        max_epochs=-1,
        logger=[
            TensorBoardLogger(run / name, name="", version="tensorboard", default_hp_metric=False) for name in modules
        ],
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            SaveWhenStopping(checkpoints / LAST),
            TokenProgress(),
            PrefixCharts(),
            *checkpoint_callbacks(checkpoints, cfg.checkpoint_every_steps, best),
        ],
    )
    steps = data.steps(cfg.tokens, trainer.world_size, trainer.accumulate_grad_batches)
    trainer.fit_loop.epoch_loop.max_steps = steps
    return trainer


def finish(module: MatryoshkaTraining, data: ActivationData, run: Path, cfg: DictConfig) -> dict[str, float]:
    """Calibrate on the first half of the held-out rows, export, and measure what was exported on the second half."""
    shards, sae = data.shards, module.sae
    middle = sum(shards.rows("val")) // 2
    if module.decoder == "unit_norm_before_step":  # the last step left them off 1 by that step
        sae.fold_decoder_norm()
    stop = min(middle, cfg.evaluation.calibration_tokens)
    calibrate(sae, ValBatches(shards, data.batch_tokens, stop=stop))
    if module.decoder == "free":  # training selects by pre without the norm, so the calibrated threshold takes it in
        sae.fold_decoder_norm()
    save_sae(sae, run / "sae", sae_metadata(shards, data.target_shards, module))
    exported = load_sae(run / "sae", sae.W_dec.device)
    return evaluate(
        exported,
        shards,
        data.source,
        data.hook_name,
        middle,
        data.batch_tokens,
        cfg.evaluation.ce_sequences,
        data.target_shards,
    )


def sae_metadata(shards: Shards, target: Shards | None, module: MatryoshkaTraining) -> dict[str, Any]:
    """What a user of the SAE must know about the activations it was trained on, under SAELens's names, and how."""
    identity, provenance = shards.identity, shards.manifest["provenance"]
    return {
        "model_name": provenance.get("model", identity.get("source")),
        "hook_name": shards.manifest["hook_name"],
        "hook_head_index": None,
        "context_size": identity.get("context"),
        "prepend_bos": identity.get("prepend_bos"),
        "dataset_path": provenance.get("text"),
        "seqpos_slice": [None],
        **({"hook_name_out": target.manifest["hook_name"]} if target is not None else {}),
        "trained_with": f"msae {__version__}",
        "training_architecture_details": {
            "decoder_init_norm": module.hparams["decoder_init_norm"],
            "aux_loss_coefficient": module.objective.aux.coefficient,
            "use_matryoshka_aux_loss": module.objective.aux.per_level,
            "rescale_acts_by_decoder_norm": module.decoder == "rescaled",
            "topk_threshold_lr": module.threshold_rate,
        },
        "msae": {"training": dict(module.hparams)},
        "shards": {"identity_hash": shards.manifest["identity_hash"], "identity": identity},
    }


def report(
    metrics: dict[str, float],
    logger: Any,
    module: MatryoshkaTraining,
    shards: Shards,
    directory: Path,
    cfg: DictConfig,
    step: int,
) -> None:
    """The figures as metrics.json, in TensorBoard beside the settings, and a picture where the truth is known."""
    write_json(directory / "metrics.json", {key: value for key, value in metrics.items() if math.isfinite(value)})
    assert isinstance(logger, TensorBoardLogger)
    settings = {key: value for key, value in module.hparams.items() if key != "d_in"}
    settings |= {"tokens": cfg.tokens, "batch_tokens": cfg.data.batch_tokens, "shards": shards.directory.name}
    final = {f"final/{key}": value for key, value in metrics.items()}
    logger.log_metrics(final, step)
    inner = tuple(f"/p{width}" for width in module.sae.prefixes[:-1])  # too many columns beside hyperparameters
    logger.log_hyperparams(settings, {key: value for key, value in final.items() if not key.endswith(inner)})
    if shards.truth is not None:
        for name, figure in truth_pictures({directory.name: module.sae}, shards).items():
            figure.savefig(directory / f"{name}.png", dpi=150)
            logger.experiment.add_figure(name, figure, step)
    logger.finalize("success")


def print_table(metrics: dict[str, float], prefixes: list[int]) -> None:
    """One row a prefix, then the figures that concern the whole SAE."""
    names = [n for n in ("fvu", "mse", "l0", "dead", "ce", "ce_score") if f"val/{n}/p{prefixes[-1]}" in metrics]
    table = Table("prefix", *names, title="held-out rows")
    for width in prefixes:
        table.add_row(str(width), *(f"{metrics[f'val/{name}/p{width}']:.4g}" for name in names))
    console = Console()
    console.print(table)
    rest = Table(box=None, show_header=False)
    for key, value in metrics.items():
        if not re.search(r"/p\d+$", key):
            rest.add_row(key, f"{value:,.0f}" if key == "train/tokens" else f"{value:.4g}")
    console.print(rest)


def print_arms(table: dict[str, dict[str, float]]) -> None:
    """One row an arm, of its widest prefix."""
    wanted = ["val/fvu", "val/l0", "val/dead", "val/ce_score"]
    wanted += [f"truth/{n}" for n in ("mcc", "firing_f1", "parent_silent_given_child", "cos_child_parent")]
    columns = [key for key in wanted if any(key in row for row in table.values())]
    shown = Table(
        Column("arm", overflow="fold"),
        *(Column(key.rpartition("/")[2], overflow="fold") for key in columns),
        title="held-out rows, all latents",
    )
    for name, row in table.items():
        shown.add_row(name, *(f"{row[key]:.4g}" if key in row else "" for key in columns))
    Console().print(shown)
