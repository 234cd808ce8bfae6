"""Batches: every row exactly once an epoch, a pure function of their number, mixed, resumable, and never a copy."""

import gc
import json
import os
import re
import struct
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from msae.data.batches import RowOrder, TrainBatches, ValBatches, prefetched
from msae.data.datamodule import ActivationData
from msae.data.harvest import harvest
from msae.data.shards import Shards, checksum_of_ends
from msae.data.source import Chunk, Split

FACTORS = {"hook": [1.0, -1.0], "target": [2.0, 3.0, -1.0]}


class Numbered:
    """Shards of given sizes whose rows hold their own number times FACTORS, train from 0 and val from 0.

    The index of the shard `other`, a split and a number, is not the usual one, and the identity does not say so.
    """

    name, budget_key = "numbered", "data.source.rows"

    def __init__(
        self,
        train: list[int],
        val: list[int],
        hook_names: tuple[str, ...] = ("hook",),
        seed: int = 0,
        other: tuple[str, int] | None = None,
    ) -> None:
        self.sizes = {"train": train, "val": val}
        self.hook_names, self.seed, self.other = hook_names, seed, other

    def identity(self, hook_name: str) -> dict[str, Any]:
        return {**self.sizes, "seed": self.seed, "hook_name": hook_name}

    def provenance(self) -> dict[str, Any]:
        return {}

    def expected_rows(self) -> int:
        return sum(map(sum, self.sizes.values()))

    def most_rows(self) -> tuple[int, int]:
        return max(self.sizes["train"]), sum(self.sizes["val"])

    def d_in(self, hook_name: str) -> int:
        return len(FACTORS[hook_name])

    def bytes_per_row(self, hook_name: str) -> int:
        return 8

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        for number in range(max(map(len, self.sizes.values()))):
            splits = {}
            for split, sizes in self.sizes.items():
                if number < len(sizes):
                    rows = sum(sizes[:number]) + torch.arange(sizes[number])
                    values = {hook: rows[:, None] * torch.tensor(FACTORS[hook]) for hook in self.hook_names}
                    position = rows.int() + int((split, number) == self.other)
                    splits[split] = Split(values, {"position": position})
            yield Chunk(splits, {"n": number})

    def truth(self) -> None:
        return None


@pytest.fixture
def make_pair(tmp_path):
    def pair(train: list[int], val: tuple[int, ...] = (5,), name: str = "", **other: Any) -> tuple[Shards, Shards]:
        opened = harvest(Numbered(train, list(val), ("hook", "target"), **other), tmp_path / name, show=False)
        return opened["hook"], opened["target"]

    return pair


@pytest.fixture
def make(tmp_path):
    def shards(train: list[int], val: tuple[int, ...] = (5,)) -> Shards:
        return harvest(Numbered(train, list(val)), tmp_path, show=False)["hook"]

    return shards


def numbers(batches: Any) -> list[int]:
    rows = torch.cat(list(batches))
    assert torch.equal(rows[:, 0], -rows[:, 1])  # whole rows
    return rows[:, 0].long().tolist()


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("msae-prefetch")]


SIZES = [[1000], [300, 300, 300], [256, 512, 257, 1], [7, 3, 90], [0, 40, 0, 25, 0], [600, 20_000]]


