"""The sparse step is the dense step: every variant's loss and gradients, and the awkward batches."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import msae.sae.fast.code
import msae.sae.fast.loss
from msae.sae import AuxK, DenseCode, MatryoshkaSAE, Objective, encode_for_training, matryoshka_loss, reconstruct
from msae.sae.fast import KERNELS as FAST
from msae.sae.fast import plain, triton
from msae.sae.fast.code import TrainingCode, sparse_encode
from tests.device import device_of
from tests.gradients import NO_TRITON, assert_same_gradients, gradients
from tests.test_variants import Example, variants

KERNELS = ["plain", "compiled", pytest.param("triton", marks=NO_TRITON)]
DEFAULT = Objective()
every_kernel = pytest.mark.parametrize("kernels", KERNELS)


@pytest.fixture(autouse=True)
def however_dense(monkeypatch) -> None:
    """These examples are small, so a large share of their latents is active."""
    monkeypatch.setattr(msae.sae.fast.code, "DENSEST", 1.0)


def assert_same_step(sae: MatryoshkaSAE, x: Tensor, kernels: str, objective=DEFAULT, **options):
    """The sparse step has the dense step's code, loss, parts and every gradient: gives its code and the gradients."""
    code, dense = sparse_encode(sae, x, kernels), encode_for_training(sae, x)
    assert isinstance(code, TrainingCode)
    tolerance = 1e-9 if x.dtype == torch.float64 else 2e-5
    acts = dense.acts.detach()
    torch.testing.assert_close(code.dense(), acts, rtol=tolerance, atol=tolerance * float(acts.max()))
    losses, grads = [], []
    for each in (code, dense):
        torch.manual_seed(0)  # orthogonality deals its chunks
        losses.append(matryoshka_loss(sae, x, objective, code=each, **options))
        grads.append(gradients(sae, losses[-1]))
    parts = [[loss.total, loss.levels, loss.aux, loss.sparsity, *loss.terms.values()] for loss in losses]
    for part, expected in zip(*parts, strict=True):
        torch.testing.assert_close(part.double(), expected.double(), rtol=tolerance, atol=tolerance)
    assert_same_gradients(*grads, tolerance)
    assert all(gradient.stride() == getattr(sae, name).stride() for name, gradient in grads[0].items())
    return code, grads[1]


def some_dead(sae: MatryoshkaSAE) -> Tensor:
    return (torch.rand(sae.d_sae, generator=torch.Generator().manual_seed(1)) < 0.1).to(sae.W_enc.device)


@every_kernel
@variants
def test_every_variant_has_the_loss_and_gradients_of_the_dense_step(name, kernels) -> None:
    example = Example(name, n=24 if kernels == "triton" else 200)
    if example.widths == "every":
        pytest.skip("every prefix at once has no sparse step")
    dtype = torch.float64 if kernels == "plain" else torch.float32
    place = {"dtype": dtype, "device": device_of(kernels)}
    sae, x = example.sae.to(**place), example.x.to(**place)
    if sparse_encode(sae, x, kernels) is None:
        assert sae.sparsity.name == "halves"  # it has no sparse path
        return
    options = {"prefixes": example.widths, "sparsity_weight": 0.2}
    options |= {"dead": example.dead.to(place["device"]), "target": example.y.to(**place)}
    code, grads = assert_same_step(sae, x, kernels, example.objective, **options)
    assert all(gradient.abs().max() > 0 for gradient in grads.values())
    assert torch.equal(code.fired(), (code.dense() > 0).sum(0))
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
        sae.W_dec.mul_(torch.rand(d_sae, 1, generator=generator) + 0.5)
    return sae.to(device_of(kernels)), x.to(device_of(kernels))


BOTH, WIDE = (False, True), {"n": 150, "d_in": 300}  # wider than what stays in registers
STEPS = [({"sparsity": s, "rescale_acts_by_decoder_norm": r}, {}, {}) for s in ("batch_topk", "topk") for r in BOTH]
STEPS += [(WIDE, {"per_level": p}, {"stop_gradient": g, "reduction": "mean"}) for p in BOTH for g in BOTH]


