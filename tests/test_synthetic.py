"""The synthetic forest: its rates, siblings, values, directions and correlations against what was asked for."""

import inspect
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import multivariate_normal, norm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msae.config import config_dir
from msae.data import synthetic
from msae.data.firing import bernoulli, folded_normal_mean, intensities, merged, zipf
from msae.data.harvest import harvest
from msae.data.source import Source
from msae.data.synthetic import ForestSource

ZIPF = {"rates": "zipf", "zipf_exponent": 0.5, "max_p": 0.4, "min_p": 0.01}
WORLDS: dict[str, dict[str, Any]] = {
    "tree": {},
    "deep": {"trees": 2, "branching": [2, 3, 2], "root_p": 0.6, "child_p": [0.45, 0.3, 0.5], "independent": 2},
    "siblings independent": {"trees": 2, "branching": [3, 2], "exclusive": False, "root_p": 0.5, "child_p": [0.6, 1.0]},
    "zipf": {"trees": 5, "branching": [4, 4], "independent": 20, **ZIPF},
    "zipf, siblings independent": {"trees": 3, "branching": [2, 5], "independent": 0, "exclusive": False, **ZIPF},
    "zipf, with room": {"trees": 5, "branching": [2, 2], "independent": 9, **ZIPF, "most_with_child": 0.5},
    "correlated": {"trees": 4, "branching": [3], "correlation_rank": 3, "correlation_scale": 0.4},
    "roots alone": {"trees": 3, "branching": [], "independent": 0, "root_p": 0.3},
    "always on": {"trees": 2, "branching": [2], "root_p": 1.0, "child_p": 0.5, "independent": 2, "independent_p": 0.0},
    "values": {
        "magnitude_mean": [2, 1],
        "magnitude_std": 0.4,
        "magnitude_std_spread": 0.3,
        "scale_by_parent": True,
    },
    "half-normal": {"magnitude_mean": 0.0, "magnitude_std": 2.0, "branching": [2, 2], "scale_by_parent": True},
}
ROWS = 100_000
SIGMAS = 5.0  # of what is drawn; about 200 figures in all, each beyond with probability 6e-7


def drawn(source: ForestSource, rows: int = ROWS, seed: int = 0) -> Tensor:
    """Dense values [rows, n]."""
    row, feature, value = source.draw(rows, torch.Generator().manual_seed(seed))
    codes = torch.zeros(rows, source.features_count)
    codes[row, feature] = value
    return codes


@pytest.fixture(scope="module", params=WORLDS)
def world(request) -> tuple[ForestSource, Tensor]:
    source = ForestSource(**WORLDS[request.param])
    return source, drawn(source)


def edges(source: ForestSource) -> list[tuple[int, int]]:
    """(parent, child)."""
    return [(p, c) for c, p in enumerate(source.parent.tolist()) if p >= 0]


def close_to(found: Tensor, p: Tensor, trials: Tensor | int) -> Tensor:
    """Whether these shares of so many trials are what the probabilities p give."""
    return (found - p).abs() <= SIGMAS * (p * (1 - p) / trials).clamp_min(0).sqrt() + 1e-7


# --- which features are active ---------------------------------------------------------------------------------


def test_each_feature_has_its_rate(world) -> None:
    source, codes = world
    active = (codes > 0).double()
    rate = source.rate.double()
    assert close_to(active.mean(0), rate, ROWS).all()
    spread = float(active.sum(1).std()) / math.sqrt(ROWS)
    assert float(active.sum(1).mean()) == pytest.approx(float(rate.sum()), abs=SIGMAS * spread + 1e-6)  # L0


def test_a_child_is_active_with_its_parent_alone_as_often_as_their_rates_say(world) -> None:
    source, codes = world
    active = codes > 0
    for parent, child in edges(source):
        assert not (active[:, child] & ~active[:, parent]).any()
        with_parent = active[active[:, parent], child].double()
        p = (source.rate[child] / source.rate[parent]).double()
        assert close_to(with_parent.mean(), p, len(with_parent)), (parent, child)


