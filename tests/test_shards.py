"""Shard directories: opening finds damage in one line that says what to type, verify finds a flipped bit."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from msae.data.harvest import harvest
from msae.data.shards import MANIFEST, TRUTH, Shards, identity_hash, write_atomically
from msae.data.synthetic import TreeSource

AGAIN = "run the same python -m msae.harvest command to make it again"


def source(**options: Any) -> TreeSource:
    return TreeSource(**{"rows": 600, "val_rows": 100, "chunk_rows": 256, "norm_spread": 0.3, **options})


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
        on_manifest(lambda m: m.update(version=2)),
        r"manifest.json has format version 2, this msae reads up to 1; upgrade: pip install -U msae",
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
