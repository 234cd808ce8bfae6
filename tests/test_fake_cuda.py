"""On a CUDA device that is only pretended: nothing mixes with the host, and results are those of the CPU.

`tests/fake_cuda.py` says what it shows and what it cannot. Commands and sources are tested on it beside their others.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msae.data.batches import ValBatches, moved
from msae.data.harvest import harvest
from msae.data.rows import take
from msae.data.shards import Shards
from msae.evaluation.evaluate import HeldOut, calibrate, evaluate
from msae.evaluation.matching import match, mcc_chance
from msae.evaluation.pictures import truth_pictures
from msae.evaluation.reconstruction import reconstruction_metrics
from msae.explorer.job import neighbours, unembedded
from msae.hierarchy import firings
from msae.hierarchy.extract import Hierarchy, extract
from msae.hierarchy.firings import FirstRows, collect
from msae.hierarchy.limits import Limits
from msae.sae import MatryoshkaSAE
from msae.sae.fast import KERNELS, code, triton
from msae.settings import decode
from msae.sources.forest import ForestSource
from msae.sources.int8 import quantise
from msae.training.settings import Recipe
from msae.training.step import Moment, Step
from tests.fake_cuda import Event, OnCuda, fake_cuda, waits
from tests.test_firings import sae_of

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
SOURCE = ForestSource(rows=3000, val_rows=2000, chunk_rows=2500, root_p=0.25, magnitude_std=0.15)
MECHANISMS = ("batch_topk", "topk", "jumprelu", "l1", "log")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    return harvest(SOURCE, tmp_path_factory.mktemp("shards"), show=False)["synthetic"]


def near(prefixes: list[int], **more: Any) -> MatryoshkaSAE:
    """An SAE whose first 20 latents are the true features, and six more are of nothing."""
    sae = MatryoshkaSAE(20, 26, prefixes, 2, seed=1, **more)
    with torch.no_grad():
        sae.W_dec[:20].copy_(SOURCE.features)
        sae.W_enc[:, :20].copy_(torch.linalg.pinv(SOURCE.features))
    return sae


def absorbed() -> MatryoshkaSAE:
    """One prefix; every parent is silent under its children."""
    features, encoder = SOURCE.features.clone(), torch.linalg.pinv(SOURCE.features).T.contiguous()
    for child, parent in enumerate(SOURCE.parent.tolist()):
        if parent >= 0:
            encoder[parent] -= 9 * encoder[child]
            features[child] += SOURCE.features[parent]
    return sae_of(features, encoder, [20])


def same_on_both(compute: Callable[[Callable[[Any], Any]], Any]) -> tuple[Any, Any]:
    """What is computed on the CPU, and on the device; `compute` takes what puts a tensor or module there."""
    expected = compute(lambda thing: thing)
    with fake_cuda() as device:
        waits.clear()
        return expected, compute(lambda thing: thing.to(device))


# The pretence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake",
    [
        lambda here, there: there + here,
        lambda here, there: here.add_(there),
        lambda here, there: here[0].add_(there[0]),
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.stack([here[0], there[0]]),
        lambda here, there: here @ there,
        lambda here, there: here[there.long()],
        lambda here, there: here.index_select(0, there.long()),
        lambda here, there: torch.add(here, here, out=there),
        lambda here, there: torch.arange(3, device=there.device) * here,
        lambda here, there: torch.zeros_like(there) * here,
        lambda here, there: there.numpy(),
        lambda here, there: there.detach().numpy(),
        lambda here, there: np.asarray(there),
        lambda here, there: torch.nn.Linear(3, 3)(there),
        lambda here, there: there + there.to("cuda:1"),
    ],
)
def test_what_a_gpu_refuses_raises(mistake) -> None:
    with fake_cuda(), pytest.raises((RuntimeError, TypeError), match=r"on cuda:[01] and elsewhere|can't convert"):
        mistake(torch.ones(3), torch.ones(3).to("cuda"))


def test_what_a_gpu_does_is_done() -> None:
    with fake_cuda() as device:
        here = torch.arange(6.0).view(2, 3)
        there = here.to("cuda")
        assert (there.device, there.is_cuda, type(there)) == (device, True, OnCuda)
        assert there.double().device == there.new_zeros(2).device == there.t().device == device
        assert torch.equal((there * torch.tensor(2.0) + 1).cpu(), here * 2 + 1)
        assert torch.equal(there[torch.tensor([1])].cpu(), here[1:])
        assert torch.equal(torch.zeros(2, 3).copy_(there), here)
        assert (there[1].tolist(), float(there[1, 2])) == ([3.0, 4.0, 5.0], 5.0)
        view = there[:, 1]
        view.mul_(2)
        assert there.cpu()[:, 1].tolist() == [2, 8]
        weight = torch.nn.Linear(3, 2).to("cuda")
        weight(there).square().sum().backward()
        assert weight.weight.grad is not None
        assert weight.weight.grad.device == device
        waits.clear()
        assert there[torch.ones(2, dtype=torch.bool, device=device)].shape == (2, 3)
        assert waits == ["aten.index.Tensor"]


@pytest.mark.parametrize("stream", ["cuda:0", "cuda:1"])
def test_a_copy_is_garbage_until_its_stream_is_waited_for(stream) -> None:
    with fake_cuda():
        event, copy = Event(), torch.ones(2).to("cuda:1").to("cpu", non_blocking=True)
        event.record(torch.cuda.current_stream(torch.device(stream)))
        assert copy.tolist() == [77, 77]
        event.synchronize()
        assert copy.tolist() == ([1, 1] if stream == "cuda:1" else [77, 77])


# Evaluation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", MECHANISMS)
def test_figures_are_the_same(sparsity, shards) -> None:
    def figures(on: Any) -> dict[str, float]:
        sae = on(near([3, 12, 26], sparsity=sparsity))
        calibrate(sae, ValBatches(shards, 300, stop=1000))
        return evaluate(sae, HeldOut(shards, start=1000, batch_tokens=300))

    expected, got = same_on_both(figures)
    assert got == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert {"val/fvu/p12", "truth/mcc", "truth/edge_recall"} <= got.keys()
    assert not any(math.isnan(value) for name, value in got.items() if name.startswith("val/"))


def test_figures_of_half_precision_rows_and_of_a_transcoder() -> None:
    x, y = torch.randn(2, 90, 20).half()
    x[3] = y[5] = 0

    def figures(on: Any) -> dict[str, float]:
        sae = on(near([12, 26], d_out=20, sparsity="l1"))
        waits.clear()
        return reconstruction_metrics(sae, [(x[:50], y[:50]), (x[50:], y[50:])])

    expected, got = same_on_both(figures)
    assert got == pytest.approx(expected, rel=1e-5)
    of_batches = [why for why in waits if why != "to cpu"]  # those are at the end
    assert len(of_batches) <= 2  # whether there is a threshold


def test_matching_and_pictures(shards) -> None:
    def found(on: Any) -> Any:
        sae = on(near([3, 26], sparsity="topk"))
        pictures = truth_pictures({"one": sae}, shards, rows=500)
        some = match(sae.W_dec, SOURCE.features, dense=0)
        return match(sae.W_dec, SOURCE.features), some, mcc_chance(on(SOURCE.features), 26), sorted(pictures)

    for a, b in zip(*same_on_both(found), strict=True):
        torch.testing.assert_close(a, b) if isinstance(a, tuple) else pytest.approx(a) == b


# Hierarchy and explorer -----------------------------------------------------------------------------------------------


def test_the_hierarchy_is_the_same(shards) -> None:
    def found(on: Any) -> tuple[Hierarchy, Any]:
        sae = on(sae_of(SOURCE.features, torch.linalg.pinv(SOURCE.features).T, [3, 12, 20]))
        return extract(sae, shards, 4000, Limits(least=5), on(absorbed()))

    (expected, of_expected), (got, of_got) = same_on_both(found)
    assert expected.edges.survives.sum() == 9
    assert got.about == expected.about  # with what was asked: a kept hierarchy is one of every device
    assert got.funnels == expected.funnels
    for name, values in expected.edges.figures.items():
        np.testing.assert_allclose(got.edges.figures[name], values, rtol=1e-5)
    for name in ("offsets", "latents", "acts"):
        torch.testing.assert_close(getattr(of_got.code, name), getattr(of_expected.code, name))


def test_rows_are_encoded_in_few_pieces(shards, monkeypatch) -> None:
    """The host waits five times for each: for what is active, where rows end, and the three parts of the code."""
    monkeypatch.setattr(firings, "BLOCK", 26 * 50)  # of a CPU
    with fake_cuda() as device:
        sae = near([26], sparsity="topk").to(device)
        waits.clear()
        collect([sae], FirstRows(shards, 2000))
        assert len(waits) <= 5


def test_neighbours_and_what_the_unembedding_says() -> None:
    W_U = torch.randn(20, 31, generator=torch.Generator().manual_seed(0))

    class Bridge(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_final = torch.nn.LayerNorm(20)
            self.W_U = torch.nn.Parameter(W_U)

    def seen(on: Any) -> Any:
        sae = on(near([26]))
        return *neighbours(sae, 52), *unembedded(sae, on(Bridge()), 29, 290)

    for a, b in zip(*same_on_both(seen), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_rows_are_taken_where_they_lie(dtype) -> None:
    rows, index = torch.randn(40, 6), torch.tensor([3, 39, 3, 0])
    q, scales = quantise(rows)
    kept = {"activations": q, "scales": scales} if dtype == torch.int8 else {"activations": rows.half()}

    def taken(on: Any) -> Tensor:
        out = on(torch.empty(4, 6, dtype=torch.float32 if dtype == torch.int8 else dtype))
        take({name: on(tensor) for name, tensor in kept.items()}, index, out)
        return out

    expected, got = same_on_both(taken)
    assert got.is_cuda
    assert torch.equal(got.cpu(), expected)


def test_rows_cross_in_the_type_in_which_they_are_kept_and_nothing_waits() -> None:
    with fake_cuda() as device, pytest.MonkeyPatch.context() as patch:
        like, crossed, to = torch.zeros(1, device=device), list[tuple[bool, torch.dtype]](), torch.Tensor.to
        patch.setattr(torch.Tensor, "to", lambda x, *a, **k: crossed.append((x.is_cuda, x.dtype)) or to(x, *a, **k))
        rows = moved(torch.ones(2, 3).half(), like)
        assert crossed == [(False, torch.float16), (True, torch.float16)]
        assert (rows.dtype, rows.device, waits) == (torch.float32, device, [])


# A step ---------------------------------------------------------------------------------------------------------------

RECIPES: list[dict[str, Any]] = [
    *({"sparsity": name} for name in MECHANISMS),
    {"decoder": "unit_norm_before_step", "normalise": "centred"},
    {"decoder": "rescaled", "sparsity": "topk", "normalise": "unit_rms"},
    {"decoder": "free", "sparsity": {"name": "jumprelu", "bandwidth": 0.1}, "penalty": {"control": 0.01}},
    {"objective": {"aux": {"per_level": True, "detach": False, "normalise": "variance"}, "bias_level": True}},
    {"objective": {"terms": {"orthogonality": 0.1}, "stop_gradient": True}},
    {"sampling": {"kind": "random", "n_prefixes": 3}, "resort_rate": 0.5},
    {"sampling": {"kind": "every"}},
    {"d_out": 9},
]


@pytest.mark.parametrize("kernels", ["dense", "plain"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_steps_are_the_same(recipe, kernels, monkeypatch) -> None:
    """All of `msae.sae` that training uses: loss, gradients, optimizer, thresholds, counters, figures."""
    monkeypatch.setattr(code, "DENSEST", 1.0)  # a large share of a few latents is active
    x = torch.randn(4, 64, 12, generator=torch.Generator().manual_seed(0)) + 0.1
    y = x[..., :9].square() if "d_out" in recipe else x
    statistics = [(side.flatten(0, 1).double().mean(0), float(side.square().sum(-1).mean())) for side in (x, y)]
    plain = {"d_in": 12, "d_sae": 40, "prefixes": [8, 40], "k": 3, "lr": 1e-2, "kernels": kernels} | recipe

    def trained(on: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        torch.manual_seed(0)
        step = Step(decode(Recipe, {**plain, "dead": {"after_tokens": 100}}, "model"), 12, recipe.get("d_out"))
        step.start_from(statistics[0], statistics[1] if "d_out" in recipe else None)
        step.sae.b_enc.data[5:9] = -100  # dead
        step, optimizer = on(step), None
        optimizer = step.prepare(4)
        for number in range(len(x)):
            at = Moment(number, len(x))
            done = step.loss(on(x[number]), on(y[number]) if y is not x else on(x[number]), at)
            optimizer.zero_grad()
            done.loss.total.backward()
            optimizer.step()
            figures = step.figures(done, at)
            step.after_update()
        return {name: value.detach().cpu() for name, value in step.state_dict().items()}, figures

    (expected, figures), (got, figures_there) = same_on_both(trained)
    atol = 1e-6 if kernels == "dense" else 1e-3  # plain adds up in another order there; Adam makes a tenth of lr of it
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=atol, equal_nan=True, msg=partial("{}: {}".format, name)
        )
    assert figures_there == pytest.approx(figures, rel=1e-4, nan_ok=True)
    assert figures["train/dead_latents"] >= 4


class Launches:
    """Triton's functions on a device that is only pretended: a launch does nothing."""

    INTERPRETED = False

    def __getattr__(self, name: str) -> Any:
        return defaultdict(lambda: lambda *arguments, **constants: None)  # [grid](…)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("ways", [{}, {"two_passes": True}], ids=str)
