"""Triton's functions: in its interpreter the same as `Plain`, for GPUs compiled and within their shared memory."""

import sys
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import msae.sae.fast.code
from msae.sae import DictionaryAdam, choose_kernels, matryoshka_loss, permute
from msae.sae.auxk import Dead
from msae.sae.fast import KERNELS, triton
from msae.sae.fast.code import sparse_encode
from msae.sae.fast.plain import Moments, Rates
from tests.device import DEVICE
from tests.gradients import NO_TRITON, assert_same_gradients, gradients
from tests.test_compiled import run
from tests.test_sparse import some_dead, tall

pytestmark = NO_TRITON
TRITON = KERNELS["triton"]
PRODUCT = triton.Triton(product=True)
both_encoders = pytest.mark.parametrize("kernels", [TRITON, PRODUCT], ids=["one kernel", "product"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    """So that small shapes have several of everything."""
    tile = {"ROWS": 16, "LATENTS": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 1}
    sizes = {"COLUMNS": 32, "AT_ONCE": 4, "CHUNK": 512, "STRETCH": 16, "PRODUCT": 8 * 33}
    for name, value in {"TILES": dict.fromkeys(triton.TILES, tile), **sizes}.items():
        monkeypatch.setattr(triton, name, value)
    monkeypatch.setattr(msae.sae.fast.code, "DENSEST", 1.0)


def whole_numbers(rows: int, d_in: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """h, W, b whose products float32 has exactly, also from bfloat16."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, d_in), (d_sae, d_in), (d_sae,))
    h, W, b = (torch.randint(-4, 5, shape, generator=generator).float().to(DEVICE) for shape in shapes)
    return h, W, b


# --- the encoder and its filter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 16, 32), (17, 5, 33), (33, 37, 40)])
@both_encoders
def test_what_exceeds_its_bar_is_found(kernels, shape, dtype) -> None:
    """Many values are equal to their bars: these do not exceed them. Also with less room than expected at first."""
    h, W, b = whole_numbers(*shape)
    pre = h @ W.T + b
    for bar in (b - 5.0, b, b + 1.0, torch.full_like(b, -1e9)):
        flat, values = kernels.survivors(h.to(dtype), W.to(dtype), b, bar, torch.tensor(False, device=DEVICE))
        assert torch.equal(flat, (pre > bar).flatten().nonzero().squeeze(1))
        assert torch.equal(values, pre.flatten()[flat])
        assert kernels.survivors(h.to(dtype), W.to(dtype), b, bar, torch.tensor(True, device=DEVICE)) is None


def test_products_of_bfloat16_are_added_up_in_float32() -> None:
    h, W = (torch.ones(rows, 512, dtype=torch.bfloat16, device=DEVICE) for rows in (16, 32))
    zeros = torch.zeros(32, device=DEVICE)
    h[:, 0] = 1024.0  # after which bfloat16 would not count on
    for kernels in (TRITON, PRODUCT):
        _, values = kernels.survivors(h, W, zeros, zeros)
        assert torch.equal(values.cpu(), torch.full((512,), 1535.0))


@pytest.mark.parametrize("encoder", ["one kernel", "product"])
def test_nothing_is_written_beyond_the_room_and_all_are_counted(encoder) -> None:
    h, W, b = whole_numbers(40, 37, 70)
    pre, bar, capacity = (h @ W.T + b).flatten(), b + 8.0, 100
    expected = (pre > bar.repeat(40)).nonzero().squeeze(1)
    flat, values = (torch.full((3000,), fill, device=DEVICE) for fill in (-1, -1.0))
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)
    if encoder == "product":
        for row in (0, 16):
            part = (h @ W.T)[row : row + (16 if row == 0 else 24)]
            triton.library().screen[len(part), 3](part, b, bar, flat, values, count, row, 70, capacity, LATENTS=32)
    else:
        arguments = (h, W, b, bar, flat, values, count, 40, 70, capacity)
        triton.library().survivors[3 * 3,](*arguments, D=37, PRECISION="ieee", **triton.TILES[h.dtype])
    assert int(count) == len(expected) > capacity
    assert torch.isin(flat[:capacity], expected).all()
    assert len(flat[:capacity].unique()) == capacity
    assert torch.equal(values[:capacity], pre[flat[:capacity]])
    assert (flat[capacity:] == -1).all()
    assert (values[capacity:] == -1).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_of_equal_values_the_first_are_kept_however_the_buffer_is_ordered(scaled, monkeypatch) -> None:
    h, W, b = whole_numbers(20, 5, 33)
    norm = 1 + torch.arange(33.0, device=DEVICE) % 2 if scaled else None
    ranked = (h @ W.T + b) * (1.0 if norm is None else norm)
    kept = ranked.flatten().argsort(descending=True, stable=True)[:50]
    bar = ranked.flatten()[kept[-1]]
    assert (ranked == bar).sum() > (ranked.flatten()[kept] == bar).sum()
    filtered = triton.filtered

    def shuffled(*arguments):
        flat, values, count = filtered(*arguments)
        order = torch.randperm(len(flat), device=DEVICE)
        return flat[order], values[order], count

    monkeypatch.setattr(triton, "filtered", shuffled)
    passing = int((ranked > bar - 1.5).sum())
    kept = kept.sort().values
    for count, capacity, enough in ((50, 600, True), (50, passing, True), (50, passing - 1, False)):
        for kernels in (TRITON, PRODUCT):
            flat, u, is_enough = kernels.largest(h, W, b, bar - 1.5, norm, count, capacity)
            assert bool(is_enough) == enough
            if enough:
                assert torch.equal(flat, kept)
                assert torch.equal(u, (h @ W.T + b).flatten()[kept])
    assert not TRITON.largest(h, W, b, bar - 1.5, norm, passing + 1, 600)[2]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_that_is_none_is_the_largest_whatever_its_sign(sign) -> None:
    h, W, b = whole_numbers(20, 5, 33)
    b[7] = torch.tensor(torch.nan).copysign(torch.tensor(float(sign)))
    flat, u, is_enough = TRITON.largest(h, W, b, torch.tensor(1.0, device=DEVICE), None, 50, 660)
    assert is_enough
    assert int(u.isnan().sum()) == int((flat % 33 == 7).sum()) == 20


@pytest.mark.parametrize("rescaled", [False, True])
def test_where_more_pass_than_had_room_the_next_bar_is_tried_then_the_dense_step(rescaled, monkeypatch) -> None:
    sae, x = tall("triton", rescale_acts_by_decoder_norm=rescaled)
    rooms, filtered = [], triton.filtered
    monkeypatch.setattr(triton, "filtered", lambda *arguments: (rooms.append(arguments[4]), filtered(*arguments))[1])
    monkeypatch.setattr(msae.sae.fast.code, "SLACK", (1.3, 2.6))
    monkeypatch.setattr(msae.sae.fast.code, "ROOM", 0.75)
    assert sparse_encode(sae, x, "triton") is None
    count = sae.k * len(x)
    assert rooms == [round(0.75 * 1.3 * count), round(0.75 * 2.6 * count)]
    monkeypatch.setattr(msae.sae.fast.code, "SLACK", (1.3, 1.31))
    monkeypatch.setattr(msae.sae.fast.code, "ROOM", 1.2)
    code, of_plain = sparse_encode(sae, x, "triton"), sparse_encode(sae, x, "plain")
    assert torch.equal(code.dense() > 0, of_plain.dense() > 0)


def test_half_precision_of_autocast_is_of_the_encoder_and_of_auxk() -> None:
    sae, x = tall("triton")
    dead = torch.arange(sae.d_sae, device=DEVICE) % 4 == 0
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        code, of_plain = (sparse_encode(sae, x, name) for name in ("triton", "plain"))
        under_autocast = gradients(sae, matryoshka_loss(sae, x, dead=dead, code=code))
    h = sae.encoder_input(x).bfloat16().float()
    pre = h @ sae.W_enc.bfloat16().float() + sae.b_enc
    assert_close(code.u, pre[code.rows, code.latents])
    exact = sae.pre(x)
    assert not torch.equal(code.u, exact[code.rows, code.latents])
    assert_close(of_plain.u, exact[of_plain.rows, of_plain.latents])
    code.in_bfloat16 = False
    without = gradients(sae, matryoshka_loss(sae, x, dead=dead, code=code))
    assert any(not torch.equal(under_autocast[name], gradient) for name, gradient in without.items())
    assert_same_gradients(under_autocast, without, 2e-2)
    without_dead = [gradients(sae, matryoshka_loss(sae, x, code=code)) for code.in_bfloat16 in (False, True)]
    assert all(torch.equal(without_dead[0][name], gradient) for name, gradient in without_dead[1].items())


def test_a_batch_of_more_entries_than_can_be_told_apart_is_left_to_plain(monkeypatch) -> None:
    sae, x = tall("triton")
    codes = []
    for places in (triton.PLACES, 10):
        monkeypatch.setattr(triton, "PLACES", places)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            codes.append(sparse_encode(sae, x, "triton").dense())
    assert_close(*codes)


# --- the copy of W_enc in bfloat16 ------------------------------------------------------------------------------------


def test_the_optimizer_writes_the_copy_that_is_multiplied() -> None:
    """And whoever else writes W_enc makes it stale. The interpreter cuts the last bit off, a GPU rounds."""
    cast_of = partial(assert_close, rtol=2**-7 if triton.library().INTERPRETED else 0, atol=0)
    sae, x = tall("triton", seed=1)
    sae.kernels = "triton"
    optimizer = DictionaryAdam(sae, 1e-2)

    def step() -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            code = sparse_encode(sae, x, "triton")
        cast_of(TRITON.factors(x, sae.W_enc, True)[1], sae.W_enc.detach().T.bfloat16())
        gradients(sae, matryoshka_loss(sae, x, code=code))
        optimizer.step()

    half = TRITON.factors(x, sae.W_enc, True)[1]
    before = half.clone()
    step()
    cast_of(half, sae.W_enc.detach().T.bfloat16())  # by the optimizer: nothing has asked for it since
    assert not torch.equal(half, before)
    assert TRITON.factors(x, sae.W_enc, True)[1] is half
    others = {
        "in place": lambda: sae.W_enc.detach().mul_(1.5),
        "loaded": lambda: sae.load_state_dict({**sae.state_dict(), "W_enc": 2 * sae.W_enc.detach()}),
        "sorted": lambda: permute(sae, torch.arange(sae.d_sae, device=DEVICE).flip(0), optimizer),
        "other memory": lambda: setattr(sae.W_enc, "data", sae.W_enc.data.clone().mul_(3)),
    }
    for name, write in others.items():
        step()
        with torch.no_grad():
            write()
        assert torch.equal(TRITON.factors(x, sae.W_enc, True)[1], sae.W_enc.detach().T.bfloat16()), name  # anew
        assert TRITON.factors(x, sae.W_enc, False)[1].dtype == torch.float32


# --- the whole step ---------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Collects the operators whose result the host has to see."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in self.NAMES or masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", [TRITON, triton.Triton(two_passes=True)], ids=["one pass", "two passes"])
def test_the_host_waits_once_in_a_whole_step(kernels, monkeypatch) -> None:
    sae, x = tall("triton")
    monkeypatch.setitem(KERNELS, "triton", kernels)
    sae.kernels = "triton"
    optimizer = DictionaryAdam(sae, 1e-3)
    dead = Dead(some_dead(sae))
    dead._sent, dead._number = Mock(), int(dead.mask.sum())  # as from a GPU
    expected = matryoshka_loss(sae, x, code=sparse_encode(sae, x, "triton"), dead=dead.mask).aux
    looks, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: (looks.append(t.dtype), tolist(t))[1])
    waits = Waits()
    with waits:
        code = sparse_encode(sae, x, "triton")
        assert looks == [torch.bool]
        loss = matryoshka_loss(sae, x, code=code, dead=dead)
    assert_close(loss.aux, expected)
    loss.total.backward()  # hands the gradients over; on a CPU alone it looks at its own
    with waits:
        sae.update_threshold(code.acts, 0.01)
        sae.update_fired(code.fired(), len(x))
        optimizer.step()
    assert waits.seen == []
    assert looks == [torch.bool, torch.float64, torch.float64]  # all but the first are weights, which are the host's


def test_the_optimizer_takes_rows_that_a_program_can_hold() -> None:
    wide = torch.zeros(2, triton.WIDEST + 1, device=DEVICE)
    assert not TRITON.can_step(wide)
    assert TRITON.can_step(wide[:1])


def test_the_first_update_is_the_learning_rate_however_slow_the_averages() -> None:
    """1 − β2 has few digits in float32."""
    W, mean, square_mean = (torch.zeros(1, 100, device=DEVICE) for _ in range(3))
    grad, one = torch.randn(1, 100, device=DEVICE), torch.ones((), dtype=torch.float64, device=DEVICE)
    moments = Moments(mean, square_mean, torch.ones((), device=DEVICE))
    TRITON.adam(W, grad, moments, one, Rates(1e-3, 0.9, 0.9999, 1e-30), False)
    assert_close(W, -1e-3 * grad.sign(), rtol=2e-6, atol=0)


# --- where it cannot run ----------------------------------------------------------------------------------------------


def test_without_triton_all_else_works_and_asking_for_it_is_one_line() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from msae.sae import MatryoshkaSAE, choose_kernels
from msae.sae.fast import triton
from msae.sae.fast.code import sparse_encode
sae, x = MatryoshkaSAE(16, 128, [128], 2), torch.randn(64, 16)
assert sparse_encode(sae, x, "plain") is not None and choose_kernels(sae) == "dense"
assert not triton.able(x)
try:
    choose_kernels(sae, "triton")
except ValueError as error:
    print(error)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("model.kernels=triton needs the package triton; pip install triton, or use")


@pytest.mark.parametrize(
    ("device", "capability", "message"),
    [
        ("cuda", (7, 5), r"8\.0 or more, Tesla T4 has less"),
        ("cpu", None, "on a CUDA device, it is on cpu"),
        ("cuda:1", (8, 0), "the current CUDA device, not cuda:1; set that first"),
        ("cuda:0", (8, 0), None),
        ("cuda", (9, 0), None),
    ],
)
def test_a_device_that_cannot_run_it_is_refused_in_one_line(device, capability, message, monkeypatch) -> None:
    assert choose_kernels(tall("triton")[0], "triton") == "triton"  # interpreted
    monkeypatch.setattr(triton.library(), "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if message is None:
        triton.require(torch.device(device))
        return
    line = rf"^model\.kernels=triton expects [^\n]*{message}(; use model\.kernels=auto)?$"
    with pytest.raises(ValueError, match=line):
        triton.require(torch.device(device))
    assert not triton.able(torch.ones(3))


# --- for GPUs ---------------------------------------------------------------------------------------------------------

NAMES = ("survivors", "screen", "residuals", "decoder_backward", "decode", "sum_rows", "project", "adam")
COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from msae.sae.fast import triton as ours
from msae.sae.fast.plain import Decoding, Moments, Rates, Weights

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int64: "*i64"}
DIVISIBLE = [["tt.divisibility", 16]]

class Compiled:
    '''In place of a function: compiles what a launch would need, and launches nothing.'''
    def __init__(self, function):
        self.function = function
    def __getitem__(self, grid):
        return self.launch
    def launch(self, *arguments, num_warps=4, num_stages=3, maxnreg=None, **constants):
        signature, attributes = dict.fromkeys(constants, "constexpr"), {}
        for i, (name, value) in enumerate(zip(self.function.arg_names, arguments)):
            tensor = isinstance(value, torch.Tensor)
            signature[name] = TYPES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
            if tensor or (isinstance(value, int) and value % 16 == 0):
                attributes[i,] = DIVISIBLE
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        for capability in (80, 90):
            source = ASTSource(self.function, signature, constants, attributes)
            binary = triton.compile(source, GPUTarget("cuda", capability, 32), options)
            assert binary.asm["cubin"]
            kind = "mma" if "mma" in binary.asm["ptx"] else "fma"
            print(self.function.__name__, str(arguments[0].dtype), kind, capability, binary.metadata.shared)

class Library:
    INTERPRETED = False

ours.able = lambda *tensors, **types: True
library, kernels = ours.library(), ours.Triton()
for name in NAMES:
    setattr(Library, name, Compiled(getattr(library, name)))
ours.library = lambda: Library
h, W, b = torch.zeros(256, 768), torch.zeros(1024, 768), torch.zeros(1024)
ours.filtered(h, W, b, b, 1024)
ours.filtered(h, W, b, b, 1024, product=True)
torch.set_float32_matmul_precision("high")
ours.filtered(h, W, b, b, 1024)
for registers in (None, 128):
    ours.filtered(h.bfloat16(), W.bfloat16(), b, b, 1024, registers=registers)
latents, acts = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
code = Decoding(acts, latents, latents, torch.zeros(256 * 3 + 1, dtype=torch.int64), W)
residuals, _ = kernels.residuals(code, h)
weights = Weights([1.0, 1.0, 1.0], torch.ones(3))
for stop_gradient in (False, True):
    kernels.decoder_backward(code, residuals, weights, stop_gradient, {})
    kernels.decode(code, h, weights, stop_gradient, (latents, latents), h if stop_gradient else None)
kernels.sum_rows(h, latents, acts, latents)
wide = torch.zeros(2, ours.WIDEST)
moments, one = Moments(wide, wide, torch.ones(())), torch.ones((), dtype=torch.float64)
for along in (None, wide):
    kernels.project(wide, along)
    for half in (None, wide.bfloat16()):
        kernels.adam(wide, wide, moments, one, Rates(1e-3, 0.9, 0.999, 1e-8), along is not None, half)
"""
SHARED = {"80": 163 * 1024, "90": 227 * 1024}  # bytes that one program may have, CUDA programming guide


@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler is for Linux")
def test_every_function_compiles_for_gpus_within_their_shared_memory(tmp_path) -> None:
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = run(COMPILE.replace("NAMES", str(NAMES)), **environment)
    assert result.returncode == 0, result.stderr
    binaries = [line.split() for line in result.stdout.splitlines()]
    assert {(name, capability) for name, _, _, capability, _ in binaries} == {(n, c) for n in NAMES for c in SHARED}
    # float32 is rounded for tensor cores only where PyTorch was told so; else PyTorch multiplies
    kinds = [(dtype, kind) for name, dtype, kind, *others in binaries if (name, others[0]) == ("survivors", "80")]
    assert kinds == [("torch.float32", "mma"), ("torch.bfloat16", "mma"), ("torch.bfloat16", "mma")]
    for name, dtype, _, capability, shared in binaries:
        assert int(shared) <= SHARED[capability], (name, dtype, capability)
