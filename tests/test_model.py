"""The SAE itself: encoding, normalisation, its other forms (folded, truncated, permuted), what it keeps and counts."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msae.sae import (
    MatryoshkaSAE,
    fold,
    fold_decoder_norm,
    matryoshka_loss,
    permute,
    quantile_thresholds,
    topk,
    truncate,
)
from msae.sae.sparsity import SPARSITIES as MECHANISMS

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
SPARSITIES = [name for name, cls in MECHANISMS.items() if cls.__module__ == "msae.sae.sparsity"]
MODES = ("none", "unit_mean_square", "unit_rms", "unit_variance", "centred")
every_sparsity = pytest.mark.parametrize("sparsity", SPARSITIES)


def make(
    d_in: int = 4,
    d_sae: int = 6,
    prefixes: list[int] | None = None,
    k: float = 2,
    scale: float = 1.7,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    threshold: float = math.nan,
    **options,
) -> MatryoshkaSAE:
    """An SAE in which no bias is zero, no row has unit norm and W_enc is not W_decᵀ; `threshold` if calibrated."""
    sae = MatryoshkaSAE(d_in, d_sae, prefixes or [2, 3, d_sae], k, **options).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in WEIGHTS:
            weight = getattr(sae, name)
            weight.copy_(torch.empty(weight.shape, dtype=dtype).normal_(generator=generator))
        sae.scale.fill_(scale)
        if sae.sparsity.threshold_is == "learned":
            sae.threshold.uniform_(0.1, 1, generator=generator)
        elif sae.sparsity.threshold_is == "calibrated":
            sae.threshold.fill_(threshold)
    return sae


def rows(n: int, d: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit and type; not a number equals itself."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def state(sae: MatryoshkaSAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def changed(sae: MatryoshkaSAE, before: dict[str, Tensor]) -> list[str]:
    """The tensors of an SAE that differ from an earlier state."""
    return [name for name, tensor in sae.state_dict().items() if not same(tensor, before[name])]


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_scales_latents(sae: MatryoshkaSAE, x: Tensor, change: Callable[[MatryoshkaSAE], None], factor) -> None:
    """`change` multiplies the latents by a factor and leaves every prefix's reconstruction as it is."""
    acts, recons = sae.encode(x), [sae(x, width) for width in sae.prefixes]
    assert 0 < int((acts > 0).sum()) < acts.numel()
    change(sae)
    assert_close(sae.encode(x), acts * factor)
    for width, recon in zip(sae.prefixes, recons, strict=True):
        assert_close(sae(x, width), recon)


# --- encode and decode ------------------------------------------------------------------------------------------------


def test_prefix_reconstructions_are_those_of_decode() -> None:
    sae, x = make(), rows(7, 4)
    acts = sae.select(sae.pre(x))
    for width, recon in zip(sae.prefixes, sae.decode_prefixes(acts), strict=True):
        torch.testing.assert_close(recon / sae.scale, sae.decode(acts, width), rtol=1e-12, atol=1e-14)
        assert torch.equal(sae.decode(acts[:, :width]), sae.decode(acts, width))


def test_encode_refuses_an_unset_threshold() -> None:
    sae, x = make(), rows(5, 4)
    with pytest.raises(ValueError, match=r"^this SAE has no threshold yet; [^\n]*$"):
        sae(x)
    sae.update_threshold(torch.zeros(5, 6), 0.01)  # nothing fired: still unset
    with pytest.raises(ValueError, match="no threshold yet"):
        sae.encode(x)


@every_sparsity
def test_encoding_in_training_mode_changes_nothing(sparsity) -> None:
    sae, x = make(sparsity=sparsity, threshold=0.5), rows(5, 4)
    evaluated, before = sae.eval()(x), state(sae)
    assert torch.equal(sae.train()(x), evaluated)
    sae.encode(x, 2)
    matryoshka_loss(sae, x, dead=torch.ones(6, dtype=torch.bool))
    assert changed(sae, before) == []


