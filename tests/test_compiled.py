"""The compiled kernels: built once, not at all without a compiler, and right with either width of integers."""

import os
import subprocess
import sys

import pytest
import torch

from msae.sae import MatryoshkaSAE, encode_for_training, matryoshka_loss
from msae.sae.fast import KERNELS, compiled

COMPILED = KERNELS["compiled"]
COMPARE = """
import torch
from msae.sae.fast import KERNELS, PLAIN, compiled
torch.manual_seed(0)
assert compiled.library().msae_screen_bits() in {bits}, compiled.library().msae_screen_bits()
for rows, d_in, d_sae, size in ((33, 20, 100, 1.0), (200, 129, 300, 1e4), (7, 3, 5, 1e-6), (64, 256, 1000, 1.0)):
    h, W, b = size * torch.randn(rows, d_in), torch.randn(d_sae, d_in), size * torch.randn(d_sae)
    h[0], h[1, 0] = 0, 1000 * size  # a row of zeros, and one with an outlier
    for bar in (0.0, 1.5 * size * d_in**0.5):
        bars = torch.full((d_sae,), bar) + 0.1 * size * torch.rand(d_sae)
        flat, values = KERNELS["compiled"].survivors(h, W, b, bars)
        of_plain, _ = PLAIN.survivors(h, W, b, bars)
        pre = (h.double() @ W.double().T + b).flatten()
        near = (pre - bars.double().repeat(rows)).abs() < 1e-5 * size * d_in  # rounding decides
        for survivors in (flat, of_plain):
            passes = torch.zeros_like(near)
            passes[survivors] = True
            assert torch.equal(passes[~near], (pre > bars.repeat(rows))[~near])
        assert (flat.diff() > 0).all()
        torch.testing.assert_close(values.double(), pre[flat], rtol=1e-5, atol=1e-5 * size * d_in)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


@pytest.mark.parametrize(
    ("flags", "bits"),
    [("", (0, 8, 16)), ("-mno-avx512vnni -mno-avx512f", (0, 16)), ("-march=x86-64", (0,))],
    ids=["this machine", "without int8 products", "without AVX2"],
)
def test_the_integer_screen_finds_what_float32_finds(flags, bits, tmp_path) -> None:
    if flags and os.uname().machine != "x86_64":
        pytest.skip("flags of x86-64")
    environment = {"MSAE_CXXFLAGS": flags, "XDG_CACHE_HOME": str(tmp_path)}
    first = run(COMPARE.replace("{bits}", str(bits)), **environment)
    assert first.returncode == 0, first.stderr
    assert [line.split(" once")[0] for line in first.stderr.splitlines()] == ["kernels: compiling compiled.cpp"]
    again = run("from msae.sae.fast import compiled; assert compiled.library() is not None", **environment)
    assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.parametrize(
    "environment",
    [{"CXX": "no-such-compiler"}, {"MSAE_CXXFLAGS": "--no-such-flag"}, {"XDG_CACHE_HOME": "/dev/null"}],
    ids=lambda e: next(iter(e)),
)
def test_without_a_compiler_or_cache_the_plain_ones_do_it(environment, tmp_path) -> None:
    code = """
import torch
from msae.sae import MatryoshkaSAE, choose_kernels, fast
from msae.sae.fast.code import sparse_encode
sae, x = MatryoshkaSAE(64, 512, [512], 4), torch.randn(4096, 64)
fast.WORTH_COMPILING = 1
assert choose_kernels(sae) == "plain"
a, b = (sparse_encode(sae, x, name) for name in ("plain", "compiled"))
assert torch.equal(a.acts, b.acts) and torch.equal(a.latents, b.latents)
"""
    result = run(code, **({"XDG_CACHE_HOME": str(tmp_path)} | environment))
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1].startswith("kernels: not compiled (")
    assert len(result.stderr.splitlines()) <= 2


def test_no_pair_is_lost_that_exceeds_its_bar_by_a_hair() -> None:
    """Bars just below every pre-activation: the bound of the rounded products has to let each of them through."""
    generator = torch.Generator().manual_seed(0)
    h, W = torch.randn(60, 300, generator=generator), torch.randn(500, 300, generator=generator)
    for row, pre in zip(h, h.double() @ W.double().T, strict=True):
        for margin, count in ((-1e-3, 500), (1e-3, 0)):
            assert len(COMPILED.survivors(row[None], W, torch.zeros(500), (pre + margin).float())[0]) == count


@pytest.mark.parametrize("rounded", ["W", "h"])
def test_rounding_that_all_adds_up_loses_no_pair(rounded) -> None:
    """One vector is rounded exactly; of the other each number but the largest loses 0.4 of a step."""
    bits = compiled.library().msae_screen_bits() if compiled.library() else 0
    step = 1 / (127 if bits == 8 else 32767)
    exact = torch.ones(256)
    inexact = (torch.randint(-8, 8, (256,), generator=torch.Generator().manual_seed(0)) + 0.4) * step
    inexact[0] = 1.0
    h, W = (exact, inexact) if rounded == "W" else (inexact, exact)
    bars = (exact @ inexact).repeat(40) - 0.5 * step  # all that is lost is 102 steps
    flat, _ = COMPILED.survivors(h[None], W.repeat(40, 1), torch.zeros(40), bars)
    assert len(flat) == 40


@pytest.mark.skipif(compiled.library() is None, reason="no compiler")
def test_a_step_has_the_same_bits_whichever_thread_does_what(monkeypatch) -> None:
    """Threads take ranges of rows as they come, so which one takes which is a matter of chance."""
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    sae = MatryoshkaSAE(256, 1024, [64, 192, 448, 1024], 9)
    steps = []
    for threads in (1, *[3] * 10):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        loss = matryoshka_loss(sae, x, code=encode_for_training(sae, x, "compiled"))
        gradients = torch.autograd.grad(loss.total, list(sae.parameters()))
        steps.append([loss.levels, loss.code.acts, *gradients])
    for step in steps[1:]:
        assert all(torch.equal(a, b) for a, b in zip(steps[0], step, strict=True))
