"""Every mistake in a command line or a config file is one line that names the key; what a command line is besides."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import hydra
import pytest
from omegaconf import OmegaConf

from msae import evaluate, explore, export, harvest, train
from msae.cli.command import compose, config_dir
from msae.runs import __main__ as runs
from msae.settings import keys
from msae.training.settings import Train
from tests.commands import ENVIRONMENT, one_line

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

MISTAKES = {
    # unknown keys and choices
    "model.prefixs=[1]": "unknown key model.prefixs; did you mean model.prefixes?",
    "k=3": "unknown key k; did you mean model.k?",
    "+model.prefixs=[1]": "unknown key model.prefixs; did you mean model.prefixes?",
    "model.objective.aux.coeficient=1": "did you mean model.objective.aux.coefficient?",
    "model.warmup_shape=cosine": "did you mean model.schedule.warmup_shape?",
    "model.sparsity={name:jumprelu,bandwidt:1}": "did you mean model.sparsity.bandwidth?",
    "+experimnt=gpt2_l8": "unknown key experimnt; did you mean +experiment?",
    "model.zzzzzz=1": "unknown key model.zzzzzz; valid here: adam, apply_b_dec_to_input, d_in, d_out, d_sae, ",
    "trainer.anything=3": "unknown key trainer.anything; valid here: accelerator, ",
    "trainer.callbacks=[{_target_:lightning.Trainer,dvices:1}]": "did you mean trainer.callbacks.0.devices?",
    "-cd=conf +experiment=typo": "unknown key model.d_sea; did you mean model.d_sae?",
    "+experiment=gpt2_l9": "no experiment named gpt2_l9; did you mean experiment=gpt2_l8? (there are: ",
    "experiment=gpt2_l8": "To append to your default list use +experiment=gpt2_l8",
    "+sweeps=absorption_by_widht": "no sweeps named absorption_by_widht; did you mean sweeps=absorption_by_width?",
    "model=vanila": "no model named vanila; did you mean model=vanilla? (there are: matryoshka, vanilla)",
    "preset=busmann": "no preset named busmann; did you mean preset=bussmann?",
    "model.objective.terms={orthogonal:1}": "model.objective.terms has orthogonal; there is orthogonality",
    # values
    "+experiment=gpt2_l8 data.source.text=???": "not set: data.source.text; give data.source.text=…",
    "~model.d_sae": "not set: model.d_sae; give model.d_sae=…",
    "data=language_model": "not set: data.source.model, data.source.hook_names, data.source.text; give ",
    "model.k=abc": "model.k=abc: expected number > 0",
    "model.lr=nan": "model.lr=nan: expected number > 0 | null",
    "model.encoder_bias=1": "model.encoder_bias=1: expected true | false",
    "model.sparsity=batchtopk": "model.sparsity=batchtopk: expected batch_topk | topk | jumprelu | l1 | log",
    "model.sparsity={name:jumprelu,bandwidth:0}": "model.sparsity.bandwidth=0: expected number > 0",
    "data.source=3": "data.source=3 is not a source of activations; see conf/data",
    "seed=x": "error: seed=x: expected int\n",  # not of each key that refers to it
    "trainer.max_epochs=x": "trainer.max_epochs=x: expected int | null",
    "trainer.max_steps=3": "trainer.max_steps is set by msae",
    "trainer.precision=16-mixed": "use bf16-mixed",
    # values that do not fit each other, before a row is made
    "model.prefixes=[8,4,32]": "must be positive and strictly increasing",
    "model.prefixes=[4,8]": "must end at d_sae=32",
    "model.k=33": "model.k=33 must be positive and at most d_sae=32",
    "model.sparsity=topk": "model.k=1.25 must be whole with model.sparsity=topk",
    "model.objective.reduction=[1,2]": "model.objective.reduction has 2 weights for 3 levels",
    # what Hydra and YAML refuse
    "name='${'": "full_key: name",
    "tokens=${nowhere}": "Interpolation key 'nowhere' not found",
    "trainer._target_=lightning.Trainr": "trainer._target_=lightning.Trainr cannot be loaded: Invalid python path: ",
    "model.k=[1": "cannot read 'model.k=[1': no viable alternative",
    "model.k=1,2": "Ambiguous value for argument 'model.k=1,2'",
    "~model.zz": "Could not delete from config. 'model.zz' does not exist.",
    "hydra.fo=1": "use +hydra.fo=1: Key 'fo' not in 'HydraConf'",
    "-cd=conf +experiment=broken": "broken.yaml",
    "--config-name=trian": "Cannot find primary config 'trian'",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_makes_nothing(call, arguments) -> None:
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/typo.yaml").write_text("# @package _global_\nmodel: {d_sea: 16}")
    Path("conf/experiment/broken.yaml").write_text("# @package _global_\nmodel: {d_sae: ]")
    code, _, err = call(train, *arguments.split(" "))
    assert (code, err) == (1, f"{one_line(err)}\n")
    assert MISTAKES[arguments] in err
    assert [path.name for path in Path().iterdir()] == ["conf"]


@pytest.mark.parametrize(
    ("command", "arguments", "line"),
    [
        (explore, ["run=x", "token=1"], "unknown key token; did you mean tokens?"),
        (runs, ["runs=nowhere"], "there are no runs in nowhere; python -m msae.train makes one"),
        (harvest, ["model.d_sea=3"], "unknown key model.d_sea; did you mean model.d_sae?"),
        (harvest, ["data=language_model"], "not set: data.source.model, data.source.hook_names,"),
    ],
)
def test_other_commands_check_theirs(refused, command, arguments, line) -> None:
    assert line in refused(command, *arguments)


def test_an_experiment_serves_a_command_that_does_not_use_all_of_it(done, refused) -> None:
    small = ["data.source.rows=64", "data.source.val_rows=64"]
    done(harvest, *small, "model.d_sae=???", "tokens=???")
    line = refused(harvest, *small, "tokens=???", "data.source.seed=${tokens}")
    assert line == "error: not set: tokens; give tokens=…"


@pytest.fixture
def raises(monkeypatch):
    """Training raises the given error."""
    return lambda error: monkeypatch.setattr("msae.training.job.train", Mock(side_effect=error))


def test_a_bug_keeps_its_traceback_and_a_user_s_mistake_is_a_line(call, refused, raises, monkeypatch) -> None:
    raises(TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        call(train)
    raises(ValueError("unlucky,\nexpected another"))
    assert refused(train) == "error: unlucky, expected another"
    raises(FileNotFoundError(2, "No such file", "x"))
    assert "No such file" in refused(train)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(FileNotFoundError):
        call(train)
    with pytest.raises(hydra.errors.HydraException):
        call(train, "model=vanila")


def test_interrupt(call, raises) -> None:
    exit_of_lightning = SystemExit(1)
    exit_of_lightning.__context__ = KeyboardInterrupt()
    for error in (KeyboardInterrupt(), exit_of_lightning):
        raises(error)
        assert call(train)[::2] == (130, "interrupted\n")


@pytest.mark.parametrize("command", [train, harvest, export, evaluate, explore, runs])
def test_help_names_every_key(done, command) -> None:
    out, err = done(command, "--help")
    assert err == ""
    assert "docs/settings.md" in out
    assert not list(Path().iterdir())
    if command is train:
        for group in ("model.objective.aux", "model.schedule", "data"):
            leaves = [key.name for key in keys(Train) if key.name.rpartition(".")[0] == group]
            line = next(line for line in out.splitlines() if line.split()[:1] == [f"{group}."])
            assert all(name.rpartition(".")[2] in line for name in leaves)
        for choices in ("matryoshka, vanilla", "bussmann, dictionary_learning", "gpt2_l8"):
            assert choices in out


def test_hydra_flags_work(done) -> None:
    out, _ = done(train, "--cfg", "job")
    assert "d_sae: 32" in out
    assert not list(Path().iterdir())


def test_a_process_of_its_own_from_another_directory(elsewhere) -> None:
    """Exit code and one line, as a shell sees them, and before what takes seconds is imported."""
    slow = "{'lightning', 'transformer_lens'} & sys.modules.keys()"
    code = f"import sys; from msae.train import main\ntry: main()\nfinally: assert not {slow}"

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    assert "model: matryoshka" in start("--info", "defaults").stdout.replace("model/matryoshka", "model: matryoshka")
    mistake = start("model.kk=1")
    assert (mistake.returncode, mistake.stderr) == (1, "error: unknown key model.kk; did you mean model.k?\n")
    Path("t.txt").write_text("text")
    nowhere = start("+experiment=gpt2_l8", "data.source.model=/nowhere", "data.source.text=t.txt")
    assert nowhere.stderr.startswith("error: there is no directory /nowhere;")
    assert os.listdir() == ["t.txt"]


def test_config_dir_names_what_is_missing() -> None:
    assert (config_dir("conf") / "train.yaml").is_file()
    with pytest.raises(FileNotFoundError, match="no nowhere/ in"):
        config_dir("nowhere")


def test_harvest_has_the_keys_of_training() -> None:
    assert set(compose("harvest")) == {*compose("train"), "verify"}


@pytest.mark.parametrize("file", sorted(config_dir("sweeps").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_sweep_file_opens_with_its_question(file) -> None:
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith("?")
    assert OmegaConf.load(file).hydra.mode == "MULTIRUN"