@every_sparsity
def test_a_row_is_encoded_as_it_would_be_alone(sparsity) -> None:
    sae, x = make(sparsity=sparsity, threshold=0.5), rows(50, 4)
    alone = torch.cat([sae.encode(row) for row in x.split(1)])
    assert torch.equal(sae.encode(x) > 0, alone > 0)
    assert_close(sae.encode(x), alone)
    assert 0 < int((alone > 0).sum()) < alone.numel()


@pytest.mark.parametrize("sparsity", [name for name in SPARSITIES if name != "batch_topk"])
def test_these_select_at_inference_as_they_do_while_training(sparsity) -> None:
    sae, x = make(sparsity=sparsity), rows(50, 4)
    acts = sae.encode(x)
    assert torch.equal(acts, sae.select(sae.pre(x)))
    assert 0 < int((acts > 0).sum()) < acts.numel()
    assert torch.equal(sae.encode(x, 3), acts[:, :3])
    assert torch.equal(sae.encode(x.view(5, 10, 4)), acts.view(5, 10, 6))


@pytest.mark.parametrize("width", [0, -1, 7])
@pytest.mark.parametrize("use", [lambda sae, m: sae(rows(5, 4), m), truncate], ids=["decode", "truncate"])
def test_an_impossible_prefix_is_refused(use, width) -> None:
    with pytest.raises(ValueError, match=rf"^prefix={width} must lie between 1 and d_sae=6$"):
        use(make(threshold=0.1), width)


# --- normalisation ----------------------------------------------------------------------------------------------------


def with_statistics(mode: str, x: Tensor, y: Tensor | None = None, **options) -> MatryoshkaSAE:
    sae = make(x.shape[1], d_out=None if y is None else y.shape[1], **options)
    target = None if y is None else (y.mean(0), float(y.square().sum(1).mean()))
    sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()), mode, target)
    return sae


def assert_normalised(mode: str, x: Tensor, raw: Tensor) -> None:
    mean, energy = x.mean(0), float(x.square().sum(1).mean())
    variance = energy - float(mean.square().sum())
    if mode == "none":
        assert torch.equal(x, raw)
    else:
        measured = {"unit_mean_square": energy, "unit_rms": energy / x.shape[1]}.get(mode, variance)
        assert measured == pytest.approx(1)
    assert (float(mean.norm()) < 1e-10) == (mode == "centred")


@pytest.mark.parametrize("mode", MODES)
def test_normalised_activations_have_the_moments_that_the_mode_says(mode) -> None:
    x, y = rows(1000, 4) * 30 + 100, rows(1000, 3, 2) * 0.01 - 7
    for target in (None, y):
        sae = with_statistics(mode, x, target)
        assert_normalised(mode, (x - sae.mean) * sae.scale, x)
        raw = x if target is None else target
        scaled = sae.normalise_target(raw)
        assert_normalised(mode, scaled, raw)
        assert_close(sae.b_dec.data, scaled.mean(0))
        assert_close(sae.unscale(scaled), raw)


def test_unit_variance_and_the_mean_in_single_precision() -> None:
    sae, x = make(dtype=torch.float32), rows(1000, 4) * 30 + 100
    sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()))
    centred = x * sae.scale - sae.b_dec.detach()
    assert float(centred.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)
    assert centred.mean(0).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"^the activations have variance 0[^\n]*nothing to reconstruct$"):
        sae.set_statistics(torch.ones(4), 4.0)