# --- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("block", "pool"), [(256, 64), (16, 3), (1, 1)])
def test_every_row_stands_exactly_once_in_an_epoch(sizes, block, pool) -> None:
    total, order = sum(sizes), RowOrder(sizes, 0, block, pool)
    if total > 5000 and block == 1:
        pytest.skip("a pool a row")
    for epoch in (0, 1, 7):
        rows = order.rows(epoch * total, (epoch + 1) * total)
        assert rows.sort().values.tolist() == list(range(total))
        middle = order.rows(epoch * total + total // 3, epoch * total + total // 2)
        assert torch.equal(middle, rows[total // 3 : total // 2])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("batch", "world"), [(2, 1), (13, 1), (16, 3), (60, 1)])
def test_every_row_comes_exactly_once_an_epoch(make, sizes, batch, world) -> None:
    """The batches of all ranks within an epoch share no row; the one across its end has all that were missing."""
    shards, total = make(sizes), sum(sizes)
    step = batch * world
    ranks = [TrainBatches(shards, batch, 10**6, 0, rank, world) for rank in range(world)]
    full, left = divmod(total, step)
    if full > 2000:
        full, left = 200, 0
    rows: list[int] = []
    for number in range(full):
        parts = [rank.batch(number) for rank in ranks]
        assert all(part.shape == (batch, 2) for part in parts)
        rows += numbers(parts)
    assert len(set(rows)) == len(rows) == full * step
    if left:
        across = numbers(rank.batch(full) for rank in ranks)
        missing = set(range(total)) - set(rows)
        assert len(missing) == left
        assert missing <= set(across)


def test_one_epoch_of_dividing_batches_is_every_row_once(make) -> None:
    shards = make([300, 300, 300])
    ranks = [numbers(TrainBatches(shards, 50, 6, 0, rank, 3)) for rank in range(3)]
    assert sorted(sum(ranks, [])) == list(range(900))  # noqa: RUF017
    assert all(len(rows) == 300 for rows in ranks)  # so no rank has a row of another


def test_batches_are_a_function_of_their_number(make) -> None:
    shards = make([1000, 700, 3])
    iterated = list(TrainBatches(shards, 64, 60, seed=3))
    fresh = TrainBatches(shards, 64, 60, seed=3)
    for number in [59, 0, 31, 30, 26, 27, 59, 1]:
        assert torch.equal(fresh.batch(number), iterated[number]), number
    assert len(fresh) == len(iterated) == 60
    assert not torch.equal(TrainBatches(shards, 64, 60, seed=4).batch(0), iterated[0])


def test_epochs_differ_in_order_and_so_do_seeds() -> None:
    order = RowOrder([1000, 500], seed=0)
    first, second = order.rows(0, 1500), order.rows(1500, 3000)
    other = RowOrder([1000, 500], seed=1).rows(0, 1500)
    chance = 1500 / 1500  # fixed points of a random permutation: one
    for a, b in ((first, second), (first, other), (first, torch.arange(1500))):
        assert int((a == b).sum()) < 10 * chance

    order = RowOrder([64_000], seed=0)  # 500 blocks: a pool of 256 has others in the next epoch
    pools = [set(order.rows(epoch * 64_000, epoch * 64_000 + 16_000).tolist()) for epoch in (0, 1)]
    assert len(pools[0] & pools[1]) < 8_000


@pytest.mark.parametrize("stops", [[7], [3, 4], [1, 1, 1], [29, 1], [0, 58]])
def test_resuming_equals_going_on(make, stops) -> None:
    """29.3 batches an epoch: the stops fall within, at and beyond its end."""
    shards = make([1000, 875])
    whole = list(TrainBatches(shards, 64, 70, seed=5, rank=1, world=1 + 1))
    batches, got = TrainBatches(shards, 64, 70, 5, 1, 2), []
    for stop in stops:
        iterator = iter(batches)
        got += list(islice(iterator, stop))
        iterator.close()
        state = json.loads(json.dumps(batches.state_dict()))
        assert state["position"] == len(got)
        assert state["epoch"] * 1875 + state["row"] == len(got) * 128
        batches = TrainBatches(shards, 64, 70, 5, 1, 2)
        batches.load_state_dict(state)
    got += list(batches)
    assert len(got) == 70
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_tokens": 32}, "batch_tokens=16, this run has batch_tokens=32"),
        ({"world": 2}, "world_size=1, this run has world_size=2"),
        ({"seed": 9}, "data_seed=0, this run has data_seed=9"),
    ],
)
def test_state_of_other_batches_is_refused(make, change, message) -> None:
    shards = make([1000])
    state = TrainBatches(shards, 16, 10, 0).state_dict()
    other = TrainBatches(shards, **{"batch_tokens": 16, "length": 10, "seed": 0, "world": 1, **change})
    with pytest.raises(ValueError, match=rf"^the checkpoint was made with {message}[^\n]* resume with [^\n]*$"):
        other.load_state_dict(state)
    assert other.position == 0


def test_state_of_another_row_order_is_refused(make) -> None:
    """Also one from before the order had a name."""
    batches = TrainBatches(make([1000]), 16, 10, 0)
    state = batches.state_dict()
    for other in ("256x64", None):
        with pytest.raises(
            ValueError, match=rf"^the checkpoint was made with row_order={other}, this run has row_order=\d+x\d+, so "
        ):
            batches.load_state_dict(
                {key: value for key, value in {**state, "row_order": other}.items() if value is not None}
            )


def test_state_of_other_shards_is_refused(make) -> None:
    state = TrainBatches(make([1000]), 16, 10, 0).state_dict()
    other = TrainBatches(make([500, 500]), 16, 10, 0)
    with pytest.raises(
        ValueError, match=r"^the checkpoint was made with shards=[0-9a-f]{12}, this run has shards=[^\n]*$"
    ):
        other.load_state_dict(state)


@pytest.mark.parametrize("world", [1, 4])
def test_fewer_rows_than_a_batch(make, world) -> None:
    shards = make([50, 49])
    batch = 100 // world
    with pytest.raises(
        ValueError, match=rf"^\S+ has 99 training rows, fewer than one batch of {batch} × {world}; [^\n]*$"
    ):
        TrainBatches(shards, batch, 1, 0, world=world)


def test_rows_mix_across_shards_and_away_from_their_neighbours() -> None:
    """A pool is 256 blocks of 128 rows: of two neighbours within a block, one batch of 256 has both 1 time in 128."""
    sizes, batch = [20_000] * 5, 256
    rows = RowOrder(sizes, seed=0).rows(0, sum(sizes))
    batch_of = torch.empty_like(rows)
    batch_of[rows] = torch.arange(len(rows)) // batch
    together = float((batch_of[1:] == batch_of[:-1]).double().mean())
    assert together < 1.5 / 128
    shard_of = torch.arange(len(rows)) // 20_000
    for number in range(0, len(rows) // batch - 1, 10):
        here = shard_of[batch_of == number].bincount(minlength=5)
        assert int((here > 0).sum()) >= 4
        assert int(here.max()) < 0.6 * batch


# --- validation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, 17), (10, 11), (0, 10**6), (9, 31)])
@pytest.mark.parametrize(("batch", "world"), [(4, 1), (4, 2), (100, 1), (3, 5)])
def test_validation_covers_every_row_once(make, batch, world, start, stop) -> None:
    shards = make([100], (10, 1, 20))
    ranks = [ValBatches(shards, batch, rank, world, start, stop) for rank in range(world)]
    lists = [list(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [len(part) for part in lists]
    wanted = list(range(start, min(31, 31 if stop is None else stop)))
    assert sorted(numbers(sum(lists, []))) == wanted  # noqa: RUF017
    assert all(r.tokens == len(wanted) for r in ranks)
    assert max(len(b) for part in lists for b in part) <= batch
    if world == 1:
        assert numbers(lists[0]) == wanted  # in file order
    assert numbers(sum([list(rank) for rank in ranks], [])) == numbers(sum(lists, []))  # noqa: RUF017


def test_validation_without_rows(make) -> None:
    with pytest.raises(ValueError, match=r"^\S+ has no validation rows between 0 and 0; [^\n]*$"):
        ValBatches(make([100], ()), 4)


# --- pairs -----------------------------------------------------------------------------------------------------


def check_pairs(pairs: list[Any], plain: list[Any]) -> None:
    """The pairs' inputs are the plain batches, and their targets are of the same rows."""
    assert len(pairs) == len(plain) > 0
    for pair, alone in zip(pairs, plain, strict=True):
        assert isinstance(pair, tuple)
        assert isinstance(alone, Tensor)
        x, y = pair
        assert torch.equal(x, alone)
        assert torch.equal(y, x[:, :1] * torch.tensor(FACTORS["target"]))


@pytest.mark.parametrize("sizes", SIZES[1:5], ids=str)
@pytest.mark.parametrize(("batch", "world"), [(2, 1), (13, 1), (16, 3), (60, 1)])
def test_pairs_are_of_the_same_rows(make_pair, sizes, batch, world) -> None:
    shards, target = make_pair(sizes, (10, 1, 20))
    length = sum(sizes) // batch + 2  # beyond an epoch
    for rank in range(world):
        paired = TrainBatches(shards, batch, length, 3, rank, world, target=target)
        check_pairs(list(paired), list(TrainBatches(shards, batch, length, 3, rank, world)))
        for start, stop in [(0, None), (3, 17), (9, 31)]:
            given = (shards, min(batch, 4), rank, world, start, stop)
            assert len(ValBatches(*given, target=target)) == len(ValBatches(*given))
            check_pairs(list(ValBatches(*given, target=target)), list(ValBatches(*given)))


def test_pairs_go_on_where_they_stopped(make_pair) -> None:
    shards, target = make_pair([300, 275])
    plain = list(TrainBatches(shards, 64, 30, 5, 1, 2))
    batches, got = TrainBatches(shards, 64, 30, 5, 1, 2, target=target), []
    for stop in (7, 1, 12):
        iterator = iter(batches)
        got += list(islice(iterator, stop))
        iterator.close()
        state = json.loads(json.dumps(batches.state_dict()))
        batches = TrainBatches(shards, 64, 30, 5, 1, 2, target=target)
        batches.load_state_dict(state)
    check_pairs([*got, *batches], plain)


def test_state_of_another_target_is_refused(make_pair) -> None:
    """With a target, without one, and with the two swapped: nobody goes on with another's state."""
    shards, target = make_pair([100])
    plain = TrainBatches(shards, 16, 10, 0)
    paired = TrainBatches(shards, 16, 10, 0, target=target)
    fixed = {"batch_tokens", "world_size", "data_seed", "row_order", "shards"}
    assert set(plain.state_dict()) == {"epoch", "row", "position", *fixed}
    assert paired.state_dict() == {**plain.state_dict(), "target": target.manifest["identity_hash"]}
    itself = TrainBatches(shards, 16, 10, 0, target=shards)
    for here, other in ((plain, paired), (paired, plain), (paired, itself)):
        with pytest.raises(
            ValueError, match=r"^the checkpoint was made with target=(None|\w{12}), this run has target=[^\n]*$"
        ):
            here.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 1}, "identity.seed"),
        ({"train": [30, 39, 31]}, "identity.train, train rows"),
        ({"train": [30, 40, 30, 1]}, "identity.train, train rows"),
        ({"val": (5, 6)}, "identity.val, val rows"),
        ({"other": ("train", 0)}, "train index"),
        ({"other": ("train", 2)}, "train index"),
        ({"other": ("val", 0)}, "val index"),
        ({"other": ("val", 1)}, "val index"),
    ],
)
def test_pairs_of_two_harvests_are_refused(make_pair, change, what) -> None:
    settings = {"train": [30, 40, 30], "val": (6, 5)}
    shards, _ = make_pair(**settings)
    _, target = make_pair(**{**settings, **change}, name="other")
    where = f"{re.escape(str(shards.directory))} and {re.escape(str(target.directory))}"
    message = rf"^{where} are not of the same rows \({re.escape(what)} differ\); [^\n]*harvest both [^\n]*$"
    with pytest.raises(ValueError, match=message):
        TrainBatches(shards, 16, 10, 0, target=target)
    with pytest.raises(ValueError, match=message):
        ValBatches(shards, 16, target=target)
    _, same = make_pair(**settings, name="same")
    check_pairs(list(ValBatches(shards, 16, target=same)), list(ValBatches(shards, 16)))


