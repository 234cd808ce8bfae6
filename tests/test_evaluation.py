"""Metrics against direct formulas and SAEs made by hand."""

import math

import pytest
import torch
from torch import Tensor

from msae.data.batches import ValBatches
from msae.data.harvest import harvest
from msae.data.synthetic import ForestSource
from msae.evaluation.evaluate import calibrate, evaluate
from msae.evaluation.reconstruction import ReconstructionSums, reconstruction_metrics
from msae.evaluation.truth import truth_metrics
from msae.sae import MatryoshkaSAE

# --- reconstruction --------------------------------------------------------------------------------------------


def example(scale: float = 0.3) -> tuple[MatryoshkaSAE, Tensor]:
    """An SAE with every weight random, on rows whose mean is far from 0."""
    generator = torch.Generator().manual_seed(0)
    sae = MatryoshkaSAE(5, 12, [3, 12], 2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
        sae.scale.fill_(scale)
        sae.threshold.fill_(1.0)
        sae.b_enc[7] = -1e6  # one latent never fires, one always does
        sae.b_enc[1] = 1e3
    return sae, torch.randn(200, 5, generator=generator) + torch.tensor([3.0, -2.0, 0.0, 1.0, 5.0])


def test_metrics_equal_their_formulas() -> None:
    sae, x = example()
    got = reconstruction_metrics(sae, [x])
    exact = x.double()
    variance = (exact - exact.mean(0)).square().sum(1).mean()
    expected = {}
    for width in (3, 12):
        recon, acts = sae(x, width).detach().double(), sae.encode(x, width).detach()
        error = (exact - recon).square().sum(1).mean()
        density = (acts > 0).double().mean(0)
        values = {
            "mse": error / 5,
            "fvu": error / variance,
            "l0": (acts > 0).sum(1).double().mean(),
            "dead": (density == 0).double().mean(),
            "cosine": torch.nn.functional.cosine_similarity(exact, recon).mean(),
            "l2_ratio": (recon.norm(dim=1) / exact.norm(dim=1)).mean(),
            "bias": recon.square().sum(1).mean() / (exact * recon).sum(1).mean(),
            "dense_1pct": (density > 0.01).double().mean(),
            "dense_10pct": (density > 0.1).double().mean(),
        }
        expected |= {f"{name}/p{width}": float(value) for name, value in values.items()}
    assert got == pytest.approx(expected, rel=1e-5)
    assert 1 / 12 <= got["dead/p12"] < 1
    assert 1 / 3 <= got["dense_10pct/p3"] <= got["dense_1pct/p3"]


@pytest.mark.parametrize("split", [1, 7, 64, 200])
def test_metrics_do_not_change_with_the_batch_split(split) -> None:
    sae, x = example()
    assert reconstruction_metrics(sae, x.split(split)) == pytest.approx(reconstruction_metrics(sae, [x]), rel=1e-6)


def test_sums_of_two_processes_add_up() -> None:
    sae, x = example()
    whole, first, second = (ReconstructionSums(sae) for _ in range(3))
    whole.update(sae, x)
    first.update(sae, x[:130])
    second.update(sae, x[130:])
    for name, tensor in first.tensors.items():
        assert tensor.dtype == torch.float64
        tensor += second.tensors[name]
    assert first.metrics() == pytest.approx(whole.metrics(), rel=1e-6)
    density = first.tensors["fired"] / first.tensors["tokens"]
    torch.testing.assert_close(density, (sae.encode(x) > 0).double().mean(0))


def test_a_transcoder_is_measured_against_its_target() -> None:
    generator, x = torch.Generator().manual_seed(0), example()[1]
    y = x[:, :3] @ torch.randn(3, 3, generator=generator) + 4
    transcoder = MatryoshkaSAE(5, 12, [3, 12], 2, d_out=3)
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.normal_(generator=generator)
        transcoder._buffers["output_scale"].fill_(0.6), transcoder._buffers["output_mean"].fill_(-2.0)
        transcoder.threshold.fill_(1.0)
    got = reconstruction_metrics(transcoder, list(zip(x.split(60), y.split(60), strict=True)))
    for width in (3, 12):
        recon = (transcoder.encode(x, width) @ transcoder.W_dec[:width] + transcoder.b_dec).detach().double() / 0.6 - 2
        error = (y - recon).square().sum(1).mean()
        assert got[f"mse/p{width}"] == pytest.approx(float(error / 3), rel=1e-5)
        assert got[f"fvu/p{width}"] == pytest.approx(float(error / (y - y.mean(0)).square().sum(1).mean()), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(y.double(), recon)
        assert got[f"cosine/p{width}"] == pytest.approx(float(cosine.mean()), rel=1e-5)


@pytest.mark.parametrize("sparsity", ["batch_topk", "topk", "jumprelu", "l1", "log"])
def test_calibration_sets_the_thresholds_of_batch_topk_alone(sparsity, tmp_path) -> None:
    shards = harvest(ForestSource(rows=64, val_rows=700, chunk_rows=64), tmp_path, show=False)["synthetic"]
    sae = MatryoshkaSAE(20, 32, [4, 16, 32], 2, sparsity=sparsity, threshold_init=0.2)
    with torch.no_grad():  # rows that are alike must not have the same codes
        sae.b_enc.add_(0.1), sae.W_enc.add_(0.3 * torch.randn(20, 32, generator=torch.Generator().manual_seed(0)))
    before = sae.threshold.detach().clone()
    calibrate(sae, ValBatches(shards, 64, start=100, stop=600))
    if sparsity != "batch_topk":
        torch.testing.assert_close(sae.threshold.detach(), before, equal_nan=True)
        assert sae.prefix_thresholds.isnan().all()
        return
    x = shards.activations("val", 0)[100:600]
    assert (sae.threshold == sae.prefix_thresholds[-1]).all()
    for width, threshold in zip(sae.prefixes, sae.prefix_thresholds, strict=True):
        active = (sae.pre(x)[:, :width] > threshold).sum()
        assert int(active) <= 2 * len(x)
        assert int((sae.pre(x)[:, :width] >= threshold).sum()) > 2 * len(x) or threshold == 0


def test_fvu_subtracts_the_squared_norm_of_the_mean() -> None:
    """x = (4, 0), (2, 0): E‖x‖² = 10, ‖E x‖² = 9, so guessing the mean has FVU 1 (with SAEBench's formula 1/7.75)."""
    sae = MatryoshkaSAE(2, 1, [1], 1)
    sae.threshold.fill_(1e9)
    x = torch.tensor([[4.0, 0.0], [2.0, 0.0]])
    for guess, error in ((3.0, 1.0), (2.0, 2.0), (4.0, 2.0)):
        with torch.no_grad():
            sae.b_dec.copy_(torch.tensor([guess, 0.0]))
        metrics = reconstruction_metrics(sae, [x])
        assert metrics["fvu/p1"] == pytest.approx(error)
        assert metrics["mse/p1"] == pytest.approx(error / 2)
        assert (metrics["l0/p1"], metrics["dead/p1"]) == (0, 1)


def test_far_mean_costs_no_precision() -> None:
    """A mean a thousand times the spread: float32 sums would lose the variance."""
    sae, x = example(1.0)
    x = x + 1e4
    sae.threshold.fill_(1e9)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
    assert reconstruction_metrics(sae, x.split(50))["fvu/p12"] == pytest.approx(1, rel=1e-3)


def test_zero_rows_have_no_direction_and_no_ratio() -> None:
    sae, x = example()
    with_zeros = torch.cat([torch.zeros(100, 5), x])
    got, without = reconstruction_metrics(sae, with_zeros.split(150)), reconstruction_metrics(sae, [x])
    for name in ("cosine", "l2_ratio"):
        assert got[f"{name}/p12"] == pytest.approx(without[f"{name}/p12"], rel=1e-6)
    assert all(
        math.isfinite(value) for value in reconstruction_metrics(sae, [torch.zeros(9, 5)]).values() if value == value
    )


def test_evaluation_streams_the_held_out_rows(tmp_path) -> None:
    """Rows in batches and shards of other sizes, from a row in the middle on, have the figures of all at once."""
    source = ForestSource(rows=64, val_rows=1000, chunk_rows=64)
    shards = harvest(source, tmp_path, show=False)["synthetic"]
    sae = MatryoshkaSAE(20, 32, [4, 32], 2)
    sae.threshold.fill_(0.2)
    got = evaluate(sae, shards, source, "synthetic", 300, 64, 0)
    expected = truth_metrics(sae, shards.activations("val", 0)[300:], shards.truth, 300)
    assert {k[6:]: v for k, v in got.items() if k.startswith("truth/")} == pytest.approx(expected, nan_ok=True)
    assert got["truth/l0"] == pytest.approx(got["val/l0/p32"])
