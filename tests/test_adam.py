"""The optimizer against PyTorch's own, step by step, in each of its implementations."""

import copy

import pytest
import torch
from torch.testing import assert_close

from msae.sae import DictionaryAdam, MatryoshkaSAE
from msae.sae.fast import KERNELS as FAST
from msae.sae.fast import compiled
from msae.sae.fast.adam import Adam
from tests.device import device_of
from tests.test_sparse import KERNELS

each = pytest.mark.parametrize("kernels", KERNELS)


def example(kernels: str = "auto", sparsity: str = "batch_topk") -> MatryoshkaSAE:
    sae = MatryoshkaSAE(37, 50, [10, 50], 3, sparsity=sparsity)
    sae.kernels = kernels
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(37, 50, generator=torch.Generator().manual_seed(1)))
    return sae.to(device_of(kernels))


def give_gradients(sae: MatryoshkaSAE, seed: int, size: float = 1.0) -> None:
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
    sae, reference = example(kernels, "jumprelu"), example(sparsity="jumprelu")
    optimizer = DictionaryAdam(sae, 1e-2, Adam(betas=[0.5, 0.99], grad_clip=clip), decoder)
    adam = torch.optim.Adam(reference.parameters(), 1e-2, (0.5, 0.99))
    for step in range(6):
        for each, its in ((sae, optimizer), (reference, adam)):
            give_gradients(each, step, 10.0 ** (step - 3))
            its.param_groups[0]["lr"] = 1e-2 * (step != 4)  # as a schedule sets it
        optimizer.step()
        norm = plainly(reference, adam, decoder, clip)
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)
        for (name, actual), expected in zip(sae.named_parameters(), reference.parameters(), strict=True):
            assert_close(
                actual.cpu(), expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}"
            )
            for key in ("exp_avg", "exp_avg_sq"):
                average = adam.state[expected][key]
                atol = 1e-6 * float(average.abs().max())
                assert_close(optimizer.state[actual][key].cpu(), average, rtol=1e-5, atol=atol)
    if decoder == "unit_norm":
        assert_close(sae.W_dec.detach().norm(dim=1).cpu(), torch.ones(50), rtol=0, atol=1e-6)


@each
@pytest.mark.parametrize("before", ["the same kernels", "plain"])
def test_its_state_goes_on_from_where_it_was(before, kernels) -> None:
    """Also from averages that lie in memory the other way round, as in checkpoints of a contiguous W_enc."""
    sae = example("plain" if before == "plain" else kernels).to(device_of(kernels))
    optimizer = DictionaryAdam(sae, 1e-2)
    for step in range(3):
        give_gradients(sae, step)
        optimizer.step()
    other = copy.deepcopy(sae)
    other.kernels = kernels
    resumed = DictionaryAdam(other, 1e-2)
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            values[key] = values[key].contiguous()
    assert state["state"][0]["exp_avg"].stride() != optimizer.state[sae.W_enc]["exp_avg"].stride()
    resumed.load_state_dict(state)
    for each, its in ((sae, optimizer), (other, resumed)):
        give_gradients(each, 9)
        its.step()
    exactly = {} if before == "plain" else {"rtol": 0, "atol": 0}
    for actual, expected in zip(other.parameters(), sae.parameters(), strict=True):
        assert_close(actual, expected, **exactly)


def test_the_compiled_one_is_used_and_its_threads_do_not_matter(monkeypatch) -> None:
    assert compiled.library() is not None, "these tests need a C++ compiler"
    calls, results, adam = [], [], FAST["compiled"].adam
    monkeypatch.setattr(FAST["compiled"], "adam", lambda *arguments: (calls.append(1), adam(*arguments)))
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sae = example("compiled")
        give_gradients(sae, 0)
        DictionaryAdam(sae, 1e-2).step()
        results.append(sae.W_dec.detach().clone())
    assert len(calls) == 2 * 4
    assert torch.equal(*results)


def test_half_precision_takes_the_plain_way() -> None:
    sae = example("compiled").bfloat16()
    give_gradients(sae, 0)
    DictionaryAdam(sae, 1e-2).step()
    assert sae.W_dec.isfinite().all()


@each
def test_the_encoder_decays_apart_from_the_gradient(kernels) -> None:
    """W_enc after a step is that of a step from (1 − lr · decay) W_enc with the same gradient; all else is the same."""
    with_decay, without = example(kernels), example(kernels)
    with torch.no_grad():
        without.W_enc.mul_(1 - 0.01 * 0.3)
    for sae, decay in ((with_decay, 0.3), (without, 0.0)):
        give_gradients(sae, 0)
        DictionaryAdam(sae, 0.01, encoder_decay=decay).step()
    for actual, expected in zip(with_decay.parameters(), without.parameters(), strict=True):
        assert_close(actual, expected)
