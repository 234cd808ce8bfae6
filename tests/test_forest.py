"""The synthetic forest: its rates, siblings, values, directions and correlations against what was asked for."""

import json
import math
from itertools import permutations
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import multivariate_normal, norm
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msae.cli.command import config_dir
from msae.data.harvest import harvest
from msae.settings import changed, decode, keys
from msae.sources import forest
from msae.sources.firing import zipf
from msae.sources.forest import ForestSource
from msae.sources.source import Source
from tests.sources import made

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
    "values": {"magnitude_mean": [2, 1], "magnitude_std": 0.4, "magnitude_std_spread": 0.3, "scale_by_parent": True},
    "half-normal": {"magnitude_mean": 0.0, "magnitude_std": 2.0, "branching": [2, 2], "scale_by_parent": True},
}
ROWS = 100_000
SIGMAS = 5.0  # of what is drawn; about 200 figures in all, each beyond with probability 6e-7
SMALL: dict[str, Any] = {"rows": 500, "val_rows": 300, "chunk_rows": 100}


def dense(source: ForestSource, offsets: Tensor, feature: Tensor, value: Tensor) -> Tensor:
    """Codes [rows, n_features]."""
    codes = torch.zeros(len(offsets) - 1, source.features_count)
    codes[torch.arange(len(codes)).repeat_interleave(offsets.diff()), feature.long()] = value
    return codes


def draw(source: ForestSource, rows: int = ROWS) -> Tensor:
    return dense(source, *source.draw(rows, torch.Generator().manual_seed(0)))


def all_rows(source: ForestSource, state: Any = None) -> list[dict[str, Tensor]]:
    """The rows of each chunk's splits."""
    return [{s: part.activations["synthetic"] for s, part in c.splits.items()} for c in made(source.chunks(state))]


@pytest.fixture(scope="module", params=WORLDS)
def world(request) -> tuple[ForestSource, Tensor]:
    source = ForestSource(**WORLDS[request.param])
    return source, draw(source)


def edges(source: ForestSource) -> list[tuple[int, int]]:
    """(parent, child)."""
    return [(p, c) for c, p in enumerate(source.parent.tolist()) if p >= 0]


def close_to(share: Tensor, p: Tensor, trials: Tensor | int) -> Tensor:
    """Whether these shares of so many trials are what the probabilities p give."""
    return (share - p).abs() <= SIGMAS * (p * (1 - p) / trials).clamp_min(0).sqrt() + 1e-7


def off_diagonal(square: Tensor) -> Tensor:
    return square[~torch.eye(len(square), dtype=torch.bool)]


# ---- which features are active


def test_each_feature_has_its_rate(world) -> None:
    source, codes = world
    assert close_to((codes > 0).double().mean(0), source.rate.double(), ROWS).all()


def test_a_child_is_active_only_with_its_parent_and_as_often_as_their_rates_say(world) -> None:
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
    for parent in {p for p, _ in edges(source)}:
        children = [c for p, c in edges(source) if p == parent]
        with_parent = active[active[:, parent] > 0][:, children]
        p = (source.rate[children] / source.rate[parent]).double()
        if source.exclusive:
            assert with_parent.sum(1).max() <= 1
            assert p.sum() < 1 - 1e-6 or with_parent.sum(1).min() == 1  # "always on"
            continue
        both = with_parent.T @ with_parent / len(with_parent)
        assert off_diagonal(close_to(both, p[:, None] * p, len(with_parent))).all()


def test_features_without_a_parent_are_independent_unless_correlated(world) -> None:
    source, codes = world
    if source.correlation_rank:
        return
    active = (codes[:, source.top] > 0).double()
    p = source.rate[source.top].double()
    assert off_diagonal(close_to(active.T @ active / ROWS, p[:, None] * p, ROWS)).all()
    first, second = active[:-1], active[1:]  # successive rows
    assert close_to(first.T @ second / (ROWS - 1), p[:, None] * p, ROWS).all()


def test_the_default_is_nabeshimas_tree() -> None:
    source = ForestSource()
    torch.testing.assert_close(source.rate, torch.tensor([0.15] * 3 + [0.03] * 9 + [0.05] * 8))
    assert source.parent.tolist() == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 8
    assert float(source.rate.sum()) == pytest.approx(1.12)
    assert set(draw(source).unique().tolist()) == {0.0, 1.0}


