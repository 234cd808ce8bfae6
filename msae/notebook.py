"""For notebooks and scripts: train on a tensor, evaluate, explore, without a command line."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from torch import Tensor

from msae.cli.arms import preset_of
from msae.cli.command import config_dir, plain
from msae.data.activations import Data
from msae.data.rows import Rows
from msae.data.stream import enough_gb, open_stream
from msae.devices import pick_device
from msae.evaluation.evaluate import HeldOut
from msae.evaluation.evaluate import evaluate as measure
from msae.explorer.inputs import Explore
from msae.explorer.job import explore
from msae.runs import Run
from msae.sae import MatryoshkaSAE
from msae.settings import as_plain, decode
from msae.sources.tensor import TensorSource
from msae.training import job
from msae.training.settings import Recipe, Train


@dataclass
class Trained:
    """A finished run: its directory, its figures on held-out rows, and what it was trained on."""

    run: Run
    metrics: dict[str, float]
    source: TensorSource

    @property
    def sae(self) -> MatryoshkaSAE:
        """The SAE as exported: raw activations in and out."""
        return self.run.load_sae()

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """What training measures at its end, on these rows [rows, d_in]: `val/{name}/p{width}`."""
        return measure(self.sae.to(pick_device("auto")), HeldOut(rows_of(TensorSource(x, val_fraction=1))))

    def explore(self, **settings: Any) -> Path:
        """Look for the hierarchy and write the page (docs/explore.md; `settings` as `python -m msae.explore` has)."""
        return explore(decode(Explore, {"run": str(self.run), **settings}, "explore"), rows_of(self.source))


def train(
    x: Tensor,
    *,
    tokens: int | None = None,
    preset: str | None = None,
    name: str = "tensor",
    run_dir: str | None = None,
    batch_tokens: int = 4096,
    val_fraction: float = 0.05,
    seed: int = 0,
    trainer: Mapping[str, Any] | None = None,
    **model: Any,
) -> Trained:
    """Train an SAE on the rows of `x` [rows, d_in], as `python -m msae.train` does, and leave a run directory.

    tokens: training budget in rows, by default ten passes. preset: a published recipe (docs/objectives.md). trainer:
    further arguments of Lightning's Trainer. model: the keys `model.*` of docs/settings.md, such as d_sae, prefixes, k,
    nested ones as dicts. Raises ValueError in one line.
    """
    source = TensorSource(x, val_fraction, seed)
    merged = OmegaConf.merge(preset_of(preset, "train") if preset else OmegaConf.create(), {"seed": seed} | model)
    assert OmegaConf.is_dict(merged)
    recipe = decode(Recipe, plain(merged), "model")  # type: ignore[arg-type]
    data = Data(source, batch_tokens=batch_tokens, seed=seed, memory_gb=enough_gb(source))
    defaults = yaml.safe_load((config_dir("conf") / "trainer" / "default.yaml").read_text())
    plan = Train(
        name=name,
        tokens=10 * len(x) if tokens is None else tokens,
        model=recipe,
        data=data,
        trainer=defaults | dict(trainer or {}),
        seed=seed,
        run_dir=run_dir,
    )
    config = {"name": name, "tokens": plan.tokens, "seed": seed, "model": as_plain(recipe), "trainer": plan.trainer}
    config["data"] = {"batch_tokens": batch_tokens, "source": source.identity(data.hook)}
    run, metrics, _ = job.train(plan, [], {"": recipe}, config)
    return Trained(run, metrics.get("", {}), source)  # another rank has no figures


def rows_of(source: TensorSource) -> Rows:
    """All rows of the source, in memory."""
    rows, _ = open_stream(source, source.hook_names, Path(), enough_gb(source), show=False)
    return rows[source.hook_names[0]]
