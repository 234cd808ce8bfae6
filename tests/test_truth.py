"""Ground-truth metrics: SAEs made by hand whose answers are known, and every figure against a dense loop."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from msae.evaluation import truth as module
from msae.evaluation.matching import Match, cosines, match
from msae.evaluation.truth import (
    Codes,
    at_features,
    edge_scores,
    edges_by_firing,
    firing,
    firing_scores,
    latent_codes,
    lean,
    parent_silent_given_child,
    shrinkage,
    signed_parts,
    true_codes,
    truth_metrics,
)
from msae.sae import MatryoshkaSAE

# 3 parents with 3 exclusive children each, 8 features alone
PARENT = torch.tensor([-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 8)
# 2 roots, each with 2 children, each of which has 2
DEEP = torch.tensor([-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, -1, -1])


def codes_of(dense: Tensor) -> Codes:
    row, index = dense.nonzero(as_tuple=True)
    return Codes(row, index, dense[row, index].float(), *dense.shape)


def truth_of(features: Tensor, parent: Tensor, activations: Tensor) -> dict[str, Tensor]:
    row, feature = activations.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (activations != 0).sum(1).cumsum(0)])
    value = activations[row, feature]
    return {"features": features, "parent": parent, "offsets": offsets, "feature": feature.int(), "value": value}


World = tuple[Tensor, Tensor, dict[str, Tensor]]  # rows x, true activations, truth


def world(parent: Tensor, oblique: bool = False, rows: int = 6000) -> World:
    """Rows of a forest of unit directions; a child is active in 0.25 of its parent's rows, siblings never together."""
    generator, n = torch.Generator().manual_seed(0), len(parent)
    features = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    if oblique:
        features = torch.nn.functional.normalize(features + 0.3 * torch.randn(n, n, generator=generator) / n**0.5)
        features *= 1 + torch.rand(n, 1, generator=generator)
    draw = torch.rand(rows, n, generator=generator)
    active = draw < 0.15
    for feature in (parent >= 0).nonzero().flatten().tolist():
        order = int((parent[:feature] == parent[feature]).sum())
        which = (draw[:, parent[feature]] * 97 * (feature + 1 - order)) % 1  # the same for siblings
        active[:, feature] = active[:, parent[feature]] & (which >= order / 4) & (which < (order + 1) / 4)
    activations = active * (0.5 + torch.rand(rows, n, generator=generator))
    return activations @ features, activations, truth_of(features, parent, activations)


@pytest.fixture(scope="module")
def tree() -> World:
    return world(PARENT)


@pytest.fixture(scope="module")
def deep() -> World:
    return world(DEEP, oblique=True)


def hand_made(encoder: Tensor, decoder: Tensor, threshold: float = 0.1) -> MatryoshkaSAE:
    """Latents fire where x · encoder row > threshold."""
    n, d_in = decoder.shape
    sae = MatryoshkaSAE(d_in, n, [n], 1)
    with torch.no_grad():
        sae.W_enc.copy_(encoder.T)
        sae.W_dec.copy_(decoder)
    sae.threshold.fill_(threshold)
    return sae


def perfect(features: Tensor) -> tuple[Tensor, Tensor]:
    """Activations are the true ones, also where directions are not orthogonal."""
    return torch.linalg.pinv(features).T.contiguous(), features.clone()


def absorbed(features: Tensor, parent: Tensor = PARENT) -> tuple[Tensor, Tensor]:
    """A parent's latent is silent under its children, whose latents decode to both."""
    encoder, decoder = perfect(features)
    for child in (parent >= 0).nonzero().flatten().tolist():
        encoder[parent[child]] -= 9 * encoder[child]
        decoder[child] += features[parent[child]]
    return encoder, decoder


def hedged(features: Tensor, parent: Tensor = PARENT) -> tuple[Tensor, Tensor]:
    """A parent's row leans to its children by 0.2 of each, a child's away from its parent by 0.3 of it."""
    encoder, decoder = perfect(features)
    for child in (parent >= 0).nonzero().flatten().tolist():
        decoder[parent[child]] += 0.2 * features[child]
        decoder[child] -= 0.3 * features[parent[child]]
    return encoder, decoder


