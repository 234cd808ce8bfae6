"""Shard directories: opening finds damage in one line that says what to type, verify finds a flipped bit."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from msae.data.harvest import harvest
from msae.data.rows import take
from msae.data.shards import MANIFEST, TRUTH, Shards, identity_hash
from msae.files import checksum_of_ends
from msae.sources.int8 import dequantise, quantise
from tests.sources import Numbered

in_each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=lambda dtype: str(dtype)[6:]
)

KEYS = ["format", "version", "identity_hash", "identity", "provenance", "hook_name", "dtype", "d_in", "truth"]
KEYS += ["statistics", "shards"]


def source(dtype: torch.dtype = torch.float32) -> Numbered:
    """Rows of width 2 whose numbers bfloat16 can hold."""
    return Numbered([100, 100, 40], [30], ("hook",), dtype)


def open_shards(root: Path, dtype: torch.dtype = torch.float32) -> Shards:
    return harvest(source(dtype), root, show=False)["hook"]


def all_rows(shards: Shards, split: str = "train") -> Tensor:
    return torch.cat([shards.activations(split, i) for i in range(len(shards.rows(split)))])


@in_each_dtype
def test_a_directory_says_what_is_read_from_it(dtype, tmp_path):
    """Statistics are those of dequantised rows; an older msae refuses int8 by its version, and reads the others."""
    shards = open_shards(tmp_path, dtype)
    manifest, x = shards.manifest, all_rows(shards).double()
    torch.testing.assert_close(x[:, 0], torch.arange(240.0).double(), rtol=1e-6, atol=0)
    assert (shards.rows("train"), shards.rows("val"), shards.d_in) == ([100, 100, 40], [30], 2)
    assert (manifest.dtype, manifest.version) == (str(dtype)[6:], 2 if dtype == torch.int8 else 1)
    assert json.loads((shards.directory / MANIFEST).read_text()).keys() == set(KEYS)
    assert manifest.statistics.rows == 240
    torch.testing.assert_close(shards.mean, x.mean(0), rtol=1e-12, atol=1e-14)
    assert shards.mean_square == pytest.approx(float(x.square().sum(1).mean()), rel=1e-12)
    assert manifest.identity_hash == identity_hash(source(dtype).identity("hook")) == shards.directory.name[-12:]
    assert shards.index("train", 1).keys() == {"position"}
    assert shards.index("train", 1)["position"].tolist() == list(range(100, 200))
    assert shards.truth is not None
    assert shards.truth["answer"].tolist() == [42]
    size = (shards.directory / "train-00000.safetensors").stat().st_size
    assert size < 100 * (source(dtype).bytes_per_row("hook") + 4) + 300  # 4 of the index
    counted: list[int] = []
    shards.verify(counted.append)
    assert sorted(counted) == sorted(p.stat().st_size for p in shards.directory.glob("*.safetensors"))


# Damage ---------------------------------------------------------------------------------------------------------------

SHARD, AGAIN = "train-00001.safetensors", "run the same python -m msae.harvest command to make it again"
Damage = Callable[[Path], object]


def on_shard(change: Damage) -> Damage:
    return lambda directory: change(directory / SHARD)


def on_manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(directory: Path) -> None:
        manifest = json.loads((directory / MANIFEST).read_text())
        change(manifest)
        (directory / MANIFEST).write_text(json.dumps(manifest))

    return damage


def entry(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of SHARD."""
    return next(e for e in manifest["shards"] if (e["split"], e["number"]) == ("train", 1))


def on_entry(**values: Any) -> Damage:
    return on_manifest(lambda manifest: entry(manifest).update(values))


