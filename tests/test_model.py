"""The SAE itself: encoding, normalisation, its other forms (folded, truncated, permuted), what it keeps and counts."""

import copy
import math

import pytest
import torch
from torch import Tensor

from msae.sae import (
    MatryoshkaSAE,
    Objective,
    matryoshka_loss,
    quantile_thresholds,
    topk,
)

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
SPARSITIES = ("batch_topk", "topk", "jumprelu", "l1", "log")
MODES = ("none", "unit_mean_square", "unit_rms", "unit_variance", "centred")


def make(
    d_in: int = 4,
    d_sae: int = 6,
    prefixes: list[int] | None = None,
    k: float = 2,
    scale: float = 1.7,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options,
) -> MatryoshkaSAE:
    """An SAE in which no bias is zero, no row has unit norm and W_enc is not W_decᵀ."""
    sae = MatryoshkaSAE(d_in, d_sae, prefixes or [2, 3, d_sae], k, **options).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in WEIGHTS:
            weight = getattr(sae, name)
            weight.copy_(torch.empty(weight.shape, dtype=dtype).normal_(generator=generator))
        sae.scale.fill_(scale)
        if sae.sparsity == "jumprelu":
            sae.threshold.uniform_(0.1, 1, generator=generator)
    return sae


def rows(n: int, d: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit and type; not a number equals itself."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def state(sae: MatryoshkaSAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- encode and decode -----------------------------------------------------------------------------------------


def test_prefix_reconstructions_are_those_of_decode() -> None:
    sae, x = make(), rows(7, 4)
    acts = sae.select(sae.pre(x))
    for width, recon in zip(sae.prefixes, sae.decode_prefixes(acts), strict=True):
        torch.testing.assert_close(recon / sae.scale, sae.decode(acts, width), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(sae.decode(acts[:, :width]), sae.decode(acts, width), rtol=0, atol=0)


def test_encode_refuses_an_unset_threshold() -> None:
    sae, x = make(), rows(5, 4)
    with pytest.raises(ValueError, match=r"^this SAE has no threshold yet; [^\n]*$"):
        sae(x)
    sae.update_threshold(torch.zeros(5, 6), 0.01)  # nothing fired: still unset
    with pytest.raises(ValueError, match="no threshold yet"):
        sae.encode(x)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_encoding_in_training_mode_changes_nothing(sparsity) -> None:
    sae, x = make(sparsity=sparsity), rows(5, 4)
    if sparsity == "batch_topk":
        sae.threshold.fill_(0.5)
    evaluated = sae.eval()(x)
    before = state(sae)
    assert torch.equal(sae.train()(x), evaluated)
    sae.encode(x, 2)
    matryoshka_loss(sae, x, dead=torch.ones(6, dtype=torch.bool))
    for name, tensor in sae.state_dict().items():
        assert same(tensor, before[name]), name


@pytest.mark.parametrize("sparsity", ["topk", "jumprelu", "l1", "log"])
def test_these_select_at_inference_as_they_do_while_training(sparsity) -> None:
    sae, x = make(sparsity=sparsity), rows(50, 4)
    acts = sae.encode(x)
    assert torch.equal(acts, sae.select(sae.pre(x)))
    assert 0 < int((acts > 0).sum()) < acts.numel()
    assert torch.equal(sae.encode(x, 3), acts[:, :3])
    assert torch.equal(sae.encode(x.view(5, 10, 4)), acts.view(5, 10, 6))


@pytest.mark.parametrize("prefix", [0, -1, 7])
def test_impossible_prefix_to_decode(prefix) -> None:
    sae = make()
    sae.threshold.fill_(0.1)
    with pytest.raises(ValueError, match=r"^prefix=-?\d must lie between 1 and d_sae=6$"):
        sae(rows(5, 4), prefix)


def test_rescaled_activations_make_what_unit_rows_would_make() -> None:
    """pre × ‖row‖ with rows of norm 1 is the same reconstruction as pre with the rows as they are."""
    sae, x = make(rescale_acts_by_decoder_norm=True, sparsity="l1"), rows(9, 4)
    plain = make(sparsity="l1")
    norm = plain.W_dec.norm(dim=1)
    assert_close(sae.encode(x), plain.encode(x) * norm)
    for width in sae.prefixes:
        assert_close(sae(x, width), plain(x, width))


# --- normalisation ---------------------------------------------------------------------------------------------


def with_statistics(mode: str, x: Tensor, y: Tensor | None = None, **options) -> MatryoshkaSAE:
    sae = make(x.shape[1], d_out=None if y is None else y.shape[1], **options)
    target = None if y is None else (y.mean(0), float(y.square().sum(1).mean()))
    sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()), mode, target)
    return sae


