"""Rows in memory alone: every row once a pass within the budget, exact after any end, or refused in one line."""

import gc
import json
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msae import evaluate, explore, train
from msae.data import pool
from msae.data.activations import Activations, Data
from msae.data.batches import TrainBatches, ValBatches
from msae.data.datamodule import ActivationData
from msae.data.harvest import GB, harvest
from msae.data.order import Spread
from msae.data.stream import BESIDE, Stream, open_stream
from msae.settings import decode
from msae.sources.forest import ForestSource
from msae.sources.language_model import LanguageModelSource
from msae.sources.source import Chunk, Split
from tests.commands import ENVIRONMENT, SHORT, one_line, only_run, same_weights, start, wait_for
from tests.fake_cuda import fake_cuda
from tests.sources import FakeSource
from tests.test_harvest import contents
from tests.tiny_lm import sentences, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
WIDTHS = {"hook": 2, "target": 3}
CHUNKS, SIZE, MOST = 40, 91, 92  # 90 to 92 rows in a chunk
TOTAL = CHUNKS * SIZE - 1


class Rows(FakeSource):
    """Two hooks whose rows hold their own number from 1 on (negative if held out).

    Chunks have `size` to `size` + 2 rows. Rows of the chunks `changed` are other ones; the chunk `fails` cannot be
    made.
    """

    name = "rows"

    def __init__(
        self,
        count: int = CHUNKS,
        dtype: torch.dtype = torch.float32,
        changed: tuple[int, ...] = (),
        fails: int = -1,
        pause: float = 0,
        widths: dict[str, int] = WIDTHS,
        size: int = 90,
    ) -> None:
        super().__init__(widths, dtype, count * (size + 4), count=count)
        self.count, self.changed, self.fails, self.pause, self.size = count, changed, fails, pause, size
        self.made: list[int] = []

    def most_rows(self) -> tuple[int, int]:
        return self.size + 2, 2 * self.count

    def truth(self) -> None:
        return None

    def rows_of(self, number: int, rows: Tensor) -> Split:
        if rows[0] > 0:
            if number == self.fails:
                raise ValueError("the text cannot be reached any more")
            time.sleep(self.pause)
            self.made.append(number)
            rows = rows + 10_000 * (number in self.changed)
        x = {hook: rows[:, None].float() * torch.arange(1.0, d + 1) for hook, d in self.widths.items()}
        return self.split(x, position=rows.int())

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        first = 1
        for number in range(self.count):
            rows = torch.arange(first, first + self.size + number % 3)
            first += len(rows)
            if number >= (state["next"] if state else 0):
                splits = {"train": partial(self.rows_of, number, rows), "val": partial(self.rows_of, number, -rows[:2])}
                yield Chunk(splits, {"next": number + 1})


def gb(held: int = 2, source: Any = None, hooks: tuple[str, ...] = ("hook",)) -> float:
    """The least budget that holds so many chunks."""
    source = source or Rows()
    most, val = source.most_rows()
    return (val + (held + BESIDE) * most) * sum(source.bytes_per_row(hook) for hook in hooks) / GB * (1 + 1e-9)


@pytest.fixture
def opened(tmp_path):
    """Opens rows in memory; all streams are closed at the end."""
    streams: list[Stream | None] = []

    def open_(source: Any = None, held: int = 2, hooks=("hook",), **more: Any) -> dict[str, Any]:
        source = source or Rows()
        rows, stream = open_stream(source, list(hooks), tmp_path, gb(held, source, hooks), show=False, **more)
        streams.append(stream)
        return rows

    yield open_
    for stream in filter(None, streams):
        stream.close()
    assert threads() == []


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("msae-")]


def numbers(batches: Any) -> list[int]:
    rows = torch.cat(list(batches))
    assert torch.equal(rows[:, 1], 2 * rows[:, 0])  # whole rows
    return rows[:, 0].round().long().tolist()


