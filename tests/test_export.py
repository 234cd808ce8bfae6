"""The export command as a user runs it: every format, prefixes, the Hub, and what it says to mistakes."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msae import export, interop
from msae.interop import hub
from msae.sae import MatryoshkaSAE, save_sae
from tests.test_hub import FolderApi

X = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command in this process; returns exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export", *arguments])
        code: object = 0
        try:
            export.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        error = f"{code}\n" if isinstance(code, str) else ""
        return 1 if isinstance(code, str) else int(code or 0), captured.out, captured.err + error  # type: ignore[call-overload]

    return run


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch) -> str:
    """A run directory as training leaves it, seen from where the command runs."""
    monkeypatch.chdir(tmp_path)
    sae = MatryoshkaSAE(8, 24, [4, 10, 24], 2.5)
    sae.threshold.fill_(0.3)
    sae.prefix_thresholds.copy_(torch.tensor([0.05, 0.1, 0.3]))
    sae.metadata = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre"}
    save_sae(sae, "runs/a/sae")
    Path("runs/a/config.yaml").write_text("name: a\nmodel: {k: 2.5}\n")
    Path("runs/a/metrics.json").write_text(json.dumps({"val/fvu/p24": 0.25, "val/fvu/p10": 0.5, "val/l0/p10": 1.5}))
    return "runs/a"


def reference(prefix: int = 24) -> Tensor:
    return interop.load("runs/a")(X, prefix)


@pytest.mark.parametrize("to", ["saelens", "saelens_training", "dictionary_learning"])
def test_export_writes_each_format_and_says_how_to_open_it(to, call, run):
    code, out, err = call(f"sae={run}", f"to={to}", "out=exported/a")
    assert (code, err) == (0, "")
    wrote, opened = out.splitlines()
    files = "ae.pt, config.json" if to == "dictionary_learning" else "cfg.json, sae_weights.safetensors"
    assert wrote == f"exported/a: {files} (d_in 8, d_sae 24, prefixes [4, 10, 24], batch_topk)"
    assert opened.startswith("open it: from ")
    assert '("exported/a"' in opened
    torch.testing.assert_close(interop.load("exported/a")(X), reference())
    assert sorted(p.name for p in Path().iterdir()) == ["exported", "runs"]  # and Hydra wrote nothing

    assert call("sae=exported/a", "out=back")[0] == 0  # what was written is read
    torch.testing.assert_close(interop.load("back")(X), reference())


def test_export_to_sparsify(call):
    sae = MatryoshkaSAE(8, 24, [24], 3, sparsity="topk")
    save_sae(sae, "topk")
    code, out, _ = call("sae=topk", "to=sparsify", "out=layers.8")
    assert code == 0
    assert 'SparseCoder.load_from_disk("layers.8")' in out
    assert Path("layers.8/sae.safetensors").exists()
    torch.testing.assert_close(interop.load("layers.8")(X), sae(X))


def test_export_of_a_prefix(call, run):
    assert call(f"sae={run}/sae", "prefix=10", "out=small")[0] == 0
    small = interop.load("small")
    assert small.prefixes == [4, 10]
    torch.testing.assert_close(small(X), reference(10))
    assert call(f"sae={run}", "prefix=10", "own_threshold=true", "out=own")[0] == 0
    assert float(interop.load("own").threshold[0]) == pytest.approx(0.1)


def test_push_and_pull(call, run, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", partial(FolderApi, tmp_path / "hub"))
    code, out, err = call(f"sae={run}", "push=me/saes", "private=true")
    assert code == 0, err
    assert out.startswith("https://huggingface.co/me/saes/tree/main/blocks.8.hook_resid_pre (d_in 8")
    assert 'SAE.from_pretrained("me/saes", "blocks.8.hook_resid_pre")' in out
    folder = tmp_path / "hub/me/saes/blocks.8.hook_resid_pre"
    assert json.loads((folder / "runner_cfg.json").read_text()) == {"name": "a", "model": {"k": 2.5}}
    assert "| 24 | 0.25 |" in (folder / "README.md").read_text()
    assert "private=True" in (tmp_path / "hub/log").read_text()

    assert call("sae=hub:me/saes/blocks.8.hook_resid_pre", "out=pulled")[0] == 0
    torch.testing.assert_close(interop.load("pulled")(X), reference())

    assert call(f"sae={run}/sae", "prefix=10", "push=me/saes/small/p10")[0] == 0
    card = (tmp_path / "hub/me/saes/small/p10/README.md").read_text()
    assert "| 10 | 0.5 | 1.5 |" in card
    assert "| 24 |" not in card
    assert call(f"sae={run}", "prefix=10", "own_threshold=true", "push=me/saes/own")[0] == 0
    assert "Figures" not in (tmp_path / "hub/me/saes/own/README.md").read_text()  # measured with another threshold


MISTAKES = {
    "nothing to do": (["sae=runs/a"], "nothing to write: give out=<directory> or push=user/repo"),
    "no sae": (["out=x"], "not set: sae; give sae=…"),
    "sae is not there": (["sae=nowhere", "out=x"], "no SAE in nowhere: looked there and in its sae/ for"),
    "format": (["sae=runs/a", "to=saelen", "out=x"], "to is 'saelen', expected 'saelens' | 'saelens_training' |"),
    "typo": (["sae=runs/a", "outt=x"], "unknown key outt; did you mean out?"),
    "out is full": (["sae=runs/a", "out=runs/a/sae"], "out=runs/a/sae is not an empty directory; give another"),
    "out is a file": (["sae=runs/a", "out=runs/a/config.yaml"], "is not an empty directory"),
    "sparsity": (["sae=runs/a", "to=sparsify", "out=x"], "train with model.sparsity=topk, or use to=saelens"),
    "prefix": (["sae=runs/a", "prefix=25", "out=x"], "prefix=25 must lie between 1 and d_sae=24"),
    "threshold": (["sae=runs/a", "prefix=7", "own_threshold=true", "out=x"], "calibrated for 7 latents alone"),
    "threshold of what": (["sae=runs/a", "own_threshold=true", "out=x"], "give prefix=<m> too"),
    "push with to": (["sae=runs/a", "to=sparsify", "push=me/saes"], "to=sparsify needs out=<directory>"),
    "push where": (["sae=runs/a", "push=me"], "'me' names no SAE on the Hub, expected user/repo/sae_id"),
    "pull what": (["sae=hub:me/saes", "out=x"], "sae_id='' is not a folder inside the repo"),
    "pull from elsewhere": (["sae=hub:me/saes/../x", "out=x"], "sae_id='../x' is not a folder inside the repo"),
    "revision of a directory": (["sae=runs/a", "revision=v1", "out=x"], "revision=v1 is of the Hub"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mistake, call):
    arguments, expected = MISTAKES[mistake]
    code, out, err = call(*arguments)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert expected in err
    assert [p.name for p in Path().iterdir()] == ["runs"]


def test_export_imports_neither_lightning_nor_transformer_lens(run):
    code = (
        f"import sys; sys.argv[1:] = ['sae={run}', 'out=exported']\n"
        "from msae.export import main\nmain()\n"
        "print({'lightning', 'transformer_lens', 'transformers', 'datasets', 'huggingface_hub'} & sys.modules.keys())"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert out.stdout.splitlines()[-1] == "set()"
