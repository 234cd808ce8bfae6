"""Multirun: a directory for each sweep, in which the same command goes on, and jobs that fail alone."""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from msae.cli.table import ASKED, OVERRIDES, report
from msae.files import LOCK, lock, write
from msae.runs import ANYWHERE, Run, claim, deciding, differing


def force(override: str, groups: Collection[str]) -> str:
    """`model.lr=1` → `++model.lr=1`: a key that no YAML file wrote may be set too, since it is checked."""
    key = re.match(r"([A-Za-z_][\w.]*)=", override)
    if key is None or key[1] in groups or key[1].startswith("hydra."):
        return override
    return f"++{override}"


# One job --------------------------------------------------------------------------------------------------------------


def run_job(cfg: DictConfig, work: Callable[[], None], explain: Callable[[Exception], str | None]) -> None:
    """Run one job of a multirun unless it is there; what it raises goes to `error.txt`, and the others go on.

    A job that was stopped goes on from its last checkpoint: `cfg.run_dir` and `cfg.ckpt_path` are set here.
    `explain` turns a user's error into one line and a bug into None; a bug is printed with its traceback.
    """
    hydra = HydraConfig.get()
    run, overrides = Run(hydra.runtime.output_dir), list(hydra.overrides.task)
    title = f"job {hydra.job.num}: {' '.join(o.lstrip('+') for o in overrides)}"
    # a job may outlive its sweep, as one in another process does when only the sweep is killed
    held = lock(run.path, f"{run} is still written by a process of before; waiting for it", wait=True)
    try:
        other, (metrics, error) = difference(run, cfg), run.outcome()
        if other is None and error is None and metrics:
            print(f"{title}: there already", flush=True)
            return
        checkpoint = cfg.get("ckpt_path")
        if "run_dir" in cfg:  # those of a sweep's jobs are its own
            cfg.run_dir = cfg.ckpt_path = None
        stopped = not (run.metrics_file.exists() or run.error_file.exists())
        if stopped and other is None and run.last_checkpoint.exists():
            title += ": goes on from its last checkpoint"
            cfg.run_dir, cfg.ckpt_path = str(run), "last"
            overrides += [f"++run_dir={quoted(run.path)}", "++ckpt_path=last"]  # for the other ranks
        else:
            clear(run, other)
            write(run.path / OVERRIDES, lambda path: path.write_text(json.dumps(overrides)))
            with suppress(OmegaConfBaseException):  # said in one line later
                run.write_config(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
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
            run.error_file.write_text(line + "\n")
            print(f"error: job {hydra.job.num}: {line}", file=sys.stderr, flush=True)
            return
        if not run.metrics_file.exists():
            run.write_metrics({})  # a command that measures nothing, and finished
    finally:
        held.release()


def difference(run: Run, cfg: DictConfig) -> str | None:
    """The first key in which a job's saved config differs from `cfg`, with both values; None if all are the same."""
    if not run.config_file.exists():
        return "it has no config.yaml"
    try:
        now = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(now, dict)
        return next((f"{key} was {there}, is {here}" for key, there, here in differing(run.config, now)), None)  # type: ignore[arg-type]
    except (ValueError, OmegaConfBaseException) as ex:
        return " ".join(str(ex).split())


def clear(run: Run, other: str | None) -> None:
    """Empty a job's directory; what was made with other settings is kept, in `old/` beside it, with a line."""
    files = [file for file in run.path.iterdir() if file.name != LOCK]
    if other is not None and run.config_file.exists():
        old = claim(run.path.parent / "old" / run.path.name)
        print(f"job {run.path.name}: {other}; it runs anew, and what was there is now in {old}", flush=True)
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


# The sweep ------------------------------------------------------------------------------------------------------------


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
        jobs = {file.parent for file in self.directory.glob(f"*/{OVERRIDES}")}
        times = {job: [job / OVERRIDES, Run(job).metrics_file] for job in jobs}
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
    tree = OmegaConf.to_container(config, resolve=False)
    assert isinstance(tree, dict)
    tree.pop("hydra", None)
    pairs = [override.lstrip("+").partition("=") for override in config.hydra.overrides.task]
    overrides = [f"{key}={value}" for key, _, value in pairs if key not in ANYWHERE or "," in value]
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create())
    question = {"config": deciding(tree), "overrides": overrides, "params": params}  # type: ignore[arg-type]
    return json.dumps(question, indent=1, default=str) + "\n"


def enter(directory: Path, question: str) -> FileLock:
    """Make the directory, or go on in it where it is of the same question, as the only process.

    Raises ValueError in one line where it is something else's, or in use.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / ASKED
    if not file.exists() and any(path.name not in (LOCK, f"{ASKED}.tmp") for path in directory.iterdir()):
        raise ValueError(f"{directory} is not empty and no sweep's; give another hydra.sweep.dir")
    held = lock(directory, f"another process runs the sweep in {directory}; wait for it, or stop it first")
    if file.exists() and file.read_text() != question:
        held.release()
        raise ValueError(f"{directory} is of another sweep, see its {ASKED}; give another hydra.sweep.dir")
    write(file, lambda path: path.write_text(question))
    return held


def quoted(path: Path) -> str:
    """A path as the value of an override."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
