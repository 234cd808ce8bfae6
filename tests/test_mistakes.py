"""Nine mistakes that implementations of sparse autoencoders have made: each check passes here and fails with it put in.

A `check` states what must hold. Beside the code as it is, it is given that code with the mistake, and must fail.
"""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import msae.sae.forms
import msae.sae.objective
import msae.training.step
from msae.data.batches import ValBatches
from msae.data.harvest import harvest
from msae.evaluation.evaluate import HeldOut, calibrate, evaluate
from msae.sae import (
    AuxK,
    MatryoshkaSAE,
    Objective,
    auxk_loss,
    batch_topk,
    load_sae,
    matryoshka_loss,
    quantile_thresholds,
    save_sae,
)
from msae.settings import changed
from msae.sources.forest import ForestSource
from msae.training.module import MatryoshkaTraining
from tests.test_model import make, rows, same, state
from tests.training import differing, merged, module_of, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
D_IN, D_SAE, K = 6, 16, 3


def assert_fails(check: Callable[..., None], *arguments: object) -> None:
    with pytest.raises(AssertionError):
        check(*arguments)


def started(prefixes: list[int], **recipe: Any) -> MatryoshkaTraining:
    quick = {"schedule": {"warmup_steps": 2}, "lr": 1e-2, "dead": {"after_tokens": 100}}
    module = module_of(D_IN, D_SAE, prefixes, K, **merged(quick, recipe))
    x = rows(5000, D_IN, dtype=torch.float32)
    module.step().start_from((x.mean(0), float(x.square().sum(1).mean())))
    return module


def fit(module: MatryoshkaTraining, steps: int, **options: Any) -> MatryoshkaTraining:
    trainer_of(steps, **options).fit(module, batches(steps))
    return module


def batches(n: int) -> DataLoader[Tensor]:
    return DataLoader(rows(n * 8, D_IN, 2), batch_size=8)  # type: ignore[arg-type]


# --- 1: latents are sorted, what belongs to them is not ---------------------------------------------------------


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


PERMUTE = msae.training.step.permute


def check_sorting_changes_the_order_alone() -> None:
    """With one prefix the order says nothing: a sorted run has the losses and, in another order, the state of any."""
    losses, saes = [], []
    for is_sorted in (True, False):
        seen, dead = Losses(), {"after_tokens": 20}
        with pytest.MonkeyPatch.context() as patch:
            if not is_sorted:  # how much latents are used is measured, and they stay where they are
                patch.setattr(msae.training.step, "permute", lambda *_: None)
            module = started([D_SAE], resort_rate=0.5, dead=dead)
            saes.append(fit(module, 30, precision="64-true", callbacks=[seen]).sae)
        losses.append(seen.values)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    torch.testing.assert_close(saes[0].use, saes[1].use.sort(descending=True).values)
    assert torch.equal(saes[0].tokens_since_fired.sort().values, saes[1].tokens_since_fired.sort().values)
    order = saes[1].use.argsort(descending=True)
    torch.testing.assert_close(saes[0].W_dec, saes[1].W_dec[order])
    assert not torch.equal(order, torch.arange(D_SAE))


def leaves_adam(sae, order, optimizer=None) -> None:
    PERMUTE(sae, order)


def leaves(name: str):
    def mistaken(sae, order, optimizer=None) -> None:
        before = getattr(sae, name).clone()
        PERMUTE(sae, order, optimizer)
        getattr(sae, name).copy_(before)

    return mistaken


@pytest.mark.parametrize(
    "mistaken", [leaves_adam, leaves("use"), leaves("tokens_since_fired")], ids=["adam", "ema", "counters"]
)
def test_1_sorting_moves_the_optimizer_state_the_ema_and_the_counters(mistaken, monkeypatch) -> None:
    check_sorting_changes_the_order_alone()
    monkeypatch.setattr(msae.training.step, "permute", mistaken)
    assert_fails(check_sorting_changes_the_order_alone)


# --- 2: averages that start at 0 --------------------------------------------------------------------------------


def check_inference_l0_is_about_k_from_the_first_step() -> None:
    x = rows(2000, D_IN, 9, torch.float32)
    for steps in (1, 2, 5, 40):
        sae = fit(started([4, D_SAE]), steps).sae
        assert K / 2 < float((sae.encode(x) > 0).sum(1).float().mean()) < 1.5 * K, steps