# --- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("applied", "transcoder"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_folding_changes_units_and_nothing_else(mode, rescaled, applied, transcoder) -> None:
    x, y = rows(300, 4) * 3 + 2, rows(300, 5, 2) * 0.2 - 0.7
    options = {"sparsity": "jumprelu", "rescale_acts_by_decoder_norm": rescaled, "apply_b_dec_to_input": applied}
    sae = with_statistics(mode, x, y if transcoder else None, **options)
    s = float(sae.target_scale)
    with torch.no_grad():
        sae.b_dec.add_(rows(1, sae.d_out, 3)[0])  # not where it starts
        sae.threshold.mul_(0.1 / s if mode == "none" else 0.1)
    sae.prefix_thresholds.copy_(torch.arange(1.0, 4.0))
    sae.threshold_ema.fill_(0.3)
    assert all((sae.encode(x) > 0).any(0))
    assert_scales_latents(sae, x, fold, 1 / s)
    assert_close(sae.prefix_thresholds, torch.arange(1.0, 4.0).double() / s)
    assert float(sae.threshold_ema) == pytest.approx(0.3 / s)
    assert float(sae.scale) == float(sae.target_scale) == 1
    assert not sae.mean.any()
    assert not sae.target_mean.any()
    assert not sae.rescale_acts_by_decoder_norm


@pytest.mark.parametrize("rescaled", [False, True])
@every_sparsity
def test_folding_decoder_norms_gives_unit_rows_and_the_same_output(sparsity, rescaled) -> None:
    sae, x = make(sparsity=sparsity, rescale_acts_by_decoder_norm=rescaled, threshold=0.4), rows(50, 4)
    if sparsity == "topk" and not rescaled:
        with pytest.raises(ValueError, match="would change which latents a topk SAE selects"):
            fold_decoder_norm(sae)
        return
    norm = sae.W_dec.detach().norm(dim=1)
    assert_scales_latents(sae, x, fold_decoder_norm, 1 if rescaled else norm)
    assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(6).double())
    assert not sae.rescale_acts_by_decoder_norm


@pytest.mark.parametrize("rescaled", [False, True])
def test_folding_decoder_norms_keeps_what_prefixes_select_alone(rescaled) -> None:
    sae, x = make(rescale_acts_by_decoder_norm=rescaled), rows(500, 4)
    calibrate(sae, x)
    before = truncate(sae, 3, own_threshold=True).encode(x)
    norm = 1 if rescaled else sae.W_dec.detach().norm(dim=1)[:3]
    assert truncate(sae, 3).encode(x).count_nonzero() < before.count_nonzero()
    fold_decoder_norm(sae)
    small = truncate(sae, 3, own_threshold=True)
    close = (sae.pre(x)[:, :3] - small.threshold).abs() < 1e-6  # where rounding decides
    assert close.sum() < 5
    assert_close(small.encode(x)[~close], (before * norm)[~close])


# --- truncating -------------------------------------------------------------------------------------------------------


def calibrate(sae: MatryoshkaSAE, x: Tensor) -> None:
    thresholds = quantile_thresholds([sae.pre(x)], sae.k, len(x), sae.prefixes)
    sae.prefix_thresholds.copy_(torch.tensor(thresholds))
    if sae.sparsity.threshold_is == "calibrated":
        sae.threshold.fill_(thresholds[-1])


TRUNCATED = [{"sparsity": s} for s in SPARSITIES]
TRUNCATED += [{"rescale_acts_by_decoder_norm": True}, {"apply_b_dec_to_input": False}, {"d_out": 5}]
TRUNCATED += [{"sparsity": "topk", "d_out": 3}, {"sparsity": "topk", "k": 5}]
TRUNCATED += [{"encoder_bias": False, "sparsity": {"name": "jumprelu", "bandwidth": 0.5}}]