def is_normalised(mode: str, x: Tensor, raw: Tensor) -> None:
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
        is_normalised(mode, (x - sae.mean) * sae.scale, x)
        made = x if target is None else target
        is_normalised(mode, sae.normalise_target(made), made)
        assert_close(sae.b_dec.data, sae.normalise_target(made).mean(0))
        assert_close(sae.unscale(sae.normalise_target(made)), made)


def test_unit_variance_and_the_mean_in_single_precision() -> None:
    sae, x = make(dtype=torch.float32), rows(1000, 4) * 30 + 100
    sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()))
    centred = x * sae.scale - sae.b_dec.detach()
    assert float(centred.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)
    assert centred.mean(0).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"^the activations have variance 0[^\n]*nothing to reconstruct$"):
        sae.set_statistics(torch.ones(4), 4.0)


# --- folding ---------------------------------------------------------------------------------------------------


def assert_folds(sae: MatryoshkaSAE, x: Tensor) -> None:
    """After `fold` the latents are in raw units and nothing else has changed."""
    sae.prefix_thresholds.copy_(torch.arange(1.0, 4.0))
    sae.threshold_ema.fill_(0.3)
    s = float(sae.target_scale)
    acts, recons = sae.encode(x), [sae(x, width) for width in sae.prefixes]
    assert 0 < int((acts > 0).sum()) < acts.numel()
    assert all((acts > 0).any(0))
    sae.fold()
    assert_close(sae.encode(x), acts / s)
    for width, recon in zip(sae.prefixes, recons, strict=True):
        assert_close(sae(x, width), recon)
    assert_close(sae.prefix_thresholds, torch.arange(1.0, 4.0).double() / s)
    assert float(sae.threshold_ema) == pytest.approx(0.3 / s)
    assert float(sae.scale) == float(sae.target_scale) == 1
    assert not sae.mean.any()
    assert not sae.target_mean.any()
    assert not sae.rescale_acts_by_decoder_norm


KINDS = [(True, False), (False, False), (False, True)]  # b_dec applied to the input, a transcoder


@pytest.mark.parametrize(("applied", "transcoder"), KINDS, ids=["autoencoder", "b_dec not applied", "transcoder"])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_folding_changes_units_and_nothing_else(mode, rescaled, applied, transcoder) -> None:
    x, y = rows(300, 4) * 3 + 2, rows(300, 5, 2) * 0.2 - 0.7
    sae = with_statistics(
        mode,
        x,
        y if transcoder else None,
        sparsity="jumprelu",
        rescale_acts_by_decoder_norm=rescaled,
        apply_b_dec_to_input=applied,
    )
    with torch.no_grad():
        sae.b_dec.add_(rows(1, sae.d_out, 3)[0])  # not where it starts
        sae.threshold.mul_(0.1 / float(sae.target_scale) if mode == "none" else 0.1)
    assert_folds(sae, x)


@pytest.mark.parametrize("scale", [1.0, 0.013, 7.0])
def test_folding_the_scale_in_single_precision_changes_no_output(scale) -> None:
    sae, x = make(8, 32, [4, 8, 32], 2.5, scale, dtype=torch.float32), rows(200, 8, dtype=torch.float32)
    sae.update_threshold(sae.select(sae.pre(x)), 0.01)
    acts, recons = sae.encode(x), [sae(x, width) for width in sae.prefixes]
    assert 0 < int((acts > 0).sum()) < acts.numel()
    ema = float(sae.threshold_ema)
    sae.fold()
    assert float(sae.scale) == 1.0
    assert float(sae.threshold_ema) == pytest.approx(ema / scale)
    torch.testing.assert_close(sae.encode(x), acts / scale, rtol=1e-4, atol=1e-5 / scale)
    for width, recon in zip(sae.prefixes, recons, strict=True):
        torch.testing.assert_close(sae(x, width), recon, rtol=1e-4, atol=1e-5 / scale)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_folding_decoder_norms_gives_unit_rows_and_the_same_output(sparsity, rescaled) -> None:
    sae, x = make(sparsity=sparsity, rescale_acts_by_decoder_norm=rescaled), rows(50, 4)
    if sparsity == "topk" and not rescaled:
        with pytest.raises(ValueError, match="would change which latents a topk SAE selects"):
            sae.fold_decoder_norm()
        return
    if sparsity == "batch_topk":
        sae.threshold.fill_(0.4)
    norm = sae.W_dec.detach().norm(dim=1)
    acts, recons = sae.encode(x), [sae(x, width) for width in sae.prefixes]
    sae.fold_decoder_norm()
    assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(6).double())
    assert_close(sae.encode(x), acts if rescaled else acts * norm)
    for width, recon in zip(sae.prefixes, recons, strict=True):
        assert_close(sae(x, width), recon)
    assert not sae.rescale_acts_by_decoder_norm


