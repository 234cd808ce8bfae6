"""Batches: every row exactly once an epoch, a pure function of their number, mixed, resumable, and never a copy."""

import gc
import json
import os
import re
import threading
import time
import weakref
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from msae.data.activations import Activations, Data
from msae.data.batches import TrainBatches, ValBatches, prefetched
from msae.data.datamodule import ActivationData
from msae.data.harvest import harvest
from msae.data.order import ShardOrder
from msae.data.shards import Shards
from msae.settings import decode
from tests.sources import Numbered


@pytest.fixture
def make_pair(tmp_path):
    """Shards of these sizes at "hook" and at "target", or other hooks."""

    def pair(train: list[int], val: tuple[int, ...] = (5,), name: str = "", **other: Any) -> list[Shards]:
        return list(harvest(Numbered(train, list(val), **other), tmp_path / name, show=False).values())

    return pair


@pytest.fixture
def make(make_pair):
    """Shards of these sizes."""
    return lambda *given, **other: make_pair(*given, **other)[0]


def numbers(batches: Any) -> list[int]:
    rows = torch.cat(list(batches))
    assert torch.equal(rows[:, 0], -rows[:, 1])  # whole rows
    return rows[:, 0].long().tolist()


def check_pairs(pairs: list[Any], plain: list[Any]) -> None:
    """The pairs' inputs are the plain batches, and their targets are of the same rows."""
    assert len(pairs) == len(plain) > 0
    for pair, x in zip(pairs, plain, strict=True):
        assert isinstance(pair, tuple)
        assert isinstance(x, Tensor)
        assert torch.equal(pair[0], x)
        assert torch.equal(pair[1], x[:, :1] * torch.tensor(Numbered.FACTORS["target"]))


def rows_at(order: ShardOrder, start: int, stop: int) -> Tensor:
    """The row numbers at these positions of the order."""
    rows = []
    for pool, index in order.parts(start, stop):
        rows.append(torch.cat([torch.arange(a, b) for a, b in zip(*order.blocks(pool), strict=True)])[index])
    return torch.cat(rows)


def batch_at(batches: TrainBatches, number: int) -> Any:
    """One batch alone."""
    batches.position = number
    return next(iter(batches))


def threads() -> set[str]:
    return {t.name.split("_")[0] for t in threading.enumerate() if t.name.startswith("msae-prefetch")}


SIZES = [[1000], [300, 300, 300], [256, 512, 257, 1], [7, 3, 90], [0, 40, 0, 25, 0], [600, 20_000]]


# Order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("block", "pool"), [(256, 64), (16, 3), (1, 1)])
def test_the_order_has_every_row_exactly_once_an_epoch(sizes, block, pool):
    total, order = sum(sizes), ShardOrder(sizes, 0, block, pool)
    if total > 5000 and block == 1:
        pytest.skip("a pool a row")
    for start in (0, total, 7 * total):
        rows = rows_at(order, start, start + total)
        assert rows.sort().values.tolist() == list(range(total))
        third, half = total // 3, total // 2
        assert torch.equal(rows_at(order, start + third, start + half), rows[third:half])


def test_epochs_differ_in_order_and_so_do_seeds():
    order, other = (ShardOrder([1000, 500], seed) for seed in (0, 1))
    first, second = rows_at(order, 0, 1500), rows_at(order, 1500, 3000)
    for a, b in ((first, second), (first, rows_at(other, 0, 1500)), (first, torch.arange(1500))):
        assert int((a == b).sum()) < 10  # a random permutation has one fixed point

    order = ShardOrder([64_000], seed=0)  # 500 blocks: a pool of 256 has others in the next epoch
    pools = [set(rows_at(order, start, start + 16_000).tolist()) for start in (0, 64_000)]
    assert len(pools[0] & pools[1]) < 5_000  # 4000 by chance, 7800 from a pool of the same blocks