@every_kernel
@pytest.mark.parametrize(("options", "aux", "objective"), STEPS, ids=str)
def test_several_tiles_are_one_step(options, aux, objective, kernels, monkeypatch) -> None:
    for module, name, value in ((plain, "ROWS", 128), (plain, "LATENTS", 100), (msae.sae.fast.loss, "AUXK_ROWS", 128)):
        monkeypatch.setattr(module, name, value)
    tile = {"ROWS": 16, "LATENTS": 32, "DEPTH": 32, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(triton, "TILES", dict.fromkeys(triton.TILES, tile))
    sae, x = tall(kernels, **options)
    assert_same_step(sae, x, kernels, Objective(aux=AuxK(k=8, **aux), **objective), dead=some_dead(sae))


@every_kernel
@pytest.mark.parametrize("widths", ["one", "small ones", "ten", "b_dec and all but one"])
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_any_prefixes_and_weights(widths, stop_gradient, kernels) -> None:
    sae, x = tall(kernels)
    d = sae.d_sae
    widths = {"one": [d], "small ones": [1, 2, d], "ten": [*range(d // 10, d + 1, d // 10)]}.get(widths, [0, d - 1, d])
    bias_level = widths[0] == 0
    weights = [0.0 if i == 1 else 0.3 + i for i in range(len(widths))]
    objective = Objective(reduction=weights, bias_level=bias_level, stop_gradient=stop_gradient)
    assert_same_step(sae, x, kernels, objective, prefixes=widths[bias_level:])


@every_kernel
@pytest.mark.parametrize("detach", [False, True])
def test_double_precision_is_left_to_plain(detach, kernels, monkeypatch) -> None:
    for name in ("filtered", "gathering"):  # the interpreter would add up in double precision, a GPU would not
        monkeypatch.setattr(triton, name, None)
    sae, x = tall(kernels)
    assert_same_step(sae.double(), x.double(), kernels, Objective(aux=AuxK(detach=detach)), dead=some_dead(sae))


@every_kernel
def test_an_empty_level_and_rows_without_an_active_latent(kernels) -> None:
    sae, x = tall(kernels)
    inner = sae.prefixes[0]
    x[::3] = (sae.mean + sae.b_dec / sae.scale).detach()  # these rows are all zero for the encoder
    with torch.no_grad():
        sae.b_enc[:inner] = -100.0  # the innermost prefix never fires
        sae.b_enc[inner:] -= 0.01
    code, _ = assert_same_step(sae, x, kernels)
    assert (torch.bincount(code.rows, minlength=len(x)) == 0).any()
    assert not (code.latents < inner).any()


@every_kernel
@pytest.mark.parametrize("sparsity", ["jumprelu", "l1", "topk"])
def test_a_batch_without_an_active_latent(sparsity, kernels) -> None:
    sae, x = tall(kernels, sparsity=sparsity)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0), sae.b_dec.add_(0.1)
    code, _ = assert_same_step(sae, x, kernels, sparsity_weight=0.2)
    assert len(code.latents) == 0


@every_kernel
def test_a_residual_that_is_trained_too_is_not_trained_by_dead_latents_that_are_silent(kernels) -> None:
    sae, x = tall(kernels)
    dead = some_dead(sae)
    with torch.no_grad():
        sae.b_enc[dead] = -100.0
    _, expected = assert_same_step(sae, x, kernels)
    aux = Objective(aux=AuxK(k=8, detach=False, coefficient=1.0))
    _, grads = assert_same_step(sae, x, kernels, aux, dead=dead)
    assert float(matryoshka_loss(sae, x, aux, dead).aux) == 0
    assert_same_gradients(grads, expected)


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
    assert len(code.latents) == round(sae.k * len(x)) == int(code.fired().sum())
    pre, chosen = sae.pre(x), code.dense() > 0
    assert pre[chosen].min() >= pre[~chosen].max() - 1e-5
    actual = gradients(sae, matryoshka_loss(sae, x, code=code))
    dense = DenseCode(pre, torch.where(chosen, pre, 0.0))
    assert_same_gradients(actual, gradients(sae, matryoshka_loss(sae, x, code=dense)))


@every_kernel
def test_a_filter_that_lets_too_few_through_is_lowered(kernels, monkeypatch) -> None:
    """The sampled rows are 1.3 times the others: too few exceed the first bar that they set."""
    sae, x = tall(kernels)
    monkeypatch.setattr(msae.sae.fast.code, "SAMPLE", 8)
    monkeypatch.setattr(msae.sae.fast.code, "SLACK", (1.0, 4.0))
    x[:: len(x) // 8] *= 1.3
    bars, largest = [], FAST[kernels].largest
    monkeypatch.setattr(
        FAST[kernels], "largest", lambda h, W, b, bar, *a: bars.append(bar) or largest(h, W, b, bar, *a)
    )
    assert_same_step(sae, x, kernels)
    assert len(bars) == 2
    assert bars[0] > bars[1] > 0


@every_kernel
def test_what_the_filter_cannot_do_is_left_to_the_dense_step(kernels, monkeypatch) -> None:
    sae, x = tall(kernels)
    monkeypatch.setattr(msae.sae.fast.code, "SLACK", (0.5,))  # never enough
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
    monkeypatch.setattr(msae.sae.fast.code, "SAMPLE", 8)
    sae, x = tall(kernels)
    with torch.no_grad():
        (x[3] if where == "a row" else x if where == "x" else getattr(sae, where))[..., 5] = torch.nan
    code = encode_for_training(sae, x, kernels)
    assert isinstance(code, DenseCode)
    assert not matryoshka_loss(sae, x, code=code).total.isfinite()


@every_kernel
def test_gradients_of_several_batches_add_up_are_scaled_and_deterministic(kernels) -> None:
    sae, x = tall(kernels)
    parts, dead = x.split(len(x) // 2), some_dead(sae)
    sums = []
    for _ in range(2):
        sae.zero_grad()
        for part in parts:
            (matryoshka_loss(sae, part, dead=dead, code=sparse_encode(sae, part, kernels)).total / 2).backward()
        sums.append({name: p.grad.clone() for name, p in sae.named_parameters()})
    assert all(torch.equal(sums[0][name], sums[1][name]) for name in sums[0])
    dense = [gradients(sae, matryoshka_loss(sae, part, dead=dead)) for part in parts]
    assert_same_gradients(sums[0], {name: (dense[0][name] + dense[1][name]) / 2 for name in sums[0]})
    total = matryoshka_loss(sae, x, code=sparse_encode(sae, x, kernels)).total
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="only once"):
        total.backward()


@every_kernel
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("sparsity", ["batch_topk", "topk", "jumprelu", "l1"])
def test_inference_is_that_of_the_model(sparsity, rescaled, kernels) -> None:
    sae, x = tall(kernels, d_in=130, sparsity=sparsity, rescale_acts_by_decoder_norm=rescaled)
    if sparsity == "batch_topk":
        with pytest.raises(ValueError, match="no threshold yet"):
            reconstruct(sae, x, kernels)
    with torch.no_grad():
        sae.b_dec.add_(0.1)
        sae.threshold.copy_(torch.linspace(-0.1, 0.4, sae.d_sae))
    fired, recons = reconstruct(sae, x, kernels)
    acts = sae.encode(x)
    assert 0 < (acts > 0).sum() < acts.numel() / 2
    assert torch.equal(fired, (acts > 0).sum(0))
    for recon, expected in zip(recons, sae.decode_prefixes(acts), strict=True):
        torch.testing.assert_close(recon, expected.detach(), rtol=1e-4, atol=1e-5)
