"""The optimizer against PyTorch's own, step by step, in each of its implementations."""

import copy

import pytest
import torch
from torch.testing import assert_close

from msae.sae import DictionaryAdam, MatryoshkaSAE
from msae.sae.kernels import compiled
from tests.test_sparse import KERNELS

each = pytest.mark.parametrize("kernels", KERNELS)


def example(sparsity: str = "batch_topk") -> MatryoshkaSAE:
    sae = MatryoshkaSAE(37, 50, [10, 50], 3, sparsity=sparsity)
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(37, 50, generator=torch.Generator().manual_seed(1)))
    return sae


def give_gradients(sae: MatryoshkaSAE, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in sae.parameters():
        p.grad = torch.empty_like(p).copy_(size * torch.randn(p.shape, generator=generator))


def plainly(sae: MatryoshkaSAE, adam: torch.optim.Adam, decoder: str, clip: float) -> float:
    """The step as the recipe has it, in float64 where it sums."""
    if decoder == "unit_norm_before_step":
        sae.normalise_decoder()
    W, grad = sae.W_dec.detach(), sae.W_dec.grad
    if decoder.startswith("unit_norm"):
        grad.sub_((grad * W).sum(1, keepdim=True) * W)
    norm = sum(float(p.grad.double().square().sum()) for p in sae.parameters()) ** 0.5
    for p in sae.parameters():
        p.grad.mul_(min(1.0, clip / (norm + 1e-6)))
    adam.step()
    if decoder == "unit_norm":
        sae.normalise_decoder()
    return norm


@each
@pytest.mark.parametrize("clip", [1e9, 0.5], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("decoder", ["unit_norm", "unit_norm_before_step", "free", "rescaled"])
def test_every_step_is_that_of_the_recipe(decoder, clip, kernels) -> None:
    sae, reference = example("jumprelu"), example("jumprelu")
    optimizer = DictionaryAdam(sae, 1e-2, (0.5, 0.99), clip, decoder, kernels)
    adam = torch.optim.Adam(reference.parameters(), 1e-2, (0.5, 0.99))
    for step in range(6):
        for each in (sae, reference):
            give_gradients(each, step, 10.0 ** (step - 3))
        optimizer.step()
        norm = plainly(reference, adam, decoder, clip)
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)
        for (name, here), there in zip(sae.named_parameters(), reference.parameters(), strict=True):
            assert_close(here, there, rtol=1e-5, atol=1e-6, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}")
            for key in ("exp_avg", "exp_avg_sq"):
                expected = adam.state[there][key]
                size = float(expected.abs().max())
                assert_close(optimizer.state[here][key], expected, rtol=1e-5, atol=1e-6 * size)
    if decoder == "unit_norm":
        assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(50), rtol=0, atol=1e-6)


@each
def test_a_learning_rate_schedule_is_followed(kernels) -> None:
    sae = example()
    optimizer = DictionaryAdam(sae, 1e-2, (0.9, 0.999), 1e9, "free", kernels)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 1 else 1.0)
    moved = []
    for step in range(3):
        before = sae.W_enc.detach().clone()
        give_gradients(sae, step, 1.0)
        optimizer.step()
        schedule.step()
        moved.append(not torch.equal(before, sae.W_enc))
    assert moved == [True, False, True]


@each
def test_its_state_goes_on_from_where_it_was(kernels) -> None:
    """Also from averages that lie in memory the other way round, as in checkpoints of a contiguous W_enc."""
    sae = example()
    optimizer = DictionaryAdam(sae, 1e-2, (0.9, 0.999), 1.0, "unit_norm", kernels)
    for step in range(3):
        give_gradients(sae, step, 1.0)
        optimizer.step()
    other = copy.deepcopy(sae)
    resumed = DictionaryAdam(other, 1e-2, (0.9, 0.999), 1.0, "unit_norm", kernels)
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            values[key] = values[key].contiguous()
    assert any(
        v["exp_avg"].stride() != s["exp_avg"].stride()
        for v, s in zip(state["state"].values(), optimizer.state.values(), strict=True)
    )
    resumed.load_state_dict(state)
    for each, its in ((sae, optimizer), (other, resumed)):
        give_gradients(each, 9, 1.0)
        its.step()
    for here, there in zip(sae.parameters(), other.parameters(), strict=True):
        assert torch.equal(here, there)


def test_the_compiled_one_is_used_and_its_threads_do_not_matter(monkeypatch) -> None:
    assert compiled.library() is not None, "these tests need a C++ compiler"
    calls, results = [], []
    monkeypatch.setattr(compiled, "adam", lambda *a, adam=compiled.adam: (calls.append(1), adam(*a)))
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sae = example()
        optimizer = DictionaryAdam(sae, 1e-2, (0.9, 0.999), 1.0, "unit_norm", "compiled")
        give_gradients(sae, 0, 1.0)
        optimizer.step()
        results.append(sae.W_dec.detach().clone())
    assert len(calls) == 2 * 4
    assert torch.equal(*results)


def test_half_precision_takes_the_plain_way() -> None:
    sae = example().bfloat16()
    optimizer = DictionaryAdam(sae, 1e-2, (0.9, 0.999), 1.0, "unit_norm", "compiled")
    give_gradients(sae, 0, 1.0)
    optimizer.step()
    assert sae.W_dec.isfinite().all()


@pytest.mark.parametrize("kernels", ["plain", "compiled"])
def test_the_encoder_decays_apart_from_the_gradient(kernels) -> None:
    """W_enc after a step is that of a step from (1 − lr · decay) W_enc with the same gradient; all else is the same."""
    with_decay, without = MatryoshkaSAE(16, 32, [8, 32], 2), MatryoshkaSAE(16, 32, [8, 32], 2)
    with torch.no_grad():
        without.W_enc.mul_(1 - 0.01 * 0.3)
    for sae, decay in ((with_decay, 0.3), (without, 0.0)):
        adam = DictionaryAdam(sae, 0.01, (0.9, 0.999), 1.0, "unit_norm", kernels, decay)
        generator = torch.Generator().manual_seed(0)
        for p in sae.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        adam.step()
    for name, p in with_decay.named_parameters():
        torch.testing.assert_close(p, dict(without.named_parameters())[name], msg=lambda m, n=name: f"{n}: {m}")
