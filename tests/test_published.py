"""What has no package to compare with, written out plainly from papers and published descriptions, in float64."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import lightning as L
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor
from torch.utils.data import DataLoader

from msae.config import compose
from msae.sae import L0Controller, MatryoshkaSAE, Objective, matryoshka_loss, pareto_prefixes
from msae.sae.loss import orthogonality_penalty
from msae.sae.sparsity import quadratic_l0
from msae.training.module import MatryoshkaTraining

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
D_IN, D_SAE, PREFIXES, K, BATCH, STEPS = 8, 24, [4, 10, 24], 3, 32, 25
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
Weights = dict[str, Tensor]


def preset(name: str, dtype: torch.dtype = torch.float64, **changed) -> MatryoshkaTraining:
    """The module of a preset at this size, with `changed` keys of the model."""
    sizes = {"d_sae": D_SAE, "prefixes": PREFIXES, "k": K} | changed
    return instantiate(compose("train", [f"preset={name}"]).model, d_in=D_IN, **sizes).to(dtype)


def rows(n: int = BATCH, seed: int = 1) -> Tensor:
    x = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.linspace(0.5, 2, D_IN) + torch.linspace(-1, 1, D_IN)


def randomise(sae: MatryoshkaSAE, seed: int = 0) -> None:
    """No trained bias zero, no row of unit norm, W_enc not W_decᵀ."""
    generator = torch.Generator().manual_seed(seed)
    for name in NAMES:
        weight = getattr(sae, name)
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight) / 2


def double(sae: MatryoshkaSAE) -> Weights:
    return {name: getattr(sae, name).detach().double().clone().requires_grad_() for name in NAMES}


def assert_close(ours: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """‖ours − wanted‖ ≤ tolerance · ‖wanted‖ for every tensor."""
    for name, b in wanted.items():
        difference = float((ours[name].double() - b).norm()) / (float(b.norm()) or 1.0)
        assert difference <= tolerance, f"{name} differs by {difference:.2e} of its norm"


def assert_same_loss(ours: Tensor, sae: MatryoshkaSAE, wanted: Tensor, w: Weights) -> None:
    """Loss and every gradient."""
    ours.backward(), wanted.backward()
    trained = [name for name in NAMES if getattr(sae, name).requires_grad]
    found = {"loss": ours.detach()} | {name: getattr(sae, name).grad for name in trained}
    expected = {"loss": wanted.detach()} | {name: w[name].grad for name in trained}
    assert all(gradient.any() for gradient in expected.values())
    assert_close(found, expected, TOLERANCE[sae.W_dec.dtype])


def same_training(
    module: MatryoshkaTraining, data: Sequence[Tensor], step: Callable[[Tensor], Tensor], w: Weights
) -> None:
    """Train for as many steps by a real Trainer and by `step`, which moves `w`: the same losses and weights."""

    class Compare(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            found = {"loss": outputs["loss"].detach()} | {name: getattr(module.sae, name).detach() for name in NAMES}
            wanted = step(batch * module.sae.scale.double())
            assert_close(found, {"loss": wanted} | {name: w[name].detach() for name in NAMES}, 1e-9)

    L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=len(data),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Compare()],
    ).fit(module, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    assert module.global_step == len(data)


def start(module: MatryoshkaTraining, data: Sequence[Tensor]) -> Weights:
    """As `msae.train` starts; a copy of the weights."""
    x = torch.cat(list(data))
    module.start_from((x.mean(0), float(x.square().sum(1).mean())))
    return double(module.sae)


# --- bartbussmann/matryoshka_sae ----------------------------------------------------------------------------------


def bussmann(w: Weights, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over b_dec alone and every prefix of the mean squared error, and 1/32 of AuxK's; the activations."""
    every = ((x - w["b_dec"]) @ w["W_enc"]).clamp_min(0)
    bar = sorted(every.detach().flatten().tolist(), reverse=True)[K * len(x) - 1]
    acts = every * (every >= bar)
    errors = [(w["b_dec"] - x).square().mean()]
    for width in PREFIXES:
        recon = w["b_dec"] + sum(acts[:, [j]] * w["W_dec"][j] for j in range(width))
        errors.append((recon - x).square().mean())
    loss = sum(errors) / len(errors)
    if dead.any():
        left = x - recon
        parts = []
        for i in range(len(x)):
            largest = sorted(dead.nonzero().flatten().tolist(), key=lambda j: -float(every[i, j].detach()))[:512]
            parts.append(left[i] - sum(every[i, j] * w["W_dec"][j] for j in largest))
        loss = loss + torch.stack(parts).square().mean() / 32
    return loss, acts


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dead", ["none", "some", "all"])
def test_bussmann_loss_and_gradients(dead, dtype) -> None:
    module, x = preset("bussmann", dtype), rows()
    randomise(module.sae)
    mask = {"none": torch.zeros(D_SAE), "some": torch.arange(D_SAE) % 3, "all": torch.ones(D_SAE)}[dead] > 0
    w = double(module.sae)
    wanted, acts = bussmann(w, x, mask)
    loss = matryoshka_loss(module.sae, x.to(dtype), module.objective, mask)
    assert (acts > 0).sum() == (loss.acts > 0).sum() == K * BATCH
    assert_same_loss(loss.total, module.sae, wanted, w)