def holds(dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> Damage:
    """Another whole file in the shard's place, with its size and checksum in the manifest."""

    def damage(directory: Path) -> None:
        path = directory / SHARD
        float_scales = {"scales": torch.float32} if dtype == torch.int8 else {}
        save_file({name: torch.zeros(s, dtype=float_scales.get(name, dtype)) for name, s in shapes.items()}, path)
        on_entry(bytes=path.stat().st_size, xxh3_ends=checksum_of_ends(path))(directory)

    return damage


def flip(path: Path, byte: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(bytes(content))


def not_read(why: str) -> str:
    return rf"manifest.json is not a shard manifest \({why}\); delete it and AGAIN"


def differs(found: str, expected: str) -> str:
    return f"SHARD holds {found}, the manifest says {expected}; delete it and AGAIN"


SHAPE = r"\[100, 2\]"
F32 = f"{SHAPE} F32"
BAD_ENTRY = not_read("shards=.*: expected .*")
OTHER_ENDS = r"SHARD differs from what was harvested \(checksum of its ends\); delete it and AGAIN"
DAMAGE: dict[str, tuple[Damage, str]] = {
    "truncated": (on_shard(lambda p: os.truncate(p, 99)), r"SHARD has 99 bytes, the manifest says \d+; AGAIN"),
    "missing": (on_shard(Path.unlink), "SHARD is missing; AGAIN"),
    "zeroed": (on_shard(lambda p: p.write_bytes(bytes(p.stat().st_size))), OTHER_ENDS),
    "a flipped bit near an end": (on_shard(flip), OTHER_ENDS),
    "truncated truth": (lambda d: os.truncate(d / TRUTH, 9), r"truth.safetensors has 9 bytes, the manifest .*; AGAIN"),
    "other tensors": (holds(rows=(100, 2)), r"SHARD cannot be read \(.*activations.*\); delete it and AGAIN"),
    "too few rows": (holds(activations=(99, 2)), differs(r"activations \[99, 2\] F32", F32)),
    "too wide": (holds(activations=(100, 3)), differs(r"activations \[100, 3\] F32", F32)),
    "flat": (holds(activations=(200,)), differs(r"activations \[200\] F32", F32)),
    "half as precise": (holds(torch.bfloat16, activations=(100, 2)), differs(f"activations {SHAPE} BF16", F32)),
    "whole numbers": (holds(torch.int64, activations=(100, 2)), differs(f"activations {SHAPE} I64", F32)),
    "another shard": (
        lambda d: (d / "train-00007.safetensors").write_bytes(b""),
        "train-00007.safetensors is not in the manifest; move it away or delete it",
    ),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "has no manifest.json, so its harvest has not finished; AGAIN"),
    "no directory": (lambda d: d.rename(d.with_name("away")) and d.write_text(""), "has no manifest.json, so .*"),
    "half a manifest": (lambda d: (d / MANIFEST).write_text('{"a": 1,'), not_read(".*")),
    "another format": (on_manifest(lambda m: m.update(format="x")), not_read("format is x, expected msae-shards")),
    "a newer version": (
        on_manifest(lambda m: m.update(version=3)),
        r"manifest.json .* format version 3, this msae reads up to 2\); upgrade: pip install -U msae",
    ),
    "a path as number": (on_entry(number="../../etc/passwd"), BAD_ENTRY),
    "a path as split": (on_entry(split="../train"), BAD_ENTRY),
    "negative rows": (on_entry(rows=-1), BAD_ENTRY),
    "a negative number": (on_entry(number=-1), BAD_ENTRY),
    "no checksum": (on_manifest(lambda m: entry(m).pop("xxh3")), not_read(".*")),
    "a shard twice": (on_manifest(lambda m: m["shards"].append(entry(m))), not_read("a shard is listed twice")),
    "another dtype": (on_manifest(lambda m: m.update(dtype="exec")), not_read("dtype=exec: .*")),
    "another d_in": (on_manifest(lambda m: m.update(d_in=3)), not_read("statistics.mean has 2 numbers, d_in is 3")),
    "no mean": (on_manifest(lambda m: m["statistics"].pop("mean")), not_read(".*statistics.*")),
    **{f"no {key}": (on_manifest(lambda m, key=key: m.pop(key)), not_read(f"not set: {key}; .*")) for key in KEYS},
}
DAMAGE_OF_INT8: dict[str, tuple[Damage, str]] = {
    "no scales": (holds(torch.int8, activations=(100, 2)), r"SHARD cannot be read \(.*scales.*\); delete it and AGAIN"),
    "too few scales": (
        holds(torch.int8, activations=(100, 2), scales=(99,)),
        differs(r"scales \[99\] F32", r"\[100\] F32"),
    ),
    "a column of scales": (
        holds(torch.int8, activations=(100, 2), scales=(100, 1)),
        differs(r"scales \[100, 1\] F32", r"\[100\] F32"),
    ),
    "float rows": (holds(activations=(100, 2), scales=(100,)), differs(f"activations {F32}", f"{SHAPE} I8")),
}


@pytest.mark.parametrize("name", [*DAMAGE, *DAMAGE_OF_INT8])
def test_opening_finds_damage_in_one_line(name, tmp_path):
    damage, message = (DAMAGE | DAMAGE_OF_INT8)[name]
    directory = open_shards(tmp_path, torch.int8 if name in DAMAGE_OF_INT8 else torch.float32).directory
    damage(directory)
    message = message.replace("SHARD", SHARD).replace("AGAIN", AGAIN)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(directory))}[/ ]{message}$"):
        Shards(directory)


