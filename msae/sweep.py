"""Multirun: a directory for each sweep, in which the same command goes on, and jobs that fail alone."""

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msae.summary import outcome, report

# They say where files lie and how fast they are read, and decide nothing of what comes out.
ANYWHERE = ("runs", "run_dir", "ckpt_path", "data.root", "data.prefetch", "data.max_disk_gb")


def claim(path: Path) -> Path:
    """Make the directory `path`, or `path-2`, `path-3`, … where another process was first."""
    for n in itertools.count(1):
        candidate = path if n == 1 else path.with_name(f"{path.name}-{n}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable")


def force(override: str, groups: set[str]) -> str:
    """`model.lr=1` → `++model.lr=1`: a key that no YAML file wrote may be set too, since `check` knows it."""
    key = re.match(r"([A-Za-z_][\w.]*)=", override)
    if key is None or key[1] in groups or key[1].startswith("hydra."):
        return override
    return f"++{override}"


def settings(cfg: DictConfig | ListConfig, resolve: bool = True) -> dict[str, Any]:
    """The dotted keys that decide what comes out, and their values; {} where they cannot be resolved."""

    def flat(node: Any, path: str = "") -> dict[str, Any]:
        if isinstance(node, dict) and node:
            return {k: v for key, value in node.items() for k, v in flat(value, f"{path}.{key}").items()}
        return {path[1:]: node}

    try:
        return {k: v for k, v in flat(OmegaConf.to_container(cfg, resolve=resolve)).items() if k not in ANYWHERE}
    except OmegaConfBaseException:  # `check` says it in one line
        return {}


def differing(saved: DictConfig | ListConfig, cfg: DictConfig) -> Iterator[tuple[str, Any, Any]]:
    """The keys in which a saved config and this one differ in what comes out, in order, with both values."""
    before, now = settings(saved), settings(cfg)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# One job --------------------------------------------------------------------------------------------------


def run_job(cfg: DictConfig, work: Callable[[], None], explain: Callable[[Exception], str | None]) -> None:
    """Run one job of a multirun unless it is there; what it raises goes to `error.txt`, and the others go on.

    A job that was stopped goes on from its last checkpoint: `cfg.run_dir` and `cfg.ckpt_path` are set here.
    `explain` turns a user's error into one line and a bug into None; a bug is printed with its traceback.
    """
    hydra = HydraConfig.get()
    directory, overrides = Path(hydra.runtime.output_dir), list(hydra.overrides.task)
    title = f"job {hydra.job.num}: {' '.join(o.lstrip('+') for o in overrides)}"
    with alone(directory):
        other, (metrics, error) = difference(directory / "config.yaml", cfg), outcome(directory)
        if other is None and error is None and metrics:
            print(f"{title}: there already", flush=True)
            return
        checkpoint = cfg.get("ckpt_path")
        if "run_dir" in cfg:  # those of a sweep's jobs are its own
            cfg.run_dir = cfg.ckpt_path = None
        stopped = not any((directory / name).exists() for name in ("metrics.json", "error.txt"))
        if stopped and other is None and (directory / "checkpoints" / "last.ckpt").exists():
            title += ": goes on from its last checkpoint"
            cfg.run_dir, cfg.ckpt_path = str(directory), "last"
            overrides += [f"++run_dir={quoted(directory)}", "++ckpt_path=last"]  # for the other ranks
        else:
            clear(directory, other)
            write(directory / "overrides.json", json.dumps(overrides))
            with suppress(OmegaConfBaseException):  # `check` says it in one line
                OmegaConf.save(cfg, directory / "config.yaml", resolve=True)
        print(title, flush=True)
        try:
            if checkpoint not in (None, "last"):
                raise ValueError(f"ckpt_path={checkpoint}: the jobs of a sweep resume by themselves; drop ckpt_path")
            with own_command_line(overrides):
                work()
        except Exception as ex:
            line = explain(ex)
            if line is None:
                traceback.print_exc()
                line = f"{type(ex).__name__}: {' '.join(str(ex).split())}"
            (directory / "error.txt").write_text(line + "\n")
            print(f"error: job {hydra.job.num}: {line}", file=sys.stderr, flush=True)
            return
        if not (directory / "metrics.json").exists():
            write(directory / "metrics.json", "{}\n")  # a command that measures nothing, and finished


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Wait for a job that outlived its sweep, as one in another process does when only the sweep is killed."""
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{directory} is still written by a process of before; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def difference(saved: Path, cfg: DictConfig) -> str | None:
    """The first key in which a job's saved config differs from `cfg`, with both values; None if all are the same."""
    try:
        before = OmegaConf.load(saved)
    except (OSError, YAMLError) as ex:
        return f"{saved.name} cannot be read ({' '.join(str(ex).split())})"
    return next((f"{key} was {there}, is {here}" for key, there, here in differing(before, cfg)), None)


def clear(directory: Path, other: str | None) -> None:
    """Empty a job's directory; what was made with other settings is kept, in `old/` beside it, with a line."""
    files = [file for file in directory.iterdir() if file.name != ".lock"]
    if other is not None and (directory / "config.yaml").exists():
        old = claim(directory.parent / "old" / directory.name)
        print(f"job {directory.name}: {other}; it runs anew, and what was there is now in {old}", flush=True)
        for file in files:
            file.rename(old / file.name)
        return
    for file in files:
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


