"""Pairs and edges: every figure against loops over dense rows, and worlds of which the right answer is known."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, false_discovery_control
from torch import Tensor

from msae.data.shards import Shards
from msae.data.synthetic import ForestSource
from msae.hierarchy import edges as edges_module
from msae.hierarchy import pairs as pairs_module
from msae.hierarchy.edges import Edges, between, grade, highest, ranks, sibling_cosines
from msae.hierarchy.firings import Firings, collect, pieces
from msae.hierarchy.limits import TESTS, Limits
from msae.hierarchy.pairs import Pairs, covering_pairs, eligible, false_discovery_rate, rate_groups
from msae.sae import MatryoshkaSAE
from tests.test_firings import given_shards, of_dense

Array = np.ndarray[Any, Any]


def family(rows: int, seed: int, d_sae: int = 26) -> Array:
    """Activations [rows, d_sae] of latents of every kind: nested with holes, twins, always on, rare, dead, alone."""
    random = np.random.default_rng(seed)
    fires = random.random((rows, d_sae)) < 0.08
    busy = random.random(rows) < 0.1
    fires[:, 0] = random.random(rows) < 0.97  # a superparent
    fires[:, 1] = random.random(rows) < 0.45
    for child in range(2, 8):  # of 1, some with holes
        fires[:, child] = (random.random(rows) < 0.3) & fires[:, 1]
        fires[:, child] &= ~((random.random(rows) < 0.2) & (child > 4))
        fires[:, child] |= (random.random(rows) < 0.04) & (child > 4)
    for child in range(8, 12):  # grandchildren
        fires[:, child] = (random.random(rows) < 0.5) & fires[:, child - 6]
    fires[:, 12] = fires[:, 2] & (random.random(rows) < 0.95)  # a twin of 2
    fires[:, 13] = random.random(rows) < 4 / rows
    fires[:, 14] = False
    fires[:, 15] = busy & (random.random(rows) < 0.9)
    fires[:, 16] = busy & (random.random(rows) < 0.6)
    fires[random.random(rows) < 0.02] = False
    values = fires * (0.2 + random.random((rows, d_sae))) * (0.5 + 2 * random.random(d_sae))
    return values.astype(np.float32)


def numbers(firings: Firings) -> tuple[Array, Array, int]:
    dense = firings.matrix.toarray().astype(np.float64)
    return dense, (dense > 0).sum(0), len(dense)


# --- pairs against loops ---------------------------------------------------------------------------------------


def naive_pairs(firings: Firings, coverage: float, least: int) -> dict[tuple[int, int], tuple[int, float]]:
    dense, counts, rows = numbers(firings)
    l0 = [int((dense[i] > 0).sum()) for i in range(rows)]
    found = {}
    for p in range(dense.shape[1]):
        for c in range(dense.shape[1]):
            both = sum(1 for i in range(rows) if dense[i, p] > 0 and dense[i, c] > 0)
            if counts[c] < least or counts[p] <= counts[c] or both == 0 or both < coverage * counts[c]:
                continue
            places = sum(l0[i] - 1 for i in range(rows) if dense[i, c] > 0)
            others = sum(l0) - counts[c]  # slots of all other latents, over which the parent's firings are spread
            found[p, c] = both, min(1.0, counts[p] * places / others / counts[c])
    return found


@pytest.mark.parametrize("block", [1, 5, 26, 512])
@pytest.mark.parametrize(("coverage", "least"), [(0.5, 20), (0.8, 1), (0.0, 5), (1.0, 20), (0.5, 10**6)])
def test_covering_pairs_are_those_of_loops(monkeypatch, block, coverage, least) -> None:
    monkeypatch.setattr(pairs_module, "BLOCK", block)
    firings = of_dense(family(150, seed=least % 7))
    pairs, expected = covering_pairs(firings, coverage, least), naive_pairs(firings, coverage, least)
    found = list(zip(pairs.parent.tolist(), pairs.child.tolist(), strict=True))
    assert len(set(found)) == len(found)
    assert set(found) == set(expected)
    assert bool(found) == (least < 10**6)
    for i, pair in enumerate(found):
        assert pairs.both[i] == expected[pair][0]
        assert pairs.chance[i] == pytest.approx(expected[pair][1], rel=1e-12)


def test_a_pair_at_the_line_covers_and_one_row_less_does_not() -> None:
    dense = np.zeros((40, 4))
    dense[:20, 0] = dense[10:20, 1] = 1
    dense[20:30, 1] = 1  # 0 covers 10 of 20 of 1, which fire as often: no pair either way
    dense[5:15, 2] = 1  # of 10, all with 0, five with 1
    dense[:4, 3] = dense[30:34, 3] = 1  # of 8, four with 0
    assert set(naive_pairs(of_dense(dense), 0.5, 1)) == {(0, 2), (1, 2), (0, 3)}
    for coverage, least, expected in [
        (0.5, 1, {(0, 2), (1, 2), (0, 3)}),
        (0.5001, 1, {(0, 2)}),
        (1.0, 1, {(0, 2)}),
        (0.5, 8, {(0, 2), (1, 2), (0, 3)}),
        (0.5, 9, {(0, 2), (1, 2)}),
        (0.5, 10, {(0, 2), (1, 2)}),
        (0.5, 11, set()),
    ]:
        pairs = covering_pairs(of_dense(dense), coverage, least)
        assert set(zip(pairs.parent.tolist(), pairs.child.tolist(), strict=True)) == expected


def test_chance_is_by_hand() -> None:
    """Rows {0,1}, {0,1,2}, {0}, {0,3}: of child 1, L0 − 1 = 1, 2 and Σ L0 − 2 = 6, so 0 is there by chance 4·3/6/2."""
    dense = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1]])
    pairs = covering_pairs(of_dense(dense), 0.5, 1)
    chance = {(int(p), int(c)): float(x) for p, c, x in zip(pairs.parent, pairs.child, pairs.chance, strict=True)}
    assert chance == pytest.approx({(0, 1): 1.0, (0, 2): 1.0, (1, 2): 2 * 2 / 7 / 1, (0, 3): 4 * 1 / 7 / 1})


def test_chance_is_what_independent_latents_of_busy_rows_give() -> None:
    """A few rows on which much is active: the share of firings in common is the chance, not the product of rates."""
    random = np.random.default_rng(0)
    activity = np.where(random.random(6000) < 0.1, 8.0, 0.5)[:, None]
    rates = np.concatenate([[0.1, 0.02], np.full(98, 0.05)])
    firings = of_dense(random.random((6000, 100)) < activity * rates)
    pairs, rate = covering_pairs(firings, 0.0, 20), firings.counts() / 6000
    coverage = pairs.both / firings.counts()[pairs.child]
    high = np.isin(pairs.parent, np.arange(1, 100))
    assert coverage[high].sum() / pairs.chance[high].sum() == pytest.approx(1, abs=0.08)
    assert coverage[high].sum() / rate[pairs.parent[high]].sum() > 2.5


def test_chance_of_more_rows_than_are_taken_at_once() -> None:
    random = np.random.default_rng(0)
    rows = 2 * 2**18 + 1000
    fires = random.random((rows, 4)) < np.array([0.5, 0.2, 0.1, 0.02])
    fires[2**18 :, 3] = fires[2**18 :, 1]  # what comes later is not as what came before
    pairs = covering_pairs(of_dense(fires), 0.0, 20)
    counts, l0 = fires.sum(0), fires.sum(1)
    assert len(pairs.parent) == 6
    for p, c, both, chance in zip(*vars(pairs).values(), strict=True):
        assert both == (fires[:, p] & fires[:, c]).sum()
        places = (l0[fires[:, c]] - 1).sum()
        assert chance == pytest.approx(min(1.0, counts[p] * places / (l0.sum() - counts[c]) / counts[c]), rel=1e-12)


def test_above_chance_begins_at_the_lift() -> None:
    """Of 20 firings of the child 5 are expected: at twice that there are 10."""
    pairs = Pairs(np.zeros(4, dtype=int), np.array([1, 1, 1, 2]), np.array([9, 10, 11, 10]), np.full(4, 0.25))
    assert pairs.above(np.array([50, 20, 21]), 2.0).tolist() == [False, True, True, False]


def test_pairs_where_nothing_fires() -> None:
    pairs = covering_pairs(of_dense(np.zeros((9, 5))), 0.5, 0)
    assert [len(x) for x in (pairs.parent, pairs.child, pairs.both, pairs.chance)] == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_eligible_counts_children_that_each_latent_could_have(seed) -> None:
    random = np.random.default_rng(seed)
    n, least = 40, int(random.integers(0, 6))
    counts, level = random.integers(0, 15, n), random.integers(0, 4, n)
    expected = []
    for p in range(n):
        fine = [c for c in range(n) if c != p and level[c] >= level[p] and least <= counts[c] < counts[p]]
        expected.append(len(fine) if counts[p] >= least else 0)
    assert eligible(counts, level, least).tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_the_false_discovery_rate_is_scipys_with_ones_for_what_is_no_candidate(seed) -> None:
    random = np.random.default_rng(seed)
    p = random.random(30) ** random.integers(1, 9)
    p[:5] = p[5:10]  # ties
    if seed % 2:
        p[10] = 0.0
    for looked_at in (30, 31, 200, 5000):
        q = false_discovery_rate(p, looked_at)
        padded = np.concatenate([p, np.ones(looked_at - 30)])
        np.testing.assert_allclose(q, false_discovery_control(padded, method="by")[:30], rtol=1e-10)
        assert (q[np.argsort(p, kind="stable")][:-1] <= q[np.argsort(p, kind="stable")][1:]).all()
        assert (q >= p).all()
        assert q.max() <= 1


def test_the_false_discovery_rate_of_nothing() -> None:
    assert len(false_discovery_rate(np.zeros(0), 0)) == 0
    assert len(false_discovery_rate(np.zeros(0), 7)) == 0
    with pytest.raises(AssertionError, match="3 p-values of 2"):
        false_discovery_rate(np.ones(3), 2)


@pytest.mark.parametrize("seed", range(30))
def test_rate_groups_are_neighbours_in_rate_of_about_that_size(seed) -> None:
    random = np.random.default_rng(seed)
    n, size, least = int(random.integers(1, 200)), int(random.integers(1, 20)), int(random.integers(0, 40))
    counts = random.integers(0, 100, n)
    group = rate_groups(counts, size, least)
    assert group.shape == (n,)
    assert group.min() == 0
    assert set(group.tolist()) == set(range(group.max() + 1))
    alive = counts >= least
    if not alive.any():
        return
    sizes = Counter(group[alive].tolist())
    if alive.sum() >= size:
        assert all(size <= many < 2 * size for many in sizes.values())
        assert max(sizes.values()) - min(sizes.values()) <= 1
    else:
        assert len(sizes) == 1
    assert not set(group[alive].tolist()) & set(group[~alive].tolist())
    for a in range(n):
        for b in range(n):
            assert counts[a] <= counts[b] or group[a] <= group[b]  # what fires more has a group before


# --- every figure against loops --------------------------------------------------------------------------------


class World(NamedTuple):
    sae: MatryoshkaSAE
    shards: Shards
    firings: Firings
    level: Array
    x: Array  # rows in order


def random_world(root: Path, seed: int, rows: int = 330) -> World:
    """Firings of every kind, oblique decoder rows of any norm, rows that they explain in part, in two shards."""
    values, generator = family(rows, seed), torch.Generator().manual_seed(seed)
    d_sae, d_in = values.shape[1], 18
    sae = MatryoshkaSAE(d_in, d_sae, [4, 12, d_sae], 4)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(d_sae, d_in, generator=generator))
        sae.W_dec[6] += 1.5 * sae.W_dec[1]  # absorbs
        sae.W_dec[8:10] += sae.W_dec[1] + torch.randn(d_in, generator=generator)  # siblings
        sae.b_dec.copy_(torch.randn(d_in, generator=generator))
        sae.scale.fill_(1.6)
        sae.mean.copy_(torch.randn(d_in, generator=generator))
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    x = torch.from_numpy(values) @ directions + sae.unscale(sae.b_dec.detach())
    x += 0.4 * torch.randn(x.shape, generator=generator)
    shards = given_shards(root, [x[:70]], [x[70:200], x[200:]])
    level = np.random.default_rng(seed).permutation(np.searchsorted(sae.prefixes, np.arange(d_sae), side="right"))
    level[:2] = 0
    return World(sae, shards, of_dense(values, pieces(shards, None)), level, x.double().numpy())


def naive_groups(counts: Array, size: int, least: int) -> list[set[int]]:
    """The group of each latent."""
    order = sorted(range(len(counts)), key=lambda j: (-counts[j], j))
    alive = [j for j in order if counts[j] >= least]
    groups = max(1, len(alive) // size)
    of: dict[int, set[int]] = {}
    for place, j in enumerate(alive):
        of.setdefault(place * groups // len(alive), set()).add(j)
    of[-1] = {j for j in order if counts[j] < least}
    return [next(group for group in of.values() if j in group) for j in range(len(counts))]


def naive_edges(world: World, limits: Limits) -> dict[tuple[int, int], dict[str, float]]:
    """Loops over candidates and rows, in the order of the docstrings and by no other formula than theirs."""
    dense, counts, rows = numbers(world.firings)
    d_sae, level = dense.shape[1], world.level
    unit = world.sae.W_dec.detach().double().numpy().copy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    b_dec = world.sae.b_dec.detach().double().numpy() / float(world.sae.scale) + world.sae.mean.double().numpy()
    x = world.x - b_dec
    left = x - dense @ unit
    groups = naive_groups(counts, limits.matched, limits.least)
    covering = naive_pairs(world.firings, limits.coverage, limits.least)
    could = [
        sum(limits.least <= counts[c] < counts[p] and level[c] >= level[p] for c in range(d_sae)) for p in range(d_sae)
    ]
    looked_at = sum(could)
    related = {(p, c) for (p, c), (both, chance) in covering.items() if both / counts[c] >= limits.lift * chance}
    candidates = {pair for pair in covering if level[pair[0]] <= level[pair[1]]}
    pmi = {(p, c): math.log2(covering[p, c][0] * rows / (counts[p] * counts[c])) for p, c in candidates}
    tested = set()
    for c in range(d_sae):
        parents = sorted((p for p, child in candidates if child == c), key=lambda p: -pmi[p, c])
        tested |= {(p, c) for p in parents[: limits.parents]}

    def square(v: Array) -> float:
        return float((v * v).sum())

    def harm(j: int, i: int) -> float:
        return square(left[i] + dense[i, j] * unit[j]) - square(left[i])

    found: dict[tuple[int, int], dict[str, float]] = {}
    for p, c in tested:
        on = [i for i in range(rows) if dense[i, c] > 0]
        both, chance = covering[p, c]
        matched = [j for j in groups[p] if j not in (p, c)]
        fires = [sum(dense[i, j] > 0 for i in on) / len(on) for j in matched]
        harms = np.array([harm(p, i) for i in on])
        of_matched = [sum(harm(j, i) for i in on) / len(on) for j in matched]
        without_parent = [x[i] - dense[i, p] * unit[p] for i in on]
        error = sum(square(v) for v in without_parent)
        with_child = sum(square(v - dense[i, c] * unit[c]) for i, v in zip(on, without_parent, strict=True))
        dots = [sum(dense[i, a] * dense[i, b] for i in on) for a, b in ((c, p), (c, c), (p, p))]
        share = sum((p, other) in candidates for other in range(d_sae)) / could[p]

        def aside(j: int, p: int = p) -> Array:
            v = unit[j] - (unit[j] @ unit[p]) * unit[p]
            return v / np.linalg.norm(v)

        siblings = [other for q, other in related if q == p and other != c]
        found[p, c] = {
            "holes": len(on) - both,
            "coverage": both / len(on),
            "pmi": pmi[p, c],
            "lift": both / len(on) / max(chance, np.mean(fires) if fires else 0.0),
            "p": binomtest(both, len(on), min(1.0, chance), alternative="greater").pvalue,
            "mcs": dots[0] / math.sqrt(dots[1] * dots[2]) * dense[:, c].max() / dense[:, p].max(),
            "gain": 1 - with_child / error,
            "harm": harms.sum() / sum(square(x[i]) for i in on),
            "z": (harms.mean() - (np.mean(of_matched) if matched else 0.0)) / (harms.std() / math.sqrt(len(on))),
            "covers": share,
            "reverse": both / counts[p],
            "sibling": max([aside(c) @ aside(other) for other in siblings], default=-1.0)
            if share <= limits.superparent
            else math.nan,
            "between": sum((p, q) in related and (q, c) in related for q in range(d_sae)),
        }
        if (p, c) not in related:  # no more than chance: nothing that needs activations is said
            found[p, c] |= dict.fromkeys(("mcs", "gain", "harm", "z", "sibling"), math.nan)
            found[p, c]["lift"] = both / len(on) / chance
    q = false_discovery_control([found[e]["p"] for e in found] + [1.0] * (looked_at - len(found)), method="by")
    for edge, value in zip(found, q[: len(found)], strict=True):
        found[edge]["q"] = float(value)
    good = {edge for edge, f in found.items() if all(naive_passed(f, limits).values())}
    for p, c in found:
        better = sum((other, c) in good and found[other, c]["mcs"] > found[p, c]["mcs"] for other in range(d_sae))
        found[p, c]["rank"] = 1 + better if (p, c) in good else 0
    return found


def naive_passed(f: dict[str, float], limits: Limits) -> dict[str, bool]:
    return {
        "coverage": f["coverage"] >= limits.coverage,
        "lift": f["lift"] >= limits.lift,
        "q": f["q"] <= limits.fdr,
        "mcs": f["mcs"] >= limits.mcs,
        "gain": f["gain"] >= limits.gain,
        "z": f["z"] >= limits.z,
        "covers": f["covers"] <= limits.superparent,
        "reverse": f["reverse"] < limits.coverage,
        "sibling": f["sibling"] < limits.sibling,
        "between": f["between"] == 0,
    }


def edge_list(edges: Edges) -> list[tuple[int, int]]:
    return list(zip(edges.parent.tolist(), edges.child.tolist(), strict=True))


# lines that let enough through for the later tests to have something to say
LOOSE = Limits(least=6, lift=1.05, fdr=0.9, mcs=0.2, gain=-1.0, z=0.5, superparent=0.9, sibling=0.5, matched=5)
LIMITS = [
    Limits(least=8),
    LOOSE,
    replace(LOOSE, coverage=0.7, superparent=0.3, parents=2, matched=1),
    replace(LOOSE, matched=3, z=-1e9, lift=0.0, sibling=1.1, parents=1),
    replace(LOOSE, coverage=0.3, lift=0.0, mcs=-1.0, z=-1e9, sibling=1.1, matched=1000, parents=100, superparent=1.1),
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> list[tuple[World, Limits, Edges, dict[tuple[int, int], dict[str, float]]]]:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edges_module, "ROWS", 48)  # several batches a shard
        patch.setattr(pairs_module, "BLOCK", 7)
        for seed in range(3):
            world = random_world(tmp_path_factory.mktemp("world"), seed)
            for limits in LIMITS:
                covering = covering_pairs(world.firings, limits.coverage, limits.least)
                edges = grade(world.sae, world.shards, world.firings, covering, world.level, limits)
                found.append((world, limits, edges, naive_edges(world, limits)))
    return found


@pytest.mark.parametrize("figure", ["holes", *TESTS])
def test_every_figure_is_that_of_loops(compared, figure) -> None:
    seen = []
    for _, _, edges, expected in compared:
        found = edge_list(edges)
        assert set(found) == set(expected)
        assert len(found) == len(expected) > 0
        values = edges.holes if figure == "holes" else edges.figures[figure]
        assert len(values) == len(found)
        wanted = np.array([expected[edge][figure] for edge in found], dtype=np.float64)
        seen.append(wanted)
        np.testing.assert_allclose(values, wanted, rtol=2e-4, atol=2e-5, equal_nan=True)
    every = np.concatenate(seen)
    assert len(every) > 200
    assert len(np.unique(every[np.isfinite(every)])) > (1 if figure in ("between", "rank") else 20)


def test_every_test_draws_its_line_where_it_says(compared) -> None:
    outcomes: dict[str, set[bool]] = {}
    for _, limits, edges, expected in compared:
        assert list(edges.passed) == [key for key, test in TESTS.items() if test.line]
        for i, edge in enumerate(edge_list(edges)):
            passed = naive_passed(expected[edge], limits) | {"rank": expected[edge]["rank"] == 1}
            assert {key: bool(values[i]) for key, values in edges.passed.items()} == passed
            assert bool(edges.survives[i]) == all(passed.values())
            for key, value in passed.items():
                outcomes.setdefault(key, set()).add(value)
    assert {key for key, seen in outcomes.items() if seen != {True, False}} == {"coverage"}  # all candidates pass it


def test_survivors_the_funnel_and_parents_say_the_same(compared) -> None:
    most = 0
    for world, _, edges, expected in compared:
        good = [edge for edge, f in expected.items() if f["rank"] == 1]
        assert len({c for _, c in good}) == len(good)  # one parent a child
        parent = edges.parents(world.firings.d_sae)
        assert {(int(p), c) for c, p in enumerate(parent) if p >= 0} == set(good)
        funnel, left = edges.funnel(), list(range(len(edges.parent)))
        counts, level = world.firings.counts(), world.level
        assert list(funnel) == ["pairs", *edges.passed]
        for key in edges.passed:
            left = [i for i in left if edges.passed[key][i]]
            assert funnel[key] == len(left)
        assert funnel["rank"] == len(good)
        assert funnel["pairs"] == edges.looked_at
        most = max(most, len(good))
        assert (counts[edges.parent] > counts[edges.child]).all()
        assert (level[edges.parent] <= level[edges.child]).all()
    assert most >= 5


def test_pairs_looked_at_are_those_that_the_order_allows(compared) -> None:
    for world, limits, edges, _ in compared:
        counts, level, n = world.firings.counts(), world.level, world.firings.d_sae
        possible = [
            (p, c) for p in range(n) for c in range(n) if level[p] <= level[c] and limits.least <= counts[c] < counts[p]
        ]
        assert edges.looked_at == len(possible)


def test_grade_is_the_same_whatever_the_batches(tmp_path, monkeypatch) -> None:
    world = random_world(tmp_path, 7)
    covering = covering_pairs(world.firings, LOOSE.coverage, LOOSE.least)
    a, b = [], []
    for into, rows in ((a, 1024), (b, 13)):
        monkeypatch.setattr(edges_module, "ROWS", rows)
        into.append(grade(world.sae, world.shards, world.firings, covering, world.level, LOOSE))
    for key in TESTS:
        np.testing.assert_allclose(a[0].figures[key], b[0].figures[key], rtol=1e-4, atol=1e-5)


def test_grade_does_not_depend_on_the_order_of_the_pairs(tmp_path) -> None:
    world = random_world(tmp_path, 8)
    covering = covering_pairs(world.firings, LOOSE.coverage, LOOSE.least)
    mixed = covering.where(np.random.default_rng(0).permutation(len(covering.parent)))
    a, b = (grade(world.sae, world.shards, world.firings, of, world.level, LOOSE) for of in (covering, mixed))
    at = {edge: i for i, edge in enumerate(edge_list(b))}
    order = [at[edge] for edge in edge_list(a)]
    for key in TESTS:
        np.testing.assert_allclose(a.figures[key], b.figures[key][order], rtol=1e-6, atol=1e-7)


def test_sums_are_those_of_their_pairs_in_any_order(tmp_path) -> None:
    world = random_world(tmp_path, 10)
    pairs = covering_pairs(world.firings, LOOSE.coverage, LOOSE.least)
    order = np.random.default_rng(0).permutation(len(pairs.parent))
    given = world.sae, world.shards, world.firings
    a, b = (vars(edges_module.sum_up(*given, of, LOOSE)) for of in (pairs, pairs.where(order)))
    for name in ("parent_square", "product", "parent_explains", "harm", "matched_fires", "matched_harm"):
        np.testing.assert_allclose(b[name], a[name][order], rtol=1e-6, atol=1e-6)


def test_grade_without_a_candidate_or_a_firing(tmp_path) -> None:
    world = random_world(tmp_path, 9)
    for dense in (np.zeros_like(world.firings.matrix.toarray()), np.eye(330, 26, dtype=np.float32)):
        firings = of_dense(dense, world.firings.pieces)
        covering = covering_pairs(firings, 0.5, 20)
        edges = grade(world.sae, world.shards, firings, covering, world.level, Limits())
        assert edge_list(edges) == []
        assert edges.looked_at == 0
        assert set(edges.funnel().values()) == {0}
        assert (edges.parents(26) == -1).all()


# --- the parts of it -------------------------------------------------------------------------------------------


def random_pairs(random: np.random.Generator, n: int = 12, many: int = 40) -> Pairs:
    """Distinct pairs in no order."""
    flat = random.choice(n * n, many, replace=False)
    flat = flat[flat // n != flat % n]
    return Pairs(flat // n, flat % n, random.integers(1, 9, len(flat)), random.random(len(flat)))


@pytest.mark.parametrize("seed", range(20))
def test_highest_keeps_the_few_parents_of_each_child_with_the_highest_pmi(seed) -> None:
    random = np.random.default_rng(seed)
    pairs, counts = random_pairs(random), random.integers(9, 99, 12)
    for parents in (1, 2, 3, 100):
        kept, pmi = highest(pairs, counts, 500, parents)
        expected = {}
        for c in range(12):
            score = {
                int(pairs.parent[i]): math.log2(pairs.both[i] / 500 / (counts[pairs.parent[i]] / 500 * counts[c] / 500))
                for i in range(len(pairs.parent))
                if pairs.child[i] == c
            }
            limit = sorted(score.values(), reverse=True)[:parents]
            expected |= {(p, c): value for p, value in score.items() if value in limit}
        found = dict(zip(zip(kept.parent.tolist(), kept.child.tolist(), strict=True), pmi.tolist(), strict=True))
        assert len(found) == len(kept.parent)
        assert set(found) <= set(expected)
        assert found == pytest.approx({edge: expected[edge] for edge in found})
        many = Counter(pairs.child.tolist())
        assert Counter(kept.child.tolist()) == {c: min(parents, n) for c, n in many.items()}
        rows = {(int(p), int(c)): (b, x) for p, c, b, x in zip(*vars(pairs).values(), strict=True)}
        for p, c, b, x in zip(*vars(kept).values(), strict=True):  # columns stay together
            assert rows[int(p), int(c)] == (b, x)


@pytest.mark.parametrize("seed", range(20))
def test_between_and_ranks_are_those_of_loops(seed) -> None:
    random = np.random.default_rng(seed)
    pairs = random_pairs(random)
    have = set(zip(pairs.parent.tolist(), pairs.child.tolist(), strict=True))
    some = random.permutation(len(pairs.parent))[:25]
    parent, child = pairs.parent[some], pairs.child[some]
    expected = [
        sum((p, q) in have and (q, c) in have for q in range(12) if q != p) for p, c in zip(parent, child, strict=True)
    ]
    assert between(pairs, parent, child).tolist() == expected

    score, left = random.permutation(len(some)) / 7, random.random(len(some)) < 0.7
    rank = ranks(score, child, left)
    for i in range(len(some)):
        rivals = [score[j] for j in range(len(some)) if left[j] and child[j] == child[i]]
        assert rank[i] == (1 + sorted(rivals, reverse=True).index(score[i]) if left[i] else 0)


def test_of_equal_scores_one_is_first() -> None:
    rank = ranks(np.array([0.5, 0.5, 0.5, 0.2]), np.array([1, 1, 2, 1]), np.array([True, True, True, True]))
    assert sorted(rank[[0, 1]].tolist()) == [1, 2]
    assert rank[2:].tolist() == [1, 3]
    assert len(ranks(np.zeros(0), np.zeros(0, dtype=int), np.zeros(0, dtype=bool))) == 0


@pytest.mark.parametrize("seed", range(10))
def test_sibling_cosines_are_those_of_loops(seed) -> None:
    random = np.random.default_rng(seed)
    directions = random.normal(size=(12, 5))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    pairs, wanted = random_pairs(random), random.random(12) < 0.8
    some = random.permutation(len(pairs.parent))[:25]
    parent, child = pairs.parent[some], pairs.child[some]
    found = sibling_cosines(directions, pairs, parent, child, wanted)
    for p, c, cosine in zip(parent, child, found, strict=True):
        if not wanted[p]:
            assert np.isnan(cosine)
            continue
        a = directions[c] - directions[c] @ directions[p] * directions[p]
        highest = -1.0
        for other in pairs.child[pairs.parent == p]:
            if other != c:
                b = directions[other] - directions[other] @ directions[p] * directions[p]
                highest = max(highest, a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert cosine == pytest.approx(highest, abs=1e-9)


def test_sibling_cosines_of_a_parent_with_more_children_than_a_block() -> None:
    random = np.random.default_rng(0)
    directions = random.normal(size=(1500, 8))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    child = 1 + random.permutation(1499)
    pairs = Pairs(np.zeros(1499, dtype=int), child, np.ones(1499, dtype=int), np.ones(1499))
    found = sibling_cosines(directions, pairs, pairs.parent, child, np.ones(1500, dtype=bool))
    aside = directions - np.outer(directions @ directions[0], directions[0])
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    cosine = aside @ aside.T
    np.fill_diagonal(cosine, -1)
    np.testing.assert_allclose(found, cosine[child, 1:].max(axis=1), atol=1e-9)


def test_a_sibling_that_is_its_parent_shares_nothing() -> None:
    directions = np.eye(3)[[0, 0, 1]]
    pairs = Pairs(np.array([0, 0]), np.array([1, 2]), np.ones(2), np.ones(2))
    found = sibling_cosines(directions, pairs, pairs.parent, pairs.child, np.ones(3, dtype=bool))
    assert found.tolist() == [0, 0]


# --- worlds whose hierarchy is known ---------------------------------------------------------------------------


def sae_of(decoder: Tensor, encoder: Tensor | None = None, prefixes: Sequence[int] = (), threshold: float = 0.1):
    """Latents fire where x · encoder row > threshold; the encoder is the decoder unless given."""
    n, d_in = decoder.shape
    sae = MatryoshkaSAE(d_in, n, list(prefixes) or [n], 1)
    with torch.no_grad():
        sae.W_dec.copy_(decoder)
        sae.W_enc.copy_((decoder if encoder is None else encoder).T)
    sae.threshold.fill_(threshold)
    return sae


def graded(
    root: Path, sae: MatryoshkaSAE, x: Tensor, limits: Limits | None = None, shuffle: int | None = None
) -> tuple[Edges, Firings]:
    """The edges of the SAE on these rows, through a real shard directory."""
    limits = Limits() if limits is None else limits
    half = len(x) // 2
    shards = given_shards(root, [x[:half]], [x[half:]])
    firings = collect(sae, shards, None, limits.floor)
    if shuffle is not None:
        firings = firings.shuffled(shuffle)
    level = np.searchsorted(sae.prefixes, np.arange(sae.d_sae), side="right")
    return grade(sae, shards, firings, covering_pairs(firings, limits.coverage, limits.least), level, limits), firings


def survivors(edges: Edges) -> set[tuple[int, int]]:
    return {edge for edge, good in zip(edge_list(edges), edges.survives, strict=True) if good}


def refuted_by(edges: Edges, edge: tuple[int, int]) -> set[str]:
    i = edge_list(edges).index(edge)
    return {key for key, passed in edges.passed.items() if not passed[i]}


PARENT = [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 8  # 3 parents × 3 exclusive children and 8 alone
TREE = {(p, c) for c, p in enumerate(PARENT) if p >= 0}
ONE_HOT = torch.eye(20)


def tree_codes(rows: int = 4000, spread: float = 0.2, seed: int = 0, **options: Any) -> Tensor:
    """True activations [rows, features] of a forest."""
    given = {"root_p": 0.3, "child_p": 0.25, "independent_p": 0.1, "magnitude_std": spread, "seed": seed}
    source = ForestSource(**(given | options))
    row, feature, value = source.draw(rows, torch.Generator().manual_seed(seed))
    codes = torch.zeros(rows, source.features_count)
    codes[row, feature] = value
    return codes


@pytest.mark.parametrize("spread", [0.0, 0.2])
@pytest.mark.parametrize("prefixes", [[20], [3, 12, 20]])
@pytest.mark.parametrize("seed", range(3))
def test_of_a_perfect_sae_exactly_the_true_edges_survive(tmp_path, spread, prefixes, seed) -> None:
    edges, firings = graded(tmp_path, sae_of(ONE_HOT, prefixes=prefixes), tree_codes(spread=spread, seed=seed))
    assert survivors(edges) == TREE
    assert edges.parents(20).tolist() == PARENT
    mine = edges.survives
    assert (edges.figures["coverage"][mine] == 1).all()
    assert not edges.holes[mine].any()
    np.testing.assert_allclose(edges.figures["sibling"][mine], 0, atol=1e-6)
    rate = firings.counts()[edges.parent[mine]] / firings.rows
    np.testing.assert_allclose(edges.figures["pmi"][mine], -np.log2(rate))
    np.testing.assert_allclose(edges.figures["reverse"][mine], 0.25, atol=0.08)


def test_of_oblique_directions_of_any_norm_the_true_edges_survive(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0][:20]
    features = torch.nn.functional.normalize(features + 0.04 * torch.randn(20, 24, generator=generator), dim=1)
    features *= 1 + torch.rand(20, 1, generator=generator)
    features[list(range(3))] *= 1.2
    encoder = torch.linalg.pinv(features).T
    sae = sae_of(features * 2, encoder / 2, threshold=0.05)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(24, generator=generator))
    edges, _ = graded(tmp_path, sae, tree_codes(seed=1) @ features + sae.b_dec.detach(), Limits(mcs=0.3))
    assert survivors(edges) == TREE


def test_an_absorbed_hierarchy_leaves_no_edge(tmp_path) -> None:
    """Children contain their parent, and the parent is silent under them."""
    encoder, decoder = ONE_HOT.clone(), ONE_HOT.clone()
    for p, c in TREE:
        encoder[p, c] = -9
        decoder[c, p] = 1
    edges, firings = graded(tmp_path, sae_of(decoder, encoder), tree_codes())
    assert (firings.counts() > 20).all()
    assert not set(edge_list(edges)) & TREE
    assert survivors(edges) == set()


def test_a_parent_that_fires_where_its_child_contains_it_is_not_needed(tmp_path) -> None:
    """It only doubles what the child reconstructs: to remove it does no harm."""
    decoder = ONE_HOT.clone()
    for p, c in TREE:
        decoder[c, p] = 1
    encoder = ONE_HOT.clone()
    edges, _ = graded(tmp_path, sae_of(decoder, encoder), tree_codes(spread=0.1))
    assert set(edge_list(edges)) >= TREE
    assert all("z" in refuted_by(edges, edge) for edge in TREE)
    harm = [edges.figures["harm"][edge_list(edges).index(edge)] for edge in TREE]
    assert max(harm) < 0
    assert survivors(edges) == set()


def test_a_child_that_explains_nothing_is_refuted_by_its_gain(tmp_path) -> None:
    """It fires on some of the parent's rows, and decodes to what is not there."""
    x = torch.cat([tree_codes(), torch.zeros(4000, 1)], 1)
    decoder = torch.cat([ONE_HOT, torch.zeros(20, 1)], 1)
    encoder = decoder.clone()
    decoder[3:6, 3:6] = 0
    decoder[3:6, 20] = 1
    edges, _ = graded(tmp_path, sae_of(decoder, encoder), x)
    assert all("gain" in refuted_by(edges, (0, c)) for c in (3, 4, 5))
    assert survivors(edges) == {edge for edge in TREE if edge[0] != 0}


