"""Everything between Hydra and the code: composing, checking, run directories, and errors of one line."""

import difflib
import functools
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msae.ranks import is_other_rank
from msae.schema import check
from msae.sweep import SweepDirectory, claim, differing, force, run_job

PACKAGE = Path(__file__).parent


def config_dir(name: str) -> Path:
    """The directory `conf` or `sweeps`: the wheel's copy, else the checkout's. Raises FileNotFoundError."""
    for path in (PACKAGE / name, PACKAGE.parent / name):
        if path.is_dir():
            return path
    raise FileNotFoundError(f"no {name}/ in {PACKAGE} or {PACKAGE.parent}; reinstall msae")


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a command as its command line would compose it (for tests and notebooks)."""
    _store_sweeps()
    with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
        return hydra.compose(config_name, [force(o, _groups()) for o in overrides])


def _store_sweeps() -> None:
    # Stored one by one: their parent on the search path would turn every folder of the checkout into a group.
    for file in sorted(config_dir("sweeps").glob("*.yaml")):
        ConfigStore.instance().store(file.stem, OmegaConf.load(file), "sweeps", package="_global_")


def _groups() -> set[str]:
    return {"sweeps", *(path.name for path in config_dir("conf").iterdir() if path.is_dir())}


# Arms: several models in one run ------------------------------------------------------------------------

FILES = (".json", ".yaml", ".png", ".txt", ".ckpt")  # a run directory has some of these beside its arms


def describe_arms(cfg: DictConfig) -> list[dict[str, Any]]:
    """{name, arm, settings} of every arm × grid; empty for one model alone. Raises ValueError in one line.

    `name` is a directory's, `settings` the dotted keys that the grid sets.
    """
    if not cfg.arms and not cfg.grid:
        return []
    grid: dict[str, list[Any]] = OmegaConf.to_container(cfg.grid, resolve=True) if cfg.grid else {}  # type: ignore[assignment]
    described = []
    for arm, values in itertools.product(cfg.arms or {"": None}, itertools.product(*grid.values())):
        parts = [*([arm] if arm else []), *(f"{key}{value}" for key, value in zip(grid, values, strict=True))]
        name = re.sub(r"[^\w.+=-]+", "_", "-".join(parts))
        settings = {f"model.{key}": value for key, value in zip(grid, values, strict=True)}
        described.append({"name": name, "arm": arm or cfg.name, "settings": settings})
    names = [arm["name"] for arm in described]
    taken = {
        name
        for name in names
        if names.count(name) > 1 or name in ("checkpoints", "sae", "tensorboard") or name.endswith(FILES)
    }
    if not names or taken or any(not name.strip(".") for name in names):
        raise ValueError(f"arms and grid name {', '.join(sorted(taken)) or 'nothing'} ambiguously; rename an arm")
    return described


def arm_models(cfg: DictConfig) -> dict[str, DictConfig]:
    """The `model` of every arm by its name; {"": cfg.model} for one alone. Raises ValueError in one line.

    An arm says what differs from `model`; its `preset` is a recipe of conf/preset, which the arm's own keys beat.
    """
    models = {}
    for described in describe_arms(cfg):
        arm = dict((cfg.arms or {}).get(described["arm"]) or {})
        nodes = [cfg.model]
        if (preset := arm.pop("preset", None)) is not None:
            file = config_dir("conf") / "preset" / f"{preset}.yaml"
            known = sorted(path.stem for path in file.parent.glob("*.yaml"))
            if preset not in known:
                raise ValueError(f"arms.{described['arm']}.preset={preset} is none of {', '.join(known)}")
            nodes.append(OmegaConf.load(file).model)
        settings = {key.removeprefix("model."): value for key, value in described["settings"].items()}
        merged = OmegaConf.create({})
        for node in (*nodes, arm, settings):
            plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
            merged.merge_with(OmegaConf.create(plain))  # plain, so that keys which no YAML file wrote are allowed
        check(OmegaConf.create({"model": merged}), _Model)
        models[described["name"]] = merged
    return models or {"": cfg.model}


@dataclass
class _Model:
    supplied: ClassVar[tuple[str, ...]] = ("model.d_in",)

    model: Any


# Running a command ----------------------------------------------------------------------------------------


def find_source(cfg: DictConfig) -> None:
    """Ask the data source for its identity, which needs its model and text, before Lightning is imported.

    Raises ValueError in one line for a mistake in `data.source`, and what the source raises.
    """
    node = cfg.data.get("source")
    if cfg.get("verify") is not None or not isinstance(node, DictConfig):
        return
    check(OmegaConf.create({"data": {"source": OmegaConf.to_container(node, resolve=True)}}), _Source)
    source = hydra.utils.instantiate(node)
    for hook_name in source.hook_names:
        source.identity(hook_name)


@dataclass
class _Source:
    data: Any


def command(
    config_name: str, schema: type, before: Callable[[DictConfig], None] | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make `main(cfg)` a command line: Hydra composes `conf/<config_name>.yaml`, `check` sees to its keys.

    `before` is called before `check`, which imports every target that the config names.

    Errors that a user can mend leave as one line and exit code 1, Ctrl-C as one line and 130, bugs with their
    traceback; HYDRA_FULL_ERROR=1 shows the traceback of all. The jobs of a multirun fail alone.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            _run(main, config_name, schema, before)

        return run

    return decorate


def _run(
    main: Callable[[DictConfig], None],
    config_name: str,
    schema: type,
    before: Callable[[DictConfig], None] | None,
) -> None:
    wish = os.environ.get("HYDRA_FULL_ERROR", "0")

    @functools.wraps(main)  # Hydra names the job after the file of __wrapped__
    def job(cfg: DictConfig) -> None:
        def work() -> None:
            if before is not None:
                before(cfg)
            check(cfg, schema)
            main(cfg)

        with _full_error(wish):
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                run_job(cfg, work, explain)
            else:
                with _one_line():
                    work()

    try:
        with _one_line():
            _store_sweeps()
            if not {"-sc", "--shell-completion"} & set(sys.argv):
                sys.argv[1:] = [force(argument, _groups()) for argument in sys.argv[1:]]
            with _full_error("1"):  # otherwise Hydra prints its errors itself, in many lines
                hydra.main(str(config_dir("conf")), config_name, "1.3")(job)()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as ex:
        if not isinstance(ex.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
            raise
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        sweep, SweepDirectory.current = SweepDirectory.current, None
        failed = sweep.finish() if sweep is not None else 0
    if failed:
        raise SystemExit(1)


@contextmanager
def _full_error(value: str) -> Iterator[None]:
    before = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = value
    try:
        yield
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except Exception as ex:
        line = explain(ex)
        if line is None:
            raise
        raise SystemExit(f"error: {line}") from None


def explain(ex: BaseException) -> str | None:
    """The line that tells a user what to mend; None for a bug, and for everything when HYDRA_FULL_ERROR=1."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return None
    if isinstance(ex, InstantiationException) and ex.__cause__ is not None:  # raised inside a constructor
        return explain(ex.__cause__)
    if isinstance(ex, MissingConfigException) and ex.options:
        group, _, name = str(ex.missing_cfg_file).rpartition("/")
        near = difflib.get_close_matches(name, ex.options, 1, 0.5)
        hint = f"; did you mean {group}={near[0]}?" if near else ""
        return f"no {group} named {name}{hint} (there are: {', '.join(ex.options)})"
    if type(ex).__name__ == "MisconfigurationException":  # Lightning's word for a user's mistake, not imported here
        return " ".join(str(ex).split())
    if not isinstance(ex, (HydraException, YAMLError, ValueError, OSError)):
        return None
    text = str(ex)
    if isinstance(ex, OverrideParseException):
        text = f"cannot read {ex.override!r}: {ex}"
    elif isinstance(ex.__cause__, OmegaConfBaseException):
        text = f"{ex}: {ex.__cause__}"
    text = re.sub(r"(?<!\S)(['\"]?)\+\+(?=\w)", r"\1", text)  # what `force` added
    return " ".join(text.split()) or type(ex).__name__


