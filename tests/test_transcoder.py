"""A transcoder from the command line: one hook in, another out, from harvest to export."""

import pytest
import torch

from msae import train
from msae.data.activations import Activations, Data
from msae.runs import open_run
from msae.settings import decode
from tests.commands import metrics_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
LONGER = ["tokens=40_000", "trainer.val_check_interval=100", "model.lr=1e-2"]


def hooks(source: str, target: str) -> list[str]:
    return ["run_dir=run", f"data.source.hook_names=[{source},{target}]", f"data.target_hook_name={target}"]


@pytest.mark.parametrize("normalise", ["unit_variance", "centred"])
def test_a_transcoder_is_trained_evaluated_and_exported(done, lm, normalise):
    source, target = "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_pre"  # 32 wide and 128 wide
    done(train, *lm, *LONGER, *hooks(source, target), f"model.normalise={normalise}")
    run, metrics = open_run("run"), metrics_of("run")
    sae = run.load_sae()
    assert (sae.d_in, sae.d_out, sae.is_transcoder, sae.apply_b_dec_to_input) == (32, 128, True, False)
    assert (sae.metadata["hook_name"], sae.metadata["hook_name_out"]) == (source, target)
    assert {"val/fvu/p64", "val/ce_score/p64"} <= metrics.keys()

    activations = Activations(decode(Data, run.config["data"], "data"))
    assert activations.target is not None
    sides = (activations.rows, activations.target)
    x, y = (torch.cat([s.activations("val", i) for i in range(len(s.rows("val")))]).float() for s in sides)
    x, y = x[len(x) // 2 :], y[len(x) // 2 :]  # the half on which the thresholds were not calibrated
    error = (y - sae(x)).double().square().sum() / (y - y.mean(0)).double().square().sum()
    assert metrics["val/fvu/p64"] == pytest.approx(float(error), rel=1e-4)
    assert error < 0.9


def test_a_target_before_the_input_loses_the_cross_entropy_alone(done, lm):
    _, err = done(train, *lm, *hooks("blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"), "tokens=2000")
    assert "no cross-entropy: blocks.0.hook_resid_pre is computed before" in err
    assert "val/fvu/p64" in metrics_of("run")


def test_a_target_that_is_not_harvested_is_one_line(refused, lm):
    assert refused(train, *lm, "data.target_hook_name=x").startswith("error: data.target_hook_name=x is not among ")
