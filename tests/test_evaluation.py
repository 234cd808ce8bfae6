"""Metrics against direct formulas and SAEs made by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from msae.data.batches import ValBatches
from msae.data.harvest import harvest
from msae.evaluation.evaluate import HeldOut, calibrate, evaluate
from msae.evaluation.reconstruction import ReconstructionSums, reconstruction_metrics
from msae.evaluation.truth import truth_metrics
from msae.sae import MatryoshkaSAE
from msae.sources.forest import ForestSource
from tests.test_firings import InMemory

# --- reconstruction --------------------------------------------------------------------------------------------


def example(d_out: int | None = None) -> tuple[MatryoshkaSAE, Tensor]:
    """An SAE, or a transcoder, with every weight random, on rows whose mean is far from 0."""
    generator = torch.Generator().manual_seed(0)
    sae = MatryoshkaSAE(5, 12, [3, 12], 2, d_out=d_out)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
        sae.target_scale.fill_(0.3)
        sae.target_mean.fill_(-2.0 if d_out else 0.0)
        sae.threshold.fill_(1.0)
        sae.b_enc[7] = -1e6  # one latent never fires, one always does
        sae.b_enc[1] = 1e3
    return sae, torch.randn(200, 5, generator=generator) + torch.tensor([3.0, -2.0, 0.0, 1.0, 5.0])


@pytest.mark.parametrize("split", [1, 7, 64, 200])
@pytest.mark.parametrize("transcoder", [False, True])
def test_metrics_equal_their_formulas_however_rows_are_batched(transcoder, split) -> None:
    sae, x = example(3 if transcoder else None)
    target = x @ torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) + 4 if transcoder else x
    pairs = zip(x.split(split), target.split(split), strict=True)
    metrics = reconstruction_metrics(sae, pairs if transcoder else x.split(split))
    y = target.double()
    variance = (y - y.mean(0)).square().sum(1).mean()
    expected = {}
    for width in (3, 12):
        acts = sae.encode(x, width).detach()
        recon = (acts @ sae.W_dec[:width] + sae.b_dec).detach().double() / 0.3 - (2 if transcoder else 0)
        error = (y - recon).square().sum(1).mean()
        density = (acts > 0).double().mean(0)
        values = {
            "mse": error / y.shape[1],
            "fvu": error / variance,
            "l0": (acts > 0).sum(1).double().mean(),
            "dead": (density == 0).double().mean(),
            "cosine": cosine_similarity(y, recon).mean(),
            "l2_ratio": (recon.norm(dim=1) / y.norm(dim=1)).mean(),
            "bias": recon.square().sum(1).mean() / (y * recon).sum(1).mean(),
            "dense_1pct": (density > 0.01).double().mean(),
            "dense_10pct": (density > 0.1).double().mean(),
        }
        expected |= {f"{name}/p{width}": float(value) for name, value in values.items()}
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert 1 / 12 <= metrics["dead/p12"] < 1
    assert 1 / 3 <= metrics["dense_10pct/p3"] <= metrics["dense_1pct/p3"]


def test_sums_of_two_processes_add_up() -> None:
    sae, x = example()
    first, second = ReconstructionSums(sae), ReconstructionSums(sae)
    first.update(sae, x[:130])
    second.update(sae, x[130:])
    for name, tensor in first.tensors.items():
        tensor += second.tensors[name]
    assert first.metrics() == pytest.approx(reconstruction_metrics(sae, [x]), rel=1e-6)


def test_a_far_mean_costs_no_precision() -> None:
    """A mean ten thousand times the spread: float32 sums would lose the variance."""
    sae, x = example()
    x = x + 1e4
    sae.scale.fill_(1.0)
    sae.threshold.fill_(1e9)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
    assert reconstruction_metrics(sae, x.split(50))["fvu/p12"] == pytest.approx(1, rel=1e-3)


def test_rows_of_zeros_have_no_direction_and_no_ratio() -> None:
    sae, x = example()
    with_zeros = reconstruction_metrics(sae, torch.cat([torch.zeros(100, 5), x]).split(150))
    without = reconstruction_metrics(sae, [x])
    for name in ("cosine/p12", "l2_ratio/p12"):
        assert with_zeros[name] == pytest.approx(without[name], rel=1e-6)
    zeros_alone = reconstruction_metrics(sae, [torch.zeros(9, 5)])
    assert {name for name, value in zeros_alone.items() if math.isnan(value)} >= {"fvu/p3", "fvu/p12"}
    assert not any(map(math.isinf, zeros_alone.values()))


# --- held-out rows ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    source = ForestSource(rows=64, val_rows=1000, chunk_rows=64)
    return harvest(source, tmp_path_factory.mktemp("shards"), show=False)["synthetic"]


@pytest.mark.parametrize("sparsity", ["batch_topk", "topk", {"name": "jumprelu", "threshold_init": 0.2}, "l1", "log"])
def test_calibration_sets_the_thresholds_of_batch_topk_alone(sparsity, shards) -> None:
    sae = MatryoshkaSAE(20, 32, [4, 16, 32], 2, sparsity=sparsity)
    with torch.no_grad():  # rows that are alike must not have the same codes
        sae.b_enc.add_(0.1), sae.W_enc.add_(0.3 * torch.randn(20, 32, generator=torch.Generator().manual_seed(0)))
    before = sae.threshold.detach().clone()
    calibrate(sae, ValBatches(shards, 64, start=100, stop=600))
    if sparsity != "batch_topk":
        torch.testing.assert_close(sae.threshold.detach(), before, equal_nan=True)
        assert sae.prefix_thresholds.isnan().all()
        return
    pre = sae.pre(shards.activations("val", 0)[100:600])
    assert (sae.threshold == sae.prefix_thresholds[-1]).all()
    for width, threshold in zip(sae.prefixes, sae.prefix_thresholds, strict=True):
        assert int((pre[:, :width] > threshold).sum()) <= 2 * len(pre)
        assert int((pre[:, :width] >= threshold).sum()) > 2 * len(pre) or threshold == 0


def thresholded() -> MatryoshkaSAE:
    sae = MatryoshkaSAE(20, 32, [4, 32], 2)
    sae.threshold.fill_(0.2)
    return sae


def test_evaluation_streams_the_held_out_rows(shards) -> None:
    """Rows in batches of another size, from one in the middle on, have the figures of all at once."""
    sae, x = thresholded(), shards.activations("val", 0)[300:]
    metrics = evaluate(sae, HeldOut(shards, start=300, batch_tokens=64))
    expected = {
        **{f"val/{name}": value for name, value in reconstruction_metrics(sae, [x]).items()},
        "train/k": 2,
        **{f"truth/{name}": value for name, value in truth_metrics(sae, InMemory([x]), shards.truth, 300).items()},
    }
    assert metrics == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert metrics["truth/l0"] == pytest.approx(metrics["val/l0/p32"])
