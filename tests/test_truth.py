"""Figures against the truth: SAEs made by hand whose figures are known, and every figure against a dense loop."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from msae.evaluation import truth
from msae.evaluation.matching import Match, cosines, match
from msae.evaluation.truth import truth_metrics
from msae.hierarchy import firings as firings_module
from msae.hierarchy.edges import Edges, levels
from msae.hierarchy.extract import extract
from msae.hierarchy.limits import LINES, Limits
from tests.test_firings import InMemory, code_of, given_shards, sae_of


class World(NamedTuple):
    """Rows x, their true activations [rows, n], the features, and all but x as a shard directory has them."""

    x: Tensor
    activations: Tensor
    features: Tensor
    parent: Tensor
    truth: dict[str, Tensor]

    def metrics(self, encoder: Tensor, decoder: Tensor, threshold: float = 0.1) -> dict[str, float]:
        return truth_metrics(sae_of(decoder, encoder, threshold=threshold), InMemory([self.x]), self.truth)

    def edges(self) -> list[tuple[int, int]]:
        return [(parent, child) for child, parent in enumerate(self.parent.tolist()) if parent >= 0]


def world_of(features: Tensor, parent: Tensor, activations: Tensor) -> World:
    code = code_of(activations)
    csr = {"offsets": code.offsets, "feature": code.latents.int(), "value": code.acts}
    return World(activations @ features, activations, features, parent, {"features": features, "parent": parent, **csr})


def forest(parent: Tensor, oblique: bool = False, rows: int = 6000) -> World:
    """Rows of a forest of unit directions; a child is active in 0.25 of its parent's rows, siblings never together."""
    generator, n = torch.Generator().manual_seed(0), len(parent)
    features = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    if oblique:
        features = normalize(features + 0.3 * torch.randn(n, n, generator=generator) / n**0.5)
        features *= 1 + torch.rand(n, 1, generator=generator)
    draw = torch.rand(rows, n, generator=generator)
    active = draw < 0.15
    for feature in (parent >= 0).nonzero().flatten().tolist():
        order = int((parent[:feature] == parent[feature]).sum())
        share = (draw[:, parent[feature]] * 97 * (feature + 1 - order)) % 1  # the same for siblings
        active[:, feature] = active[:, parent[feature]] & (share >= order / 4) & (share < (order + 1) / 4)
    return world_of(features, parent, active * (0.5 + torch.rand(rows, n, generator=generator)))