def test_siblings_exclude_each_other_or_are_independent(world) -> None:
    source, codes = world
    active = (codes > 0).double()
    for parent in sorted({p for p, _ in edges(source)}):
        children = [c for p, c in edges(source) if p == parent]
        here = active[active[:, parent] > 0][:, children]
        if source.exclusive:
            assert here.sum(1).max() <= 1
            continue
        both = here.T @ here / len(here)
        p = (source.rate[children] / source.rate[parent]).double()
        others = ~torch.eye(len(children), dtype=torch.bool)
        assert close_to(both, p[:, None] * p, len(here))[others].all()


def test_families_and_what_is_alone_are_independent_where_nothing_is_correlated(world) -> None:
    source, codes = world
    if source.loadings.shape[1]:
        return
    active = (codes[:, source.top] > 0).double()
    p = source.rate[source.top].double()
    others = ~torch.eye(len(p), dtype=torch.bool)
    assert close_to(active.T @ active / ROWS, p[:, None] * p, ROWS)[others].all()
    first, second = active[:-1], active[1:]  # successive rows
    assert close_to(first.T @ second / (ROWS - 1), p[:, None] * p, ROWS).all()


def test_the_tree_is_nabeshimas() -> None:
    source = ForestSource()
    torch.testing.assert_close(source.rate, torch.tensor([0.15] * 3 + [0.03] * 9 + [0.05] * 8))
    assert source.parent.tolist() == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 8
    assert float(source.rate.sum()) == pytest.approx(1.12)
    assert set(drawn(source).unique().tolist()) == {0.0, 1.0}


def test_features_are_numbered_level_by_level() -> None:
    source = ForestSource(trees=2, branching=[2, 3], independent=2)
    assert source.parent.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, -1, -1]
    assert source.top.tolist() == [0, 1, 18, 19]


def test_rates_multiply_along_a_path() -> None:
    source = ForestSource(trees=1, branching=[2, 3], root_p=0.5, child_p=[0.4, 0.1], independent=1, independent_p=0.7)
    torch.testing.assert_close(source.rate, torch.tensor([0.5] + [0.2] * 2 + [0.02] * 6 + [0.7]))


def test_zipf_rates() -> None:
    """i^−1 of 1..4, 1, 1/2, 1/3, 1/4, moved and scaled so that they go from 0.8 to 0.2."""
    torch.testing.assert_close(
        zipf(4, 1.0, 0.8, 0.2), torch.tensor([0.8, 0.2 + 0.6 / 3, 0.2 + 0.6 / 9, 0.2], dtype=torch.float64)
    )
    assert zipf(1, 1.0, 0.8, 0.2).tolist() == [0.8]


def test_impossible_rates_are_lowered_from_the_roots_down() -> None:
    """A root of 0.8 with two children of 0.4 and 0.26667, which need 0.66667 of all rows, and 0.2 alone."""
    options = {"trees": 1, "branching": [2], "independent": 1, **ZIPF, "zipf_exponent": 1.0, "max_p": 0.8, "min_p": 0.2}
    asked = zipf(4, 1.0, 0.8, 0.2)
    fits = ForestSource(**options).rate
    torch.testing.assert_close(fits.double(), asked)
    half = ForestSource(**options, most_with_child=0.5).rate.double()  # 0.4 of 0.66667: three fifths of each
    torch.testing.assert_close(half, asked * torch.tensor([1, 0.6, 0.6, 1]))
    capped = ForestSource(**options, most_with_child=0.4, exclusive=False).rate.double()
    torch.testing.assert_close(capped, torch.tensor([0.8, 0.32, 0.8 / 3, 0.2]).double())


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("exponent", [0.3, 1.0, 2.0])
def test_zipf_rates_are_possible_and_no_more_than_asked(exclusive, exponent) -> None:
    options = {**ZIPF, "zipf_exponent": exponent, "exclusive": exclusive, "most_with_child": 0.9}
    source = ForestSource(trees=7, branching=[3, 1, 4], independent=30, **options)
    asked = zipf(source.features_count, exponent, 0.4, 0.01)
    assert (source.rate <= asked + 1e-7).all()
    torch.testing.assert_close(source.rate[source.top].double(), asked[source.top])
    children = torch.zeros(source.features_count)
    for parent, child in edges(source):
        assert source.rate[child] <= 0.9 * source.rate[parent] + 1e-7
        children[parent] += source.rate[child]
    if exclusive:
        assert (children <= 0.9 * source.rate + 1e-6).all()