def test_the_datamodule_pairs_what_its_hooks_say(tmp_path) -> None:
    def data(**settings: Any) -> ActivationData:
        made = ActivationData(Numbered([100, 30], [20], ("target", "hook")), 16, root=str(tmp_path), **settings)
        made.trainer = SimpleNamespace(max_steps=5, accumulate_grad_batches=2, global_rank=1, world_size=2)
        return made

    plain, paired = data(hook_name="hook"), data(hook_name="hook", target_hook_name="target")
    assert (plain.target_shards, plain.target_hook_name) == (None, None)
    assert paired.target_shards.directory.name.startswith("numbered-target-")
    assert (paired.shards.d_in, paired.target_shards.d_in) == (2, 3)
    for split in ("train_dataloader", "val_dataloader"):
        check_pairs(list(getattr(paired, split)()), list(getattr(plain, split)()))
    assert paired.steps(10**4) == plain.steps(10**4)
    x, y = next(iter(data(target_hook_name="hook").train_dataloader()))  # from the first hook
    assert (x.shape, y.shape) == ((16, 3), (16, 2))


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (
            {"hook_name": "hok"},
            r"data\.hook_name=hok is not among [^\n]*'target'\]; add it to data\.source\.hook_names",
        ),
        (
            {"target_hook_name": "to"},
            r"data\.target_hook_name=to is not among [^\n]*; add it to data\.source\.hook_nam",
        ),
        ({"target_hook_name": "hook"}, r"data\.target_hook_name=hook is the input itself; drop it"),
        ({"hook_name": "target", "target_hook_name": "target"}, r"data\.target_hook_name=target is the input itself"),
    ],
)
def test_mistakes_in_the_hooks(tmp_path, hooks, message) -> None:
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        ActivationData(Numbered([100], [20], ("hook", "target")), 16, root=str(tmp_path), **hooks)
    assert not list(tmp_path.iterdir())  # said before anything is harvested


