"""Mechanisms: what they select, densely and sparsely, what it costs; the controller of L0, thresholds."""

import pytest
import torch
from torch import Tensor

import msae.sae.fast.code
from msae.sae import L0Controller, Sparsity, batch_topk, encode_sparse, jumprelu, quantile_thresholds, topk
from msae.sae.fast.code import sparse_encode
from msae.sae.sparsity import SPARSITIES as MECHANISMS
from msae.sae.sparsity import JumpReLU, sparsity_as_plain, sparsity_of
from tests.test_model import SPARSITIES, every_sparsity, make, rows

SETTINGS = [*SPARSITIES, {"name": "jumprelu", "threshold_init": 0.25, "bandwidth": 0.5}]
every_shape = pytest.mark.parametrize("shape", [(10, 32), (2, 5, 32), (5, 2, 1, 32)])

# --- every mechanism --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overridden", ["select", "infer"])
@every_sparsity
def test_a_subclass_that_overrides_one_selection_takes_the_dense_path_for_it(sparsity, overridden, monkeypatch) -> None:
    monkeypatch.setattr(msae.sae.fast.code, "DENSEST", 1.0)
    monkeypatch.setattr("msae.sae.sparsity.SPARSITIES", {})  # that the subclass is not kept

    def halved(self, pre: Tensor, k: float, threshold: Tensor) -> Tensor:
        return pre.relu() / 2

    mechanism = type("Halved", (MECHANISMS[sparsity],), {"name": "halved", overridden: halved})()
    sae, x = make(20, 64, [64], k=5, threshold=3.0, sparsity=mechanism), rows(100, 20)
    for inference in (False, True):
        is_dense = sparse_encode(sae, x, "plain", inference) is None
        assert is_dense == (overridden == ("infer" if inference else "select"))
    dense = sae.encode(x) if overridden == "infer" else sae.select(sae.pre(x))
    torch.testing.assert_close(dense, sae.pre(x).relu() / 2)
    torch.testing.assert_close(encode_sparse(sae, x, "plain").dense(), sae.encode(x))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_settings_of_a_mechanism_survive_a_round_trip(setting) -> None:
    mechanism = sparsity_of(setting)
    assert isinstance(mechanism, Sparsity)
    assert sparsity_of(mechanism) is mechanism
    assert sparsity_of(sparsity_as_plain(mechanism)) == mechanism
    if sparsity_as_plain(mechanism) != setting:  # a name stands for its defaults
        assert sparsity_as_plain(mechanism) == {"name": setting, **vars(JumpReLU())}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("topp", r"model\.sparsity=topp: expected batch_topk \| topk \| jumprelu \| l1 \| log[^\n]*"),
        ({"name": "jumprelu", "bandwith": 1}, r"unknown key model\.sparsity\.bandwith; did you mean [^\n]*bandwidth\?"),
        ({"name": "jumprelu", "bandwidth": 0}, r"model\.sparsity\.bandwidth=0: expected number > 0"),
        ({"name": "topk", "bandwidth": 1}, r"unknown key model\.sparsity\.bandwidth; topk has no settings"),
    ],
    ids=str,
)
def test_an_impossible_mechanism_is_one_line(setting, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        sparsity_of(setting)


# --- BatchTopK and TopK -----------------------------------------------------------------------------------------------


@every_shape
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


@every_shape
@pytest.mark.parametrize("k", [1, 4, 32, 40])
def test_topk_keeps_the_k_largest_of_each_token(shape, k) -> None:
    pre = rows(10, 32, dtype=torch.float32).view(shape).requires_grad_()
    acts = topk(pre, k)
    assert acts.shape == pre.shape
    for row, kept in zip(pre.detach().view(10, 32), acts.detach().view(10, 32), strict=True):
        bar = float(row.sort(descending=True).values[min(k, 32) - 1])
        assert torch.equal(kept, torch.where((row >= bar) & (row > 0), row, 0.0))
    acts.square().sum().backward()
    assert torch.equal(pre.grad, 2 * acts)


# --- JumpReLU ---------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("bandwidth", [0.01, 0.3, 2.0])
def test_jumprelu_and_its_gradients_are_those_of_the_paper(shape, bandwidth) -> None:
    """∂/∂pre = H(pre − θ) and ∂/∂θ = −θ/ε K((pre − θ)/ε), K the rectangle (arXiv 2407.14435, eq. 11)."""
    pre, grad = rows(10, 32), rows(10, 32, 2)
    theta = rows(1, 32, 3)[0].abs()
    p, t = pre.view(shape).requires_grad_(), theta.clone().requires_grad_()
    acts = jumprelu(p, t, bandwidth)
    assert torch.equal(acts.view(10, 32), torch.where(pre > theta, pre, 0.0))
    acts.backward(grad.view(shape))
    assert torch.equal(p.grad.view(10, 32), grad * (pre > theta))
    near = ((pre - theta).abs() / bandwidth < 0.5).double()
    expected = (-theta / bandwidth * near * grad).sum(0)
    torch.testing.assert_close(t.grad, expected, rtol=1e-12, atol=1e-12)
    assert (t.grad != 0).any()


def test_jumprelu_of_one_token_alone_and_at_its_threshold() -> None:
    theta = torch.tensor([0.3, 0.3, 0.5, 0.0]).requires_grad_()
    acts = jumprelu(torch.tensor([0.4, 0.1, 0.5, 0.0]), theta, 1.0)
    assert acts.tolist() == pytest.approx([0.4, 0, 0, 0])  # silent at the threshold
    acts.sum().backward()
    torch.testing.assert_close(theta.grad, -theta.detach())


# --- the controller ---------------------------------------------------------------------------------------------------


def lambdas(controller: L0Controller, l0s: list[float]) -> list[float]:
    return [float(controller(torch.tensor(l0), step)) for step, l0 in enumerate(l0s, 1)]


def test_the_controller_warms_up_in_a_line_and_then_follows_l0() -> None:
    controller = L0Controller(2.0, target=5, rate=0.1, warmup_steps=4)
    up, down = 1.1, 0.9
    expected = [0.5, 1.0, 1.5, 2.0, 2 * up, 2 * up**2, 2 * up**2 * down, 2 * up**2 * down**2]
    assert lambdas(controller, [9, 9, 0, 0, 9, 5, 4, 4.99]) == pytest.approx(expected, rel=1e-6)  # grows at the target
    again = L0Controller(2.0, target=5, rate=0.1, warmup_steps=4)
    again.load_state_dict(controller.state_dict())
    returned = again(torch.tensor(9.0), 9)
    assert float(returned) == float(controller(torch.tensor(9.0), 9))
    again(torch.tensor(9.0), 10)
    again(torch.tensor(0.0), 10)  # a second batch of the same step moves nothing
    assert float(returned) == pytest.approx(expected[-1] * up, rel=1e-6)  # what was returned does not move
    assert float(again.weight) == pytest.approx(expected[-1] * up**2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("l0", "factor"), [(9, 1.0003), (1, 0.9997)])
def test_the_published_rate_moves_the_penalty_by_three_in_ten_thousand_a_step(l0, factor, dtype) -> None:
    controller = L0Controller(1.0, 5, 3e-4).to(dtype)
    assert lambdas(controller, [l0] * 1000)[-1] == pytest.approx(factor**1000, rel=1e-4)


def test_without_a_rate_the_penalty_keeps_its_weight() -> None:
    assert lambdas(L0Controller(1.3, 5), [9, 1, 0]) == pytest.approx([1.3] * 3)
    assert lambdas(L0Controller(1.0, 5, warmup_steps=2), [9, 9, 9]) == [0.5, 1, 1]


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


@pytest.mark.parametrize("k", [1, 3.5, 8])
@pytest.mark.parametrize("split", [1000, 64, 7])
def test_quantile_thresholds_equal_a_full_sort_of_each_width(k, split) -> None:
    pre, widths = rows(1000, 24, dtype=torch.float32), [9, 17, 24]
    thetas = quantile_thresholds(iter(pre.clone().requires_grad_().split(split)), k, len(pre), widths)
    for width, theta in zip(widths, thetas, strict=True):
        own = pre[:, :width]
        count = round(k * 1000)
        assert theta == max(0.0, float(own.flatten().sort(descending=True).values[count]))
        assert int((own > theta).sum()) == min(count, int((own > 0).sum()))
    assert thetas == sorted(thetas)
    assert quantile_thresholds([pre], k, len(pre), [24]) == thetas[-1:]
    assert k < 8 or thetas[0] == 0  # half of 9 are positive: never 8


def test_quantile_thresholds_are_never_negative_and_need_rows() -> None:
    assert quantile_thresholds([torch.tensor([[1.0, -1.0], [-2.0, -3.0]])], 2, 2, [1, 2]) == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"^there are no held-out rows[^\n]*$"):
        quantile_thresholds([], 2, 0, [2])


def test_calibrated_inference_has_l0_k() -> None:
    sae, x = make(8, 32, [8, 32], k=5, dtype=torch.float32), rows(400, 8, dtype=torch.float32)
    batches = (sae.pre(part).detach() for part in x.split(33))
    sae.threshold.fill_(quantile_thresholds(batches, sae.k, len(x), sae.prefixes)[-1])
    acts = sae.encode(x)
    assert int((acts > 0).sum()) == 5 * 400
    assert torch.equal(acts, sae.select(sae.pre(x)))  # on these rows the two agree
    torch.testing.assert_close(sae.encode(x[:1]), acts[:1])  # and no row depends on the others
    assert torch.equal(sae.encode(x, 8), acts[:, :8])
    assert torch.equal(sae.encode(x.view(4, 100, 8)), acts.view(4, 100, 32))
