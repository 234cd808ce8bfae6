"""Pairs and edges: every figure against loops over dense rows, and worlds of which the right answer is known."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, false_discovery_control
from torch import Tensor
from torch.nn.functional import normalize

from msae.hierarchy import edges as edges_module
from msae.hierarchy import pairs as pairs_module
from msae.hierarchy import sums as sums_module
from msae.hierarchy.edges import Edges, Trial, grade, levels, ranks, sibling_cosines
from msae.hierarchy.firings import Array, Firings, FirstRows, Readable
from msae.hierarchy.limits import LINES, STAGES, TESTS, Limits
from msae.hierarchy.pairs import Pairs, covering_pairs
from msae.sae import MatryoshkaSAE
from msae.settings import changed
from msae.sources.forest import ForestSource
from tests.test_firings import InMemory, firings_of, given_shards, of_dense, sae_of

Edge = tuple[int, int]


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


def edge_list(edges: Edges | Pairs) -> list[Edge]:
    return list(zip(edges.parent.tolist(), edges.child.tolist(), strict=True))


def dense_of(firings: Firings) -> tuple[Array, Array, int]:
    dense = firings.matrix.toarray().astype(np.float64)
    return dense, (dense > 0).sum(0), len(dense)


# Pairs against loops --------------------------------------------------------------------------------------------------


def naive_pairs(firings: Firings, coverage: float, least: int) -> dict[Edge, tuple[int, float]]:
    """Rows in common and chance of every covering pair."""
    dense, counts, rows = dense_of(firings)
    l0 = [int((dense[i] > 0).sum()) for i in range(rows)]
    pairs = {}
    for p in range(dense.shape[1]):
        for c in range(dense.shape[1]):
            both = sum(1 for i in range(rows) if dense[i, p] > 0 and dense[i, c] > 0)
            if counts[c] < least or counts[p] <= counts[c] or both == 0 or both < coverage * counts[c]:
                continue
            others = sum(l0[i] - 1 for i in range(rows) if dense[i, c] > 0)
            slots = sum(l0) - counts[c]  # of all other latents, over which the parent's firings are spread
            pairs[p, c] = both, min(1.0, counts[p] * others / slots / counts[c])
    return pairs


@pytest.mark.parametrize("children", [1, 5, 26, 512])
@pytest.mark.parametrize(("coverage", "least"), [(0.5, 20), (0.8, 1), (0.0, 5), (1.0, 20), (0.5, 10**6)])
def test_covering_pairs_are_those_of_loops(monkeypatch, children, coverage, least):
    monkeypatch.setattr(pairs_module, "CHILDREN", children)
    firings = of_dense(family(150, seed=least % 7))
    pairs, expected = covering_pairs(firings, coverage, least), naive_pairs(firings, coverage, least)
    assert sorted(edge_list(pairs)) == sorted(expected)
    assert bool(expected) == (least < 10**6)
    assert pairs.both.tolist() == [expected[pair][0] for pair in edge_list(pairs)]
    assert pairs.chance.tolist() == pytest.approx([expected[pair][1] for pair in edge_list(pairs)], rel=1e-12)


def test_a_pair_at_the_line_covers_and_one_row_less_does_not():
    dense = np.zeros((40, 4))
    dense[:20, 0] = dense[10:30, 1] = 1  # 0 covers 10 of 20 of 1, which fire as often: no pair either way
    dense[5:15, 2] = 1  # of 10, all with 0, five with 1
    dense[:4, 3] = dense[30:34, 3] = 1  # of 8, four with 0
    for coverage, least, expected in [
        (0.5, 1, [(0, 2), (0, 3), (1, 2)]),
        (0.5001, 1, [(0, 2)]),
        (1.0, 1, [(0, 2)]),
        (0.5, 8, [(0, 2), (0, 3), (1, 2)]),
        (0.5, 9, [(0, 2), (1, 2)]),
        (0.5, 10, [(0, 2), (1, 2)]),
        (0.5, 11, []),
    ]:
        assert sorted(edge_list(covering_pairs(of_dense(dense), coverage, least))) == expected


def test_above_chance_begins_at_the_lift():
    """Of 20 firings of the child 5 are expected: at twice that there are 10."""
    pairs = Pairs(np.zeros(4, dtype=int), np.array([1, 1, 1, 2]), np.array([9, 10, 11, 10]), np.full(4, 0.25))
    assert pairs.above(np.array([50, 20, 21]), 2.0).tolist() == [False, True, True, False]


# Every figure against loops -------------------------------------------------------------------------------------------


class World(NamedTuple):
    sae: MatryoshkaSAE
    rows: Readable
    firings: Firings
    level: Array
    x: Array  # rows in order

    def grade(self, limits: Limits) -> Edges:
        """Of the covering pairs, whose order does not matter."""
        pairs = covering_pairs(self.firings, limits.coverage, limits.least)
        pairs = pairs.where(np.random.default_rng(0).permutation(len(pairs.parent)))
        ((edges,),) = grade(self.rows, [Trial(self.sae, self.firings, pairs, [self.level], limits)])
        return edges


def random_world(seed: int, rows: int = 330) -> World:
    """Firings of every kind, oblique decoder rows of any norm, rows that they explain in part, in three batches."""
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
        x = torch.from_numpy(values) @ normalize(sae.W_dec, dim=1) + sae.unscale(sae.b_dec)
    x += 0.4 * torch.randn(x.shape, generator=generator)
    level = np.random.default_rng(seed).permutation(levels(sae.prefixes))
    level[:2] = 0
    return World(sae, InMemory([x[:70], x[70:200], x[200:]]), of_dense(values), level, x.double().numpy())


def naive_groups(counts: Array, size: int, least: int) -> list[set[int]]:
    """The group of each latent."""
    order = sorted(range(len(counts)), key=lambda j: (-counts[j], j))
    alive = [j for j in order if counts[j] >= least]
    groups = max(1, len(alive) // size)
    members: dict[int, set[int]] = {-1: set(order) - set(alive)}
    for i, j in enumerate(alive):
        members.setdefault(i * groups // len(alive), set()).add(j)
    return [next(group for group in members.values() if j in group) for j in range(len(counts))]


def naive_edges(world: World, limits: Limits) -> tuple[dict[Edge, dict[str, float]], int]:
    """The figures of each candidate, one after the other, by the formulas of the docstrings; and pairs looked at."""
    dense, counts, rows = dense_of(world.firings)
    d_sae, level = dense.shape[1], world.level
    unit = world.sae.W_dec.detach().double().numpy().copy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    b_dec = world.sae.b_dec.detach().double().numpy() / float(world.sae.scale) + world.sae.mean.double().numpy()
    x = world.x - b_dec
    residual = x - dense @ unit
    groups = naive_groups(counts, limits.matched, limits.least)
    covering = naive_pairs(world.firings, limits.coverage, limits.least)
    possible = [
        sum(limits.least <= counts[c] < counts[p] and level[c] >= level[p] for c in range(d_sae)) for p in range(d_sae)
    ]
    related = {(p, c) for (p, c), (both, chance) in covering.items() if both / counts[c] >= limits.lift * chance}
    candidates = {pair for pair in covering if level[pair[0]] <= level[pair[1]]}
    pmi = {(p, c): math.log2(covering[p, c][0] * rows / (counts[p] * counts[c])) for p, c in candidates}
    tested = set()
    for c in range(d_sae):
        parents = sorted((p for p, child in candidates if child == c), key=lambda p: -pmi[p, c])
        tested |= {(p, c) for p in parents[: limits.parents]}

    def aside(j: int, p: int) -> Array:
        v = unit[j] - (unit[j] @ unit[p]) * unit[p]
        return v / np.linalg.norm(v)

    edges: dict[Edge, dict[str, float]] = {}
    for p, c in tested:
        on = np.flatnonzero(dense[:, c] > 0)

        def part(j: int, on: Array = on) -> Array:
            return np.outer(dense[on, j], unit[j])

        def harm(j: int, on: Array = on) -> Array:
            return ((residual[on] + part(j)) ** 2).sum(1) - (residual[on] ** 2).sum(1)

        both, chance = covering[p, c]
        matched = [j for j in groups[p] if j not in (p, c)]
        fires = np.mean([(dense[on, j] > 0).mean() for j in matched]) if matched else 0.0
        harm_of_matched = np.mean([harm(j).mean() for j in matched]) if matched else 0.0
        a_c, a_p, without_parent = dense[on, c], dense[on, p], x[on] - part(p)
        share = sum((p, other) in candidates for other in range(d_sae)) / possible[p]
        siblings = [other for q, other in related if q == p and other != c]
        sibling = max([aside(c, p) @ aside(other, p) for other in siblings], default=-1.0)
        f = edges[p, c] = {
            "holes": len(on) - both,
            "coverage": both / len(on),
            "pmi": pmi[p, c],
            "lift": both / len(on) / max(chance, fires),
            "p": binomtest(both, len(on), min(1.0, chance), alternative="greater").pvalue,
            "mcs": a_c @ a_p / math.sqrt(a_c @ a_c * (a_p @ a_p)) * dense[:, c].max() / dense[:, p].max(),
            "gain": 1 - ((without_parent - part(c)) ** 2).sum() / (without_parent**2).sum(),
            "harm": harm(p).sum() / (x[on] ** 2).sum(),
            "z": (harm(p).mean() - harm_of_matched) / (harm(p).std() / math.sqrt(len(on))),
            "covers": share,
            "reverse": both / counts[p],
            "sibling": sibling if share <= limits.superparent else math.nan,
            "between": sum((p, q) in related and (q, c) in related for q in range(d_sae)),
        }
        if (p, c) not in related:  # no more than chance: nothing that needs activations is said
            f |= dict.fromkeys(("mcs", "gain", "harm", "z", "sibling"), math.nan)
            f["lift"] = both / len(on) / chance
    padded = [f["p"] for f in edges.values()] + [1.0] * (sum(possible) - len(edges))
    for f, q in zip(edges.values(), false_discovery_control(padded, method="by"), strict=False):
        f["q"] = float(q)
    left = {edge for edge, f in edges.items() if all(naive_passed(f, limits).values())}
    for (p, c), f in edges.items():
        better = sum((other, c) in left and edges[other, c]["mcs"] > f["mcs"] for other in range(d_sae))
        f["rank"] = 1 + better if (p, c) in left else 0
    return edges, sum(possible)


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


# lines that let enough through for the later tests to have something to say
LOOSE = Limits(least=6, lift=1.05, fdr=0.9, mcs=0.2, gain=-1.0, z=0.5, superparent=0.9, sibling=0.5, matched=5)
NO_Z = changed(LOOSE, lift=0.0, z=-1e9, sibling=1.1)
LIMITS = [
    Limits(least=8),
    LOOSE,
    changed(LOOSE, coverage=0.7, superparent=0.3, parents=2, matched=1),
    changed(NO_Z, matched=3, parents=1),
    changed(NO_Z, coverage=0.3, mcs=-1.0, matched=1000, parents=100, superparent=1.0),
]


@pytest.fixture(scope="module")
def compared() -> list[tuple[World, Limits, Edges, dict[Edge, dict[str, float]], int]]:
    """Each world and limits with the edges, the same by loops, and the pairs looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums_module, "ROWS", 48)  # several batches a shard
        patch.setattr(edges_module, "CHILDREN", 2)
        patch.setattr(pairs_module, "CHILDREN", 7)
        worlds = [random_world(seed) for seed in range(3)]
        return [(w, limits, w.grade(limits), *naive_edges(w, limits)) for w in worlds for limits in LIMITS]