# --- the thread ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_error_in_a_thread_reaches_the_consumer(workers) -> None:
    def make(n: int) -> int:
        if n == 3:
            raise OSError("the disk went away")
        return n

    iterator = prefetched(make, range(10), 4, workers)
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk went away"):
        next(iterator)
    assert threads() == []


def test_a_file_that_becomes_shorter_is_one_line(make) -> None:
    shards = make([1000, 1000])
    path = shards.directory / "train-00001.safetensors"
    os.truncate(path, 200)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} has become shorter; run [^\n]*$"):
        list(TrainBatches(shards, 16, 10, 0))
    assert threads() == []


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_many_threads_make_the_same_batches_in_order(make_pair, workers) -> None:
    """Later items are made faster, so that their order is not that of their ends."""
    slow = prefetched(lambda n: time.sleep(0.02 / (1 + n % 5)) or n, range(40), 6, workers)
    assert list(slow) == list(range(40))
    shards, target = make_pair([700, 200, 3000])
    given = (shards, 50, 200, 1, 1, 2)
    batches = list(TrainBatches(*given, prefetch=5, target=target, threads=workers))
    assert len(batches) == 200
    for number in (0, 39, 117, 199):
        for a, b in zip(batches[number], TrainBatches(*given, target=target).batch(number), strict=True):
            assert torch.equal(a, b)