# 3 parents with 3 exclusive children each, 8 features alone; directions are orthogonal
TREE = forest(torch.tensor([-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 8))
# 2 roots, each with 2 children, each of which has 2; directions are oblique and of norm 1 to 2
DEEP = forest(torch.tensor([-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, -1, -1]), oblique=True)


def perfect(world: World) -> tuple[Tensor, Tensor]:
    """Activations are the true ones, also where directions are not orthogonal."""
    return torch.linalg.pinv(world.features).T.contiguous(), world.features.clone()


def absorbed(world: World) -> tuple[Tensor, Tensor]:
    """A parent's latent is silent under its children, whose latents decode to both."""
    encoder, decoder = perfect(world)
    for parent, child in world.edges():
        encoder[parent] -= 9 * encoder[child]
        decoder[child] += world.features[parent]
    return encoder, decoder


def hedged(world: World) -> tuple[Tensor, Tensor]:
    """A parent's row leans to its children by 0.2 of each, a child's away from its parent by 0.3 of it."""
    encoder, decoder = perfect(world)
    for parent, child in world.edges():
        decoder[parent] += 0.2 * world.features[child]
        decoder[child] -= 0.3 * world.features[parent]
    return encoder, decoder


BUILDS = [perfect, absorbed, hedged]
FIRING = ("firing_precision", "firing_recall", "firing_f1")
COSINES = [f"cos_{pair}{part}" for pair in ("child_parent", "parent_child") for part in ("", "_positive", "_negative")]
ONE = ("mcc", "uniqueness", "mmcs", *FIRING, "edges_matched", "edges_recovered", "edge_precision", "edge_recall")
EXACT = {
    **dict.fromkeys([*ONE, "l0_ratio", "shrinkage"], 1),
    **dict.fromkeys(["parent_silent_given_child", "parent_silent_given_child_recovered", *COSINES], 0),
}


@pytest.mark.parametrize("world", [TREE, DEEP], ids=["tree", "deep"])
def test_every_figure_of_a_perfect_sae(world) -> None:
    metrics = world.metrics(*perfect(world))
    l0 = float((world.activations != 0).sum(1).double().mean())
    chance = metrics.pop("mcc_chance")
    assert metrics == pytest.approx(EXACT | {"l0": l0, "true_l0": l0}, abs=1e-5)
    assert 0.2 < chance < 0.7


def test_absorption_silences_parents_and_turns_children_to_them() -> None:
    metrics = TREE.metrics(*absorbed(TREE))
    assert metrics["parent_silent_given_child"] == metrics["parent_silent_given_child_recovered"] == 1
    assert (metrics["edges_matched"], metrics["edges_recovered"]) == (1, 1)
    leaning = [0.5**0.5, 0.5**0.5, 0, 0, 0, 0]
    assert [metrics[name] for name in COSINES] == pytest.approx(leaning, abs=1e-5)
    assert metrics["mcc"] == pytest.approx((11 + 9 / math.sqrt(2)) / 20, abs=1e-5)
    assert metrics["firing_precision"] == 1
    active = TREE.activations != 0  # a parent's latent fires where none of its children is active
    under_child = torch.stack([active[:, 3 + 3 * p : 6 + 3 * p].any(1) for p in range(3)], 1)
    recall = (active[:, :3] & ~under_child).sum(0) / active[:, :3].sum(0)
    assert metrics["firing_recall"] == pytest.approx(float((recall.sum() + 17) / 20))
    assert metrics["firing_f1"] == pytest.approx(float(((2 * recall / (1 + recall)).sum() + 17) / 20))
    assert metrics["edge_recall"] == 0
    assert math.isnan(metrics["edge_precision"])
    assert metrics["l0_ratio"] == pytest.approx(1 - float(active[:, 3:12].sum() / active.sum()))
    child = TREE.activations[:, 3:12].sum()
    other = TREE.activations[:, 12:].sum() + TREE.activations[:, :3][~under_child].sum()
    assert metrics["shrinkage"] == pytest.approx(float((2**0.5 * child + other) / (child + other)))


def test_hedging_turns_parents_to_children_and_children_away() -> None:
    metrics = TREE.metrics(*hedged(TREE))
    parent, child = 0.2 / math.sqrt(1 + 3 * 0.2**2), -0.3 / math.sqrt(1 + 0.3**2)
    assert [metrics[name] for name in COSINES] == pytest.approx([child, 0, child, parent, parent, 0], abs=1e-5)
    assert metrics["mcc"] == pytest.approx((3 / math.sqrt(1.12) + 9 / math.sqrt(1.09) + 8) / 20, abs=1e-5)
    assert [metrics[name] for name in FIRING] == [1, 1, 1]
    assert (metrics["parent_silent_given_child"], metrics["edge_precision"], metrics["edge_recall"]) == (0, 1, 1)


@pytest.mark.parametrize("build", BUILDS)
def test_the_order_of_latents_and_of_features_does_not_matter(build) -> None:
    encoder, decoder = build(TREE)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    parent = TREE.parent[order]
    parent = torch.where(parent >= 0, order.argsort()[parent], -1)
    reordered = world_of(TREE.features[order], parent, TREE.activations[:, order])
    expected = TREE.metrics(encoder, decoder)
    for metrics in (
        TREE.metrics(encoder[order], decoder[order]),
        truth_metrics(sae_of(decoder, encoder), InMemory([TREE.x]), reordered.truth),
    ):
        if build is absorbed:  # a child's latent is as near to the parent as to the child: rounding decides
            metrics["uniqueness"] = expected["uniqueness"]
        assert metrics == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_a_wrong_sign_counts_only_towards_parent_and_child() -> None:
    encoder, decoder = perfect(DEEP)
    metrics = DEEP.metrics(encoder, -decoder)
    parent, child = torch.tensor(DEEP.edges()).T
    doubled = -2 * cosines(DEEP.features, DEEP.features)[child, parent]
    parts = [float(part.mean()) for part in (doubled, doubled.clamp(min=0), doubled.clamp(max=0))]
    edges = {"edge_precision": math.nan, "edge_recall": 0}  # no parent explains what it fires on
    expected = EXACT | dict(zip(COSINES, 2 * parts, strict=True)) | edges
    assert {name: metrics[name] for name in EXACT} == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert min(parts[1], -parts[2]) > 0.01


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_shrinkage_sees_activations_but_not_how_they_are_scaled(factor) -> None:
    """Smaller activations shrink; a smaller encoder with a larger decoder, or a scale, changes nothing."""
    encoder, decoder = perfect(DEEP)
    metrics = DEEP.metrics(factor * encoder, decoder)
    named = [name for name in EXACT if name not in ("edge_precision", "edge_recall")]  # a parent at 2 is too much
    expected = EXACT | {"shrinkage": factor}
    assert {name: metrics[name] for name in named} == pytest.approx({k: expected[k] for k in named}, abs=1e-5)
    assert DEEP.metrics(factor * encoder, decoder / factor)["shrinkage"] == pytest.approx(1, abs=1e-5)
    scaled = sae_of(decoder, encoder)
    scaled.scale.fill_(factor)
    for scaled.rescale_acts_by_decoder_norm in (False, True):
        assert truth_metrics(scaled, InMemory([DEEP.x]), DEEP.truth)["shrinkage"] == pytest.approx(1, abs=1e-5)


def test_dead_latents_lose_what_they_stand_for() -> None:
    """Two features have a latent that never fires; four more latents match nothing."""
    encoder, decoder = perfect(TREE)
    encoder[[0, 19]] = 0.0  # the first parent, the last that stands alone
    spare = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    metrics = TREE.metrics(torch.cat([encoder, 0 * spare]), torch.cat([decoder, spare]))
    assert metrics["mcc"] == pytest.approx(1, abs=1e-5)
    assert [metrics[name] for name in FIRING] == pytest.approx([18 / 20] * 3)
    assert metrics["parent_silent_given_child"] == pytest.approx(1 / 3)
    assert metrics["uniqueness"] == pytest.approx(20 / 24)
    assert (metrics["edge_precision"], metrics["edge_recall"]) == pytest.approx((1, 6 / 9))
    lost = (TREE.activations[:, [0, 19]] != 0).sum() / (TREE.activations != 0).sum()
    assert metrics["l0_ratio"] == pytest.approx(1 - float(lost))
    assert metrics["shrinkage"] == pytest.approx(1, abs=1e-5)


def test_an_edge_without_both_latents_is_missed_but_not_absorbed() -> None:
    encoder, decoder = perfect(TREE)
    parents = TREE.metrics(encoder[:3], decoder[:3])
    assert [parents[name] for name in ("mcc", "firing_f1", "uniqueness")] == pytest.approx([1, 1, 1], abs=1e-5)
    assert (parents["edges_matched"], parents["edges_recovered"], parents["edge_recall"]) == (0, 0, 0)
    assert parents["cos_parent_child"] == pytest.approx(0, abs=1e-5)
    for name in ("parent_silent_given_child", "cos_child_parent", "edge_precision"):
        assert math.isnan(parents[name])
    no_parents = TREE.metrics(encoder[3:], decoder[3:])
    assert math.isnan(no_parents["parent_silent_given_child"])
    assert math.isnan(no_parents["cos_parent_child"])
    assert no_parents["cos_child_parent"] == pytest.approx(0, abs=1e-5)
    one_tree = TREE.metrics(encoder[[0, 3, 4]], decoder[[0, 3, 4]])
    assert one_tree["parent_silent_given_child"] == 0
    assert one_tree["edges_matched"] == pytest.approx(2 / 9)


def test_a_latent_far_from_its_feature_does_not_make_it_recovered() -> None:
    """The first parent's row is 0.4 of it and its latent is silent: matched, but not there."""
    wide = torch.cat([TREE.features, torch.zeros(20, 1)], 1)
    world = world_of(wide, TREE.parent, TREE.activations)
    encoder, decoder = perfect(world)
    encoder[0] = 0
    decoder[0] = 0.4 * decoder[0] + (1 - 0.4**2) ** 0.5 * torch.eye(21)[20]
    metrics = world.metrics(encoder, decoder)
    assert (metrics["edges_matched"], metrics["edges_recovered"]) == pytest.approx((1, 6 / 9))
    assert metrics["parent_silent_given_child"] == pytest.approx(1 / 3)
    assert metrics["parent_silent_given_child_recovered"] == 0


@pytest.mark.parametrize(("leak", "silent"), [(0.01, True), (0.2, False)])
def test_weak_firing_counts_in_l0_alone(leak, silent) -> None:
    """The floor is 5 % of a latent's own maximum."""
    encoder, decoder = perfect(TREE)
    encoder[12] += leak * encoder[13]
    metrics = TREE.metrics(encoder, decoder, 0.001)
    assert (metrics["firing_precision"] == 1) == silent
    assert metrics["edge_precision"] == 1  # one fires wherever the other does, and explains nothing there
    assert metrics["l0_ratio"] > 1.01


def test_later_rows_in_batches_with_a_sparse_matching(monkeypatch) -> None:
    """Rows from a later one on, in batches of any size, encoded in blocks that stay below the limit."""
    sae, x = sae_of(*hedged(DEEP)[::-1]), DEEP.x[2500:]
    expected = truth_metrics(sae, InMemory([x]), DEEP.truth, 2500)
    assert expected["firing_f1"] == 1
    sizes, encode = [], sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: (sizes.append(len(x)), encode(x))[1])
    monkeypatch.setattr(firings_module, "BLOCK", 16 * 64)
    monkeypatch.setattr(truth, "match", lambda *arguments: match(*arguments, dense=0))
    assert truth_metrics(sae, InMemory(x.split(333)), DEEP.truth, 2500) == pytest.approx(expected)
    assert max(sizes) == 64
    assert sum(sizes) == len(x)