BUILDS = [perfect, absorbed, hedged]
EXACT = {
    "mcc": 1,
    "uniqueness": 1,
    "mmcs": 1,
    "firing_precision": 1,
    "firing_recall": 1,
    "firing_f1": 1,
    "parent_silent_given_child": 0,
    "parent_silent_given_child_recovered": 0,
    "edges_matched": 1,
    "edges_recovered": 1,
    **{f"cos_{pair}{part}": 0 for pair in ("child_parent", "parent_child") for part in ("", "_positive", "_negative")},
    "edge_precision": 1,
    "edge_recall": 1,
    "l0_ratio": 1,
    "shrinkage": 1,
}


@pytest.mark.parametrize("name", ["tree", "deep"])
def test_perfect_sae(name, request) -> None:
    """Every figure, for orthogonal directions and depth 2, and for oblique ones, norms of 1 to 2 and depth 3."""
    x, activations, truth = request.getfixturevalue(name)
    metrics = truth_metrics(hand_made(*perfect(truth["features"])), x, truth)
    l0 = float((activations != 0).sum(1).double().mean())
    chance = metrics.pop("mcc_chance")
    assert metrics == pytest.approx(EXACT | {"l0": l0, "true_l0": l0}, abs=1e-5)
    assert 0.2 < chance < 0.7


def test_absorbed_sae(tree) -> None:
    x, activations, truth = tree
    metrics = truth_metrics(hand_made(*absorbed(truth["features"])), x, truth)
    assert metrics["parent_silent_given_child"] == metrics["parent_silent_given_child_recovered"] == 1
    assert (metrics["edges_matched"], metrics["edges_recovered"]) == (1, 1)
    for part, value in (("", 0.5**0.5), ("_positive", 0.5**0.5), ("_negative", 0)):
        assert metrics[f"cos_child_parent{part}"] == pytest.approx(value, abs=1e-5)
        assert metrics[f"cos_parent_child{part}"] == pytest.approx(0, abs=1e-5)
    assert metrics["mcc"] == pytest.approx((11 + 9 / math.sqrt(2)) / 20, abs=1e-5)
    assert metrics["firing_precision"] == 1
    active = activations != 0  # a parent's latent fires where none of its children is active
    under_child = torch.stack([active[:, 3 + 3 * p : 6 + 3 * p].any(1) for p in range(3)], 1)
    recall = (active[:, :3] & ~under_child).sum(0) / active[:, :3].sum(0)
    assert metrics["firing_recall"] == pytest.approx(float((recall.sum() + 17) / 20))
    assert metrics["firing_f1"] == pytest.approx(float(((2 * recall / (1 + recall)).sum() + 17) / 20))
    assert metrics["edge_recall"] == 0
    assert math.isnan(metrics["edge_precision"])
    assert metrics["l0_ratio"] == pytest.approx(1 - float(active[:, 3:12].sum() / active.sum()))
    child = activations[:, 3:12].sum()
    other = activations[:, 12:].sum() + activations[:, :3][~under_child].sum()
    assert metrics["shrinkage"] == pytest.approx(float((2**0.5 * child + other) / (child + other)))


def test_hedged_sae(tree) -> None:
    x, _, truth = tree
    metrics = truth_metrics(hand_made(*hedged(truth["features"])), x, truth)
    parent, child = 0.2 / math.sqrt(1 + 3 * 0.2**2), -0.3 / math.sqrt(1 + 0.3**2)
    for part, a, b in (("", parent, child), ("_positive", parent, 0), ("_negative", 0, child)):
        assert metrics[f"cos_parent_child{part}"] == pytest.approx(a, abs=1e-5)
        assert metrics[f"cos_child_parent{part}"] == pytest.approx(b, abs=1e-5)
    assert metrics["mcc"] == pytest.approx((3 / math.sqrt(1.12) + 9 / math.sqrt(1.09) + 8) / 20, abs=1e-5)
    assert [metrics[f"firing_{score}"] for score in ("precision", "recall", "f1")] == [1, 1, 1]
    assert (metrics["parent_silent_given_child"], metrics["edge_precision"], metrics["edge_recall"]) == (0, 1, 1)