def test_a_child_beside_a_far_stronger_parent_is_refuted_by_mcs(tmp_path) -> None:
    codes = tree_codes()
    codes[:, 0] *= 3
    edges, _ = graded(tmp_path, sae_of(ONE_HOT), codes)
    assert all(refuted_by(edges, (0, c)) == {"mcs", "rank"} for c in (3, 4, 5))
    assert survivors(edges) == {edge for edge in TREE if edge[0] != 0}


def test_a_superparent_is_flagged_and_has_no_edge(tmp_path) -> None:
    codes = torch.cat([tree_codes(), torch.ones(4000, 1)], 1)
    edges, firings = graded(tmp_path, sae_of(torch.eye(21)), codes)
    assert firings.counts()[20] == 4000
    of_it = edges.parent == 20
    assert of_it.sum() >= 8  # it covers everything
    assert (edges.figures["covers"][of_it] == 1).all()
    assert not edges.passed["covers"][of_it].any()
    assert np.isnan(edges.figures["sibling"][of_it]).all()
    assert edges.passed["covers"][~of_it].all()
    assert survivors(edges) == TREE


@pytest.mark.parametrize("less", [0.0, 0.4])
def test_a_latent_split_in_two_that_fire_together_has_no_edge_of_the_two(tmp_path, less) -> None:
    """The second of them is above its threshold a little less often, or exactly as often."""
    codes = torch.rand(3000, 6, generator=torch.Generator().manual_seed(0))
    codes = torch.where(codes < 0.2, 0.5 + 5 * codes / 2, 0.0)
    decoder = torch.cat([torch.eye(6)[:1] / 2, torch.eye(6)[:1] / 2, torch.eye(6)[1:]])
    encoder = torch.cat([torch.eye(6)[:1], torch.eye(6)])
    sae = sae_of(decoder, encoder)
    sae.threshold[1] = 0.5 + less / 4
    edges, firings = graded(tmp_path, sae, codes)
    counts = firings.counts()
    if less:
        assert counts[0] * 0.7 < counts[1] < counts[0]
        assert "reverse" in refuted_by(edges, (0, 1))
    else:
        assert counts[0] == counts[1]
        assert not {(0, 1), (1, 0)} & set(edge_list(edges))
    assert survivors(edges) == set()