def test_features_are_numbered_level_by_level_and_rates_multiply_along_a_path() -> None:
    rates = {"root_p": 0.5, "child_p": [0.4, 0.1], "independent_p": 0.7}
    source = ForestSource(trees=2, branching=[2, 3], independent=2, **rates)
    assert source.parent.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, -1, -1]
    assert source.top.tolist() == [0, 1, 18, 19]
    torch.testing.assert_close(source.rate, torch.tensor([0.5] * 2 + [0.2] * 4 + [0.02] * 12 + [0.7] * 2))


def test_zipf_rates_by_hand_are_lowered_from_the_roots_down_where_impossible() -> None:
    """i^−1 of 1..4, moved and scaled so that they go from 0.8 to 0.2: a root, its two children, and an independent one.

    The children's 0.4 and 0.26667 need 0.66667 of all rows.
    """
    options = {"trees": 1, "branching": [2], "independent": 1, **ZIPF, "zipf_exponent": 1.0, "max_p": 0.8, "min_p": 0.2}
    asked = torch.tensor([0.8, 0.2 + 0.6 / 3, 0.2 + 0.6 / 9, 0.2])
    torch.testing.assert_close(ForestSource(**options).rate, asked)
    half = ForestSource(**options, most_with_child=0.5).rate  # 0.4 of 0.66667: three fifths of each
    torch.testing.assert_close(half, asked * torch.tensor([1, 0.6, 0.6, 1]))
    capped = ForestSource(**options, most_with_child=0.4, exclusive=False).rate
    torch.testing.assert_close(capped, torch.tensor([0.8, 0.32, 0.8 / 3, 0.2]))
    assert zipf(1, 1.0, 0.8, 0.2).tolist() == [0.8]


# ---- drawing


def test_entries_come_by_row_and_feature_and_only_once(world) -> None:
    source, _ = world
    offsets, feature, value = source.draw(5000, torch.Generator().manual_seed(1))
    assert (offsets.dtype, feature.dtype, value.dtype) == (torch.int64, torch.int64, torch.float32)
    row = torch.arange(5000).repeat_interleave(offsets.diff())
    assert len(row) == len(feature) == len(value)
    assert ((row * source.features_count + feature).diff() > 0).all()
    assert int(feature.max()) < source.features_count


@pytest.mark.parametrize("root_p", [0.0, 1e-9])
def test_a_world_may_have_nothing_active(root_p) -> None:
    assert not draw(ForestSource(root_p=root_p, independent_p=0.0, exclusive=False), 9).any()


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
    options |= {"trees": 500, "branching": [4, 4], "independent": 4500, "d_in": 8, "directions": "random"}
    source = ForestSource(rows=8000, val_rows=8000, chunk_rows=8000, **options)
    with Largest() as largest:
        (rows,) = all_rows(source)
        source.truth()
    assert rows["train"].shape == (8000, 8)
    assert float(source.rate.sum()) * 7000 < largest.elements < 8000 * source.features_count / 200


# ---- correlation


@pytest.mark.parametrize(("rank", "scale"), [(2, 0.5), (3, 0.3), (4, 2.0)])
def test_correlated_features_have_their_rates_and_the_copulas_joint_rates(rank, scale) -> None:
    """P(both) = P(g_i > t_i, g_j > t_j) for normal g with correlation λ_i·λ_j. At scale 2, ‖λ‖ is shortened."""
    source = ForestSource(trees=3, independent=3, correlation_rank=rank, correlation_scale=scale)
    active = (draw(source, 4 * ROWS)[:, source.top] > 0).double()
    p = source.rate[source.top].double()
    assert close_to(active.mean(0), p, 4 * ROWS).all()
    correlation = (source.loadings @ source.loadings.T).double()
    assert correlation.diag().max() < 0.9901
    joint = active.T @ active / (4 * ROWS)
    expected = joint.clone()
    for i, j in permutations(range(6), 2):
        r = float(correlation[i, j])
        quantiles = norm.ppf([float(p[i]), float(p[j])])
        expected[i, j] = multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf(quantiles)
    assert close_to(joint, expected, 4 * ROWS).all()
    as_if_independent = off_diagonal(close_to(joint, p[:, None] * p, 4 * ROWS))
    assert as_if_independent.sum() < 16  # of 15 pairs, each counted twice


