"""Harvests: killed at any moment they end in the same bytes; nothing is made twice; one line when it cannot go on."""

import errno
import json
import os
import re
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msae.data import shards as shards_module
from msae.data.harvest import directory_of, harvest
from msae.data.shards import MANIFEST, TRUTH, Shards
from msae.sources.forest import ForestSource
from msae.sources.source import Chunk, Source
from tests.sources import TextLike, made, ready

FIRST, SECOND = TextLike().hook_names
MAKERS: dict[str, Callable[[], Source]] = {
    "text": TextLike,
    "int8": partial(TextLike, dtype=torch.int8),
    "forest": partial(ForestSource, rows=50, val_rows=10, chunk_rows=20),
}
of_each_kind = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


def test_shards_hold_what_the_source_gave(tmp_path):
    chunks = made(TextLike(3).chunks(None))
    for hook, shards in harvest(TextLike(3), tmp_path, show=False).items():
        assert (shards.rows("train"), shards.rows("val")) == ([7, 8, 7], [2, 2])
        assert (shards.manifest.dtype, shards.manifest.provenance) == ("bfloat16", {"by": "a test"})
        splits = [("train", n, chunk.splits["train"]) for n, chunk in enumerate(chunks)]
        for split, number, rows in [*splits, ("val", 1, chunks[2].splits["val"])]:
            assert torch.equal(shards.activations(split, number), rows.activations[hook])
            index = shards.index(split, number)
            assert set(index) == {"sequence", "position", "tokens"}
            assert all(torch.equal(tensor, rows.index[name]) for name, tensor in index.items())


# Going on -------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process, after which it writes and deletes nothing."""