def test_abandoned_iteration_leaves_no_thread(make) -> None:
    batches = TrainBatches(make([1000]), 16, 10_000, 0)
    for batch in batches:
        assert len(batch) == 16
        assert {name.split("_")[0] for name in threads()} == {"msae-prefetch"}
        break
    assert threads() == []
    assert batches.position == 1
    iterator = iter(batches)
    next(iterator)
    del iterator
    assert threads() == []
    with pytest.raises(RuntimeError, match="the consumer fails"):
        fail_in_mid_epoch(batches)
    assert threads() == []


def fail_in_mid_epoch(batches: TrainBatches) -> None:
    for _ in batches:
        raise RuntimeError("the consumer fails")


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_runs_ahead_by_its_depth_only(depth) -> None:
    made: list[int] = []
    iterator = prefetched(lambda n: made.append(n), range(1000), depth)
    next(iterator)
    time.sleep(0.1)
    ahead = len(made)
    iterator.close()
    assert ahead <= depth + 1  # the one given, and those that wait


# --- memory ----------------------------------------------------------------------------------------------------


def resident(kind: str) -> int:
    """Bytes of this process's memory, RssAnon or RssFile."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def sparse(directory: Path, shards: int, rows: int, d_in: int) -> Shards:
    """Shards of zeros in float32 that take no disk."""
    entry = {"dtype": "F32", "shape": [rows, d_in], "data_offsets": [0, 4 * rows * d_in]}
    header = json.dumps({"activations": entry}).encode()
    header += b" " * (-len(header) % 8)
    entries = []
    for number in range(shards):
        path = directory / f"train-{number:05d}.safetensors"
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + 4 * rows * d_in)
        size, ends = path.stat().st_size, checksum_of_ends(path)
        entries.append({"split": "train", "number": number, "rows": rows, "bytes": size, "xxh3": "", "xxh3_ends": ends})
    manifest = {
        "format": "msae-shards",
        "version": 1,
        "identity": {},
        "identity_hash": "0" * 12,
        "provenance": {},
        "truth": None,
        "hook_name": "hook",
        "dtype": "float32",
        "d_in": d_in,
        "statistics": {"rows": shards * rows, "mean": [0.0] * d_in, "mean_square": 0.0},
        "shards": entries,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return Shards(directory)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_that_of_some_pools(tmp_path) -> None:
    """An epoch of 24 pools of 8 MiB: up to four are held (before, now, next, and one being read).

    What the process takes beyond them is the C library's affair, which keeps freed blocks as it likes; still it must be
    far less than the data.
    """
    shards = sparse(tmp_path, 12, 65_536, 64)  # 201 MB
    batches = TrainBatches(shards, 4096, 192, 0)
    pool = batches.order.block * batches.order.pool * 64 * 4
    before = {kind: resident(kind) for kind in ("RssAnon", "RssFile")}
    most = dict(before)
    for batch in batches:
        assert not batch.any()
        most = {kind: max(value, resident(kind)) for kind, value in most.items()}
    gc.collect()
    assert 1 <= len(shards._free) <= 4  # all that was ever held, now given back
    assert sum(map(len, shards._free)) <= 4 * pool
    assert most["RssAnon"] - before["RssAnon"] < 12 * pool  # half of the data
    assert most["RssFile"] - before["RssFile"] < pool


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_as_many_shards_as_there_are_keep_no_file_open(tmp_path) -> None:
    shards = sparse(tmp_path, 40, 64, 4)
    before = len(os.listdir("/proc/self/fd"))
    for _ in TrainBatches(shards, 16, 160, 0):
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_all_of_a_shard_is_a_memory_map(tmp_path) -> None:
    shards = sparse(tmp_path, 1, 100_000, 256)  # 102 MB
    before = resident("RssFile")
    assert shards.activations("train", 0).shape == (100_000, 256)
    assert str(tmp_path / "train-00000.safetensors") in Path("/proc/self/maps").read_text()
    assert resident("RssFile") - before < 30e6