def test_correlations_have_the_size_that_scale_and_rank_give() -> None:
    source = ForestSource(trees=100, branching=[2], independent=200, correlation_rank=25, correlation_scale=0.1)
    correlation = source.loadings @ source.loadings.T
    assert float(off_diagonal(correlation).square().mean().sqrt()) == pytest.approx(0.1**2 * math.sqrt(25), rel=0.05)
    assert float(correlation.diag().mean()) == pytest.approx(0.25, rel=0.05)


def test_children_are_correlated_through_their_parents_alone() -> None:
    """Given their parents, children of two trees are independent."""
    source = ForestSource(trees=2, root_p=0.5, independent=0, correlation_rank=1, correlation_scale=1.0)
    active = (draw(source, 4 * ROWS) > 0).double()
    both = active[(active[:, 0] * active[:, 1]) > 0]
    p = torch.full((3, 3), 0.04).double()
    assert close_to(both[:, 2:5].T @ both[:, 5:8] / len(both), p, len(both)).all()
    assert not close_to((active[:, 0] * active[:, 1]).mean(), torch.tensor(0.25), 4 * ROWS)


# ---- values


def test_values_are_positive_with_the_mean_and_the_square_of_their_distribution(world) -> None:
    """E x² = m² + s² without a parent. A child's mean does not change with scale_by_parent: scales have the mean 1."""
    source, codes = world
    assert (codes >= 0).all()
    for feature in range(source.features_count):
        values = codes[codes[:, feature] > 0, feature].double()
        checks = [(values, source.expected[feature])]
        if feature in source.top:
            checks.append((values.square(), source.mean[feature].square() + source.std[feature].square()))
        for samples, mean in checks if len(values) > 1 else ():
            error = SIGMAS * float(samples.std()) / math.sqrt(len(samples)) + 1e-6
            assert float(samples.mean()) == pytest.approx(float(mean), abs=error), feature


def test_values_without_a_spread_are_constant_and_linear_over_the_features() -> None:
    codes = draw(ForestSource(magnitude_mean=[3.0, 1.0], scale_by_parent=True), 10_000)
    torch.testing.assert_close(codes, (3 - 2 * torch.arange(20) / 19) * (codes > 0))


def test_each_feature_has_a_spread_of_its_own() -> None:
    std = ForestSource(independent=300, magnitude_std=0.5, magnitude_std_spread=0.5).std
    assert (std >= 0).all()
    assert float(std.square().mean()) == pytest.approx(0.5, rel=0.35)  # 5 σ of 300 squares


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_childs_value_is_scaled_by_its_parents(exclusive, scaled) -> None:
    """E[child · parent] = E[child] E[parent²] / E[parent] with scaling, E[child] E[parent] without; over two levels."""
    options = {"trees": 1, "branching": [1, 1], "root_p": 1.0, "child_p": 1.0, "independent": 0, "exclusive": exclusive}
    source = ForestSource(magnitude_mean=2.0, magnitude_std=0.5, scale_by_parent=scaled, **options)
    codes = draw(source).double()
    for parent, child in edges(source):
        factor = codes[:, parent].square().mean() / codes[:, parent].mean() if scaled else codes[:, parent].mean()
        product = float((codes[:, parent] * codes[:, child]).mean())
        assert product == pytest.approx(float(factor * codes[:, child].mean()), rel=0.01)
    correlation = torch.corrcoef(codes.T)[0, 2]
    assert (correlation > 0.4) if scaled else (abs(correlation) < 0.02)


# ---- the world


@pytest.mark.parametrize("d_in", [20, 33])
def test_orthogonal_directions_and_norms(d_in) -> None:
    features = ForestSource(norm_spread=0.05, d_in=d_in).features
    assert features.shape == (20, d_in)
    assert off_diagonal(features @ features.T).abs().max() < 1e-5
    assert 0.01 < float(features.norm(dim=1).std()) < 0.15