def test_figures_without_an_edge_or_a_row_are_nan() -> None:
    world = forest(torch.full((6,), -1), rows=500)
    features, activations = world.features, world.activations
    metrics = world.metrics(*perfect(world))
    missing = {name for name, value in metrics.items() if math.isnan(value)}
    assert missing == {name for name in EXACT if "edge" in name or "cos_" in name or "silent" in name}
    assert metrics["mcc"] == pytest.approx(1)
    activations[:, 0] *= activations[:, 1] == 0
    apart = world_of(features, torch.tensor([-1, 0, -1, -1, -1, -1]), activations)  # 1 is only active without 0
    metrics = apart.metrics(*perfect(apart))
    assert math.isnan(metrics["parent_silent_given_child"])
    assert metrics["edge_recall"] == 0
    assert metrics["cos_child_parent"] == pytest.approx(0, abs=1e-5)


def test_features_that_never_occur_do_not_count() -> None:
    features, parent = TREE.features, TREE.parent
    without = world_of(features, parent, TREE.activations[TREE.activations[:, 12] == 0])
    assert without.metrics(*perfect(TREE))["firing_f1"] == 1
    metrics = world_of(features, parent, torch.zeros(9, 20)).metrics(*perfect(TREE))
    assert all(math.isnan(metrics[name]) for name in ("firing_f1", "l0_ratio", "shrinkage"))
    assert metrics["mcc"] == pytest.approx(1)


