"""The kernels of the sparse step in C++, compiled for this machine on first use.

What they cannot do (another device or type, no compiler) is left to `Plain`, with the same result.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msae.progress import say
from msae.sae.fast.plain import Decoded, Decoding, Moments, Plain, Rates, Weights

SOURCE = Path(__file__).with_name("compiled.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]  # NaN stays NaN
COUNTS = ("msae_screen", "msae_screen_bits", "msae_columns")  # functions that return a number


@functools.cache
def library() -> Any:
    """The compiled functions, from the cache directory or built now (seconds); None where there is no compiler.

    The cache is $XDG_CACHE_HOME/msae or ~/.cache/msae; the compiler $CXX or c++; $MSAE_CXXFLAGS are added to its flags.
    """
    compiler = os.environ.get("CXX", "c++")
    command = [*compiler.split(), *FLAGS, *os.environ.get("MSAE_CXXFLAGS", "").split()]
    ingredients = "\0".join([*command, SOURCE.read_text(), platform.machine(), processor()])
    name = f"kernels-{hashlib.sha256(ingredients.encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msae"
    try:
        if not (cache / name).exists():
            cache.mkdir(parents=True, exist_ok=True)
            say(f"kernels: compiling {SOURCE.name} once into {cache}")
            build(command, cache / name)
        loaded = ctypes.CDLL(str(cache / name))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().split("\n")[0]
        say(f"kernels: not compiled ({reason}); the slower PyTorch ones give the same results")
        return None
    for function in COUNTS:
        if hasattr(loaded, function):
            getattr(loaded, function).restype = ctypes.c_int64
    return loaded


def processor() -> str:
    """What `-march=native` depends on: a cache directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def build(command: list[str], path: Path) -> None:
    """Compile under a temporary name, then rename: another process may be doing the same."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        temporary = Path(directory) / path.name
        compiler = [*command, str(SOURCE), "-o", str(temporary)]
        result = subprocess.run(compiler, capture_output=True, text=True, timeout=300)
        if result.returncode:
            raise RuntimeError(f"{command[0]} failed: {result.stderr.strip() or result.returncode}")
        os.replace(temporary, path)


def able(*tensors: Tensor) -> bool:
    """Whether the compiled functions are there, and take these."""
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    return fits and library() is not None


def call(name: str, *arguments: Any) -> Any:
    """Call a function: tensors become pointers, floats float, ints int64_t; the number of threads follows them."""

    def converted(value: Any) -> Any:
        if isinstance(value, Tensor):
            return ctypes.c_void_p(value.data_ptr())
        if isinstance(value, float):
            return ctypes.c_float(value)
        return ctypes.c_int64(value) if isinstance(value, int) else value

    return getattr(library(), name)(*map(converted, arguments), torch.get_num_threads())


class Compiled(Plain):
    """`Plain` in C++ where that is faster than PyTorch."""

    def exceeding(self, h: Tensor, W: Tensor, b: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
        """Multiplied in integers, and in float32 only what these cannot rule out."""
        bar = bar.contiguous()
        if not able(h, W, b, bar) or library().msae_screen_bits() == 0:
            return super().exceeding(h, W, b, bar)
        screen = ctypes.c_void_p()
        n = call("msae_screen", h, W, b, bar, len(h), *W.shape, ctypes.byref(screen))
        flat, u = torch.empty(n, dtype=torch.int64), torch.empty(n)
        call("msae_collect", screen, flat, u)
        return flat, u

    def by_latent(self, latents: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
        if latents.device.type != "cpu" or library() is None:
            return super().by_latent(latents, d_sae)
        order, ends = torch.empty_like(latents), latents.new_empty(d_sae + 1)
        call("msae_by_latent", latents, len(latents), d_sae, order, ends)
        return order, ends

    def residuals(self, code: Decoding, target: Tensor) -> tuple[Tensor, Tensor]:
        if not able(code.acts, code.W_dec, target):
            return super().residuals(code, target)
        batch, d = target.shape
        levels, blocks = (len(code.ends) - 1) // batch, -(-d // library().msae_columns())
        residuals = target.new_empty(batch, levels, d)
        squares = target.new_empty(blocks, batch, levels, dtype=torch.float64)
        inputs = (code.acts, code.latents, code.ends, code.W_dec, target)
        call("msae_residuals", *inputs, batch, levels, d, residuals, squares)
        return residuals, squares.sum(0).mean(0)

    def decode(
        self,
        code: Decoding,
        target: Tensor,
        weights: Weights,
        stop_gradient: bool,
        by_latent: tuple[Tensor, Tensor],
        outermost: Tensor | None,
    ) -> Decoded | None:
        """In blocks of columns, without ever holding the residuals of all levels."""
        acts, W_dec, (order, latent_ends) = code.acts, code.W_dec, by_latent
        if not able(acts, W_dec, target):
            return None
        (batch, d), levels = target.shape, len(weights.host)
        gradient = target.new_empty(batch, levels, library().msae_columns())  # of a block: room for the kernel
        squares, grad_acts = target.new_zeros(batch, levels, dtype=torch.float64), torch.zeros_like(acts)
        grad_W_dec, grad_b_dec = torch.empty_like(W_dec), target.new_empty(d)
        sorted_entries = (acts[order], code.bins[order], latent_ends)
        inputs = (acts, code.latents, code.ends, *sorted_entries, W_dec, target, weights.device)
        outputs = (gradient, squares, grad_acts, outermost, grad_W_dec, grad_b_dec)
        call("msae_decode", *inputs, batch, levels, d, len(W_dec), stop_gradient, *outputs)
        return Decoded(
            squares.mean(0), grad_acts, lambda scale: grad_W_dec if scale is None else grad_W_dec * scale, grad_b_dec
        )

    def can_step(self, *tensors: Tensor) -> bool:
        return able(*tensors)

    def project(self, grad: Tensor, W: Tensor | None) -> Tensor:
        squares = grad.new_empty(len(grad), dtype=torch.float64)
        call("msae_project", grad, W, *grad.shape, squares)
        return squares

    def adam(
        self,
        W: Tensor,
        grad: Tensor,
        moments: Moments,
        scale: Tensor,
        rates: Rates,
        unit_norm: bool,
        half: Tensor | None = None,
    ) -> None:
        (lr, beta1, beta2, eps), (*averages, step) = rates, moments
        step_size, root = lr / (1 - beta1 ** int(step)), math.sqrt(1 - beta2 ** int(step))
        call("msae_adam", W, grad, *averages, *W.shape, float(scale), beta1, beta2, step_size, root, eps, unit_norm)