@pytest.mark.parametrize("width", [2, 3, 4, 6])
@pytest.mark.parametrize("options", TRUNCATED, ids=str)
def test_a_truncated_sae_is_the_prefix_of_the_whole(options, width) -> None:
    sae, x = make(**options), rows(60, 4)
    with torch.no_grad():
        sae.mean.add_(0.2)
    calibrate(sae, x)
    sae.update_fired(torch.arange(6), 9)
    sae.metadata = {"model_name": "tree", "nested": {"a": 1}}
    before = state(sae)
    small = truncate(sae, width)
    assert (small.d_in, small.d_sae, small.d_out, small.k) == (4, width, sae.d_out, min(sae.k, width))
    assert small.prefixes == sorted({*[p for p in (2, 3) if p < width], width})
    assert small.options() == sae.options()
    assert small.metadata == sae.metadata
    assert small.metadata["nested"] is not sae.metadata["nested"]
    if sae.ranks_at_inference:  # its k are among these latents
        acts = topk(sae.pre(x)[:, :width], small.k)
        assert_close(small.encode(x), acts)
        assert_close(small(x), sae.decode(acts))
    else:
        assert_close(small.encode(x), sae.encode(x, width))
        for inner in small.prefixes:
            assert_close(small(x, inner), sae(x, inner))
    inner = [float(t) for p, t in zip(sae.prefixes, sae.prefix_thresholds, strict=True) if p < width]
    expected = [*inner, float(sae.prefix_thresholds[-1])]  # the last is that of its threshold, which it shares
    assert small.prefix_thresholds.tolist() == pytest.approx(expected, nan_ok=True)
    assert torch.equal(small.tokens_since_fired, sae.tokens_since_fired[:width])
    with torch.no_grad():  # a copy
        for tensor in small.state_dict().values():
            tensor.fill_(3)
    assert changed(sae, before) == []


def test_a_truncated_sae_may_have_the_threshold_of_its_own_l0() -> None:
    sae, x = make(8, 32, [4, 8, 32], k=3, dtype=torch.float32), rows(400, 8, dtype=torch.float32)
    calibrate(sae, x)
    assert int((truncate(sae, 8).encode(x) > 0).sum()) < 3 * 400
    own = truncate(sae, 8, own_threshold=True)
    assert int((own.encode(x) > 0).sum()) == 3 * 400
    assert float(own.threshold[0]) == float(sae.prefix_thresholds[1]) < float(sae.threshold[0])
    with pytest.raises(ValueError, match=r"^no threshold is calibrated for 9 latents alone; they are for \[4, 8, 32\]"):
        truncate(sae, 9, own_threshold=True)


@pytest.mark.parametrize("folded", [False, True])
def test_truncating_twice_gives_the_same_threshold_as_once(folded) -> None:
    sae, x = make(8, 32, [4, 8, 32], k=3, dtype=torch.float32), rows(400, 8, dtype=torch.float32)
    calibrate(sae, x)
    if folded:
        fold_decoder_norm(sae)
    once = truncate(sae, 4, own_threshold=True).threshold
    for between in (truncate(sae, 8), truncate(sae, 9), truncate(sae, 8, own_threshold=True)):
        torch.testing.assert_close(truncate(between, 4, own_threshold=True).threshold, once)


# --- permuting --------------------------------------------------------------------------------------------------------

ORDER = torch.tensor([4, 0, 5, 2, 1, 3])
MOVED = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "tokens_since_fired": 0, "use": 0}