def check_activations_are_normalised_at_the_first_step() -> None:
    sae, x = make(D_IN, D_SAE, [D_SAE], K, dtype=torch.float32), 50 * rows(2000, D_IN, dtype=torch.float32)
    sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()))
    assert 0.5 < float(((x - sae.mean) * sae.scale).square().sum(1).mean()) < 2


def check_both_l0s_are_reported(metrics: dict[str, float], sae: MatryoshkaSAE, x: Tensor) -> None:
    assert metrics["train/k"] == sae.k
    for width in sae.prefixes:
        measured = float((sae.encode(x, width) > 0).sum(1).double().mean())
        assert metrics[f"val/l0/p{width}"] == pytest.approx(measured)


@torch.no_grad()
def uncorrected(self, acts: Tensor, rate: float) -> None:
    self.threshold_ema.lerp_(acts[acts > 0].min(), rate)
    self.threshold.copy_(self.threshold_ema.expand(self.d_sae))


def test_2_the_threshold_is_right_from_the_first_step(monkeypatch) -> None:
    check_inference_l0_is_about_k_from_the_first_step()
    monkeypatch.setattr(MatryoshkaSAE, "update_threshold", uncorrected)
    assert_fails(check_inference_l0_is_about_k_from_the_first_step)


def test_2_the_normaliser_is_right_from_the_first_step(monkeypatch) -> None:
    set_statistics = MatryoshkaSAE.set_statistics

    def from_zero(self, mean, mean_square, *a, **k) -> None:  # the first step of an average with rate 0.01
        set_statistics(self, 0.01 * mean, 0.01 * mean_square, *a, **k)

    check_activations_are_normalised_at_the_first_step()
    monkeypatch.setattr(MatryoshkaSAE, "set_statistics", from_zero)
    assert_fails(check_activations_are_normalised_at_the_first_step)


def test_2_the_k_of_training_and_the_l0_of_inference_are_both_reported(tmp_path) -> None:
    source = ForestSource(rows=64, val_rows=400, chunk_rows=64)
    shards = harvest(source, tmp_path, show=False)["synthetic"]
    sae, x = make(20, 32, [8, 32], K, dtype=torch.float32), shards.activations("val", 0)
    calibrate(sae, ValBatches(shards, 64))
    sae.threshold.mul_(0.5)  # as a threshold that lags behind
    metrics = evaluate(sae, HeldOut(shards, source, batch_tokens=64))
    check_both_l0s_are_reported(metrics, sae, x)
    assert metrics["val/l0/p32"] > 1.2 * metrics["train/k"]
    assert_fails(check_both_l0s_are_reported, metrics | {"val/l0/p32": metrics["train/k"]}, sae, x)
    assert_fails(check_both_l0s_are_reported, metrics | {"train/k": metrics["val/l0/p32"]}, sae, x)


# --- 3: a threshold that is set only later ----------------------------------------------------------------------


def check_inference_is_refused_or_sparse(steps: int) -> None:
    sae, x = started([4, D_SAE]).sae if not steps else fit(started([4, D_SAE]), steps).sae, rows(500, D_IN).float()
    try:
        acts = sae.encode(x)
    except ValueError:  # no threshold yet
        return
    assert float((acts > 0).sum(1).float().mean()) < 2 * K < D_SAE / 2


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_3_an_sae_whose_training_stopped_early_is_not_silently_dense(steps, tmp_path, monkeypatch) -> None:
    check_inference_is_refused_or_sparse(steps)
    with pytest.raises(ValueError, match="no threshold yet"):
        save_sae(started([D_SAE]).sae, tmp_path)
    init = MatryoshkaSAE.__init__

    def starts_at_minus_one(self, *a, **k) -> None:
        init(self, *a, **k)
        self.threshold.fill_(-1.0)

    monkeypatch.setattr(MatryoshkaSAE, "__init__", starts_at_minus_one)
    monkeypatch.setattr(MatryoshkaSAE, "update_threshold", lambda self, acts, rate: None)  # before step 1000
    assert_fails(check_inference_is_refused_or_sparse, steps)


# --- 4: tokens of a 3-D input are miscounted --------------------------------------------------------------------