def kill_at(patch: pytest.MonkeyPatch, number: int, after: bool) -> Callable[[], int]:
    """Die at the number-th file: half written under its temporary name, or just after it got its name."""
    replace, calls = os.replace, 0

    def dying(temporary: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
            if not after:
                os.truncate(temporary, os.path.getsize(temporary) // 2)
                raise Killed
        replace(temporary, target)
        if calls == number:
            raise Killed

    patch.setattr(os, "replace", dying)
    return lambda: calls


@of_each_kind
@pytest.mark.parametrize("after", [False, True])
def test_a_harvest_that_was_killed_at_any_file_ends_in_the_same_bytes(maker, after, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = kill_at(patch, -1, after)
        harvest(maker(), tmp_path / "whole", show=False)
    expected, files = contents(tmp_path / "whole"), calls()
    assert len(expected) == files > 8  # every file was written once, as a whole
    for number in range(1, files + 1):
        root = tmp_path / str(number)
        with monkeypatch.context() as patch:
            kill_at(patch, number, after)
            with pytest.raises(Killed):
                harvest(maker(), root, show=False)
        assert len(list(root.rglob("*.tmp"))) == (not after)
        with monkeypatch.context() as patch, suppress(Killed):  # and soon again
            kill_at(patch, 2, after)
            harvest(maker(), root, show=False)
        harvest(maker(), root, show=False)
        assert contents(root) == expected, f"killed at file {number}"


def test_a_harvest_goes_on_after_sigkill(tmp_path):
    harvest(TextLike(12), tmp_path / "whole", show=False)
    root = tmp_path / "killed"
    directory = directory_of(TextLike(12), SECOND, root)
    process = get_context("spawn").Process(target=harvest, args=(TextLike(12, pause=0.05), root, None, False))
    process.start()
    while process.is_alive() and not (directory / "chunk-00003.json").exists():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (directory / MANIFEST).exists()
    source = TextLike(12)
    harvest(source, root, show=False)  # the lock died with the process
    assert source.started[0] >= 3, "chunks on disk were made again"
    assert contents(root) == contents(tmp_path / "whole")


@of_each_kind
@pytest.mark.parametrize(
    ("pattern", "remade"),
    [
        ("nothing", []),
        ("train-00001.safetensors", [1]),
        ("val-00000.safetensors", [0]),
        ("[cm]*[1t].json", [1]),  # chunk-00001 and manifest
        (MANIFEST, []),
        (TRUTH, []),
        ("train-0000[02].safetensors", [0, 2]),
        ("*", [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize(("cut", "finished"), [(None, True), (5, True), (10**6, True), (None, False)])
def test_only_missing_and_damaged_files_are_made_again(maker, pattern, remade, cut, finished, tmp_path, monkeypatch):
    """Missing, cut short, or empty, of one hook; files of other hooks are not touched, finished or not."""
    source = maker()
    harvest(source, tmp_path, show=False)
    before = contents(tmp_path)
    directory = directory_of(source, source.hook_names[-1], tmp_path)
    others = [path for path in tmp_path.glob("*/*-*") if path.parent != directory]
    times = [path.stat().st_mtime_ns for path in others]
    for path in tmp_path.glob("nothing" if finished else f"*/{MANIFEST}"):
        path.unlink()
    for path in directory.glob(pattern):
        if cut is None or path.name == MANIFEST:  # a damaged manifest is an error, see test_shards
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-cut])
    again = maker()
    if pattern == "nothing" and finished:
        monkeypatch.setattr(type(again), "chunks", lambda self, state: pytest.fail("made again"))
    assert list(harvest(again, tmp_path, show=False)) == list(source.hook_names)
    assert contents(tmp_path) == before
    assert [path.stat().st_mtime_ns for path in others] == times
    if isinstance(again, TextLike):  # these chunks and no others
        assert again.made == remade


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff\xfe\x80", None])
def test_a_damaged_record_is_made_again(content, tmp_path):
    """Also one of another chunk; and what a killed process was writing is deleted."""
    directory = harvest(TextLike(), tmp_path, show=False)[FIRST].directory
    before = contents(tmp_path)
    (directory / MANIFEST).unlink()
    (directory / "chunk-00001.json").write_bytes(content or (directory / "chunk-00000.json").read_bytes())
    (directory / "train-00009.safetensors.tmp").write_bytes(b"half")
    harvest(TextLike(), tmp_path, show=False)
    assert contents(tmp_path) == before


def test_several_harvesters_at_once_make_it_once(tmp_path):
    harvest(TextLike(5), tmp_path / "alone", show=False)
    sources = [TextLike(5, pause=0.02) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda source: harvest(source, tmp_path / "together", show=False), sources))
    assert sorted(len(source.started) for source in sources) == [0, 0, 1]
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_another_identity_is_another_directory(tmp_path):
    source, same, other = TextLike(2), TextLike(2, promised=5), TextLike(2, seed=1)
    for each in (source, other):
        harvest(each, tmp_path, show=False)
    directory = directory_of(source, FIRST, tmp_path)
    assert directory == directory_of(same, FIRST, tmp_path) != directory_of(other, FIRST, tmp_path)
    assert directory.name.startswith(f"textlike-{FIRST}-")
    assert len({json.dumps(Shards(d).identity, sort_keys=True) for d in tmp_path.iterdir()}) == 4


# What a source may give -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda chunks: chunks, [7, 8]),
        (lambda chunks: [Chunk({}, {"next": 0, "carry": 0}), *chunks], [7, 8]),
        (
            lambda chunks: [chunks[0], Chunk(ready({"train": TextLike().text(torch.Generator(), 0)}), {"next": 2})],
            [7, 0],
        ),
    ],
    ids=["fewer rows than promised", "a chunk without splits", "a split without rows"],
)
def test_rows_are_counted_as_they_come(change, rows, tmp_path, monkeypatch):
    source = TextLike(2, promised=10**6)
    chunks = change(list(source.chunks(None)))
    monkeypatch.setattr(source, "chunks", lambda state: iter([] if state else chunks))
    shards = harvest(source, tmp_path, show=False)[FIRST]
    assert (shards.rows("train"), shards.rows("val")) == (rows, [2])
    assert shards.manifest.statistics.rows == sum(rows)
    assert shards.activations("train", 1).shape == (rows[1], 3)
    shards.directory.joinpath(MANIFEST).unlink()
    for path in shards.directory.glob("chunk-*.json"):  # an older msae writes no dtype for a chunk without splits
        path.write_text(path.read_text().replace('"dtype": null,\n "d_in": null', '"sum_square": 0.0'))
    assert harvest(source, tmp_path, show=False)[FIRST].rows("train") == rows


def test_a_source_without_rows_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^the source textlike gave no training rows; [^\n]*$"):
        harvest(TextLike(0), tmp_path, show=False)
    assert not list(tmp_path.rglob(MANIFEST))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize(("value", "split"), [("nan", "train"), ("inf", "train"), ("-inf", "val"), ("nan", "val")])
def test_rows_that_are_not_finite_are_one_line(value, split, dtype, tmp_path, monkeypatch):
    (chunk,) = made(TextLike(1, dtype=torch.float32).chunks(None))
    chunk.splits[split].activations[SECOND][-1, 0] = float(value)
    source = TextLike(1, dtype=dtype)
    splits = {name: source.split(rows.activations, **rows.index) for name, rows in chunk.splits.items()}
    monkeypatch.setattr(source, "chunks", lambda state: iter([Chunk(ready(splits), chunk.state)]))
    with pytest.raises(ValueError, match=rf"^{SECOND} has rows with NaN or Inf, [^\n]*; set data.source.[^\n]*$"):
        harvest(source, tmp_path, show=False)
    assert not list(directory_of(source, SECOND, tmp_path).glob(f"{split}-*"))


# What stops a harvest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_full_disk_is_one_line_and_nothing_is_lost(at, tmp_path, monkeypatch):
    harvest(TextLike(), tmp_path / "whole", show=False)
    save, left = shards_module.save_file, iter(range(at))

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if next(left, None) is None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    root = tmp_path / "full"
    message = r"No space left[^\n]*; free space or choose another data\.root, then run the same command to continue"
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "save_file", full)
        with pytest.raises(ValueError, match=rf"^cannot write \S+-0000\d\.safetensors: [^\n]*{message}$"):
            harvest(TextLike(), root, show=False)
    remaining, expected = contents(root), contents(tmp_path / "whole")
    assert remaining.items() <= expected.items()  # whole files only
    assert len([name for name in remaining if name.endswith(".safetensors")]) == at
    harvest(TextLike(), root, show=False)
    assert contents(root) == expected


def test_a_root_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"^cannot write to [^\n]*file[^\n]*data\.root=[^\n]*$"):
            harvest(TextLike(), root, show=False)
    directory_of(TextLike(), FIRST, tmp_path).joinpath(".lock").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^cannot write to \S+ \([^\n]*\); choose another data\.root=…$"):
        harvest(TextLike(), tmp_path, show=False)


def test_a_harvest_that_needs_too_much_disk_is_one_line(tmp_path, monkeypatch, capsys):
    source, usage = TextLike(promised=10**9), namedtuple("usage", "free")  # 16 bytes a row
    message = r"^the harvest needs 16\.00 GB, data\.max_disk_gb allows 1; [^\n]*\(data\.source\.tokens=62500000\)$"
    with pytest.raises(ValueError, match=message):
        harvest(source, tmp_path, max_disk_gb=1, show=False)
    monkeypatch.setattr("msae.data.harvest.shutil.disk_usage", lambda path: usage(15 * 10**9))
    with pytest.raises(ValueError, match=r"^the harvest needs 16\.00 GB more, \S+ has 15\.00 GB free; [^\n]*tokens$"):
        harvest(source, tmp_path, show=False)
    assert source.started == []
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("msae.data.harvest.shutil.disk_usage", lambda path: usage(17 * 10**9))
    harvest(source, tmp_path, max_disk_gb=16)
    assert re.search(r"1,000,000,000 rows [^$]*up to 16\.00 GB of disk; 17\.0 GB free", capsys.readouterr().err)