def test_of_two_parents_the_one_more_like_the_child_is_kept(tmp_path) -> None:
    """A child of both passes every test with each; MCS decides, and the other is second."""
    generator = torch.Generator().manual_seed(0)
    fires = torch.rand(5000, 40, generator=generator) < 0.1
    fires[:, :2] = torch.rand(5000, 2, generator=generator) < 0.3
    fires[:, 2] = fires[:, 0] & fires[:, 1] & (torch.rand(5000, generator=generator) < 0.7)
    codes = fires * (0.8 + 0.4 * torch.rand(5000, 40, generator=generator))
    for strong in (0, 1):
        scaled = codes.clone()
        scaled[:, strong] *= 1.3
        edges, _ = graded(tmp_path / str(strong), sae_of(torch.eye(40)), scaled)
        assert survivors(edges) == {(1 - strong, 2)}
        assert refuted_by(edges, (strong, 2)) == {"rank"}
        assert edges.figures["rank"][edge_list(edges).index((strong, 2))] == 2
        assert edges.parents(40).tolist() == [-1, -1, 1 - strong] + [-1] * 37


DEEP = {"trees": 2, "branching": [2, 2], "independent": 10, "root_p": 0.3, "child_p": [0.4, 0.4]}
DEEP_PARENT = [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] + [-1] * 10  # two trees of three levels, ten alone


