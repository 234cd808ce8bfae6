"""What a sweep says: arms, intervals, the table, the figure."""

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msae.cli.table import (
    OVERRIDES,
    Interval,
    Job,
    bootstrap,
    markdown,
    panels,
    read_jobs,
    report,
    short,
    summarise,
    widest,
)
from msae.evaluation import pictures
from msae.runs import Arm, Run
from msae.settings import changed

Capture = pytest.CaptureFixture[str]
ARMS = ["vanilla", "nested"]
FIGURE = {"x": "model.d_sae", "by": "arm", "metrics": ["truth/mcc", "val/l0"], "log_x": True}


def job(sweep: Path, name: str, overrides: list[str], metrics: Any) -> Run:
    run = Run(sweep / name)
    run.path.mkdir(parents=True)
    (run.path / OVERRIDES).write_text(json.dumps(overrides))
    run.metrics_file.write_text(metrics if isinstance(metrics, str) else json.dumps(metrics))
    return run


def measured(seed: int, arm: str, width: int) -> float:
    return seed / 10 + ARMS.index(arm) + width / 100


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Five seeds, a job each, with two arms at two widths."""
    sweep = tmp_path / "sweep"
    for seed in range(5):
        run = job(sweep, str(seed), [f"++seed={seed}", "++tokens=5"], {"seconds": 2.5})
        arms = []
        for name, width in itertools.product(ARMS, (64, 16)):
            arms.append(Arm(f"{name}-d_sae{width}", name, {"model.d_sae": width}))
            metrics = {"truth/mcc": measured(seed, name, width), "val/l0/p2": 9, f"val/l0/p{width}": 1.5 * width}
            run.arm(arms[-1].name).write_metrics(metrics)
        run.write_arms(arms)
    return sweep


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_each_arm_is_an_entry(sweep: Path) -> None:
    jobs = read_jobs(sweep)
    assert len(jobs) == 20
    assert jobs[1].overrides == {"seed": "0", "tokens": "5", "arm": "vanilla", "model.d_sae": "16"}
    assert jobs[1].metrics == {"truth/mcc": 0.16, "val/l0/p2": 9, "val/l0/p16": 24.0}
    assert {found.error for found in jobs} == {None}
    assert report(sweep, []) == 0
    assert len(rows(sweep / "summary.csv")) == 20


def test_an_arm_that_failed_is_named_and_the_others_stay(sweep: Path, capsys: Capture) -> None:
    run = Run(sweep / "3")
    first, second, *rest = run.arms()
    run.write_arms([changed(first, error="the loss is\nnan"), second, *rest])
    run.arm(second.name).metrics_file.unlink()
    assert report(sweep, ["truth/mcc"]) == 2
    out, err = capsys.readouterr()
    assert "failed: job 3 (seed=3 arm=vanilla model.d_sae=64): the loss is nan\n" in err
    assert "failed: job 3 (seed=3 arm=vanilla model.d_sae=16): stopped before it wrote metrics.json\n" in err
    assert "error: 2 of 20 jobs failed" in err
    assert out.count("4, 1 failed") == 2
    table = (sweep / "table.md").read_text()
    assert "; 2 of 20 failed\n" in table
    assert "; 12 s of jobs; " in table


@pytest.mark.parametrize("content", ["[", '{"arms": []}', '{"arms": [{"name": "..", "arm": "a", "settings": {}}]}'])
def test_a_list_of_arms_that_cannot_be_trusted_is_one_failure(tmp_path: Path, content: str) -> None:
    run = job(tmp_path, "0", ["seed=0"], {"seconds": 1})
    run.arms_file.write_text(content)
    (entry,) = read_jobs(tmp_path)
    assert entry.error is not None
    assert "arms.json" in entry.error
    assert report(tmp_path, []) == 1


def test_a_job_that_stopped_has_no_arms_yet(sweep: Path) -> None:
    (sweep / "4" / "metrics.json").unlink()
    assert [found.error for found in read_jobs(sweep)][16:] == ["stopped before it wrote metrics.json"]


def test_unreadable_metrics_are_a_failure(tmp_path: Path, capsys: Capture) -> None:
    job(tmp_path, "0", ["seed=1"], '{"val/f')
    job(tmp_path, "1", ["seed=2"], "[]")
    assert report(tmp_path, []) == 2
    err = capsys.readouterr().err
    assert "failed: job 0 (seed=1): metrics.json: " in err
    assert "failed: job 1 (seed=2): metrics.json: not an object\n" in err


def test_widest_prefix() -> None:
    metrics = {"val/fvu/p20": 1, "val/fvu/p5": 2, "val/fvu/p100": 3, "val/l0/p5": 4, "train/fvu/p200": 5}
    assert widest(metrics) == {"val/fvu": 3, "val/l0": 4}
    assert widest({"loss": 1}) == {"loss": 1}


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_intervals_are_those_of_a_plain_bootstrap(n: int) -> None:
    values = np.random.default_rng(n).exponential(size=n)
    means = np.random.default_rng(1).choice(values, (200_000, n)).mean(1)
    found = bootstrap(list(values))
    assert found.n == n
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.1 * values.std())
    assert bootstrap(list(values)) == found  # seeded


def test_intervals_of_constant_data_and_of_one_value() -> None:
    assert bootstrap([0.1] * 5) == (5, 0.1, 0.1, 0.1)
    assert bootstrap([0.1] * 3) == (3, 0.1, 0.1, 0.1)  # their sum divided by 3 is not 0.1
    one = bootstrap([0.3])
    assert one[:2] == (1, 0.3)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert bootstrap([]).n == 0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.0713, 0.0312, 0.1121), "0.071 [0.03, 0.11]"),
        ((0.948, 0.934, 0.959), "0.9480 [0.934, 0.959]"),
        ((0.99871, 0.99812, 0.99921), "0.99871 [0.9981, 0.9992]"),
        ((0.49, 0.33, 0.67), "0.490 [0.33, 0.67]"),
        ((1234.5, 1220, 1250), "1234.5 [1220, 1250]"),
        ((2.04e-6, 1.9e-6, 2.1e-6), "2.04e-06 [1.9e-06, 2.1e-06]"),
        ((-0.09, -0.12, 0.0), "-0.090 [-0.12, 0.00]"),
        ((0.25, 0.25, 0.25), "0.25 [0.25, 0.25]"),
        ((0.0, 0.0, 0.0), "0 [0, 0]"),
        ((0.12345, math.nan, math.nan), "0.123"),
        ((math.nan, math.nan, math.nan), ""),
    ],
)
def test_how_an_interval_is_written(values: tuple[float, float, float], text: str) -> None:
    assert str(Interval(5, *values)) == text


def test_jobs_are_grouped_by_all_but_the_seed() -> None:
    jobs = [
        Job(str(n), {"seed": str(n % 3), "k": str(n // 3)}, {"val/fvu/p4": n, "val/fvu/p8": 10 * n}, None)
        for n in range(6)
    ]
    jobs += [
        Job("6", {"seed": "3", "k": "0"}, {}, "failed"),
        Job("7", {"seed": "3", "k": "1"}, {"val/fvu/p8": math.nan, "a": "b"}, None),
    ]
    first, second = summarise(jobs, ["k"], ["val/fvu", "val/fvu/p4"])
    assert (first.values, first.finished, first.failed) == ({"k": "0"}, 3, 1)
    assert first.intervals["val/fvu"][:2] == (3, 10.0)
    assert first.intervals["val/fvu/p4"][:2] == (3, 1.0)
    assert (second.finished, second.intervals["val/fvu"][:2]) == (4, (3, 40.0))  # what is not a number does not count


def test_intervals_csv(sweep: Path) -> None:
    report(sweep, ["truth/mcc"], FIGURE)
    found = rows(sweep / "intervals.csv")
    assert list(found[0]) == ["arm", "model.d_sae", "metric", "n", "mean", "low", "high"]
    assert [(row["arm"], row["model.d_sae"], row["metric"]) for row in found[:4]] == [
        ("vanilla", "64", "truth/mcc"),
        ("vanilla", "64", "val/l0"),
        ("vanilla", "16", "truth/mcc"),
        ("vanilla", "16", "val/l0"),
    ]
    values = [measured(seed, "vanilla", 64) for seed in range(5)]
    assert tuple(float(found[0][key]) for key in ("n", "mean", "low", "high")) == bootstrap(values)
    one = sweep / "one"
    job(one, "0", ["seed=0"], {"loss": 2})
    report(one, [])
    assert rows(one / "intervals.csv") == [{"metric": "loss", "n": "1", "mean": "2.0", "low": "", "high": ""}]


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table(sweep: Path, capsys: Capture) -> None:
    assert report(sweep, ["truth/mcc", "val/l0"], None, "sweep", "python -m msae.train +sweeps=a") == 0
    lines = (sweep / "table.md").read_text().splitlines()
    assert lines[0] == "| arm | d_sae | n | mcc | l0 |"
    assert lines[1] == "| --- | --- | --- | --- | --- |"
    assert (
        lines[2] == f"| vanilla | 64 | 5 | {bootstrap([measured(s, 'vanilla', 64) for s in range(5)])} | 96 [96, 96] |"
    )
    assert lines[6:] == [
        "",
        "mean [95 % bootstrap interval of it] over 5 seeds; 12 s of jobs",
        "",
        "```bash",
        "python -m msae.train +sweeps=a",
        "```",
    ]
    out = capsys.readouterr().out
    assert "96 [96, 96]" in out
    assert out.endswith(f"{sweep}/table.md, summary.csv, intervals.csv\n")
    assert not list(sweep.glob("*.png"))


def test_markdown_is_escaped() -> None:
    text = markdown(["a|b", "c"], [["x|y\nz", r"\|`<*"], ["[5,20]", "1"]])
    assert text == "| a\\|b | c |\n| --- | --- |\n| x\\|y z | \\\\\\|\\`\\<\\* |\n| [5,20] | 1 |\n"


def test_what_an_override_says_is_no_markup(tmp_path: Path, capsys: Capture) -> None:
    for n, value in enumerate(["[red]", "[/red]", "a|b"]):
        job(tmp_path, str(n), [f"model.x={value}"], {"loss": 1})
    report(tmp_path, [])
    out = capsys.readouterr().out
    assert all(value in out for value in ("[red]", "[/red]", "a|b"))
    assert "| a\\|b | 1 | 1 |" in (tmp_path / "table.md").read_text()


def test_names_are_short_unless_two_are_the_same() -> None:
    assert short(["val/fvu/p5", "loss", "truth/mcc"], "/") == ["fvu/p5", "loss", "mcc"]
    assert short(["val/ce", "train/ce", "val/fvu"], "/") == ["val/ce", "train/ce", "fvu"]


# --- the figure -------------------------------------------------------------------------------------------------------


def test_the_figure_shows_the_numbers(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    lines = pictures.lines
    monkeypatch.setattr(pictures, "lines", lambda *arguments: drawn.append(arguments) or lines(*arguments))
    report(sweep, ["truth/mcc"], FIGURE, "absorption")
    ((data, xlabel, log_x),) = drawn
    assert (xlabel, log_x) == ("d_sae", True)
    assert list(data) == ["mcc", "l0"]
    for name in ARMS:
        expected = [(float(w), *bootstrap([measured(s, name, w) for s in range(5)])[1:]) for w in (16, 64)]
        assert data["mcc"][name] == expected
        assert data["l0"][name] == [(16.0, 24.0, 24.0, 24.0), (64.0, 96.0, 96.0, 96.0)]
    figure = lines(*drawn[0])
    assert [axis.get_ylabel() for axis in figure.axes] == ["mcc", "l0"]
    points = figure.axes[0].lines[0].get_xydata()
    assert points.tolist() == [list(point[:2]) for point in data["mcc"]["vanilla"]]
    assert (sweep / "absorption.png").read_bytes()[:4] == b"\x89PNG"


def test_the_figure_is_in_tensorboard_once(sweep: Path) -> None:
    for _ in range(2):
        report(sweep, ["truth/mcc"], FIGURE, "absorption")
    assert len(list((sweep / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(sweep / "tensorboard"))
    events.Reload()
    (image,) = events.Images("absorption")
    assert min(image.width, image.height) > 200


def test_x_may_be_a_metric_or_a_category(sweep: Path) -> None:
    jobs = read_jobs(sweep)
    by = ["arm", "model.d_sae"]
    groups = summarise(jobs, by, ["truth/mcc", "val/l0"])
    of_metric = panels(groups, by, ["truth/mcc"], "val/l0", "arm")["mcc"]
    assert list(of_metric) == ["vanilla, d_sae=64", "vanilla, d_sae=16", "nested, d_sae=64", "nested, d_sae=16"]
    assert of_metric["nested, d_sae=16"][0][0] == 24.0
    assert list(panels(groups, ["arm"], ["truth/mcc"], "val/l0", "arm")["mcc"]) == ARMS
    of_arm = panels(groups, by, ["truth/mcc"], "arm")["mcc"]
    assert [point[0] for point in of_arm["d_sae=64"]] == ARMS
    figure = pictures.lines({"mcc": of_arm}, "arm")
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ARMS


def test_an_override_that_does_not_vary_may_be_x(tmp_path: Path) -> None:
    for seed in range(2):
        job(tmp_path, str(seed), [f"seed={seed}", "model.d_sae=32"], {"loss": seed})
    report(tmp_path, [], {"x": "model.d_sae"})
    assert rows(tmp_path / "intervals.csv")[0]["model.d_sae"] == "32"
    assert (tmp_path / "sweep.png").exists()


def test_a_figure_of_nothing_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    job(tmp_path, "0", ["seed=0"], {"loss": 1})
    report(tmp_path, [], {"x": "model.width"})
    assert capsys.readouterr().err == "no figure: no finished job has x=model.width and one of loss\n"
    report(tmp_path, [], {"x": "loss", "metrics": ["nowhere"]})
    assert "and one of nowhere\n" in capsys.readouterr().err


def test_seeds_of_a_grid_are_seeds(tmp_path: Path) -> None:
    """A family's `grid={seed: …}` is what its intervals are over, within one job."""
    run = job(tmp_path, "0", ["tokens=5"], {"seconds": 3})
    run.write_arms([Arm(f"k2-seed{seed}", "family", {"model.k": 2, "model.seed": seed}) for seed in range(4)])
    for seed in range(4):
        run.arm(f"k2-seed{seed}").write_metrics({"truth/mcc": seed / 10})
    assert report(tmp_path, ["truth/mcc"]) == 0
    (row,) = rows(tmp_path / "intervals.csv")
    assert (row["n"], float(row["mean"])) == ("4", pytest.approx(0.15))
    assert "over 4 seeds" in (tmp_path / "table.md").read_text()