def test_bussmann_leaves_auxk_out_where_no_dead_latent_is_positive() -> None:
    """Their code takes it only where the dead reconstruct something; the residual alone is not trained twice."""
    module, x = preset("bussmann"), rows().abs() + 9
    randomise(module.sae)
    mask = torch.arange(D_SAE) >= PREFIXES[-2]
    module.sae.W_enc.data[:, mask] = -1.0
    w = double(module.sae)
    wanted, _ = bussmann(w, x, torch.zeros_like(mask))
    assert_same_loss(matryoshka_loss(module.sae, x, module.objective, mask).total, module.sae, wanted, w)


def test_bussmann_auxk_takes_512_latents_at_most() -> None:
    module = preset("bussmann", d_sae=1000, prefixes=[1000], k=1)
    sae, aux = module.sae, module.objective.aux
    assert (aux.k, aux.coefficient, aux.detach, aux.normalise) == (512, 1 / 32, False, "none")
    sae.W_enc.data.fill_(0.1)
    sae.W_dec.data = torch.zeros(1000, D_IN, dtype=torch.float64)
    sae.W_dec.data[:, 0] = 1.0
    loss = matryoshka_loss(sae, torch.ones(1, D_IN, dtype=torch.float64), module.objective, torch.arange(1000) < 700)
    pre, one = 0.1 * D_IN, 1 - 0.1 * D_IN  # of latent 700 or later, which is chosen
    chosen_is_first = float(loss.levels[-1]) * D_IN
    assert chosen_is_first == pytest.approx(one**2 + D_IN - 1)
    assert float(loss.aux) * D_IN == pytest.approx((one - 512 * pre) ** 2 + D_IN - 1)


def test_bussmann_training() -> None:
    module, data = preset("bussmann", dead_after_steps=3), rows(STEPS * BATCH).split(BATCH)
    w = start(module, data)
    optimizer = torch.optim.Adam([w[name] for name in NAMES if name != "b_enc"], lr=3e-4, betas=(0.9, 0.99))
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
            decoder = w["W_dec"]
            decoder /= decoder.norm(dim=1, keepdim=True)
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
        optimizer.step()
        return loss.detach()

    same_training(module, data, step, w)
    assert 0 < sum(aux_on) < STEPS


# --- noanabeshima/matryoshka-saes ---------------------------------------------------------------------------------