def test_of_a_grandparent_only_immediate_edges_survive(tmp_path) -> None:
    edges, _ = graded(tmp_path, sae_of(torch.eye(24), prefixes=[2, 6, 24]), tree_codes(12_000, **DEEP))
    assert survivors(edges) == {(p, c) for c, p in enumerate(DEEP_PARENT) if p >= 0}
    for c in range(6, 14):
        grandparent = DEEP_PARENT[DEEP_PARENT[c]]
        assert edges.figures["between"][edge_list(edges).index((grandparent, c))] == 1
        assert "between" in refuted_by(edges, (grandparent, c))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_siblings_that_absorbed_the_level_between_are_refuted(tmp_path, share) -> None:
    """The latent of feature 2, between 0 and 6, 7, is gone, and 6 and 7 contain it, or it is nowhere."""
    codes = tree_codes(12_000, **DEEP)
    there = [j for j in range(24) if j != 2]
    decoder = torch.eye(24)
    decoder[6, 2] = decoder[7, 2] = share
    edges, _ = graded(tmp_path, sae_of(decoder[there], torch.eye(24)[there]), codes)
    number = {feature: latent for latent, feature in enumerate(there)}
    refuted = [refuted_by(edges, (number[0], number[c])) for c in (6, 7)]
    if share:
        assert refuted == [{"sibling", "rank"}, {"sibling", "rank"}]
        at = [edge_list(edges).index((number[0], number[c])) for c in (6, 7)]
        np.testing.assert_allclose(edges.figures["sibling"][at], 0.5, atol=1e-6)
    else:  # no test on two directions could tell
        assert refuted == [set(), set()]
    others = {(number[p], number[c]) for c, p in enumerate(DEEP_PARENT) if p >= 0 and 2 not in (p, c)}
    assert survivors(edges) - {(number[0], number[c]) for c in (6, 7)} == others


