"""Every mistake in a command line or a config file is one line that names the key; dummy targets."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from msae.config import command, compose, config_dir, run_directory
from msae.schema import HarvestConfig, TrainConfig, check

REPOSITORY = Path(__file__).parent.parent


@dataclass
class Source:
    text: str
    rows: int = 4


class Model:
    def __init__(
        self,
        d_sae: int,
        prefixes: list[int | float],
        k: int | float = 4,
        lr: float = 1e-3,
        d_in: int | None = None,
        nested: bool = True,
    ) -> None:
        if k == 13:
            raise ValueError("k=13 is unlucky,\nexpected another")
        if k == 14:
            raise TypeError("a bug")


class Data:
    def __init__(
        self,
        source: Source,
        exhausted: Literal["repeat", "stop"] = "repeat",
        max_disk_gb: float | None = None,
        limits: dict[str, int] | None = None,
        root: Path = Path("shards"),
        shape: tuple[int, int] = (1, 2),
    ) -> None: ...


class Trainer:
    def __init__(self, max_steps: int = 1, **kwargs: Any) -> None: ...


@command("train", TrainConfig)
def main(cfg: DictConfig) -> None:
    directory = run_directory(cfg.name, cfg.runs, cfg.run_dir, cfg.ckpt_path is not None)
    hydra.utils.instantiate(cfg.model)
    if cfg.seed == 99:
        raise KeyboardInterrupt
    if cfg.seed == 97:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # what Lightning makes of it
    if cfg.seed == 98:
        (directory / "no" / "such").open()
    print("finished in", directory)


DATA = "_target_: tests.test_config.Data\nsource:\n  _target_: tests.test_config.Source\n  text: {text}"
FILES = {
    "model/matryoshka.yaml": "{_target_: tests.test_config.Model, d_sae: 8, prefixes: [2, 1.0]}",
    "model/vanilla.yaml": "defaults: [matryoshka, _self_]\nprefixes: [1.0]",
    "data/tree.yaml": DATA.format(text="a"),
    "data/lm.yaml": DATA.format(text="'???'"),
    "trainer/default.yaml": "_target_: tests.test_config.Trainer",
    "experiment/gpt2_l8.yaml": "# @package _global_\ndefaults: [{override /data: lm}]\nname: gpt2_l8",
    "experiment/typo.yaml": "# @package _global_\nmodel: {d_sea: 16}",
    "experiment/broken.yaml": "# @package _global_\nmodel: {d_sae: ]",
}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / "conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in ("train", "harvest"):
        (tmp_path / "conf" / f"{name}.yaml").write_text((config_dir("conf") / f"{name}.yaml").read_text())
    return tmp_path / "conf"


Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `main` in this process as the interpreter would; the exit code and what stderr shows."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MSAE_RUN_DIR", "")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", "-cp", str(conf), *arguments])
        try:
            main()
        except SystemExit as ex:
            text = f"{ex.code}\n" if isinstance(ex.code, str) else ""
            return (1 if text else int(ex.code or 0)), capsys.readouterr().err + text
        return 0, capsys.readouterr().err

    return run


MISTAKES = {
    "model.prefixs=[1]": "unknown key model.prefixs; did you mean model.prefixes?",
    "model.kk=1": "unknown key model.kk; did you mean model.k?",
    "k=3": "unknown key k; did you mean model.k?",
    "prefixs=[1]": "unknown key prefixs; did you mean model.prefixes?",
    "+model.prefixs=[1]": "unknown key model.prefixs; did you mean model.prefixes?",
    "data.source.txt=a": "unknown key data.source.txt; did you mean data.source.text?",
    "evaluation.ce_sequence=3": "unknown key evaluation.ce_sequence; did you mean evaluation.ce_sequences?",
    "tokns=3": "unknown key tokns; did you mean tokens?",
    "+experimnt=gpt2_l8": "unknown key experimnt; did you mean +experiment?",
    "model.zzzzzz=1": "unknown key model.zzzzzz; valid here: d_in, d_sae, k, lr, nested, prefixes",
    "+experiment=typo": "unknown key model.d_sea; did you mean model.d_sae?",
    "+experiment=gpt2_l9": "no experiment named gpt2_l9; did you mean experiment=gpt2_l8? (there are: ",
    "experiment=gpt2_l8": "To append to your default list use +experiment=gpt2_l8",
    "+sweeps=absorption_by_widht": "no sweeps named absorption_by_widht; did you mean sweeps=absorption_by_width?",
    "model=vanila": "no model named vanila; did you mean model=vanilla? (there are: matryoshka, vanilla)",
    "+experiment=gpt2_l8": "not set: data.source.text; give data.source.text=…",
    "~model.d_sae": "not set: model.d_sae; give model.d_sae=…",
    "model.k=abc": "model.k is 'abc', expected int | float",
    "model.k=true": "model.k is True, expected int | float",
    "model.lr=null": "model.lr is None, expected float",
    "model.nested=1": "model.nested is 1, expected bool",
    "model.d_in=1.5": "model.d_in is 1.5, expected int | None",
    "model.prefixes=3": "model.prefixes is 3, expected list[int | float]",
    "model.prefixes=[1,a]": "model.prefixes is [1, 'a'], expected list[int | float]",
    "data.exhausted=stopp": "data.exhausted is 'stopp', expected 'repeat' | 'stop'",
    "data.limits={a: b}": "data.limits is {'a': 'b'}, expected dict[str, int] | None",
    "data.shape=[1]": "data.shape is [1], expected tuple[int, int]",
    "data.source=3": "data.source is 3, expected Source",
    "data.source.rows=x": "data.source.rows is 'x', expected int",
    "seed=x": "seed is 'x', expected int",
    "evaluation.ce_sequences=x": "evaluation.ce_sequences is 'x', expected int",
    "trainer.max_steps=x": "trainer.max_steps is 'x', expected int",
    "name='${'": "full_key: name",
    "tokens=${nowhere}": "Interpolation key 'nowhere' not found",
    "model._target_=tests.test_config.Modl": "model._target_ 'tests.test_config.Modl' cannot be loaded",
    "model.k=[1": "cannot read 'model.k=[1': no viable alternative",
    "model.k=1,2": "Ambiguous value for argument 'model.k=1,2'",
    "~model.zz": "Could not delete from config. 'model.zz' does not exist.",
    "hydra.fo=1": "use +hydra.fo=1: Key 'fo' not in 'HydraConf'",
    "+experiment=broken": "broken.yaml",
    "--config-name=trian": "Cannot find primary config 'trian'",
    "model.k=13": "k=13 is unlucky, expected another",
    "seed=98": "No such file or directory",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_one_line(call: Call, argument: str) -> None:
    code, err = call(argument)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert MISTAKES[argument] in err


@pytest.mark.parametrize(
    "argument",
    [
        "model=vanilla",
        "model.lr=1",  # an int for a float, and a key that no file wrote
        "model.d_in=3",
        "data.limits={a: 1}",
        "data.source={_target_: tests.test_config.Source, text: b, _convert_: all}",
        "data.root=elsewhere",
        "data.shape=[1,2]",
        "trainer.anything=[1]",  # **kwargs
        "+trainer.callbacks=[{_target_: tests.test_config.Source, text: b}]",
        "model.k=0.5",
    ],
)
def test_what_the_signature_allows_is_accepted(call: Call, argument: str) -> None:
    assert call(argument) == (0, "")


def test_a_target_inside_a_list_is_checked(call: Call) -> None:
    code, err = call("+trainer.callbacks=[{_target_: tests.test_config.Source, txt: b}]")
    assert (code, err) == (
        1,
        "error: unknown key trainer.callbacks.0.txt; did you mean trainer.callbacks.0.text?\n",
    )


def test_an_experiment_serves_a_command_that_does_not_use_all_of_it(conf: Path) -> None:
    cfg = OmegaConf.load(conf / "train.yaml")
    assert isinstance(cfg, DictConfig)
    del cfg["defaults"], cfg["hydra"]
    for group, name in (("model", "matryoshka"), ("data", "tree"), ("trainer", "default")):
        cfg[group] = OmegaConf.load(conf / group / f"{name}.yaml")
    cfg.tokens, cfg.model.d_sae, cfg.verify = "???", "???", None
    check(cfg, HarvestConfig)
    cfg.data.source.text = "???"
    with pytest.raises(ValueError, match=r"^not set: data\.source\.text;"):
        check(cfg, HarvestConfig)
    cfg.data.source.text = "${tokens}"
    with pytest.raises(ValueError, match=r"^not set: tokens; give tokens=…$"):
        check(cfg, HarvestConfig)
    cfg.model.d_sea = 3
    cfg.data.source.text = "a"
    with pytest.raises(ValueError, match=r"^unknown key model\.d_sea"):
        check(cfg, HarvestConfig)


def test_what_the_command_supplies_may_be_null() -> None:
    @dataclass
    class Schema:
        supplied: ClassVar[tuple[str, ...]] = ("model.d_sae",)
        model: Any

    node = {"_target_": "tests.test_config.Model", "prefixes": [1.0]}
    check(OmegaConf.create({"model": {**node, "d_sae": None}}), Schema)
    check(OmegaConf.create({"model": node}), Schema)
    with pytest.raises(ValueError, match=r"model\.d_sae is 'x', expected int"):
        check(OmegaConf.create({"model": {**node, "d_sae": "x"}}), Schema)


def test_a_bug_keeps_its_traceback(call: Call) -> None:
    with pytest.raises(hydra.errors.InstantiationException) as raised:
        call("model.k=14")
    assert isinstance(raised.value.__cause__, TypeError)


@pytest.mark.parametrize("argument", ["model.k=13", "model=vanila"])
def test_the_traceback_comes_on_request(call: Call, monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(hydra.errors.HydraException):
        call(argument)


def test_interrupt(call: Call) -> None:
    assert call("seed=99") == (130, "interrupted\n")
    assert call("seed=97") == (130, "interrupted\n")


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_hydra_flags_work(call: Call, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*flags) == (0, "")
    assert not list(Path().iterdir())


def test_nothing_is_left_behind_but_the_run(call: Call) -> None:
    assert call() == (0, "")
    (run,) = Path("runs").iterdir()
    assert [p.name for p in Path().iterdir()] == ["runs"]
    assert re.fullmatch(r"tree-\d{8}-\d{6}", run.name)
    assert not list(run.iterdir())


def test_starts_in_the_same_second_get_different_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSAE_RUN_DIR", "")
    made = [run_directory("tree", str(tmp_path)) for _ in range(3)]
    assert len(set(made)) == 3
    assert all(path.is_dir() for path in made)


def test_run_dir_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSAE_RUN_DIR", "")
    chosen = str(tmp_path / "mine")
    assert run_directory("tree", run_dir=chosen) == Path(chosen)
    (tmp_path / "mine" / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty; give ckpt_path=last"):
        run_directory("tree", run_dir=chosen)
    assert run_directory("tree", run_dir=chosen, resume=True) == Path(chosen)


def test_all_ranks_share_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSAE_RUN_DIR", "")
    first = run_directory("tree", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_directory("tree", str(tmp_path)) == first.resolve()
    monkeypatch.delenv("MSAE_RUN_DIR")
    with pytest.raises(ValueError, match="give run_dir=…"):
        run_directory("tree", str(tmp_path))
    assert run_directory("tree", run_dir=str(tmp_path / "given")) == tmp_path / "given"


def test_a_process_of_its_own_from_another_directory(conf: Path, tmp_path: Path) -> None:
    """Exit code, one line and no torch, as a shell sees them."""
    code = "import sys, tests.test_config as t; t.main(); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    here = tmp_path / "here"
    here.mkdir()

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "-cp", str(conf), *arguments]
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)

    assert "model/matryoshka" in start("--info", "defaults").stdout
    good, bad, bug = start(), start("model.kk=1"), start("model.k=14")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("finished in runs/tree-")
    assert (bad.returncode, bad.stderr) == (1, "error: unknown key model.kk; did you mean model.k?\n")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr
    assert start("model._target_=tests.test_config.Modl").stderr.count("\n") == 1
    assert sorted(p.name for p in here.iterdir()) == ["runs"]


def test_config_dir_names_what_is_missing() -> None:
    assert (config_dir("conf") / "train.yaml").is_file()
    with pytest.raises(FileNotFoundError, match="no nowhere/ in"):
        config_dir("nowhere")


def test_harvest_has_the_keys_of_training() -> None:
    train, harvest = compose("train"), compose("harvest", ["model.some_key=3"])
    assert set(harvest) == {*train, "verify"}
    assert harvest.model.some_key == 3


@pytest.mark.parametrize("file", sorted(config_dir("sweeps").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_sweep_file_opens_with_its_question(file: Path) -> None:
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith("?")
    assert OmegaConf.load(file).hydra.mode == "MULTIRUN"
    compose("train", [f"+sweeps={file.stem}"])
