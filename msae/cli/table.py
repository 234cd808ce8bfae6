"""What a sweep says: its jobs read from their directories, a table of means and intervals over seeds, a figure."""

import csv
import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from msae.files import LOCK
from msae.runs import Run

PREFIX_METRIC = re.compile(r"(val/.+)/p(\d+)")
SEEDS = ("seed", "model.seed")  # of everything, or in a grid of the model alone: what intervals are over
ASKED, OVERRIDES = "asked.json", "overrides.json"  # of a sweep, and of a job


@dataclass
class Job:
    """One job of a sweep, or one arm of it, as its directory tells it; `error` is None when it finished."""

    name: str
    overrides: dict[str, str]
    metrics: dict[str, Any]
    error: str | None
    seconds: float = 0.0  # of the whole job


def read_jobs(sweep: Path) -> list[Job]:
    """The jobs that a sweep started, in their order, one entry an arm where a job has several."""
    jobs = []
    for file in sorted(sweep.glob(f"*/{OVERRIDES}"), key=lambda f: (len(f.parent.name), f.parent.name)):
        run = Run(file.parent)
        pairs = [o.lstrip("+").partition("=") for o in json.loads(file.read_text())]
        overrides = {key: value for key, _, value in pairs}
        metrics, error = run.outcome()
        whole = Job(run.path.name, overrides, metrics, error, numbers(metrics).get("seconds", 0.0))
        jobs += read_arms(run, whole) if error is None and run.arms_file.exists() else [whole]
    return jobs


def read_arms(run: Run, job: Job) -> list[Job]:
    """One job for each of its arms."""
    try:
        arms = run.arms()
    except ValueError as ex:
        return [Job(job.name, job.overrides, {}, str(ex), job.seconds)]
    jobs = []
    for arm in arms:
        metrics, error = run.arm(arm.name).outcome() if arm.error is None else ({}, " ".join(arm.error.split()))
        settings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arm.settings.items()}
        jobs.append(Job(job.name, job.overrides | {"arm": arm.arm} | settings, metrics, error, job.seconds))
    return jobs or [Job(job.name, job.overrides, {}, f"{run.arms_file}: no arm", job.seconds)]


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The finite numbers among the metrics."""
    numeric = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {key: float(value) for key, value in numeric.items() if math.isfinite(value)}


def widest(metrics: dict[str, Any]) -> dict[str, Any]:
    """`val/fvu/p5`, `val/fvu/p20` → `val/fvu` of the widest prefix; all metrics where none has that form."""
    by_name: dict[str, tuple[int, Any]] = {}
    for key, value in metrics.items():
        if match := PREFIX_METRIC.fullmatch(key):
            by_name[match[1]] = max(by_name.get(match[1], (0, None)), (int(match[2]), value), key=lambda x: x[0])
    return {key: value for key, (_, value) in by_name.items()} or metrics


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """The keys of all rows, in the order in which they appear first."""
    return list(dict.fromkeys(key for row in rows for key in row))


# Means and intervals --------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """Mean of n values and the ends of its 95 % interval, nan where there are none."""

    n: int
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.071 [0.03, 0.11]`: ends to a quarter of their distance or finer, the mean to one digit more."""
        if math.isnan(self.mean):
            return ""
        if math.isnan(self.low):
            return f"{self.mean:.3g}"
        most = max(map(abs, self[1:]))
        if self.high == self.low or not 1e-3 <= most < 1e6:
            return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"
        digits = -math.floor(math.log10((self.high - self.low) / 4))
        ends = f"[{self.low:.{max(digits, 0)}f}, {self.high:.{max(digits, 0)}f}]"
        return f"{self.mean:.{max(digits + 1, 0)}f} {ends}"


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean and its 95 % percentile bootstrap interval: 10,000 seeded resamples; of one value, no interval.

    Of five values it holds the true mean in about 85 % of cases and not in 95 %; BCa is no better there, and has
    no interval for values that are all the same.
    """
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return Interval(n, mean, math.nan, math.nan)
    if min(values) == max(values):
        return Interval(n, values[0], values[0], values[0])
    import numpy as np
    from scipy import stats

    drawn = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, confidence_level=0.95, method="percentile", random_state=0
    )
    return Interval(n, mean, float(drawn.confidence_interval.low), float(drawn.confidence_interval.high))


@dataclass
class Group:
    """What was asked several times: the overrides that its jobs share, how many failed, the metrics' intervals."""

    values: dict[str, str]
    finished: int
    failed: int
    intervals: dict[str, Interval]