@pytest.mark.parametrize("figure", ["holes", *TESTS])
def test_every_figure_is_that_of_loops(compared, figure):
    every = []
    for _, _, edges, expected, _ in compared:
        assert sorted(edge_list(edges)) == sorted(expected)
        values = edges.holes if figure == "holes" else edges.figures[figure]
        by_loops = [float(expected[edge][figure]) for edge in edge_list(edges)]
        np.testing.assert_allclose(values, by_loops, rtol=2e-4, atol=2e-5, equal_nan=True)
        every += by_loops
    assert len(every) > 200
    assert len(np.unique(np.array(every)[np.isfinite(every)])) > {"rank": 1, "between": 2}.get(figure, 20)


def test_lines_survivors_funnel_and_parents_say_the_same(compared):
    outcomes: dict[str, set[bool]] = {}
    survivors_of_each = []
    for world, limits, edges, expected, looked_at in compared:
        assert (list(edges.figures), list(edges.passed)) == (list(TESTS), LINES)
        passed = [naive_passed(expected[e], limits) | {"rank": expected[e]["rank"] == 1} for e in edge_list(edges)]
        assert passed == [{key: bool(edges.passed[key][i]) for key in LINES} for i in range(len(passed))]
        for each in passed:
            for key, value in each.items():
                outcomes.setdefault(key, set()).add(value)
        kept = {edge for edge, each in zip(edge_list(edges), passed, strict=True) if all(each.values())}
        assert survivors(edges) == kept == {edge for edge, f in expected.items() if f["rank"] == 1}
        assert {(int(p), c) for c, p in enumerate(edges.parents(world.firings.d_sae)) if p >= 0} == kept  # one a child
        left = [sum(all(each[key] for key in LINES[: i + 1]) for each in passed) for i in range(len(LINES))]
        assert edges.funnel() == dict(zip(STAGES, [looked_at, *left], strict=True))
        assert list(edges.funnel()) == STAGES
        survivors_of_each.append(len(kept))
    assert max(survivors_of_each) >= 5
    assert {key for key, seen in outcomes.items() if seen != {True, False}} == {"coverage"}  # all candidates pass it