def test_random_directions_may_be_more_than_dimensions() -> None:
    """cos² of two random directions is 1/d_in on average."""
    source = ForestSource(trees=30, branching=[4, 4], independent=70, d_in=64, directions="random", norm_spread=0)
    assert source.features.shape == (700, 64)
    torch.testing.assert_close(source.features.norm(dim=1), torch.ones(700))
    cosines = off_diagonal(source.features @ source.features.T)
    assert float(cosines.square().mean()) == pytest.approx(1 / 64, rel=0.05)
    assert abs(float(cosines.mean())) < 0.005


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.6, 1.0])
@pytest.mark.parametrize(("directions", "d_in"), [("random", 16), ("orthogonal", None)])
def test_children_have_the_cosine_asked_for_with_their_parents(cosine, directions, d_in) -> None:
    source = ForestSource(trees=3, branching=[3, 2], directions=directions, d_in=d_in, parent_cosine=cosine)
    u = normalize(source.features, dim=1)
    for parent, child in edges(source):
        assert float(u[parent] @ u[child]) == pytest.approx(cosine, abs=1e-5)
    if directions == "orthogonal" and cosine != 1:
        assert abs(float(u[0] @ u[1])) < 1e-5  # roots stay so, siblings share their parent
        assert float(u[3] @ u[4]) == pytest.approx(cosine**2, abs=1e-5)


def test_other_sizes_rates_and_values_keep_the_world() -> None:
    base = ForestSource(magnitude_std_spread=0.3, correlation_rank=3, **SMALL)
    values = {"magnitude_mean": 2.0, "magnitude_std": 1.0, "scale_by_parent": True, "noise": 0.5, "name": "forest"}
    for rates in ({"root_p": 0.5, "child_p": 0.1, "independent_p": 0.01, "exclusive": False}, ZIPF):
        other = changed(base, rows=100, val_rows=30, chunk_rows=50, **values, **rates)
        for key in ("features", "loadings"):
            assert torch.equal(getattr(base, key), getattr(other, key)), key
        assert torch.equal(base.std, changed(other, magnitude_std=0.0).std)
    assert torch.equal(base.features, changed(base, correlation_rank=0).features)


def test_world_and_rows_come_from_separate_streams(monkeypatch) -> None:
    base = ForestSource(**SMALL)
    first, second, *_ = all_rows(base)
    assert torch.equal(first["train"], all_rows(changed(base, rows=100, val_rows=30))[0]["train"])
    assert not torch.equal(base.features, changed(base, seed=1).features)
    assert not torch.equal(first["train"], first["val"][:100])
    assert not torch.equal(first["train"], second["train"])

    streams, make = list[tuple[Any, ...]](), forest.stream
    monkeypatch.setattr(forest, "stream", lambda *parts: streams.append(parts) or make(*parts))
    all_rows(ForestSource(**SMALL, noise=0.1, correlation_rank=2, magnitude_std_spread=0.1, seed=7))
    assert len(streams) == len(set(streams)) == 4 + 2 * (5 + 1)  # 4 of the world; entries and noise of each split
    assert {parts[0] for parts in streams} == {7}
    assert not {parts[1] for parts in streams} & {"blocks", "rows", "prefixes"}  # the reader's and the model's