def nabeshima(w: Weights, x: Tensor, widths: Sequence[int], penalty: str, weight: float) -> tuple[Tensor, Tensor]:
    """The mean over prefixes of the squared error and of the penalty on acts × ‖W_dec row‖; the activations."""
    acts = (x @ w["W_enc"] + w["b_enc"]).clamp_min(0)
    contribution = acts * w["W_dec"].square().sum(1).sqrt()
    cost = contribution if penalty == "l1" else torch.log(contribution + 0.1) - math.log(0.1)
    errors, costs = [], []
    for width in widths:
        recon = w["b_dec"] + acts[:, :width] @ w["W_dec"][:width]
        errors.append((recon - x).square().sum() / len(x))
        costs.append(cost[:, :width].sum() / len(x))
    return sum(errors) / len(widths) + weight * sum(costs) / len(widths), acts


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("penalty", ["l1", "log"])
@pytest.mark.parametrize("draw", [0, 1, 2])
def test_nabeshima_loss_and_gradients(draw, penalty, dtype) -> None:
    module, x = preset("nabeshima", dtype, sparsity=penalty), rows()
    randomise(module.sae)
    w = double(module.sae)
    widths = pareto_prefixes(D_SAE, 10, torch.Generator().manual_seed(draw))
    wanted, _ = nabeshima(w, x, widths, penalty, 0.7)
    loss = matryoshka_loss(module.sae, x.to(dtype), module.objective, prefixes=widths, sparsity_weight=0.7)
    assert_same_loss(loss.total, module.sae, wanted, w)


@pytest.mark.parametrize("penalty", ["l1", "log"])
def test_nabeshima_training(penalty) -> None:
    """The controller, the clipping, the schedule, and latents re-sorted with Adam's state and the EMA."""
    warmup, lr = 4, 3e-2
    module = preset("nabeshima", sparsity=penalty, warmup_steps=warmup, sparsity_control=0.05, k=6)
    data = rows(STEPS * BATCH).split(BATCH)
    w, use, scale, orders, at = start(module, data), torch.zeros(D_SAE), [1.2], [], iter(range(STEPS))
    optimizer = torch.optim.Adam(w.values(), lr=lr, betas=(0.5, 0.9375))

    def step(x: Tensor) -> Tensor:
        i = next(at)
        with torch.no_grad():
            acts = nabeshima(w, x, [D_SAE], penalty, 0)[1]
            if i + 1 > STEPS * 0.2:
                scale[0] *= 1.05 if float((acts > 0).sum()) / len(x) >= 6 else 0.95
            weight = scale[0] * min(1, (i + 1) / (STEPS * 0.2))
            use.copy_(0.95 * use + 0.05 * (acts * w["W_dec"].norm(dim=1)).square().mean(0))
        loss, _ = nabeshima(w, x, module._widths(i), penalty, weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        rise, fall = min(1, i / warmup), 1 - 0.9 * max(0.0, i - 0.8 * STEPS) / (0.2 * STEPS)
        optimizer.param_groups[0]["lr"] = lr * min(rise, fall)
        optimizer.step()
        order = sorted(range(D_SAE), key=lambda j: -float(use[j]))
        orders.append(order)
        use.copy_(use[order])
        for name, axis in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0)):
            for t in (w[name].data, optimizer.state[w[name]]["exp_avg"], optimizer.state[w[name]]["exp_avg_sq"]):
                t.copy_(t.index_select(axis, torch.tensor(order)))
        return loss.detach()

    same_training(module, data, step, w)
    assert sum(order != sorted(order) for order in orders) > STEPS / 2  # latents did move
    assert 1.2 * 1.05**20 > scale[0] > 1.2 * 0.95**20  # the weight went both up and down
    assert float(module.controller.weight) == pytest.approx(scale[0], rel=1e-6)