def everything(sae: MatryoshkaSAE, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = state(sae)
    for name, parameter in sae.named_parameters():
        tensors |= {f"{name}/{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return tensors


@pytest.mark.parametrize("sparsity", ["batch_topk", "jumprelu"])
def test_permuting_moves_the_optimizer_state_the_emas_and_the_counters(sparsity) -> None:
    sae, x = make(sparsity=sparsity), rows(20, 4)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.01)
    for step in range(5):
        loss = matryoshka_loss(sae, rows(8, 4, 100 + step), dead=sae.dead(9))
        loss.total.backward()
        optimizer.step()
        if sparsity == "batch_topk":
            sae.update_threshold(loss.code.acts, 0.1)
        sae.update_use(loss.code.mean_square(1.0), 0.1)
        sae.update_fired(loss.code.fired(), 8)
    sae.tokens_since_fired.copy_(torch.arange(6))
    before, acts, recon = everything(sae, optimizer), sae.encode(x), sae(x)
    permute(sae, ORDER, optimizer)
    assert_close(sae.encode(x), acts[:, ORDER])
    assert_close(sae(x), recon)
    after = everything(sae, optimizer)
    expected = {"W_enc/exp_avg", "W_enc/exp_avg_sq", "W_dec/exp_avg", "b_enc/exp_avg", "b_dec/exp_avg_sq", "W_enc/step"}
    assert expected | ({"threshold/exp_avg_sq"} if sparsity == "jumprelu" else set()) <= after.keys()
    for name, tensor in after.items():
        axis = None if name.endswith("/step") else MOVED.get(name.partition("/")[0])
        assert same(tensor, before[name] if axis is None else before[name].index_select(axis, ORDER)), name
    assert len(before["use"].unique()) == 6
    permute(sae, ORDER.argsort())  # back, but without the optimizer, whose state then stays
    assert torch.equal(sae.W_dec.detach(), before["W_dec"])
    assert torch.equal(optimizer.state[sae.W_dec]["exp_avg"], after["W_dec/exp_avg"])


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"k": k}, r"model\.k=[^\n]*at most d_sae=64") for k in (0, -1, 65, math.nan, 64.5)),
        ({"k": 2.5, "sparsity": "topk"}, r"model\.k=2\.5 must be whole with model\.sparsity=topk[^\n]*"),
        *(({name: size}, r"d_in=[^\n]*must be positive") for name in ("d_in", "d_sae") for size in (0, -1)),
    ],
)
def test_impossible_sizes_are_refused(options, message) -> None:
    possible = {"d_in": 4, "d_sae": 64, "prefixes": [64], "k": 2.0}
    assert MatryoshkaSAE(**possible, sparsity="topk").k == 2
    with pytest.raises(ValueError, match=f"^{message}$"):
        MatryoshkaSAE(**(possible | options))


# --- what is kept exact, the decoder, the dead ------------------------------------------------------------------------

EXACT = {"threshold", "prefix_thresholds", "threshold_ema", "threshold_weight", "tokens_since_fired", "use"}
EXACT |= {"scale", "mean"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"sparsity": "jumprelu"}, {"d_out": 3}], ids=str)
def test_thresholds_averages_and_normalisation_stay_exact_in_half_precision(options, dtype) -> None:
    sae = make(dtype=torch.float32, **options)
    exact = {name: tensor for name, tensor in sae.state_dict().items() if name not in WEIGHTS}
    assert exact.keys() == EXACT | ({"output_scale", "output_mean"} if "d_out" in options else set())
    with torch.no_grad():
        for tensor in exact.values():
            tensor.uniform_(0.1, 0.9) if tensor.is_floating_point() else tensor.fill_(10**9 + 1)
    before, parameters = state(sae), dict(sae.named_parameters())
    sae.to(dtype)
    assert sae.W_dec.dtype == dtype
    assert set(changed(sae, before)) == set(WEIGHTS)
    assert all(p is parameters[name] for name, p in sae.named_parameters())  # an optimizer still has them
    if sae.sparsity.threshold_is == "calibrated":
        sae.threshold_ema.zero_()
        for _ in range(1000):  # 1e-3 of the way each time: bfloat16 would stand still
            sae.update_threshold(torch.full((1, 6), 300.0), 1e-3)
        assert float(sae.threshold[0]) > 150


@every_sparsity
def test_an_sae_in_bfloat16_maps_bfloat16_to_bfloat16(sparsity) -> None:
    sae = make(dtype=torch.float32, sparsity=sparsity, threshold=0.5).to(torch.bfloat16)
    x = rows(5, 4, dtype=torch.bfloat16)
    assert sae(x).dtype == torch.bfloat16
    assert sae.select(sae.pre(x)).dtype == torch.bfloat16


def test_dead_counts_tokens() -> None:
    sae = make()
    sae.update_fired(torch.tensor([0, 1, 0, 5, 0, 0]), tokens=100)
    sae.update_fired(torch.tensor([0, 0, 2, 1, 0, 0]), tokens=50)
    assert sae.tokens_since_fired.tolist() == [150, 50, 0, 0, 150, 150]
    assert sae.dead(150).tolist() == [True, False, False, False, True, True]
    assert not sae.dead(151).any()
