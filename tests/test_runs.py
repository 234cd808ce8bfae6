"""A run's directory: made once, found again, read safely; and the table of all."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from msae.runs import Arm, Run, all_runs, differing, last_run, new_run, open_run
from msae.runs import __main__ as runs_command


@pytest.fixture(autouse=True)
def first_rank(monkeypatch) -> None:
    monkeypatch.setenv("MSAE_RUN_DIR", "")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")  # of the table


# --- making and finding -----------------------------------------------------------------------------------------------


def test_starts_in_the_same_second_get_different_directories(tmp_path) -> None:
    made = [new_run("tree", str(tmp_path)).path for _ in range(3)]
    assert len(set(made)) == 3
    assert all(path.is_dir() and path.name.startswith("tree-2") for path in made)


def test_run_dir_is_not_overwritten(tmp_path) -> None:
    chosen = tmp_path / "mine"
    assert new_run("tree", run_dir=str(chosen)).path == chosen
    (chosen / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^run_dir=[^\n]*mine is not empty; give ckpt_path=last[^\n]*$"):
        new_run("tree", run_dir=str(chosen))


def test_all_ranks_share_one_directory(tmp_path, monkeypatch) -> None:
    first = new_run("tree", str(tmp_path)).path
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert new_run("tree", str(tmp_path)).path == first.resolve()
    monkeypatch.delenv("MSAE_RUN_DIR")
    with pytest.raises(ValueError, match="give run_dir=…"):
        new_run("tree", str(tmp_path))
    assert new_run("tree", run_dir=str(tmp_path / "given")).path == tmp_path / "given"


def test_the_last_run_of_a_name_is_the_one_with_the_newest_checkpoint(tmp_path) -> None:
    names = ["tree-20260101-000000", "tree-20260102-000000-2", "tree-20260103-000000", "tree-b-20260104-000000"]
    for age, name in enumerate(names):
        checkpoint = Run(tmp_path / name).last_checkpoint
        checkpoint.parent.mkdir(parents=True)
        if age != 2:  # started, and without a checkpoint
            checkpoint.write_text("")
            os.utime(checkpoint, (age, age))
    assert last_run("tree", str(tmp_path)).path.name == names[1]
    with pytest.raises(ValueError, match=r"^ckpt_path=last: no run of forest under [^\n]*$"):
        last_run("forest", str(tmp_path))


def test_a_run_an_arm_and_an_sae_are_opened_by_their_paths(tmp_path) -> None:
    run = Run(tmp_path / "run")
    (run.path / "a" / "sae").mkdir(parents=True)
    run.write_config({"data": {"root": "here"}, "run_dir": "x"})
    run.write_arms([Arm("a", "a", {}), Arm("b", "b", {}, "diverged")])
    for path in (run.path / "a", run.path / "a" / "sae"):
        arm = open_run(path)
        assert (arm.path, arm.setting("data.root")) == (run.path / "a", "here")  # the configuration is that of the run
    assert run.setting("run_dir") is None
    with pytest.raises(ValueError, match=r"^[^\n]*run has several SAEs; give [^\n]*run/<one of a>$"):
        open_run(run.path).load_sae()
    with pytest.raises(ValueError, match=r"^there is no directory nowhere; see python -m msae.runs$"):
        open_run("nowhere")


@pytest.mark.parametrize(
    "name", ["..", ".", "../elsewhere", "a/b", "", "/etc", "link", "inner/../../elsewhere", "a\0b", "a\nb"]
)
def test_no_name_of_an_arm_leads_out_of_its_run(tmp_path, name) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    (run.path / "link").symlink_to(tmp_path)
    run.write_arms([Arm("good", "good", {}), Arm(name, "bad", {})])
    with pytest.raises(ValueError, match=r"arms.json: .* is not a directory of the run$") as error:
        run.arms()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[", "3", "[1]", '{"arms": [{"name": "a"}]}', '{"arms": [], "more": 1}'])
def test_a_damaged_list_of_arms_is_one_line(tmp_path, content) -> None:
    (tmp_path / "arms.json").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*arms.json[^\n]*$"):
        Run(tmp_path).arms()


def test_settings_that_decide_nothing_do_not_differ() -> None:
    saved = {"seed": 0, "runs": "a", "data": {"root": "x", "batch_tokens": 1, "prefetch": 4}}
    assert list(differing(saved, {"seed": 0, "runs": "b", "data": {"root": "y", "batch_tokens": 1}})) == []
    now = {"seed": 1, "data": {"batch_tokens": 1}, "model": {"objective": {"terms": {}}}}
    assert list(differing(saved, now)) == [("model.objective.terms", None, {}), ("seed", 0, 1)]


# --- the table --------------------------------------------------------------------------------------------------------


def make(path: str, metrics: dict[str, Any] | None = None, state: str = "", **settings: Any) -> Run:
    run = Run(path)
    run.path.mkdir(parents=True)
    run.write_config({"name": "tree", "tokens": 5000, **settings})
    if metrics is not None:
        run.write_metrics(metrics)
    if state == "failed":
        run.error_file.write_text("diverged")
    if state == "stopped":
        run.last_checkpoint.parent.mkdir()
        run.last_checkpoint.write_text("")
    time.sleep(0.01)
    return run


def test_every_run_is_listed_with_its_state_figures_and_what_differs(call) -> None:
    figures = {"val/fvu/p4": 0.5, "val/fvu/p32": 0.0123, "val/l0/p32": 1.25, "train/tokens": 5120.0}
    make("runs/one", figures, seed=0, model={"k": 2, "lr": 0.1})
    make("runs/two", None, "stopped", seed=1, model={"k": 2, "lr": 0.1})
    make("runs/sweeps/s/0", None, "failed", seed=0, model={"k": 4, "lr": 0.1})
    arms = make("runs/arms", {"seconds": 3}, seed=0, model={"k": 2, "lr": 0.1}, arms={"a": {"lr": 0.5}})
    arms.write_arms([Arm("a-k8", "a", {"model.k": 8})])
    arms.arm("a-k8").write_metrics(figures)
    assert [str(run) for run in all_runs("runs")] == ["runs/one", "runs/two", "runs/sweeps/s/0", "runs/arms/a-k8"]

    code, out, _ = call(runs_command)
    assert code == 0
    header = next(line for line in out.splitlines() if "FVU" in line)
    assert header.replace("┃", " ").split() == ["run", "when", "state", "tokens", "FVU", "L0", "seed", "k", "lr", "arm"]
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.splitlines() if "runs/" in line}
    cells = {run: [cell.strip() for cell in row][1:] for run, row in rows.items()}
    assert cells["runs/one"] == ["finished", "5,120", "0.0123", "1.25", "0", "2", "0.1", ""]
    assert cells["runs/two"] == ["stopped", "5,000", "", "", "1", "2", "0.1", ""]
    assert cells["runs/sweeps/s/0"] == ["failed", "5,000", "", "", "0", "4", "0.1", ""]
    assert cells["runs/arms/a-k8"] == ["finished", "5,120", "0.0123", "1.25", "0", "8", "0.5", "a"]
    assert "runs/two" not in call(runs_command, "name=one")[1]


def test_a_run_that_cannot_be_read_is_listed_all_the_same(call) -> None:
    make("runs/one", {"val/fvu/p4": "[red]x"}, name="[/red]")
    make("runs/two").metrics_file.write_text("[")
    make("runs/three").arms_file.write_text("[")
    code, out, _ = call(runs_command)
    assert code == 0
    assert all(name in out for name in ("runs/one", "runs/two", "runs/three"))
    Path("runs/two/config.yaml").write_text("a: [")
    code, out, err = call(runs_command)
    assert code == 0
    assert "runs/two/config.yaml cannot be read" in err
    assert "runs/one" in out


def test_what_is_kept_of_a_run_is_plain(tmp_path) -> None:
    run = make(str(tmp_path / "run"), {"a": 1.0}, model={"prefixes": [0.5, 1.0]}, ckpt_path="last")
    assert yaml.safe_load(run.config_file.read_text())["model"] == {"prefixes": [0.5, 1.0]}
    assert json.loads(run.metrics_file.read_text()) == {"a": 1.0}
    assert (run.state, Run(tmp_path / "run" / "nothing").outcome()) == (
        "finished", ({}, "stopped before it wrote metrics.json"),
    )  # fmt: skip
