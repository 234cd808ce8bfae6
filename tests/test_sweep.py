"""A sweep: one directory, jobs that fail alone, one table, an exit code."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from msae.config import command, config_dir, run_directory
from msae.schema import TrainConfig
from msae.summary import read_jobs, report, widest
from msae.sweep import claim, force, own_command_line

REPOSITORY = Path(__file__).parent.parent


class Node:
    def __init__(self, k: int = 4, prefixes: list[float] | None = None, text: str = "") -> None: ...


@command("train", TrainConfig)
def main(cfg: DictConfig) -> None:
    directory = run_directory(cfg.name, cfg.runs, cfg.run_dir)
    k = cfg.model.get("k", 4)
    if k == 13:
        raise ValueError("k=13 is unlucky,\nexpected another")
    if k == 14:
        raise TypeError("a bug")
    if k == 15:
        raise KeyboardInterrupt
    (directory / "argv.json").write_text(json.dumps(sys.argv[1:]))
    os.environ["LOCAL_RANK"] = "1"  # what DDP leaves behind
    if k != 16:
        (directory / "metrics.json").write_text(json.dumps({"val/fvu/p2": 0.5, "val/fvu/p20": k / 10, "loss": 1}))


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "train.yaml": (config_dir("conf") / "train.yaml").read_text(),
        "model/matryoshka.yaml": "_target_: tests.test_sweep.Node",
        "model/vanilla.yaml": (config_dir("conf") / "model" / "vanilla.yaml").read_text(),
        "data/tree.yaml": "_target_: tests.test_sweep.Node",
        "trainer/default.yaml": "_target_: tests.test_sweep.Node",
        "sweeps/k.yaml": """# @package _global_
hydra: {mode: MULTIRUN, sweeper: {params: {model: "matryoshka,vanilla", model.k: "4,13"}}}""",
        "sweeps/loss.yaml": """# @package _global_