def summarise(jobs: list[Job], by: list[str], metrics: list[str]) -> list[Group]:
    """Group jobs by the values of the overrides `by`; `val/fvu` among the metrics is that of the widest prefix."""
    members: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        members.setdefault(tuple(job.overrides.get(key, "") for key in by), []).append(job)
    groups = []
    for values, of_it in members.items():
        rows = [numbers(job.metrics | widest(job.metrics)) for job in of_it if job.error is None]
        intervals = {m: bootstrap([row[m] for row in rows if m in row]) for m in metrics}
        groups.append(Group(dict(zip(by, values, strict=True)), len(rows), len(of_it) - len(rows), intervals))
    return groups


# The report -----------------------------------------------------------------------------------------------------------


def report(
    sweep: Path, metrics: list[str], figure: dict[str, Any] | None = None, name: str = "sweep", command: str = ""
) -> int:
    """Write `summary.csv`, `table.md`, `intervals.csv` and the figure, print the table and every failed job.

    Returns how many failed.
    """
    jobs = read_jobs(sweep)
    if not jobs:  # composing the jobs failed: leave nothing behind
        for file in ("multirun.yaml", ASKED, LOCK):
            (sweep / file).unlink(missing_ok=True)
        if not any(sweep.iterdir()):
            sweep.rmdir()
        return 0
    keys = columns([job.overrides for job in jobs])
    varying = [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]
    write_csv(sweep / "summary.csv", jobs, varying)
    figure = figure or {}
    by = [k for k in keys if k not in SEEDS and (k in varying or k in (figure.get("x"), figure.get("by")))]
    rows = [job.metrics | widest(job.metrics) for job in jobs]
    shown = [m for m in metrics if any(m in row for row in rows)]
    shown = shown or columns([widest(job.metrics) for job in jobs])[:6]
    drawn = [m for m in figure.get("metrics") or shown if any(m in row for row in rows)] if figure else []
    of_x = [figure["x"]] if figure and figure["x"] not in keys else []
    groups = summarise(jobs, by, list(dict.fromkeys([*shown, *drawn, *of_x])))
    failed = [job for job in jobs if job.error is not None]
    write_intervals(sweep / "intervals.csv", groups, by)
    header, cells = table(groups, by, shown)
    print_table(header, cells)
    seconds = sum({job.name: job.seconds for job in jobs}.values())
    seeds = len({tuple(job.overrides.get(key) for key in SEEDS) for job in jobs})
    what = f"mean [95 % bootstrap interval of it] over {seeds} seeds" if seeds > 1 else "1 seed"
    what += f"; {seconds:,.0f} s of jobs"
    what += f"; {len(failed)} of {len(jobs)} failed" if failed else ""
    (sweep / "table.md").write_text(f"{markdown(header, cells)}\n{what}\n\n```bash\n{command}\n```\n")
    print(f"{what}\n{sweep}/table.md, summary.csv, intervals.csv", flush=True)
    for job in failed:
        values = " ".join(f"{k}={job.overrides.get(k, '')}" for k in varying or keys if k in job.overrides)
        print(f"failed: job {job.name} ({values}): {job.error}", file=sys.stderr)
    if figure:
        draw(sweep, groups, by, drawn, figure, name)
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} jobs failed; see {sweep}/summary.csv", file=sys.stderr)
    return len(failed)


def write_csv(path: Path, jobs: list[Job], varying: list[str]) -> None:
    """One row a job or arm: its job's number, the overrides that vary, its error, all its metrics."""
    metrics = columns([job.metrics for job in jobs])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *varying, "error", *metrics])
        for job in jobs:
            values = [job.overrides.get(key, "") for key in varying]
            writer.writerow([job.name, *values, job.error or "", *(job.metrics.get(m, "") for m in metrics)])


