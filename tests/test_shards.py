"""Shard directories: opening finds damage in one line that says what to type, verify finds a flipped bit."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from msae.data.batches import TrainBatches, ValBatches
from msae.data.harvest import harvest
from msae.data.shards import MANIFEST, TRUTH, Shards, dequantise, identity_hash, quantise, take, write_atomically
from msae.data.source import Chunk
from msae.data.synthetic import ForestSource

AGAIN = "run the same python -m msae.harvest command to make it again"


def source(**options: Any) -> ForestSource:
    return ForestSource(**{"rows": 600, "val_rows": 100, "chunk_rows": 256, "norm_spread": 0.3, **options})


@pytest.fixture
def directory(tmp_path) -> Path:
    return harvest(source(), tmp_path, show=False)["synthetic"].directory


def test_rows_statistics_and_verify(directory) -> None:
    shards = Shards(directory)
    assert shards.rows("train") == [256, 256, 88]
    assert shards.rows("val") == [100]
    assert shards.d_in == 20
    assert shards.activations("train", 2).dtype == torch.float32
    assert shards.index("train", 0) == {}
    x = torch.cat([shards.activations("train", i) for i in range(3)]).double()
    torch.testing.assert_close(shards.mean, x.mean(0), rtol=1e-12, atol=1e-14)
    assert shards.mean_square == pytest.approx(float(x.square().sum(1).mean()), rel=1e-12)
    assert shards.manifest["statistics"]["rows"] == 600
    assert shards.manifest["identity_hash"] == identity_hash(source().identity("synthetic"))
    assert directory.name.endswith(shards.manifest["identity_hash"])
    assert torch.equal(shards.truth["features"], source().features)
    counted: list[int] = []
    shards.verify(counted.append)
    assert sorted(counted) == sorted(p.stat().st_size for p in directory.glob("*.safetensors"))


def on_shard(change: Callable[[Path], object], name: str = "train-00001.safetensors") -> Callable[[Path], object]:
    return lambda directory: change(directory / name)


def on_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        manifest = json.loads((directory / MANIFEST).read_text())
        change(manifest)
        (directory / MANIFEST).write_text(json.dumps(manifest))

    return apply


def replace(tensors: dict[str, Tensor]) -> Callable[[Path], object]:
    """Another whole file in the shard's place, its size entered into the manifest."""

    def apply(directory: Path) -> None:
        path = directory / "train-00001.safetensors"
        save_file(tensors, path)
        on_manifest(lambda m: entry(m).update(bytes=path.stat().st_size))(directory)

    return apply