# --- against dense loops ---------------------------------------------------------------------------------------


def random_example(seed: int) -> tuple[Tensor, Tensor, Tensor, Match]:
    """Latent activations [200, 15], true ones [200, 12], a forest of 12, and a matching of 9 pairs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (200, 15), (200, 12)
    acts, true = ((torch.rand(s, generator=generator) < 0.4) * torch.rand(s, generator=generator) for s in shapes)
    parent = torch.tensor([int(torch.randint(-1, max(f, 1), (1,), generator=generator)) for f in range(12)])
    parent[0] = -1
    pairs = torch.randperm(15, generator=generator)[:9], torch.randperm(12, generator=generator)[:9]
    return acts, true, parent, Match(*pairs, torch.rand(9, generator=generator))


@pytest.mark.parametrize("seed", range(4))
def test_firing_figures_equal_their_loops(seed) -> None:
    acts, true, parent, matching = random_example(seed)
    fires, active = truth.at_features(code_of(acts), matching, 12), code_of(true)
    dense = torch.zeros(200, 12)
    dense[:, matching.feature] = acts[:, matching.latent]
    assert torch.equal(fires.dense(), dense)
    scores = []
    for feature in matching.feature.tolist():
        hit = sum(bool(a and b) for a, b in zip(dense[:, feature], true[:, feature], strict=True))
        precision, recall = hit / int((dense[:, feature] != 0).sum()), hit / int((true[:, feature] != 0).sum())
        scores.append([precision, recall, 2 * precision * recall / (precision + recall)])
    expected = dict(zip(FIRING, np.mean(scores, axis=0), strict=True))
    assert truth.firing_scores(fires, active, matching.feature) == pytest.approx(expected)

    for has_latent in (matching.latent_of(12) >= 0, torch.ones(12, dtype=torch.bool)):
        silent = []
        for child, above in enumerate(parent.tolist()):
            if above < 0 or not (has_latent[child] and has_latent[above]):
                continue
            both = [row for row in range(200) if true[row, child] and true[row, above]]
            silent.append(np.mean([dense[row, above] == 0 for row in both]))
        share = truth.parent_silent_given_child(fires, active, parent, has_latent)
        assert share == pytest.approx(np.mean(silent), nan_ok=True)

    both = (dense != 0) & (true != 0)
    assert truth.shrinkage(fires, active) == pytest.approx(float(dense[both].sum() / true[both].sum()))


def test_a_latent_whose_feature_is_never_active_scores_zero() -> None:
    fires = code_of(torch.tensor([[1, 0], [1, 0], [0, 0], [1, 1]]))
    active = code_of(torch.tensor([[1, 0], [0, 0], [1, 0], [1, 0]]))
    scores = truth.firing_scores(fires, active, torch.tensor([0, 1]))  # the first has 2 of 3 and 2 of 3
    assert scores == pytest.approx(dict.fromkeys(FIRING, 1 / 3))


def edges_of(kept: list[tuple[int, int]], refuted: list[tuple[int, int]]) -> Edges:
    """These edges, of which the first survive."""
    ends = np.array(kept + refuted).reshape(-1, 2)
    passed = {key: np.arange(len(ends)) < len(kept) for key in LINES}
    return Edges(ends[:, 0], ends[:, 1], np.zeros(len(ends), dtype=int), {}, passed, 50)


def test_edges_are_scored_through_the_matching() -> None:
    """Depth 3; two leaves have no latent, and what a test refutes does not count."""
    parent, matching = DEEP.parent, Match(torch.arange(12), torch.arange(12), torch.ones(12))
    scores = truth.edge_scores(edges_of(DEEP.edges(), [(0, 1)]), matching, parent)
    assert scores == pytest.approx({"edge_precision": 10 / 12, "edge_recall": 10 / 12})
    scores = truth.edge_scores(edges_of([(0, 2), (2, 0), (0, 1), (2, 6)], [(0, 3)]), matching, parent)
    assert scores == pytest.approx({"edge_precision": 2 / 4, "edge_recall": 2 / 12})
    swapped = Match(torch.tensor([5, 7, 0]), torch.tensor([0, 2, 6]), torch.ones(3))
    scores = truth.edge_scores(edges_of([(5, 7), (7, 0), (0, 2)], []), swapped, parent)
    assert scores == pytest.approx({"edge_precision": 2 / 3, "edge_recall": 2 / 12})
    scores = truth.edge_scores(edges_of([], [(0, 2)]), matching, torch.full((12,), -1))
    assert all(map(math.isnan, scores.values()))


@pytest.mark.parametrize("leak", [0.0, 0.04])
@pytest.mark.parametrize("build", BUILDS)
def test_edges_are_those_that_exploring_finds_on_the_same_rows(build, leak, tmp_path) -> None:
    """Also where two roots fire on every row, at more than the floor of edges and less than that of firing."""
    encoder, decoder = build(DEEP)
    decoder[3:] += 0.1 * torch.randn(13, 16, generator=torch.Generator().manual_seed(0))
    sae = sae_of(decoder, encoder, [3, 7, 16], threshold=0.001)
    with torch.no_grad():
        sae.b_enc[:2] += leak
    metrics = truth_metrics(sae, InMemory(DEEP.x.split(700)), DEEP.truth)
    shards = given_shards(tmp_path, [DEEP.x], [DEEP.x[:9]])
    hierarchy, _ = extract(sae, shards, len(DEEP.x), Limits())
    assert hierarchy.level.tolist() == levels([3, 7, 16]).tolist()
    scores = truth.edge_scores(hierarchy.edges, match(sae.W_dec, DEEP.features), DEEP.parent)
    assert scores == pytest.approx({key: metrics[key] for key in scores}, nan_ok=True)
    roots = np.isin(hierarchy.edges.parent[hierarchy.edges.survives], [0, 1])
    assert roots.any() == (build is not absorbed and leak == 0)


def test_true_codes_are_values_times_the_norms_of_their_features() -> None:
    true = DEEP.activations * DEEP.features.norm(dim=1)
    for start, rows in ((0, len(true)), (100, 50), (0, 0)):
        torch.testing.assert_close(truth.true_codes(DEEP.truth, start, rows).dense(), true[start : start + rows])
