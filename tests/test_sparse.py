"""The sparse step is the dense step: every variant's loss and gradients, and the awkward batches."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from msae.sae import AuxK, MatryoshkaSAE, Objective, encode_for_training, matryoshka_loss, reconstruct, sparse_loss
from msae.sae import sparse as sparse_module
from msae.sae.kernels import plain, triton
from msae.sae.loss import DenseCode
from msae.sae.sparse import SparseCode, sparse_encode
from tests.test_variants import Example, variants

NO_TRITON = pytest.mark.skipif(triton.library() is None, reason="triton is not installed")
KERNELS = ["plain", "compiled", pytest.param("triton", marks=NO_TRITON)]
DEFAULT = Objective()
every_kernel = pytest.mark.parametrize("kernels", KERNELS)


@pytest.fixture(autouse=True)
def however_dense(monkeypatch) -> None:
    """These examples are small, so a large share of their latents is active."""
    monkeypatch.setattr(sparse_module, "DENSEST", 1.0)


def gradients(sae: MatryoshkaSAE, loss) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.total.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


def assert_same_step(sae: MatryoshkaSAE, x: Tensor, kernels: str, objective=DEFAULT, dtype=torch.float32, **given):
    """The sparse step of a code, against the dense step; loss, parts and every gradient. The dense step's is given."""
    code = sparse_encode(sae, x, kernels)
    assert isinstance(code, SparseCode)
    dense = encode_for_training(sae, x)
    rtol = 1e-9 if dtype == torch.float64 else 2e-5
    acts = dense.acts.detach()
    torch.testing.assert_close(code.dense(), acts, rtol=rtol, atol=rtol * float(acts.max()))
    results = []
    for each in (dense, code):
        torch.manual_seed(0)  # orthogonality deals its chunks
        loss = matryoshka_loss(sae, x, objective, code=each, **given)
        results.append((loss, gradients(sae, loss)))
    (expected, wanted), (found, have) = results
    for part in ("total", "levels", "aux", "sparsity", "orthogonality"):
        here, there = getattr(found, part).detach().double(), getattr(expected, part).detach().double()
        torch.testing.assert_close(here, there, rtol=rtol, atol=rtol, msg=lambda m, part=part: f"{part}: {m}")
    assert have.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(have[name], gradient, rtol=0, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")
        assert have[name].stride() == getattr(sae, name).stride()
    return code, wanted


@every_kernel
@variants
def test_every_variant_has_the_loss_and_gradients_of_the_dense_step(name, kernels) -> None:
    example = Example(name, n=24 if kernels == "triton" else 200)
    if example.widths == "every":
        pytest.skip("every prefix at once has no sparse step")
    dtype = torch.float64 if kernels == "plain" else torch.float32
    sae = example.sae.to(dtype)
    given = {"prefixes": example.widths, "sparsity_weight": 0.2, "dead": example.dead, "target": example.y.to(dtype)}
    code, wanted = assert_same_step(sae, example.x.to(dtype), kernels, example.objective, dtype, **given)
    assert all(g.abs().max() > 0 for g in wanted.values())
    fired = (code.dense() > 0).sum(0)
    assert torch.equal(code.fired(), fired)
    norm = sae.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(code.mean_square(norm), DenseCode(code.acts, code.dense()).mean_square(norm))


def tall(
    kernels: str, n: int | None = None, d_in: int = 48, k: float = 4, seed: int = 0, **options
) -> tuple[MatryoshkaSAE, Tensor]:
    """An SAE large enough for several tiles and a filter, and rows of a few features with uneven magnitudes.

    Triton's interpreter takes milliseconds for each row and each latent, so it gets a small one.
    """
    (rows, d_sae) = (20, 50) if kernels == "triton" else (300, 640)
    n = n or rows
    generator = torch.Generator().manual_seed(seed)
    sae = MatryoshkaSAE(d_in, d_sae, [d_sae // 16, d_sae // 4, d_sae], k, seed, **options)
    codes = torch.rand(n, 64, generator=generator) * (torch.rand(n, 64, generator=generator) < 0.1)
    features = normalize(torch.randn(64, d_in, generator=generator), dim=1)
    x = codes @ features * torch.rand(n, 1, generator=generator) * 3 + 0.05 * torch.randn(n, d_in, generator=generator)
    sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()))
    with torch.no_grad():
        sae.b_enc.add_(0.02 * torch.randn(d_sae, generator=generator))
        sae.W_enc.add_(0.02 * torch.randn(d_in, d_sae, generator=generator))
    return sae, x


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(plain, "ROWS", 128)
    monkeypatch.setattr(plain, "LATENTS", 100)
    monkeypatch.setattr(sparse_loss, "AUXK_ROWS", 128)
    tile = {"ROWS": 16, "LATENTS": 32, "DEPTH": 32, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(triton, "TILES", dict.fromkeys(triton.TILES, tile))


@every_kernel
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("sparsity", ["batch_topk", "topk"])
def test_several_tiles_are_one_step(sparsity, rescaled, kernels, small_tiles) -> None:
    sae, x = tall(kernels, sparsity=sparsity, rescale_acts_by_decoder_norm=rescaled)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(sae.d_sae, 1) + 0.5)
    dead = torch.rand(sae.d_sae, generator=torch.Generator().manual_seed(1)) < 0.1
    assert_same_step(sae, x, kernels, Objective(aux=AuxK(k=8)), dead=dead)


@every_kernel
@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("per_level", [False, True])
def test_rows_wider_than_what_stays_in_registers(per_level, stop_gradient, kernels) -> None:
    sae, x = tall(kernels, n=150, d_in=300)
    dead = torch.rand(sae.d_sae, generator=torch.Generator().manual_seed(1)) < 0.1
    objective = Objective(aux=AuxK(k=8, per_level=per_level), stop_gradient=stop_gradient, reduction="mean")
    assert_same_step(sae, x, kernels, objective, dead=dead)


@every_kernel
@pytest.mark.parametrize("widths", ["one", "small ones", "ten", "b_dec and all but one"])
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_any_prefixes_and_weights(widths, stop_gradient, kernels) -> None:
    sae, x = tall(kernels)
    d = sae.d_sae
    of = {"one": [d], "small ones": [1, 2, d], "ten": list(range(d // 10, d + 1, d // 10))}
    widths = of.get(widths, [0, d - 1, d])
    bias_level = widths[0] == 0
    weights = [0.0 if i == 1 else 0.3 + i for i in range(len(widths))]
    objective = Objective(reduction=weights, bias_level=bias_level, stop_gradient=stop_gradient)
    assert_same_step(sae, x, kernels, objective, prefixes=widths[bias_level:])


@every_kernel
def test_an_empty_level_and_rows_without_an_active_latent(kernels) -> None:
    sae, x = tall(kernels)
    inner = sae.prefixes[0]
    with torch.no_grad():
        sae.b_enc[:inner] = -100.0  # the innermost prefix never fires
    x[::3] = (sae.mean + sae.b_dec / sae.scale).detach()  # these rows are all zero for the encoder
    with torch.no_grad():
        sae.b_enc[inner:] -= 0.01
    code, _ = assert_same_step(sae, x, kernels)
    counts = torch.bincount(code.rows, minlength=len(x))
    assert (counts == 0).any()
    assert not (code.latents < inner).any()


@every_kernel
def test_of_equal_pre_activations_just_enough_are_kept(kernels) -> None:
    """Which of them is arbitrary, so the dense step is given the same choice."""
    sae, x = tall(kernels, k=3, n=64)
    with torch.no_grad():
        x = x[:1].expand(len(x), -1).clone()
        sae.W_enc[:, 1::2] = sae.W_enc[:, ::2]
        sae.b_enc[1::2] = sae.b_enc[::2]
        sae.W_enc[:, 2], sae.b_enc[2] = sae.W_enc[:, 0], sae.b_enc[0]
    code = sparse_encode(sae, x, kernels)
    assert isinstance(code, SparseCode)
    assert len(code.rows) == round(sae.k * len(x)) == int(code.fired().sum())
    pre = sae.pre(x)
    chosen = code.dense() > 0
    assert pre[chosen].min() >= pre[~chosen].max() - 1e-5
    found = gradients(sae, matryoshka_loss(sae, x, code=code))
    wanted = gradients(sae, matryoshka_loss(sae, x, code=DenseCode(pre, torch.where(chosen, pre, 0.0))))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@every_kernel
def test_a_filter_that_lets_too_few_through_is_lowered(kernels, monkeypatch) -> None:
    """The sampled rows are 1.3 times the others: too few exceed the first bar that they set."""
    sae, x = tall(kernels)
    monkeypatch.setattr(sparse_module, "SAMPLE", 8)
    monkeypatch.setattr(sparse_module, "SLACK", (1.0, 4.0))
    x[:: len(x) // 8] *= 1.3
    bars, use, name = [], sparse_module.KERNELS[kernels], "filtered" if kernels == "triton" else "survivors"
    filtered = getattr(use, name)
    monkeypatch.setattr(
        use, name, lambda h, W, b, bar, *room: (bars.append(float(bar.max())), filtered(h, W, b, bar, *room))[1]
    )
    assert_same_step(sae, x, kernels)
    assert len(bars) == 2
    assert bars[0] > bars[1] > 0


@every_kernel
def test_what_the_filter_cannot_do_is_left_to_the_dense_step(kernels, monkeypatch) -> None:
    sae, x = tall(kernels)
    monkeypatch.setattr(sparse_module, "SLACK", (0.5,))  # never enough
    assert sparse_encode(sae, x, kernels) is None
    assert isinstance(encode_for_training(sae, x, kernels), DenseCode)
    monkeypatch.undo()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)  # not one positive entry
    assert sparse_encode(sae, x, kernels) is None
    assert not encode_for_training(sae, x, kernels).acts.any()
    sae, x = tall(kernels, sparsity="l1")
    assert sparse_encode(sae, x, kernels) is None  # half of all are active: the dense step is faster


@every_kernel
@pytest.mark.parametrize("where", ["x", "a row", "W_enc", "b_enc"])
def test_what_is_not_finite_is_not_hidden(where, kernels, monkeypatch) -> None:
    monkeypatch.setattr(sparse_module, "SAMPLE", 8)
    sae, x = tall(kernels)
    with torch.no_grad():
        (x[3] if where == "a row" else x if where == "x" else getattr(sae, where))[..., 5] = torch.nan
    code = encode_for_training(sae, x, kernels)
    assert isinstance(code, DenseCode)
    assert not matryoshka_loss(sae, x, code=code).total.isfinite()


@every_kernel
def test_the_step_is_deterministic(kernels) -> None:
    sae, x = tall(kernels)
    dead = torch.arange(sae.d_sae) % 7 == 0
    first, again = (
        gradients(sae, matryoshka_loss(sae, x, dead=dead, code=sparse_encode(sae, x, kernels))) for _ in range(2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)


@every_kernel
def test_gradients_of_several_batches_add_up_and_are_scaled(kernels) -> None:
    sae, x = tall(kernels)
    parts = x.split(len(x) // 2)
    sae.zero_grad()
    for part in parts:
        (matryoshka_loss(sae, part, code=sparse_encode(sae, part, kernels)).total / 2).backward()
    found = {name: p.grad.clone() for name, p in sae.named_parameters()}
    wanted = gradients(sae, matryoshka_loss(sae, parts[0]))
    for name, gradient in gradients(sae, matryoshka_loss(sae, parts[1])).items():
        mean = (wanted[name] + gradient) / 2
        torch.testing.assert_close(found[name], mean, rtol=0, atol=2e-5 * float(mean.abs().max()))
    total = matryoshka_loss(sae, x, code=sparse_encode(sae, x, kernels)).total
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="only once"):
        total.backward()


@every_kernel
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("sparsity", ["batch_topk", "topk", "jumprelu", "l1"])
def test_inference_is_that_of_the_model(sparsity, rescaled, kernels) -> None:
    sae, x = tall(kernels, d_in=130, sparsity=sparsity, rescale_acts_by_decoder_norm=rescaled)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(sae.d_sae, 1) + 0.5)
        sae.b_dec.add_(0.1)
        if sparsity != "topk":
            sae.threshold.copy_(torch.linspace(-0.1, 0.4, sae.d_sae))
    fired, recons = reconstruct(sae, x, kernels)
    acts = sae.encode(x)
    assert 0 < (acts > 0).sum() < acts.numel() / 2
    assert torch.equal(fired, (acts > 0).sum(0))
    for here, there in zip(recons, sae.decode_prefixes(acts), strict=True):
        torch.testing.assert_close(here, there.detach(), rtol=1e-4, atol=1e-5)


@every_kernel
def test_inference_needs_a_threshold(kernels) -> None:
    sae, x = tall(kernels)
    with pytest.raises(ValueError, match="no threshold yet"):
        reconstruct(sae, x, kernels)