def test_latents_of_busy_rows_are_not_taken_for_a_hierarchy(tmp_path) -> None:
    """Two that fire on rows on which much is active, otherwise independently; by rates alone the lift would be 6."""
    generator = torch.Generator().manual_seed(0)
    rows, n = 6000, 40
    busy = torch.rand(rows, 1, generator=generator) < 0.1
    rate = torch.full((n,), 0.4)
    rate[0], rate[1] = 0.7, 0.3
    fires = torch.rand(rows, n, generator=generator) < torch.where(busy, rate, 0.02 * (torch.arange(n) > 1))
    codes = fires * (0.5 + torch.rand(rows, n, generator=generator))
    edges, firings = graded(tmp_path, sae_of(torch.eye(n)), codes, Limits(matched=1))  # the chance alone
    at = edge_list(edges).index((0, 1))
    assert edges.figures["coverage"][at] * rows / firings.counts()[0] > 6
    assert edges.figures["lift"][at] < 2
    assert refuted_by(edges, (0, 1)) & {"lift", "q"}
    assert survivors(edges) == set()


def test_latents_that_fire_as_often_are_a_chance_too(tmp_path) -> None:
    """A child whose rows any latent of that rate covers has no parent: the lift is over these, if they are more."""
    generator = torch.Generator().manual_seed(1)
    rows = 6000
    topic = torch.rand(rows, 1, generator=generator) < 0.12
    fires = torch.rand(rows, 30, generator=generator) < 0.05
    fires[:, :7] = topic & (torch.rand(rows, 7, generator=generator) < 0.85)
    fires[:, 7] = topic[:, 0] & (torch.rand(rows, generator=generator) < 0.2)
    codes = fires * (0.5 + torch.rand(rows, 30, generator=generator))
    few, _ = graded(tmp_path / "few", sae_of(torch.eye(30)), codes, Limits(matched=1))
    matched, _ = graded(tmp_path / "matched", sae_of(torch.eye(30)), codes, Limits(matched=7))
    for parent in range(7):
        lifts = [edges.figures["lift"][edge_list(edges).index((parent, 7))] for edges in (few, matched)]
        assert lifts[0] > 2
        assert lifts[1] < 1.3
    assert survivors(matched) == set()