def test_several_trials_and_orders_share_one_reading_and_have_the_edges_that_they_have_alone():
    worlds, read = [random_world(seed) for seed in range(2)], []
    limits = changed(NO_Z, parents=3)
    rows = worlds[0].rows

    class Once(InMemory):
        def read(self, what: str) -> Iterator[Tensor]:
            read.append(what)
            return iter(self.batches)

    firings = [worlds[0].firings, worlds[0].firings.shuffled(0, 100)]
    orders = [worlds[0].level, worlds[1].level, np.zeros(26, dtype=int)]
    covering = [covering_pairs(each, limits.coverage, limits.least) for each in firings]
    trials = [
        Trial(worlds[0].sae, firings[0], covering[0], orders, limits),
        Trial(worlds[1].sae, firings[1], covering[1], orders[:1], limits),
    ]
    together = grade(Once(rows.batches), trials)
    assert read == ["test"]
    assert [len(edges) for edges in together] == [3, 1]
    for world, of, pairs, every in zip(worlds, firings, covering, together, strict=True):
        for order, edges in zip(orders, every, strict=False):
            ((alone,),) = grade(rows, [Trial(world.sae, of, pairs, [order], limits)])
            assert edge_list(edges) == edge_list(alone)
            assert len(edge_list(edges)) > 5
            np.testing.assert_equal(edges.figures, alone.figures)
            np.testing.assert_equal(edges.passed, alone.passed)


