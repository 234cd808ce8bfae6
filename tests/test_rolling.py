"""Rolling harvests: every row once an epoch within the budget, exact after any end, or refused in one line."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msae import harvest as harvest_command
from msae import train
from msae.data.activations import Activations, Data
from msae.data.batches import TrainBatches, ValBatches
from msae.data.datamodule import ActivationData
from msae.data.harvest import harvest
from msae.data.rolling import GB, HEADER, Rolling, roll
from msae.data.shards import MANIFEST, Shards
from msae.settings import decode
from msae.sources.forest import ForestSource
from msae.sources.int8 import quantise
from msae.sources.language_model import LanguageModelSource
from msae.sources.source import Chunk, Split
from tests.commands import SHORT, one_line, only_run, same_weights, start, wait_for
from tests.test_harvest import contents
from tests.tiny_lm import sentences, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
WIDTHS = {"hook": 2, "target": 3}


class Rows:
    """Two hooks whose rows hold their own number from 1 on (negative if held out), of chunks of 90 to 92 rows.

    Rows of the chunks `changed` are other ones; the chunk `fails` cannot be made.
    """

    name, budget_key, hook_names = "rows", "data.source.rows", list(WIDTHS)

    def __init__(
        self, count: int = 40, int8: bool = False, changed: tuple[int, ...] = (), fails: int = -1, pause: float = 0
    ) -> None:
        self.count, self.int8, self.changed, self.fails, self.pause = count, int8, changed, fails, pause
        self.made: list[int] = []

    def identity(self, hook_name: str) -> dict[str, Any]:
        return {"count": self.count, "int8": self.int8, "hook_name": hook_name}

    def provenance(self) -> dict[str, Any]:
        return {}

    def expected_rows(self) -> int:
        return self.count * 94

    def most_rows(self) -> tuple[int, int]:
        return 92, self.count * 2

    def width(self, hook_name: str) -> int:
        return WIDTHS[hook_name]

    def bytes_per_row(self, hook_name: str) -> int:
        return 4 + (4 + WIDTHS[hook_name] if self.int8 else 4 * WIDTHS[hook_name])

    def truth(self) -> None:
        return None

    def split(self, numbers: Tensor) -> Split:
        x = {hook: numbers[:, None].float() * torch.arange(1.0, d + 1) for hook, d in WIDTHS.items()}
        scales = {}
        if self.int8:
            for hook, rows in x.items():
                x[hook], scales[hook] = quantise(rows)
        return Split(x, {"position": numbers.int()}, scales)

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        first = 1
        for number in range(self.count):
            rows = torch.arange(first, first + 90 + number % 3)
            first += len(rows)
            if number < (state["next"] if state else 0):
                continue
            if number == self.fails:
                raise ValueError("the text cannot be reached any more")
            time.sleep(self.pause)
            self.made.append(number)
            rows = rows + 10_000 * (number in self.changed)
            yield Chunk({"train": self.split(rows), "val": self.split(-rows[:2])}, {"next": number + 1})


TOTAL = 40 * 91 - 1  # rows of the default


def gb(window: int = 2, source: Any = None, hooks: tuple[str, ...] = ("hook",)) -> float:
    """The least budget for windows of so many chunks."""
    source = source or Rows()
    row, headers = sum(source.bytes_per_row(hook) for hook in hooks), len(hooks) * HEADER
    chunk, val = source.most_rows()
    return (val * row + headers + 3 * window * (chunk * row + 2 * headers)) / GB


@pytest.fixture
def opened(tmp_path):
    """Opens a rolling harvest under a directory; all are closed at the end."""
    all_shards = []

    def open_(source: Any = None, name: str = "", budget: float | None = None, hooks=("hook",)) -> dict[str, Shards]:
        source = source or Rows()
        budget = budget or gb(source=source, hooks=hooks)
        shards, rolling = roll(source, list(hooks), tmp_path / name, budget, show=False)
        for each in shards.values():
            each.rolling = rolling  # for `close`
        all_shards.append(shards)
        return shards

    yield open_
    for shards in all_shards:
        close(shards)
    assert threads() == []


def close(shards: dict[str, Shards]) -> None:
    rolling: Rolling | None = next(iter(shards.values())).rolling
    if rolling is not None:
        rolling.close()


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("msae-")]


def numbers(batches: Any) -> list[int]:
    rows = torch.cat(list(batches))
    assert torch.equal(rows[:, 1], 2 * rows[:, 0])  # whole rows
    return rows[:, 0].round().long().tolist()


def trained(directory: Path) -> list[int]:
    return sorted(int(path.stem[6:]) for path in directory.glob("train-*.safetensors"))


# --- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 8, 50])
def test_every_row_comes_exactly_once_an_epoch(opened, window) -> None:
    """Windows of one chunk, that divide the epoch or do not, and one of all; batches of 77 straddle them."""
    source = Rows()
    length = 3 * TOTAL // 77 + 1
    batches = TrainBatches(opened(source, budget=gb(window))["hook"], 77, length, 0)
    rows = numbers(batches)
    epochs = [rows[i : i + TOTAL] for i in range(0, 3 * TOTAL, TOTAL)]
    assert all(sorted(epoch) == list(range(1, TOTAL + 1)) for epoch in epochs)
    size = window * 91  # rows of a window, about
    for epoch in epochs:
        assert max(epoch[: size - 2]) <= size + 2  # the first window comes first,
        assert sum(abs(a - b) == 1 for a, b in pairwise(epoch)) < 0.1 * TOTAL  # mixed
    assert sum(a == b for a, b in zip(*epochs[:2], strict=True)) < 0.1 * TOTAL  # in another order each time
    assert threads() == []
    if window == 3:  # of 273 rows each
        assert sum(b - a == 273 for a, b in zip(rows[:273], rows[273:546], strict=True)) < 30
    if window == 50:
        assert source.made == list(range(40))  # what fits the budget is made once
    if window == 1:
        assert len(source.made) > 100


@pytest.mark.parametrize("lag", [0, 1])
def test_two_ranks_read_every_row_once_however_far_they_are_apart(opened, lag) -> None:
    """One rank goes as fast as it can in a thread of its own, the other waits before every batch."""
    shards = opened()["hook"]
    length = 2 * TOTAL // 64 + 1
    ranks = [TrainBatches(shards, 32, length, 0, rank, 2) for rank in range(2)]
    got: list[list[int]] = [[], []]

    def read(rank: int) -> None:
        for batch in ranks[rank]:
            got[rank].append(numbers([batch]))
            time.sleep(0.005 * (rank == lag))

    other = threading.Thread(target=read, args=(1 - lag,))
    first = iter(ranks[0]) if lag == 0 else None
    other.start()
    read(lag)
    other.join(30)
    assert first is None or not other.is_alive()
    rows = [row for pair in zip(*got, strict=True) for part in pair for row in part]
    for place in (0, TOTAL):
        assert sorted(rows[place : place + TOTAL]) == list(range(1, TOTAL + 1))


def test_the_first_rank_does_not_end_before_there_is_what_the_last_one_reads(opened) -> None:
    """Their last batches are rows 320 … 352 and 352 … 384, the second window ends with row 363."""
    shards = opened(Rows(pause=0.1))["hook"]
    first, last = (TrainBatches(shards, 32, 6, 0, rank, 2) for rank in range(2))
    assert len({*numbers(first), *numbers(last)}) == 384


def test_another_process_of_the_same_run_reads_what_the_first_makes(opened, monkeypatch) -> None:
    mine = opened()["hook"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    source = Rows()
    theirs = opened(source)["hook"]
    monkeypatch.delenv("LOCAL_RANK")
    length = 2 * TOTAL // 64 + 1
    one, other = (iter(TrainBatches(s, 32, length, 0, r, 2)) for r, s in enumerate((mine, theirs)))
    rows = [numbers(pair) for pair in zip(one, other, strict=True)]
    assert sorted(sum(rows, [])[:TOTAL]) == list(range(1, TOTAL + 1))  # noqa: RUF017
    assert source.made == []
    mine.rolling.close()
    with pytest.raises(ValueError, match=r"^the harvest into \S+-rolling has stopped; resume [^\n]*$"):
        list(TrainBatches(theirs, 32, length, 0, 1, 2))


@pytest.mark.parametrize("int8", [False, True])
def test_transcoders_and_int8_rows(opened, int8) -> None:
    source = Rows(int8=int8)
    both = opened(source, hooks=("hook", "target"))
    batches = TrainBatches(both["hook"], 50, TOTAL // 50, 0, target=both["target"])
    seen = []
    for x, y in batches:
        assert (x.shape, y.shape) == ((50, 2), (50, 3))
        torch.testing.assert_close(x[:, 1:], 2 / 3 * y[:, 2:], rtol=0.02, atol=0)
        torch.testing.assert_close(x[:, :1], y[:, :1], rtol=0.02, atol=0)
        seen.append(x)
    if not int8:
        assert len({*numbers(seen)}) == len(batches) * 50
    (x, y), *_ = ValBatches(both["hook"], 50, target=both["target"])
    torch.testing.assert_close(x[:, 1:], 2 / 3 * y[:, 2:], rtol=0.02, atol=0)


def test_statistics_and_held_out_rows_are_those_of_the_first_window(opened) -> None:
    shards = opened(budget=gb(3))["hook"]
    list(TrainBatches(shards, 64, 100, 0))
    whole = Shards(harvest(Rows(3), shards.directory.parent / "whole", show=False)["hook"].directory)
    assert shards.manifest.window == 3
    assert shards.manifest.statistics == whole.manifest.statistics
    assert [e for e in whole.manifest.shards if e.split == "val"] == shards.manifest.shards
    assert sorted(shards.directory.glob("val-*")) == [shards.directory / f"val-0000{n}.safetensors" for n in range(3)]
    assert torch.equal(torch.cat(list(ValBatches(shards, 4))), torch.cat(list(ValBatches(whole, 4))))


def test_no_more_is_made_than_training_reads(opened) -> None:
    source = Rows()
    list(TrainBatches(opened(source)["hook"], 91, 7, 0))  # four windows of two chunks, and one chunk may be in hand
    assert 7 <= source.made[-1] <= 8


@pytest.mark.parametrize("hooks", [("hook",), ("hook", "target")])
def test_the_budget_is_never_exceeded(opened, tmp_path, hooks, monkeypatch) -> None:
    """A seventh chunk of wide rows does not fit by a little, also while it is being written."""
    for hook, width in (("hook", 200), ("target", 300)):
        monkeypatch.setitem(WIDTHS, hook, width)
    source, most, stop = Rows(80), [0], threading.Event()
    monkeypatch.setattr(Rows, "most_rows", lambda self: (92, 4))
    budget = 1.1 * gb(2, hooks=hooks)
    whole = harvest(Rows(80), tmp_path / "whole", show=False)
    size = sum(f.stat().st_size for hook in hooks for f in whole[hook].directory.glob("train-*.safetensors"))
    assert size > 8 * budget * GB

    def sample() -> None:
        while not stop.is_set():
            used = 0
            for path in (tmp_path / "rolling").rglob("*.safetensors*"):  # temporary names too
                try:
                    used += path.stat().st_size
                except FileNotFoundError:
                    continue
            most[0] = max(most[0], used)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        shards = opened(source, "rolling", budget, hooks)
        for _ in TrainBatches(shards["hook"], 50, 200, 0):
            time.sleep(0.001)
    finally:
        stop.set()
        sampler.join()
    assert 0.6 * budget * GB < most[0] <= budget * GB


# --- going on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["everything", "records", "damaged rows"])
@pytest.mark.parametrize("stops", [[0], [1], [7, 20], [TOTAL // 32, 1], [150, 100], [3, 3, 3, 3]])
def test_resuming_equals_going_on(opened, stops, left) -> None:
    """In the first window, later ones, at the end of an epoch, in the second; whatever is left on the disk."""
    whole = list(TrainBatches(opened(name="whole")["hook"], 32, 280, 5))
    got: list[Tensor] = []
    state = None
    for stop in [*stops, 280]:
        source = Rows()
        shards = opened(source, "parts")["hook"]
        batches = TrainBatches(shards, 32, 280, 5)
        if state is not None:
            batches.load_state_dict(state)
            here = len(got) * 32 % TOTAL
        iterator = iter(batches)
        got += list(islice(iterator, stop))
        iterator.close()
        if state is not None and left == "records" and stop > 0:
            assert abs(source.made[0] - here // 91) <= 2  # from there on, not from the start
        state = json.loads(json.dumps(batches.state_dict()))
        assert state["position"] == len(got)
        assert state["row_order"].endswith("in windows of 2 chunks")
        shards.rolling.close()
        for path in shards.directory.glob("train-*"):
            if left == "records":
                path.unlink()
            elif left == "damaged rows":
                path.write_bytes(path.read_bytes()[:-800] + bytes(800))
    assert len(got) == 280
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


TREE = ["data.source.rows=8000", "data.source.val_rows=400", "data.source.chunk_rows=400", "data.batch_tokens=128"]
ROLLING = [*TREE, *SHORT, "tokens=60_000", "trainer.val_check_interval=200", "data.rolling_gb=0.0003"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(call) -> None:
    assert call(train, *ROLLING, "run_dir=whole", "data.root=other")[0] == 0
    assert threads() == []
    with start(*ROLLING) as process:
        wait_for("runs/*/checkpoints/last.ckpt", process)
        wait_for("shards/*-rolling/chunk-00019.json", process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    run = only_run()
    assert not (run / "sae").exists(), "the run was not killed in time"
    (directory,) = Path("shards").iterdir()
    assert len(trained(directory)) < 20
    damaged = directory / f"train-{trained(directory)[-1]:05d}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"bad")  # as if it had not been synced: made again
    code, _, err = call(train, *ROLLING, "ckpt_path=last")
    assert code == 0, err
    same_weights(Path("whole"), run)
    assert len(list(Path("shards").iterdir())) == 1
    for change in ("data.rolling_gb=0.0006", "data.rolling_gb=null"):
        code, _, err = call(train, *ROLLING[:-1], change, "ckpt_path=last")
        assert code == 1
        assert "was started with data.rolling_gb=0.0003" in one_line(err)
    for record in directory.glob("chunk-0000[1-9].json"):
        record.unlink()
    (run / "sae").rename("gone")
    code, _, err = call(train, *ROLLING, "ckpt_path=last", "run_dir=" + str(run))
    assert code == 1
    assert "the checkpoint was made with chunks_read=" in one_line(err)


def test_a_source_that_gives_other_rows_is_refused(opened) -> None:
    """At a resume, and in the second epoch."""
    shards = opened()["hook"]
    batches = TrainBatches(shards, 32, 200, 0)
    iterator = iter(batches)
    list(islice(iterator, 40))
    iterator.close()
    state = batches.state_dict()
    close({"hook": shards})
    for path in shards.directory.glob("train-*"):
        path.unlink()
    opened_again = opened(Rows(changed=(14, 15)))
    again = TrainBatches(opened_again["hook"], 32, 200, 0)
    again.load_state_dict(state)
    message = rf"^{re.escape(str(shards.directory))}/train-00014.safetensors was made again and came out [^\n]*$"
    with pytest.raises(ValueError, match=message):
        list(again)
    assert 14 not in trained(shards.directory)
    close(opened_again)
    source = Rows()
    endless = iter(TrainBatches(opened(source, "second")["hook"], 32, 200, 0))
    list(islice(endless, 60))
    source.changed = tuple(range(30))  # whichever are made again
    with pytest.raises(ValueError, match=r"train-000[0-2]\d\.safetensors was made again and came out"):
        list(endless)


def test_a_source_that_ends_elsewhere_is_refused(opened) -> None:
    source = Rows()
    endless = iter(TrainBatches(opened(source)["hook"], 32, 300, 0))
    list(islice(endless, 100))
    source.count = 20
    with pytest.raises(ValueError, match=r"^rows ended after [23]\d chunks, not after 40 as [^\n]*$"):
        list(endless)


def test_a_state_of_other_rows_or_windows_is_refused(opened) -> None:
    def state(source: Any, name: str, window: int = 2) -> tuple[TrainBatches, dict[str, Any]]:
        batches = TrainBatches(opened(source, name, gb(window))["hook"], 32, 300, 0)
        iterator = iter(batches)
        list(islice(iterator, 20))  # 640 rows: chunks 0 to 7
        iterator.close()
        return batches, batches.state_dict()

    one, there = state(Rows(), "one")
    changed, other = state(Rows(changed=(7,)), "changed")
    later, same = state(Rows(changed=(8,)), "later")
    _, wider = state(Rows(), "wider", 3)
    one.load_state_dict(same)
    later.load_state_dict(there)
    assert there["epoch"] * TOTAL + there["row"] == 640
    refused = (one, other, "chunks_read=[0-9a-f]{16}"), (changed, there, "chunks_read=[0-9a-f]{16}")
    for batches, strange, what in (*refused, (one, wider, "row_order=128x256 in windows of 3 chunks")):
        with pytest.raises(ValueError, match=rf"^the checkpoint was made with {what}, this run has [^\n]*$"):
            batches.load_state_dict(strange)
    fresh = TrainBatches(opened(name="fresh")["hook"], 32, 300, 0)
    with pytest.raises(ValueError, match=r"this run has chunks_read=None, so the batches would differ"):
        fresh.load_state_dict(there)


# --- what goes wrong -------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_lets_go(opened) -> None:
    first = opened()
    with pytest.raises(ValueError, match=r"^another run is using \S+-rolling; wait for its end[^\n]*$"):
        opened()
    list(TrainBatches(first["hook"], 32, 10, 0))
    with pytest.raises(ValueError, match="another run"):
        opened()
    close(first)
    opened()


@pytest.mark.parametrize("at", [1, 9, 30])
def test_an_error_of_the_harvest_is_the_error_of_training(opened, at) -> None:
    shards: dict[str, Shards] = {}
    with pytest.raises(ValueError, match=r"^the text cannot be reached any more$"):
        list(TrainBatches(shards.setdefault("hook", opened(Rows(fails=at))["hook"]), 32, 10**6, 0))
    assert threads() == []
    if shards:
        close(shards)
    list(TrainBatches(opened()["hook"], 32, 10, 0))  # nothing is locked, nothing is lost


@pytest.mark.usefixtures("elsewhere")
def test_an_error_while_training_is_one_line_of_the_command(call, monkeypatch) -> None:
    chunks = ForestSource.chunks

    def failing(self: ForestSource, state: Any) -> Iterator[Chunk]:
        yield from islice(chunks(self, state), 7 - (state["chunks"] if state else 0))
        raise OSError("the text cannot be reached any more")

    monkeypatch.setattr(ForestSource, "chunks", failing)
    code, _, err = call(train, *ROLLING)
    assert code == 1
    assert one_line(err) == "error: the text cannot be reached any more"
    assert threads() == []


def test_no_thread_is_left_when_training_ends_fails_or_is_abandoned(opened, tmp_path) -> None:
    batches = TrainBatches(opened()["hook"], 16, 10**6, 0)
    for _ in batches:
        assert "msae-rolling" in threads()
        break
    assert threads() == []
    iterator = iter(batches)
    next(iterator)
    del iterator
    assert threads() == []
    batches.batch(0)
    assert threads() == []
    activations = Activations(Data(Rows(), batch_tokens=16, root=str(tmp_path / "data"), rolling_gb=gb()))
    data = ActivationData(activations)
    for end in (lambda: data.teardown("fit"), lambda: data.on_exception(RuntimeError()), activations.close):
        iterator = iter(TrainBatches(activations.shards, 16, 10**6, 0))
        next(iterator)
        assert "msae-rolling" in threads()
        end()
        assert "msae-rolling" not in threads()
        iterator.close()


@pytest.mark.parametrize("hooks", [("hook",), ("hook", "target")])
def test_a_budget_too_small_names_one_that_does(opened, tmp_path, hooks) -> None:
    with pytest.raises(ValueError, match=r"^data\.rolling_gb=1e-08 is too small [^\n]*$") as caught:
        opened(budget=1e-8, hooks=hooks)
    named = float(re.search(r"set it to (\S+) or more", str(caught.value))[1])
    assert gb(1, hooks=hooks) <= named < 1.02 * gb(1, hooks=hooks)
    assert not list(tmp_path.iterdir())
    shards = opened(budget=named, hooks=hooks)
    assert shards["hook"].manifest.window == 1
    list(TrainBatches(shards["hook"], 90, 50, 0))


def test_other_windows_are_refused(opened) -> None:
    close(opened())
    with pytest.raises(ValueError, match=r"^\S+-rolling has windows of 2 chunks, data\.rolling_gb=\S+ makes them 4; "):
        opened(budget=gb(4))


def test_a_whole_harvest_is_used(opened, tmp_path) -> None:
    whole = harvest(Rows(), tmp_path, show=False)["hook"]
    before = contents(tmp_path)
    shards = opened()["hook"]
    assert shards.directory == whole.directory
    assert shards.rolling is None
    assert contents(tmp_path) == before


def test_a_rolling_harvest_is_not_mistaken_for_a_whole_one(opened, tmp_path) -> None:
    shards = opened()["hook"]
    assert shards.directory.name.endswith("-rolling")
    with pytest.raises(ValueError, match=r"^\S+-rolling is a rolling harvest, of which only some windows [^\n]*$"):
        Shards(shards.directory)
    whole = harvest(Rows(), tmp_path, show=False)["hook"]
    assert whole.rows("train") == [90 + n % 3 for n in range(40)]
    assert json.loads((shards.directory / MANIFEST).read_text())["identity_hash"] == whole.manifest.identity_hash


def test_stopping_after_an_epoch_is_refused() -> None:
    source = {"_target_": "msae.sources.forest.ForestSource"}
    with pytest.raises(ValueError, match=r"^data\.exhausted=stop needs [^\n]*data\.rolling_gb[^\n]*$"):
        decode(Data, {"source": source, "exhausted": "stop", "rolling_gb": 1}, "data")


@pytest.mark.usefixtures("elsewhere")
def test_the_harvest_command_refuses_in_one_line(call) -> None:
    code, _, err = call(harvest_command, *ROLLING[:4], "data.rolling_gb=1")
    assert code == 1
    assert one_line(err).startswith("error: data.rolling_gb=1 harvests while training reads: run python -m msae.train")
    assert not Path("shards").exists()


# --- language models -------------------------------------------------------------------------------------------


def test_a_language_model_harvested_in_windows_gives_the_rows_of_a_whole_harvest(opened, tmp_path) -> None:
    """Two epochs of windows, stopped once in the middle, bit for bit the rows of a harvest at once."""
    (tmp_path / "text.txt").write_text("\n".join(sentences(300)))
    model = str(tiny_model(tmp_path / "model"))

    def source() -> LanguageModelSource:
        return LanguageModelSource(
            model=model, hook_names=["blocks.1.hook_resid_pre"], text=str(tmp_path / "text.txt"), tokens=4000,
            context=32, val_fraction=0.2, chunk_tokens=512, val_tokens=300,
        )  # fmt: skip

    hook = "blocks.1.hook_resid_pre"
    whole = harvest(source(), tmp_path / "whole", show=False)[hook]
    expected = torch.cat([whole.activations("train", n) for n in range(len(whole.rows("train")))])
    batches, got, state = None, [], None
    for stop in (100, 10**6):
        shards, rolling = roll(source(), [hook], tmp_path / "rolling", 0.0002, show=False)
        assert 1 <= rolling.known.window <= 2
        batches = TrainBatches(shards[hook], 32, 2 * len(expected) // 32, 0)
        if state is not None:
            batches.load_state_dict(state)
        iterator = iter(batches)
        got += list(islice(iterator, stop))
        iterator.close()
        state = batches.state_dict()
        rolling.close()
    rows = torch.cat(got)

    def in_order(x: Tensor) -> list[tuple[float, ...]]:
        return sorted(map(tuple, x.float().tolist()))

    assert in_order(rows[: len(expected)]) == in_order(expected)
    assert not torch.equal(rows[: len(rows) - len(expected)], rows[len(expected) :])  # in another order
    assert {*in_order(rows[len(expected) :])} <= {*in_order(expected)}
    assert os.listdir(tmp_path / "rolling")[0].endswith("-rolling")