def test_nabeshima_controller() -> None:
    controller = L0Controller(1.2, target=5, rate=3e-4, warmup_steps=4)
    weight, given = 1.2, [9.0, 9.0, 2.0, 2.0, 5.0, 5.1, 4.9, 0.0]
    for step, l0 in enumerate(given, 1):
        if step > 4:
            weight *= 1 - 3e-4 if l0 < 5 else 1 + 3e-4
        expected = weight if step > 4 else weight * step / 4
        assert float(controller(torch.tensor(l0), step)) == pytest.approx(expected, rel=1e-6)


def test_drawn_prefixes_have_the_published_density() -> None:
    """One inner prefix: length^(−1/2) over two decades. Nine: as often as numpy draws them without replacement."""
    generator, draws, d_sae = torch.Generator().manual_seed(0), 20_000, 1024
    drawn = torch.tensor([pareto_prefixes(d_sae, 2, generator)[0] for _ in range(draws)])
    ends = [2**i for i in range(2, 11)]
    counts = [int(((drawn >= a) & (drawn < b)).sum()) for a, b in pairwise(ends)]
    shares = [sum(m**-0.5 for m in range(a, b)) for a, b in pairwise(ends)]
    expected = [s / sum(shares) * sum(counts) for s in shares]
    assert sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True)) < 24.3  # 0.1 % of chi² with 7
    each = [count / (b - a) for count, (a, b) in zip(counts, pairwise(ends), strict=True)]
    slope = np.polyfit(np.log(ends[:-1]), np.log(each), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.03)

    theirs, density = np.random.default_rng(0), np.diff(np.sqrt(np.arange(D_SAE)))
    density /= density.sum()
    ours_count, their_count = np.zeros(D_SAE + 1), np.zeros(D_SAE + 1)
    for _ in range(5000):
        widths = pareto_prefixes(D_SAE, 10, generator)
        assert len(set(widths)) == 10
        ours_count[widths[:-1]] += 1
        their_count[theirs.choice(np.arange(1, D_SAE), 9, replace=False, p=density)] += 1
    share = (ours_count + their_count)[1:-1] / 10_000
    z = (ours_count - their_count)[1:-1] / 5000 / np.sqrt(2 * share * (1 - share) / 5000 + 1e-12)
    assert np.abs(z).max() < 4


# --- Gemma Scope 2 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gemma_scope_2_loss_and_gradients(dtype) -> None:
    """Every prefix's error and λ (2 / L0*) (L0 − L0*)², the thresholds' gradients through rectangles by hand."""
    width, weight = 0.6, 0.3  # of the rectangle: wide, so that many pre-activations are in it
    module, x = preset("gemma_scope_2", dtype, bandwidth=width), rows()
    sae = module.sae
    randomise(sae)
    sae.threshold.data = torch.rand(D_SAE, generator=torch.Generator().manual_seed(5)).to(sae.threshold)
    w, threshold = double(sae), sae.threshold.detach().double()

    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    active, near = pre.detach() > threshold, (pre.detach() - threshold).abs() < width / 2
    acts = (pre * active).detach().requires_grad_()
    error = sum((w["b_dec"] + acts[:, :m] @ w["W_dec"][:m] - x).square().sum() / BATCH for m in PREFIXES)
    l0 = active.sum(1).double()
    penalty = weight * sum(2 / K * (float(n) - K) ** 2 for n in l0) / BATCH
    error.backward()
    expected = torch.zeros(D_SAE, dtype=torch.float64)
    for i in range(BATCH):
        for j in range(D_SAE):
            if near[i, j]:  # dH/dθ = −1/width, da/dθ = −θ/width
                of_l0 = weight * 4 / K * (float(l0[i]) - K) / BATCH
                expected[j] -= (of_l0 + threshold[j] * acts.grad[i, j]) / width
    pre.backward(acts.grad * active)

    loss = matryoshka_loss(sae, x.to(dtype), module.objective, sparsity_weight=weight)
    loss.total.backward()
    found = {name: getattr(sae, name).grad for name in (*NAMES, "threshold")} | {"loss": loss.total.detach()}
    wanted = {name: w[name].grad for name in NAMES} | {"threshold": expected, "loss": error.detach() + penalty}
    assert_close(found, wanted, TOLERANCE[dtype])
    apart = quadratic_l0(pre.detach(), threshold, width, K)
    assert float(apart) * weight == pytest.approx(float(penalty), rel=1e-12)