def check_three_dimensions_keep_k_times_tokens(select: Callable[[Tensor, float], Tensor]) -> None:
    pre = rows(24, D_SAE).abs()
    for shape in ((24, D_SAE), (4, 6, D_SAE), (2, 3, 4, D_SAE)):
        acts = select(pre.view(shape), K)
        assert int((acts > 0).sum()) == 24 * K
        assert torch.equal(acts.view(24, D_SAE), select(pre, K))


def counts_sequences(pre: Tensor, k: float) -> Tensor:
    values, index = pre.relu().flatten().topk(round(k * pre.shape[0]), sorted=False)
    return torch.zeros(pre.numel(), dtype=pre.dtype).scatter(0, index, values).view_as(pre)


def test_4_batch_topk_counts_every_position_as_a_token() -> None:
    check_three_dimensions_keep_k_times_tokens(batch_topk)
    assert_fails(check_three_dimensions_keep_k_times_tokens, counts_sequences)


# --- 5: AuxK ----------------------------------------------------------------------------------------------------

DEAD = torch.tensor([False, True, False, False, True, False])


def check_nothing_is_left_where_the_dead_make_it_all() -> None:
    sae = MatryoshkaSAE(2, 2, [1, 2], 1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(2)), sae.W_enc.copy_(torch.eye(2)), sae.b_dec.copy_(torch.tensor([5.0, -7.0]))
    loss = matryoshka_loss(sae, torch.tensor([[9.0, -4.0]]), dead=torch.tensor([False, True]))
    assert float(loss.aux) == 0


def aux_gradients(coefficient: float) -> dict[str, Tensor]:
    """Of each parameter, what AuxK adds to the gradient of the other losses."""
    added = []
    for dead in (DEAD, None):
        sae = make(k=1)
        matryoshka_loss(sae, rows(5, 4), Objective(aux=AuxK(coefficient)), dead).total.backward()
        added.append({name: p.grad for name, p in sae.named_parameters()})
    return {name: added[0][name] - added[1][name] for name in added[0]}


def check_the_dead_have_a_gradient() -> None:
    added = aux_gradients(1.0)
    for per_latent in (added["W_enc"].T, added["b_enc"][:, None], added["W_dec"]):
        assert (per_latent[DEAD].abs().sum(1) > 1e-6).all()


def check_the_living_have_none() -> None:
    added = aux_gradients(1.0)
    for per_latent in (added["W_enc"].T, added["b_enc"][:, None], added["W_dec"]):
        assert per_latent[~DEAD].abs().max() < 1e-12


def check_the_coefficient_counts_once() -> None:
    once, half = aux_gradients(1.0), aux_gradients(0.5)
    for name in once:
        torch.testing.assert_close(half[name], 0.5 * once[name], rtol=1e-9, atol=1e-12)


def b_dec_twice(sae, pre, residuals, *others) -> Tensor:
    return auxk_loss(sae, pre, [residual - sae.b_dec for residual in residuals], *others)


def without_gradient(*arguments) -> Tensor:
    return auxk_loss(*arguments).detach()


def coefficient_twice(*arguments) -> Tensor:
    return arguments[5].coefficient * auxk_loss(*arguments)


def not_detached(*arguments) -> Tensor:
    return auxk_loss(*arguments[:5], changed(arguments[5], detach=False), *arguments[6:])


@pytest.mark.parametrize(
    ("check", "mistaken"),
    [
        (check_nothing_is_left_where_the_dead_make_it_all, b_dec_twice),
        (check_the_dead_have_a_gradient, without_gradient),
        (check_the_coefficient_counts_once, coefficient_twice),
        (check_the_living_have_none, not_detached),
    ],
    ids=lambda f: f.__name__,
)
def test_5_auxk(check, mistaken, monkeypatch) -> None:
    check()
    monkeypatch.setattr(msae.sae.objective, "auxk_loss", mistaken)
    assert_fails(check)


# --- 6: a threshold in bf16 stands still ------------------------------------------------------------------------


def check_small_steps_move_the_threshold_in_bfloat16() -> None:
    sae = make(dtype=torch.float32)
    sae.update_threshold(torch.full((1, 6), 1.0), 1e-3)
    sae.to(torch.bfloat16)
    for _ in range(1000):
        sae.update_threshold(torch.full((1, 6), 300.0), 1e-3)
    assert float(sae.threshold[0]) > 150
    assert sae.threshold.dtype == torch.float32