def test_rows_mix_across_shards_and_away_from_their_neighbours():
    """A pool is 256 blocks of 128 rows: of two neighbours within a block, one batch of 256 has both 1 time in 128."""
    sizes, batch = [20_000] * 5, 256
    rows = rows_at(ShardOrder(sizes, seed=0), 0, sum(sizes))
    batch_of = torch.empty_like(rows)
    batch_of[rows] = torch.arange(len(rows)) // batch
    together = float((batch_of[1:] == batch_of[:-1]).double().mean())
    assert together < 1.5 / 128
    shard_of = torch.arange(len(rows)) // 20_000
    for number in range(0, len(rows) // batch - 1, 10):
        of_shards = shard_of[batch_of == number].bincount(minlength=5)
        assert int((of_shards > 0).sum()) >= 4
        assert int(of_shards.max()) < 0.6 * batch


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("batch", "world"), [(2, 1), (13, 1), (15, 3), (60, 1)])
def test_batches_hold_the_rows_of_the_order(make_pair, sizes, batch, world):
    """By iteration and by number, on every rank, across the end of an epoch; targets are of the same rows."""
    shards, target = make_pair(sizes)
    order, length = ShardOrder(sizes, seed=3), min(sum(sizes) // (batch * world) + 2, 300)
    for rank in range(world):
        batches = TrainBatches(shards, batch, length, 3, rank, world)
        plain = list(batches)
        assert len(batches) == len(plain) == length
        for number, x in enumerate(plain):
            start = (number * world + rank) * batch
            assert numbers([x]) == rows_at(order, start, start + batch).tolist()
        paired = TrainBatches(shards, batch, length, 3, rank, world, target=target)
        check_pairs(list(paired), plain)
        some = [length - 1, 0, length // 2, length // 2 - 1, length - 1]
        check_pairs([batch_at(paired, number) for number in some], [plain[number] for number in some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_batches_of_each_type_hold_the_rows_of_the_files(make, dtype):
    """Over several pools, dequantised where shards are int8."""
    shards = make([40_000, 30_000, 3], dtype=dtype)
    x = torch.cat([shards.activations("train", i) for i in range(3)])
    batches = TrainBatches(shards, 1000, 100, seed=0)
    assert batches.feed.order.block * batches.feed.order.pool < 40_000
    assert torch.equal(torch.cat(list(batches)), x[rows_at(batches.feed.order, 0, 100_000)])
    assert torch.equal(torch.cat(list(ValBatches(shards, 3))), shards.activations("val", 0))


@pytest.mark.parametrize("stops", [[7], [3, 4], [1, 1, 1], [29, 1], [0, 58]])
def test_resuming_equals_going_on(make_pair, stops):
    """29.3 batches an epoch: the stops fall within, at and beyond its end."""
    shards, target = make_pair([1000, 875])
    whole = list(TrainBatches(shards, 64, 70, seed=5, rank=1, world=2))
    batches, got = TrainBatches(shards, 64, 70, 5, 1, 2, target=target), []
    for stop in stops:
        iterator = iter(batches)
        got += list(islice(iterator, stop))
        iterator.close()
        state = json.loads(json.dumps(batches.state_dict()))
        assert (state["feed"]["epoch"], state["feed"]["row"]) == divmod(len(got) * 128, 1875)
        batches = TrainBatches(shards, 64, 70, 5, 1, 2, target=target)
        batches.load_state_dict(state)
    check_pairs([*got, *batches], whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_tokens": 32}, "batch_tokens=16, this run has batch_tokens=32"),
        ({"world": 2}, "world_size=1, this run has world_size=2"),
        ({"seed": 9}, "data_seed=0, this run has data_seed=9"),
        ({"sizes": [500, 500]}, r"shards=\w{12}, this run has shards=\w{12}"),
        ({"target": "target"}, r"target=None, this run has target=\w{12}"),
    ],
)
def test_a_state_of_other_batches_is_refused(make_pair, change, message):
    def batches(sizes: tuple[int, ...] = (1000,), target: str | None = None, **settings: int) -> TrainBatches:
        pair = dict(zip(("hook", "target"), make_pair(list(sizes)), strict=True))
        settings = {"batch_tokens": 16, "length": 10, "seed": 0, **settings}
        return TrainBatches(pair["hook"], **settings, target=pair.get(target or ""))

    one, other = batches(), batches(**change)
    backwards = re.sub(r"(\S+)=(\S+), this run has \S+=(\S+)", r"\1=\3, this run has \1=\2", message)
    for here, there, expected in ((other, one, message), (one, other, backwards)):
        with pytest.raises(ValueError, match=rf"^the checkpoint was made with {expected}, so [^\n]* resume [^\n]*$"):
            here.load_state_dict(there.state_dict())
        assert here.position == 0


def test_a_state_of_another_row_order_is_refused(make):
    """Also one from before the order had a name."""
    batches = TrainBatches(make([1000]), 16, 10, 0)
    state = batches.state_dict()
    for order in ("256x64", None):
        message = rf"^the checkpoint was made with row_order={order}, this run has row_order=128x256, so [^\n]*$"
        with pytest.raises(ValueError, match=message):
            batches.load_state_dict({**state, "row_order": order})


# Validation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, 17), (10, 11), (0, 10**6), (9, 31)])
@pytest.mark.parametrize(("batch", "world"), [(4, 1), (4, 2), (100, 1), (3, 5)])
def test_validation_covers_every_row_once(make_pair, batch, world, start, stop):
    shards, target = make_pair([100], (10, 1, 20))
    ranks = [ValBatches(shards, batch, rank, world, start, stop) for rank in range(world)]
    batches = [list(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [len(of_rank) for of_rank in batches]
    expected = list(range(start, min(31, 31 if stop is None else stop)))
    rows = numbers(batch for of_rank in batches for batch in of_rank)
    assert sorted(rows) == expected
    assert all(rank.tokens == len(expected) for rank in ranks)
    assert max(len(batch) for of_rank in batches for batch in of_rank) <= batch
    if world == 1:
        assert rows == expected  # in file order
    for rank, of_rank in enumerate(batches):
        paired = ValBatches(shards, batch, rank, world, start, stop, target=target)
        for plain in filter(None, (of_rank, list(ranks[rank]))):  # and a second time
            check_pairs(list(paired), plain)


def test_validation_without_rows_is_one_line(make):
    with pytest.raises(ValueError, match=r"^\S+ has no validation rows between 0 and 0; [^\n]*$"):
        ValBatches(make([100], ()), 4)


# Pairs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "differs"),
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
def test_pairs_of_two_harvests_are_refused(make_pair, change, differs):
    settings = {"train": [30, 40, 30], "val": (6, 5)}
    shards, same = make_pair(**settings)
    _, target = make_pair(**{**settings, **change}, name="other")
    directories = f"{re.escape(str(shards.directory))} and {re.escape(str(target.directory))}"
    message = rf"^{directories} are not of the same rows \({re.escape(differs)} differ\); [^\n]*harvest both [^\n]*$"
    with pytest.raises(ValueError, match=message):
        TrainBatches(shards, 16, 10, 0, target=target)
    with pytest.raises(ValueError, match=message):
        ValBatches(shards, 16, target=target)
    check_pairs(list(ValBatches(shards, 16, target=same)), list(ValBatches(shards, 16)))


def test_the_datamodule_pairs_what_its_hooks_say(tmp_path):
    def data(**settings: Any) -> ActivationData:
        source = Numbered([100, 30], [20], ("target", "hook"))
        module = ActivationData(Activations(Data(source, batch_tokens=16, root=str(tmp_path), **settings)))
        module.trainer = SimpleNamespace(max_steps=5, accumulate_grad_batches=2, global_rank=1, world_size=2)
        return module

    plain, paired = data(hook_name="hook"), data(hook_name="hook", target_hook_name="target")
    assert plain.activations.target is None
    assert paired.activations.target.directory.name.startswith("numbered-target-")
    for loader in ("train_dataloader", "val_dataloader"):
        check_pairs(list(getattr(paired, loader)()), list(getattr(plain, loader)()))
    assert paired.activations.steps(10**4) == plain.activations.steps(10**4)
    assert len(paired.train_dataloader()) == 10
    x, y = next(iter(data(target_hook_name="hook").train_dataloader()))  # from the first hook
    assert (x.shape, y.shape) == ((16, 3), (16, 2))


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({"hook_name": "hok"}, r"hook_name=hok is not among [^\n]*'target'\]; add it to data\.source\.hook_names"),
        ({"target_hook_name": "to"}, r"target_hook_name=to is not among [^\n]*; add it to data\.source\.hook_names"),
        ({"target_hook_name": "hook"}, r"target_hook_name=hook is the input itself; drop it[^\n]*"),
        ({"hook_name": "target", "target_hook_name": "target"}, r"target_hook_name=target is the input itself[^\n]*"),
    ],
)
def test_mistakes_in_the_hooks_are_one_line(hooks, message):
    source = {"_target_": "msae.sources.language_model.LanguageModelSource", "model": "m", "text": "t", "tokens": 99}
    with pytest.raises(ValueError, match=rf"^data\.{message}$"):
        decode(Data, {"source": {**source, "hook_names": ["hook", "target"]}, **hooks}, "data")


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_in_a_thread_reaches_the_consumer(workers):
    iterator = prefetched(lambda n: 6 // (3 - n), range(10), 4, workers)
    assert [next(iterator) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(iterator)
    assert not threads()


def test_a_file_that_becomes_shorter_is_one_line(make):
    shards = make([1000, 1000])
    path = shards.directory / "train-00001.safetensors"
    os.truncate(path, 200)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} has become shorter; run [^\n]*$"):
        list(TrainBatches(shards, 16, 10, 0))
    assert not threads()


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_many_threads_make_the_same_batches_in_order(make_pair, workers):
    """Later items are made faster, so that their order is not that of their ends."""
    slow = prefetched(lambda n: time.sleep(0.02 / (1 + n % 5)) or n, range(40), 6, workers)
    assert list(slow) == list(range(40))
    shards, target = make_pair([700, 200, 3000])
    arguments = (shards, 50, 200, 1, 1, 2)
    batches = list(TrainBatches(*arguments, prefetch=5, target=target, threads=workers))
    check_pairs(batches, [batch_at(TrainBatches(*arguments), number) for number in range(200)])


def test_an_iterator_that_is_dropped_leaves_no_thread(make):
    batches = TrainBatches(make([1000]), 16, 10_000, 0)
    iterator = iter(batches)
    assert len(next(iterator)) == 16
    assert threads() == {"msae-prefetch"}
    del iterator
    assert not threads()
    assert batches.position == 1


@pytest.mark.parametrize("depth", [1, 5])
def test_prefetch_runs_ahead_by_its_depth_only_and_ends_with_the_item_in_work(depth):
    for pause, most in ((0.2, depth + 1), (0.0, 2)):
        made: list[int] = []
        iterator = prefetched(lambda n, made=made: time.sleep(0.02) or made.append(n), range(1000), depth)
        next(iterator)
        time.sleep(pause)
        iterator.close()
        assert len(made) <= most  # the one given, and those that waited or the one in work


# Memory ---------------------------------------------------------------------------------------------------------------


def resident(kind: str) -> int:
    """Bytes of this process's memory, RssAnon or RssFile."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_that_of_some_pools(make):
    """An epoch of 24 pools of 8 MiB: up to four are held (before, now, next, and one being read).

    What the process takes beyond them is the C library's affair, which keeps freed blocks as it likes; still it must be
    far less than the data.
    """
    shards = make([65_536] * 12, hook_names=("wide",))  # 201 MB
    batches = TrainBatches(shards, 4096, 192, 0)
    pool = batches.feed.order.block * batches.feed.order.pool * 64 * 4
    before = {kind: resident(kind) for kind in ("RssAnon", "RssFile")}
    most = dict(before)
    for _ in batches:
        most = {kind: max(value, resident(kind)) for kind, value in most.items()}
    gc.collect()
    assert 1 <= len(shards._free) <= 4  # all that was ever held, now given back
    assert sum(map(len, shards._free)) <= 4 * pool
    assert most["RssAnon"] - before["RssAnon"] < 12 * pool  # half of the data
    assert most["RssFile"] - before["RssFile"] < pool


@pytest.mark.parametrize("uses_cuda", [True, False])
def test_batches_lie_in_pinned_memory_where_cuda_is_used_and_few_at_a_time(make_pair, monkeypatch, uses_cuda):
    """From there a copy to the GPU waits for nothing; PyTorch keeps what is freed and hands it out again."""
    shards, target = make_pair([2000], (40,))
    expected = list(TrainBatches(shards, 16, 60, 0, target=target))
    alive, most, empty = [0], [0], torch.empty

    def counted(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        tensor = empty(*shape, **options)
        if pin_memory:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
        return tensor

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: uses_cuda)
    monkeypatch.setattr(torch, "empty", counted)
    for pair, plain in zip(TrainBatches(shards, 16, 60, 0, prefetch=4, target=target), expected, strict=True):
        time.sleep(0.002)
        assert all(map(torch.equal, pair, plain))
    assert most[0] <= 2 * (4 + 3)  # those ahead, the one given and the one before it, and one that is being made
    assert (most[0] > 0) == uses_cuda
    most[0] = 0
    assert len(list(ValBatches(shards, 16, target=target))) == 3
    assert (most[0] > 0) == uses_cuda


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_many_shards_keep_no_file_open(make):
    shards = make([64] * 40)
    before = len(os.listdir("/proc/self/fd"))
    for _ in TrainBatches(shards, 16, 160, 0):
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_whole_shard_is_a_memory_map(make):
    shards = make([400_000], hook_names=("wide",))  # 102 MB
    before = resident("RssFile")
    assert shards.activations("train", 0).shape == (400_000, 64)
    assert str(shards.directory / "train-00000.safetensors") in Path("/proc/self/maps").read_text()
    assert resident("RssFile") - before < 30e6
