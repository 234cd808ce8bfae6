"""Whole files: the old one or the new one, whatever happens; locks; JSON that is refused in one line."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from msae import files
from msae.files import checksum, checksum_of_ends, lock, read_json, write, write_json
from msae.settings import Count, settings


class Killed(BaseException):
    """An error that no code catches."""


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(28, "No space left on device"), ValueError, r"cannot write \S+/file: .*No space left.*; buy it"),
        (Killed("now"), Killed, "now"),
    ],
)
@pytest.mark.parametrize("failing", ["fill", "fsync", "replace"])
def test_a_write_that_fails_keeps_the_former_file_and_leaves_no_other(
    failing, error, raised, message, tmp_path, monkeypatch
):
    def fail(*_: Any) -> None:
        raise error

    def half(temporary: Path) -> None:
        temporary.write_text("half")
        if failing == "fill":
            fail()

    path = tmp_path / "file"
    write(path, lambda temporary: temporary.write_text("old"))
    with monkeypatch.context() as patch:
        if failing != "fill":
            patch.setattr(files.os, failing, fail)
        with pytest.raises(raised, match=f"^{message}$"):
            write(path, half, "buy it")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


def test_a_write_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^cannot write [^\n]*Not a directory[^\n]*; free space or choose [^\n]*$"):
        write_json(tmp_path / "file" / "below.json", {})


@settings
class Content:
    """A file of version 2 at most."""

    version: Count
    rows: list[int]


def test_json_is_read_as_it_was_written(tmp_path):
    write_json(tmp_path / "a.json", {"version": 2, "rows": [1, 2]})
    assert read_json(tmp_path / "a.json", Content, "a table", "make it", 2) == Content(2, [1, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"version": 1,', r"\(Expecting [^\n]*\); make it"),
        (b"\xff\xfe\x80", r"\([^\n]*can't decode[^\n]*\); make it"),
        (b"[1]", r"\(it is a list, expected an object\); make it"),
        (b"[" * 100_000, r"\([^\n]*recursion[^\n]*\); make it"),
        (b'{"rows": ' + b"[" * 700 + b"]" * 700 + b"}", r"\([^\n]*\); make it"),
        (b'{"version": 1, "rows": 1}', r"\(rows=1: expected list of int\); make it"),
        (b'{"version": "2", "rows": []}', r"\(version=2: expected int [^\n]*\); make it"),
        (b'{"version": 1}', r"\(not set: rows; [^\n]*\); make it"),
        (b'{"version": 3, "a": 1}', r"\(it has format version 3, this msae reads up to 2\); upgrade: pip [^\n]* msae"),
    ],
)
def test_json_that_is_something_else_is_one_line(content, message, tmp_path):
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not a table {message}$"):
        read_json(path, Content, "a table", "make it", 2)


def test_json_that_is_missing_or_a_directory_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^there is no \S+/table\.json; make it$"):
        read_json(tmp_path / "table.json", Content, "a table", "make it")
    with pytest.raises(ValueError, match=r"^\S+ is not a table \([^\n]*Is a directory[^\n]*\); make it$"):
        read_json(tmp_path, Content, "a table", "make it")


def test_checksums(tmp_path):
    """Every byte counts for the one, the ends alone for the other."""
    path = tmp_path / "file"
    content = bytes(range(256)) * 40
    sums = []
    for byte, bit in ((0, 0), (5000, 1), (0, 1), (99, 1), (10_200, 1)):
        changed = bytearray(content)
        changed[byte] ^= bit
        path.write_bytes(changed)
        sums.append((checksum(path), checksum_of_ends(path, 100)))
    whole, ends = zip(*sums, strict=True)
    assert len(set(whole)) == 5
    assert ends[0] == ends[1]
    assert len(set(ends)) == 4


def test_a_lock_is_refused_or_waited_for_while_it_is_held(tmp_path, monkeypatch):
    is_held, lines = threading.Event(), []

    def hold() -> None:
        held = lock(tmp_path, "busy")
        is_held.set()
        while "waiting for it" not in lines:
            time.sleep(0.001)
        lines.append("released")
        held.release()

    monkeypatch.setattr(files, "say", lines.append)
    other = threading.Thread(target=hold)
    other.start()
    assert is_held.wait(10)
    with pytest.raises(ValueError, match=r"^somebody has it$"):
        lock(tmp_path, "somebody has it")
    lock(tmp_path, "waiting for it", wait=True).release()
    assert lines == ["waiting for it", "released"]
    other.join()
    lock(tmp_path, "busy").release()


def test_a_directory_that_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^cannot write to \S+/file \([^\n]*\); choose another$"):
        lock(tmp_path / "file", "busy", advice="choose another")
