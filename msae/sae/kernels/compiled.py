"""The sparse step's inner loops in C++, compiled for this machine on first use; the functions of `plain`.

What they cannot do (another device or type, no compiler) `plain` does, with the same result.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msae.sae.kernels import plain

SOURCE = Path(__file__).with_name("compiled.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]  # NaN stays NaN
COUNTS = ("msae_screen", "msae_screen_bits", "msae_columns")  # what returns a number

row_survivors, tell, rows_sum = plain.row_survivors, plain.tell, plain.rows_sum  # PyTorch's are as fast


@functools.cache
def library() -> Any:
    """The compiled functions, from the cache directory or built now (seconds); None where there is no compiler.

    The cache is $XDG_CACHE_HOME/msae or ~/.cache/msae; the compiler $CXX or c++; $MSAE_CXXFLAGS are added to its flags.
    """
    compiler = os.environ.get("CXX", "c++")
    command = [*compiler.split(), *FLAGS, *os.environ.get("MSAE_CXXFLAGS", "").split()]
    made_of = "\0".join([*command, SOURCE.read_text(), platform.machine(), processor()])
    name = f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msae"
    try:
        if not (cache / name).exists():
            cache.mkdir(parents=True, exist_ok=True)
            print(f"kernels: compiling {SOURCE.name} once into {cache}", file=sys.stderr, flush=True)
            build(command, cache / name)
        loaded = ctypes.CDLL(str(cache / name))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        why = str(error).strip().split("\n")[0]
        print(f"kernels: not compiled ({why}); the slower PyTorch ones give the same results", file=sys.stderr)
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


def build(command: list[str], to: Path) -> None:
    """Compile under a temporary name, then rename: another process may be doing the same."""
    with tempfile.TemporaryDirectory(dir=to.parent) as directory:
        made = Path(directory) / to.name
        done = subprocess.run([*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr.strip() or done.returncode}")
        os.replace(made, to)


def able(*tensors: Tensor) -> bool:
    """Whether the compiled functions can take these, and are there."""
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    return fits and library() is not None


able_to_step = able


def call(name: str, *arguments: Tensor | int | float | None) -> Any:
    """Call a function with tensors as pointers; whole numbers are int64, but `threads`, the last, an int."""

    def converted(value: Tensor | int | float | None) -> Any:
        if isinstance(value, Tensor):
            return ctypes.c_void_p(value.data_ptr())
        return ctypes.c_float(value) if isinstance(value, float) else value if value is None else ctypes.c_int64(value)

    return getattr(library(), name)(*map(converted, arguments), torch.get_num_threads())


def survivors(
    h: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_sae d_in"],
    b: Float[Tensor, " d_sae"],
    bar: Float[Tensor, " d_sae"],
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """As `plain.survivors`, in ascending order: multiplied in integers, in float32 only what these cannot rule out."""
    bar = bar.contiguous()
    if not able(h, W, b, bar) or library().msae_screen_bits() == 0:
        return plain.survivors(h, W, b, bar)
    handle, looked_at = ctypes.c_void_p(), ctypes.c_int64()
    sizes = (ctypes.c_int64(n) for n in (*h.shape[:1], *W.shape))
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (h, W, b, bar))
    n = library().msae_screen(*pointers, *sizes, torch.get_num_threads(), ctypes.byref(handle), ctypes.byref(looked_at))
    flat, values = torch.empty(n, dtype=torch.int64), torch.empty(n)
    library().msae_collect(handle, ctypes.c_void_p(flat.data_ptr()), ctypes.c_void_p(values.data_ptr()))
    return flat, values


def by_latent(latents: Int[Tensor, " n"], d_sae: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " d_sae_and_1"]]:
    """As `plain.by_latent`, by counting."""
    if latents.device.type != "cpu" or library() is None:
        return plain.by_latent(latents, d_sae)
    order, ends = torch.empty_like(latents), latents.new_empty(d_sae + 1)
    call("msae_by_latent", latents, len(latents), d_sae, order, ends)
    return order, ends


def residuals(
    acts: Float[Tensor, " n"],
    latents: Int[Tensor, " n"],
    bins: Int[Tensor, " n"],
    W_dec: Float[Tensor, "d_sae d_out"],
    target: Float[Tensor, "batch d_out"],
    levels: int,
) -> tuple[Float[Tensor, "batch levels d_out"], Float[Tensor, " levels"]]:
    """As `plain.residuals`, a row at a time."""
    if not able(acts, W_dec, target):
        return plain.residuals(acts, latents, bins, W_dec, target, levels)
    batch, d = target.shape
    left = target.new_empty(batch, levels, d)
    squares = target.new_empty(-(-d // library().msae_columns()), batch, levels, dtype=torch.float64)
    ends = plain.bin_ends(bins, batch * levels)
    call("msae_residuals", acts, latents, ends, W_dec, target, batch, levels, d, left, squares)
    return left, squares.sum(0).mean(0)


def decode(
    acts: Float[Tensor, " n"],
    latents: Int[Tensor, " n"],
    bins: Int[Tensor, " n"],
    W_dec: Float[Tensor, "d_sae d_out"],
    target: Float[Tensor, "batch d_out"],
    weights: Sequence[float],
    stop_gradient: bool,
    order: Int[Tensor, " n"],
    latent_ends: Int[Tensor, " d_sae_and_1"],
    outermost: Float[Tensor, "batch d_out"] | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "d_sae d_out"], Float[Tensor, " d_out"], Float[Tensor, " levels"]]:
    """All of a decoder's step in blocks of columns, without ever holding the residuals of all levels.

    The gradients of acts, W_dec and b_dec, as of `plain.tell`, of `plain.rows_sum` over each latent's entries (`order`,
    `latent_ends` of `by_latent`) and of a sum over all rows; and the errors of `plain.residuals`, whose last level goes
    into `outermost` if that is given.
    """
    (batch, d), (levels, d_sae) = target.shape, (len(weights), len(W_dec))
    told = target.new_empty(batch, levels, library().msae_columns())
    squares, dots = target.new_zeros(batch, levels, dtype=torch.float64), torch.zeros_like(acts)
    to_W_dec, to_b_dec = torch.empty_like(W_dec), target.new_empty(d)
    by_latent = (acts[order], bins[order], latent_ends)
    given = (
        acts,
        latents,
        plain.bin_ends(bins, batch * levels),
        *by_latent,
        W_dec,
        target,
        torch.tensor(weights, dtype=torch.float32),
    )
    sizes, made = (batch, levels, d, d_sae, int(stop_gradient)), (told, squares, dots, outermost, to_W_dec, to_b_dec)
    call("msae_decode", *given, *sizes, *made)
    return dots, to_W_dec, to_b_dec, squares.mean(0)


def project(grad: Float[Tensor, "rows d"], W: Float[Tensor, "rows d"] | None) -> Float[Tensor, " rows"]:
    """‖grad row‖² (float64), after its part along W's unit row is removed in place if W is given."""
    rows, d = grad.shape
    squares = grad.new_empty(rows, dtype=torch.float64)
    call("msae_project", grad, W, rows, d, squares)
    return squares


def adam(
    W: Float[Tensor, "rows d"],
    grad: Float[Tensor, "rows d"],
    state: tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"]],
    scale: Float[Tensor, ""],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: Float[Tensor, ""],
    unit_norm: bool,
) -> None:
    """Adam's update with the gradient × scale, then rows of unit norm if wanted: one pass over memory."""
    (beta1, beta2), (rows, d) = betas, W.shape
    step_size, root = lr / (1 - beta1 ** int(step)), math.sqrt(1 - beta2 ** int(step))
    call("msae_adam", W, grad, *state, rows, d, float(scale), beta1, beta2, step_size, root, eps, unit_norm)