def check_small_steps_move_a_learned_threshold_in_bfloat16() -> None:
    sae = make(dtype=torch.float32, sparsity="jumprelu").to(torch.bfloat16)
    before = sae.threshold.detach().clone()
    with torch.no_grad():
        for _ in range(100):
            sae.threshold.sub_(1e-5)
    torch.testing.assert_close(sae.threshold.detach(), before - 1e-3, rtol=0, atol=1e-5, check_dtype=False)


def check_use_and_counters_move_in_bfloat16() -> None:
    sae = make(dtype=torch.float32).to(torch.bfloat16)
    for _ in range(2000):
        sae.update_use(torch.ones(6), 2e-3)
        sae.update_fired(torch.zeros(6, dtype=torch.int64), 1)
    assert float(sae.use[0]) > 0.98
    assert sae.tokens_since_fired.tolist() == [2000] * 6


@torch.no_grad()
def in_the_type_of_the_module(self, acts: Tensor, rate: float) -> None:
    smallest = acts[acts > 0].min().to(self.threshold)
    known = self.threshold.nan_to_num(float(smallest))
    self.threshold.copy_(known + rate * (smallest - known))


@pytest.mark.parametrize(
    "check",
    [
        check_small_steps_move_the_threshold_in_bfloat16,
        check_small_steps_move_a_learned_threshold_in_bfloat16,
        check_use_and_counters_move_in_bfloat16,
    ],
    ids=lambda f: f.__name__,
)
def test_6_thresholds_and_averages_stay_in_single_precision(check, monkeypatch) -> None:
    check()
    monkeypatch.setattr(MatryoshkaSAE, "_apply", nn.Module._apply)
    monkeypatch.setattr(MatryoshkaSAE, "update_threshold", in_the_type_of_the_module)
    assert_fails(check)


@pytest.mark.parametrize("sparsity", ["batch_topk", {"name": "jumprelu", "bandwidth": 0.5}], ids=["topk", "jumprelu"])
def test_6_training_in_mixed_precision_keeps_them_too(sparsity) -> None:
    module = started([4, D_SAE], sparsity=sparsity, resort_rate=0.1)
    sae = fit(module, 20, precision="bf16-mixed").sae
    exact, before = ("threshold", "threshold_ema", "use", "scale"), started([4, D_SAE], sparsity=sparsity).sae
    assert {getattr(sae, name).dtype for name in exact} == {torch.float32}
    assert not same(sae.threshold.detach(), before.threshold.detach())
    as_bfloat16 = sae.threshold.detach().bfloat16().float()
    assert not torch.equal(as_bfloat16, sae.threshold.detach())  # more digits than bf16 has


# --- 7: BatchTopK depends on the batch --------------------------------------------------------------------------


def uneven() -> tuple[MatryoshkaSAE, Tensor]:
    """An SAE and rows whose first half is much stronger than the second."""
    sae, x = make(D_IN, D_SAE, [4, D_SAE], K, dtype=torch.float32), rows(200, D_IN, dtype=torch.float32)
    x[:100] *= 5
    sae.threshold.fill_(quantile_thresholds([sae.pre(x).detach()], K, len(x), [D_SAE])[0])
    return sae, x


def check_a_row_is_encoded_alike_in_any_batch() -> None:
    sae, x = uneven()
    whole = sae.encode(x) > 0
    for size in (1, 7, 100):
        assert torch.equal(torch.cat([sae.encode(part) > 0 for part in x.split(size)]), whole), size
    assert int(whole.sum()) == K * len(x)


def test_7_inference_does_not_depend_on_the_batch(monkeypatch) -> None:
    check_a_row_is_encoded_alike_in_any_batch()
    monkeypatch.setattr(MatryoshkaSAE, "encode", lambda self, x: self.select(self.pre(x)))
    assert_fails(check_a_row_is_encoded_alike_in_any_batch)