def test_a_flipped_bit_in_the_middle_is_found_by_verify(tmp_path):
    shards = harvest(Numbered([40_000], []), tmp_path, show=False)["hook"]
    path = shards.directory / "train-00000.safetensors"
    assert path.stat().st_size > 3 << 16
    flip(path, path.stat().st_size // 2)
    shards = Shards(shards.directory)
    with pytest.raises(ValueError, match=rf"^{path} has checksum \w+, the manifest says \w+; delete it and {AGAIN}$"):
        shards.verify()


# Reading rows ---------------------------------------------------------------------------------------------------------


@in_each_dtype
def test_reading_and_taking_gives_the_rows_of_the_files(dtype, tmp_path):
    """Blocks of one row and more, in any shard and order; memory is reused, but never while somebody holds it."""
    shards = open_shards(tmp_path, dtype)
    x, held = all_rows(shards), []
    assert (shards.stored_dtype, shards.dtype) == (dtype, torch.float32 if dtype == torch.int8 else dtype)
    for blocks in ([(0, 100)], [(99, 100), (100, 101), (230, 240)], [(200, 240), (0, 1), (120, 200)], [(7, 9)]) * 2:
        starts, stops = (torch.tensor(side) for side in zip(*blocks, strict=True))
        held.append((shards.read("train", starts, stops), torch.cat([x[a:b] for a, b in blocks])))
        if len(held) == 6:
            held = held[3:]  # let go of some
    for stored, expected in held:
        index = torch.randperm(len(expected) * 2) % len(expected)
        out = torch.empty(len(index), shards.d_in, dtype=shards.dtype)
        take(stored, index, out)
        assert torch.equal(out, expected[index])


def test_memory_that_nobody_holds_is_used_again(tmp_path):
    shards = open_shards(tmp_path)
    start, stops = torch.tensor([0]), (torch.tensor([n]) for n in (99, 50, 70))
    assert len({shards.read("train", start, stop)["activations"].ctypes.data for stop in stops}) == 1


# 8-bit rows -----------------------------------------------------------------------------------------------------------


def draws(rows: int = 4000, d_in: int = 33) -> Tensor:
    """Rows of every size, from the least to nearly the greatest in float32, some with outliers, some of zeros."""
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0))
    x[::3, 5] *= 1000
    x[1::7] = 0
    return x * torch.logspace(-44, 37, rows)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_quantised_row_is_within_half_a_step_of_itself(dtype):
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
    out = torch.empty(x.shape)
    assert dequantise(q, scales, out) is out
    torch.testing.assert_close(out, exact.float(), rtol=0, atol=0)
    normal = greatest > 1e-35
    torch.testing.assert_close(out.abs().amax(1)[normal], greatest[normal], rtol=2**-23, atol=0)  # an ulp at most
    assert (q.abs().amax(1)[normal] == 127).all()


def test_quantise_by_hand():
    q, scales = quantise(torch.tensor([[127.0, -63.4, 0.5], [0.0, 0.0, 0.0], [-0.254, 0.127, 0.001]]))
    assert q.tolist() == [[127, -63, 0], [0, 0, 0], [-127, 64, 0]]
    torch.testing.assert_close(scales[::2], torch.tensor([1.0, 0.002]))
    expected = torch.tensor([[127.0, -63, 0], [0, 0, 0], [-0.254, 0.128, 0]])
    torch.testing.assert_close(dequantise(q, scales), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gets_no_scale(value):
    x = torch.randn(5, 4)
    x[3, 1] = value
    assert quantise(x)[1].isfinite().tolist() == [True, True, True, False, True]
