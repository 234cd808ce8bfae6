"""The compiled kernels: built once, not at all without a compiler, and right with either width of integers."""

import os
import subprocess
import sys

import pytest
import torch

from msae.sae.kernels import compiled, plain

COMPARE = """
import torch
from msae.sae.kernels import compiled, plain
torch.manual_seed(0)
assert compiled.library().msae_screen_bits() in {bits}, compiled.library().msae_screen_bits()
for rows, d_in, d_sae, size in ((33, 20, 100, 1.0), (200, 129, 300, 1e4), (7, 3, 5, 1e-6), (64, 256, 1000, 1.0)):
    h, W, b = size * torch.randn(rows, d_in), torch.randn(d_sae, d_in), size * torch.randn(d_sae)
    h[0], h[1, 0] = 0, 1000 * size  # a row of zeros, and one with an outlier
    for bar in (0.0, 1.5 * size * d_in**0.5):
        bars = torch.full((d_sae,), bar) + 0.1 * size * torch.rand(d_sae)
        flat, values = compiled.survivors(h, W, b, bars)
        expected, wanted = plain.survivors(h, W, b, bars)
        expected, order = expected.sort()
        pre = (h.double() @ W.double().T + b).flatten()
        near = (pre - bars.double().repeat(rows)).abs() < 1e-5 * size * d_in  # rounding decides
        for found in (flat, expected):
            sure = torch.zeros_like(near)
            sure[found] = True
            assert torch.equal(sure[~near], (pre > bars.repeat(rows))[~near])
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
    done = run(COMPARE.replace("{bits}", str(bits)), MSAE_CXXFLAGS=flags, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line.split(" once")[0] for line in done.stderr.splitlines()] == ["kernels: compiling compiled.cpp"]
    again = run("from msae.sae.kernels import compiled; assert compiled.library() is not None",
                MSAE_CXXFLAGS=flags, XDG_CACHE_HOME=str(tmp_path))  # fmt: skip
    assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.parametrize(
    "environment",
    [{"CXX": "no-such-compiler"}, {"MSAE_CXXFLAGS": "--no-such-flag"}, {"XDG_CACHE_HOME": "/dev/null"}],
    ids=lambda e: next(iter(e)),
)
def test_without_a_compiler_or_cache_the_plain_ones_do_it(environment, tmp_path) -> None:
    code = """
import torch
from msae.sae import MatryoshkaSAE, choose_kernels
from msae.sae import sparse
from msae.sae.kernels import compiled, plain
sae, x = MatryoshkaSAE(64, 512, [512], 4), torch.randn(4096, 64)
sparse.WORTH_COMPILING = 1
assert choose_kernels("auto", sae, x) == "plain"
a, b = (sparse.sparse_encode(sae, x, name) for name in ("plain", "compiled"))
assert torch.equal(a.acts, b.acts) and torch.equal(a.latents, b.latents)
"""
    done = run(code, **({"XDG_CACHE_HOME": str(tmp_path)} | environment))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("kernels: not compiled (")
    assert len(done.stderr.splitlines()) <= 2


def test_no_pair_is_lost_that_exceeds_its_bar_by_a_hair() -> None:
    """Bars just below every pre-activation: the bound of the rounded products has to let each of them through."""
    generator = torch.Generator().manual_seed(0)
    h, W = torch.randn(60, 300, generator=generator), torch.randn(500, 300, generator=generator)
    pre = h.double() @ W.double().T
    for row in range(60):
        bars = (pre[row] - 1e-3).float()
        flat, _ = compiled.survivors(h[row : row + 1], W, torch.zeros(500), bars)
        assert len(flat) == 500
        flat, _ = compiled.survivors(h[row : row + 1], W, torch.zeros(500), (pre[row] + 1e-3).float())
        assert len(flat) == 0


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
    flat, _ = compiled.survivors(h[None], W.repeat(40, 1), torch.zeros(40), bars)
    assert len(flat) == 40


@pytest.mark.parametrize("use", [plain, compiled], ids=["plain", "compiled"])
@pytest.mark.parametrize("where", ["h", "W", "b"])
def test_what_is_not_a_number_survives(where, use) -> None:
    given = {"h": torch.randn(30, 64), "W": torch.randn(100, 64), "b": torch.zeros(100)}
    given[where][7] = torch.nan
    flat, values = use.survivors(*given.values(), torch.full((100,), 1e9))
    assert len(flat) == (100 if where == "h" else 30)
    assert values.isnan().all()
    assert (flat // 100 == 7 if where == "h" else flat % 100 == 7).all()


def test_counting_is_sorting() -> None:
    latents = torch.randint(0, 40, (1000,), generator=torch.Generator().manual_seed(0))
    for here, there in zip(compiled.by_latent(latents, 50), plain.by_latent(latents, 50), strict=True):
        assert torch.equal(here, there)
