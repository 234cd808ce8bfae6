"""Multirun: a directory of its own for each sweep, jobs that fail alone, and one table of what came out."""

import csv
import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

PREFIX_METRIC = re.compile(r"(val/.+)/p(\d+)")


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


def run_job(work: Callable[[], None], explain: Callable[[Exception], str | None]) -> None:
    """Run one job of a multirun; what it raises goes to `error.txt`, so that the other jobs go on.

    `explain` turns a user's error into one line and a bug into None; a bug is printed with its traceback.
    """
    hydra = HydraConfig.get()
    directory, overrides = Path(hydra.runtime.output_dir), list(hydra.overrides.task)
    (directory / "overrides.json").write_text(json.dumps(overrides))
    print(f"job {hydra.job.num}: {' '.join(o.lstrip('+') for o in overrides)}", flush=True)
    try:
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
        (directory / "metrics.json").write_text("{}\n")  # a command that measures nothing, and finished


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


class SweepDirectory(Callback):
    """Hydra callback: before the jobs start, give the sweep a directory that no other sweep has.

    metrics: what the table on the terminal shows, set by a sweep file as `hydra.callbacks.sweep.metrics`.
    """

    current: ClassVar[tuple[Path, list[str]] | None] = None

    def __init__(self, metrics: Sequence[str] = ()) -> None:
        self.metrics = list(metrics)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            directory = claim(Path(config.hydra.sweep.dir))
        except OSError as ex:  # Hydra would turn it into a warning and go on
            sys.exit(f"error: {ex}")
        SweepDirectory.current = (directory, self.metrics)
        quoted = str(directory).replace("\\", "\\\\").replace("'", "\\'")
        groups = set(config.hydra.runtime.choices)
        with open_dict(config):
            config.hydra.sweep.dir = str(directory)
            # the config of a job is composed anew, from these
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
            params = config.hydra.sweeper.get("params") or {}
            for key in list(params):
                forced = force(f"{key}=", groups).removesuffix("=")
                params[forced] = params.pop(key)


@dataclass
class Job:
    """One job of a sweep as its directory tells it; `error` is None when it finished."""

    name: str
    overrides: dict[str, str]
    metrics: dict[str, Any]
    error: str | None


def read_jobs(sweep: Path) -> list[Job]:
    """The jobs that a sweep started, in their order; a job without readable metrics.json has failed."""
    jobs = []
    for file in sorted(sweep.glob("*/overrides.json"), key=lambda f: (len(f.parent.name), f.parent.name)):
        directory, metrics, error = file.parent, {}, None
        pairs = [o.lstrip("+").partition("=") for o in json.loads(file.read_text())]
        if (directory / "error.txt").exists():
            error = (directory / "error.txt").read_text().strip()
        elif not (directory / "metrics.json").exists():
            error = "stopped before it wrote metrics.json"
        else:
            try:
                metrics = json.loads((directory / "metrics.json").read_text())
            except ValueError as ex:
                error = f"metrics.json: {ex}"
        jobs.append(Job(directory.name, {key: value for key, _, value in pairs}, metrics, error))
    return jobs


def widest(metrics: dict[str, Any]) -> dict[str, Any]:
    """`val/fvu/p5`, `val/fvu/p20` → `val/fvu` of the widest prefix; all metrics where none has that form."""
    found: dict[str, tuple[int, Any]] = {}
    for key, value in metrics.items():
        if match := PREFIX_METRIC.fullmatch(key):
            found[match[1]] = max(found.get(match[1], (0, None)), (int(match[2]), value), key=lambda x: x[0])
    return {key: value for key, (_, value) in found.items()} or metrics


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """The keys of all rows, in the order in which they appear first."""
    return list(dict.fromkeys(key for row in rows for key in row))


def report(sweep: Path, metrics: list[str]) -> int:
    """Write `summary.csv`, print the table of `metrics` and every failed job, return how many failed."""
    jobs = read_jobs(sweep)
    if not jobs:  # composing the jobs failed: leave nothing behind
        (sweep / "multirun.yaml").unlink(missing_ok=True)
        sweep.rmdir()
        return 0
    keys = columns([job.overrides for job in jobs])
    varying = [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]
    write_csv(sweep / "summary.csv", jobs, varying)
    print_table(sweep, jobs, varying, metrics)
    failed = [job for job in jobs if job.error is not None]
    for job in failed:
        values = " ".join(f"{key}={job.overrides.get(key, '')}" for key in varying or keys)
        print(f"failed: job {job.name} ({values}): {job.error}", file=sys.stderr)
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} jobs failed; see {sweep}/summary.csv", file=sys.stderr)
    return len(failed)


def write_csv(path: Path, jobs: list[Job], varying: list[str]) -> None:
    """One row a job: its number, the overrides that vary, its error, all its metrics."""
    metrics = columns([job.metrics for job in jobs])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *varying, "error", *metrics])
        for job in jobs:
            values = [job.overrides.get(key, "") for key in varying]
            writer.writerow([job.name, *values, job.error or "", *(job.metrics.get(m, "") for m in metrics)])


def print_table(sweep: Path, jobs: list[Job], varying: list[str], chosen: list[str]) -> None:
    """Print the overrides that vary and the chosen metrics, else a few of each job's widest prefix."""
    from rich.console import Console
    from rich.table import Column, Table

    rows = [{**job.metrics, **widest(job.metrics)} for job in jobs]
    metrics = [m for m in chosen if any(m in row for row in rows)]
    metrics = metrics or columns([widest(job.metrics) for job in jobs])[:6]
    table = Table("job", *(Column(name.rpartition("/")[2], overflow="fold") for name in [*varying, *metrics]))
    for job, row in zip(jobs, rows, strict=True):
        values = [job.overrides.get(key, "") for key in varying]
        numbers = ["failed" if job.error else f"{row[m]:.3g}" if m in row else "" for m in metrics]
        table.add_row(job.name, *values, *numbers)
    Console().print(table)
    print(f"{sweep}/summary.csv")