def test_a_saturated_parent_always_has_a_child() -> None:
    source = ForestSource(trees=2, branching=[4], root_p=0.5, child_p=0.25, independent=1)
    active = drawn(source) > 0
    assert torch.equal(active[:, :2], active[:, 2:10].view(-1, 2, 4).any(2))


# --- drawing ---------------------------------------------------------------------------------------------------


def test_entries_come_by_row_and_feature_and_only_once(world) -> None:
    source, _ = world
    row, feature, value = source.draw(5000, torch.Generator().manual_seed(1))
    assert (row.dtype, feature.dtype, value.dtype) == (torch.int64, torch.int64, torch.float32)
    assert ((row * source.features_count + feature).diff() > 0).all()
    assert int(feature.max()) < source.features_count
    assert int(row.max()) < 5000


def test_bernoulli_of_overlapping_ranges() -> None:
    """Ranges of 3 cells, from cells 0, 3 and 0 again, many times: cells of probability 0, 1, nearly 1 and small."""
    p = torch.tensor([0.0, 1.0, 0.3, 0.95, 0.01, 0.5], dtype=torch.float64)
    cumulative = torch.cat([p.new_zeros(1), intensities(p).cumsum(0)])
    first = torch.tensor([0, 3, 0]).repeat(30_000)
    k, cell = bernoulli(cumulative, first, 3, torch.Generator().manual_seed(0))
    hits = torch.zeros(len(first), 6).double()
    hits[k, cell] = 1
    assert len(k) == hits.sum()
    assert (hits[first == 0][:, 3:] == 0).all()
    assert (hits[first == 3][:, :3] == 0).all()
    assert close_to(hits[first == 0][:, :3].mean(0), p[:3], 60_000).all()
    assert close_to(hits[first == 3][:, 3:].mean(0), p[3:], 30_000).all()
    pair = (hits[first == 3][:, 3] * hits[first == 3][:, 5]).mean()
    assert close_to(pair, p[3] * p[5], 30_000)


def test_bernoulli_of_nothing() -> None:
    for first, p in ((torch.zeros(0, dtype=torch.int64), 0.5), (torch.zeros(4, dtype=torch.int64), 0.0)):
        cumulative = torch.tensor([0.0, p], dtype=torch.float64)
        k, cell = bernoulli(cumulative, first, 1, torch.Generator().manual_seed(0))
        assert len(k) == len(cell) == 0


