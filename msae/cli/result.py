"""Tables of figures: of one SAE, of several beside each other, of all runs."""

import re
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from msae.cli.table import columns, numbers, widest
from msae.progress import say
from msae.runs import Run, deciding

OF_PREFIXES = ("fvu", "mse", "l0", "dead", "ce", "ce_score")
COMPARED = (
    *("val/fvu", "val/l0", "val/dead", "val/ce_score"),
    *("truth/mcc", "truth/firing_f1", "truth/parent_silent_given_child", "truth/cos_child_parent"),
)


def print_result(run: Run, metrics: dict[str, dict[str, float]]) -> None:
    """The end of a training: the figures of its SAE, whose name is empty, or of its arms, and where everything is."""
    if "" in metrics:
        print_figures(metrics[""])
        say(f"sae:     {run.sae_directory}\nmetrics: {run.metrics_file}")
        say(f"charts:  tensorboard --logdir {run.path.parent}")
    else:
        print_comparison(metrics, "arm")
        say(f"arms:    {run.arms_file}\ncharts:  tensorboard --logdir {run}")


def print_figures(metrics: dict[str, float]) -> None:
    """One row a prefix, then the figures that concern the whole SAE."""
    widths = sorted({int(key.rpartition("/p")[2]) for key in metrics if re.search(r"/p\d+$", key)})
    names = [name for name in OF_PREFIXES if f"val/{name}/p{widths[-1]}" in metrics]
    table = Table("prefix", *names, title="held-out rows")
    for width in widths:
        table.add_row(str(width), *(f"{metrics[f'val/{name}/p{width}']:.4g}" for name in names))
    console = Console()
    console.print(table)
    rest = Table(box=None, show_header=False)
    for key, value in metrics.items():
        if not re.search(r"/p\d+$", key):
            rest.add_row(key, f"{value:,.0f}" if key == "train/tokens" else f"{value:.4g}")
    console.print(rest)


def print_comparison(metrics: dict[str, dict[str, float]], title: str) -> None:
    """One row an SAE, of its widest prefix; `title` heads the column of their names."""
    rows = {name: of_sae | widest(of_sae) for name, of_sae in metrics.items()}
    columns = [key for key in COMPARED if any(key in row for row in rows.values())]
    names = [Column(key.rpartition("/")[2], overflow="fold") for key in columns]
    table = Table(Column(title, overflow="fold"), *names, title="held-out rows, all latents")
    for name, row in rows.items():
        table.add_row(escape(name), *(f"{row[key]:.4g}" if key in row else "" for key in columns))
    Console().print(table)


def print_runs(runs: list[Run]) -> None:
    """Name, when, state, tokens, FVU, L0 of each run, and the settings in which they differ."""
    settings = [settings_of(run) for run in runs]
    varying = [key for key in columns(settings) if len({str(of_run.get(key)) for of_run in settings}) > 1]
    varying = [key for key in varying if key != "name" and not key.startswith(("arms", "grid"))]
    whole = [Column(name, no_wrap=True) for name in ("state", "tokens", "FVU", "L0")]
    folded = [Column(escape(key.removeprefix("model.")), overflow="fold") for key in varying]
    table = Table(Column("run", no_wrap=True), Column("when", overflow="fold"), *whole, *folded)
    for run, of_run in zip(runs, settings, strict=True):
        figures = numbers(of_run | (metrics := run.outcome()[0]) | widest(metrics))
        when = datetime.fromtimestamp(run.config_file.stat().st_mtime)
        tokens = figures.get("train/tokens", figures.get("tokens"))
        cells = [str(run), f"{when:%Y-%m-%d %H:%M}", run.state, "" if tokens is None else f"{tokens:,.0f}"]
        cells += [f"{figures[key]:.4g}" if key in figures else "" for key in ("val/fvu", "val/l0")]
        cells += ["" if of_run.get(key) is None else str(of_run[key]) for key in varying]
        table.add_row(*map(escape, cells))
    Console().print(table)


def settings_of(run: Run) -> dict[str, Any]:
    """The settings that decide what a run makes, an arm's own over its run's; none, and a line, if unreadable."""
    try:
        settings = deciding(run.config)
        if run.of is not None:
            arm = next(arm for arm in run.of.arms() if arm.name == run.path.name)
            given = deciding((run.of.config.get("arms") or {}).get(arm.arm) or {})
            settings |= {"arm": arm.arm, **{f"model.{key}": value for key, value in given.items()}, **arm.settings}
        return settings
    except ValueError as error:
        say(str(error))
        return {}
