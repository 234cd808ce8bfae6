"""Everything between Hydra and the code: composing, checking, run directories, and errors of one line."""

import difflib
import functools
import inspect
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

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
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from yaml import YAMLError

from msae.sweep import SweepDirectory, claim, force, report, run_job

PACKAGE = Path(__file__).parent
INSTANTIATE_KEYS = ("_target_", "_convert_", "_recursive_", "_partial_", "_args_")

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # a target that is not found is reported here


@dataclass
class Evaluation:
    """How much data the evaluation after training reads."""

    ce_sequences: int = 64
    calibration_tokens: int = 262144


@dataclass
class TrainConfig:
    """The top-level keys of `python -m msae.train`."""

    supplied: ClassVar[tuple[str, ...]] = ("model.d_in",)  # comes from the shards where it is null

    name: str
    tokens: int
    model: Any
    data: Any
    trainer: Any
    evaluation: Evaluation
    seed: int = 0
    runs: str = "runs"
    run_dir: str | None = None
    ckpt_path: str | None = None
    checkpoint_every_steps: int = 1000


@dataclass
class HarvestConfig(TrainConfig):
    """The top-level keys of `python -m msae.harvest`; an experiment sets those of training too."""

    unused: ClassVar[tuple[str, ...]] = ("tokens", "model", "trainer", "evaluation")  # may be incomplete
    verify: str | None = None


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


# Checking a composed config -------------------------------------------------------------------------------


@dataclass
class _Findings:
    supplied: tuple[str, ...] = ()  # these may be null, the command fills them in
    valid: list[str] = field(default_factory=list)  # every dotted key that may be set
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def check(cfg: DictConfig, schema: type) -> None:
    """Compare the config with the dataclass `schema`, and every `_target_` node with the target's signature.

    Raises ValueError, in one line: an unknown key and the nearest valid one, the keys that are not set, or
    the values of a wrong type.
    """
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationToMissingValueError as ex:
        name = re.search(r"mandatory value: (\S+)", str(ex))
        raise (ValueError(_missing([name[1]])) if name else ex) from None
    assert isinstance(tree, dict)
    found = _Findings(getattr(schema, "supplied", ()), valid=["+experiment", "+sweeps"])
    _check_node(tree, schema, "", found)
    if found.unknown:
        key = found.unknown[0]
        raise ValueError(f"unknown key {key}; {_suggest(key, found.valid)}")
    unused = getattr(schema, "unused", ())
    if missing := [key for key in found.missing if key.split(".")[0] not in unused]:
        raise ValueError(_missing(missing))
    if found.wrong:
        raise ValueError("; ".join(found.wrong))


def _missing(keys: list[str]) -> str:
    return f"not set: {', '.join(keys)}; give {' '.join(f'{key}=…' for key in keys)}"


def _suggest(key: str, valid: list[str]) -> str:
    parent, _, leaf = key.rpartition(".")
    siblings = {v.rpartition(".")[2]: v for v in valid if v.rpartition(".")[0] == parent}
    if near := difflib.get_close_matches(leaf, siblings, 1, 0.6):
        return f"did you mean {siblings[near[0]]}?"
    elsewhere = {v.rpartition(".")[2]: v for v in valid}  # k=32 for model.k=32
    if near := difflib.get_close_matches(leaf, elsewhere, 1, 0.8):
        return f"did you mean {elsewhere[near[0]]}?"
    return f"valid here: {', '.join(sorted(siblings))}"


def _check_node(node: dict[Any, Any], target: Callable[..., Any], path: str, found: _Findings) -> None:
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some builtins have none
        return
    try:
        function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        hints = typing.get_type_hints(function)
    except (
        NameError,
        TypeError,
        AttributeError,
    ):  # imported for type checkers only: the keys are still checked
        hints = {}
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {k: p for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    found.valid += [path + name for name in named]
    for key, value in node.items():
        dotted = f"{path}{key}"
        if key in named:
            if value is not None or not (named[key].default is None or dotted in found.supplied):
                _check_value(value, hints.get(key, Any), dotted, found)
        elif is_open:
            _check_value(value, Any, dotted, found)
        elif not ("_target_" in node and key in INSTANTIATE_KEYS):
            found.unknown.append(dotted)
    required = [path + k for k, p in named.items() if p.default is p.empty and k not in node]
    if not ("_args_" in node or node.get("_partial_")):
        found.missing += [key for key in required if key not in found.supplied]


def _check_value(value: Any, hint: Any, dotted: str, found: _Findings) -> None:
    if value == "???":
        found.missing.append(dotted)
        return
    if not _accepts(hint, value):
        found.wrong.append(f"{dotted} is {value!r}, expected {_name(hint)}")
    elif isinstance(value, dict) and "_target_" in value:
        _check_node(value, _locate(value["_target_"], dotted), f"{dotted}.", found)
    elif isinstance(value, dict) and (schema := next(filter(_is_schema, _arms(hint)), None)):
        _check_node(value, schema, f"{dotted}.", found)
    elif isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _check_value(item, Any, f"{dotted}.{key}", found)


def _locate(target: Any, dotted: str) -> Callable[..., Any]:
    try:
        return hydra.utils.get_method(target)
    except Exception as ex:
        reason = " ".join(str(ex).split())
        raise ValueError(f"{dotted}._target_ {target!r} cannot be loaded: {reason}") from ex


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_schema(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _accepts(hint: Any, value: Any) -> bool:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Any, object):
        return True
    if origin in (Union, types.UnionType):
        return any(_accepts(arm, value) for arm in args)
    if origin is typing.Annotated:
        return _accepts(args[0], value)
    if origin is Literal:
        return value in args
    if origin is None or origin is type(None):
        return value is None
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin in (int, str, bool):
        return type(value) is origin
    if origin is Path:
        return isinstance(value, str)
    if isinstance(value, dict) and "_target_" in value:
        return True  # an object, and objects are not looked into
    if origin in (list, Sequence, Iterable, set) or (origin is tuple and (not args or args[-1] is ...)):
        return isinstance(value, list) and all(_accepts(args[0] if args else Any, item) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(args) and all(map(_accepts, args, value))
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_accepts(args[1] if args else Any, v) for v in value.values())
    if _is_schema(origin):
        return isinstance(value, dict)
    return not isinstance(origin, type)  # an annotation not understood here


def _name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(_name, get_args(hint)))
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


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
                run_job(work, explain)
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
        failed = report(*sweep) if sweep is not None else 0
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


def run_directory(name: str, runs: str = "runs", run_dir: str | None = None, resume: bool = False) -> Path:
    """Make the directory of this run: the job's own in a sweep, else `run_dir`, else `runs/<name>-<time>`.

    Every rank of a distributed run gets the same. Raises ValueError where `run_dir` already holds a run and
    `resume` is False.
    """
    # Ranks above 0 are started with the environment of rank 0, which was here first.
    if any(int(os.environ.get(v, 0)) > 0 for v in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")):
        shared = os.environ.get("MSAE_RUN_DIR", run_dir)
        if shared is None:
            raise ValueError("the launcher starts every rank by itself: give run_dir=… so that they share one")
        return Path(shared)
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
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