def test_noise_is_added_to_rows_alone_and_each_chunk_has_its_own() -> None:
    quiet, noisy = (ForestSource(**SMALL, noise=noise, d_in=40) for noise in (0.0, 0.3))
    torch.testing.assert_close(quiet.truth(), noisy.truth(), rtol=0, atol=0)
    (first, second, *_), (first_noisy, second_noisy, *_) = all_rows(quiet), all_rows(noisy)
    for split in ("train", "val"):
        added = first_noisy[split] - first[split]
        assert float(added.std()) == pytest.approx(0.3, rel=0.06)  # 5 σ of 4000: 5 / √8000
        assert abs(float(added.mean())) < 5 * 0.3 / math.sqrt(4000)
        both = torch.stack([added.flatten(), first[split].flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.08  # 5 σ of 4000: 5 / √4000
    assert not torch.allclose(first_noisy["train"] - first["train"], second_noisy["train"] - second["train"])


# ---- a source of shards


@pytest.mark.parametrize("name", WORLDS)
def test_chunks_are_the_same_again_and_from_any_state(name) -> None:
    source, again = (ForestSource(**WORLDS[name], noise=0.1, rows=550, val_rows=120, chunk_rows=100) for _ in range(2))
    states = [chunk.state for chunk in source.chunks(None)]
    whole = all_rows(source)
    assert [len(chunk["train"]) for chunk in whole] == [100] * 5 + [50]
    assert [len(chunk["val"]) for chunk in whole if "val" in chunk] == [120]
    for done, state in enumerate([None, *states]):
        rest = all_rows(again, json.loads(json.dumps(state)))
        assert len(rest) == 6 - done
        for expected, rows in zip(whole[done:], rest, strict=True):
            torch.testing.assert_close(rows, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", WORLDS)
def test_truth_is_that_of_the_val_rows(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(forest, "BLOCK", 300)
    source = ForestSource(**WORLDS[name], rows=300, val_rows=1000, chunk_rows=128)
    shards = harvest(source, tmp_path, show=False)["synthetic"]
    truth = shards.truth
    assert list(map(len, (truth["offsets"], truth["feature"]))) == [1001, truth["offsets"][-1]]
    codes = dense(source, truth["offsets"], truth["feature"], truth["value"])
    torch.testing.assert_close(codes @ truth["features"], shards.activations("val", 0), atol=1e-4, rtol=1e-4)
    assert torch.equal(truth["parent"], source.parent)
    assert torch.equal(truth["rate"], source.rate)
    types = {key: truth[key].dtype for key in ("parent", "offsets", "feature", "value")}
    assert list(types.values()) == [torch.int64, torch.int64, torch.int32, torch.float32]


def test_it_is_a_source_whose_identity_has_every_setting_that_decides_a_row() -> None:
    source = ForestSource()
    assert isinstance(source, Source)
    assert (source.expected_rows(), source.most_rows()) == (1_114_112, (262_144, 65_536))
    assert (source.width("synthetic"), source.bytes_per_row("synthetic")) == (20, 80)
    identity = source.identity("synthetic")
    assert identity.keys() == {"source", *(key.name for key in keys(ForestSource))} - {"name"}
    assert json.loads(json.dumps(identity)) == identity
    assert changed(source, name="other").identity("synthetic") == identity
    assert changed(source, name="other").name == "other"


def configured(path: str, *groups: str) -> ForestSource:
    """The source that a configuration file describes."""
    settings = OmegaConf.load(config_dir("conf") / path)
    settings = OmegaConf.to_container(OmegaConf.select(settings, ".".join((*groups, "source"))))
    return ForestSource(**{key: value for key, value in settings.items() if key not in ("_target_", "seed")})


def test_configurations() -> None:
    assert configured("data/tree.yaml") == ForestSource()
    small = configured("experiment/forest.yaml", "data")
    assert small.features.shape == (1000, 256)
    assert float(small.rate.sum()) == pytest.approx(9.05, abs=0.01)
    large = configured("experiment/forest_16k.yaml", "data")
    assert large.features.shape == (16_384, 768)
    assert large.rate[[0, -1]].tolist() == pytest.approx([0.4, 5e-4])
    assert float(large.rate.sum()) == pytest.approx(34.97, abs=0.01)  # SAELens's generator: 34.5 measured
    assert float(large.rate[:4096].sum()) == pytest.approx(25.4, abs=0.1)  # 25 published


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"child_p": 0.4}, r"data\.source\.child_p=0\.4 × 3 exclusive children is over 1"),
        ({"branching": [2, 4], "child_p": [0.5, 0.3]}, r"data\.source\.child_p=0\.3 × 4"),
        ({"child_p": [0.1, 0.1]}, r"data\.source\.child_p=\[0\.1, 0\.1\] must be a number, or one for each of 1 "),
        ({"max_p": 0.1, "min_p": 0.2}, r"data\.source\.min_p=0\.2 is over max_p=0\.1"),
        ({"trees": 0, "independent": 0}, r"raise data\.source\.trees or data\.source\.independent"),
        ({"d_in": 19}, r"data\.source\.d_in=19 has no room for 20 orthogonal directions"),
        ({"parent_cosine": 0.5, "d_in": 1, "directions": "random"}, r"data\.source\.parent_cosine needs"),
        ({"magnitude_mean": 0.0}, r"data\.source\.magnitude_mean is 0"),
        ({"root_p": 1.5}, r"data\.source\.root_p=1\.5: expected number in \[0, 1\]"),
        ({"magnitude_mean": [1, 2, 3]}, r"data\.source\.magnitude_mean=\[1, 2, 3\]: expected "),
    ],
)
def test_impossible_forests(options, message) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        decode(ForestSource, options, "data.source")
