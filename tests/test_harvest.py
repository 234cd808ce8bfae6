"""Harvests: killed at any moment they end in the same bytes; nothing is made twice; one line when it cannot go on."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msae.data import shards as shards_module
from msae.data.harvest import directory_of, harvest
from msae.data.shards import MANIFEST, Shards, quantise
from msae.data.source import Chunk, Source, Split
from msae.data.synthetic import ForestSource

D_IN = {"blocks.0.hook_mlp_out": 3, "blocks.1.hook_resid_pre": 5}
REPOSITORY = Path(__file__).parent.parent


class TextLike:
    """Two hooks, val rows in every other chunk, and a state that a chunk cannot be made without."""

    name = "textlike"
    hook_names = tuple(D_IN)
    budget_key = "data.source.tokens"

    def __init__(self, chunks: int = 4, rows: int = 7, promised: int = 100, seed: int = 0, pause: float = 0) -> None:
        self.count, self.rows, self.promised, self.seed, self.pause = chunks, rows, promised, seed, pause
        self.started: list[int] = []  # the number of the first chunk of every pass
        self.made: list[int] = []

    def identity(self, hook_name: str) -> dict[str, Any]:
        return {"seed": self.seed, "chunks": self.count, "rows": self.rows, "hook": hook_name}

    def provenance(self) -> dict[str, Any]:
        return {"by": "a test"}

    def expected_rows(self) -> int:
        return self.promised

    def most_rows(self) -> tuple[int, int]:
        return self.rows + 1, self.count

    def d_in(self, hook_name: str) -> int:
        return D_IN[hook_name]

    def bytes_per_row(self, hook_name: str) -> int:
        return 2 * D_IN[hook_name]

    def split(self, generator: torch.Generator, rows: int) -> Split:
        x = {hook: torch.randn(rows, d, generator=generator).bfloat16() for hook, d in D_IN.items()}
        tokens = torch.randint(0, 99, (2, 4), generator=generator, dtype=torch.int32)
        place = torch.arange(rows, dtype=torch.int32)
        return Split(x, {"sequence": place // 4, "position": place % 4, "tokens": tokens})

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        number, carry = (state["next"], state["carry"]) if state else (0, self.seed)
        self.started.append(number)
        while number < self.count:
            time.sleep(self.pause)
            generator = torch.Generator().manual_seed(carry)
            splits = {"train": self.split(generator, self.rows + number % 2)}
            if number % 2 == 0:
                splits["val"] = self.split(generator, 2)
            carry = int(torch.randint(1 << 30, (1,), generator=generator))
            self.made.append(number)
            number += 1
            yield Chunk(splits, {"next": number, "carry": carry})

    def truth(self) -> dict[str, Tensor] | None:
        return None


class TextLike8(TextLike):
    """The same in int8."""

    name = "textlike8"

    def split(self, generator: torch.Generator, rows: int) -> Split:
        split = super().split(generator, rows)
        for hook, x in split.activations.items():
            split.activations[hook], split.scales[hook] = quantise(x)
        return split


def tree() -> ForestSource:
    return ForestSource(rows=50, val_rows=10, chunk_rows=20)


MAKERS: dict[str, Callable[[], Source]] = {"text": TextLike, "int8": TextLike8, "tree": tree}
both = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


class Killed(BaseException):
    """What no code catches."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> Callable[[], int]:
    """Die at the number-th file: half written under its temporary name, or just after it got its name."""
    real, calls = os.replace, 0

    def dying(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.truncate(source, os.path.getsize(source) // 2)
            raise Killed
        real(source, target)
        if calls == number:
            raise Killed

    monkeypatch.setattr(shards_module.os, "replace", dying)
    return lambda: calls


@both
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_file_and_resumed_gives_the_same_bytes(maker, after, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        calls = kill_at(patch, -1, after)
        harvest(maker(), tmp_path / "whole", show=False)
    expected, files = contents(tmp_path / "whole"), calls()
    assert len(expected) == files > 8  # every file was written once, through write_atomically
    for number in range(1, files + 1):
        root = tmp_path / str(number)
        for at in (number, 2):  # killed, and soon again
            with monkeypatch.context() as patch, pytest.raises(Killed) if at == number else _either():
                kill_at(patch, at, after)
                harvest(maker(), root, show=False)
        harvest(maker(), root, show=False)
        assert contents(root) == expected, f"killed at file {number}"


class _either:
    """Killed or not."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, *_: object) -> bool:
        return kind in (None, Killed)


SLOW = """
from pathlib import Path
from tests.test_harvest import TextLike
from msae.data.harvest import harvest
harvest(TextLike(12, pause=0.05), Path({root!r}), show=False)
"""


def test_sigkill_in_mid_harvest(tmp_path) -> None:
    whole = harvest(TextLike(12), tmp_path / "whole", show=False)
    root = tmp_path / "killed"
    directory = directory_of(TextLike(12), "blocks.1.hook_resid_pre", root)
    process = subprocess.Popen([sys.executable, "-c", SLOW.format(root=str(root))], cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 60
        while not (directory / "chunk-00003.json").exists():
            assert process.poll() is None, "the harvest ended too early"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (directory / MANIFEST).exists()
    source = TextLike(12)
    harvest(source, root, show=False)  # the lock died with the process
    assert source.started[0] >= 3, "what was there was made again"
    assert contents(root) == contents(tmp_path / "whole")
    assert len(whole) == 2


@both
def test_whole_directory_is_used_as_it_is(maker, tmp_path, monkeypatch) -> None:
    harvest(maker(), tmp_path, show=False)
    before = contents(tmp_path)
    source = maker()
    monkeypatch.setattr(source, "chunks", lambda state: pytest.fail("made again"))
    opened = harvest(source, tmp_path, show=False)
    assert list(opened) == list(source.hook_names)
    assert contents(tmp_path) == before


@both
@pytest.mark.parametrize(
    ("names", "remade"),
    [
        (["train-00001.safetensors"], [1]),
        (["val-00000.safetensors"], [0]),
        (["chunk-00001.json", MANIFEST], [1]),
        ([MANIFEST], []),
        (["train-00000.safetensors", "train-00002.safetensors"], [0, 2]),
    ],
)
@pytest.mark.parametrize("truncated", [False, True])
def test_what_was_removed_is_made_again(maker, names, remade, truncated, tmp_path) -> None:
    source = maker()
    harvest(source, tmp_path, show=False)
    before = contents(tmp_path)
    for name in names:
        path = directory_of(source, source.hook_names[-1], tmp_path) / name
        if truncated and name != MANIFEST:  # a corrupt manifest is an error, see test_shards
            path.write_bytes(path.read_bytes()[:-5])
        else:
            path.unlink()
    again = maker()
    harvest(again, tmp_path, show=False)
    assert contents(tmp_path) == before
    if isinstance(again, TextLike):  # these chunks and no others
        assert again.made == remade


def test_text_shards_hold_what_the_source_gave(tmp_path) -> None:
    source = TextLike(3)
    opened = harvest(source, tmp_path, show=False)
    for hook, shards in opened.items():
        shards.verify()
        assert shards.rows("train") == [7, 8, 7]
        assert shards.rows("val") == [2, 2]
        assert shards.manifest["dtype"] == "bfloat16"
        given = list(TextLike(3).chunks(None))
        for number, chunk in enumerate(given):
            assert torch.equal(shards.activations("train", number), chunk.splits["train"].activations[hook])
            index = shards.index("train", number)
            assert set(index) == {"sequence", "position", "tokens"}
            assert all(torch.equal(t, chunk.splits["train"].index[name]) for name, t in index.items())
        assert torch.equal(shards.activations("val", 1), given[2].splits["val"].activations[hook])
        x = torch.cat([chunk.splits["train"].activations[hook] for chunk in given]).double()
        torch.testing.assert_close(shards.mean, x.mean(0), rtol=1e-12, atol=1e-14)
        assert shards.mean_square == pytest.approx(float(x.square().sum(1).mean()), rel=1e-12)


def test_two_harvesters_at_once_make_it_once(tmp_path) -> None:
    harvest(TextLike(5), tmp_path / "alone", show=False)
    sources, errors = [TextLike(5, pause=0.02) for _ in range(3)], []
    barrier = threading.Barrier(len(sources))

    def work(source: TextLike) -> None:
        try:
            barrier.wait()
            harvest(source, tmp_path / "together", show=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert sorted(len(source.started) for source in sources) == [0, 0, 1]
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_a_second_hook_joins_what_is_there(tmp_path) -> None:
    """One hook of two is whole: the other alone is written, the whole one not touched."""
    source = TextLike()
    harvest(source, tmp_path, show=False)
    before = contents(tmp_path)
    whole, away = (directory_of(source, hook, tmp_path) for hook in source.hook_names)
    times = {p.name: p.stat().st_mtime_ns for p in whole.iterdir()}
    for path in away.iterdir():
        path.unlink()
    harvest(TextLike(), tmp_path, show=False)
    assert contents(tmp_path) == before
    assert times == {p.name: p.stat().st_mtime_ns for p in whole.iterdir()}


# --- what stops a harvest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 5])
def test_disk_full_is_one_line_and_nothing_is_lost(at, tmp_path, monkeypatch) -> None:
    harvest(TextLike(), tmp_path / "whole", show=False)
    real, calls = shards_module.save_file, 0

    def save(tensors: dict[str, Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    root = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "save_file", save)
        with pytest.raises(ValueError, match=r"^cannot write \S+-0000\d\.safetensors: [^\n]*No space left[^\n]*$"):
            harvest(TextLike(), root, show=False)
    left, expected = contents(root), contents(tmp_path / "whole")
    assert left.items() <= expected.items()  # whole files only
    assert len([name for name in left if name.endswith(".safetensors")]) == at
    harvest(TextLike(), root, show=False)
    assert contents(root) == expected


def test_root_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"^cannot write to [^\n]*file[^\n]*data\.root=[^\n]*$"):
            harvest(TextLike(), root, show=False)


def test_directory_that_cannot_be_locked(tmp_path, monkeypatch) -> None:
    class ReadOnly:
        def __init__(self, path: Path) -> None:
            self.path = path

        def acquire(self, timeout: float = -1) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(self.path))

    monkeypatch.setattr("msae.data.harvest.FileLock", ReadOnly)
    with pytest.raises(ValueError, match=r"^cannot write [^\n]*data\.root[^\n]*$"):
        harvest(TextLike(), tmp_path, show=False)


def test_disk_cap_and_free_space(tmp_path, monkeypatch, capsys) -> None:
    source = TextLike(promised=10**9)  # 16 bytes a row
    with pytest.raises(
        ValueError, match=r"^the harvest needs 16\.00 GB, data\.max_disk_gb allows 1;[^\n]*=62500000\)$"
    ):
        harvest(source, tmp_path, max_disk_gb=1, show=False)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("msae.data.harvest.shutil.disk_usage", lambda path: usage(10**12, 0, 15 * 10**9))
    with pytest.raises(ValueError, match=r"^the harvest needs 16\.00 GB more, \S+ has 15\.00 GB free; [^\n]*$"):
        harvest(source, tmp_path, show=False)
    assert source.started == []
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("msae.data.harvest.shutil.disk_usage", lambda path: usage(10**12, 0, 17 * 10**9))
    harvest(source, tmp_path, max_disk_gb=16, show=True)
    said = capsys.readouterr().err
    assert "1,000,000,000 rows" in said
    assert "up to 16.00 GB of disk; 17.0 GB free" in said


def test_disk_cap_names_a_key_that_the_source_has(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"data\.source\.rows"):
        harvest(tree(), tmp_path, max_disk_gb=1e-9, show=False)


def test_source_without_rows(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^the source textlike gave no training rows; [^\n]*$"):
        harvest(TextLike(0), tmp_path, show=False)
    assert not list(tmp_path.rglob(MANIFEST))


def test_source_that_ends_early_is_counted_as_it_is(tmp_path) -> None:
    shards = harvest(TextLike(2, promised=10**6), tmp_path, show=False)["blocks.0.hook_mlp_out"]
    assert (shards.rows("train"), shards.rows("val")) == ([7, 8], [2])
    assert shards.manifest["statistics"]["rows"] == 15
    for e in shards.manifest["shards"]:
        path = shards.directory / f"{e['split']}-{e['number']:05d}.safetensors"
        assert path.stat().st_size == e["bytes"]


def test_chunk_without_rows(tmp_path, monkeypatch) -> None:
    source = TextLike(2)
    given = list(source.chunks(None))
    empty = Chunk({}, {"next": 0, "carry": 0})
    monkeypatch.setattr(source, "chunks", lambda state: iter([empty, *given]))
    assert harvest(source, tmp_path, show=False)["blocks.0.hook_mlp_out"].rows("train") == [7, 8]


def test_chunk_with_zero_rows_of_a_split(tmp_path, monkeypatch) -> None:
    source = TextLike(2)
    first, second = source.chunks(None)
    none = {hook: torch.zeros(0, d).bfloat16() for hook, d in D_IN.items()}
    second.splits["train"] = Split(none)
    monkeypatch.setattr(source, "chunks", lambda state: iter([first, second]))
    shards = harvest(source, tmp_path, show=False)["blocks.0.hook_mlp_out"]
    assert shards.rows("train") == [7, 0]
    assert shards.activations("train", 1).shape == (0, 3)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff\xfe\x80"])
def test_damaged_record_is_made_again(content, tmp_path) -> None:
    directory = harvest(TextLike(), tmp_path, show=False)["blocks.0.hook_mlp_out"].directory
    before = contents(tmp_path)
    (directory / MANIFEST).unlink()
    (directory / "chunk-00001.json").write_bytes(content)
    harvest(TextLike(), tmp_path, show=False)
    assert contents(tmp_path) == before


def test_another_identity_is_another_directory(tmp_path) -> None:
    a, same, b = TextLike(2), TextLike(2, promised=5), TextLike(2, seed=1)
    for source in (a, b):
        harvest(source, tmp_path, show=False)
    assert len(list(tmp_path.iterdir())) == 4
    hook = "blocks.0.hook_mlp_out"
    assert directory_of(a, hook, tmp_path) == directory_of(same, hook, tmp_path) != directory_of(b, hook, tmp_path)
    assert directory_of(a, hook, tmp_path).name.startswith(f"textlike-{hook}-")
    identities = [json.dumps(Shards(d).identity, sort_keys=True) for d in tmp_path.iterdir()]
    assert len(set(identities)) == 4
