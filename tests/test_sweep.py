"""A sweep: one directory in which the same command goes on, jobs that fail alone, an exit code."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from omegaconf import DictConfig, OmegaConf

from msae import train
from msae.cli.command import command, config_dir, job_directory
from msae.cli.sweep import asked, difference, force, own_command_line
from msae.cli.table import read_jobs
from msae.runs import Run, new_run
from msae.training.settings import Train
from tests.commands import ENVIRONMENT, TREE, same_weights, start, wait_for


class Ran(NamedTuple):
    """What a job was given: k, run_dir, ckpt_path, what lay in its directory, the command line."""

    k: float
    run_dir: str | None
    ckpt_path: str | None
    files: list[str]
    argv: list[str]


RAN: list[Ran] = []
CHECKPOINT = "last.ckpt"


@command("train", Train)
def main(plan: Train, cfg: DictConfig) -> None:
    run = Run(plan.run_dir) if plan.run_dir else new_run("job", job=job_directory())
    k = plan.model.k
    files = sorted(path.name for path in run.path.iterdir())
    RAN.append(Ran(k, plan.run_dir, plan.ckpt_path, files, sys.argv[1:]))
    if k == 13:
        raise ValueError("k=13 is unlucky,\nexpected another")
    if k == 14:
        raise TypeError("a bug")
    if k == 15 and plan.ckpt_path is None:
        run.checkpoints.mkdir()
        (run.checkpoints / CHECKPOINT).write_text("")
        raise KeyboardInterrupt
    (run.path / "argv.json").write_text(json.dumps(sys.argv[1:]))
    os.environ["LOCAL_RANK"] = "1"  # what DDP leaves behind
    if k != 16:
        run.write_metrics({"val/fvu/p2": 0.5, "val/fvu/p20": k / 10, "loss": 1})


SWEEPS = {
    "k": """# @package _global_
hydra: {mode: MULTIRUN, sweeper: {params: {model: "matryoshka,vanilla", model.k: "4,13"}}}""",
    "loss": """# @package _global_
hydra: {mode: MULTIRUN, callbacks: {sweep: {metrics: [loss, nowhere]}}, sweeper: {params: {seed: "0,1"}}}""",
}


@pytest.fixture
def conf(elsewhere, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Path:
    conf = shutil.copytree(config_dir("conf"), tmp_path_factory.mktemp("configurations") / "conf")
    (conf / "sweeps").mkdir()
    for name, text in SWEEPS.items():
        (conf / "sweeps" / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("MSAE_RUN_DIR", "")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return conf


class Result(NamedTuple):
    """Of a command line."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(call, conf: Path):
    """Runs `main` as a command line, with what `RAN` had before forgotten."""

    def of(*arguments: str) -> Result:
        RAN.clear()
        return Result(*call(sys.modules[__name__], "-cp", str(conf), *arguments))

    return of


def only_sweep() -> Path:
    (sweep,) = Path("runs/sweeps").iterdir()
    return sweep


