"""The claim on short, seeded runs of the tree: what a vanilla SAE loses, and what nested prefixes keep."""

from pathlib import Path

import pytest

from msae import train
from tests.commands import metrics_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def figures(arm: str, width: int) -> dict[str, float]:
    metrics = metrics_of(Path("run") / arm)
    return {k.removeprefix("truth/"): v for k, v in metrics.items()} | {"fvu": metrics[f"val/fvu/p{width}"]}


def test_fading_recovers_the_tree_that_a_vanilla_sae_absorbs(done):
    """2M rows; tolerances are about three times what seeds 0 and 1 miss; 10 seeds of longer runs: README."""
    arms = "arms={vanilla: {prefixes: [1.0]}, fading: {preset: fading}}"
    done(train, "tokens=2_000_000", "data.batch_tokens=1024", "run_dir=run", arms)
    vanilla, fading = figures("vanilla", 32), figures("fading", 32)
    assert fading["parent_silent_given_child"] <= 0.02
    assert fading["mcc"] >= 0.98
    assert fading["firing_f1"] >= 0.97
    assert abs(fading["cos_child_parent"]) <= 0.06
    assert fading["fvu"] <= 0.003
    assert fading["edge_recall"] == 1
    assert 0.2 <= vanilla["parent_silent_given_child"] <= 0.8
    assert 0.87 <= vanilla["mcc"] <= 0.96
    assert vanilla["cos_child_parent"] >= 0.15
    assert vanilla["fvu"] <= 1e-4
    assert 0.45 <= vanilla["mcc_chance"] <= 0.55


def test_the_published_toy(done):
    """4000 of its 20,000 steps: vanilla absorbs everything (published code: cos 0.70–0.71, MCC 0.865–0.872)."""
    arms = "arms={vanilla: {sampling: {kind: fixed}, prefixes: [20]}, matryoshka: {}}"
    settings = ["preset=nabeshima", "model.d_sae=20", "model.prefixes=[5,20]", "model.k=1.34", "data.batch_tokens=200"]
    done(train, *settings, "tokens=800_000", "run_dir=run", arms)
    vanilla, matryoshka = figures("vanilla", 20), figures("matryoshka", 20)
    assert vanilla["parent_silent_given_child"] >= 0.98
    assert vanilla["cos_child_parent"] == pytest.approx(0.70, abs=0.03)
    assert vanilla["mcc"] == pytest.approx(0.87, abs=0.015)
    # at this length a feature may still be without a latent; 20,000 steps are `+sweeps=nabeshima`
    assert matryoshka["parent_silent_given_child"] <= 0.25
    assert matryoshka["firing_f1"] >= 0.85
    assert matryoshka["mcc"] >= 0.88
    assert matryoshka["fvu"] <= 0.08
