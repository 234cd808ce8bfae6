"""A sweep: one directory in which the same command goes on, jobs that fail alone, an exit code."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from msae import train
from msae.config import command, config_dir, run_directory
from msae.schema import TrainConfig
from msae.summary import read_jobs
from msae.sweep import alone, asked, claim, difference, force, own_command_line

REPOSITORY = Path(__file__).parent.parent


CHECKPOINT = "last.ckpt"


class Node:
    def __init__(self, k: int = 4, prefixes: list[float] | None = None, text: str = "") -> None: ...


RAN: list[tuple] = []  # by each job: k, seed, run_dir, ckpt_path, what was in its directory, the command line


@command("train", TrainConfig)
def main(cfg: DictConfig) -> None:
    directory = run_directory(cfg.name, cfg.runs, cfg.run_dir)
    k = cfg.model.get("k", 4)
    RAN.append((k, cfg.seed, cfg.run_dir, cfg.ckpt_path, sorted(p.name for p in directory.iterdir()), sys.argv[1:]))
    if k == 13:
        raise ValueError("k=13 is unlucky,\nexpected another")
    if k == 14:
        raise TypeError("a bug")
    if k == 15 and cfg.ckpt_path is None:
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints" / CHECKPOINT).write_text("")
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
    RAN.clear()
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
    header = next(line for line in capsys.readouterr().out.splitlines() if "┃" in line)
    assert header.replace("┃", " ").split() == ["n", "loss"]  # what no job measured has no column


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


# The same command -----------------------------------------------------------------------------------------


def test_the_same_command_runs_what_is_missing(conf: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(conf, monkeypatch, "+sweeps=k") == 1
    (only_sweep() / "2" / "metrics.json").unlink()  # stopped without a checkpoint
    (only_sweep() / "2" / "half").mkdir()
    capsys.readouterr()
    RAN.clear()
    assert run(conf, monkeypatch, "+sweeps=k", "runs=runs", "hydra.sweeper.max_batch_size=9") == 1
    out = capsys.readouterr().out
    assert "job 0: model=matryoshka model.k=4 sweeps=k" in out
    assert out.count(": there already\n") == 1
    assert [k for k, *_ in RAN] == [13, 4, 13]  # failed, stopped, failed
    assert [row[4] for row in RAN] == [[".lock", "config.yaml", "overrides.json"]] * 3  # emptied first
    assert sorted(job.name for job in read_jobs(only_sweep()) if job.error is None) == ["0", "2"]


def test_nothing_is_missing(conf: Path, monkeypatch: Patch, capsys: Capture) -> None:
    arguments = ["-m", "model.k=4,5", "seed=0,1"]
    assert run(conf, monkeypatch, *arguments) == 0
    first = capsys.readouterr().out
    assert "anew" not in first
    assert run(conf, monkeypatch, *arguments) == 0
    again = capsys.readouterr().out
    assert len(RAN) == 4
    assert again.endswith(f"every job was there already; to run them anew: rm -r {only_sweep()}\n")
    assert first[first.index("┏") :] in again  # the same table
    (only_sweep() / "1" / "error.txt").write_text("why")
    assert run(conf, monkeypatch, *arguments) == 0
    assert "anew" not in capsys.readouterr().out


def test_a_command_that_measures_nothing_is_repeated(conf: Path, monkeypatch: Patch) -> None:
    for _ in range(2):
        assert run(conf, monkeypatch, "-m", "model.k=16") == 0
    assert len(RAN) == 2


def test_a_stopped_job_goes_on_from_its_checkpoint(conf: Path, monkeypatch: Patch, capsys: Capture) -> None:
    arguments = ["-m", "model.k=15,4"]
    assert run(conf, monkeypatch, *arguments) == 130
    directory = (only_sweep() / "0").resolve()
    # what the stopped job says to type does the same: a sweep's jobs have directories of their own
    assert run(conf, monkeypatch, *arguments, f"run_dir={directory}", "ckpt_path=last") == 0
    assert "goes on from its last checkpoint\n" in capsys.readouterr().out
    (_, resumed, other) = RAN
    assert resumed[2:4] == (str(directory), "last")
    assert resumed[5][-3:] == [f"++run_dir='{directory}'", "++ckpt_path=last", "hydra.mode=RUN"]  # for other ranks
    assert other[2:4] == (None, None)
    assert OmegaConf.load(directory / "config.yaml").run_dir is None
    assert (directory / "checkpoints").is_dir()


@pytest.mark.parametrize("change", ["error", "checkpoint"])
def test_a_failed_job_or_one_without_last_checkpoint_starts_again(conf: Path, monkeypatch: Patch, change: str) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CHECKPOINT", "last.ckpt" if change == "error" else "last.ckpt.tmp")
    assert run(conf, monkeypatch, "-m", "model.k=15") == 130
    if change == "error":
        (only_sweep() / "0" / "error.txt").write_text("why")
    assert run(conf, monkeypatch, "-m", "model.k=15") == 130
    assert RAN[1][2:4] == (None, None)
    assert "checkpoints" not in RAN[1][4]


def test_changed_settings_are_not_reused(conf: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """A group that varies is not in the composed config of the sweep, so its file may change under the jobs."""
    assert run(conf, monkeypatch, "+sweeps=k") == 1
    RAN.clear()
    capsys.readouterr()
    vanilla = conf / "model" / "vanilla.yaml"
    vanilla.write_text(vanilla.read_text() + "text: new\n")
    assert run(conf, monkeypatch, "+sweeps=k") == 1
    out = capsys.readouterr().out
    assert "job 2: model.text was None, is new; it runs anew, and what was there is now in " in out
    assert [k for k, *_ in RAN] == [13, 4, 13]
    assert json.loads((only_sweep() / "old" / "2" / "metrics.json").read_text())["val/fvu/p20"] == 0.4
    assert len(read_jobs(only_sweep())) == 4  # what is kept is no job
    (only_sweep() / "0" / "config.yaml").write_text("model: {k: ")
    assert run(conf, monkeypatch, "+sweeps=k") == 1
    assert "job 0: config.yaml cannot be read (" in capsys.readouterr().out


def test_another_question_has_another_directory(conf: Path, monkeypatch: Patch) -> None:
    for arguments in (
        ["seed=0,1"],
        ["seed=0,1,2"],
        ["seed=0,1", "tokens=7"],
        ["+sweeps=loss"],
        ["+sweeps=loss", "seed=0"],
    ):
        assert run(conf, monkeypatch, "-m", *arguments) == 0
    names = {path.name for path in Path("runs/sweeps").iterdir()}
    assert len(names) == 5
    assert all(name.startswith("tree-") and len(name) == len("tree-") + 8 for name in names)


def test_what_enters_the_name_of_a_sweep() -> None:
    def hydra(*task: str) -> dict:
        return {"overrides": {"task": list(task)}, "sweeper": {"params": None}}

    config = OmegaConf.create(
        {"seed": 0, "runs": "a", "data": {"root": "b", "prefetch": 4}, "hydra": hydra("++runs=a")}
    )
    other = OmegaConf.create({"seed": 0, "runs": "c", "data": {"root": "d", "prefetch": 9}, "hydra": hydra()})
    assert asked(config) == asked(other)
    for changed in (OmegaConf.merge(other, {"seed": 1}), OmegaConf.merge(other, {"hydra": hydra("seed=0")})):
        assert asked(changed) != asked(other)
    assert asked(OmegaConf.merge(other, {"hydra": hydra("data.prefetch=1,2")})) != asked(other)  # it varies
    assert asked(OmegaConf.merge(other, {"hydra": {"sweeper": {"params": {"seed": "0,1"}}}})) != asked(other)


def test_a_directory_of_something_else_is_left_alone(conf: Path, monkeypatch: Patch) -> None:
    for _ in range(2):
        assert run(conf, monkeypatch, "-m", "hydra.sweep.dir=mine", "seed=1,2") == 0
    assert len(RAN) == 2
    before = sorted(Path("mine").rglob("*"))
    code = run(conf, monkeypatch, "-m", "hydra.sweep.dir=mine", "seed=1,2,3")
    assert code == "error: mine is of another sweep, see its asked.json; give another hydra.sweep.dir"
    assert sorted(Path("mine").rglob("*")) == before
    Path("yours").mkdir()
    Path("yours/file").write_text("")
    code = run(conf, monkeypatch, "-m", "hydra.sweep.dir=yours", "seed=1,2")
    assert code == "error: yours is not empty and no sweep's; give another hydra.sweep.dir"


def test_two_processes_do_not_share_a_sweep(conf: Path, monkeypatch: Patch) -> None:
    assert run(conf, monkeypatch, "-m", "model.k=4,5") == 0
    holder = (
        f"import filelock; lock = filelock.FileLock({str(only_sweep() / '.lock')!r}); lock.acquire(); print(); input()"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        code = run(conf, monkeypatch, "-m", "model.k=4,5")
        process.communicate(b"\n")
    assert code == f"error: another process runs the sweep in {only_sweep()}; wait for it, or stop it first"
    assert run(conf, monkeypatch, "-m", "model.k=4,5") == 0


def test_a_job_that_outlived_its_sweep_is_waited_for(tmp_path: Path, capsys: Capture) -> None:
    entered, left = threading.Event(), []

    def orphan() -> None:
        with FileLock(tmp_path / ".lock"):
            entered.set()
            time.sleep(0.3)
            left.append(True)

    thread = threading.Thread(target=orphan)
    thread.start()
    entered.wait()
    with alone(tmp_path):
        assert left
    thread.join()
    assert capsys.readouterr().err == f"{tmp_path} is still written by a process of before; waiting for it\n"


def test_a_checkpoint_is_not_for_the_jobs_of_a_sweep(conf: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(conf, monkeypatch, "-m", "seed=1", "ckpt_path=runs/x") == 1
    assert "ckpt_path=runs/x: the jobs of a sweep resume by themselves; drop ckpt_path\n" in capsys.readouterr().err


def test_a_wrong_key_of_the_figure_is_one_line(conf: Path, monkeypatch: Patch) -> None:
    code = run(conf, monkeypatch, "-m", "seed=1", "+hydra.callbacks.sweep.figure={y:1}")
    assert code == "error: hydra.callbacks.sweep.figure has y; it needs x and may have by, metrics, log_x"


def test_difference(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"a": {"b": 1e-2, "c": [1, "${d}"]}, "d": None, "runs": "x"})
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    assert difference(tmp_path / "config.yaml", cfg) is None
    assert difference(tmp_path / "config.yaml", OmegaConf.merge(cfg, {"runs": "y"})) is None
    assert difference(tmp_path / "config.yaml", OmegaConf.merge(cfg, {"a": {"b": 2}})) == "a.b was 0.01, is 2"
    assert difference(tmp_path / "config.yaml", OmegaConf.merge(cfg, {"d": "${nowhere}"})) is not None
    assert str(difference(tmp_path / "none.yaml", cfg)).startswith("none.yaml cannot be read (")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_sweep_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    small = [
        "data.source.rows=4000",
        "data.source.val_rows=1000",
        "data.source.chunk_rows=2000",
        "data.batch_tokens=128",
    ]
    arguments = ["-m", "seed=0,1", *small, "tokens=60_000", "checkpoint_every_steps=50"]

    def wait_for(pattern: str, process: subprocess.Popen[bytes]) -> None:
        while not list(Path("runs").glob(pattern)):
            assert process.poll() is None
            time.sleep(0.02)

    def sweep(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train", *arguments, *more])
        try:
            train.main()
        except SystemExit as ex:
            print(ex.code)
            return 1
        return 0

    assert sweep("runs=whole") == 0
    with subprocess.Popen([sys.executable, "-m", "msae.train", *arguments], stderr=subprocess.PIPE) as process:
        wait_for("sweeps/*/0/overrides.json", process)
        capsys.readouterr()
        assert sweep() == 1
        error = f"error: another process runs the sweep in {only_sweep()}; wait for it, or stop it first\n"
        assert capsys.readouterr().out == error
        wait_for("sweeps/*/1/checkpoints/last.ckpt", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert [job.error is None for job in read_jobs(only_sweep())] == [True, False]
    assert sweep() == 0
    out = capsys.readouterr().out
    assert "there already" in out
    assert "goes on from its last checkpoint" in out
    (whole,) = Path("whole/sweeps").iterdir()
    assert whole.name == only_sweep().name  # where it lies does not matter
    for ours, theirs in zip(read_jobs(only_sweep()), read_jobs(whole), strict=True):
        assert {**ours.metrics, "seconds": 0} == {**theirs.metrics, "seconds": 0}
        weights = [root / ours.name / "sae" / "sae_weights.safetensors" for root in (only_sweep(), whole)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


# --------------------------------------------------------------------------------------------------------


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


def test_claim_never_gives_the_same_directory_twice(tmp_path: Path) -> None:
    assert [claim(tmp_path / "a" / "b").name for _ in range(3)] == ["b", "b-2", "b-3"]


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