def test_folding_decoder_norms_keeps_what_prefixes_select_alone() -> None:
    for rescaled in (False, True):
        sae, x = make(rescale_acts_by_decoder_norm=rescaled), rows(500, 4)
        calibrate(sae, x)
        before = sae.truncate(3, own_threshold=True).encode(x)
        norm = 1 if rescaled else sae.W_dec.detach().norm(dim=1)[:3]
        assert sae.truncate(3).encode(x).count_nonzero() < before.count_nonzero()
        sae.fold_decoder_norm()
        after = sae.truncate(3, own_threshold=True).encode(x)
        nearly = (sae.pre(x)[:, :3] - sae.truncate(3, own_threshold=True).threshold).abs() < 1e-6  # rounding decides
        assert nearly.sum() < 5
        assert_close(after[~nearly], (before * norm)[~nearly])


# --- truncating ------------------------------------------------------------------------------------------------


def calibrate(sae: MatryoshkaSAE, x: Tensor) -> None:
    found = quantile_thresholds([sae.pre(x)], sae.k, len(x), sae.prefixes)
    sae.prefix_thresholds.copy_(torch.tensor(found))
    if sae.sparsity == "batch_topk":
        sae.threshold.fill_(found[-1])


TRUNCATED = [{"sparsity": s} for s in SPARSITIES]
TRUNCATED += [{"rescale_acts_by_decoder_norm": True}, {"apply_b_dec_to_input": False}, {"d_out": 5}]
TRUNCATED += [{"sparsity": "topk", "d_out": 3}, {"encoder_bias": False, "sparsity": "jumprelu", "bandwidth": 0.5}]


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
    small = sae.truncate(width)
    assert (small.d_in, small.d_sae, small.d_out) == (4, width, sae.d_out)
    assert small.prefixes == sorted({*[p for p in (2, 3) if p < width], width})
    assert small.options() == sae.options()
    assert small.metadata == sae.metadata
    assert small.metadata["nested"] is not sae.metadata["nested"]
    if sae.sparsity == "topk":  # its k are among these latents
        assert_close(small.encode(x), topk(sae.pre(x)[:, :width], 2))
        assert_close(small(x), sae.decode(topk(sae.pre(x)[:, :width], 2)))
    else:
        assert_close(small.encode(x), sae.encode(x, width))
        for inner in small.prefixes:
            assert_close(small(x, inner), sae(x, inner))
    known = [float(t) for p, t in zip(sae.prefixes, sae.prefix_thresholds, strict=True) if p < width]
    expected = [*known, float(sae.prefix_thresholds[-1])]  # the last is that of its threshold, which it shares
    assert small.prefix_thresholds.tolist() == pytest.approx(expected, nan_ok=True)
    assert torch.equal(small.tokens_since_fired, sae.tokens_since_fired[:width])
    with torch.no_grad():  # a copy
        for tensor in small.state_dict().values():
            tensor.fill_(3)
    assert all(same(tensor, before[name]) for name, tensor in sae.state_dict().items())


def test_a_truncated_sae_may_have_the_threshold_of_its_own_l0() -> None:
    sae, x = make(8, 32, [4, 8, 32], k=3, dtype=torch.float32), rows(400, 8, dtype=torch.float32)
    calibrate(sae, x)
    assert int((sae.truncate(8).encode(x) > 0).sum()) < 3 * 400
    own = sae.truncate(8, own_threshold=True)
    assert int((own.encode(x) > 0).sum()) == 3 * 400
    assert float(own.threshold[0]) == float(sae.prefix_thresholds[1]) < float(sae.threshold[0])
    with pytest.raises(ValueError, match=r"^no threshold is calibrated for 9 latents alone; they are for \[4, 8, 32\]"):
        sae.truncate(9, own_threshold=True)


@pytest.mark.parametrize("folded", [False, True])
def test_truncating_twice_gives_the_same_threshold_as_once(folded) -> None:
    sae, x = make(8, 32, [4, 8, 32], k=3, dtype=torch.float32), rows(400, 8, dtype=torch.float32)
    calibrate(sae, x)
    if folded:
        sae.fold_decoder_norm()
    once = sae.truncate(4, own_threshold=True).threshold
    for between in (sae.truncate(8), sae.truncate(9), sae.truncate(8, own_threshold=True)):
        torch.testing.assert_close(between.truncate(4, own_threshold=True).threshold, once)


