"""The SAE: loss and gradients against plain loops, BatchTopK, AuxK, thresholds, folding, files, prefixes."""

import errno
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from msae.sae import (
    MatryoshkaSAE,
    auxk_loss,
    batch_topk,
    load_sae,
    matryoshka_loss,
    quantile_threshold,
    resolve_prefixes,
    save_sae,
)

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def make(
    d_in: int = 4,
    d_sae: int = 6,
    prefixes: list[int] | None = None,
    k: float = 2,
    scale: float = 1.7,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> MatryoshkaSAE:
    """An SAE in which no bias is zero, no row has unit norm and W_enc is not W_decᵀ."""
    sae = MatryoshkaSAE(d_in, d_sae, prefixes or [2, 3, d_sae], k).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(sae, name).normal_(generator=generator)
        sae.scale.fill_(scale)
    return sae


def rows(n: int, d: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_loss(sae: MatryoshkaSAE, x: Tensor) -> Tensor:
    """Per prefix: one row, one latent at a time; BatchTopK by sorting Python floats."""
    s, n = float(sae.scale), len(x)
    pre = [
        [
            sae.b_enc[j] + sum((s * x[i, c] - sae.b_dec[c]) * sae.W_enc[c, j] for c in range(sae.d_in))
            for j in range(sae.d_sae)
        ]
        for i in range(n)
    ]
    order = sorted(((float(pre[i][j].detach()), i, j) for i in range(n) for j in range(sae.d_sae)), reverse=True)
    kept = {(i, j) for value, i, j in order[: round(sae.k * n)] if value > 0}
    losses = []
    for width in sae.prefixes:
        error = torch.zeros((), dtype=x.dtype)
        for i in range(n):
            for c in range(sae.d_in):
                recon = sae.b_dec[c] + sum(pre[i][j] * sae.W_dec[j, c] for j in range(width) if (i, j) in kept)
                error = error + (s * x[i, c] - recon) ** 2
        losses.append(error / n)
    return torch.stack(losses)


# --- loss and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefixes", "k", "seed"), [([2, 3, 6], 2, 0), ([1, 6], 1.5, 1), ([6], 3, 2), ([1, 2, 3, 4, 5, 6], 6, 3)]
)
def test_loss_and_gradients_equal_a_plain_loop(prefixes, k, seed) -> None:
    sae, x = make(prefixes=prefixes, k=k, seed=seed), rows(5, 4)
    loss = matryoshka_loss(sae, x)
    gradients = torch.autograd.grad(loss.total, list(sae.parameters()))
    naive = naive_loss(sae, x)
    torch.testing.assert_close(loss.prefixes, naive.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.total, naive.sum(), rtol=1e-12, atol=0)
    expected = torch.autograd.grad(naive.sum(), list(sae.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    sae, x, step = make(), rows(5, 4), 1e-6
    reference = matryoshka_loss(sae, x)
    gradients = torch.autograd.grad(reference.total, list(sae.parameters()))
    for parameter, gradient in zip(sae.parameters(), gradients, strict=True):
        flat = parameter.data.view(-1)
        for i, analytic in enumerate(gradient.flatten().tolist()):
            ends, value = [], float(flat[i])
            for sign in (1, -1):
                flat[i] = value + sign * step
                moved = matryoshka_loss(sae, x)
                assert torch.equal(moved.acts > 0, reference.acts > 0), "the active set changed"
                ends.append(float(moved.total.detach()))
            flat[i] = value
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(analytic, rel=1e-6, abs=1e-6)


def test_every_prefix_gives_gradient_to_its_own_latents_only() -> None:
    sae, x = make(k=6), rows(20, 4)
    pre = sae.pre(x)
    for width, recon in zip(sae.prefixes, sae.decode_prefixes(sae.select(pre)), strict=True):
        sae.zero_grad()
        (x * sae.scale - recon).square().sum().backward(retain_graph=True)
        for per_latent in (sae.W_enc.grad.T, sae.b_enc.grad[:, None], sae.W_dec.grad):
            assert (per_latent[:width] != 0).all()
            assert (per_latent[width:] == 0).all()
        assert (sae.b_dec.grad != 0).all()


def test_prefix_reconstructions_are_those_of_decode() -> None:
    sae, x = make(), rows(7, 4)
    acts = sae.select(sae.pre(x))
    for width, recon in zip(sae.prefixes, sae.decode_prefixes(acts), strict=True):
        torch.testing.assert_close(recon / sae.scale, sae.decode(acts, width), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(sae.decode(acts[:, :width]), sae.decode(acts, width), rtol=0, atol=0)


def test_one_prefix_is_a_vanilla_sae() -> None:
    sae, x = make(prefixes=[6]), rows(9, 4)
    pre = (1.7 * x - sae.b_dec) @ sae.W_enc + sae.b_enc
    bar = pre.flatten().sort(descending=True).values[2 * 9 - 1]
    acts = torch.where((pre >= bar) & (pre > 0), pre, 0.0)
    recon = acts @ sae.W_dec + sae.b_dec
    loss = ((1.7 * x - recon) ** 2).sum() / 9
    ours = matryoshka_loss(sae, x)
    torch.testing.assert_close(ours.total, loss, rtol=1e-6, atol=0)  # the scale 1.7 is stored in fp32
    torch.testing.assert_close(ours.acts, acts.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("k", "acts", "prefixes"),
    [
        (1, [[2.0, 0.0, 1.2], [0.0, 0.0, 0.0]], [0.5, (1.44 + 1) / 2]),  # both places go to the first row
        (1.5, [[2.0, 0.0, 1.2], [0.0, 1.0, 0.0]], [0.5, 1.44 / 2]),
        (3, [[2.0, 0.0, 1.2], [0.0, 1.0, 0.8]], [0.5, (1.44 + 0.64) / 2]),  # zeros are never active
    ],
)
def test_two_by_three_by_hand(k, acts, prefixes) -> None:
    """x = (2, 0), (0, 1); latents (1, 0), (0, 1), (.6, .8): pre = (2, 0, 1.2), (0, 1, .8)."""
    sae = MatryoshkaSAE(2, 3, [1, 3], k).double()
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        sae.W_enc.copy_(sae.W_dec.T)
    loss = matryoshka_loss(sae, torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(loss.acts, torch.tensor(acts, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss.prefixes, torch.tensor(prefixes, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(loss.total.detach()) == pytest.approx(sum(prefixes), rel=1e-6)


# --- BatchTopK -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(10, 32), (2, 5, 32), (5, 2, 1, 32)])
@pytest.mark.parametrize(("k", "count"), [(1, 10), (4, 40), (0.3, 3), (2.5, 25), (32, 320)])
def test_batch_topk_keeps_the_largest_k_times_tokens(shape, k, count) -> None:
    pre = rows(10, 32, dtype=torch.float32).abs().add(0.01).view(shape).requires_grad_()
    acts = batch_topk(pre, k)
    assert acts.shape == pre.shape
    assert int((acts > 0).sum()) == count
    largest = pre.flatten().sort(descending=True).values[:count]
    assert torch.equal(acts[acts > 0].sort(descending=True).values, largest)
    acts.sum().backward()
    assert torch.equal(pre.grad, (acts > 0).float())


def test_batch_topk_never_keeps_a_negative_one() -> None:
    pre = torch.tensor([[-1.0, 2.0, -3.0], [-1.0, -2.0, 0.0]])
    assert torch.equal(batch_topk(pre, 3), pre.relu())


# --- AuxK ------------------------------------------------------------------------------------------------------


def flags(*latents: int) -> Tensor:
    dead = torch.zeros(6, dtype=torch.bool)
    dead[list(latents)] = True
    return dead


def naive_aux(sae: MatryoshkaSAE, pre: Tensor, residual: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """Row by row, the k_aux largest dead latents, no b_dec in what they make."""
    error, energy = torch.zeros((), dtype=pre.dtype), torch.zeros((), dtype=pre.dtype)
    for i in range(len(pre)):
        chosen = sorted(dead.nonzero().flatten().tolist(), key=lambda j: -float(pre[i, j].detach()))[:k_aux]
        made = sum((pre[i, j].relu() * sae.W_dec[j] for j in chosen), torch.zeros(sae.d_in, dtype=pre.dtype))
        error, energy = error + (residual[i] - made).square().sum(), energy + residual[i].square().sum()
    return error / energy


@pytest.mark.parametrize("k_aux", [1, 2, 100])
@pytest.mark.parametrize("dead", [flags(1), flags(0, 3, 5), ~flags()])
def test_auxk_equals_a_plain_loop(dead, k_aux) -> None:
    sae, x = make(), rows(5, 4)
    loss = matryoshka_loss(sae, x, dead, 0.25, k_aux)
    pre = sae.pre(x)
    residual = (x * sae.scale - sae.decode_prefixes(sae.select(pre))[-1]).detach()
    naive = naive_aux(sae, pre, residual, dead, k_aux)
    torch.testing.assert_close(loss.aux, naive.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.total, loss.prefixes.sum() + 0.25 * naive, rtol=1e-12, atol=0)

    gradients = torch.autograd.grad(
        auxk_loss(sae, pre, residual, dead, k_aux), [sae.W_enc, sae.b_enc, sae.W_dec], retain_graph=True
    )
    expected = torch.autograd.grad(naive, [sae.W_enc, sae.b_enc, sae.W_dec])
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-14)
    for per_latent in (gradients[0].T, gradients[1][:, None], gradients[2]):
        assert (per_latent[~dead] == 0).all()
        assert (per_latent[dead].abs().sum() > 0).all()


def test_aux_gradient_is_detached_from_the_living() -> None:
    """The auxiliary loss moves dead latents alone: its residual is a constant."""
    sae, x, dead = make(k=1), rows(5, 4), flags(1, 4)
    without = torch.autograd.grad(matryoshka_loss(sae, x).total, [sae.W_enc, sae.b_enc, sae.W_dec])
    having = torch.autograd.grad(matryoshka_loss(sae, x, dead, 10.0).total, [sae.W_enc, sae.b_enc, sae.W_dec])
    moved = [(a - b) for a, b in zip(having, without, strict=True)]
    for per_latent in (moved[0].T, moved[1][:, None], moved[2]):
        assert per_latent[~dead].abs().max() < 1e-12
        assert per_latent[dead].abs().max() > 1e-3


def test_auxk_does_not_count_b_dec_twice() -> None:
    """Dead latents that make exactly what is left beside b_dec leave nothing; b_dec added again would leave 1."""
    sae = MatryoshkaSAE(2, 2, [1, 2], 1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(2))
        sae.W_enc.copy_(torch.eye(2))
        sae.b_dec.copy_(torch.tensor([5.0, -7.0]))
    x = torch.tensor([[9.0, -4.0]])  # pre = (4, 3): BatchTopK takes the first, (0, 3) is left for the second
    loss = matryoshka_loss(sae, x, torch.tensor([False, True]))
    assert torch.equal(loss.acts, torch.tensor([[4.0, 0.0]]))
    assert float(loss.aux) == 0.0


@pytest.mark.parametrize("dead", [None, flags()])
def test_auxk_is_zero_when_none_is_dead(dead) -> None:
    sae, x = make(), rows(5, 4)
    loss = matryoshka_loss(sae, x, dead)
    assert float(loss.aux) == 0.0
    torch.testing.assert_close(loss.total, loss.prefixes.sum())
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())


def test_auxk_is_zero_when_nothing_is_left() -> None:
    sae = make()
    x = (sae.b_dec / sae.scale).detach().expand(5, -1)
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)  # no latent fires on b_dec: the reconstruction is perfect
    loss = matryoshka_loss(sae, x, ~flags())
    assert float(loss.aux) == 0.0
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())


# --- thresholds ------------------------------------------------------------------------------------------------


def test_threshold_is_right_from_the_first_step() -> None:
    sae, rate = make(dtype=torch.float32), 0.01
    generator = torch.Generator().manual_seed(0)
    seen: list[float] = []
    for step in range(50):
        acts = batch_topk(torch.rand(8, 6, generator=generator) + 3 + step, 2)
        if step == 20:
            acts = torch.zeros_like(acts)  # a batch in which nothing fires says nothing
        else:
            seen.append(float(acts[acts > 0].min()))
        sae.update_threshold(acts, rate)
        t = len(seen)
        expected = sum(rate * (1 - rate) ** (t - 1 - i) * m for i, m in enumerate(seen)) / (1 - (1 - rate) ** t)
        assert float(sae.threshold[0]) == pytest.approx(expected, rel=1e-4)
        assert (sae.threshold == sae.threshold[0]).all()


def test_encode_refuses_an_unset_threshold() -> None:
    sae, x = make(), rows(5, 4)
    with pytest.raises(ValueError, match=r"^this SAE has no threshold yet; [^\n]*$"):
        sae(x)
    sae.update_threshold(torch.zeros(5, 6), 0.01)  # nothing fired: still unset
    with pytest.raises(ValueError, match="no threshold yet"):
        sae.encode(x)


@pytest.mark.parametrize("k", [1, 3.5, 8])
@pytest.mark.parametrize("split", [1000, 64, 7])
def test_quantile_threshold_equals_a_full_sort(k, split) -> None:
    pre = rows(1000, 24, dtype=torch.float32)
    theta = quantile_threshold(iter(pre.split(split)), k, len(pre))
    assert theta == float(pre.flatten().sort(descending=True).values[round(k * 1000)])
    assert int((pre > theta).sum()) == round(k * 1000)


def test_quantile_threshold_takes_a_list_of_unequal_batches() -> None:
    for seed in range(20):
        quantile_threshold(list(rows(10, 4, seed).split(3)), 1, 10)


def test_quantile_threshold_takes_batches_with_a_gradient() -> None:
    pre = rows(10, 4).requires_grad_()
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        quantile_threshold(iter(pre.split(5)), 1, 10)
    finally:
        torch.set_warn_always(before)


def test_quantile_threshold_is_never_negative_and_needs_rows() -> None:
    assert quantile_threshold([torch.tensor([[1.0, -1.0], [-2.0, -3.0]])], 2, 2) == 0.0
    with pytest.raises(ValueError, match=r"^there are no held-out rows[^\n]*$"):
        quantile_threshold([], 2, 0)


def test_calibrated_inference_has_l0_k() -> None:
    sae, x = make(8, 32, [8, 32], k=5, dtype=torch.float32), rows(400, 8, dtype=torch.float32)
    sae.threshold.fill_(quantile_threshold((sae.pre(part).detach() for part in x.split(33)), sae.k, len(x)))
    acts = sae.encode(x)
    assert int((acts > 0).sum()) == 5 * 400
    assert torch.equal(acts, sae.select(sae.pre(x)))  # on these rows the two agree
    torch.testing.assert_close(sae.encode(x[:1]), acts[:1])  # and no row depends on the others
    assert torch.equal(sae.encode(x, 8), acts[:, :8])
    assert torch.equal(sae.encode(x.view(4, 100, 8)), acts.view(4, 100, 32))


def test_encoding_in_training_mode_changes_nothing() -> None:
    sae, x = make(), rows(5, 4)
    sae.threshold.fill_(0.5)
    evaluated = sae.eval()(x)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    assert torch.equal(sae.train()(x), evaluated)
    sae.encode(x, 2)
    matryoshka_loss(sae, x, ~flags())
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_buffers_stay_exact_in_bfloat16() -> None:
    sae = make(dtype=torch.float32)
    sae.update_threshold(rows(5, 6, dtype=torch.float32), 0.01)
    sae.update_fired(torch.ones(6, dtype=torch.int64), 1)
    sae.update_fired(torch.zeros(6, dtype=torch.int64), 10**9 + 1)
    before = {name: tensor.clone() for name, tensor in sae.named_buffers()}
    assert set(before) == {"scale", "threshold", "threshold_ema", "threshold_weight", "tokens_since_fired"}
    sae.to(torch.bfloat16)
    assert sae.W_dec.dtype == torch.bfloat16
    for name, tensor in sae.named_buffers():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name
    for i in range(1000):  # 1e-3 of the way each time: bf16 would stand still
        sae.update_threshold(torch.full((1, 6), 300.0), 1e-3)
        assert i or float(sae.threshold[0]) > float(before["threshold"][0])
    assert float(sae.threshold[0]) > 150
    assert sae(rows(5, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


# --- the decoder and the dead ----------------------------------------------------------------------------------


def test_decoder_norms_and_projected_gradient() -> None:
    sae, x = make(), rows(5, 4)
    direction = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.detach(), direction, rtol=1e-14, atol=1e-15)

    sae.project_decoder_gradient()  # no gradient yet: nothing to do
    matryoshka_loss(sae, x).total.backward()
    gradient = sae.W_dec.grad.clone()
    sae.project_decoder_gradient()
    removed = gradient - sae.W_dec.grad
    assert (sae.W_dec.grad * direction).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(removed, (gradient * direction).sum(1, keepdim=True) * direction, rtol=1e-10, atol=1e-12)
    assert removed.abs().max() > 0.1


def test_dead_counts_tokens() -> None:
    sae = make()
    sae.update_fired(torch.tensor([0, 1, 0, 5, 0, 0]), tokens=100)
    sae.update_fired(torch.tensor([0, 0, 2, 1, 0, 0]), tokens=50)
    assert sae.tokens_since_fired.tolist() == [150, 50, 0, 0, 150, 150]
    assert sae.dead(150).tolist() == [True, False, False, False, True, True]
    assert not sae.dead(151).any()


def test_statistics_give_unit_variance_and_the_mean() -> None:
    sae, x = make(dtype=torch.float32), rows(1000, 4) * 30 + 100
    sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()))
    centred = x * sae.scale - sae.b_dec.detach()
    assert float(centred.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)
    assert centred.mean(0).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"^the activations have variance 0[^\n]*nothing to reconstruct$"):
        sae.set_statistics(torch.ones(4), 4.0)


# --- folding and files -----------------------------------------------------------------------------------------


def ready(**options) -> tuple[MatryoshkaSAE, Tensor]:
    sae, x = make(8, 32, [4, 8, 32], k=2.5, dtype=torch.float32, **options), rows(200, 8, dtype=torch.float32)
    sae.update_threshold(sae.select(sae.pre(x)), 0.01)
    return sae, x


@pytest.mark.parametrize("scale", [1.0, 0.013, 7.0])
def test_folding_the_scale_changes_no_output(scale) -> None:
    sae, x = ready(scale=scale)
    acts, recons = sae.encode(x), [sae(x, width) for width in sae.prefixes]
    assert 0 < int((acts > 0).sum()) < acts.numel()
    ema = float(sae.threshold_ema)
    sae.fold_scale()
    assert float(sae.scale) == 1.0
    assert float(sae.threshold_ema) == pytest.approx(ema / scale)
    torch.testing.assert_close(sae.encode(x), acts / scale, rtol=1e-4, atol=1e-5 / scale)
    for width, recon in zip(sae.prefixes, recons, strict=True):
        torch.testing.assert_close(sae(x, width), recon, rtol=1e-4, atol=1e-5 / scale)


def test_save_and_load_give_the_same_sae(tmp_path) -> None:
    sae, x = ready(scale=0.25)  # a power of two: folding is exact, so every bit must survive
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    loaded = load_sae(save_sae(sae, tmp_path / "sae", {"model_name": "tree", "l0": 2.5}))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), f"saving changed {name}"
    assert torch.equal(loaded.encode(x), sae.encode(x) / 0.25)
    for width in sae.prefixes:
        assert torch.equal(loaded(x, width), sae(x, width))
    assert (loaded.prefixes, loaded.k, loaded.training) == ([4, 8, 32], 2.5, False)
    assert loaded.metadata["model_name"] == "tree"

    again = load_sae(save_sae(loaded, tmp_path / "again"))
    for name in (*WEIGHTS, "threshold", "scale"):
        assert torch.equal(getattr(again, name), getattr(loaded, name)), name


def test_saved_files_are_a_saelens_directory(tmp_path) -> None:
    sae, _ = ready()
    save_sae(sae.to(torch.bfloat16), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert set(config) == {
        "architecture",
        "d_in",
        "d_sae",
        "dtype",
        "device",
        "apply_b_dec_to_input",
        "normalize_activations",
        "reshape_activations",
        "metadata",
    }
    assert (config["architecture"], config["dtype"], config["normalize_activations"]) == ("jumprelu", "float32", "none")
    assert (config["d_in"], config["d_sae"], config["apply_b_dec_to_input"]) == (8, 32, True)
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert config["metadata"]["training_architecture"] == "matryoshka_batchtopk"
    assert config["metadata"]["training_architecture_details"] == {"k": 2.5, "matryoshka_widths": [4, 8, 32]}
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "W_enc": ((8, 32), torch.float32),
        "W_dec": ((32, 8), torch.float32),
        "b_enc": ((32,), torch.float32),
        "b_dec": ((8,), torch.float32),
        "threshold": ((32,), torch.float32),
    }
    assert {p.name for p in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        tensors = {k: t.clone() for k, t in load_file(directory / "sae_weights.safetensors").items()}
        change(tensors)
        save_file(tensors, directory / "sae_weights.safetensors")

    return apply


def change_config(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        config = json.loads((directory / "cfg.json").read_text())
        change(config)
        (directory / "cfg.json").write_text(json.dumps(config))

    return apply


DAMAGE = {
    "no cfg": (lambda d: (d / "cfg.json").unlink(), "has no cfg.json; give the sae/ directory"),
    "corrupt cfg": (
        lambda d: (d / "cfg.json").write_text("{"),
        "cfg.json is not the configuration of a Matryoshka SAE",
    ),
    "cfg a list": (
        lambda d: (d / "cfg.json").write_text("[]"),
        "cfg.json is not the configuration of a Matryoshka SAE",
    ),
    "cfg of another SAE": (
        change_config(lambda c: c["metadata"].clear()),
        "cfg.json is not the configuration of a Matryoshka SAE",
    ),
    "no weights": (lambda d: (d / "sae_weights.safetensors").unlink(), "sae_weights.safetensors cannot be read"),
    "truncated": (
        lambda d: (d / "sae_weights.safetensors").write_bytes((d / "sae_weights.safetensors").read_bytes()[:-9]),
        "sae_weights.safetensors cannot be read",
    ),
    "empty": (lambda d: (d / "sae_weights.safetensors").write_bytes(b""), "sae_weights.safetensors cannot be read"),
    "wrong shape": (change_tensors(lambda t: t.update(b_dec=torch.zeros(9))), r"'b_dec': \(9,\).*expected.*\(8,\)"),
    "scalar threshold": (change_tensors(lambda t: t.update(threshold=torch.zeros(()))), r"'threshold': \(\)"),
    "extra tensor": (change_tensors(lambda t: t.update(extra=torch.zeros(1))), "'extra'.*expected"),
    "missing tensor": (change_tensors(lambda t: t.pop("b_enc")), "holds.*expected.*'b_enc'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_load_errors_are_one_line(damage, tmp_path) -> None:
    sae, _ = ready()
    save_sae(sae, tmp_path)
    apply, message = DAMAGE[damage]
    apply(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_sae(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


UNCLEAR = {
    "binary cfg": lambda d: (d / "cfg.json").write_bytes(b"\xff\xfe\x00"),
    "impossible k": change_config(lambda c: c["metadata"]["training_architecture_details"].update(k=99)),
    "impossible prefixes": change_config(
        lambda c: c["metadata"]["training_architecture_details"].update(matryoshka_widths=[8, 4])
    ),
    "other inputs": change_config(lambda c: c.update(apply_b_dec_to_input=False)),
    "other architecture": change_config(lambda c: c.update(architecture="topk")),
    "other scale": change_config(lambda c: c.update(normalize_activations="expected_average_only_in")),
}


@pytest.mark.parametrize("damage", UNCLEAR)
def test_load_errors_name_the_file(damage, tmp_path) -> None:
    sae, _ = ready()
    save_sae(sae, tmp_path)
    UNCLEAR[damage](tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "cfg.json"))):
        load_sae(tmp_path)


def test_save_refuses_an_unset_threshold(tmp_path) -> None:
    with pytest.raises(ValueError, match="no threshold"):
        save_sae(make(dtype=torch.float32), tmp_path)


def test_save_on_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch) -> None:
    sae, x = ready()
    expected = load_sae(save_sae(sae, tmp_path))(x)

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("msae.sae.files.save_file", full)
    with pytest.raises(ValueError, match=r"^[^\n]*No space left[^\n]*$"):
        save_sae(sae, tmp_path)
    assert torch.equal(load_sae(tmp_path)(x), expected)


# --- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefixes", "widths"),
    [
        ([64], [64]),
        ([1.0], [64]),
        ([16, 32, 64], [16, 32, 64]),
        ([0.25, 0.5, 1.0], [16, 32, 64]),
        ([0.25, 1], [16, 64]),
        ((1 / 64, 1.0), [1, 64]),
        ([1, 64], [1, 64]),
    ],
)
def test_prefixes(prefixes, widths) -> None:
    resolved = resolve_prefixes(prefixes, 64)
    assert resolved == widths
    assert all(type(width) is int for width in resolved)


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([], "is empty"),
        ([32, 16, 64], "strictly increasing"),
        ([16, 16, 64], "strictly increasing"),
        ([0.5, 0.25, 1.0], "strictly increasing"),
        ([16, 128], "must end at d_sae=64"),
        ([16, 32], "must end at d_sae=64"),
        ([0.25, 0.5], "must end at d_sae=64"),
        ([0.3, 1.0], "not whole widths"),
        ([0, 64], "positive"),
        ([-16, 64], "positive"),
        ([0.0, 1.0], r"all in \(0, 1\]"),
        ([math.nan, 1.0], r"all in \(0, 1\]"),
        ([0.25, 64], "mixes fractions and widths"),
        ([16.0, 64.0], "mixes fractions and widths"),
    ],
)
def test_invalid_prefixes(prefixes, message) -> None:
    with pytest.raises(ValueError, match=rf"^model\.prefixes[^\n]*{message}[^\n]*$"):
        MatryoshkaSAE(4, 64, prefixes, 2)


@pytest.mark.parametrize("k", [0, -1, 65, math.nan, 64.5])
def test_impossible_k(k) -> None:
    with pytest.raises(ValueError, match=r"^model\.k=[^\n]*at most d_sae=64$"):
        MatryoshkaSAE(4, 64, [64], k)


@pytest.mark.parametrize(("d_in", "d_sae"), [(0, 8), (8, 0), (-1, 8)])
def test_impossible_sizes(d_in, d_sae) -> None:
    with pytest.raises(ValueError, match=r"^d_in=[^\n]*must be positive$"):
        MatryoshkaSAE(d_in, d_sae, [d_sae], 1)


@pytest.mark.parametrize("prefix", [0, -1, 7])
def test_impossible_prefix_to_decode(prefix) -> None:
    sae = make()
    sae.threshold.fill_(0.1)
    with pytest.raises(ValueError, match=r"^prefix=-?\d must lie between 1 and d_sae=6$"):
        sae(rows(5, 4), prefix)


def test_seed_decides_the_weights() -> None:
    first, same, other = (MatryoshkaSAE(4, 8, [8], 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.W_dec, same.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)
    assert torch.equal(first.W_enc, first.W_dec.T)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(8))