def write_intervals(path: Path, groups: list[Group], by: list[str]) -> None:
    """One row a group and metric: n, mean, low, high; low and high are empty where n is 1."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*by, "metric", "n", "mean", "low", "high"])
        for group in groups:
            for metric, (n, *ends) in group.intervals.items():
                texts = ["" if math.isnan(end) else repr(end) for end in ends]
                writer.writerow([*group.values.values(), metric, n, *texts])


def table(groups: list[Group], by: list[str], metrics: list[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: the values of `by`, how many finished, an interval for each metric."""
    rows = []
    for group in groups:
        n = f"{group.finished}, {group.failed} failed" if group.failed else str(group.finished)
        rows.append([*group.values.values(), n, *(str(group.intervals[m]) for m in metrics)])
    return [*short(by, "."), "n", *short(metrics, "/")], rows


def short(names: list[str], separator: str) -> list[str]:
    """`val/fvu/p5` → `fvu/p5`, `model.k` → `k`; whole where two would be the same."""
    cut = [name.partition(separator)[2] or name for name in names]
    return [c if cut.count(c) == 1 else name for c, name in zip(cut, names, strict=True)]


def print_table(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    printed = Table(*(Column(escape(name), overflow="fold") for name in header))
    for row in rows:
        printed.add_row(*map(escape, row))
    Console().print(printed)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in GitHub's Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|`*<])", r"\\\1", " ".join(cell.split())) for cell in cells) + " |\n"

    return "".join([line(header), f"|{' --- |' * len(header)}\n", *map(line, rows)])


# The figure -----------------------------------------------------------------------------------------------------------

Point = tuple[Any, float, float, float]  # x, mean, low, high


def panels(
    groups: list[Group], by: list[str], metrics: list[str], x: str, label_by: str | None = None
) -> dict[str, dict[str, list[Point]]]:
    """For each metric, a line for each value of `label_by` and whatever else varies beside x; no interval: of width 0.

    x is a key of `by` (numbers where all are, else categories) or a metric, whose mean in the group it is.
    """
    numeric = all(is_number(group.values.get(x, "")) for group in groups)
    rest = [key for key in by if key not in (x, label_by)]
    names = dict(zip(rest, short(rest, "."), strict=True))
    of_metric: dict[str, dict[str, list[Point]]] = {}
    for metric, group in itertools.product(metrics, groups):
        n, mean, low, high = group.intervals[metric]
        at: Any = group.values[x] if x in by else group.intervals[x].mean
        if n == 0 or at != at:
            continue
        label = [f"{names[key]}={group.values[key]}" for key in rest]
        label = [group.values[label_by], *label] if label_by in group.values else label
        point = (float(at) if numeric else at, mean, mean if n == 1 else low, mean if n == 1 else high)
        of_metric.setdefault(metric, {}).setdefault(", ".join(label), []).append(point)
    if numeric or x not in by:
        for points in (points for lines in of_metric.values() for points in lines.values()):
            points.sort(key=lambda point: point[0])
    return {name: of_metric[metric] for metric, name in zip(of_metric, short(list(of_metric), "/"), strict=True)}


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def draw(
    sweep: Path, groups: list[Group], by: list[str], metrics: list[str], figure: dict[str, Any], name: str
) -> None:
    """Write the figure as `<name>.png` and, for TensorBoard, into `tensorboard/`."""
    data = panels(groups, by, metrics, figure["x"], figure.get("by"))
    if not data:
        drawn = ", ".join(figure.get("metrics") or metrics)
        print(f"no figure: no finished job has x={figure['x']} and one of {drawn}", file=sys.stderr)
        return
    from torch.utils.tensorboard import SummaryWriter

    from msae.evaluation.pictures import lines

    picture = lines(data, short([figure["x"]], "." if figure["x"] in by else "/")[0], bool(figure.get("log_x")))
    picture.savefig(sweep / f"{name}.png", dpi=150)
    shutil.rmtree(sweep / "tensorboard", ignore_errors=True)  # of before
    with SummaryWriter(sweep / "tensorboard") as writer:
        writer.add_figure(name, picture)
    print(f"{sweep / name}.png")