def test_one_job_fails_and_the_others_finish(run) -> None:
    code, out, err = run("+sweeps=k")
    assert code == 1
    sweep = only_sweep()
    assert "failed: job 1 (model=matryoshka model.k=13): k=13 is unlucky, expected another\n" in err
    assert err.endswith(f"error: 2 of 4 jobs failed; see {sweep}/summary.csv\n")
    assert "Traceback" not in err
    assert " fvu " in out
    with (sweep / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [[row[key] for key in ("job", "model", "model.k", "val/fvu/p20")] for row in rows] == [
        *(["0", "matryoshka", "4", "0.4"], ["1", "matryoshka", "13", ""]),
        *(["2", "vanilla", "4", "0.4"], ["3", "vanilla", "13", ""]),
    ]
    assert [bool(row["error"]) for row in rows] == [False, True, False, True]
    assert "sweeps" not in rows[0]  # does not vary
    assert [p.name for p in Path().iterdir()] == ["runs"]


def test_the_command_line_beats_the_sweep_file(run) -> None:
    assert run("-m", "+sweeps=k", "model.k=3").code == 0
    jobs = [(job.overrides["model"], job.overrides["model.k"]) for job in read_jobs(only_sweep())]
    assert jobs == [("matryoshka", "3"), ("vanilla", "3")]


def test_a_sweep_file_chooses_what_the_terminal_shows(run) -> None:
    code, out, _ = run("+sweeps=loss")
    assert code == 0
    header = next(line for line in out.splitlines() if "┃" in line)
    assert header.replace("┃", " ").split() == ["n", "loss"]  # what no job measured has no column


def test_a_bug_in_a_job_shows_its_traceback_and_the_others_finish(run) -> None:
    code, _, err = run("-m", "model.k=14,5")
    assert code == 1
    assert "Traceback" in err
    assert "failed: job 0 (model.k=14): TypeError: a bug\n" in err
    assert [job.error for job in read_jobs(only_sweep())] == ["TypeError: a bug", None]


def test_an_unknown_key_fails_every_job(run) -> None:
    code, _, err = run("-m", "model.kk=1,2")
    assert code == 1
    assert "failed: job 1 (model.kk=2): unknown key model.kk; did you mean model.k?\n" in err


def test_a_sweep_that_cannot_be_composed_leaves_nothing(run) -> None:
    assert "error: no model named vanila; did you mean model=vanilla?" in run("-m", "model=matryoshka,vanila").err
    assert not list(Path("runs/sweeps").iterdir())


def test_an_interrupted_sweep_still_reports(run) -> None:
    code, _, err = run("-m", "model.k=4,15,5")
    assert code == 130
    assert "failed: job 1 (model.k=15): stopped before it wrote metrics.json\n" in err
    assert [job.name for job in read_jobs(only_sweep())] == ["0", "1"]


# --- the same command -------------------------------------------------------------------------------------------------


def test_the_same_command_runs_what_is_missing(run) -> None:
    assert run("+sweeps=k").code == 1
    (only_sweep() / "2" / "metrics.json").unlink()  # stopped without a checkpoint
    (only_sweep() / "2" / "half").mkdir()
    code, out, _ = run("+sweeps=k", "runs=runs", "hydra.sweeper.max_batch_size=9")
    assert code == 1
    assert "job 0: model=matryoshka model.k=4 sweeps=k" in out
    assert out.count(": there already\n") == 1
    assert [job.k for job in RAN] == [13, 4, 13]  # failed, stopped, failed
    assert [job.files for job in RAN] == [[".lock", "config.yaml", "overrides.json"]] * 3  # emptied first
    assert sorted(job.name for job in read_jobs(only_sweep()) if job.error is None) == ["0", "2"]


def test_nothing_is_missing(run) -> None:
    arguments = ["-m", "model.k=4,5", "seed=0,1"]
    code, first, _ = run(*arguments)
    assert code == 0
    assert "anew" not in first
    code, again, _ = run(*arguments)
    assert (code, RAN) == (0, [])
    assert again.endswith(f"every job was there already; to run them anew: rm -r {only_sweep()}\n")
    assert first[first.index("┏") :] in again  # the same table
    (only_sweep() / "1" / "error.txt").write_text("why")
    code, out, _ = run(*arguments)
    assert code == 0
    assert "anew" not in out


def test_a_command_that_measures_nothing_has_not_failed_and_is_repeated(run) -> None:
    for _ in range(2):
        assert run("-m", "model.k=16").code == 0
        assert len(RAN) == 1
        assert read_jobs(only_sweep())[0].metrics == {}


def test_a_stopped_job_goes_on_from_its_checkpoint(run) -> None:
    arguments = ["-m", "model.k=15,4"]
    assert run(*arguments).code == 130
    directory = (only_sweep() / "0").resolve()
    # what the stopped job says to type does the same: a sweep's jobs have directories of their own
    code, out, _ = run(*arguments, f"run_dir={directory}", "ckpt_path=last")
    assert code == 0
    assert "goes on from its last checkpoint\n" in out
    resumed, other = RAN
    assert (resumed.run_dir, resumed.ckpt_path) == (str(directory), "last")
    of_other_ranks = [f"++run_dir='{directory}'", "++ckpt_path=last", "hydra.mode=RUN"]
    assert resumed.argv[-3:] == of_other_ranks
    assert (other.run_dir, other.ckpt_path) == (None, None)
    assert Run(directory).setting("run_dir") is None
    assert (directory / "checkpoints").is_dir()


@pytest.mark.parametrize("change", ["error", "checkpoint"])
def test_a_failed_job_or_one_without_last_checkpoint_starts_again(run, monkeypatch, change) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CHECKPOINT", "last.ckpt" if change == "error" else "last.ckpt.tmp")
    assert run("-m", "model.k=15").code == 130
    if change == "error":
        (only_sweep() / "0" / "error.txt").write_text("why")
    assert run("-m", "model.k=15").code == 130
    assert RAN[0].ckpt_path is None
    assert "checkpoints" not in RAN[0].files


def test_changed_settings_are_not_reused(run, conf) -> None:
    """A group that varies is not in the composed config of the sweep, so its file may change under the jobs."""
    assert run("+sweeps=k").code == 1
    vanilla = conf / "model" / "vanilla.yaml"
    vanilla.write_text(vanilla.read_text() + "threshold_rate: 0.5\n")
    code, out, _ = run("+sweeps=k")
    assert code == 1
    assert "job 2: model.threshold_rate was None, is 0.5; it runs anew, and what was there is now in " in out
    assert [job.k for job in RAN] == [13, 4, 13]
    assert json.loads((only_sweep() / "old" / "2" / "metrics.json").read_text())["val/fvu/p20"] == 0.4
    assert len(read_jobs(only_sweep())) == 4  # what is kept is no job
    (only_sweep() / "0" / "config.yaml").write_text("model: {k: ")
    assert "config.yaml cannot be read (" in run("+sweeps=k").out


def test_another_question_has_another_directory(run) -> None:
    for arguments in ("seed=0,1", "seed=0,1,2", "seed=0,1 tokens=7", "+sweeps=loss", "+sweeps=loss seed=0"):
        assert run("-m", *arguments.split()).code == 0
    names = {path.name for path in Path("runs/sweeps").iterdir()}
    assert len(names) == 5
    assert all(name.startswith("tree-") and len(name) == len("tree-") + 8 for name in names)


def test_what_enters_the_name_of_a_sweep() -> None:
    def hydra(*task: str) -> dict:
        return {"overrides": {"task": list(task)}, "sweeper": {"params": None}}

    config = OmegaConf.create({"seed": 0, "runs": "a", "data": {"root": "b", "prefetch": 4}, "hydra": hydra()})
    places = {"runs": "c", "data": {"root": "d", "prefetch": 9}, "hydra": hydra("++runs=c")}
    assert asked(OmegaConf.merge(config, places)) == asked(config)
    params = {"sweeper": {"params": {"seed": "0,1"}}}
    varies = hydra("data.prefetch=1,2")
    for change in ({"seed": 1}, {"hydra": hydra("seed=0")}, {"hydra": varies}, {"hydra": params}):
        assert asked(OmegaConf.merge(config, change)) != asked(config)


def test_a_directory_of_something_else_is_left_alone(run) -> None:
    for jobs in (2, 0):
        assert run("-m", "hydra.sweep.dir=mine", "seed=1,2").code == 0
        assert len(RAN) == jobs
    before = sorted(Path("mine").rglob("*"))
    err = run("-m", "hydra.sweep.dir=mine", "seed=1,2,3").err
    assert err == "error: mine is of another sweep, see its asked.json; give another hydra.sweep.dir\n"
    assert sorted(Path("mine").rglob("*")) == before
    Path("yours").mkdir()
    Path("yours/file").write_text("")
    err = run("-m", "hydra.sweep.dir=yours", "seed=1,2").err
    assert err == "error: yours is not empty and no sweep's; give another hydra.sweep.dir\n"
    Path("runs").write_text("a file")
    assert "Not a directory" in run("-m", "seed=1,2").err


def test_two_processes_do_not_share_a_sweep(run) -> None:
    assert run("-m", "model.k=4,5").code == 0
    file = str(only_sweep() / ".lock")
    holder = f"import filelock; lock = filelock.FileLock({file!r}); lock.acquire(); print(); input()"
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        err = run("-m", "model.k=4,5").err
        process.communicate(b"\n")
    assert err == f"error: another process runs the sweep in {only_sweep()}; wait for it, or stop it first\n"
    assert run("-m", "model.k=4,5").code == 0


def test_a_checkpoint_is_not_for_the_jobs_of_a_sweep(run) -> None:
    code, _, err = run("-m", "seed=1", "ckpt_path=runs/x")
    assert code == 1
    assert "ckpt_path=runs/x: the jobs of a sweep resume by themselves; drop ckpt_path\n" in err


def test_a_wrong_key_of_the_figure_is_one_line(run) -> None:
    err = run("-m", "seed=1", "+hydra.callbacks.sweep.figure={y:1}").err
    assert err == "error: hydra.callbacks.sweep.figure has y; it needs x and may have by, metrics, log_x\n"


def test_a_setting_that_cannot_be_resolved_is_a_difference(tmp_path: Path) -> None:
    Run(tmp_path).write_config({"a": 1})
    assert difference(Run(tmp_path), OmegaConf.create({"a": 1, "runs": "elsewhere"})) is None
    assert "nowhere" in (difference(Run(tmp_path), OmegaConf.create({"a": "${nowhere}"})) or "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_sweep_that_was_stopped_ends_as_one_that_was_not(done) -> None:
    arguments = ["-m", "seed=0,1", *TREE, "tokens=60_000", "checkpoint_every_steps=50"]
    done(train, *arguments, "runs=whole")
    with start(*arguments) as process:
        wait_for("runs/sweeps/*/1/checkpoints/last.ckpt", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert [job.error is None for job in read_jobs(only_sweep())] == [True, False]
    out, _ = done(train, *arguments)
    assert "there already" in out
    assert "goes on from its last checkpoint" in out
    (whole,) = Path("whole/sweeps").iterdir()
    assert whole.name == only_sweep().name  # where it lies does not matter
    for ours, theirs in zip(read_jobs(only_sweep()), read_jobs(whole), strict=True):
        assert {**ours.metrics, "seconds": 0} == {**theirs.metrics, "seconds": 0}
        same_weights(only_sweep() / ours.name, whole / ours.name)


def test_ddp_would_restart_one_job_and_not_the_sweep(run, conf, monkeypatch) -> None:
    """Its other ranks re-run sys.argv; what it leaves in the environment must not reach the next job."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run("-m", "model.k=4,5").code == 0
    arguments = [json.loads((only_sweep() / str(n) / "argv.json").read_text()) for n in range(2)]
    assert arguments[1] == ["-cp", str(conf), "++model.k=5", "hydra.mode=RUN"]
    assert sys.argv[1:] == ["-cp", str(conf), "-m", "++model.k=4,5"]
    assert "LOCAL_RANK" not in os.environ
    with pytest.raises(ZeroDivisionError), own_command_line([]):
        os.environ["LOCAL_RANK"] = str(1 // 0)
    assert sys.argv[3] == "-m"


@pytest.mark.slow
def test_jobs_in_other_processes(conf) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = ["-cp", str(conf), "+sweeps=k", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-c", "import tests.test_sweep as t; t.main()", *arguments]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.endswith(f"error: 2 of 4 jobs failed; see {only_sweep()}/summary.csv\n")
    assert [job.error is None for job in read_jobs(only_sweep())] == [True, False, True, False]


def test_force() -> None:
    """What is a key is forced; groups, flags, and what has a sign already, are not."""
    groups = {"model", "experiment"}
    assert [force(key, groups) for key in ("model.lr=1", "seed=0,1")] == ["++model.lr=1", "++seed=0,1"]
    signed = ["+experiment=a", "++model.lr=1", "~model.lr"]
    for given in ("model=vanilla", *signed, "hydra.mode=RUN", "hydra/launcher=joblib", "--config-name=train"):
        assert force(given, groups) == given
