"""The export command as a user runs it: every format, prefixes, the Hub, and what it says to mistakes."""

import json
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
from msae.runs import open_run
from msae.sae import MatryoshkaSAE, save_sae
from tests.commands import ENVIRONMENT
from tests.test_hub import FolderApi

X = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
RUN = "runs/a"


@pytest.fixture
def call(call):
    """Runs the command in this process; returns exit code, standard output, standard error."""
    return partial(call, export)


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch) -> None:
    """A run directory as training leaves it, seen from where the command runs."""
    monkeypatch.chdir(tmp_path)
    sae = MatryoshkaSAE(8, 24, [4, 10, 24], 2.5)
    sae.threshold.fill_(0.3)
    sae.prefix_thresholds.copy_(torch.tensor([0.05, 0.1, 0.3]))
    sae.metadata = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre"}
    save_sae(sae, f"{RUN}/sae")
    Path(RUN, "config.yaml").write_text("name: a\nmodel: {k: 2.5}\n")
    Path(RUN, "metrics.json").write_text(json.dumps({"val/fvu/p24": 0.25, "val/fvu/p10": 0.5, "val/l0/p10": 1.5}))


def recon(directory: str, prefix: int | None = None) -> Tensor:
    return open_run(directory).load_sae()(X, prefix)


@pytest.mark.parametrize("to", export.FORMATS)
def test_export_writes_each_format_and_says_how_to_open_it(to, call):
    source, sparsity = RUN, "batch_topk"
    if to == "sparsify":
        source, sparsity = "topk", "topk"
        save_sae(MatryoshkaSAE(8, 24, [4, 10, 24], 3, sparsity=sparsity), source)
    code, out, err = call(f"sae={source}", f"to={to}", "out=exported/layers.8")
    assert (code, err) == (0, "")
    wrote, opened = out.splitlines()
    of_form = {"dictionary_learning": "ae.pt, config.json", "sparsify": "cfg.json, sae.safetensors"}
    files = of_form.get(to, "cfg.json, sae_weights.safetensors")
    assert wrote == f"exported/layers.8: {files} (d_in 8, d_sae 24, prefixes [4, 10, 24], {sparsity})"
    assert re.fullmatch(r'open it: from \w.+\("exported/layers.8".*\)', opened)
    torch.testing.assert_close(recon("exported/layers.8"), recon(source))
    assert {p.name for p in Path().iterdir()} - {"topk"} == {"exported", "runs"}  # and Hydra wrote nothing

    assert call("sae=exported/layers.8", "out=back")[0] == 0  # what was written is read
    torch.testing.assert_close(recon("back"), recon(source))


def test_export_of_a_prefix(call):
    assert call(f"sae={RUN}/sae", "prefix=10", "out=small")[0] == 0
    assert interop.load("small").prefixes == [4, 10]
    torch.testing.assert_close(recon("small"), recon(RUN, 10))
    assert call(f"sae={RUN}", "prefix=10", "own_threshold=true", "out=own")[0] == 0
    assert float(interop.load("own").threshold[0]) == pytest.approx(0.1)


def test_push_and_pull(call, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", partial(FolderApi, tmp_path / "hub"))
    repo = tmp_path / "hub/me/saes"
    code, out, err = call(f"sae={RUN}", "push=me/saes", "private=true")
    assert code == 0, err
    assert out.startswith("https://huggingface.co/me/saes/tree/main/blocks.8.hook_resid_pre (d_in 8")
    assert 'SAE.from_pretrained("me/saes", "blocks.8.hook_resid_pre")' in out
    folder = repo / "blocks.8.hook_resid_pre"
    assert json.loads((folder / "runner_cfg.json").read_text()) == {"name": "a", "model": {"k": 2.5}}
    assert "| 24 | 0.25 |" in (folder / "README.md").read_text()
    assert "private=True" in (tmp_path / "hub/log").read_text()

    assert call("sae=hub:me/saes/blocks.8.hook_resid_pre", "out=pulled")[0] == 0
    torch.testing.assert_close(recon("pulled"), recon(RUN))
    assert call("sae=hub:me/saes/blocks.8.hook_resid_pre", "push=me/saes/again")[0] == 0
    assert not (repo / "again/runner_cfg.json").exists()

    assert call(f"sae={RUN}/sae", "prefix=10", "push=me/saes/small/p10")[0] == 0
    card = (repo / "small/p10/README.md").read_text()
    assert "| 10 | 0.5 | 1.5 |" in card
    assert "| 24 |" not in card
    assert call(f"sae={RUN}", "prefix=10", "own_threshold=true", "push=me/saes/own")[0] == 0
    assert "Figures" not in (repo / "own/README.md").read_text()  # measured with another threshold


MISTAKES = {
    "sae=runs/a": "nothing to write: give out=<directory> or push=user/repo",
    "out=x": "not set: sae; give sae=…",
    "sae=nowhere out=x": "there is no directory nowhere; see python -m msae.runs",
    "sae=runs out=x": "no SAE in runs: looked for sae_weights.safetensors (SAELens, msae)",
    "sae=runs/a to=saelen out=x": "to=saelen: expected saelens | saelens_training |",
    "sae=runs/a outt=x": "unknown key outt; did you mean out?",
    "sae=runs/a out=runs/a/sae": "out=runs/a/sae is not an empty directory; give another",
    "sae=runs/a out=runs/a/config.yaml": "is not an empty directory",
    "sae=runs/a to=sparsify out=x": "train with model.sparsity=topk, or use to=saelens",
    "sae=runs/a prefix=25 out=x": "prefix=25 must lie between 1 and d_sae=24",
    "sae=runs/a prefix=0 out=x": "prefix=0: expected int ≥ 1",
    "sae=runs/a prefix=7 own_threshold=true out=x": "calibrated for 7 latents alone",
    "sae=runs/a own_threshold=true out=x": "give prefix=<m> too",
    "sae=runs/a to=sparsify push=me/saes": "to=sparsify needs out=<directory>",
    "sae=runs/a push=me": "'me' names no SAE on the Hub, expected user/repo/sae_id",
    "sae=hub:me/saes out=x": "sae_id='' is not a folder inside the repo",
    "sae=hub:me/saes/../x out=x": "sae_id='../x' is not a folder inside the repo",
    "sae=runs/a revision=v1 out=x": "revision=v1 is of the Hub",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, call):
    code, out, err = call(*arguments.split())
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert MISTAKES[arguments] in err
    assert [p.name for p in Path().iterdir()] == ["runs"]


def test_export_imports_neither_lightning_nor_transformer_lens():
    code = (
        f"import sys; sys.argv[1:] = ['sae={RUN}', 'out=exported']\n"
        "from msae.export import main\nmain()\n"
        "print({'lightning', 'transformer_lens', 'transformers', 'datasets', 'huggingface_hub'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert out.stdout.splitlines()[-1] == "set()"