def test_a_parent_of_a_later_level_is_no_candidate(tmp_path) -> None:
    order = [*range(3, 20), *range(3)]  # parents last
    for prefixes, expected in (([20], True), ([17, 20], False)):
        edges, firings = graded(tmp_path, sae_of(ONE_HOT[order], prefixes=prefixes), tree_codes())
        number = {feature: latent for latent, feature in enumerate(order)}
        true = {(number[p], number[c]) for p, c in TREE}
        pairs = covering_pairs(firings, 0.5, 20)
        assert true <= set(zip(pairs.parent.tolist(), pairs.child.tolist(), strict=True))
        assert (true <= set(edge_list(edges))) == expected
        assert bool(true & set(edge_list(edges))) == expected
        assert survivors(edges) == (true if expected else set())
        assert edges.looked_at < 20 * 19 / 2 + 1


def test_a_latent_between_refutes_whatever_its_level(tmp_path) -> None:
    """The level between is in the last prefix: its own children are no candidates, yet 0 → grandchild is refuted."""
    order = [*range(2), *range(6, 24), *range(2, 6)]
    edges, _ = graded(tmp_path, sae_of(torch.eye(24)[order], prefixes=[2, 20, 24]), tree_codes(12_000, **DEEP))
    number = {feature: latent for latent, feature in enumerate(order)}
    for c in range(6, 14):
        middle = DEEP_PARENT[c]
        assert (number[middle], number[c]) not in edge_list(edges)
        assert "between" in refuted_by(edges, (number[DEEP_PARENT[middle]], number[c]))
    assert survivors(edges) == {(number[p], number[c]) for c, p in enumerate(DEEP_PARENT) if c < 6 and p >= 0}


@pytest.mark.parametrize("seed", range(5))
def test_of_shuffled_firings_nothing_survives(tmp_path, seed) -> None:
    edges, firings = graded(tmp_path, sae_of(ONE_HOT), tree_codes(), shuffle=seed)
    assert firings.matrix.nnz > 0
    assert not set(edge_list(edges)) & TREE
    assert survivors(edges) == set()
    edges, _ = graded(tmp_path, sae_of(torch.eye(24)), tree_codes(12_000, **DEEP), shuffle=seed)
    assert survivors(edges) == set()


def test_what_is_below_the_floor_does_not_fire(tmp_path) -> None:
    """Parents leak a little into every row: without a floor they are superparents, with it the tree is found."""
    codes = tree_codes()
    codes[:, :3] += 0.02
    loud, _ = graded(tmp_path, sae_of(ONE_HOT, threshold=0.001), codes, Limits(floor=0.0))
    quiet, _ = graded(tmp_path, sae_of(ONE_HOT, threshold=0.001), codes, Limits(floor=0.05))
    assert survivors(loud) == set()
    assert survivors(quiet) == TREE
