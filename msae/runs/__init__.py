"""A run's directory: what lies where in it. Nobody else spells a path inside a run.

runs/<name>-<time>/       or a job of a sweep, or an arm of a run with several
    config.yaml           resolved; python -m msae.train -cp <run> -cn config repeats it
    sae/                  the SAE: JSON and safetensors
    metrics.json          figures on held-out rows; a run that has it has finished
    checkpoints/          last.ckpt, previous.ckpt, best.ckpt
    tensorboard/          events
    truth.png …           pictures
    hierarchy/            hierarchy.json, firings.safetensors, pictures, events; report.html: the page
    arms.json, <arm>/     of a run with several arms, each a run of its own without config and checkpoints
    error.txt             why a job of a sweep failed
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from msae.data.activations import Activations, Data
from msae.data.rows import Rows
from msae.data.shards import Shards, identity_hash
from msae.files import read_json, write, write_json
from msae.interop import load as load_any_sae
from msae.progress import is_other_rank
from msae.sae import MatryoshkaSAE
from msae.settings import as_plain, decode, flat, settings

# Where files lie and how fast they are read decides nothing of what comes out.
ANYWHERE = ("runs", "run_dir", "ckpt_path", "data.root", "data.prefetch", "data.max_disk_gb")
MEASURED = ("data.val_rows", "evaluation")  # what is measured, not what is trained
ARM_NAME = re.compile(r"[\w.+=-]+")
RESERVED = ("checkpoints", "sae", "tensorboard", "hierarchy")
RESERVED_SUFFIXES = (".json", ".yaml", ".png", ".txt", ".ckpt", ".html")
OF_OTHER_RANKS = "MSAE_RUN_DIR"  # the environment variable that tells them the directory


@settings
class Arm:
    """One SAE of a run with several: its directory, the arm it is of, what a grid sets in it, why it failed."""

    name: str
    arm: str
    settings: dict[str, Any]
    error: str | None = None


@settings
class Arms:
    """What arms.json holds."""

    arms: list[Arm]


class Run:
    """One run directory, or an arm's in it."""

    def __init__(self, path: str | Path, of: "Run | None" = None) -> None:
        self.path, self.of = Path(path), of
        self.config_file = (of or self).path / "config.yaml"
        self.sae_directory = self.path / "sae"
        self.metrics_file = self.path / "metrics.json"
        self.arms_file = self.path / "arms.json"
        self.error_file = self.path / "error.txt"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.previous_checkpoint = self.checkpoints / "previous.ckpt"
        self.tensorboard = self.path / "tensorboard"
        self.hierarchy = self.path / "hierarchy"
        self.page = self.path / "report.html"
        self._opened: Activations | None = None  # of a run that streamed its rows

    def __str__(self) -> str:
        return str(self.path)

    def picture(self, name: str) -> Path:
        """The file of a picture of the run."""
        return self.path / f"{name}.png"

    # --- what is there ------------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; empty without one. Raises ValueError in one line if it cannot be read."""
        if not self.config_file.exists():
            return {}
        try:
            config = yaml.safe_load(self.config_file.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{self.config_file} cannot be read ({' '.join(str(error).split())})") from None
        return config if isinstance(config, dict) else {}

    def setting(self, dotted: str) -> Any:
        """One value of the configuration, None where there is none."""
        node: Any = self.config
        for key in dotted.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def outcome(self) -> tuple[dict[str, Any], str | None]:
        """The metrics, or {} and why there are none; without readable metrics.json the run has not finished."""
        if self.error_file.exists():
            return {}, self.error_file.read_text().strip()
        try:
            metrics = json.loads(self.metrics_file.read_text())
        except FileNotFoundError:
            return {}, "stopped before it wrote metrics.json"
        except (OSError, ValueError) as error:
            return {}, f"metrics.json: {error}"
        return (metrics, None) if isinstance(metrics, dict) else ({}, "metrics.json: not an object")

    @property
    def state(self) -> str:
        """finished, failed, stopped (it can be resumed), or started."""
        if self.outcome()[1] is None:
            return "finished"
        return "failed" if self.error_file.exists() else "stopped" if self.last_checkpoint.exists() else "started"

    def arms(self) -> list[Arm]:
        """The arms of arms.json; none where the run has one SAE. Raises ValueError in one line if it is damaged."""
        if not self.arms_file.exists():
            return []
        arms = read_json(self.arms_file, Arms, "a list of arms", f"delete {self.path} and run it again").arms
        for arm in arms:
            if not ARM_NAME.fullmatch(arm.name) or (self.path / arm.name).resolve().parent != self.path.resolve():
                raise ValueError(f"{self.arms_file}: {arm.name!r} is not a directory of the run")
        return arms

    def arm(self, name: str) -> "Run":
        """The run of an arm; of the only SAE of a run, whose name is empty, the run itself."""
        return Run(self.path / name, self) if name else self

    def with_sae(self) -> list["Run"]:
        """The run itself, or of a run with several SAEs the arms that have one."""
        if not self.arms_file.exists() or self.sae_directory.exists():
            return [self]
        return [arm for arm in map(self.arm, (arm.name for arm in self.arms())) if arm.sae_directory.is_dir()]

    def load_sae(self) -> MatryoshkaSAE:
        """The SAE, in any form that is read. Raises ValueError in one line, naming the arms where there are several."""
        if (arms := self.with_sae()) != [self]:
            raise ValueError(
                f"{self} has several SAEs; give {self}/<one of {', '.join(arm.path.name for arm in arms)}>"
            )
        return load_any_sae(self.sae_directory if self.sae_directory.is_dir() else self.path)

    def rows(self, sae: MatryoshkaSAE, shards: str | None = None, held_out_alone: bool = False) -> Rows:
        """The rows of these shards, or those that the SAE was trained on: from disk, else as its run streamed them.

        Of a stream these are the rows of its first chunks, or of these the held-out ones. Raises ValueError in one line
        if there are none.
        """
        if shards is not None:
            return Shards(shards)
        of_sae = sae.metadata.get("shards")
        name = str(of_sae.get("identity_hash")) if isinstance(of_sae, dict) else ""
        root = Path(str(self.setting("data.root") or "shards"))
        if re.fullmatch("[0-9a-f]{12}", name) and (found := sorted(root.glob(f"*-{name}"))):
            return Shards(found[0])
        if self.setting("data.memory_gb") is not None:
            return self._streamed(name, held_out_alone).rows
        raise ValueError(f"no shards for {self}; give shards=<a directory that python -m msae.harvest made>")

    def target_rows(self, sae: MatryoshkaSAE, rows: Rows, shards: str | None = None) -> Rows:
        """The rows of these shards, or those that go with `rows`, of the hook that the transcoder reconstructs.

        Raises ValueError in one line if they are not there.
        """
        if shards is not None:
            return Shards(shards)
        if not isinstance(rows, Shards) and self._opened is not None and self._opened.target is not None:
            return self._opened.target
        name = identity_hash({**rows.identity, "hook_name": sae.metadata.get("hook_name_out")})
        if isinstance(rows, Shards) and (found := sorted(rows.directory.parent.glob(f"*-{name}"))):
            return Shards(found[0])
        raise ValueError(
            f"no shards beside {rows} of what {self}, a transcoder, reconstructs; "
            "give target_shards=<the directory of that hook>"
        )

    def _streamed(self, identity: str, held_out_alone: bool) -> Activations:
        """The rows of the first chunks that the run streamed, made again. Raises ValueError in one line."""
        source = str(self.setting("data.source._target_"))
        if not re.fullmatch(r"msae\.sources\.\w+\.\w+Source", source):  # the run may come from elsewhere
            raise ValueError(
                f"{self} streamed its rows from {source}, which a run's word is not enough to call; harvest them with "
                "python -m msae.harvest and give shards=<the directory>"
            )
        # where rows waited and the model ran decides nothing, and that machine may have had a GPU
        settings = {**self.config["data"], "memory_device": None}
        if "device" in settings["source"]:
            settings["source"] = {**settings["source"], "device": "auto"}
        data = decode(Data, settings, "data")
        if identity_hash(data.source.identity(data.hook)) != identity:
            raise ValueError(
                f"the text or the model that {self} streamed its rows from has changed since; "
                "give shards=<a directory that python -m msae.harvest made>"
            )
        self._opened = Activations(data, resuming=held_out_alone)
        self._opened.close()
        return self._opened

    # --- writing ------------------------------------------------------------------------------------------------------

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Keep the resolved configuration, without what says where the run lies."""
        kept = {key: None if key in ("run_dir", "ckpt_path") else value for key, value in config.items()}
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        write(self.config_file, lambda path: path.write_text(text))

    def write_metrics(self, metrics: Mapping[str, float]) -> None:
        """Keep the figures; the run has finished."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.metrics_file, dict(metrics))

    def write_arms(self, arms: list[Arm]) -> None:
        """Keep which arms there are."""
        write_json(self.arms_file, as_plain(Arms(arms)), indent=2)

    def refuse_other_settings(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError in one line if the run, which is to be resumed, was made with other settings than these."""
        if not self.config_file.exists():
            raise ValueError(
                f"{self.config_file} is missing, so nobody knows what the checkpoint was made with; start a new run"
            )
        for key, there, here in differing(self.config, config):
            if key.split(".")[0] not in MEASURED and key not in MEASURED:
                raise ValueError(
                    f"{self} was started with {key}={there}, this command has {here}; "
                    f"resume with {key}={there} or start a new run without ckpt_path"
                )


def open_run(path: str | Path) -> Run:
    """The run, arm or SAE directory at a path; `sae/` of a run is the run. Raises ValueError if nothing is there."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no directory {path}; see python -m msae.runs")
    if path.name == "sae" and not (path / "sae").exists():
        path = path.parent
    above = Run(path.resolve().parent)
    return Run(path, above) if above.arms_file.exists() else Run(path)


def new_run(name: str, runs: str = "runs", run_dir: str | None = None, job: Path | None = None) -> Run:
    """Make a run's directory: that of a sweep's job, else `run_dir`, else `runs/<name>-<time>`.

    Every rank of a distributed run gets the same. Raises ValueError where `run_dir` already holds something.
    """
    # Ranks above 0 are started with the environment of rank 0, which was here first.
    if is_other_rank():
        shared = os.environ.get(OF_OTHER_RANKS, run_dir)
        if shared is None:
            raise ValueError("the launcher starts every rank by itself: give run_dir=… so that they share one")
        return Run(shared)
    if job is not None:
        path = job
    elif run_dir is not None:
        path = Path(run_dir)
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ValueError(f"run_dir={run_dir} is not empty; give ckpt_path=last to resume it, or another run_dir")
    else:
        path = claim(Path(runs) / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    os.environ[OF_OTHER_RANKS] = str(path.resolve())
    return Run(path)


def claim(path: Path) -> Path:
    """Make the directory `path`, or `path-2`, `path-3`, … where another process was first."""
    candidate, n = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            n += 1
            candidate = path.with_name(f"{path.name}-{n}")


def last_run(name: str, runs: str) -> Run:
    """The run of this name whose checkpoint is the newest. Raises ValueError in one line if there is none."""
    of_this_name = re.compile(rf"{re.escape(name)}-\d{{8}}-\d{{6}}(-\d+)?")
    named = [Run(path) for path in Path(runs).glob("*") if of_this_name.fullmatch(path.name)]
    resumable = [run for run in named if run.last_checkpoint.exists()]
    if not resumable:
        raise ValueError(
            f"ckpt_path=last: no run of {name} under {runs}/ has a checkpoint; give run_dir=… or drop ckpt_path"
        )
    return max(resumable, key=lambda run: run.last_checkpoint.stat().st_mtime)


def all_runs(runs: str | Path) -> list[Run]:
    """Every run below a directory, jobs of sweeps too, the newest last; a run with arms as these."""
    files = [file for pattern in ("*", "sweeps/*/*") for file in Path(runs).glob(f"{pattern}/config.yaml")]
    found: list[Run] = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        run = Run(file.parent)
        try:
            arms = [run.arm(arm.name) for arm in run.arms()]
        except ValueError:
            arms = []
        found += arms or [run]
    return found


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys of a configuration that decide what comes out, and their values."""
    return {key: value for key, value in flat(config).items() if key not in ANYWHERE}


def differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The keys in which two configurations differ in what comes out, in order, with both values."""
    before, here = deciding(saved), deciding(now)
    for key in sorted(before.keys() | here.keys()):
        if before.get(key) != here.get(key):
            yield key, before.get(key), here.get(key)