def chunk_of(row: int) -> int:
    return next(n for n in range(CHUNKS) if row <= 90 * (n + 1) + sum(k % 3 for k in range(n + 1)))


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", range(1, 7))
@pytest.mark.parametrize("parts", [1, 3])
def test_a_chunk_is_read_in_equal_shares_and_no_more_is_held_than_that(held, parts) -> None:
    spread, sizes, read = Spread(held, parts), [1000 + n % 3 for n in range(60)], defaultdict(list)
    for turn in range(40):
        live = spread.chunks(turn)
        assert list(live) == [c for c in range(60) if 0 <= turn - spread.first_turn(c) < spread.span]
        left = sum(sizes[c] - spread.rows(c, sizes[c], turn, 0)[0] for c in live)
        assert abs(left - held * 1001) < 2 * held + 1
        rows = 0
        for part in range(parts):
            spans = {c: spread.rows(c, sizes[c], turn, part) for c in live}
            for chunk, (a, b) in spans.items():
                read[chunk] += range(a, b)
            rows += (in_pool := sum(b - a for a, b in spans.values()))
            assert abs(in_pool - 1001 / parts) <= spread.span + 2
            assert len(live) == max(held + turn - (turn >= spread.span) * (turn - spread.span + held), held)
    done = [c for c in range(60) if spread.first_turn(c) + spread.span <= 40]
    assert len(done) > 20
    for chunk in done:
        assert read[chunk] == list(range(sizes[chunk]))