def test_a_truncated_sae_has_at_most_as_many_active_latents_as_it_is_wide() -> None:
    small = make(k=5, sparsity="topk").truncate(2)
    assert small.k == 2
    assert small.encode(rows(9, 4)).shape == (9, 2)


@pytest.mark.parametrize("width", [0, -1, 7])
def test_impossible_widths_are_refused(width) -> None:
    with pytest.raises(ValueError, match=rf"^prefix={width} must lie between 1 and d_sae=6$"):
        make().truncate(width)


# --- permuting -------------------------------------------------------------------------------------------------

ORDER = torch.tensor([4, 0, 5, 2, 1, 3])
MOVED = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "tokens_since_fired": 0, "use": 0}


def trained(steps: int, sae: MatryoshkaSAE, optimizer: torch.optim.Optimizer, start: int = 0) -> None:
    """A few steps with everything that training keeps."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = matryoshka_loss(sae, rows(8, 4, 100 + step), dead=sae.dead(9), sparsity_weight=0.3)
        loss.total.backward()
        optimizer.step()
        if sae.sparsity == "batch_topk":
            sae.update_threshold(loss.acts, 0.1)
        sae.update_use(loss.acts.square().mean(0), 0.1)
        sae.update_fired((loss.acts > 0).sum(0), len(loss.acts))


def started(sparsity: str) -> tuple[MatryoshkaSAE, torch.optim.Optimizer]:
    sae = make(sparsity=sparsity, bandwidth=0.5, k=2)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.01)
    trained(5, sae, optimizer)
    return sae, optimizer


def everything(sae: MatryoshkaSAE, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    out = state(sae)
    for name, parameter in sae.named_parameters():
        out |= {f"{name}/{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return out


@pytest.mark.parametrize("sparsity", ["batch_topk", "jumprelu"])
def test_permuting_moves_the_optimizer_state_the_emas_and_the_counters(sparsity) -> None:
    sae, optimizer = started(sparsity)
    before, x = everything(sae, optimizer), rows(20, 4)
    acts, recon = sae.encode(x), sae(x)
    sae.permute(ORDER, optimizer)
    assert_close(sae.encode(x), acts[:, ORDER])
    assert_close(sae(x), recon)
    after = everything(sae, optimizer)
    expected = {"W_enc/exp_avg", "W_enc/exp_avg_sq", "W_dec/exp_avg", "b_enc/exp_avg", "b_dec/exp_avg_sq", "W_enc/step"}
    assert expected | ({"threshold/exp_avg_sq"} if sparsity == "jumprelu" else set()) <= after.keys()
    for name, tensor in after.items():
        axis = None if name.endswith("/step") else MOVED.get(name.partition("/")[0])
        assert same(tensor, before[name] if axis is None else before[name].index_select(axis, ORDER)), name
    assert len(before["use"].unique()) == 6


@pytest.mark.parametrize("sparsity", ["batch_topk", "jumprelu"])
def test_training_after_a_permutation_goes_on_as_a_permuted_twin_does(sparsity) -> None:
    sae, optimizer = started(sparsity)
    twin = copy.deepcopy(sae)  # the same state laid out by hand, under an optimizer of its own
    twin.load_state_dict({n: t.index_select(MOVED[n], ORDER) if n in MOVED else t for n, t in state(sae).items()})
    adam = copy.deepcopy(optimizer.state_dict())
    for i, (name, _) in enumerate(sae.named_parameters()):
        for key in ("exp_avg", "exp_avg_sq"):
            if name in MOVED:
                adam["state"][i][key] = adam["state"][i][key].index_select(MOVED[name], ORDER)
    of_twin = torch.optim.Adam(twin.parameters(), lr=0.01)
    of_twin.load_state_dict(adam)
    sae.permute(ORDER, optimizer)
    for s, o in ((sae, optimizer), (twin, of_twin)):
        trained(20, s, o, start=5)
    a, b = everything(sae, optimizer), everything(twin, of_twin)
    assert [name for name in a if not same(a[name], b[name])] == []
    assert not torch.equal(a["W_enc"], started(sparsity)[0].W_enc)


def test_a_permutation_without_an_optimizer_moves_the_sae_alone() -> None:
    sae, optimizer = started("batch_topk")
    before = everything(sae, optimizer)
    sae.permute(ORDER)
    assert torch.equal(sae.W_dec.detach(), before["W_dec"][ORDER])
    assert torch.equal(optimizer.state[sae.W_dec]["exp_avg"], before["W_dec/exp_avg"])


# --- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 65, math.nan, 64.5])
def test_impossible_k(k) -> None:
    with pytest.raises(ValueError, match=r"^model\.k=[^\n]*at most d_sae=64$"):
        MatryoshkaSAE(4, 64, [64], k)


def test_topk_needs_a_whole_k() -> None:
    assert MatryoshkaSAE(4, 64, [64], 2.0, sparsity="topk").k == 2
    with pytest.raises(ValueError, match=r"^model\.k=2\.5 must be whole with model\.sparsity=topk[^\n]*$"):
        MatryoshkaSAE(4, 64, [64], 2.5, sparsity="topk")


@pytest.mark.parametrize(("d_in", "d_sae"), [(0, 8), (8, 0), (-1, 8)])
def test_impossible_sizes(d_in, d_sae) -> None:
    with pytest.raises(ValueError, match=r"^d_in=[^\n]*must be positive$"):
        MatryoshkaSAE(d_in, d_sae, [d_sae], 1)


# --- what is kept exact, the decoder, the dead -----------------------------------------------------------------

BUFFERS = {"prefix_thresholds", "threshold_ema", "threshold_weight", "tokens_since_fired", "use", "scale", "mean"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_stay_exact_in_half_precision(dtype) -> None:
    sae = make(dtype=torch.float32)
    sae.update_threshold(rows(5, 6, dtype=torch.float32), 0.01)
    sae.prefix_thresholds.copy_(torch.rand(3))
    sae.update_use(torch.rand(6), 0.1)
    sae.mean.copy_(torch.rand(4))
    sae.update_fired(torch.ones(6, dtype=torch.int64), 1)
    sae.update_fired(torch.zeros(6, dtype=torch.int64), 10**9 + 1)
    before = {name: tensor.clone() for name, tensor in sae.named_buffers()}
    assert set(before) == BUFFERS | {"threshold"}
    sae.to(dtype)
    assert sae.W_dec.dtype == dtype
    for name, tensor in sae.named_buffers():
        assert same(tensor, before[name]), name
    for i in range(1000):  # 1e-3 of the way each time: bf16 would stand still
        sae.update_threshold(torch.full((1, 6), 300.0), 1e-3)
        assert i or float(sae.threshold[0]) > float(before["threshold"][0])
    assert float(sae.threshold[0]) > 150


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
@pytest.mark.parametrize("options", [{"sparsity": "jumprelu"}, {"d_out": 3}], ids=str)
def test_learned_thresholds_and_a_transcoders_normalisation_stay_exact(options, cast) -> None:
    sae = make(dtype=torch.float32, **options)
    exact = [name for name in sae.state_dict() if name not in WEIGHTS]
    assert {"threshold", "scale"} <= set(exact)
    with torch.no_grad():
        for name in exact:
            if sae.state_dict()[name].is_floating_point():
                sae.state_dict()[name].uniform_(0.1, 0.9)
    before, parameters = state(sae), dict(sae.named_parameters())
    getattr(sae, cast)()
    assert sae.W_enc.dtype == getattr(torch, cast)
    for name in exact:
        assert same(sae.state_dict()[name], before[name]), name
    assert all(p is parameters[name] for name, p in sae.named_parameters())  # an optimizer still has them


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_an_sae_in_bfloat16_maps_bfloat16_to_bfloat16(sparsity) -> None:
    sae, x = make(dtype=torch.float32, sparsity=sparsity), rows(5, 4, dtype=torch.bfloat16)
    if sparsity == "batch_topk":
        sae.threshold.fill_(0.5)
    sae.to(torch.bfloat16)
    assert sae(x).dtype == torch.bfloat16
    assert sae.select(sae.pre(x)).dtype == torch.bfloat16


def test_an_sae_comes_back_from_double_precision() -> None:
    sae, x = make(dtype=torch.float32, sparsity="l1"), rows(5, 4, dtype=torch.float32)
    before, recon = state(sae), sae(x)
    sae.double().float()
    assert [name for name, tensor in sae.state_dict().items() if not same(tensor, before[name])] == []
    assert torch.equal(sae(x), recon)


def test_decoder_norms_and_projected_gradient() -> None:
    sae, x = make(), rows(5, 4)
    direction = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.detach(), direction, rtol=1e-14, atol=1e-15)

    sae.project_decoder_gradient()  # no gradient yet: nothing to do
    matryoshka_loss(sae, x, Objective()).total.backward()
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


def test_use_is_an_average_that_starts_at_zero() -> None:
    sae = make()
    for _ in range(3):
        sae.update_use(torch.arange(6.0), 0.5)
    torch.testing.assert_close(sae.use, torch.arange(6.0).double() * (1 - 0.5**3))
