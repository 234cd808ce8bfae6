"""What has no package to compare with, written out plainly from papers and published descriptions, in float64."""

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from msae.sae import MatryoshkaSAE, pareto_prefixes
from msae.sae.sparsity import l0_penalty
from msae.training.module import MatryoshkaTraining
from tests.published import (
    BATCH,
    D_SAE,
    PREFIXES,
    STEPS,
    TOLERANCE,
    K,
    assert_close,
    assert_same_loss,
    assert_same_training,
    batches,
    each_dtype,
    gradients,
    loss_of,
    preset,
    randomise,
    rows,
    statistics,
    train,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def double(sae: MatryoshkaSAE) -> MatryoshkaSAE:
    """A copy to hold the weights of the reference."""
    return copy.deepcopy(sae).double()


def assert_trains_as(module: MatryoshkaTraining, data: list[Tensor], step: Callable[[Tensor], Tensor], w) -> None:
    """Train by a real Trainer and by `step`, which moves `w`: the same losses and weights."""
    start, scale = weights(w), module.sae.scale.double()
    reference = [(step(x * scale), weights(w)) for x in data]
    assert_same_training(train(module, data), reference, start, 1e-9)


def started(module: MatryoshkaTraining, data: list[Tensor]) -> MatryoshkaSAE:
    """Start as `msae.train` does; a copy that holds the weights."""
    module.step().start_from(statistics(data))
    return double(module.sae)


# --- bartbussmann/matryoshka_sae ----------------------------------------------------------------------------------


def bussmann(w: MatryoshkaSAE, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over b_dec alone and every prefix of the mean squared error, and 1/32 of AuxK's; the activations."""
    every = ((x - w.b_dec) @ w.W_enc).clamp_min(0)
    bar = sorted(every.detach().flatten().tolist(), reverse=True)[K * len(x) - 1]
    acts = every * (every >= bar)
    errors = [(w.b_dec - x).square().mean()]
    for width in PREFIXES:
        recon = w.b_dec + sum(acts[:, [j]] * w.W_dec[j] for j in range(width))
        errors.append((recon - x).square().mean())
    loss = sum(errors) / len(errors)
    if dead.any():
        residuals = []
        for i in range(len(x)):
            largest = sorted(dead.nonzero().flatten().tolist(), key=lambda j: -float(every[i, j].detach()))[:512]
            residuals.append((x - recon)[i] - sum(every[i, j] * w.W_dec[j] for j in largest))
        loss = loss + torch.stack(residuals).square().mean() / 32
    return loss, acts


@each_dtype
@pytest.mark.parametrize("dead", ["none", "some", "all"])
def test_bussmann_loss_and_gradients(dead, dtype) -> None:
    module, x = preset("bussmann", dtype), rows()
    assert module.step().recipe.objective.aux.k == 512  # more than there are here
    randomise(module.sae)
    mask = {"none": torch.zeros(D_SAE), "some": torch.arange(D_SAE) % 3, "all": torch.ones(D_SAE)}[dead] > 0
    w = double(module.sae)
    expected, acts = bussmann(w, x, mask)
    loss = loss_of(module, x, mask)
    assert (acts > 0).sum() == (loss.code.dense() > 0).sum() == K * BATCH
    assert_same_loss(loss, module.sae, expected, w)


def test_bussmann_leaves_auxk_out_where_no_dead_latent_is_positive() -> None:
    """Their code takes it only where the dead reconstruct something; the residual alone is not trained twice."""
    module, x = preset("bussmann"), rows().abs() + 9
    randomise(module.sae)
    mask = torch.arange(D_SAE) >= PREFIXES[-2]
    module.sae.W_enc.data[:, mask] = -1.0
    w = double(module.sae)
    expected, _ = bussmann(w, x, torch.zeros_like(mask))
    assert_same_loss(loss_of(module, x, mask), module.sae, expected, w)


def test_bussmann_training() -> None:
    module, data = preset("bussmann", dead={"after_steps": 3}), batches()
    w = started(module, data)
    optimizer = torch.optim.Adam([w.W_enc, w.W_dec, w.b_dec], lr=3e-4, betas=(0.9, 0.99))
    silent, aux_on = torch.zeros(D_SAE), []

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            acts = bussmann(w, x, torch.zeros(D_SAE, dtype=torch.bool))[1]
            silent.add_(1)[(acts > 0).any(0)] = 0
        dead = silent >= 3
        aux_on.append(bool(dead.any()))
        loss, _ = bussmann(w, x, dead)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            decoder = w.W_dec
            decoder /= decoder.norm(dim=1, keepdim=True)
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
        optimizer.step()
        return loss.detach()

    assert_trains_as(module, data, step, w)
    assert 0 < sum(aux_on) < STEPS


# --- noanabeshima/matryoshka-saes ---------------------------------------------------------------------------------


def nabeshima(w: MatryoshkaSAE, x: Tensor, widths: Sequence[int], penalty: str, weight: float) -> tuple[Tensor, Tensor]:
    """The mean over prefixes of the squared error and of the penalty on acts × ‖W_dec row‖; the activations."""
    acts = (x @ w.W_enc + w.b_enc).clamp_min(0)
    contribution = acts * w.W_dec.square().sum(1).sqrt()
    cost = contribution if penalty == "l1" else torch.log(contribution + 0.1) - math.log(0.1)
    errors, costs = [], []
    for width in widths:
        recon = w.b_dec + acts[:, :width] @ w.W_dec[:width]
        errors.append((recon - x).square().sum() / len(x))
        costs.append(cost[:, :width].sum() / len(x))
    return sum(errors) / len(widths) + weight * sum(costs) / len(widths), acts


@each_dtype
@pytest.mark.parametrize("penalty", ["l1", "log"])
@pytest.mark.parametrize("draw", [0, 1, 2])
def test_nabeshima_loss_and_gradients(draw, penalty, dtype) -> None:
    module, x = preset("nabeshima", dtype, sparsity=penalty), rows()
    randomise(module.sae)
    w = double(module.sae)
    widths = pareto_prefixes(D_SAE, 10, torch.Generator().manual_seed(draw))
    expected, _ = nabeshima(w, x, widths, penalty, 0.7)
    loss = loss_of(module, x, prefixes=widths, sparsity_weight=0.7)
    assert_same_loss(loss, module.sae, expected, w)


@pytest.mark.parametrize("penalty", ["l1", "log"])
def test_nabeshima_training(penalty) -> None:
    """The controller, the clipping, the schedule, and latents re-sorted with Adam's state and the EMA."""
    warmup, lr, l0 = 4, 3e-2, 12
    schedule, control = {"warmup_steps": warmup}, {"control": 0.05}
    module, data = preset("nabeshima", sparsity=penalty, schedule=schedule, penalty=control, k=l0), batches()
    w, use, scale, orders, at = started(module, data), torch.zeros(D_SAE), [1.2], [], iter(range(STEPS))
    optimizer = torch.optim.Adam([w.W_enc, w.b_enc, w.W_dec, w.b_dec], lr=lr, betas=(0.5, 0.9375))

    def step(x: Tensor) -> Tensor:
        i = next(at)
        with torch.no_grad():
            acts = nabeshima(w, x, [D_SAE], penalty, 0)[1]
            if i + 1 > STEPS * 0.2:
                scale[0] *= 1.05 if float((acts > 0).sum()) / len(x) >= l0 else 0.95
            weight = scale[0] * min(1, (i + 1) / (STEPS * 0.2))
            use.copy_(0.95 * use + 0.05 * (acts * w.W_dec.norm(dim=1)).square().mean(0))
        loss, _ = nabeshima(w, x, module.step().prefixes(i), penalty, weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        rise, fall = min(1, i / warmup), 1 - 0.9 * max(0.0, i - 0.8 * STEPS) / (0.2 * STEPS)
        optimizer.param_groups[0]["lr"] = lr * min(rise, fall)
        optimizer.step()
        order = sorted(range(D_SAE), key=lambda j: -float(use[j]))
        orders.append(order)
        use.copy_(use[order])
        for parameter, axis in ((w.W_enc, 1), (w.b_enc, 0), (w.W_dec, 0)):
            for t in (parameter.data, optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]):
                t.copy_(t.index_select(axis, torch.tensor(order)))
        return loss.detach()

    assert_trains_as(module, data, step, w)
    assert sum(order != sorted(order) for order in orders) > STEPS / 2  # latents did move
    assert 1.2 * 1.05**20 > scale[0] > 1.2 * 0.95**20  # the weight went both up and down
    assert float(module.step().controller.weight) == pytest.approx(scale[0], rel=1e-6)


def test_prefixes_are_drawn_as_often_as_numpy_draws_them_without_replacement() -> None:
    generator, theirs = torch.Generator().manual_seed(0), np.random.default_rng(0)
    density = np.diff(np.sqrt(np.arange(D_SAE)))
    density /= density.sum()
    our_count, their_count = np.zeros(D_SAE + 1), np.zeros(D_SAE + 1)
    for _ in range(5000):
        widths = pareto_prefixes(D_SAE, 10, generator)
        assert len(set(widths)) == 10
        our_count[widths[:-1]] += 1
        their_count[theirs.choice(np.arange(1, D_SAE), 9, replace=False, p=density)] += 1
    share = (our_count + their_count)[1:-1] / 10_000
    z = (our_count - their_count)[1:-1] / 5000 / np.sqrt(2 * share * (1 - share) / 5000 + 1e-12)
    assert np.abs(z).max() < 4


# --- Gemma Scope 2 ------------------------------------------------------------------------------------------------


@each_dtype
def test_gemma_scope_2_loss_and_gradients(dtype) -> None:
    """Every prefix's error and λ (2 / L0*) (L0 − L0*)², the thresholds' gradients through rectangles by hand."""
    bandwidth, weight = 0.6, 0.3  # a wide rectangle, so that many pre-activations are in it
    module, x = preset("gemma_scope_2", dtype, sparsity={"name": "jumprelu", "bandwidth": bandwidth}), rows()
    sae = module.sae
    randomise(sae)
    sae.threshold.data = torch.rand(D_SAE, generator=torch.Generator().manual_seed(5)).to(sae.threshold)
    w = double(sae)
    threshold = w.threshold.detach()

    pre = (x - w.b_dec) @ w.W_enc + w.b_enc
    active, near = pre.detach() > threshold, (pre.detach() - threshold).abs() < bandwidth / 2
    acts = (pre * active).detach().requires_grad_()
    error = sum((w.b_dec + acts[:, :m] @ w.W_dec[:m] - x).square().sum() / BATCH for m in PREFIXES)
    l0 = active.sum(1).double()
    penalty = weight * sum(2 / K * (float(n) - K) ** 2 for n in l0) / BATCH
    error.backward()
    to_threshold = torch.zeros(D_SAE, dtype=torch.float64)
    for i in range(BATCH):
        for j in range(D_SAE):
            if near[i, j]:  # dH/dθ = −1/bandwidth, da/dθ = −θ/bandwidth
                of_l0 = weight * 4 / K * (float(l0[i]) - K) / BATCH
                to_threshold[j] -= (of_l0 + threshold[j] * acts.grad[i, j]) / bandwidth
    pre.backward(acts.grad * active)

    loss = loss_of(module, x, sparsity_weight=weight)
    expected = {name: getattr(w, name).grad for name in weights(w)}
    expected |= {"threshold": to_threshold, "loss": error.detach() + penalty}
    assert_close(gradients(loss.total, sae, "threshold"), expected, TOLERANCE[dtype])
    assert float(l0_penalty(l0, K)) * weight == pytest.approx(float(penalty), rel=1e-12)