def test_without_a_candidate_or_a_firing_there_is_no_edge():
    world = random_world(9)
    for dense in (np.zeros((330, 26)), np.eye(330, 26)):
        edges = world._replace(firings=of_dense(dense)).grade(Limits())
        assert edge_list(edges) == []
        assert set(edges.funnel().values()) == {0}
        assert (edges.parents(26) == -1).all()
    assert edge_list(covering_pairs(of_dense(np.zeros((9, 5))), 0.5, 0)) == []


def test_of_equal_scores_one_is_first():
    rank = ranks(np.array([0.5, 0.5, 0.5, 0.2]), np.array([1, 1, 2, 1]), np.ones(4, dtype=bool))
    assert sorted(rank[[0, 1]].tolist()) == [1, 2]
    assert rank[2:].tolist() == [1, 3]


def test_a_sibling_that_is_its_parent_shares_nothing():
    pairs = Pairs(np.array([0, 0]), np.array([1, 2]), np.ones(2), np.ones(2))
    cosines = sibling_cosines(np.eye(3)[[0, 0, 1]], pairs, pairs.parent, pairs.child, np.ones(3, dtype=bool))
    assert cosines.tolist() == [0, 0]


# Worlds whose hierarchy is known --------------------------------------------------------------------------------------


def graded(
    root: Path, sae: MatryoshkaSAE, x: Tensor, limits: Limits | None = None, shuffle: int | None = None
) -> tuple[Edges, Firings]:
    """The edges of the SAE on these rows, through a real shard directory."""
    limits = Limits() if limits is None else limits
    shards = given_shards(root, [x[: len(x) // 2]], [x[len(x) // 2 :]])
    firings = firings_of(sae, shards, None, limits.floor)
    if shuffle is not None:
        firings = firings.shuffled(shuffle)
    return World(sae, FirstRows(shards), firings, levels(sae.prefixes), x.numpy()).grade(limits), firings


def survivors(edges: Edges) -> set[Edge]:
    return {edge for edge, good in zip(edge_list(edges), edges.survives, strict=True) if good}


def refuted_by(edges: Edges, edge: Edge) -> set[str]:
    i = edge_list(edges).index(edge)
    return {key for key, passed in edges.passed.items() if not passed[i]}


def figure(edges: Edges, key: str, edge: Edge) -> float:
    return float(edges.figures[key][edge_list(edges).index(edge)])


def edges_among(order: Sequence[int], parent: Sequence[int]) -> set[Edge]:
    """The true edges between the latents that stand for these features."""
    return {(order.index(parent[c]), order.index(c)) for c in order if parent[c] in order}


PARENT = [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 8  # 3 parents × 3 exclusive children and 8 alone
TREE = edges_among(range(20), PARENT)
ONE_HOT = torch.eye(20)


def tree_codes(rows: int = 4000, spread: float = 0.2, seed: int = 0, **options: Any) -> Tensor:
    """True activations [rows, features] of a forest."""
    rates = {"root_p": 0.3, "child_p": 0.25, "independent_p": 0.1}
    source = ForestSource(**(rates | options), magnitude_std=spread, seed=seed)
    offsets, feature, value = source.draw(rows, torch.Generator().manual_seed(seed))
    codes = torch.zeros(rows, source.features_count)
    codes[torch.arange(rows).repeat_interleave(offsets.diff()), feature] = value
    return codes


@pytest.mark.parametrize("spread", [0.0, 0.2])
@pytest.mark.parametrize("prefixes", [[20], [3, 12, 20]])
@pytest.mark.parametrize("seed", range(3))
def test_of_a_perfect_sae_exactly_the_true_edges_survive(tmp_path, spread, prefixes, seed):
    edges, firings = graded(tmp_path, sae_of(ONE_HOT, prefixes=prefixes), tree_codes(spread=spread, seed=seed))
    assert survivors(edges) == TREE
    assert edges.parents(20).tolist() == PARENT
    true = edges.survives
    assert (edges.figures["coverage"][true] == 1).all()
    assert not edges.holes[true].any()
    np.testing.assert_allclose(edges.figures["sibling"][true], 0, atol=1e-6)
    rate = firings.counts[edges.parent[true]] / firings.rows
    np.testing.assert_allclose(edges.figures["pmi"][true], -np.log2(rate))
    np.testing.assert_allclose(edges.figures["reverse"][true], 0.25, atol=0.08)


def test_of_oblique_directions_of_any_norm_the_true_edges_survive(tmp_path):
    generator = torch.Generator().manual_seed(0)
    features = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0][:20]
    features = normalize(features + 0.04 * torch.randn(20, 24, generator=generator), dim=1)
    features *= 1 + torch.rand(20, 1, generator=generator)
    features[:3] *= 1.2
    sae = sae_of(features * 2, torch.linalg.pinv(features).T / 2, threshold=0.05)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(24, generator=generator))
    edges, _ = graded(tmp_path, sae, tree_codes(seed=1) @ features + sae.b_dec.detach(), Limits(mcs=0.3))
    assert survivors(edges) == TREE


def test_an_absorbed_hierarchy_leaves_no_edge(tmp_path):
    """Children contain their parent, and the parent is silent under them."""
    encoder, decoder = ONE_HOT.clone(), ONE_HOT.clone()
    for p, c in TREE:
        encoder[p, c] = -9
        decoder[c, p] = 1
    edges, firings = graded(tmp_path, sae_of(decoder, encoder), tree_codes())
    assert (firings.counts > 20).all()
    assert not set(edge_list(edges)) & TREE
    assert survivors(edges) == set()


def test_a_parent_that_fires_where_its_child_contains_it_is_not_needed(tmp_path):
    """It only doubles what the child reconstructs: to remove it does no harm."""
    decoder = ONE_HOT.clone()
    for p, c in TREE:
        decoder[c, p] = 1
    edges, _ = graded(tmp_path, sae_of(decoder, ONE_HOT), tree_codes(spread=0.1))
    assert all("z" in refuted_by(edges, edge) and figure(edges, "harm", edge) < 0 for edge in TREE)
    assert survivors(edges) == set()


def test_a_child_that_explains_nothing_is_refuted_by_its_gain(tmp_path):
    """It fires on some of the parent's rows, and decodes to what is not there."""
    x = torch.cat([tree_codes(), torch.zeros(4000, 1)], 1)
    encoder = torch.eye(20, 21)
    decoder = encoder.clone()
    decoder[3:6, 3:6] = 0
    decoder[3:6, 20] = 1
    edges, _ = graded(tmp_path, sae_of(decoder, encoder), x)
    assert all("gain" in refuted_by(edges, (0, c)) for c in (3, 4, 5))
    assert survivors(edges) == {edge for edge in TREE if edge[0] != 0}


def test_a_child_beside_a_far_stronger_parent_is_refuted_by_mcs(tmp_path):
    codes = tree_codes()
    codes[:, 0] *= 3
    edges, _ = graded(tmp_path, sae_of(ONE_HOT), codes)
    assert all(refuted_by(edges, (0, c)) == {"mcs", "rank"} for c in (3, 4, 5))
    assert survivors(edges) == {edge for edge in TREE if edge[0] != 0}


def test_a_superparent_is_flagged_and_has_no_edge(tmp_path):
    edges, _ = graded(tmp_path, sae_of(torch.eye(21)), torch.cat([tree_codes(), torch.ones(4000, 1)], 1))
    of_it = edges.parent == 20
    assert of_it.sum() >= 8  # it covers everything
    assert (edges.figures["covers"][of_it] == 1).all()
    assert np.isnan(edges.figures["sibling"][of_it]).all()
    np.testing.assert_array_equal(edges.passed["covers"], ~of_it)
    assert survivors(edges) == TREE


@pytest.mark.parametrize("less", [0.0, 0.4])
def test_a_latent_split_in_two_that_fire_together_has_no_edge_of_the_two(tmp_path, less):
    """The second of them is above its threshold a little less often, or exactly as often."""
    codes = torch.rand(3000, 6, generator=torch.Generator().manual_seed(0))
    codes = torch.where(codes < 0.2, 0.5 + 5 * codes / 2, 0.0)
    encoder = torch.eye(6)[[0, *range(6)]]
    decoder = encoder.clone()
    decoder[:2] /= 2
    sae = sae_of(decoder, encoder)
    sae.threshold[1] = 0.5 + less / 4
    edges, firings = graded(tmp_path, sae, codes)
    share = firings.counts[1] / firings.counts[0]
    if less:
        assert 0.7 < share < 1
        assert "reverse" in refuted_by(edges, (0, 1))
    else:
        assert share == 1
        assert not {(0, 1), (1, 0)} & set(edge_list(edges))
    assert survivors(edges) == set()


def test_of_two_parents_the_one_more_like_the_child_is_kept(tmp_path):
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
        assert figure(edges, "rank", (strong, 2)) == 2


DEEP = {"trees": 2, "branching": [2, 2], "independent": 10, "root_p": 0.3, "child_p": [0.4, 0.4]}
DEEP_PARENT = [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] + [-1] * 10  # two trees of three levels, ten alone


LEVEL_BETWEEN_LAST = [*range(2), *range(6, 24), *range(2, 6)]


@pytest.mark.parametrize(("prefixes", "order"), [([2, 6, 24], list(range(24))), ([2, 20, 24], LEVEL_BETWEEN_LAST)])
def test_a_latent_between_refutes_whatever_its_level(tmp_path, prefixes, order):
    """Where the level between is in the last prefix, its own children are no candidates, yet it refutes."""
    edges, _ = graded(tmp_path, sae_of(torch.eye(24)[order], prefixes=prefixes), tree_codes(12_000, **DEEP))
    for c in range(6, 14):
        top, leaf = order.index(DEEP_PARENT[DEEP_PARENT[c]]), order.index(c)
        assert figure(edges, "between", (top, leaf)) == 1
        assert "between" in refuted_by(edges, (top, leaf))
    level = levels(prefixes)
    assert survivors(edges) == {(p, c) for p, c in edges_among(order, DEEP_PARENT) if level[p] <= level[c]}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_siblings_that_absorbed_the_level_between_are_refuted(tmp_path, share):
    """The latent of feature 2, between 0 and 6, 7, is gone, and 6 and 7 contain it, or it is nowhere."""
    order = [j for j in range(24) if j != 2]
    decoder = torch.eye(24)
    decoder[6, 2] = decoder[7, 2] = share
    edges, _ = graded(tmp_path, sae_of(decoder[order], torch.eye(24)[order]), tree_codes(12_000, **DEEP))
    siblings = [(order.index(0), order.index(c)) for c in (6, 7)]
    for edge in siblings:  # no test on two directions could tell what is nowhere
        assert refuted_by(edges, edge) == ({"sibling", "rank"} if share else set())
        assert figure(edges, "sibling", edge) == pytest.approx(share / 2, abs=1e-6)
    assert survivors(edges) - set(siblings) == edges_among(order, DEEP_PARENT)


def test_latents_of_busy_rows_are_not_taken_for_a_hierarchy(tmp_path):
    """Two that fire on rows on which much is active, otherwise independently; by rates alone the lift would be 6."""
    generator = torch.Generator().manual_seed(0)
    rows, n = 6000, 40
    busy = torch.rand(rows, 1, generator=generator) < 0.1
    rate = torch.full((n,), 0.4)
    rate[0], rate[1] = 0.7, 0.3
    fires = torch.rand(rows, n, generator=generator) < torch.where(busy, rate, 0.02 * (torch.arange(n) > 1))
    codes = fires * (0.5 + torch.rand(rows, n, generator=generator))
    edges, firings = graded(tmp_path, sae_of(torch.eye(n)), codes, Limits(matched=1))  # the chance alone
    assert figure(edges, "coverage", (0, 1)) * rows / firings.counts[0] > 6
    assert figure(edges, "lift", (0, 1)) < 2
    assert refuted_by(edges, (0, 1)) & {"lift", "q"}
    assert survivors(edges) == set()


def test_latents_that_fire_as_often_are_a_chance_too(tmp_path):
    """A child whose rows any latent of that rate covers has no parent: the lift is over these, if they are more."""
    generator = torch.Generator().manual_seed(1)
    rows = 6000
    topic = torch.rand(rows, 1, generator=generator) < 0.12
    fires = torch.rand(rows, 30, generator=generator) < 0.05
    fires[:, :7] = topic & (torch.rand(rows, 7, generator=generator) < 0.85)
    fires[:, 7] = topic[:, 0] & (torch.rand(rows, generator=generator) < 0.2)
    codes = fires * (0.5 + torch.rand(rows, 30, generator=generator))
    few, matched = (graded(tmp_path / str(n), sae_of(torch.eye(30)), codes, Limits(matched=n))[0] for n in (1, 7))
    for parent in range(7):
        assert figure(few, "lift", (parent, 7)) > 2
        assert figure(matched, "lift", (parent, 7)) < 1.3
    assert survivors(matched) == set()


@pytest.mark.parametrize(("prefixes", "is_candidate"), [([20], True), ([17, 20], False)])
def test_a_parent_of_a_later_level_is_no_candidate(tmp_path, prefixes, is_candidate):
    order = [*range(3, 20), *range(3)]  # parents last
    edges, firings = graded(tmp_path, sae_of(ONE_HOT[order], prefixes=prefixes), tree_codes())
    true = edges_among(order, PARENT)
    assert true <= set(edge_list(covering_pairs(firings, 0.5, 20)))
    assert true & set(edge_list(edges)) == survivors(edges) == (true if is_candidate else set())


@pytest.mark.parametrize("seed", range(5))
def test_of_shuffled_firings_nothing_survives(tmp_path, seed):
    edges, firings = graded(tmp_path, sae_of(ONE_HOT), tree_codes(), shuffle=seed)
    assert firings.matrix.nnz > 0
    assert not set(edge_list(edges)) & TREE
    assert survivors(edges) == set()
    edges, _ = graded(tmp_path, sae_of(torch.eye(24)), tree_codes(12_000, **DEEP), shuffle=seed)
    assert survivors(edges) == set()


def test_what_is_below_the_floor_does_not_fire(tmp_path):
    """Parents leak a little into every row: without a floor they are superparents, with it the tree is found."""
    codes = tree_codes()
    codes[:, :3] += 0.02
    for floor, kept in ((0.0, set()), (0.05, TREE)):
        edges, _ = graded(tmp_path, sae_of(ONE_HOT, threshold=0.001), codes, Limits(floor=floor))
        assert survivors(edges) == kept