hydra: {mode: MULTIRUN, callbacks: {sweep: {metrics: [loss, nowhere]}}, sweeper: {params: {seed: "0,1"}}}""",
    }
    for name, text in files.items():
        file = tmp_path / "conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MSAE_RUN_DIR", "")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path / "conf"


def run(conf: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str:
    monkeypatch.setattr(sys, "argv", ["train.py", "-cp", str(conf), *arguments])
    try:
        main()
    except SystemExit as ex:
        return ex.code or 0
    return 0


def only_sweep() -> Path:
    (sweep,) = Path("runs/sweeps").iterdir()
    return sweep


Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def test_one_job_fails_and_the_others_finish(conf: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(conf, monkeypatch, "+sweeps=k") == 1
    out, err = capsys.readouterr()
    sweep = only_sweep()
    assert "failed: job 1 (model=matryoshka model.k=13): k=13 is unlucky, expected another\n" in err
    assert err.endswith(f"error: 2 of 4 jobs failed; see {sweep}/summary.csv\n")
    assert "Traceback" not in err
    assert " fvu " in out
    with (sweep / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["model"] for row in rows] == ["matryoshka", "matryoshka", "vanilla", "vanilla"]
    assert [row["model.k"] for row in rows] == ["4", "13", "4", "13"]
    assert [row["val/fvu/p20"] for row in rows] == ["0.4", "", "0.4", ""]
    assert [bool(row["error"]) for row in rows] == [False, True, False, True]
    assert "sweeps" not in rows[0]  # does not vary
    assert [p.name for p in Path().iterdir()] == ["runs"]


def test_the_command_line_beats_the_sweep_file(conf: Path, monkeypatch: Patch) -> None:
    assert run(conf, monkeypatch, "-m", "+sweeps=k", "model.k=3") == 0
    jobs = read_jobs(only_sweep())
    assert [(job.overrides["model"], job.overrides["model.k"]) for job in jobs] == [
        ("matryoshka", "3"),
        ("vanilla", "3"),
    ]


def test_a_sweep_file_chooses_what_the_terminal_shows(conf: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(conf, monkeypatch, "+sweeps=loss") == 0
    header = next(line for line in capsys.readouterr().out.splitlines() if "seed " in line and "job " in line)
    assert header.replace("┃", " ").split() == ["job", "seed", "loss"]  # what no job measured has no column


def test_a_bug_in_a_job_shows_its_traceback_and_the_others_finish(
    conf: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    assert run(conf, monkeypatch, "-m", "model.k=14,5") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "failed: job 0 (model.k=14): TypeError: a bug\n" in err
    assert [job.error for job in read_jobs(only_sweep())] == ["TypeError: a bug", None]


def test_an_unknown_key_fails_every_job(conf: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(conf, monkeypatch, "-m", "model.kk=1,2") == 1
    assert "failed: job 1 (model.kk=2): unknown key model.kk; did you mean model.k?\n" in capsys.readouterr().err


def test_a_sweep_that_cannot_be_composed_leaves_nothing(conf: Path, monkeypatch: Patch) -> None:
    code = run(conf, monkeypatch, "-m", "model=matryoshka,vanila")
    assert str(code).startswith("error: no model named vanila; did you mean model=vanilla?")
    assert not list(Path("runs/sweeps").iterdir())


def test_an_interrupted_sweep_still_reports(conf: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(conf, monkeypatch, "-m", "model.k=4,15,5") == 130
    assert "failed: job 1 (model.k=15): stopped before it wrote metrics.json\n" in capsys.readouterr().err
    assert [job.name for job in read_jobs(only_sweep())] == ["0", "1"]


def test_a_command_without_metrics_has_not_failed(conf: Path, monkeypatch: Patch) -> None:
    assert run(conf, monkeypatch, "-m", "model.k=16") == 0
    assert read_jobs(only_sweep())[0].metrics == {}


def test_two_sweeps_never_share_a_directory(conf: Path, monkeypatch: Patch) -> None:
    for _ in range(2):
        assert run(conf, monkeypatch, "-m", "hydra.sweep.dir=mine") == 0
    assert sorted(p.name for p in Path().iterdir()) == ["mine", "mine-2"]
    assert len(read_jobs(Path("mine"))) == len(read_jobs(Path("mine-2"))) == 1


def test_a_directory_that_cannot_be_made_is_one_line(conf: Path, monkeypatch: Patch) -> None:
    Path("runs").write_text("a file")
    code = run(conf, monkeypatch, "-m", "seed=1,2")
    assert str(code).startswith("error: ")
    assert "Not a directory" in str(code)


def test_ddp_would_restart_one_job_and_not_the_sweep(conf: Path, monkeypatch: Patch) -> None:
    """Its other ranks re-run sys.argv; what it leaves in the environment must not reach the next job."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run(conf, monkeypatch, "-m", "model.k=4,5") == 0
    arguments = [json.loads((only_sweep() / str(n) / "argv.json").read_text()) for n in range(2)]
    assert arguments[1] == ["-cp", str(conf), "++model.k=5", "hydra.mode=RUN"]
    assert sys.argv == ["train.py", "-cp", str(conf), "-m", "++model.k=4,5"]
    assert "LOCAL_RANK" not in os.environ
    with pytest.raises(ZeroDivisionError), own_command_line([]):
        os.environ["LOCAL_RANK"] = str(1 // 0)
    assert sys.argv[3] == "-m"


@pytest.mark.slow
def test_jobs_in_other_processes(conf: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    code = "import tests.test_sweep as t; t.main()"
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "-cp",
            str(conf),
            "+sweeps=k",
            "hydra/launcher=joblib",
            "hydra.launcher.n_jobs=2",
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.endswith(f"error: 2 of 4 jobs failed; see {only_sweep()}/summary.csv\n")
    assert [job.error is None for job in read_jobs(only_sweep())] == [True, False, True, False]


def test_unreadable_metrics_are_a_failure(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "overrides.json").write_text('["seed=1"]')
    (tmp_path / "0" / "metrics.json").write_text('{"val/f')
    assert report(tmp_path, []) == 1
    assert "failed: job 0 (seed=1): metrics.json: " in capsys.readouterr().err


def test_claim_never_gives_the_same_directory_twice(tmp_path: Path) -> None:
    assert [claim(tmp_path / "a" / "b").name for _ in range(3)] == ["b", "b-2", "b-3"]


def test_widest_prefix() -> None:
    metrics = {"val/fvu/p20": 1, "val/fvu/p5": 2, "val/fvu/p100": 3, "val/l0/p5": 4, "train/fvu/p200": 5}
    assert widest(metrics) == {"val/fvu": 3, "val/l0": 4}
    assert widest({"loss": 1}) == {"loss": 1}


@pytest.mark.parametrize(
    ("given", "forced"),
    [
        ("model.lr=1", "++model.lr=1"),
        ("seed=0,1", "++seed=0,1"),
        ("model=vanilla", "model=vanilla"),
        ("+experiment=a", "+experiment=a"),
        ("++model.lr=1", "++model.lr=1"),
        ("~model.lr", "~model.lr"),
        ("hydra.mode=RUN", "hydra.mode=RUN"),
        ("hydra/launcher=joblib", "hydra/launcher=joblib"),
        ("--config-name=train", "--config-name=train"),
    ],
)
def test_force(given: str, forced: str) -> None:
    assert force(given, {"model", "experiment"}) == forced
