"""What selects and what it costs: BatchTopK, TopK, JumpReLU, penalties, the controller of L0, thresholds."""

import math

import pytest
import torch
from torch import Tensor

from msae.sae import L0Controller, batch_topk, jumprelu, quantile_thresholds, topk
from msae.sae.sparsity import PENALTIES, quadratic_l0
from tests.test_model import make, rows

SHAPES = [(10, 32), (2, 5, 32), (5, 2, 1, 32)]

# --- BatchTopK -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
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


# --- TopK ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
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


# --- JumpReLU --------------------------------------------------------------------------------------------------


def near(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    return ((pre - theta).abs() / bandwidth < 0.5).double()


@pytest.mark.parametrize("shape", SHAPES)
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
    expected = sum(-theta / bandwidth * near(pre[i], theta, bandwidth) * grad[i] for i in range(10))
    torch.testing.assert_close(t.grad, expected, rtol=1e-12, atol=1e-12)
    assert (t.grad != 0).any()


def test_a_pre_activation_at_its_threshold_is_silent() -> None:
    theta = torch.tensor([0.5, 0.0])
    assert torch.equal(
        jumprelu(torch.tensor([[0.5, 0.0], [0.75, -1.0]]), theta, 0.1), torch.tensor([[0, 0], [0.75, 0]])
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_quadratic_penalty_pulls_the_thresholds_towards_the_wanted_l0(shape) -> None:
    """E (2/L*)(L0 − L*)², ∂L0/∂θ = −K/ε; nothing reaches the pre-activations."""
    pre, theta, bandwidth, target = rows(10, 32), rows(1, 32, 3)[0].abs(), 0.3, 5.0
    p, t = pre.view(shape).clone().requires_grad_(), theta.clone().requires_grad_()
    penalty = quadratic_l0(p, t, bandwidth, target)
    l0 = (pre > theta).sum(1).double()
    torch.testing.assert_close(penalty, (2 / target * (l0 - target) ** 2).mean())
    penalty.backward()
    assert p.grad is None or not p.grad.any()
    slope = 4 / target * (l0 - target) / 10
    expected = sum(slope[i] * -near(pre[i], theta, bandwidth) / bandwidth for i in range(10))
    torch.testing.assert_close(t.grad, expected, rtol=1e-12, atol=1e-12)
    assert (t.grad != 0).any()


def test_jumprelu_has_a_gradient_for_one_token_alone() -> None:
    pre, theta = torch.tensor([0.4, 0.1]).requires_grad_(), torch.tensor([0.3, 0.3]).requires_grad_()
    jumprelu(pre, theta, 1.0).sum().backward()
    torch.testing.assert_close(theta.grad, torch.tensor([-0.3, -0.3]))


# --- penalties and the controller ------------------------------------------------------------------------------


def test_penalties_of_an_activation() -> None:
    acts = torch.tensor([[0.0, 0.4, 2.0]], dtype=torch.float64)
    assert torch.equal(PENALTIES["l1"](acts), acts)
    expected = torch.tensor([[0.0, math.log(5), math.log(21)]], dtype=torch.float64)
    torch.testing.assert_close(PENALTIES["log"](acts), expected, rtol=1e-12, atol=1e-15)


def lambdas(controller: L0Controller, l0s: list[float]) -> list[float]:
    return [float(controller(torch.tensor(l0), step)) for step, l0 in enumerate(l0s, 1)]


def test_the_controller_warms_up_in_a_line_and_then_follows_l0() -> None:
    controller = L0Controller(2.0, target=5, rate=0.1, warmup_steps=4)
    found = lambdas(controller, [9, 9, 0, 0, 9, 5, 4, 4.99])  # grows at the target too
    up, down = 1.1, 0.9
    expected = [0.5, 1.0, 1.5, 2.0, 2 * up, 2 * up**2, 2 * up**2 * down, 2 * up**2 * down**2]
    assert found == pytest.approx(expected, rel=1e-6)
    again = L0Controller(2.0, target=5, rate=0.1, warmup_steps=4)
    again.load_state_dict(controller.state_dict())
    assert float(again(torch.tensor(9.0), 9)) == float(controller(torch.tensor(9.0), 9))
    assert float(again.weight) == pytest.approx(expected[-1] * up, rel=1e-6)


def test_the_published_rate_moves_the_penalty_by_three_in_ten_thousand_a_step() -> None:
    assert lambdas(L0Controller(1.0, 5, 3e-4), [9] * 1000)[-1] == pytest.approx(1.0003**1000, rel=1e-4)
    assert lambdas(L0Controller(1.0, 5, 3e-4), [1] * 1000)[-1] == pytest.approx(0.9997**1000, rel=1e-4)


def test_without_a_rate_the_penalty_keeps_its_weight() -> None:
    assert lambdas(L0Controller(1.3, 5), [9, 1, 0]) == pytest.approx([1.3] * 3)
    assert lambdas(L0Controller(1.0, 5, warmup_steps=2), [9, 9, 9]) == [0.5, 1, 1]


def test_a_weight_that_was_returned_does_not_move_later() -> None:
    controller = L0Controller(1.0, 5, 0.5)
    first = controller(torch.tensor(9.0), 1)
    controller(torch.tensor(9.0), 2)
    assert float(first) == 1.5


def test_the_controller_still_moves_in_bfloat16() -> None:
    controller = L0Controller(1.0, 5, 3e-4).to(torch.bfloat16)
    assert lambdas(controller, [9] * 100)[-1] == pytest.approx(1.0003**100, rel=1e-3)


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
    thetas = quantile_thresholds(iter(pre.split(split)), k, len(pre), widths)
    for width, theta in zip(widths, thetas, strict=True):
        own = pre[:, :width]
        wanted = round(k * 1000)
        expected = max(0.0, float(own.flatten().sort(descending=True).values[wanted]))
        assert theta == expected
        assert int((own > theta).sum()) == min(wanted, int((own > 0).sum()))
    assert thetas == sorted(thetas)
    assert quantile_thresholds([pre], k, len(pre), [24]) == thetas[-1:]
    assert k < 8 or thetas[0] == 0  # half of 9 are positive: never 8


def test_quantile_thresholds_take_a_list_of_unequal_batches() -> None:
    for seed in range(20):
        quantile_thresholds(list(rows(10, 4, seed).split(3)), 1, 10, [2, 4])


def test_quantile_thresholds_take_batches_with_a_gradient() -> None:
    pre = rows(10, 4).requires_grad_()
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        quantile_thresholds(iter(pre.split(5)), 1, 10, [2, 4])
    finally:
        torch.set_warn_always(before)


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
