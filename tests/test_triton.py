"""Triton's functions: in its interpreter the same as `plain`, for GPUs compiled and within their shared memory."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import msae.sae.sparse
import msae.training.module
from msae.sae import DictionaryAdam, SparseCode, choose_kernels, matryoshka_loss
from msae.sae.kernels import plain
from msae.sae.kernels import triton as ours
from msae.sae.sparse import sparse_encode
from tests.test_adam import example, give_gradients
from tests.test_sparse import NO_TRITON, gradients, tall
from tests.test_training import fit

pytestmark = NO_TRITON


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    """So that small shapes have several of everything."""
    tile = {"ROWS": 16, "LATENTS": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 1}
    for name, value in {"TILES": dict.fromkeys(ours.TILES, tile), "COLUMNS": 32, "AT_ONCE": 4, "CHUNK": 512}.items():
        monkeypatch.setattr(ours, name, value)
    monkeypatch.setattr(msae.sae.sparse, "DENSEST", 1.0)


def whole_numbers(rows: int, d_in: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """h, W, b whose products float32 has exactly, also from bfloat16."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, d_in), (d_sae, d_in), (d_sae,))
    h, W, b = (torch.randint(-4, 5, shape, generator=generator).float() for shape in shapes)
    return h, W, b


SHAPES = [(1, 1, 1), (16, 16, 32), (17, 5, 33), (33, 37, 40)]


# --- the encoder and its filter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_exceeds_its_bar_is_found(shape, dtype) -> None:
    """Many values are equal to their bars: these do not exceed them. Also with less room than was thought."""
    h, W, b = whole_numbers(*shape)
    pre = h @ W.T + b
    for bar in (b - 5.0, b, b + 1.0, torch.full_like(b, -1e9)):
        flat, values = ours.survivors(h.to(dtype), W.to(dtype), b, bar)
        flat, order = flat.sort()
        assert torch.equal(flat, (pre > bar).flatten().nonzero().squeeze(1))
        assert torch.equal(values[order], pre.flatten()[flat])
        assert values.dtype == torch.float32


def test_products_of_bfloat16_are_added_up_in_float32() -> None:
    h, W = torch.ones(16, 512, dtype=torch.bfloat16), torch.ones(32, 512, dtype=torch.bfloat16)
    h[:, 0] = 1024.0  # after which bfloat16 would not count on
    _, values = ours.survivors(h, W, torch.zeros(32), torch.zeros(32))
    assert torch.equal(values, torch.full((512,), 1535.0))


def test_nothing_is_written_beyond_the_room_and_all_are_counted() -> None:
    h, W, b = whole_numbers(40, 37, 70)
    pre, bar, capacity = (h @ W.T + b).flatten(), b + 8.0, 100
    wanted = (pre > bar.repeat(40)).nonzero().squeeze(1)
    flat, values, count = torch.full((3000,), -1), torch.full((3000,), -1.0), torch.zeros((), dtype=torch.int64)
    ours.library().survivors[3 * 3,](
        h, W, b, bar, flat, values, count, 40, 70, 37, capacity, PRECISION="ieee", **ours.TILES[h.dtype]
    )
    assert int(count) == len(wanted) > capacity
    assert torch.isin(flat[:capacity], wanted).all()
    assert len(flat[:capacity].unique()) == capacity
    assert torch.equal(values[:capacity], pre[flat[:capacity]])
    assert (flat[capacity:] == -1).all()
    assert (values[capacity:] == -1).all()


@pytest.mark.parametrize("where", ["h", "W", "b", "bar"])
def test_nan_survives(where) -> None:
    given = dict(zip(("h", "W", "b"), whole_numbers(17, 5, 33), strict=True)) | {"bar": torch.full((33,), 1e9)}
    given[where][3] = torch.nan
    flat, values = ours.survivors(**given)
    expected, wanted = plain.survivors(**given)
    assert torch.equal(flat.sort().values, expected.sort().values)
    assert len(flat) == len(given["W"] if where == "h" else given["h"])
    assert values.isnan().sum() == wanted.isnan().sum()


@pytest.mark.parametrize("scaled", [False, True])
def test_of_equal_values_the_first_are_kept_however_the_buffer_is_ordered(scaled, monkeypatch) -> None:
    h, W, b = whole_numbers(20, 5, 33)
    scale = 1 + torch.arange(33.0) % 2 if scaled else None
    ranked = (h @ W.T + b) * (1.0 if scale is None else scale)
    kept = ranked.flatten().argsort(descending=True, stable=True)[:50]
    bar = ranked.flatten()[kept[-1]]
    assert (ranked == bar).sum() > (ranked.flatten()[kept] == bar).sum()
    filtered = ours.filtered

    def shuffled(*given):
        flat, values, count = filtered(*given)
        order = torch.randperm(len(flat))
        return flat[order], values[order], count

    monkeypatch.setattr(ours, "filtered", shuffled)
    flat, u, count = ours.largest(h, W, b, bar - 1.5, scale, 50, 600)
    assert torch.equal(flat, kept)
    assert torch.equal(u, (h @ W.T + b).flatten()[kept])
    assert int(count) == (ranked > bar - 1.5).sum()