@pytest.mark.parametrize("build", BUILDS)
def test_the_order_of_latents_does_not_matter(tree, build) -> None:
    x, _, truth = tree
    encoder, decoder = build(truth["features"])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = truth_metrics(hand_made(encoder[order], decoder[order]), x, truth)
    straight = truth_metrics(hand_made(encoder, decoder), x, truth)
    if build is absorbed:  # a child's latent is as near to the parent as to the child: rounding decides
        del shuffled["uniqueness"], straight["uniqueness"]
    assert shuffled == pytest.approx(straight, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("build", BUILDS)
def test_the_order_of_features_does_not_matter(tree, build) -> None:
    x, activations, truth = tree
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    parent = torch.where(PARENT[order] >= 0, place[PARENT[order]], -1)
    other = truth_of(truth["features"][order], parent, activations[:, order])
    sae = hand_made(*build(truth["features"]))
    got, expected = truth_metrics(sae, x, other), truth_metrics(sae, x, truth)
    for name in ("uniqueness",) if build is absorbed else ():
        del got[name], expected[name]
    assert got == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_rows_with_the_wrong_sign(deep) -> None:
    """|cos| forgives it, firing does not see it, and towards parent and child a row counts as it is."""
    x, _, truth = deep
    features = truth["features"]
    encoder, decoder = perfect(features)
    metrics = truth_metrics(hand_made(encoder, -decoder), x, truth)
    child = (DEEP >= 0).nonzero().flatten()
    true = cosines(features, features)[child, DEEP[child]]
    changed = signed_parts("", -2 * true)
    expected = EXACT | {
        f"cos_{pair}{part}": v for pair in ("child_parent", "parent_child") for part, v in changed.items()
    }
    assert {name: metrics[name] for name in EXACT} == pytest.approx(expected, abs=1e-5)
    assert min(changed["_positive"], -changed["_negative"]) > 0.01


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_scale(deep, factor) -> None:
    """Smaller activations are shrinkage; smaller encoder and larger decoder rows, or a scale, are nothing."""
    x, _, truth = deep
    encoder, decoder = perfect(truth["features"])
    shrunken = truth_metrics(hand_made(factor * encoder, decoder), x, truth)
    assert {name: shrunken[name] for name in EXACT} == pytest.approx(EXACT | {"shrinkage": factor}, abs=1e-5)
    traded = hand_made(factor * encoder, decoder / factor)
    assert truth_metrics(traded, x, truth)["shrinkage"] == pytest.approx(1, abs=1e-5)
    scaled = hand_made(encoder, decoder)
    scaled.scale.fill_(factor)
    assert truth_metrics(scaled, x, truth)["shrinkage"] == pytest.approx(1, abs=1e-5)
    scaled.rescale_acts_by_decoder_norm = True
    assert truth_metrics(scaled, x, truth)["shrinkage"] == pytest.approx(1, abs=1e-5)


def test_dead_latents(tree) -> None:
    """Two features have a latent that never fires; four latents more match nothing."""
    x, activations, truth = tree
    encoder, decoder = perfect(truth["features"])
    encoder[[0, 19]] = 0.0  # the first parent, the last that stands alone
    spare = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    metrics = truth_metrics(hand_made(torch.cat([encoder, 0 * spare]), torch.cat([decoder, spare])), x, truth)
    assert metrics["mcc"] == pytest.approx(1, abs=1e-5)
    assert [metrics[f"firing_{score}"] for score in ("precision", "recall", "f1")] == pytest.approx([18 / 20] * 3)
    assert metrics["parent_silent_given_child"] == pytest.approx(1 / 3)
    assert metrics["uniqueness"] == pytest.approx(20 / 24)
    assert (metrics["edge_precision"], metrics["edge_recall"]) == pytest.approx((1, 6 / 9))
    lost = (activations[:, [0, 19]] != 0).sum() / (activations != 0).sum()
    assert metrics["l0_ratio"] == pytest.approx(1 - float(lost))
    assert metrics["shrinkage"] == pytest.approx(1, abs=1e-5)


def test_fewer_latents_than_features(tree) -> None:
    """An edge without both latents counts as missed, never as absorbed."""
    x, _, truth = tree
    encoder, decoder = perfect(truth["features"])
    parents = truth_metrics(hand_made(encoder[:3], decoder[:3]), x, truth)
    assert (parents["mcc"], parents["firing_f1"], parents["uniqueness"]) == pytest.approx((1, 1, 1), abs=1e-5)
    assert (parents["edges_matched"], parents["edges_recovered"], parents["edge_recall"]) == (0, 0, 0)
    assert parents["cos_parent_child"] == pytest.approx(0, abs=1e-5)
    for name in ("parent_silent_given_child", "cos_child_parent", "edge_precision"):
        assert math.isnan(parents[name])
    no_parents = truth_metrics(hand_made(encoder[3:], decoder[3:]), x, truth)
    assert math.isnan(no_parents["parent_silent_given_child"])
    assert math.isnan(no_parents["cos_parent_child"])
    assert no_parents["cos_child_parent"] == pytest.approx(0, abs=1e-5)
    one_tree = truth_metrics(hand_made(encoder[[0, 3, 4]], decoder[[0, 3, 4]]), x, truth)
    assert one_tree["parent_silent_given_child"] == 0
    assert (one_tree["edges_matched"], one_tree["edge_recall"]) == pytest.approx((2 / 9, 2 / 9))


def test_a_latent_far_from_its_feature_does_not_make_it_recovered(tree) -> None:
    """The first parent's row is 0.4 of it and its latent is silent: matched, but not there."""
    x, _, truth = tree
    encoder, decoder = perfect(torch.cat([truth["features"], torch.zeros(20, 1)], 1))
    encoder[0] = 0
    decoder[0] = 0.4 * decoder[0] + (1 - 0.4**2) ** 0.5 * torch.eye(21)[20]
    metrics = truth_metrics(
        hand_made(encoder, decoder),
        torch.cat([x, torch.zeros(len(x), 1)], 1),
        truth | {"features": torch.cat([truth["features"], torch.zeros(20, 1)], 1)},
    )
    assert (metrics["edges_matched"], metrics["edges_recovered"]) == pytest.approx((1, 6 / 9))
    assert metrics["parent_silent_given_child"] == pytest.approx(1 / 3)
    assert metrics["parent_silent_given_child_recovered"] == 0


def test_weak_firing_does_not_count(tree) -> None:
    """5 % of a latent's own maximum is the floor: a leak of 1 % is silent but counts in L0, one of 20 % fires."""
    x, _, truth = tree
    for leak, precise in ((0.01, True), (0.2, False)):
        encoder, decoder = perfect(truth["features"])
        encoder[12] += leak * encoder[13]
        metrics = truth_metrics(hand_made(encoder, decoder, 0.001), x, truth)
        assert (metrics["firing_precision"] == 1) == precise
        assert (metrics["edge_precision"] == 1) == precise  # one fires wherever the other does
        assert metrics["l0_ratio"] > 1.01


def test_the_floor_is_a_share_of_the_latents_own_maximum() -> None:
    dense = torch.tensor([[1.0, 40.0], [0.06, 1.9], [0.04, 2.1], [0.0, 0.0]])
    kept = firing(codes_of(dense), 0.05)
    assert sorted(zip(kept.row.tolist(), kept.index.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0), (2, 1)]


def test_batches_and_later_rows(tree, monkeypatch) -> None:
    """Rows from a later one on, in batches of any size, encoded in blocks that stay below the limit."""
    x, _, truth = tree
    sae = hand_made(*hedged(truth["features"]))
    expected = truth_metrics(sae, x[2500:], truth, 2500)
    assert expected["firing_f1"] == 1
    sizes, encode = [], sae.encode
    monkeypatch.setattr(module, "BLOCK", 20 * 64)
    monkeypatch.setattr(sae, "encode", lambda x: (sizes.append(len(x)), encode(x))[1])
    assert truth_metrics(sae, iter(x[2500:].split(333)), truth, 2500) == pytest.approx(expected)
    assert max(sizes) == 64
    assert sum(sizes) == len(x) - 2500


def test_metrics_agree_above_the_dense_limit(deep, monkeypatch) -> None:
    x, _, truth = deep
    sae = hand_made(*hedged(truth["features"], DEEP))
    expected = truth_metrics(sae, x, truth)
    monkeypatch.setattr(module, "match", lambda *given: match(*given, dense=0))
    assert truth_metrics(sae, x, truth) == pytest.approx(expected)


def test_no_edges_and_no_rows_with_both() -> None:
    x, activations, truth = world(torch.full((6,), -1), rows=500)
    metrics = truth_metrics(hand_made(*perfect(truth["features"])), x, truth)
    missing = {name for name, value in metrics.items() if math.isnan(value)}
    assert missing == {name for name in EXACT if "edge" in name or "cos_" in name or "silent" in name}
    assert metrics["mcc"] == pytest.approx(1)
    truth["parent"][1] = 0  # 1 is only ever active without 0
    activations[:, 0] *= activations[:, 1] == 0
    truth = truth_of(truth["features"], truth["parent"], activations)
    metrics = truth_metrics(hand_made(*perfect(truth["features"])), activations @ truth["features"], truth)
    assert math.isnan(metrics["parent_silent_given_child"])
    assert metrics["edge_recall"] == 0
    assert metrics["cos_child_parent"] == pytest.approx(0, abs=1e-5)


def test_features_that_never_occur_do_not_count(tree) -> None:
    x, activations, truth = tree
    rows = (activations[:, 12] == 0).nonzero().flatten()
    sae = hand_made(*perfect(truth["features"]))
    some = truth_of(truth["features"], PARENT, activations[rows])
    assert truth_metrics(sae, x[rows], some)["firing_f1"] == 1
    silent = truth_of(truth["features"], PARENT, torch.zeros(9, 20))
    metrics = truth_metrics(sae, torch.zeros(9, 20), silent)
    assert all(math.isnan(metrics[name]) for name in ("firing_f1", "l0_ratio", "shrinkage"))
    assert metrics["mcc"] == pytest.approx(1)


# --- against dense loops ---------------------------------------------------------------------------------------


def random_example(seed: int) -> tuple[Tensor, Tensor, Tensor, Match]:
    """Latent activations [rows, 15], true ones [rows, 12], a forest of 12, and a matching of 9 pairs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (200, 15), (200, 12)
    acts, true = ((torch.rand(s, generator=generator) < 0.4) * torch.rand(s, generator=generator) for s in shapes)
    parent = torch.tensor([int(torch.randint(-1, max(f, 1), (1,), generator=generator)) for f in range(12)])
    parent[0] = -1
    pairs = torch.randperm(15, generator=generator)[:9], torch.randperm(12, generator=generator)[:9]
    return acts, true, parent, Match(*pairs, torch.rand(9, generator=generator))


@pytest.mark.parametrize("seed", range(4))
def test_firing_figures_equal_their_loops(seed) -> None:
    acts, true, parent, found = random_example(seed)
    fires, active = at_features(codes_of(acts), found, 12), codes_of(true)
    latent = found.latent_of(12)
    dense = torch.zeros(200, 12)
    dense[:, found.feature] = acts[:, found.latent]
    assert torch.equal(codes_of(dense).row, fires.row)
    precision, recall, f1 = [], [], []
    for feature in found.feature.tolist():
        hit = sum(bool(a and b) for a, b in zip(dense[:, feature], true[:, feature], strict=True))
        precision.append(hit / int((dense[:, feature] != 0).sum()))
        recall.append(hit / int((true[:, feature] != 0).sum()))
        f1.append(2 * precision[-1] * recall[-1] / (precision[-1] + recall[-1]))
    expected = {"firing_precision": precision, "firing_recall": recall, "firing_f1": f1}
    assert firing_scores(fires, active, found.feature) == pytest.approx({k: np.mean(v) for k, v in expected.items()})

    for has_latent in (latent >= 0, torch.ones(12, dtype=torch.bool), None):
        silent = []
        for child, above in enumerate(parent.tolist()):
            if above < 0 or (has_latent is not None and not (has_latent[child] and has_latent[above])):
                continue
            both = [row for row in range(200) if true[row, child] and true[row, above]]
            silent.append(np.mean([dense[row, above] == 0 for row in both]))
        got = parent_silent_given_child(fires, active, parent, has_latent)
        assert got == pytest.approx(np.mean(silent), nan_ok=True)

    both = (dense != 0) & (true != 0)
    assert shrinkage(fires, active) == pytest.approx(float(dense[both].sum() / true[both].sum()))


def test_parent_silent_by_hand() -> None:
    """Parent 0 with child 1: both active in rows 1, 3; its latent fires in row 3. Feature 2 is alone."""
    active = codes_of(torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 0]]))
    fires = codes_of(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 1, 0]]))
    assert parent_silent_given_child(fires, active, torch.tensor([-1, 0, -1])) == 0.5
    assert math.isnan(parent_silent_given_child(fires, active, torch.tensor([-1, -1, -1])))
    scores = firing_scores(
        codes_of(torch.tensor([[1, 0], [1, 0], [0, 0], [1, 1]])),
        codes_of(torch.tensor([[1, 0], [0, 0], [1, 0], [1, 0]])),
        torch.tensor([0, 1]),
    )  # the first pair 2 of 3 and 2 of 3, the second never right
    assert scores == pytest.approx({"firing_precision": 1 / 3, "firing_recall": 1 / 3, "firing_f1": 1 / 3})


@pytest.mark.parametrize("seed", range(4))
def test_leaning_equals_its_loop(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    _, _, parent, found = random_example(seed)
    W_dec, features = torch.randn(15, 6, generator=generator), torch.randn(12, 6, generator=generator)
    cos, own = cosines(W_dec, features), cosines(features, features)
    latent = dict(zip(found.feature.tolist(), found.latent.tolist(), strict=True))
    edges = [(p, c) for c, p in enumerate(parent.tolist()) if p >= 0]
    child = torch.tensor([c for _, c in edges])
    up = [float(cos[latent[c], p] - own[c, p]) for p, c in edges if c in latent]
    down = [float(cos[latent[p], c] - own[p, c]) for p, c in edges if p in latent]
    got = lean(W_dec, features, found, child, parent[child])
    torch.testing.assert_close(got, torch.tensor(up))
    torch.testing.assert_close(lean(W_dec, features, found, parent[child], child), torch.tensor(down))
    parts = {"": up, "_positive": [max(v, 0) for v in up], "_negative": [min(v, 0) for v in up]}
    assert signed_parts("", got) == pytest.approx({k: np.mean(v) for k, v in parts.items()}, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_edges_equal_their_loop(seed) -> None:
    """Latents that mostly fire under others, with thresholds at which some pairs pass and some fail."""
    generator, rows = torch.Generator().manual_seed(seed), 400
    fires = torch.rand(rows, 30, generator=generator) < 0.1 + 0.5 * torch.rand(30, generator=generator)
    for latent in range(10, 30):
        under = int(torch.randint(0, latent, (1,), generator=generator))
        fires[:, latent] &= fires[:, under] | (torch.rand(rows, generator=generator) < 0.15)
    fires[:, 29] = fires[:, 28]  # twins: neither is the other's parent
    p = fires.double().mean(0)
    expected = {}
    for child in range(30):
        for parent in range(30):
            given = float((fires[:, parent] & fires[:, child]).double().mean() / p[child])
            if int(fires[:, child].sum()) < 8 or p[parent] <= p[child] or given < 0.7 or given < 1.3 * p[parent]:
                continue
            if child not in expected or p[parent] < p[expected[child]]:
                expected[child] = parent
    got = edges_by_firing(codes_of(fires), coverage=0.7, lift=1.3, least=8, block=7)
    assert {child for _, child in got.tolist()} == set(expected)
    assert len(got) == len(expected) > 3
    assert all(p[parent] == p[expected[child]] for parent, child in got.tolist())
    assert len(edges_by_firing(codes_of(torch.zeros(5, 4)))) == 0


def test_edges_are_immediate_and_through_the_matching(deep) -> None:
    """Depth 3: grandparents cover grandchildren too, the nearer one is the parent; 3 of 12 edges lost and 1 wrong."""
    _, activations, _ = deep
    edges = edges_by_firing(codes_of(activations))
    assert {tuple(e) for e in edges.tolist()} == {(int(DEEP[c]), c) for c in range(2, 14)}
    found = Match(torch.arange(12), torch.arange(12), torch.ones(12))  # the last two leaves have no latent
    scores = edge_scores(edges, found, DEEP)
    assert scores == pytest.approx({"edge_precision": 10 / 12, "edge_recall": 10 / 12})
    scores = edge_scores(torch.tensor([[0, 2], [2, 0], [0, 1], [2, 6]]), found, DEEP)
    assert scores == pytest.approx({"edge_precision": 2 / 4, "edge_recall": 2 / 12})


def test_true_codes(deep) -> None:
    _, activations, truth = deep
    for start, rows in ((0, None), (100, None), (100, 50), (0, 0)):
        codes = true_codes(truth, start, rows)
        part = activations[start:] if rows is None else activations[start : start + rows]
        dense = torch.zeros(codes.rows, codes.size).index_put_((codes.row, codes.index), codes.value)
        torch.testing.assert_close(dense, part * truth["features"].norm(dim=1))


def test_latent_codes(deep) -> None:
    x, _, truth = deep
    sae = hand_made(*hedged(truth["features"], DEEP))
    codes = latent_codes(sae, x)
    dense = torch.zeros(codes.rows, codes.size).index_put_((codes.row, codes.index), codes.value)
    torch.testing.assert_close(dense, (sae.encode(x) * sae.W_dec.norm(dim=1)).detach())