# Run directories ------------------------------------------------------------------------------------------


def in_sweep() -> bool:
    """Whether this is one of a multirun's jobs."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run_directory(name: str, runs: str = "runs", run_dir: str | None = None, resume: bool = False) -> Path:
    """Make the directory of this run: the job's own in a sweep, else `run_dir`, else `runs/<name>-<time>`.

    Every rank of a distributed run gets the same. Raises ValueError where `run_dir` already holds a run and
    `resume` is False.
    """
    # Ranks above 0 are started with the environment of rank 0, which was here first.
    if is_other_rank():
        shared = os.environ.get("MSAE_RUN_DIR", run_dir)
        if shared is None:
            raise ValueError("the launcher starts every rank by itself: give run_dir=… so that they share one")
        return Path(shared)
    if in_sweep():
        directory = Path(HydraConfig.get().runtime.output_dir)
    elif run_dir is not None:
        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if not resume and any(directory.iterdir()):
            raise ValueError(f"run_dir={run_dir} is not empty; give ckpt_path=last to resume it, or another run_dir")
    else:
        directory = claim(Path(runs) / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    os.environ["MSAE_RUN_DIR"] = str(directory.resolve())
    return directory


def refuse_other_settings(file: Path, cfg: DictConfig) -> None:
    """Raises ValueError in one line if the run to resume was made with other settings than these."""
    if not file.exists():
        raise ValueError(f"{file} is missing, so it cannot be known what the checkpoint was made with; start a new run")

    for key, there, here in differing(OmegaConf.load(file), cfg):
        if key != "data.val_rows" and not key.startswith("evaluation."):  # what is measured, not what is trained
            raise ValueError(
                f"{file.parent} was started with {key}={there}, this command has {here}; "
                f"resume with {key}={there} or start a new run without ckpt_path"
            )