@pytest.mark.parametrize("rescaled", [False, True])
def test_where_more_pass_than_had_room_the_next_bar_is_tried_then_the_dense_step(rescaled, monkeypatch) -> None:
    sae, x = tall("triton", rescale_acts_by_decoder_norm=rescaled)
    rooms, filtered = [], ours.filtered
    monkeypatch.setattr(ours, "filtered", lambda *given: (rooms.append(given[-1]), filtered(*given))[1])
    monkeypatch.setattr(msae.sae.sparse, "SLACK", (1.3, 2.6))
    monkeypatch.setattr(msae.sae.sparse, "ROOM", 0.75)
    assert sparse_encode(sae, x, "triton") is None
    wanted = sae.k * len(x)
    assert rooms == [round(0.75 * 1.3 * wanted), round(0.75 * 2.6 * wanted)]
    monkeypatch.setattr(msae.sae.sparse, "SLACK", (1.3, 1.31))
    monkeypatch.setattr(msae.sae.sparse, "ROOM", 1.2)
    code, plainly = sparse_encode(sae, x, "triton"), sparse_encode(sae, x, "plain")
    assert isinstance(code, SparseCode)
    assert torch.equal(code.dense() > 0, plainly.dense() > 0)


def test_half_precision_of_autocast_is_the_encoder_s_alone() -> None:
    sae, x = tall("triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        code, plainly = (sparse_encode(sae, x, name) for name in ("triton", "plain"))
        loss = matryoshka_loss(sae, x, dead=torch.arange(sae.d_sae) % 4 == 0, code=code)
        found = gradients(sae, loss)
    h = sae.encoder_input(x).bfloat16().float()
    pre = h @ sae.W_enc.bfloat16().float() + sae.b_enc
    assert_close(code.u, pre[code.rows, code.latents])
    exact = sae.pre(x)
    assert not torch.equal(code.u, exact[code.rows, code.latents])
    assert_close(plainly.u, exact[plainly.rows, plainly.latents])
    again = gradients(sae, matryoshka_loss(sae, x, dead=torch.arange(sae.d_sae) % 4 == 0, code=code))
    assert all(torch.equal(found[name], gradient) for name, gradient in again.items())


# --- what follows -------------------------------------------------------------------------------------------------


def entries(rows: int, latents: int, levels: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """(latents, rows, bins) of some pairs, so that there are rows, latents and levels without any."""
    generator = torch.Generator().manual_seed(0)
    there = torch.rand(rows, latents, generator=generator) < share
    there[::3], there[:, ::4] = False, False
    row, latent = there.nonzero(as_tuple=True)
    return latent, row, row * levels + latent * levels // latents


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
@pytest.mark.parametrize(("rows", "d", "levels"), [(1, 1, 1), (7, 16, 3), (10, 37, 4)])
def test_rows_and_bags_are_those_of_plain(rows, d, levels, share) -> None:
    latents, row, bins = entries(rows, 20, levels, share)
    acts, W_dec, target = torch.randn(len(row)), torch.randn(20, d), torch.randn(rows, d)
    (left, errors), (wanted, expected) = (
        use.residuals(acts, latents, bins, W_dec, target, levels) for use in (ours, plain)
    )
    assert_close(left, wanted, rtol=1e-5, atol=1e-5)
    assert_close(errors, expected, rtol=1e-5, atol=1e-5)
    for stop_gradient in (False, True):
        weights = [0.5 + level for level in range(levels)]
        (told, dots), (wanted, expected) = (
            use.tell(left.clone(), weights, stop_gradient, {}, latents, bins, W_dec) for use in (ours, plain)
        )
        assert_close(told, wanted, rtol=1e-5, atol=1e-5)
        assert_close(dots, expected, rtol=1e-4, atol=1e-4)
    (order, ends), (wanted, expected) = (use.by_latent(latents, 20) for use in (ours, plain))
    assert torch.equal(order, wanted)
    assert torch.equal(ends, expected)
    summed, wanted = (use.rows_sum(target, row[order], acts[order], ends) for use in (ours, plain))
    assert_close(summed, wanted, rtol=1e-5, atol=1e-5)


def test_what_they_cannot_take_plain_does() -> None:
    latents, row, bins = entries(7, 20, 2, 0.3)
    torch.manual_seed(0)
    acts, W_dec, target = torch.randn(len(row)), torch.randn(20, 5), torch.randn(7, 5)
    for dtype in (torch.float64, torch.float32):
        given = (acts.to(dtype), latents, bins, W_dec.to(dtype))
        left, errors = ours.residuals(*given, target.to(dtype), 2)
        wanted, expected = plain.residuals(*given, target.to(dtype), 2)
        assert_close(left, wanted)
        # summed in float64, but of what float32 has rounded
        assert_close(errors, expected, rtol=1e-7 if dtype == torch.float64 else 1e-6, atol=1e-7)
        more = {1: target.to(dtype)}
        told, expected = (
            use.tell(left.clone(), [1.0, 2.0], False, more, *given[1:3], given[3]) for use in (ours, plain)
        )
        assert_close(told, expected)
    h, W, b = (t.double() for t in whole_numbers(17, 5, 33))
    found, expected = (use.survivors(h, W, b, b) for use in (ours, plain))
    assert torch.equal(found[0].sort().values, expected[0].sort().values)
    wide = torch.zeros(2, ours.WIDEST + 1)
    assert not ours.able_to_step(wide)
    assert ours.able_to_step(wide[:1])


# --- the whole step -----------------------------------------------------------------------------------------------


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


def test_the_host_waits_once_in_a_whole_step(monkeypatch) -> None:
    sae, x = tall("triton")
    optimizer = DictionaryAdam(sae, 1e-3, (0.9, 0.999), 1.0, "unit_norm", "triton")
    looks, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: (looks.append(t.dtype), tolist(t))[1])
    waits = Waits()
    with waits:
        code = sparse_encode(sae, x, "triton")
        assert looks == [torch.int64]
        loss = matryoshka_loss(sae, x, code=code)
    loss.total.backward()  # hands the gradients over; on a CPU alone it looks at its own
    with waits:
        sae.update_threshold(code.values, 0.01)
        sae.update_fired(code.fired(), len(x))
        optimizer.step()
    assert waits.seen == []
    assert looks == [torch.int64, torch.float64]  # the second are the weights, which are the host's


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_training_takes_it_also_in_half_precision(tmp_path, monkeypatch) -> None:
    codes, steps = [], []
    encode, adam = msae.training.module.encode_for_training, ours.adam
    monkeypatch.setattr(
        msae.training.module, "encode_for_training", lambda *given: codes.append(encode(*given)) or codes[-1]
    )
    monkeypatch.setattr(ours, "adam", lambda *given: (steps.append(1), adam(*given)))
    _, module = fit(tmp_path / "shards", tmp_path / "run", 2, batch_tokens=8, precision="bf16-mixed", kernels="triton")
    assert [type(code) for code in codes[:2]] == [SparseCode] * 2
    assert {code.u.dtype for code in codes[:2]} == {torch.float32}
    assert len(steps) == 2 * 4
    assert module.sae.W_dec.isfinite().all()


def test_the_optimizer_resumes_from_that_of_another_kind() -> None:
    """State that PyTorch's own made, on the parameter's device, goes on."""
    sae, other = example(), example()
    first = DictionaryAdam(sae, 1e-2, (0.9, 0.999), 1.0, "unit_norm")
    second = DictionaryAdam(other, 1e-2, (0.9, 0.999), 1.0, "unit_norm", "triton")
    for step in range(3):
        if step == 2:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            other.load_state_dict(sae.state_dict())
        for each, its in ((sae, first), (other, second)):
            give_gradients(each, step, 1.0)
            its.step()
    for here, there in zip(sae.parameters(), other.parameters(), strict=True):
        assert_close(here, there)


def test_the_first_update_is_the_learning_rate_however_slow_the_averages() -> None:
    """1 − β2 has few digits in float32."""
    W, grad, one = torch.zeros(1, 100), torch.randn(1, 100), torch.ones((), dtype=torch.float64)
    state = (torch.zeros(1, 100), torch.zeros(1, 100))
    ours.adam(W, grad, state, one, 1e-3, (0.9, 0.9999), 1e-30, torch.ones(()), False)
    assert_close(W, -1e-3 * grad.sign(), rtol=2e-6, atol=0)


# --- where it cannot run ------------------------------------------------------------------------------------------


def test_without_triton_all_else_works_and_asking_for_it_is_one_line() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from msae.sae import MatryoshkaSAE, choose_kernels
from msae.sae.kernels import triton
from msae.sae.sparse import sparse_encode
sae, x = MatryoshkaSAE(16, 128, [128], 2), torch.randn(64, 16)
assert sparse_encode(sae, x, "plain") is not None and choose_kernels("auto", sae, x) == "dense"
assert not triton.able(x)
try:
    choose_kernels("triton", sae, x)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout == "model.kernels=triton needs the package triton; pip install triton, or use model.kernels=auto\n"
    )


