"""A transcoder from the command line: one hook in, another out, from harvest to export."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from msae import train
from msae.sae import load_sae
from tests.tiny_lm import sentences, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("lm")
    (root / "text.txt").write_text("\n".join(sentences(300)))
    return [
        "+experiment=gpt2_l8",
        f"data.source.model={tiny_model(root / 'model')}",
        f"data.source.text={root / 'text.txt'}",
        *("data.source.context=32", "data.source.tokens=4000", "data.source.chunk_tokens=1024"),
        *("data.source.val_fraction=0.2", "data.batch_tokens=128", f"data.root={root / 'shards'}"),
        *("model.d_sae=64", "model.k=4", "model.warmup_steps=5", "model.lr=1e-2", "evaluation.ce_sequences=4"),
        *("tokens=40_000", "trainer.val_check_interval=100", "run_dir=run"),
    ]


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["msae.train", *arguments])
    train.main()
    return tmp_path / "run"


def hooks(source: str, target: str) -> list[str]:
    return [f"data.source.hook_names=[{source},{target}]", f"data.target_hook_name={target}"]


@pytest.mark.parametrize("normalise", ["unit_variance", "centred"])
def test_a_transcoder_is_trained_evaluated_and_exported(lm, normalise, tmp_path, monkeypatch):
    source, target = "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_pre"  # 32 wide and 128 wide
    directory = run(tmp_path, monkeypatch, *lm, *hooks(source, target), f"model.normalise={normalise}")
    sae, metrics = load_sae(directory / "sae"), json.loads((directory / "metrics.json").read_text())
    assert (sae.d_in, sae.d_out, sae.is_transcoder, sae.apply_b_dec_to_input) == (32, 128, True, False)
    assert (sae.metadata["hook_name"], sae.metadata["hook_name_out"]) == (source, target)
    assert {"val/fvu/p64", "val/ce_score/p64"} <= metrics.keys()

    data = instantiate(OmegaConf.load(directory / "config.yaml").data)
    x, y = data.shards, data.target_shards
    middle = sum(x.rows("val")) // 2
    x, y = (torch.cat([s.activations("val", i) for i in range(len(s.rows("val")))]).float()[middle:] for s in (x, y))
    error = (y - sae(x)).double().square().sum(1).mean() / (y - y.mean(0)).double().square().sum(1).mean()
    assert metrics["val/fvu/p64"] == pytest.approx(float(error), rel=1e-4)
    assert error < 0.9


def test_a_target_before_the_input_loses_the_cross_entropy_alone(lm, tmp_path, monkeypatch, capsys):
    pair = hooks("blocks.1.hook_resid_post", "blocks.0.hook_resid_pre")
    directory = run(tmp_path, monkeypatch, *lm, *pair, "tokens=2000")
    assert "no cross-entropy: blocks.0.hook_resid_pre is computed before" in capsys.readouterr().err
    assert "val/fvu/p64" in json.loads((directory / "metrics.json").read_text())


def test_a_target_that_is_not_harvested_is_one_line(lm, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: data\.target_hook_name=x is not among [^\n]*$"):
        run(tmp_path, monkeypatch, *lm, "data.source.hook_names=[blocks.1.hook_resid_pre]", "data.target_hook_name=x")