def test_a_step_of_triton_waits_once_and_knows_the_number_of_the_dead(ways, rescaled, monkeypatch) -> None:
    def filtered(h: Tensor, W: Tensor, b: Tensor, bar: Tensor, capacity: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        u = h @ W.T + b
        largest = u.flatten().topk(capacity)
        return largest.indices, largest.values, (u > bar).sum()

    for module, name, value in (
        (triton, "library", Launches),
        (triton, "require", lambda device: None),
        (triton, "filtered", filtered),
        (code, "DENSEST", 1.0),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(KERNELS, "triton", triton.Triton(**ways))
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    recipe = {"d_in": 12, "d_sae": 40, "prefixes": [8, 40], "k": 3, "kernels": "triton", "dead": {"after_tokens": 100}}
    recipe |= {"decoder": "rescaled"} if rescaled else {}
    with fake_cuda() as device:
        step = Step(decode(Recipe, recipe, "model"), 12)
        step.start_from((x.mean(0).double(), float(x.square().sum(1).mean())))
        step.sae.b_enc.data[5:9] = -100  # dead
        step = step.to(device)
        optimizer = step.prepare(4)
        for number in range(4):
            there = x.to(device)
            waits.clear()
            done = step.loss(there, there, Moment(number, 4))
            done.loss.total.backward()
            optimizer.step()
            step.after_update()
            assert isinstance(done.loss.code, code.TrainingCode)
            assert len(waits) == 2
            assert waits[1] == "event"  # which the first has seen pass already
        assert int(done.dead.sum()) >= 4