def test_7_each_device_selects_within_its_own_batch_and_says_so() -> None:
    assert "Each of several devices selects within its own batch" in " ".join(batch_topk.__doc__.split())
    sae, x = uneven()
    shards = [sae.select(sae.pre(part)) for part in x.chunk(2)]
    assert [int((acts > 0).sum()) for acts in shards] == [100 * K, 100 * K]
    together = sae.select(sae.pre(x))
    assert int((together > 0).sum()) == 200 * K
    assert not torch.equal(torch.cat(shards) > 0, together > 0)
    assert torch.equal(torch.cat([sae.encode(part) > 0 for part in x.chunk(2)]), together > 0)


# --- 8: the scale is folded in some places and not in others ----------------------------------------------------


def check_the_file_is_the_sae(directory, kind: str) -> None:
    options = {"autoencoder": {}, "transcoder": {"d_out": 5}, "rescaled": {"rescale_acts_by_decoder_norm": True}}[kind]
    sae = make(D_IN, D_SAE, [4, D_SAE], K, 3.0, dtype=torch.float32, sparsity="jumprelu", **options)
    x = rows(300, D_IN, dtype=torch.float32)
    with torch.no_grad():
        sae.mean.fill_(0.4)
        for name, value in (("output_scale", 0.2), ("output_mean", -2.0)):
            if sae.is_transcoder:
                sae._buffers[name].fill_(value)
    loaded = load_sae(save_sae(sae, directory))
    assert float(loaded.scale) == float(loaded.target_scale) == 1
    for width in sae.prefixes:
        acts = sae.encode(x, width)
        assert 0 < int((acts > 0).sum()) < acts.numel()
        torch.testing.assert_close(loaded.encode(x, width), acts / sae.target_scale, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded(x, width), sae(x, width), rtol=1e-4, atol=1e-4)


FOLDED = {
    "autoencoder": ("b_enc", "b_dec", "threshold"),
    "transcoder": ("W_enc", "b_enc", "b_dec", "threshold"),
    "rescaled": ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FOLDED.items() for name in names])
def test_8_the_scale_is_folded_everywhere(kind, name, tmp_path, monkeypatch) -> None:
    check_the_file_is_the_sae(tmp_path, kind)
    fold = msae.sae.forms.fold

    def leaves_one_out(sae) -> None:
        before = getattr(sae, name).detach().clone()
        fold(sae)
        getattr(sae, name).data.copy_(before)

    monkeypatch.setattr(msae.sae.forms, "fold", leaves_one_out)
    assert_fails(check_the_file_is_the_sae, tmp_path, kind)


# --- 9: evaluating changes what is evaluated --------------------------------------------------------------------


def check_encoding_moves_nothing(training: bool) -> None:
    sae, x = uneven()
    before = state(sae.train(training))
    for prefix in (None, 4):
        sae.encode(x, prefix), sae(x, prefix)
    assert differing(dict(sae.state_dict()), before) == []


def check_validating_moves_nothing() -> None:
    module = fit(started([4, D_SAE], resort_rate=0.1), 3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer_of(1).validate(module, batches(3), verbose=False)
    assert differing(dict(module.state_dict()), before) == []


@pytest.mark.parametrize("training", [True, False])
def test_9_encoding_moves_nothing_in_either_mode(training, monkeypatch) -> None:
    check_encoding_moves_nothing(training)
    encode = MatryoshkaSAE.encode

    def moves_the_threshold(self, x, prefix=None) -> Tensor:
        if self.training:
            self.update_threshold(self.select(self.pre(x)), 0.1)
        return encode(self, x, prefix)

    monkeypatch.setattr(MatryoshkaSAE, "encode", moves_the_threshold)
    if training:
        assert_fails(check_encoding_moves_nothing, training)
    else:
        check_encoding_moves_nothing(training)


def moves_the_threshold(self, batch, batch_idx) -> None:
    self.sae.update_threshold(self.sae.select(self.sae.pre(batch.float())), 0.1)


def moves_the_counters(self, batch, batch_idx) -> None:
    self.sae.update_fired((self.sae.encode(batch.float()) > 0).sum(0), len(batch))


@pytest.mark.parametrize("mistaken", [moves_the_threshold, moves_the_counters])
def test_9_validating_moves_nothing(mistaken, monkeypatch) -> None:
    check_validating_moves_nothing()
    step = MatryoshkaTraining.validation_step
    monkeypatch.setattr(MatryoshkaTraining, "validation_step", lambda self, *a: (mistaken(self, *a), step(self, *a))[1])
    assert_fails(check_validating_moves_nothing)
