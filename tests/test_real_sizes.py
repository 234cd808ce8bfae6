"""Triton's functions with the tiles that training takes: on a GPU at sizes of real SAEs, elsewhere at tiny ones."""

import copy

import pytest
import torch
from torch import Tensor

import msae.sae.fast.code
from msae.sae import DenseCode, DictionaryAdam, MatryoshkaSAE, matryoshka_loss
from msae.sae.fast import KERNELS
from msae.sae.fast.code import TrainingCode, sparse_encode
from msae.sae.fast.triton import Triton
from tests.device import DEVICE
from tests.gradients import NO_TRITON, assert_same_gradients, gradients

pytestmark = NO_TRITON
IS_REAL = DEVICE == "cuda"
SIZES = [(768, 24_576, 4096), (2304, 65_536, 4096)] if IS_REAL else [(12, 32, 14)]  # d_in, d_sae, batch
WAYS = {
    "one_kernel_one_pass": Triton(),
    "product": Triton(product=True),
    "two_passes": Triton(two_passes=True),
}


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: "{} × {}, batch {}".format(*size))
def example(request) -> tuple[MatryoshkaSAE, Tensor]:
    """An SAE and rows of a few features with uneven magnitudes, of which some rows have nothing active."""
    d_in, d_sae, batch = request.param
    generator = torch.Generator().manual_seed(0)
    prefixes = [round(d_sae * share) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)]
    sae = MatryoshkaSAE(d_in, d_sae, prefixes, 32 if IS_REAL else 2)
    codes = torch.rand(batch, 512, generator=generator) * (torch.rand(batch, 512, generator=generator) < 0.05)
    features = torch.nn.functional.normalize(torch.randn(512, d_in, generator=generator), dim=1)
    x = codes @ features * torch.rand(batch, 1, generator=generator) * 3
    x += 0.05 * torch.randn(batch, d_in, generator=generator)
    sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()))
    x[::7] = (sae.mean + sae.b_dec / sae.scale).detach()  # all zero for the encoder
    with torch.no_grad():
        sae.b_enc.sub_(0.02)
        sae.W_enc.add_(0.1 / d_in**0.5 * torch.randn(d_in, d_sae, generator=generator))
    return sae.to(DEVICE), x.to(DEVICE)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    monkeypatch.setitem(KERNELS, "triton", WAYS[request.param])
    if not IS_REAL:  # a large share of a few latents is active
        monkeypatch.setattr(msae.sae.fast.code, "DENSEST", 1.0)
    return request.param


def encoded(sae: MatryoshkaSAE, x: Tensor, in_bfloat16: bool) -> TrainingCode:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=in_bfloat16):
        code = sparse_encode(sae, x, "triton")
    assert code is not None
    return code


def densely(sae: MatryoshkaSAE, x: Tensor, code: TrainingCode) -> DenseCode:
    """The same choice of entries in a dense code, whose values come from factors in bfloat16 if the code's do."""
    pre = sae.pre(x)
    if code.in_bfloat16:
        h, W = (t.bfloat16().float() for t in (sae.encoder_input(x), sae.W_enc))
        pre = pre + (h @ W + sae.b_enc - pre).detach()
    return DenseCode(pre, torch.where(code.dense() > 0, pre, 0.0))


@pytest.mark.parametrize("in_bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0.0, 0.1], ids=["none_dead", "a_tenth_dead"])
def test_loss_and_gradients_are_those_of_the_dense_step(example, way, in_bfloat16, share) -> None:
    sae, x = example
    dead = (torch.rand(sae.d_sae, generator=torch.Generator().manual_seed(1)) < share).to(DEVICE)
    code = encoded(sae, x, in_bfloat16)
    dense = densely(sae, x, code)
    chosen = dense.acts.detach() > 0
    assert len(code.latents) == round(sae.k * len(x)) == int(chosen.sum())
    pre = dense.pre.detach()
    assert pre[chosen].min() >= torch.where(chosen, -torch.inf, pre).max() - 1e-4
    assert (code.offsets.diff() == 0).any()  # a row with nothing active
    torch.testing.assert_close(code.u, dense.pre[code.rows, code.latents].detach(), rtol=1e-4, atol=1e-4)
    sparse_loss = matryoshka_loss(sae, x, dead=dead, code=code)
    actual = gradients(sae, sparse_loss)
    dense_loss = matryoshka_loss(sae, x, dead=dead, code=dense)
    expected = gradients(sae, dense_loss)
    torch.testing.assert_close(sparse_loss.levels.double(), dense_loss.levels.double(), rtol=1e-4, atol=0)
    auxk_in_bfloat16 = in_bfloat16 and share > 0
    torch.testing.assert_close(sparse_loss.aux, dense_loss.aux, rtol=1e-2 if auxk_in_bfloat16 else 1e-4, atol=0)
    assert bool(sparse_loss.aux > 0) == (share > 0)
    # which dead latents are the largest may differ by rounding, too
    assert_same_gradients(actual, expected, 2e-2 if auxk_in_bfloat16 else 5e-4 if share else 1e-4)


@pytest.mark.parametrize("in_bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_a_step_is_repeatable_bit_for_bit(example, way, in_bfloat16) -> None:
    sae, x = example
    dead = (torch.arange(sae.d_sae) % 10 == 0).to(DEVICE)
    results = []
    for _ in range(3 if IS_REAL else 2):
        code = encoded(sae, x, in_bfloat16)
        loss = matryoshka_loss(sae, x, dead=dead, code=code)
        results.append([code.latents, code.u, loss.total.detach(), *gradients(sae, loss).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_optimizer_is_the_plain_one(example, monkeypatch) -> None:
    sae, other = copy.deepcopy(example[0]), copy.deepcopy(example[0])
    sae.kernels, other.kernels = "triton", "dense"
    optimizers = DictionaryAdam(sae, 1e-3), DictionaryAdam(other, 1e-3)
    half = KERNELS["triton"].factors(example[1], sae.W_enc, True)[1]
    for seed in range(3):
        torch.manual_seed(seed)
        for p, q in zip(sae.parameters(), other.parameters(), strict=True):
            p.grad = torch.empty_like(p).normal_()
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(sae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    rounding = 0 if IS_REAL else 2**-7  # the interpreter cuts the last bit off
    torch.testing.assert_close(half, sae.W_enc.detach().T.bfloat16(), rtol=rounding, atol=0)
