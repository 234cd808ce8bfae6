"""Between Hydra and the code: composing, checking, and errors of one line."""

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from yaml import YAMLError

from msae.cli.help import help_text
from msae.cli.sweep import SweepDirectory, force, run_job
from msae.settings import decode, not_set

PACKAGE = Path(__file__).parents[1]
T = TypeVar("T")


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


def _groups() -> dict[str, list[str]]:
    """The config groups, with their choices."""
    folders = [path for path in config_dir("conf").iterdir() if path.is_dir()]
    choices = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in sorted(folders)}
    return choices | {"sweeps": sorted(file.stem for file in config_dir("sweeps").glob("*.yaml"))}


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A config as a plain tree, resolved. Raises ValueError in one line for what refers to a key that is not set."""
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationToMissingValueError as ex:
        name = re.search(r"mandatory value: (\S+)", str(ex))
        raise (ValueError(not_set([name[1]])) if name else ex) from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def job_directory() -> Path | None:
    """The directory of this job of a multirun, None in a single run."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().runtime.output_dir)
    return None


# Running a command ----------------------------------------------------------------------------------------------------


def command(
    config_name: str, cls: type[T], may_lack: tuple[str, ...] = ()
) -> Callable[[Callable[[Any, DictConfig], None]], Callable[[], None]]:
    """Make `main(settings, cfg)` a command line: Hydra composes `conf/<config_name>.yaml`, `cls` is what it holds.

    Without a value for a key of `may_lack` the settings are None. Errors that a user can mend leave as one line and
    exit code 1, Ctrl-C as one line and 130, bugs with their traceback; HYDRA_FULL_ERROR=1 shows the traceback of all.
    The jobs of a multirun fail alone.
    """

    def decorate(main: Callable[[Any, DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            if {"--help", "-h"} & set(sys.argv):
                print(help_text(config_name, cls, _groups()))
            else:
                _run(lambda cfg: main(decode(cls, plain(cfg), may_lack=may_lack), cfg), main, config_name)

        return run

    return decorate


def _run(work: Callable[[DictConfig], None], main: Callable[..., None], config_name: str) -> None:
    wish = os.environ.get("HYDRA_FULL_ERROR", "0")

    @functools.wraps(main)  # Hydra names the job after the file of __wrapped__
    def job(cfg: DictConfig) -> None:
        with _full_error(wish):
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                run_job(cfg, lambda: work(cfg), explain)
            else:
                with _one_line():
                    work(cfg)

    try:
        with _one_line():
            _store_sweeps()
            if not {"-sc", "--shell-completion"} & set(sys.argv):
                sys.argv[1:] = [force(argument, _groups()) for argument in sys.argv[1:]]
            with _full_error("1"):  # otherwise Hydra prints its errors itself, in many lines
                hydra.main(str(config_dir("conf")), config_name, "1.3")(job)()
    except (KeyboardInterrupt, SystemExit) as ex:
        if not isinstance(ex, KeyboardInterrupt) and not isinstance(ex.__context__, KeyboardInterrupt):
            raise  # an exit whose context is Ctrl-C is what Lightning makes of it
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
    if isinstance(ex, InstantiationException) and ex.__cause__ is not None:  # of Hydra's callbacks
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