@contextmanager
def own_command_line(overrides: list[str]) -> Iterator[None]:
    """Make sys.argv that of this job: DDP re-runs it to start its other ranks, and must not sweep again."""
    argv, environment = sys.argv, dict(os.environ)
    flags = [a for a in argv[1:] if a not in ("-m", "--multirun") and (a.startswith("-") or "=" not in a)]
    sys.argv = [argv[0], *flags, *overrides, "hydra.mode=RUN"]
    try:
        yield
    finally:
        sys.argv = argv
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        os.environ.clear()  # MASTER_PORT, LOCAL_RANK, … would make the next job a rank of this one
        os.environ.update(environment)


# The sweep ------------------------------------------------------------------------------------------------


class SweepDirectory(Callback):
    """Hydra callback: gives a sweep its directory, where the same command goes on, and reports at the end.

    `{asked}` in `hydra.sweep.dir` becomes a hash of what the sweep asks (`asked`).

    A sweep file sets, under `hydra.callbacks.sweep`: `metrics`, what the table shows; `figure`, {x, by, metrics,
    log_x}: x an override's key, `arm` or a metric, by the key whose values have a line each, metrics a panel each.
    Raises ValueError for another key in `figure`.
    """

    current: ClassVar["SweepDirectory | None"] = None
    lock: ClassVar[FileLock | None] = None  # not of the instance, which travels to the processes of other launchers

    def __init__(self, metrics: Sequence[str] = (), figure: Mapping[str, Any] | None = None) -> None:
        self.metrics = list(metrics)
        self.figure = dict(figure) if figure is not None else None
        valid = ("x", "by", "metrics", "log_x")
        if self.figure is not None and ("x" not in self.figure or not self.figure.keys() <= set(valid)):
            given = ", ".join(map(str, self.figure))
            raise ValueError(
                f"hydra.callbacks.sweep.figure has {given}; it needs x and may have {', '.join(valid[1:])}"
            )

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        question = asked(config)
        directory = Path(config.hydra.sweep.dir.replace("{asked}", hashlib.sha256(question.encode()).hexdigest()[:8]))
        try:
            SweepDirectory.lock = enter(directory, question)
        except (OSError, ValueError) as ex:  # Hydra would turn it into a warning and go on
            sys.exit(f"error: {ex}")
        SweepDirectory.current, self.directory, self.name = self, directory, str(config.get("name", "sweep"))
        self.before = self.made()
        groups = set(config.hydra.runtime.choices)
        with open_dict(config):
            config.hydra.sweep.dir = str(directory)
            # the config of a job is composed anew, from these
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(directory)}")
            params = config.hydra.sweeper.get("params") or {}
            for key in list(params):
                forced = force(f"{key}=", groups).removesuffix("=")
                params[forced] = params.pop(key)

    def made(self) -> dict[str, list[int]]:
        """When each job started and finished, if it did."""
        jobs = {file.parent for file in self.directory.glob("*/overrides.json")}
        times = {job: [job / name for name in ("overrides.json", "metrics.json")] for job in jobs}
        return {job.name: [f.stat().st_mtime_ns for f in files if f.exists()] for job, files in times.items()}

    def finish(self) -> int:
        """Report, let others in, and return how many jobs failed."""
        command = shlex.join(["python", *sys.orig_argv[1:]])
        try:
            failed = report(self.directory, self.metrics, self.figure, Path(self.name).name, command)
            if self.made() == self.before and self.before and all(len(times) == 2 for times in self.before.values()):
                print(f"every job was there already; to run them anew: rm -r {shlex.quote(str(self.directory))}")
            return failed
        finally:
            assert SweepDirectory.lock is not None
            SweepDirectory.lock.release()


def asked(config: DictConfig) -> str:
    """What decides a sweep's jobs and their numbers, as JSON: composed config, overrides, the sweeper's parameters."""
    fixed = {key: value for key, value in settings(config, resolve=False).items() if not key.startswith("hydra.")}
    pairs = [override.lstrip("+").partition("=") for override in config.hydra.overrides.task]
    overrides = [f"{key}={value}" for key, _, value in pairs if key not in ANYWHERE or "," in value]
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create())
    return json.dumps({"config": fixed, "overrides": overrides, "params": params}, indent=1, default=str) + "\n"


def enter(directory: Path, question: str) -> FileLock:
    """Make the directory, or go on in it where it is of the same question, as the only process.

    Raises ValueError in one line where it is something else's, or in use.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file, lock = directory / "asked.json", FileLock(directory / ".lock")
    if not file.exists() and any(path.name not in (".lock", "asked.json.tmp") for path in directory.iterdir()):
        raise ValueError(f"{directory} is not empty and no sweep's; give another hydra.sweep.dir")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process runs the sweep in {directory}; wait for it, or stop it first") from None
    if file.exists() and file.read_text() != question:
        lock.release()
        raise ValueError(f"{directory} is of another sweep, see its asked.json; give another hydra.sweep.dir")
    write(file, question)
    return lock


def quoted(path: Path) -> str:
    """A path as the value of an override."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