# --- balance, every prefix, OrtSAE --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mu", [0.0, 0.25, 0.75, 2.0])
def test_balance_weighs_inner_levels_by_powers(mu, dtype) -> None:
    """Outermost 1, the i-th inwards μ^i (arXiv 2505.11756)."""
    sae, x = MatryoshkaSAE(D_IN, D_SAE, PREFIXES, D_SAE).to(dtype), rows()
    randomise(sae)
    w = double(sae)
    acts = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).clamp_min(0)
    errors = [(w["b_dec"] + acts[:, :m] @ w["W_dec"][:m] - x).square().sum() / BATCH for m in PREFIXES]
    wanted = errors[2] + mu * errors[1] + mu * mu * errors[0]
    loss = matryoshka_loss(sae, x.to(dtype), Objective(balance=mu))
    assert_same_loss(loss.total, sae, wanted, w)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n_rows", [5, 600])  # more than are taken at a time
def test_every_prefix_equals_a_loop_over_all(n_rows, dtype) -> None:
    """arXiv 2512.02194: all widths 1 … d_sae."""
    sae, x = MatryoshkaSAE(D_IN, D_SAE, PREFIXES, K, rescale_acts_by_decoder_norm=True).to(dtype), rows(n_rows)
    randomise(sae)
    w = double(sae)
    norm = w["W_dec"].norm(dim=1)
    every = (((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm).clamp_min(0)
    acts = every * (every >= every.detach().flatten().topk(K * n_rows).values[-1]) / norm
    wanted, recon = torch.zeros((), dtype=torch.float64), w["b_dec"]
    for j in range(D_SAE):
        recon = recon + acts[:, [j]] * w["W_dec"][j]
        wanted = wanted + (recon - x).square().sum() / n_rows / D_SAE
    loss = matryoshka_loss(sae, x.to(dtype), Objective(reduction="mean"), prefixes="every")
    assert_same_loss(loss.total, sae, wanted, w)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ortsae_penalty_equals_loops(dtype) -> None:
    """The mean over latents of the largest squared cosine with another (arXiv 2509.22033)."""
    W = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours, plain = W.to(dtype).requires_grad_(), W.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(D_SAE):
        cosines = [(plain[i] @ plain[j]) / plain[i].norm() / plain[j].norm() for j in range(D_SAE) if j != i]
        total = total + max(c**2 for c in cosines) / D_SAE
    loss = orthogonality_penalty(ours, D_SAE)
    loss.backward(), total.backward()
    found = {"loss": loss.detach(), "W_dec": ours.grad}
    assert_close(found, {"loss": total.detach(), "W_dec": plain.grad}, TOLERANCE[dtype])


def test_ortsae_chunks_partition_the_latents(monkeypatch) -> None:
    """Each latent is compared within its random chunk alone; the penalty enters the loss with its γ."""
    sae, x = MatryoshkaSAE(D_IN, D_SAE, PREFIXES, K).double(), rows()
    randomise(sae)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(torch, "randperm", lambda n, **_: order)
    unit = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    expected = 0.0
    for at in range(0, D_SAE, 10):
        chunk = order[at : at + 10].tolist()
        expected += sum(max(float(unit[i] @ unit[j]) ** 2 for j in chunk if j != i) for i in chunk) / D_SAE
    plain, penalised = (
        matryoshka_loss(sae, x, Objective(orthogonality=gamma, orthogonality_chunk=10)) for gamma in (0.0, 0.25)
    )
    assert float(penalised.orthogonality) == pytest.approx(expected, rel=1e-9)
    assert float((penalised.total - plain.total).detach()) == pytest.approx(0.25 * expected, rel=1e-9)