@pytest.mark.parametrize("held", [1, 3, 8])
def test_every_row_comes_once_a_pass_near_its_place(opened, held) -> None:
    """Over more than three passes; batches of 77 straddle pools. Only the first turns read before their place."""
    source = Rows()
    rows = numbers(TrainBatches(opened(source, held)["hook"], 77, 7 * TOTAL // (2 * 77), 0))
    places = defaultdict(list)
    for place, row in enumerate(rows):
        places[row].append(place)
    for row in range(1, TOTAL + 1):
        for a_pass, place in enumerate(places[row]):
            chunk = a_pass * CHUNKS + chunk_of(row)
            first, last = (chunk - held + 1, chunk + held) if chunk >= held else (0, 2 * held - 1)
            assert SIZE * first - 2 * held - 2 <= place < SIZE * last + 2 * held + 2
        assert (len(rows) - held * SIZE) // TOTAL <= len(places[row]) <= (len(rows) + held * SIZE) // TOTAL + 1
    assert sum(abs(a - b) == 1 for a, b in pairwise(rows)) < 0.06 * len(rows)
    if held > 1:
        assert sum(b - a == TOTAL for a, b in zip(rows, rows[TOTAL:], strict=False)) < 0.1 * len(rows)
    counts = Counter(source.made)
    assert max(counts.values()) <= 5
    assert threads() == []


def test_rows_of_a_chunk_meet_those_of_others(opened) -> None:
    """A batch of 91 rows from a pool of 5 chunks held has rows of 9, none with more than a third of them."""
    batches = list(TrainBatches(opened(held=5)["hook"], 91, 30, 0))
    for batch in batches[12:]:
        of_chunks = Counter(chunk_of(row) for row in numbers([batch]))
        assert 8 <= len(of_chunks) <= 11
        assert max(of_chunks.values()) < 30


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_reads_its_own_chunks_however_far_they_are_apart(opened, world) -> None:
    got = []
    for rank in range(world):
        source = Rows()
        got.append(numbers(TrainBatches(opened(source)["hook"], 32, 30, 0, rank, world)))
        assert {chunk_of(row) % world for row in got[-1]} == {rank}
        assert len(got[-1]) == len(set(got[-1]))
        assert set(source.made[2:]) <= set(range(rank, CHUNKS, world))
    assert len(set().union(*got)) == world * 960


def test_a_rank_without_a_chunk_is_one_line(opened) -> None:
    with pytest.raises(ValueError, match=r"^rows has no chunk for rank 3 of 4; [^\n]*$"):
        list(TrainBatches(opened(Rows(3), held=1)["hook"], 32, 30, 0, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_transcoders_types_and_rows_on_a_device(opened, dtype, device) -> None:
    """On a device the rows are tensors, else arrays; the batches are the same."""
    held = 2 if device is None else 3  # there, nothing is given back before a chunk is read, so fewer are held
    both = opened(Rows(dtype=dtype), held, hooks=("hook", "target"), device=device)
    pairs = list(TrainBatches(both["hook"], 50, 60, 0, target=both["target"]))
    for x, y in pairs:
        assert (x.shape, y.shape, x.dtype) == ((50, 2), (50, 3), both["hook"].dtype)
        torch.testing.assert_close(x[:, 1:].float(), 2 / 3 * y[:, 2:].float(), rtol=0.02, atol=0)
    plain = list(TrainBatches(opened(Rows(dtype=dtype), device=None)["hook"], 50, 60, 0))
    for (x, _), expected in zip(pairs, plain, strict=True):
        assert torch.equal(x, expected)
    if dtype == torch.float32:
        assert len({*numbers(plain)}) == len(plain) * 50
    (x, y), *_ = ValBatches(both["hook"], 50, target=both["target"])
    torch.testing.assert_close(x[:, 1:].float(), 2 / 3 * y[:, 2:].float(), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_rows_wait_on_the_gpu_of_their_rank(opened, dtype) -> None:
    """Which is where the thread makes them too; a few rows at a time go there."""
    expected = list(TrainBatches(opened(Rows(dtype=dtype), 3, device="cpu")["hook"], 50, 60, 0))
    with fake_cuda(current=1) as device, pytest.MonkeyPatch.context() as patch:
        current: list[tuple[str, int]] = []
        patch.setattr(
            torch.cuda, "set_device", lambda number: current.append((threading.current_thread().name, number))
        )
        patch.setattr(pool, "STAGED", 7)
        got = list(TrainBatches(opened(Rows(dtype=dtype), 3, device="cuda")["hook"], 50, 60, 0))
        assert current == [("msae-pool", 1)]
        assert {batch.device for batch in got} == {device}
        assert all(torch.equal(batch.cpu(), other) for batch, other in zip(got, expected, strict=True))


def test_statistics_and_held_out_rows_are_those_of_the_first_chunks(opened, tmp_path) -> None:
    rows = opened(held=3)["hook"]
    disk = harvest(Rows(3), tmp_path / "disk", show=False)["hook"]
    assert torch.equal(rows.mean, disk.mean)
    assert rows.mean_square == disk.mean_square
    assert torch.equal(torch.cat(list(ValBatches(rows, 4))), torch.cat(list(ValBatches(disk, 4))))
    list(TrainBatches(rows, 64, 100, 0))
    assert torch.equal(torch.cat(list(ValBatches(rows, 4))), torch.cat(list(ValBatches(disk, 4))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_rows_that_all_fit_are_read_as_from_disk_and_made_once(opened, tmp_path, dtype) -> None:
    source = Rows(dtype=dtype)
    rows, disk = opened(source, held=CHUNKS)["hook"], harvest(Rows(dtype=dtype), tmp_path / "disk", show=False)["hook"]
    for rank in range(2):
        pairs = zip(*(TrainBatches(r, 32, 150, 3, rank, 2) for r in (rows, disk)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert source.made == list(range(CHUNKS))
    assert (rows.identity, rows.name, rows.rows("train")) == (disk.identity, disk.name, disk.rows("train"))
    assert torch.equal(rows.mean, disk.mean)
    assert rows.mean_square == disk.mean_square
    for split in ("train", "val"):
        assert torch.equal(rows.activations(split, 2), disk.activations(split, 2))
        assert torch.equal(rows.index(split, 2)["position"], disk.index(split, 2)["position"])


def test_no_more_is_made_than_training_reads(opened) -> None:
    source = Rows()
    list(TrainBatches(opened(source)["hook"], 91, 7, 0))  # seven turns, of chunks 0 to 7
    assert source.made in (list(range(8)), list(range(9)))


SIZED = """
import sys
from pathlib import Path
from tests.test_pool import GB, Rows, gb
from msae.data.batches import TrainBatches
from msae.data.stream import open_stream
from msae.training.memory import keep_freed_memory
import torch

source = Rows(30, widths={"hook": 64}, size=100_000)
keep_freed_memory()
budget = gb(int(sys.argv[1]), source)
def now(kind):
    return int(Path("/proc/self/status").read_text().split(kind)[1].split()[1]) * 1024
torch.ones(100_000, 64).double().square().sum(0)  # what the first use of torch takes
before = now("RssAnon")
rows, stream = open_stream(source, ["hook"], Path("none"), budget, show=False)
most = now("RssAnon")
for batch in TrainBatches(rows["hook"], 4096, 350, 0):
    most = max(most, now("RssAnon"))
assert not stream.is_whole
print((most - before) / GB, budget)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("held", [2, 8])
def test_the_process_takes_no_more_than_the_budget(held) -> None:
    """Of 30 chunks of 26 MB, with malloc told to keep what is freed, as in training; batches come on top."""
    done = subprocess.run([sys.executable, "-c", SIZED, str(held)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    taken, budget = map(float, done.stdout.split())
    assert 0.5 * budget < taken < budget + 0.05


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [1, 2, 5])
@pytest.mark.parametrize("stops", [[0], [1], [7, 20], [TOTAL // 32, 1], [150, 100], [3, 3, 3, 3]])
def test_resuming_equals_going_on(opened, stops, held) -> None:
    """In the first turn, in later ones, at the end of a pass, in the second."""
    whole = list(TrainBatches(opened(held=held)["hook"], 32, 280, 5))
    got: list[Tensor] = []
    state = None
    for stop in [*stops, 280]:
        source = Rows()
        batches = TrainBatches(opened(source, held, resuming=state is not None)["hook"], 32, 280, 5)
        if state is not None:
            batches.load_state_dict(state)
        here = len(got) * 32
        iterator = iter(batches)
        got += list(islice(iterator, stop))
        iterator.close()
        if state is not None and stop > 0 and here < TOTAL:
            assert source.made[0] >= max(0, here // SIZE - held - 1)  # from there on, not from the start
        state = json.loads(json.dumps(batches.state_dict()))
        assert state["position"] == len(got)
        again = json.loads(json.dumps(batches.state_dict()))
        assert again == state
    assert len(got) == 280
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


def test_the_same_batches_go_on_after_a_pause(opened) -> None:
    """Two iterators of one object, one after the other, also from the start again."""
    rows, whole = opened()["hook"], list(TrainBatches(opened()["hook"], 32, 60, 0))
    batches, got = TrainBatches(rows, 32, 60, 0), []
    for stop in (0, 10, 1, 30):
        iterator = iter(batches)
        got += list(islice(iterator, stop))
        iterator.close()
    assert all(torch.equal(a, b) for a, b in zip([*got, *batches], whole, strict=True))


TREE = ["data.source.rows=8000", "data.source.val_rows=400", "data.source.chunk_rows=400", "data.batch_tokens=128"]
STREAMED = [*TREE, *SHORT, "tokens=60_000", "trainer.val_check_interval=200", "data.memory_gb=0.0003"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(call, signum) -> None:
    assert call(train, *STREAMED, "run_dir=whole")[0] == 0
    assert threads() == []
    with start(*STREAMED) as process:
        wait_for("runs/*/checkpoints/last.ckpt", process)
        process.send_signal(signum)
        _, printed = process.communicate()
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), printed
    run = only_run()
    assert not (run / "sae").exists(), "the run was not killed in time"
    code, _, err = call(train, *STREAMED, "ckpt_path=last")
    assert code == 0, err
    same_weights(Path("whole"), run)
    assert not Path("shards").exists()
    for change in ("data.memory_gb=0.0006", "data.memory_gb=null"):
        code, _, err = call(train, *STREAMED[:-1], change, "ckpt_path=last")
        assert code == 1
        assert "was started with data.memory_gb=0.0003" in one_line(err)


@pytest.mark.usefixtures("elsewhere")
def test_what_was_streamed_is_evaluated_and_explored_without_a_shard(call) -> None:
    """The held-out rows are made again; a config from elsewhere calls nothing but a source of msae."""
    assert call(train, *STREAMED, "run_dir=run")[0] == 0
    config = Path("run/config.yaml")
    on_gpu = config.read_text().replace("  memory_gb:", "  memory_device: cuda\n  memory_gb:")  # of another machine
    config.write_text(on_gpu)
    code, _, err = call(evaluate, "sae=run", "out=out")
    assert code == 0, err
    (of_sae,) = json.loads(Path("out/evaluation.json").read_text())["saes"].values()
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert of_sae["figures"] == {key: metrics[key] for key in of_sae["figures"]}
    code, _, err = call(explore, "run=run", "tokens=1000", "keep_firings=false")
    assert code == 0, err
    assert Path("run/report.html").is_file()
    assert not Path("shards").exists()
    text = config.read_text()
    assert "memory_device: cuda" in text
    config.write_text(text.replace("rows: 8000", "rows: 7999"))
    code, _, err = call(evaluate, "sae=run")
    assert code == 1
    assert re.search("that run streamed its rows from has changed since; give shards=", one_line(err))
    config.write_text(text)
    config.write_text(config.read_text().replace("msae.sources.forest.ForestSource", "os.mkdir"))
    code, _, err = call(evaluate, "sae=run")
    assert code == 1
    assert one_line(err).startswith("error: run streamed its rows from os.mkdir, which")


@pytest.mark.usefixtures("elsewhere")
def test_two_processes_stop_and_go_on(call) -> None:
    """Each makes its own chunks again; the checkpoint has the state of both."""
    both = [*STREAMED, "trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "tokens=40_000"]
    with start(*both, "run_dir=whole") as process:
        _, printed = process.communicate()
    assert process.returncode == 0, printed
    with start(*both, "run_dir=run") as process:
        wait_for("run/checkpoints/last.ckpt", process)
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, printed
    state = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    ranks = next(parts_with("feed", state))["feed"]["ranks"]
    assert ranks[0]["checksums"] != ranks[1]["checksums"]
    with start(*both, "run_dir=run", "ckpt_path=last") as process:
        _, printed = process.communicate()
    assert process.returncode == 0, printed
    same_weights(Path("whole"), Path("run"))


def parts_with(key: str, tree: Any) -> Iterator[dict[str, Any]]:
    """Every dict within a tree that has this key."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree
        for value in tree.values():
            yield from parts_with(key, value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from parts_with(key, value)


def test_a_source_that_gives_other_rows_is_refused(opened) -> None:
    """At a resume, and in the second pass."""
    batches = TrainBatches(opened()["hook"], 32, 200, 0)
    iterator = iter(batches)
    list(islice(iterator, 40))
    iterator.close()
    state = batches.state_dict()
    again = TrainBatches(opened(Rows(changed=(13, 14)), resuming=True)["hook"], 32, 200, 0)
    again.load_state_dict(state)
    with pytest.raises(ValueError, match=r"^chunk 13 of rows was made again and came out with checksum [^\n]*$"):
        list(again)
    source = Rows()
    endless = iter(TrainBatches(opened(source)["hook"], 32, 200, 0))
    list(islice(endless, 60))
    source.changed = (5,)
    with pytest.raises(ValueError, match=r"^chunk 5 of rows was made again and came out"):
        list(endless)


@pytest.mark.parametrize("count", [30, 50])
def test_a_source_that_ends_elsewhere_is_refused(opened, count) -> None:
    source = Rows()
    endless = iter(TrainBatches(opened(source)["hook"], 32, 400, 0))
    list(islice(endless, 140))  # in the second pass
    source.count = count
    with pytest.raises(ValueError, match=r"^(rows ended after \d+ chunks, not after 40|rows has more than 40)[^\n]*$"):
        list(endless)


def test_a_state_of_other_rows_or_of_another_pool_is_refused(opened) -> None:
    def state(source: Any, held: int = 2) -> tuple[TrainBatches, dict[str, Any]]:
        batches = TrainBatches(opened(source, held)["hook"], 32, 300, 0)
        iterator = iter(batches)
        list(islice(iterator, 20))
        iterator.close()
        return batches, batches.state_dict()

    one, _ = state(Rows())
    _, wider = state(Rows(), 3)
    _, other = state(Rows(41))
    for strange, what in ((wider, "row_order=3 chunks held, 4 pools a turn"), (other, "shards=[0-9a-f]{12}")):
        with pytest.raises(ValueError, match=rf"^the checkpoint was made with {what}, this run has [^\n]*$"):
            one.load_state_dict(strange)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 9, 30])
def test_an_error_of_the_source_is_the_error_of_training(opened, at) -> None:
    with pytest.raises(ValueError, match=r"^the text cannot be reached any more$"):
        list(TrainBatches(opened(Rows(fails=at))["hook"], 32, 10**6, 0))
    assert threads() == []


@pytest.mark.usefixtures("elsewhere")
def test_an_error_while_training_is_one_line_of_the_command(call, monkeypatch) -> None:
    chunks = ForestSource.chunks

    def failing(self: ForestSource, state: Any) -> Iterator[Chunk]:
        yield from islice(chunks(self, state), 9 - (state["chunks"] if state else 0))
        raise OSError("the text cannot be reached any more")

    monkeypatch.setattr(ForestSource, "chunks", failing)
    code, _, err = call(train, *STREAMED)
    assert code == 1
    assert one_line(err) == "error: the text cannot be reached any more"
    assert threads() == []


def test_no_thread_is_left_when_training_ends_fails_or_is_abandoned(opened, tmp_path) -> None:
    batches = TrainBatches(opened()["hook"], 16, 10**6, 0)
    for _ in batches:
        assert "msae-pool" in threads()
        break
    assert threads() == []
    iterator = iter(batches)
    next(iterator)
    del iterator
    assert threads() == []
    activations = Activations(Data(Rows(), batch_tokens=16, root=str(tmp_path / "data"), memory_gb=gb()))
    data = ActivationData(activations)
    for end in (lambda: data.teardown("fit"), lambda: data.on_exception(RuntimeError()), activations.close):
        iterator = iter(TrainBatches(activations.rows, 16, 10**6, 0))
        next(iterator)
        assert "msae-pool" in threads()
        end()
        assert "msae-pool" not in threads()
        iterator.close()


@pytest.mark.parametrize("hooks", [("hook",), ("hook", "target")])
def test_a_budget_too_small_names_one_that_does(tmp_path, hooks) -> None:
    with pytest.raises(ValueError, match=r"^data\.memory_gb=1e-08 is too small [^\n]*$") as caught:
        open_stream(Rows(), list(hooks), tmp_path, 1e-8)
    named = float(re.search(r"set it to (\S+) or more", str(caught.value))[1])
    assert gb(1, hooks=hooks) <= named * (1 + 1e-6) < 1.02 * gb(1, hooks=hooks)
    rows, stream = open_stream(Rows(), list(hooks), tmp_path, named, show=False)
    assert stream.spread == Spread(1, 4)
    assert len(rows) == len(hooks)


def test_more_than_the_machine_has_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Rows, "expected_rows", lambda self: 10**13)
    with pytest.raises(ValueError, match=r"^data\.memory_gb=1e\+06, this machine has \d+\.\d GB; [^\n]*$"):
        open_stream(Rows(), ["hook"], tmp_path, 1e6)


def test_a_source_without_rows_is_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^the source rows gave no training rows; [^\n]*$"):
        open_stream(Rows(0), ["hook"], tmp_path, 1.0, show=False)


def test_rows_that_are_not_finite_are_one_line(opened) -> None:
    source = Rows()
    source.split = lambda rows, **index: Split({h: x * float("nan") for h, x in rows.items()}, index)
    with pytest.raises(ValueError, match=r"^hook has rows with NaN or Inf, [^\n]*$"):
        opened(source)


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_row_that_is_not_finite_is_one_line_wherever_it_comes(opened, split, monkeypatch) -> None:
    """Held out, or in a chunk that comes while training reads."""
    rows_of = Rows.rows_of

    def spoilt(self: Rows, number: int, rows: Tensor) -> Split:
        made = rows_of(self, number, rows)
        if split == "val" if rows[0] < 0 else (split == "train" and number == 9):
            made.activations["hook"][1, 1] = float("nan")
        return made

    monkeypatch.setattr(Rows, "rows_of", spoilt)
    with pytest.raises(ValueError, match=r"^hook has rows with NaN or Inf, [^\n]*$"):
        list(TrainBatches(opened()["hook"], 32, 100, 0))


def test_a_thread_that_ends_late_touches_nothing(opened, monkeypatch) -> None:
    """A chunk takes longer than `halt` waits: its rows are not kept, and the next iteration has its own."""
    whole = list(TrainBatches(opened()["hook"], 32, 60, 0))
    batches = TrainBatches(opened()["hook"], 32, 60, 0)
    begun, go_on, rows_of, join = threading.Event(), threading.Event(), Rows.rows_of, threading.Thread.join

    def slow(self: Rows, number: int, rows: Tensor) -> Split:
        if number == 10 and rows[0] > 0 and not begun.is_set():  # ahead of the 24 batches that are asked for
            begun.set()
            assert go_on.wait(30)
        return rows_of(self, number, rows)

    monkeypatch.setattr(Rows, "rows_of", slow)
    monkeypatch.setattr(
        threading.Thread, "join", lambda self, seconds=None: join(self, 0 if seconds == 10 else seconds)
    )
    iterator = iter(batches)
    got = list(islice(iterator, 20))
    assert begun.wait(30)
    late = batches.feed._thread
    iterator.close()
    assert late.is_alive()
    go_on.set()
    join(late, 30)
    assert not late.is_alive()
    assert batches.feed._kept == {}
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip([*got, *batches], whole, strict=True))


def test_a_whole_harvest_is_used(opened, tmp_path) -> None:
    whole = harvest(Rows(), tmp_path, show=False)["hook"]
    before = contents(tmp_path)
    source = Rows()
    assert opened(source)["hook"].directory == whole.directory
    assert source.made == []
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exhausted": "stop", "memory_gb": 1}, "data.exhausted=stop needs the number of rows before training"),
        ({"memory_device": "cuda"}, "data.memory_device=cuda is of rows in memory; give data.memory_gb too"),
        ({"memory_device": "cuda", "memory_gb": 1}, "data.memory_device=cuda, but PyTorch sees no GPU"),
        ({"memory_device": "tpu", "memory_gb": 1}, "data.memory_device=tpu"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings, message, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = {"_target_": "msae.sources.forest.ForestSource"}
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        decode(Data, {"source": source, **settings}, "data")


# --- a language model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("lm")
    tiny_model(directory / "model")
    (directory / "text.txt").write_text("\n\n".join(sentences(900)))
    hook = "blocks.1.hook_resid_pre"
    return {
        "model": str(directory / "model"),
        "text": str(directory / "text.txt"),
        "hook_names": [hook],
        "tokens": 3000,
        "context": 16,
        "chunk_tokens": 256,
        "val_fraction": 0.1,
    }


@pytest.mark.parametrize("stop", [3, 30, 70])
def test_a_language_model_is_streamed_and_resumed(language_model, tmp_path, stop) -> None:
    """Passes, ranks and states as of any source; the model goes when nobody reads any more."""

    def batches(source: LanguageModelSource, **more: Any) -> TrainBatches:
        rows, stream = open_stream(source, source.hook_names, tmp_path, 0.0003, show=False, **more)
        assert not stream.is_whole
        return TrainBatches(rows[source.hook_names[0]], 64, 80, 0)

    whole = list(batches(LanguageModelSource(**language_model)))
    source = LanguageModelSource(**language_model)
    first = batches(source)
    iterator = iter(first)
    got = list(islice(iterator, stop))
    iterator.close()
    assert "_bridge" not in source.__dict__
    again = batches(LanguageModelSource(**language_model), resuming=True)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for a, b in zip([*got, *again], whole, strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.iterdir())


def test_one_language_model_at_a_time_is_loaded(language_model, tmp_path, monkeypatch) -> None:
    """Also where a pass follows another."""
    load, loaded, alive = LanguageModelSource.load_model, [], []

    def counting(self: LanguageModelSource, *given: Any) -> Any:
        gc.collect()
        alive.append(sum(bridge() is not None for bridge in loaded))
        loaded.append(weakref.ref(bridge := load(self, *given)))
        return bridge

    monkeypatch.setattr(LanguageModelSource, "load_model", counting)
    source = LanguageModelSource(**language_model)
    rows, _ = open_stream(source, source.hook_names, tmp_path, 0.0003, show=False)
    list(TrainBatches(rows[source.hook_names[0]], 64, 150, 0))  # of 3000 rows
    assert len(alive) >= 3
    assert set(alive) == {0}
