"""Documents: where they come from, and what identifies them."""

import http.server
import json
import threading
import time

import datasets
import huggingface_hub
import pytest

from msae.data.text import documents, hub_reachable, text_identity


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that refuses connections, and offline mode put back afterwards."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def write(directory, suffix):
    rows = [{"text": "one\ntwo", "n": 1}, {"text": "", "n": 2}, {"text": "three", "n": 3}]
    file = directory / f"some [1] {suffix[1:]}" / f"texts{suffix}"
    file.parent.mkdir()
    if suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(file.parent)
        return file.parent
    return file


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow"])
def test_formats(tmp_path, suffix):
    datasets.disable_progress_bars()
    file = str(write(tmp_path, suffix))
    assert list(documents(file)) == ["one\ntwo", "", "three"]
    assert list(documents(file, skip=1)) == ["", "three"]
    with pytest.raises(ValueError, match=r"no field 'txt'.*text_field=text$"):
        next(documents(file, field="txt"))
    with pytest.raises(ValueError, match=r"field 'n' .* holds int"):
        next(documents(file, field="n"))


def test_txt_is_paragraphs_or_lines(tmp_path):
    paragraphs, lines = tmp_path / "a.txt", tmp_path / "b.txt"
    paragraphs.write_text("first\nof it\n\nsecond\n\n\nthird\n")
    lines.write_text("first\n second\nthird\n")
    assert [d.strip() for d in documents(str(paragraphs))] == ["first\nof it", "second", "third"]
    assert list(documents(str(lines))) == ["first", " second", "third"]
    paragraphs.write_text("fourth\n")
    both = ["fourth", "first", " second", "third"]
    assert list(documents(str(tmp_path))) == list(documents(str(tmp_path / "*.txt"))) == both


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/text.txt", r"there is no text at /nowhere/text\.txt; set data\.source\.text"),
        ("./nowhere", "there is no text at"),
        ("{tmp}/a.csv", r"a\.csv holds \.csv; data\.source\.text takes files of one kind"),
        ("{tmp}/*.pdf", "holds no text file"),
        ("{tmp}", r"holds \.json, \.txt"),
    ],
)
def test_paths_that_are_no_text(tmp_path, name, message):
    for file in ("a.csv", "b.txt", "c.json"):
        (tmp_path / file).write_text("x")
    with pytest.raises(ValueError, match=message) as error:
        next(documents(name.format(tmp=tmp_path)))
    assert "\n" not in str(error.value)


def test_broken_and_split_files(tmp_path):
    broken = tmp_path / "a.jsonl"
    broken.write_text('{"text": "a"\n{{{')
    with pytest.raises(ValueError, match=r"cannot read .*a.jsonl"):
        next(documents(str(broken)))
    with pytest.raises(ValueError, match="text_split=test"):
        next(documents(str(broken), split="test"))


def test_hub_dataset_while_offline(no_hub):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"owner/name is not in the local cache; set data.source.text"):
        next(documents("owner/name"))
    assert time.perf_counter() - start < 4
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


def test_hub_that_hangs_counts_as_offline(no_hub, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: never.wait(10))
    start = time.perf_counter()
    assert not hub_reachable(timeout_seconds=0.2)
    assert time.perf_counter() - start < 2


def test_hub_that_answers_anything_is_reachable(no_hub, monkeypatch):
    asked: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert hub_reachable()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: asked.append(1))
        assert not hub_reachable()
        assert not asked
    finally:
        server.shutdown()
        server.server_close()


def test_text_identity_is_content(tmp_path, no_hub):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("same")
    b.write_text("same")
    first = text_identity(str(a), split="train", config=None)
    assert first == text_identity(str(b), split="train", config=None)
    b.write_text("other")
    assert first != text_identity(str(b), split="train", config=None)
    assert text_identity("owner/name", split="train", config="c")["name"] == "owner/name"
