"""python -m msae.train: find or make the shards, train, calibrate, export `sae/`, evaluate."""

import json
import logging
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from msae.config import TrainConfig, command, run_directory
from msae.data.batches import ValBatches
from msae.data.datamodule import ActivationData
from msae.data.shards import Shards
from msae.evaluation.evaluate import calibrate, evaluate
from msae.evaluation.pictures import decoder_against_truth
from msae.sae import MatryoshkaSAE, load_sae, save_sae
from msae.training.callbacks import Interrupted, PrefixCharts, StopOnSignal, TokenProgress
from msae.training.checkpoints import LAST, AtomicCheckpointIO, checkpoint_callbacks, refuse_other_settings, resume_from
from msae.training.memory import keep_freed_memory
from msae.training.module import MatryoshkaTraining


@command("train", TrainConfig)
def main(cfg: DictConfig) -> None:
    quiet_lightning()
    keep_freed_memory()
    started = time.perf_counter()
    checkpoint = find_checkpoint(cfg.ckpt_path, cfg.run_dir, cfg.runs, cfg.name)
    data: ActivationData = instantiate(cfg.data)
    module = build_module(cfg, data.shards)
    if checkpoint is not None:
        refuse_other_settings(checkpoint, dict(module.hparams))
    data.steps(cfg.tokens)  # refuses a budget that no step fits in before a run directory is made
    run = checkpoint.parent.parent if checkpoint else run_directory(cfg.name, cfg.runs, cfg.run_dir)
    if checkpoint is None:
        OmegaConf.save(OmegaConf.merge(cfg, {"run_dir": None, "ckpt_path": None}), run / "config.yaml", resolve=True)
    trainer = build_trainer(cfg, data, module, run)
    if trainer.is_global_zero:
        say(f"run: {run}")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
    except Interrupted as stop:
        say(f"{stop}\nresume with the same command and run_dir={run} ckpt_path=last")
        raise SystemExit(stop.exit_code) from None
    if trainer.is_global_zero:
        module.to(trainer.strategy.root_device)  # Lightning moved it to the CPU
        metrics = finish(module.sae, data, run, cfg)
        per_step = data.batch_tokens * trainer.world_size * trainer.accumulate_grad_batches
        metrics |= {
            "train/tokens": float(trainer.global_step * per_step),
            "seconds": time.perf_counter() - started,
        }
        report(metrics, trainer, module, data.shards, run, cfg)


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
        found = [p.parent.parent for p in Path(runs).glob(f"{name}-*/checkpoints/{LAST}")]
        if not found:
            raise ValueError(
                f"ckpt_path=last: no run of {name} under {runs}/ has a checkpoint; give run_dir=… or drop ckpt_path"
            )
        directory = max(found, key=lambda run: (run / "checkpoints" / LAST).stat().st_mtime)
    else:
        directory = Path(run_dir if ckpt_path == "last" and run_dir else ckpt_path)
        if directory.is_file():
            directory = directory.parent.parent
    if not (directory / "checkpoints").is_dir():
        raise ValueError(f"ckpt_path: {directory} is not a run directory with checkpoints/; see ls {runs}")
    return resume_from(directory / "checkpoints")


def build_module(cfg: DictConfig, shards: Shards) -> MatryoshkaTraining:
    """The LightningModule for these shards, starting from their mean and variance."""
    wanted = cfg.model.get("d_in")
    if wanted is not None and wanted != shards.d_in:
        raise ValueError(
            f"shards in {shards.directory} have d_in={shards.d_in}, the model expects {wanted}; "
            "drop model.d_in or harvest another hook"
        )
    module: MatryoshkaTraining = instantiate(cfg.model, d_in=shards.d_in)
    module.sae.set_statistics(shards.mean, shards.mean_square)
    return module


def build_trainer(cfg: DictConfig, data: ActivationData, module: MatryoshkaTraining, run: Path) -> L.Trainer:
    """The configured Trainer with this project's callbacks, logger and checkpoints."""
    checkpoints = run / "checkpoints"
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        max_epochs=-1,
        logger=TensorBoardLogger(run, name="", version="tensorboard", default_hp_metric=False),
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            StopOnSignal(checkpoints / LAST),
            TokenProgress(),
            PrefixCharts(),
            *checkpoint_callbacks(checkpoints, cfg.checkpoint_every_steps, f"val/fvu/p{module.sae.d_sae}"),
        ],
    )
    steps = data.steps(cfg.tokens, trainer.world_size, trainer.accumulate_grad_batches)
    trainer.fit_loop.epoch_loop.max_steps = steps
    return trainer


def finish(sae: MatryoshkaSAE, data: ActivationData, run: Path, cfg: DictConfig) -> dict[str, float]:
    """Calibrate on the first half of the held-out rows, export, and measure what was exported on the second half."""
    shards = data.shards
    middle = sum(shards.rows("val")) // 2
    calibrate(sae, ValBatches(shards, data.batch_tokens, stop=min(middle, cfg.evaluation.calibration_tokens)))
    save_sae(sae, run / "sae", sae_metadata(shards))
    exported = load_sae(run / "sae", sae.W_dec.device)
    return evaluate(
        exported, shards, data.source, data.hook_name, middle, data.batch_tokens, cfg.evaluation.ce_sequences
    )


def sae_metadata(shards: Shards) -> dict[str, Any]:
    """What a user of the SAE must know about the activations it was trained on, under SAELens's names."""
    identity, provenance = shards.identity, shards.manifest["provenance"]
    return {
        "model_name": provenance.get("model", identity.get("source")),
        "hook_name": shards.manifest["hook_name"],
        "hook_head_index": None,
        "context_size": identity.get("context"),
        "prepend_bos": identity.get("prepend_bos"),
        "dataset_path": provenance.get("text"),
        "seqpos_slice": [None],
        "shards": {"identity_hash": shards.manifest["identity_hash"], "identity": identity},
    }


def report(
    metrics: dict[str, float],
    trainer: L.Trainer,
    module: MatryoshkaTraining,
    shards: Shards,
    run: Path,
    cfg: DictConfig,
) -> None:
    """The figures as metrics.json, in TensorBoard beside the hyperparameters, and as a table on the terminal."""
    (run / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    logger = trainer.logger
    assert isinstance(logger, TensorBoardLogger)
    settings = {key: value for key, value in module.hparams.items() if key != "d_in"}
    settings |= {"tokens": cfg.tokens, "batch_tokens": cfg.data.batch_tokens, "shards": shards.directory.name}
    inner = tuple(f"/p{width}" for width in module.sae.prefixes[:-1])
    logger.log_hyperparams(settings, {f"final/{key}": v for key, v in metrics.items() if not key.endswith(inner)})
    truth = shards.truth
    if truth is not None:
        figure = decoder_against_truth({run.name: module.sae.W_dec}, truth["features"], truth["parent"])
        figure.savefig(run / "truth.png", dpi=150)
        logger.experiment.add_figure("truth", figure, trainer.global_step)
    logger.finalize("success")
    print_table(metrics, module.sae.prefixes)
    say(f"sae:     {run / 'sae'}\nmetrics: {run / 'metrics.json'}\ncharts:  tensorboard --logdir {run.parent}")


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
            rest.add_row(key, f"{value:.4g}")
    console.print(rest)


if __name__ == "__main__":
    main()