def entry(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(e for e in manifest["shards"] if (e["split"], e["number"]) == ("train", 1))


def flip(path: Path, byte: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(bytes(content))


SHARD, TAIL = "train-00001.safetensors", f"[^\n]*; [^\n]*{AGAIN}"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        on_shard(lambda p: p.write_bytes(p.read_bytes()[:-10])),
        rf"{SHARD} has 20\d+ bytes, the manifest says 20\d+{TAIL}",
    ),
    "zero bytes": (on_shard(lambda p: p.write_bytes(b"")), rf"{SHARD} has 0 bytes, the manifest says \d+{TAIL}"),
    "missing": (on_shard(Path.unlink), f"{SHARD} is missing{TAIL}"),
    "zeroed": (on_shard(lambda p: p.write_bytes(bytes(p.stat().st_size))), rf"{SHARD} cannot be read \([^\n]*\){TAIL}"),
    "other tensors": (replace({"rows": torch.zeros(256, 20)}), rf"{SHARD} cannot be read \([^\n]*\){TAIL}"),
    "wrong rows": (
        replace({"activations": torch.zeros(255, 20)}),
        rf"{SHARD} holds \[255, 20\], the manifest says \[256, 20\]{TAIL}",
    ),
    "wrong width": (
        replace({"activations": torch.zeros(256, 21)}),
        rf"{SHARD} holds \[256, 21\], the manifest says \[256, 20\]{TAIL}",
    ),
    "wrong rank": (
        replace({"activations": torch.zeros(5120)}),
        rf"{SHARD} holds \[5120\], the manifest says \[256, 20\]{TAIL}",
    ),
    "wrong dtype": (
        replace({"activations": torch.zeros(256, 20).bfloat16()}),
        rf"{SHARD} holds BF16, the manifest says float32{TAIL}",
    ),
    "impossible dtype": (
        replace({"activations": torch.zeros(256, 20, dtype=torch.int64)}),
        rf"{SHARD} holds I64, the manifest says float32{TAIL}",
    ),
    "extra": (
        lambda d: (d / "train-00007.safetensors").write_bytes(b""),
        r"train-00007.safetensors is not in the manifest; move it away or delete it",
    ),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), f"has no manifest.json, so its harvest has not finished{TAIL}"),
    "half a manifest": (lambda d: (d / MANIFEST).write_text('{"a": 1,'), rf"manifest.json is corrupt \({TAIL}"),
    "empty manifest": (lambda d: (d / MANIFEST).write_text(""), rf"manifest.json is corrupt \({TAIL}"),
    "binary manifest": (lambda d: (d / MANIFEST).write_bytes(b"\xff\xfe\x80"), rf"manifest.json is corrupt \({TAIL}"),
    "manifest a list": (lambda d: (d / MANIFEST).write_text("[]"), f"manifest.json is not a shard manifest{TAIL}"),
    "another format": (on_manifest(lambda m: m.update(format="x")), f"manifest.json is not a shard manifest{TAIL}"),
    "newer": (
        on_manifest(lambda m: m.update(version=3)),
        r"manifest.json has format version 3, this msae reads up to 2; upgrade: pip install -U msae",
    ),
    "path as number": (on_manifest(lambda m: entry(m).update(number="../../etc/passwd")), f"is corrupt {TAIL}"),
    "path as split": (on_manifest(lambda m: entry(m).update(split="../train")), f"is corrupt {TAIL}"),
    "negative rows": (on_manifest(lambda m: entry(m).update(rows=-1)), f"is corrupt {TAIL}"),
    "negative number": (on_manifest(lambda m: entry(m).update(number=-1)), f"is corrupt {TAIL}"),
    "fractional bytes": (on_manifest(lambda m: entry(m).update(bytes=1.5)), f"is corrupt {TAIL}"),
    "true rows": (on_manifest(lambda m: entry(m).update(rows=True)), f"is corrupt {TAIL}"),
    "no shards": (on_manifest(lambda m: m.pop("shards")), f"is corrupt {TAIL}"),
    "shards no list": (on_manifest(lambda m: m.update(shards={"a": 1})), f"is corrupt {TAIL}"),
    "no statistics": (on_manifest(lambda m: m.pop("statistics")), f"is corrupt {TAIL}"),
    "no identity": (on_manifest(lambda m: m.pop("identity")), f"is corrupt {TAIL}"),
    "wrong d_in": (on_manifest(lambda m: m.update(d_in=21)), rf"is corrupt [^\n]*statistics.mean{TAIL}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_opening_finds_damage_in_one_line(damage, directory) -> None:
    apply, message = DAMAGE[damage]
    apply(directory)
    with pytest.raises(ValueError, match=f"^{re.escape(str(directory))}[^\n]*{message}$"):
        Shards(directory)


UNCLEAR: dict[str, Callable[[Path], object]] = {
    "no version": on_manifest(lambda m: m.pop("version")),
    "version a text": on_manifest(lambda m: m.update(version="1")),
    "no identity hash": on_manifest(lambda m: m.pop("identity_hash")),
    "no checksum": on_manifest(lambda m: entry(m).pop("xxh3")),
    "no mean": on_manifest(lambda m: m["statistics"].pop("mean")),
    "mean of another width": on_manifest(lambda m: m["statistics"].update(mean=[0.0])),
    "a shard twice": on_manifest(lambda m: m["shards"].append(entry(m))),
    "truncated truth": lambda d: (d / TRUTH).write_bytes((d / TRUTH).read_bytes()[:-10]),
    "no directory": lambda d: d.rename(d.with_name("away")) and d.write_text("a file"),
}


@pytest.mark.parametrize("damage", UNCLEAR)
def test_opening_finds_more_damage_in_one_line(damage, directory) -> None:
    UNCLEAR[damage](directory)

    def read_all() -> None:
        shards = Shards(directory)
        shards.verify()
        assert shards.truth is not None

    with pytest.raises(ValueError, match=f"^{re.escape(str(directory))}[^\n]*$"):
        read_all()


def test_a_bit_flip_near_an_end_is_found_by_opening(directory) -> None:
    flip(directory / SHARD)
    with pytest.raises(ValueError, match=rf"^[^\n]*{SHARD} differs from what was harvested{TAIL}$"):
        Shards(directory)
    (directory / SHARD).unlink()  # as the message says: delete it and harvest again
    harvest(source(), directory.parent, show=False)["synthetic"].verify()


def test_a_bit_flip_in_the_middle_is_found_by_verify(tmp_path) -> None:
    shards = harvest(source(rows=4096, chunk_rows=2048), tmp_path, show=False)["synthetic"]
    path = shards.directory / SHARD
    assert path.stat().st_size > 150_000
    flip(path, path.stat().st_size // 2)
    shards = Shards(shards.directory)
    with pytest.raises(ValueError, match=rf"^[^\n]*{SHARD} has checksum [0-9a-f]+, the manifest says [0-9a-f]+{TAIL}$"):
        shards.verify()


def test_stale_temporary_file_is_ignored_and_harvest_removes_it(directory) -> None:
    stale = directory / "train-00003.safetensors.tmp"
    stale.write_bytes(b"half")
    Shards(directory).verify()
    (directory / MANIFEST).unlink()
    harvest(source(), directory.parent, show=False)
    assert not stale.exists()


def test_missing_truth_is_made_again(directory) -> None:
    (directory / TRUTH).unlink()
    assert harvest(source(), directory.parent, show=False)["synthetic"].truth is not None


def test_write_atomically_leaves_the_old_file_or_the_new_one(tmp_path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda p: p.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"^cannot write [^\n]*file: [^\n]*No space left[^\n]*data\.root[^\n]*$"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write_atomically(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new"


# --- reading rows ----------------------------------------------------------------------------------------------


class Cast(ForestSource):
    """The tree in another storage dtype, its rows quantised if that is int8."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(**{"rows": 600, "val_rows": 100, "chunk_rows": 256, "norm_spread": 0.3, **options})
        self.dtype = dtype

    def identity(self, hook_name: str) -> dict[str, Any]:
        return {**super().identity(hook_name), "dtype": str(self.dtype)}

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        for chunk in super().chunks(state):
            for split in chunk.splits.values():
                for hook, rows in split.activations.items():
                    if self.dtype == torch.int8:
                        split.activations[hook], split.scales[hook] = quantise(rows)
                    else:
                        split.activations[hook] = rows.to(self.dtype)
            yield chunk


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def all_rows(shards: Shards, split: str) -> Tensor:
    return torch.cat([shards.activations(split, i) for i in range(len(shards.rows(split)))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_and_take_give_the_rows_of_the_files(dtype, tmp_path) -> None:
    """Blocks of one row and more, in any shard and order, the memory of the ones before used again."""
    shards = harvest(Cast(dtype), tmp_path, show=False)["synthetic"]
    x = all_rows(shards, "train")
    assert (shards.stored_dtype, shards.dtype) == (dtype, x.dtype)
    assert x.dtype == (torch.float32 if dtype == torch.int8 else dtype)
    for blocks in ([(0, 256)], [(255, 256), (256, 257), (590, 600)], [(512, 600), (0, 1), (300, 512)], [(7, 9)]):
        starts, stops = (torch.tensor(side) for side in zip(*blocks, strict=True))
        stored = shards.read("train", starts, stops)
        expected = torch.cat([x[a:b] for a, b in blocks])
        index = torch.randperm(len(expected) * 2) % len(expected)
        out = torch.empty(len(index), shards.d_in, dtype=shards.dtype)
        take(stored, index, out)
        assert torch.equal(out, expected[index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_held_is_not_used_again(dtype, tmp_path) -> None:
    shards = harvest(Cast(dtype), tmp_path, show=False)["synthetic"]
    places = [(torch.tensor([a]), torch.tensor([a + 50])) for a in (0, 300, 100, 0, 520)]
    held = [shards.read("train", *place) for place in places]
    for stored, (start, stop) in zip(held, places, strict=True):
        out = torch.empty(50, shards.d_in, dtype=shards.dtype)
        take(stored, torch.arange(50), out)
        assert torch.equal(out, all_rows(shards, "train")[start:stop])


def test_memory_that_nobody_holds_is_used_again(tmp_path) -> None:
    shards = harvest(Cast(torch.bfloat16), tmp_path, show=False)["synthetic"]
    where = {
        shards.read("train", torch.tensor([0]), torch.tensor([n]))["activations"].ctypes.data for n in (99, 50, 70)
    }
    assert len(where) == 1


# --- 8-bit rows ------------------------------------------------------------------------------------------------


def draws(rows: int = 4000, d_in: int = 33) -> Tensor:
    """Rows of every size, from the least to nearly the greatest in float32, some with outliers, some of zeros."""
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0))
    x[::3, 5] *= 1000
    x[1::7] = 0
    return x * torch.logspace(-44, 37, rows)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_quantised_row_is_within_half_a_step_of_itself(dtype) -> None:
    x = draws().to(dtype)
    x = x[x.isfinite().all(1)]
    q, scales = quantise(x)
    assert (q.dtype, q.shape, scales.dtype, scales.shape) == (torch.int8, x.shape, torch.float32, x.shape[:1])
    assert int(q.abs().max()) == 127  # and never −128
    greatest = x.float().abs().amax(1)
    assert torch.equal(scales, (greatest / 127).clamp_min(torch.finfo(torch.float32).tiny))
    exact = q.double() * scales.double()[:, None]
    rounding = 2.0**-16  # of a step: 127 steps are divided in float32
    assert ((x.double() - exact).abs() <= scales[:, None].double() * (0.5 + rounding)).all()
    again = dequantise(q, scales)
    assert again.dtype == torch.float32
    assert torch.equal(again, exact.float())
    assert ((x.double() - again.double()).abs() <= scales[:, None].double() * (0.5 + 2 * rounding)).all()
    normal = greatest > 1e-35
    torch.testing.assert_close(again.abs().amax(1)[normal], greatest[normal], rtol=2**-23, atol=0)  # an ulp at most
    assert torch.equal(q.abs().amax(1)[normal & (greatest > 0)].unique(), torch.tensor([127], dtype=torch.int8))


def test_quantise_by_hand() -> None:
    q, scales = quantise(torch.tensor([[127.0, -63.4, 0.5], [0.0, 0.0, 0.0], [-0.254, 0.127, 0.001]]))
    assert q.tolist() == [[127, -63, 0], [0, 0, 0], [-127, 64, 0]]
    torch.testing.assert_close(scales[::2], torch.tensor([1.0, 0.002]))
    assert dequantise(q, scales)[1].tolist() == [0, 0, 0]
    out = torch.empty(3, 3)
    assert dequantise(q, scales, out) is out
    torch.testing.assert_close(out[2], torch.tensor([-0.254, 0.128, 0.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gets_no_scale_and_no_shard(value, tmp_path) -> None:
    x = torch.randn(5, 4)
    x[3, 1] = value
    assert quantise(x)[1].isfinite().tolist() == [True, True, True, False, True]

    class Broken(Cast):
        def _rows(self, split: str, chunk: int, rows: int) -> Tensor:
            x = super()._rows(split, chunk, rows)
            x[-1, 0] = value
            return x

    with pytest.raises(ValueError, match=r"^synthetic has rows with NaN or Inf, which int8 cannot hold; set [^\n]*$"):
        harvest(Broken(torch.int8), tmp_path, show=False)
    assert not list(tmp_path.rglob("train-*"))


def test_int8_shards_say_what_is_read_from_them(tmp_path) -> None:
    """Statistics are those of dequantised rows; a byte an entry and four a row; an older msae refuses the version."""
    shards, plain = (
        harvest(Cast(dtype, rows=3000), tmp_path, show=False)["synthetic"] for dtype in (torch.int8, torch.float32)
    )
    assert (shards.manifest["dtype"], shards.manifest["version"]) == ("int8", 2)
    assert plain.manifest["version"] == 1
    x = all_rows(shards, "train").double()
    torch.testing.assert_close(shards.mean, x.mean(0), rtol=1e-12, atol=1e-14)
    assert shards.mean_square == pytest.approx(float(x.square().sum(1).mean()), rel=1e-12)
    assert not torch.equal(shards.mean, plain.mean)
    assert shards.index("train", 0) == {}
    steps = x.abs().amax(1, keepdim=True) / 127
    assert ((all_rows(plain, "train") - x).abs() <= steps * 0.501).all()
    size = (shards.directory / "train-00000.safetensors").stat().st_size
    assert size < 256 * (shards.d_in + 4) + 300
    shards.verify()
    Shards(shards.directory)


def test_batches_of_int8_shards_are_their_rows_dequantised(tmp_path) -> None:
    shards = harvest(Cast(torch.int8), tmp_path, show=False)["synthetic"]
    batches = TrainBatches(shards, 50, 24, 0)
    x = all_rows(shards, "train")
    for number, batch in enumerate(batches):
        assert batch.dtype == torch.float32
        assert torch.equal(batch, x[batches.order.rows(number * 50, number * 50 + 50)])
    assert torch.equal(torch.cat(list(ValBatches(shards, 33))), all_rows(shards, "val"))


def scaled(**tensors: Tensor) -> Callable[[Path], object]:
    return replace({"activations": torch.zeros(256, 20, dtype=torch.int8), **tensors})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (scaled(), r"cannot be read \([^\n]*scales[^\n]*\)"),
        (scaled(scales=torch.zeros(255)), r"has scales \(\[255\], 'F32'\), expected \[256\] F32"),
        (scaled(scales=torch.zeros(256, 1)), r"has scales \(\[256, 1\], 'F32'\), expected \[256\] F32"),
        (scaled(scales=torch.zeros(256).half()), r"has scales \(\[256\], 'F16'\), expected \[256\] F32"),
        (
            replace({"activations": torch.zeros(256, 20), "scales": torch.zeros(256)}),
            "holds F32, the manifest says int8",
        ),
    ],
)
def test_opening_finds_damage_of_scales_in_one_line(damage, message, tmp_path) -> None:
    directory = harvest(Cast(torch.int8), tmp_path, show=False)["synthetic"].directory
    damage(directory)
    with pytest.raises(ValueError, match=f"^{re.escape(str(directory))}[^\n]*{SHARD} {message}{TAIL}$"):
        Shards(directory)


def test_int8_rows_where_the_manifest_says_float(directory) -> None:
    scaled(scales=torch.zeros(256))(directory)
    with pytest.raises(ValueError, match=f"^[^\n]*{SHARD} holds I8, the manifest says float32{TAIL}$"):
        Shards(directory)