def test_on_a_cpu_it_is_refused_in_one_line(monkeypatch) -> None:
    sae, x = tall("triton")
    assert choose_kernels("triton", sae, x) == "triton"
    assert choose_kernels("auto", sae, x) != "triton"
    monkeypatch.setattr(ours.library(), "INTERPRETED", False)
    with pytest.raises(
        ValueError, match=r"expects .* on a CUDA device, it is on cpu; use model.kernels=auto$"
    ) as caught:
        choose_kernels("triton", sae, x)
    assert "\n" not in str(caught.value)
    assert not ours.able(x)


def test_an_old_gpu_is_refused_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability in ((8, 0), (9, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if capability >= (8, 0):
            ours.require(torch.device("cuda"))
        else:
            with pytest.raises(ValueError, match=r"expects .* 8.0 or more, Tesla T4 has less; use model.kernels=auto$"):
                ours.require(torch.device("cuda"))


# --- for GPUs -----------------------------------------------------------------------------------------------------

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from msae.sae.kernels import triton as ours

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int64: "*i64"}
DIVISIBLE = [["tt.divisibility", 16]]

class Compiled:
    '''In place of a function: compiles what a launch would need, and launches nothing.'''
    def __init__(self, function):
        self.function = function
    def __getitem__(self, grid):
        return self.launch
    def launch(self, *given, num_warps=4, num_stages=3, **constants):
        signature, attributes = dict.fromkeys(constants, "constexpr"), {}
        for i, (name, value) in enumerate(zip(self.function.arg_names, given)):
            tensor = isinstance(value, torch.Tensor)
            signature[name] = TYPES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
            if tensor or (isinstance(value, int) and value % 16 == 0):
                attributes[i,] = DIVISIBLE
        options = {"num_warps": num_warps, "num_stages": num_stages}
        for capability in (80, 90):
            source = ASTSource(self.function, signature, constants, attributes)
            made = triton.compile(source, GPUTarget("cuda", capability, 32), options)
            assert made.asm["cubin"]
            kind = "mma" if "mma" in made.asm["ptx"] else "fma"
            print(self.function.__name__, str(given[0].dtype), kind, capability, made.metadata.shared)

class Library:
    INTERPRETED = False

ours.able = lambda *tensors, **types: True
library = ours.library()
for name in ("survivors", "residuals", "tell", "rows_sum", "project", "adam"):
    setattr(Library, name, Compiled(getattr(library, name)))
ours.library = lambda: Library
h, W, b = torch.zeros(256, 768), torch.zeros(1024, 768), torch.zeros(1024)
ours.filtered(h, W, b, b, 1024)
torch.set_float32_matmul_precision("high")
ours.filtered(h, W, b, b, 1024)
ours.filtered(h.bfloat16(), W.bfloat16(), b, b, 1024)
latents, acts = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
left, _ = ours.residuals(acts, latents, latents, W, h, 3)
for stop_gradient in (False, True):
    ours.tell(left, [1.0, 1.0, 1.0], stop_gradient, {}, latents, latents, W)
ours.rows_sum(h, latents, acts, latents)
wide = torch.zeros(2, ours.WIDEST)
for along in (None, wide):
    ours.project(wide, along)
    ours.adam(wide, wide, (wide, wide), torch.ones((), dtype=torch.float64), 1e-3, (0.9, 0.999), 1e-8, torch.ones(()),
              along is not None)
"""
SHARED = {"80": 163 * 1024, "90": 227 * 1024}  # bytes that one program may have, CUDA programming guide


@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler is for Linux")
def test_every_function_compiles_for_gpus_within_their_shared_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    made = [line.split() for line in done.stdout.splitlines()]
    names = ("survivors", "residuals", "tell", "rows_sum", "project", "adam")
    assert {(name, capability) for name, _, _, capability, _ in made} == {(n, c) for n in names for c in SHARED}
    # float32 is rounded for tensor cores only where PyTorch was told so
    kinds = [(dtype, kind) for name, dtype, kind, capability, _ in made if (name, capability) == ("survivors", "80")]
    assert kinds == [("torch.float32", "fma"), ("torch.float32", "mma"), ("torch.bfloat16", "mma")]
    for name, dtype, _, capability, shared in made:
        assert int(shared) <= SHARED[capability], (name, dtype, capability)