def test_merged_by_hand() -> None:
    """Rows 0 to 3, the third empty."""
    one = (torch.tensor([0, 0, 1]), torch.tensor([1, 2, 1]), torch.tensor([0.1, 0.2, 0.3]))
    two = (torch.tensor([1, 3]), torch.tensor([7, 8]), torch.tensor([0.4, 0.5]))
    offsets, feature, value = merged(4, [one, two])
    assert offsets.tolist() == [0, 2, 4, 4, 5]
    assert feature.tolist() == [1, 2, 1, 7, 8]
    torch.testing.assert_close(value, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("exclusive", [True, False])
def test_memory_grows_with_the_active_entries_not_with_rows_times_features(rank, exclusive) -> None:
    """8000 rows of 15,000 features, of which about 10 are active: no tensor has more than 1/200 of their product."""
    options = {**ZIPF, "max_p": 0.02, "min_p": 5e-4, "exclusive": exclusive, "correlation_rank": rank}
    source = ForestSource(
        rows=8000, val_rows=8000, trees=500, branching=[4, 4], independent=4500, d_in=8, directions="random", **options
    )
    with Largest() as largest:
        rows = source._rows("train", 0, 8000)
        source.truth()
    assert rows.shape == (8000, 8)
    assert float(source.rate.sum()) * 7000 < largest.elements < 8000 * source.features_count / 200


def test_blocks_of_rows_change_nothing_but_the_random_numbers(monkeypatch) -> None:
    """Rates and rows of many small blocks, the last one short."""
    monkeypatch.setattr(synthetic, "BLOCK", 1000)
    monkeypatch.setattr(synthetic, "COPULA_CELLS", 900)
    source = ForestSource(val_rows=ROWS + 17, correlation_rank=2)
    truth = source.truth()
    assert len(truth["offsets"]) == ROWS + 18
    counts = torch.bincount(truth["feature"], minlength=20)
    assert close_to(counts / (ROWS + 17), source.rate.double(), ROWS).all()


# --- correlation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "scale"), [(2, 0.5), (3, 0.3), (4, 2.0)])
def test_correlated_features_have_their_rates_and_the_copulas_joint_rates(rank, scale) -> None:
    """P(both) = P(g_i > t_i, g_j > t_j) for normal g with correlation λ_i·λ_j. At scale 2, ‖λ‖ is shortened."""
    source = ForestSource(trees=3, independent=3, correlation_rank=rank, correlation_scale=scale)
    active = (drawn(source, 4 * ROWS)[:, source.top] > 0).double()
    p = source.rate[source.top].double()
    assert close_to(active.mean(0), p, 4 * ROWS).all()
    correlation = (source.loadings @ source.loadings.T).double()
    assert correlation.diag().max() < 0.9901
    joint = active.T @ active / (4 * ROWS)
    independent = 0
    for i in range(6):
        for j in range(i):
            r = float(correlation[i, j])
            quantiles = [norm.ppf(float(p[i])), norm.ppf(float(p[j]))]
            expected = torch.tensor(multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf(quantiles))
            assert close_to(joint[i, j], expected, 4 * ROWS), (i, j, r)
            independent += int(close_to(joint[i, j], p[i] * p[j], 4 * ROWS))
    assert independent < 8  # of 15: they are far from what independent features give


def test_correlations_have_the_size_that_scale_and_rank_give() -> None:
    source = ForestSource(trees=100, branching=[2], independent=200, correlation_rank=25, correlation_scale=0.1)
    correlation = source.loadings @ source.loadings.T
    off = correlation[~torch.eye(300, dtype=torch.bool)]
    assert float(off.square().mean().sqrt()) == pytest.approx(0.1**2 * math.sqrt(25), rel=0.05)
    assert float(correlation.diag().mean()) == pytest.approx(0.25, rel=0.05)


def test_children_are_correlated_through_their_parents_alone() -> None:
    """Given their parents, children of two trees are independent."""
    source = ForestSource(trees=2, root_p=0.5, independent=0, correlation_rank=1, correlation_scale=1.0)
    active = (drawn(source, 4 * ROWS) > 0).double()
    both = active[(active[:, 0] * active[:, 1]) > 0]
    p = torch.full((3, 3), 0.04).double()
    assert close_to(both[:, 2:5].T @ both[:, 5:8] / len(both), p, len(both)).all()
    assert not close_to((active[:, 0] * active[:, 1]).mean(), torch.tensor(0.25), 4 * ROWS)


# --- values ----------------------------------------------------------------------------------------------------


def test_values_are_positive_and_have_their_mean(world) -> None:
    """With scale_by_parent too: the parent's value is divided by its mean."""
    source, codes = world
    for feature in range(source.features_count):
        found = codes[codes[:, feature] > 0, feature].double()
        if len(found) > 1:
            error = SIGMAS * float(found.std()) / math.sqrt(len(found)) + 1e-6
            assert float(found.mean()) == pytest.approx(float(source.expected[feature]), abs=error)


def test_constant_values() -> None:
    source = ForestSource(magnitude_mean=[3.0, 1.0], scale_by_parent=True)
    codes = drawn(source, 10_000)
    for feature in range(20):
        found = codes[codes[:, feature] > 0, feature]
        torch.testing.assert_close(found, torch.full_like(found, 3 - 2 * feature / 19))


def test_half_normal_and_folded_values() -> None:
    """E|s·randn| = s√(2/π), E(…)² = m² + s²."""
    for mean, std in ((0.0, 2.0), (1.0, 0.5), (1.0, 2.0)):
        source = ForestSource(magnitude_mean=mean, magnitude_std=std)
        values = source.draw(ROWS, torch.Generator().manual_seed(0))[2].double()
        assert (values >= 0).all()
        square = mean**2 + std**2
        assert float(values.square().mean()) == pytest.approx(square, rel=0.05)  # 5 σ: 5 √2 / √112,000 = 0.02
        assert float(values.mean()) == pytest.approx(float(source.expected[0]), rel=0.02)
    half = folded_normal_mean(torch.tensor([0.0]), torch.tensor([2.0]))
    assert float(half) == pytest.approx(2 * math.sqrt(2 / math.pi))
    assert float(folded_normal_mean(torch.tensor([3.0]), torch.tensor([0.0]))) == 3
    # ∫|x| of N(1, 2²): 2√(2/π) e^(−1/8) + (1 − 2Φ(−1/2))
    expected = 2 * math.sqrt(2 / math.pi) * math.exp(-1 / 8) + 1 - 2 * norm.cdf(-0.5)
    assert float(folded_normal_mean(torch.tensor([1.0]), torch.tensor([2.0]))) == pytest.approx(expected, rel=1e-6)


def test_each_feature_has_a_spread_of_its_own() -> None:
    options = {"trees": 300, "branching": [], "independent": 0, "root_p": 0.2}
    source = ForestSource(magnitude_mean=9.0, magnitude_std=0.5, magnitude_std_spread=0.5, **options)
    assert (source.std >= 0).all()
    assert float(source.std.square().mean()) == pytest.approx(0.5, rel=0.35)  # 5 σ of 300 squares
    codes = drawn(source, 20_000)
    for feature in range(0, 300, 30):
        found = codes[codes[:, feature] > 0, feature]
        assert float(found.std()) == pytest.approx(float(source.std[feature]), rel=0.08)
        assert float(found.mean()) == pytest.approx(9, abs=0.15)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_childs_value_is_scaled_by_its_parents(exclusive) -> None:
    """E[child · parent] = E[child] E[parent²] / E[parent] with scaling, E[child] E[parent] without; over two levels."""
    options = {"trees": 1, "branching": [1, 1], "root_p": 1.0, "child_p": 1.0, "independent": 0, "exclusive": exclusive}
    for scaled in (True, False):
        source = ForestSource(magnitude_mean=2.0, magnitude_std=0.5, scale_by_parent=scaled, **options)
        codes = drawn(source).double()
        for parent, child in edges(source):
            squares = codes[:, parent].square().mean() / codes[:, parent].mean() if scaled else codes[:, parent].mean()
            found = float((codes[:, parent] * codes[:, child]).mean())
            assert found == pytest.approx(float(squares * codes[:, child].mean()), rel=0.01)
        correlation = torch.corrcoef(codes.T)[0, 2]
        assert (correlation > 0.4) if scaled else (abs(correlation) < 0.02)


# --- the world -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_in", [None, 33])
def test_orthogonal_directions_and_norms(d_in) -> None:
    features = ForestSource(norm_spread=0.05, d_in=d_in).features
    assert features.shape == (20, d_in or 20)
    gram = features @ features.T
    assert (gram - gram.diag().diag()).abs().max() < 1e-5
    assert 0.01 < float(features.norm(dim=1).std()) < 0.15
    torch.testing.assert_close(ForestSource(norm_spread=0, d_in=d_in).features.norm(dim=1), torch.ones(20))


def test_random_directions_may_be_more_than_dimensions() -> None:
    """cos² of two random directions is 1/d_in on average."""
    source = ForestSource(trees=30, branching=[4, 4], independent=70, d_in=64, directions="random", norm_spread=0)
    assert source.features.shape == (700, 64)
    torch.testing.assert_close(source.features.norm(dim=1), torch.ones(700))
    off = (source.features @ source.features.T)[~torch.eye(700, dtype=torch.bool)]
    assert float(off.square().mean()) == pytest.approx(1 / 64, rel=0.05)
    assert abs(float(off.mean())) < 0.005


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("directions", ["random", "orthogonal"])
def test_children_have_the_cosine_asked_for_with_their_parents(cosine, directions) -> None:
    d_in = {"random": 16, "orthogonal": None}[directions]
    source = ForestSource(trees=3, branching=[3, 2], directions=directions, d_in=d_in, parent_cosine=cosine)
    u = torch.nn.functional.normalize(source.features, dim=1)
    for parent, child in edges(source):
        assert float(u[parent] @ u[child]) == pytest.approx(cosine, abs=1e-5)
    if directions == "orthogonal" and cosine != 1:
        assert abs(float(u[0] @ u[1])) < 1e-5  # roots stay so, siblings share their parent
        assert float(u[3] @ u[4]) == pytest.approx(cosine**2, abs=1e-5)


def first_rows(source: ForestSource, split: str) -> Tensor:
    return next(source.chunks(None)).splits[split].activations["synthetic"]


SMALL: dict[str, Any] = {"rows": 500, "val_rows": 300, "chunk_rows": 100}


@pytest.mark.parametrize(
    "other",
    [
        {"rows": 100, "val_rows": 30, "chunk_rows": 50},
        {"root_p": 0.5, "child_p": 0.1, "independent_p": 0.01},
        ZIPF,
        {"exclusive": False},
        {"magnitude_mean": 2.0, "magnitude_std": 1.0, "scale_by_parent": True},
        {"noise": 0.5},
        {"correlation_rank": 3},
        {"name": "forest"},
    ],
    ids=str,
)
def test_other_sizes_rates_and_values_keep_the_world(other) -> None:
    base = {"magnitude_std_spread": 0.3, **SMALL}
    assert torch.equal(ForestSource(**base).features, ForestSource(**{**base, **other}).features)
    correlated = [ForestSource(**{"correlation_rank": 3, **base, **o}) for o in ({}, other)]
    assert torch.equal(correlated[0].loadings, correlated[1].loadings)
    if "magnitude_std" not in other:
        assert torch.equal(correlated[0].std, correlated[1].std)


def test_world_and_rows_come_from_separate_streams(monkeypatch) -> None:
    base = ForestSource(**SMALL)
    shorter = ForestSource(**{**SMALL, "rows": 100, "val_rows": 30})  # the same train rows
    assert torch.equal(first_rows(base, "train"), first_rows(shorter, "train"))
    other = ForestSource(**SMALL, seed=1)
    assert not torch.equal(base.features, other.features)
    even = ForestSource(rows=100, val_rows=100, chunk_rows=100)
    assert not torch.equal(first_rows(even, "train"), first_rows(even, "val"))
    train = [chunk.splits["train"].activations["synthetic"] for chunk in base.chunks(None)]
    assert not torch.equal(train[0], train[1])

    asked: list[tuple[Any, ...]] = []
    make = synthetic.stream

    def noted(*parts: Any) -> torch.Generator:
        asked.append(parts)
        return make(*parts)

    monkeypatch.setattr(synthetic, "stream", noted)
    list(ForestSource(**SMALL, noise=0.1, correlation_rank=2, magnitude_std_spread=0.1, seed=7).chunks(None))
    assert len(asked) == len(set(asked)) == 4 + 2 * (5 + 1)  # the world's; of each chunk's splits what is active, noise
    assert all(parts[0] == 7 for parts in asked)
    assert not {parts[1] for parts in asked} & {"blocks", "rows", "prefixes"}  # the reader's and the model's


def test_noise_is_added_to_rows_alone() -> None:
    quiet, noisy = (ForestSource(**SMALL, noise=noise, d_in=40) for noise in (0.0, 0.3))
    for key, tensor in quiet.truth().items():
        assert torch.equal(tensor, noisy.truth()[key]), key
    for split in ("train", "val"):
        added = first_rows(noisy, split) - first_rows(quiet, split)
        assert float(added.std()) == pytest.approx(0.3, rel=0.06)  # 5 σ of 4000: 5 / √8000
        assert abs(float(added.mean())) < 5 * 0.3 / math.sqrt(4000)
        both = torch.stack([added.flatten(), first_rows(quiet, split).flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.08  # 5 σ of 4000: 5 / √4000
    train = [chunk.splits["train"].activations["synthetic"] for chunk in noisy.chunks(None)]
    clean = [chunk.splits["train"].activations["synthetic"] for chunk in quiet.chunks(None)]
    assert not torch.allclose(train[0] - clean[0], train[1] - clean[1])  # each chunk has noise of its own


# --- a source of shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_chunks_are_the_same_again_and_from_any_state(name) -> None:
    def rows(chunks: Iterator) -> list[dict[str, Tensor]]:
        return [{split: part.activations["synthetic"] for split, part in chunk.splits.items()} for chunk in chunks]

    source = ForestSource(**WORLDS[name], noise=0.1, rows=550, val_rows=120, chunk_rows=100)
    states = [chunk.state for chunk in source.chunks(None)]
    whole = rows(source.chunks(None))
    assert [len(chunk["train"]) for chunk in whole] == [100] * 5 + [50]
    assert [len(chunk["val"]) for chunk in whole if "val" in chunk] == [120]
    fresh = ForestSource(**WORLDS[name], noise=0.1, rows=550, val_rows=120, chunk_rows=100)
    for done, state in enumerate([None, *states]):
        again = rows(fresh.chunks(json.loads(json.dumps(state))))
        assert len(again) == 6 - done
        for expected, found in zip(whole[done:], again, strict=True):
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[split], found[split]) for split in expected)


@pytest.mark.parametrize("name", WORLDS)
def test_truth_is_that_of_the_val_rows(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(synthetic, "BLOCK", 300)
    source = ForestSource(**WORLDS[name], rows=300, val_rows=1000, chunk_rows=128)
    shards = harvest(source, tmp_path, show=False)["synthetic"]
    truth = shards.truth
    assert {key: (t.dtype, tuple(t.shape)) for key, t in truth.items() if key not in ("feature", "value")} == {
        "features": (torch.float32, (source.features_count, source.d_in("synthetic"))),
        "parent": (torch.int64, (source.features_count,)),
        "rate": (torch.float32, (source.features_count,)),
        "offsets": (torch.int64, (1001,)),
    }
    assert (truth["feature"].dtype, truth["value"].dtype) == (torch.int32, torch.float32)
    assert len(truth["feature"]) == len(truth["value"]) == truth["offsets"][-1]
    codes = torch.zeros(1000, source.features_count)
    for row in range(1000):
        first, last = truth["offsets"][row : row + 2].tolist()
        codes[row, truth["feature"][first:last].long()] = truth["value"][first:last]
    torch.testing.assert_close(codes @ truth["features"], shards.activations("val", 0), atol=1e-4, rtol=1e-4)
    assert torch.equal(truth["parent"], source.parent)
    assert sum(shards.rows("train")) == 300


def test_it_is_a_source_whose_identity_has_every_option_that_decides_a_row() -> None:
    source = ForestSource()
    assert isinstance(source, Source)
    assert (source.expected_rows(), source.most_rows()) == (1_114_112, (262_144, 65_536))
    assert (source.d_in("synthetic"), source.bytes_per_row("synthetic")) == (20, 80)
    identity = source.identity("synthetic")
    options = set(inspect.signature(ForestSource.__init__).parameters) - {"self", "name"}
    assert identity.keys() == {"source", *options}
    assert json.loads(json.dumps(identity)) == identity
    assert ForestSource(name="other").identity("synthetic") == identity
    assert ForestSource(name="other").name == "other"
    lists = ForestSource(branching=OmegaConf.create([3]), magnitude_mean=OmegaConf.create([2.0, 1.0]))
    assert json.loads(json.dumps(lists.identity("synthetic")))["magnitude_mean"] == [2.0, 1.0]


def config(path: str) -> dict[str, Any]:
    source = OmegaConf.to_container(OmegaConf.load(config_dir("conf") / path))["data" if "exp" in path else "source"]
    source = source["source"] if "exp" in path else source
    return {k: v for k, v in source.items() if not k.startswith("_") and k != "seed"}


def test_configurations() -> None:
    defaults = {k: p.default for k, p in inspect.signature(ForestSource.__init__).parameters.items()}
    assert all(defaults[key] == (tuple(v) if isinstance(v, list) else v) for key, v in config("data/tree.yaml").items())
    forest = ForestSource(**config("experiment/forest.yaml"))
    assert forest.features.shape == (1000, 256)
    assert float(forest.rate.sum()) == pytest.approx(9.05, abs=0.01)
    large = ForestSource(**config("experiment/forest_16k.yaml"))
    assert large.features.shape == (16_384, 768)
    assert float(large.rate[0]) == pytest.approx(0.4)
    assert float(large.rate[-1]) == pytest.approx(5e-4)
    assert float(large.rate.sum()) == pytest.approx(34.97, abs=0.01)  # SAELens's generator: 34.5 measured
    assert float(large.rate[:4096].sum()) == pytest.approx(25.4, abs=0.1)  # 25 published


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"child_p": 0.4}, r"data\.source\.child_p=0\.4 × 3 exclusive children is over 1"),
        ({"branching": [2, 4], "child_p": [0.5, 0.3]}, r"data\.source\.child_p=0\.3 × 4"),
        ({"child_p": [0.1, 0.1]}, r"data\.source\.child_p=\[0\.1, 0\.1\] must be one number, or one for each of 1 "),
        ({"root_p": 1.5}, r"data\.source\.root_p=1\.5 must be in \[0, 1\]"),
        ({"root_p": float("nan")}, r"data\.source\.root_p=nan"),
        ({"independent_p": -0.1}, r"data\.source\.independent_p=-0\.1"),
        ({"child_p": -0.1}, r"data\.source\.child_p=-0\.1"),
        ({"exclusive": False, "child_p": 1.1}, r"data\.source\.child_p=1\.1"),
        ({"rates": "zipf", "max_p": 1.1}, r"data\.source\.max_p=1\.1"),
        ({"rates": "zipf", "max_p": 0.1, "min_p": 0.2}, "min_p=0.2 ≤ max_p=0.1"),
        ({"rates": "zipf", "zipf_exponent": 0.0}, r"data\.source\.zipf_exponent=0\.0"),
        ({"rates": "zipfian"}, r"data\.source\.rates=zipfian is unknown; there are uniform and zipf"),
        ({"directions": "any"}, r"data\.source\.directions=any is unknown; there are orthogonal and random"),
        ({"most_with_child": 1.2}, r"data\.source\.most_with_child=1\.2"),
        ({"rows": 0}, r"data\.source\.rows=0 must be at least 1"),
        ({"val_rows": -1}, r"data\.source\.val_rows=-1"),
        ({"chunk_rows": 0}, r"data\.source\.chunk_rows=0"),
        ({"branching": [3, 0]}, r"data\.source\.branching=\[3, 0\] must be at least 1"),
        ({"trees": -1}, r"data\.source\.trees=-1"),
        ({"independent": -9}, r"data\.source\.independent=-9"),
        ({"trees": 0, "independent": 0}, r"raise data\.source\.trees or data\.source\.independent"),
        ({"d_in": 19}, r"data\.source\.d_in=19 has no room for 20 orthogonal directions"),
        ({"d_in": 0}, r"data\.source\.d_in=0"),
        ({"parent_cosine": 1.1}, r"data\.source\.parent_cosine=1\.1 must be in \[-1, 1\]"),
        ({"parent_cosine": 0.5, "d_in": 1, "directions": "random"}, r"data\.source\.parent_cosine needs"),
        ({"magnitude_std": -1.0}, r"data\.source\.magnitude_std=-1\.0"),
        ({"magnitude_std_spread": -1.0}, r"data\.source\.magnitude_std_spread=-1\.0"),
        ({"magnitude_mean": 0.0}, r"data\.source\.magnitude_mean is 0"),
        ({"magnitude_mean": [1.0, -1.0]}, r"data\.source\.magnitude_mean=\[1\.0, -1\.0\]"),
        ({"magnitude_mean": [1.0, 2.0, 3.0]}, r"data\.source\.magnitude_mean=.* the first and last"),
        ({"correlation_rank": -1}, r"data\.source\.correlation_rank=-1"),
        ({"correlation_scale": -1.0}, r"data\.source\.correlation_scale=-1\.0"),
        ({"noise": -0.1}, r"data\.source\.noise=-0\.1"),
    ],
)
def test_impossible_forests(options, message) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        ForestSource(**options)
