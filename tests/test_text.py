"""Documents: where they come from, and what identifies them."""

import http.server
import threading
import time

import datasets
import huggingface_hub
import pytest

from msae.sources.text import documents, hub_reachable, text_identity
from tests.tiny_lm import close_hub


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    close_hub(monkeypatch, tmp_path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow"])
def test_each_format_gives_the_documents_of_its_column(tmp_path, suffix):
    datasets.disable_progress_bars()
    rows = [{"text": "one\ntwo", "n": 1}, {"text": "", "n": 2}, {"text": "three", "n": 3}]
    dataset, directory = datasets.Dataset.from_list(rows), tmp_path / f"some [1] {suffix[1:]}"
    directory.mkdir()
    path = directory / f"texts{suffix}"
    if suffix == ".arrow":
        dataset.save_to_disk(path := directory)
    elif suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        dataset.to_json(path, lines=suffix == ".jsonl")
    assert list(documents(str(path))) == ["one\ntwo", "", "three"]
    assert list(documents(str(path), skip=1)) == ["", "three"]
    with pytest.raises(ValueError, match=r"no field 'txt'.*text_field=text$"):
        next(documents(str(path), field="txt"))
    with pytest.raises(ValueError, match=r"field 'n' .* holds int"):
        next(documents(str(path), field="n"))


def test_txt_is_paragraphs_or_lines(tmp_path):
    paragraphs, lines = tmp_path / "a.txt", tmp_path / "b.txt"
    paragraphs.write_text("first\nof it\n\nsecond\n\n\nthird\n")
    lines.write_text("first\n second\nthird\n")
    assert [d.strip() for d in documents(str(paragraphs))] == ["first\nof it", "second", "third"]
    assert list(documents(str(lines))) == ["first", " second", "third"]
    paragraphs.write_text("fourth\n")
    (tmp_path / ".hidden.txt").write_text("fifth\n")
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
        ("{tmp}/c.json", r"cannot read .*c\.json: "),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, name, message):
    for file in ("a.csv", "b.txt", "c.json"):
        (tmp_path / file).write_text('{"text": "a"\n{{{')
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        next(documents(name.format(tmp=tmp_path)))
    with pytest.raises(ValueError, match="text_split=test"):
        next(documents(str(tmp_path / "b.txt"), split="test"))


def test_a_hub_dataset_while_offline_is_refused_at_once(no_hub):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"owner/name is not in the local cache; set data.source.text"):
        next(documents("owner/name"))
    assert time.perf_counter() - start < 4
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_hangs_counts_as_offline(no_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: threading.Event().wait(10))
    start = time.perf_counter()
    assert not hub_reachable(timeout_seconds=0.2)
    assert time.perf_counter() - start < 2


def test_a_hub_that_answers_anything_is_reachable_and_offline_mode_asks_nothing(no_hub, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub_reachable()
        server.shutdown()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sessions: list[int] = []
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: sessions.append(1))
    assert not hub_reachable()
    assert not sessions


def test_text_identity_is_content(tmp_path, no_hub):
    def identity(path):
        return text_identity(str(path), split="train", config=None)

    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("same")
    b.write_text("same")
    assert identity(a) == identity(b)
    b.write_text("else")
    assert identity(a) != identity(b)
    on_hub = {"name": "owner/name", "config": "c", "split": "train", "revision": None}
    assert text_identity("owner/name", split="train", config="c") == on_hub
