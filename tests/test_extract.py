"""The hierarchy with its controls: what they are, what is said of them, and the file, which refuses what is broken."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msae.data.harvest import harvest
from msae.data.shards import Shards
from msae.data.synthetic import ForestSource
from msae.hierarchy import extract as module
from msae.hierarchy.edges import Edges
from msae.hierarchy.extract import FILE, FIRINGS, ORDER, THIS, VANILLA, Hierarchy, extract, levels, load, numbers, save
from msae.hierarchy.firings import Firings, collect
from msae.hierarchy.limits import TESTS, Limits
from msae.hierarchy.pairs import covering_pairs
from msae.sae import MatryoshkaSAE
from tests.test_edges import survivors
from tests.test_firings import given_shards

SOURCE = ForestSource(rows=6000, val_rows=3000, chunk_rows=2500, root_p=0.25, magnitude_std=0.15)
TREE = {(p, c) for c, p in enumerate(SOURCE.parent.tolist()) if p >= 0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    return harvest(SOURCE, tmp_path_factory.mktemp("shards"), show=False)["synthetic"]


def perfect(prefixes: list[int], order: list[int] | None = None, sae: MatryoshkaSAE | None = None) -> MatryoshkaSAE:
    """Latent i has the true activations of feature order[i]."""
    features = SOURCE.features[list(range(20)) if order is None else order]
    sae = MatryoshkaSAE(20, len(features), prefixes, 2) if sae is None else sae
    with torch.no_grad():
        sae.W_dec.copy_(features)
        sae.W_enc.copy_(torch.linalg.pinv(features))
    sae.threshold.fill_(0.1)
    return sae


def absorbed() -> MatryoshkaSAE:
    """One prefix; children contain their parent, and the parent is silent under them."""
    sae = perfect([20])
    with torch.no_grad():
        for p, c in TREE:
            sae.W_enc[:, p] -= 9 * sae.W_enc[:, c]
            sae.W_dec[c] += SOURCE.features[p]
    return sae


@pytest.fixture(scope="module")
def found(shards) -> tuple[Hierarchy, Firings]:
    return extract(perfect([3, 12, 20]), shards, None, Limits(), absorbed())


# --- what is found ---------------------------------------------------------------------------------------------


def test_a_perfect_sae_of_the_tree_is_found_whole_and_no_control_finds_it(found, shards) -> None:
    hierarchy, firings = found
    assert hierarchy.truth == {"edge_precision": 1, "edge_recall": 1}
    assert survivors(hierarchy.edges) == TREE
    assert hierarchy.parent.tolist() == SOURCE.parent.tolist()
    assert list(hierarchy.funnels) == [THIS, ORDER, FIRINGS, VANILLA]
    kept = {name: funnel["rank"] for name, funnel in hierarchy.funnels.items()}
    assert kept[THIS] == 9
    assert kept[ORDER] < 9
    assert kept[FIRINGS] == kept[VANILLA] == 0
    candidates = len(hierarchy.edges.parent)
    assert hierarchy.verdict() == (
        f"9 of {candidates} candidate edges survive every test; {kept[ORDER]} with order shuffled, "
        "0 with firings shuffled, 0 in a vanilla SAE."
    )
    assert hierarchy.prefixes == [3, 12, 20]
    assert hierarchy.level.tolist() == [0] * 3 + [1] * 9 + [2] * 8
    assert firings.rows == 9000
    assert hierarchy.rate.tolist() == pytest.approx((firings.counts() / 9000).tolist())
    assert hierarchy.largest.tolist() == firings.largest().tolist()
    assert hierarchy.about == {
        "d_sae": 20,
        "tokens": 9000,
        "l0": pytest.approx(float(hierarchy.rate.sum())),
        "shards": shards.directory.name,
        "weights": module.weights_hash(perfect([3, 12, 20])),
        "identity_hash": shards.manifest["identity_hash"],
        "model": "",
        "hook_name": "synthetic",
        "limits": asdict(Limits()),
    }


def test_funnels_have_the_same_stages_and_never_widen(found) -> None:
    hierarchy, _ = found
    for funnel in hierarchy.funnels.values():
        assert list(funnel) == ["pairs", *(key for key, test in TESTS.items() if test.line)]
        counts = list(funnel.values())
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > 50
    assert hierarchy.funnels[THIS] == hierarchy.edges.funnel()


def test_the_order_is_a_control_only_where_there_are_prefixes_and_vanilla_only_if_given(shards) -> None:
    one, _ = extract(perfect([20]), shards, 3000, Limits())
    assert list(one.funnels) == [THIS, FIRINGS]
    assert one.truth == {"edge_precision": 1, "edge_recall": 1}
    several, _ = extract(perfect([3, 20]), shards, 3000, Limits())
    assert list(several.funnels) == [THIS, ORDER, FIRINGS]
    both, _ = extract(perfect([20]), shards, 3000, Limits(), perfect([20]))
    assert list(both.funnels) == [THIS, FIRINGS, VANILLA]
    assert both.funnels[VANILLA] == both.funnels[THIS]


def test_precision_and_recall_are_of_the_surviving_edges(shards) -> None:
    """Without the latents of parent 0 and child 6 there are five of nine edges, and a latent matched to nothing."""
    order = [1, 2, *range(3, 6), *range(7, 20)]
    hierarchy, _ = extract(perfect([18], order), shards, None, Limits())
    right = {(order.index(p), order.index(c)) for p, c in TREE if p in order and c in order}
    assert survivors(hierarchy.edges) == right
    assert hierarchy.truth == {"edge_precision": 1, "edge_recall": pytest.approx(5 / 9)}

    nothing, _ = extract(absorbed(), shards, 3000, Limits())
    assert np.isnan(nothing.truth["edge_precision"])
    assert nothing.truth["edge_recall"] == 0
    assert nothing.verdict().endswith("0 with firings shuffled. Nothing is found.")

    later, _ = extract(perfect([17, 20], [*range(3, 20), *range(3)]), shards, 3000, Limits())
    assert later.truth["edge_recall"] == 0  # parents of a later level


def test_precision_counts_what_survives_and_is_wrong(shards) -> None:
    ends = np.array([[0, 0, 1, 2, 2], [3, 4, 3, 11, 10]])
    passed = {"lift": np.array([True, True, True, True, False]), "rank": np.array([True, True, True, False, True])}
    edges = Edges(*ends, np.zeros(5, dtype=int), {}, passed, 50)
    scores = module.against_truth(perfect([20]), shards, edges)
    assert scores == {"edge_precision": pytest.approx(2 / 3), "edge_recall": pytest.approx(2 / 9)}


def test_without_truth_nothing_is_said_of_it(tmp_path) -> None:
    x = torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    given = given_shards(tmp_path, [x[:100]], [x[100:]])
    sae = MatryoshkaSAE(3, 4, [2, 4], 1, sparsity="l1")
    sae.metadata["model_name"] = "a model"
    hierarchy, _ = extract(sae, given, None, Limits())
    assert hierarchy.truth == {}
    assert hierarchy.about["model"] == "a model"
    assert hierarchy.about["hook_name"] == "given"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gpt2", "gpt2"),
        ("someone/a-model", "someone/a-model"),
        ("/somewhere/private/tiny", "tiny"),
        ("../private/tiny/", "tiny"),
        ("~/tiny", "tiny"),
        (None, ""),
    ],
)
def test_the_file_names_a_model_and_never_its_directory(shards, given, said) -> None:
    sae = perfect([20])
    sae.metadata["model_name"] = given
    hierarchy, _ = extract(sae, shards, 200, Limits())
    assert hierarchy.about["model"] == said


class Spy:
    """`grade`, which remembers what it was given."""

    def __init__(self) -> None:
        self.real, self.calls = module.grade, list[tuple[Any, ...]]()

    def __call__(self, *args: Any) -> Edges:
        self.calls.append(args)
        return self.real(*args)


def test_controls_are_the_same_tests_on_other_levels_firings_and_saes(shards, monkeypatch) -> None:
    sae, vanilla, limits = perfect([3, 12, 20]), absorbed(), Limits(floor=0.5, least=5, coverage=0.4)
    spies = []
    for seed in (0, 0, 1):
        spies.append(Spy())
        monkeypatch.setattr(module, "grade", spies[-1])
        extract(sae, shards, 2000, limits, vanilla, seed)
        monkeypatch.undo()
    this, order, strangers, other = spies[0].calls
    firings, of_vanilla = (collect(one, shards, 2000, 0.5) for one in (sae, vanilla))
    assert firings.rows == of_vanilla.rows == 2000
    for one, of in ((sae, firings), (vanilla, of_vanilla)):  # so that the floor matters
        assert of.matrix.nnz < collect(one, shards, 2000).matrix.nnz
    for one, its, level, of in (
        (this, sae, [0] * 3 + [1] * 9 + [2] * 8, firings),
        (order, sae, None, firings),
        (strangers, sae, [0] * 3 + [1] * 9 + [2] * 8, firings.shuffled(0)),
        (other, vanilla, [0] * 20, of_vanilla),
    ):
        assert one[0] is its
        assert one[1] is shards
        np.testing.assert_array_equal(one[2].matrix.toarray(), of.matrix.toarray())
        expected = covering_pairs(of, 0.4, 5)  # each has the pairs of its own firings
        for name, values in vars(expected).items():
            np.testing.assert_array_equal(getattr(one[3], name), values)
        assert level is None or one[4].tolist() == level
        assert one[5] is limits
    shuffled = [spy.calls[1][4].tolist() for spy in spies]
    assert sorted(shuffled[0]) == [0] * 3 + [1] * 9 + [2] * 8
    assert shuffled[0] != this[4].tolist()
    assert shuffled[0] == shuffled[1] != shuffled[2]
    moved = [spy.calls[2][2].matrix.toarray() for spy in spies]
    assert (moved[0] == moved[1]).all()
    assert (moved[0] != moved[2]).any()


def test_levels_are_the_first_prefix_that_holds_a_latent() -> None:
    for prefixes in ([7], [1, 7], [2, 3, 7], [1, 2, 3, 4, 5, 6, 7]):
        expected = [next(i for i, width in enumerate(prefixes) if latent < width) for latent in range(7)]
        assert levels(MatryoshkaSAE(3, 7, prefixes, 1)).tolist() == expected


def test_what_does_not_fit_is_refused_in_one_line(shards) -> None:
    fits = perfect([20])
    wide = MatryoshkaSAE(21, 20, [20], 2, sparsity="l1")
    transcoder = MatryoshkaSAE(20, 20, [20], 2, d_out=20, sparsity="l1")
    for wrong, message in (
        (wide, rf"^shards in \S*{shards.directory.name} have d_in=20, the SAE expects 21; give shards=[^\n]*$"),
        (transcoder, r"^this is a transcoder[^\n]*$"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(wrong, shards, 100, Limits())
        with pytest.raises(ValueError, match=message):
            extract(fits, shards, 100, Limits(), wrong)


# --- the verdict -----------------------------------------------------------------------------------------------


def with_kept(hierarchy: Hierarchy, **kept: int) -> Hierarchy:
    """The same with other counts at the end of its funnels."""
    names = {"this": THIS, "order": ORDER, "firings": FIRINGS, "vanilla": VANILLA}
    funnels = {names[name]: {"pairs": 10**6, "coverage": 5000, "rank": n} for name, n in kept.items()}
    return replace(hierarchy, funnels=funnels)


ADDS = "The order of its latents adds nothing: it finds no hierarchy by prefixes."
CHANCE = "Chance alone gives as many: nothing is found."
NESTED = "A vanilla SAE gives as many: nested prefixes add nothing."
VERDICTS = [
    ({"this": 1234, "order": 12, "firings": 0, "vanilla": 1233}, ""),
    ({"this": 9, "firings": 8}, ""),
    ({"this": 9, "firings": 9}, CHANCE),
    ({"this": 9, "firings": 10}, CHANCE),
    ({"this": 9, "order": 9, "firings": 0}, ADDS),
    ({"this": 9, "order": 8, "firings": 0, "vanilla": 9}, NESTED),
    ({"this": 0, "firings": 0}, "Nothing is found."),
    ({"this": 0, "order": 0, "firings": 3, "vanilla": 2}, "Nothing is found."),
    ({"this": 9, "order": 9, "firings": 9, "vanilla": 9}, CHANCE),  # what says most
]


@pytest.mark.parametrize(("kept", "end"), VERDICTS)
def test_the_verdict_says_whether_a_control_keeps_as_many(found, kept, end) -> None:
    hierarchy = with_kept(found[0], **kept)
    said = hierarchy.verdict()
    assert said.startswith(f"{kept['this']:,} of {len(hierarchy.edges.parent)} candidate edges survive every test; ")
    for name, words in (("order", "with order shuffled"), ("firings", "with firings shuffled")):
        assert (words in said) == (name in kept)
        assert name not in kept or f" {kept[name]:,} {words}" in said
    assert ("in a vanilla SAE" in said) == ("vanilla" in kept)
    assert "vanilla" not in kept or f" {kept['vanilla']:,} in a vanilla SAE" in said
    assert said.endswith(f". {end}" if end else ("SAE." if "vanilla" in kept else "shuffled."))
    assert sum(text in said for text in (ADDS, CHANCE, NESTED, "Nothing is found.")) == bool(end)
    assert "\n" not in said


# --- the file --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def messy(shards) -> Hierarchy:
    """Some edges survive and some do not, and what is not known of some is NaN."""
    limits = Limits(coverage=0.22, lift=1.02, superparent=1.0)
    hierarchy, _ = extract(perfect([3, 12, 20]), shards, None, limits)
    assert 0 < hierarchy.edges.survives.sum() < len(hierarchy.edges.parent) - 5
    assert any(np.isnan(values).any() for values in hierarchy.edges.figures.values())
    return hierarchy


@pytest.fixture
def file(found, tmp_path) -> Path:
    save(found[0], tmp_path / FILE)
    return tmp_path / FILE


def close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """To four significant digits; what is not finite is NaN."""
    expected = np.where(np.isfinite(expected.astype(float)), expected, np.nan)
    np.testing.assert_allclose(found, expected, rtol=5.1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("which", ["found", "messy"])
def test_what_is_saved_is_loaded(found, messy, tmp_path, which) -> None:
    before, file = found[0] if which == "found" else messy, tmp_path / FILE
    save(before, file)
    after = load(file)
    assert after.prefixes == before.prefixes
    assert after.level.tolist() == before.level.tolist()
    close(after.rate, before.rate)
    close(after.largest, before.largest)
    assert after.funnels == before.funnels
    assert after.truth == before.truth
    assert after.about == before.about
    assert after.verdict() == before.verdict()
    assert after.parent.tolist() == before.parent.tolist()
    a, b = before.edges, after.edges
    for name in ("parent", "child", "holes", "survives"):
        assert getattr(b, name).tolist() == getattr(a, name).tolist()
    assert b.funnel() == a.funnel()
    assert b.looked_at == a.looked_at
    assert list(b.figures) == list(a.figures) == list(TESTS)
    assert list(b.passed) == list(a.passed)
    for key, values in a.figures.items():
        close(b.figures[key], values)
    for key, values in a.passed.items():
        assert b.passed[key].dtype == bool
        assert b.passed[key].tolist() == values.tolist()
    again = file.with_name("again.json")
    save(after, again)
    assert json.loads(again.read_text()) == json.loads(file.read_text())


def test_the_file_says_what_it_holds(found, file) -> None:
    content = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (content["format"], content["version"]) == ("msae-hierarchy", 1)
    assert content["verdict"] == found[0].verdict()
    assert content["latents"]["parent"] == SOURCE.parent.tolist()
    assert content["edges"]["survives"] == found[0].edges.survives.tolist()
    assert set(content["tests"]) == set(TESTS)
    assert content["tests"]["mcs"]["line"] == "≥ {mcs}"
    assert not list(file.parent.glob("*.tmp"))


def test_a_hierarchy_without_a_candidate_is_saved_and_loaded(found, shards, tmp_path) -> None:
    nothing, _ = extract(perfect([3, 12, 20]), shards, 500, Limits(least=10**6), absorbed())
    save(nothing, tmp_path / FILE)
    after = load(tmp_path / FILE)
    assert len(after.edges.parent) == 0
    assert not after.edges.survives.any()
    assert after.parent.tolist() == [-1] * 20
    assert after.verdict() == nothing.verdict()
    assert after.verdict().startswith("0 of 0 candidate edges survive")


def test_numbers_have_four_digits_and_null() -> None:
    values = np.array([1 / 3, 123456.0, 1e-9 / 3, np.nan, np.inf, -np.inf, 0.0, -2 / 3])
    assert numbers(values) == [0.3333, 123500.0, 3.333e-10, None, None, None, 0.0, -0.6667]
    assert numbers(values.astype(np.float32))[:2] == [0.3333, 123500.0]
    assert numbers(np.array([1, 123456])) == [1, 123456]
    assert numbers(np.array([True, False])) == [True, False]
    json.dumps(numbers(values), allow_nan=False)


def change(path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Set what is at a.b.c, or leave it out."""

    def apply(content: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            content = content[key]
        if value is None:
            del content[last]
        else:
            content[last] = value(content[last]) if callable(value) else value

    return apply


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda column: [value, *column[1:]]


shorter: Callable[[list[Any]], list[Any]] = lambda column: column[:-1]  # noqa: E731
longer: Callable[[list[Any]], list[Any]] = lambda column: [*column, column[-1]]  # noqa: E731
COLUMNS = [
    *("edges.parent", "edges.child", "edges.holes", "edges.figures.z", "edges.passed.rank"),
    *("latents.level", "latents.rate", "latents.largest", "latents.parent"),
]
BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": change("format", "msae-shards"),
    "no format": change("format", None),
    "a later version": change("version", 2),
    "an earlier version": change("version", 0),
    "no version": change("version", None),
    **{f"{path} too short": change(path, shorter) for path in COLUMNS},
    **{f"{path} too long": change(path, longer) for path in COLUMNS},
    **{f"no {path}": change(path, None) for path in COLUMNS if "latents.parent" not in path},
    "a parent beyond": change("edges.parent", first(20)),
    "a child beyond": change("edges.child", first(20)),
    "a parent below": change("edges.parent", first(-1)),
    "a child below": change("edges.child", first(-1)),
    "a parent far beyond": change("edges.parent", first(10**30)),
    "a parent that is no number": change("edges.parent", first("a")),
    "a parent that is null": change("edges.parent", lambda column: [None, *column[1:]]),
    "a figure that is no number": change("edges.figures.mcs", first("a")),
    "a figure that is a list": change("edges.figures.mcs", first([1.0])),
    "holes that are no number": change("edges.holes", first("a")),
    "a figure more": change("edges.figures", lambda figures: {**figures, "other": figures["mcs"]}),
    "a figure less": change("edges.figures.gain", None),
    "a test less": change("edges.passed.gain", None),
    "a test more": change("edges.passed", lambda passed: {**passed, "pmi": passed["mcs"]}),
    "no test": change("edges.passed", {}),
    "no edges": change("edges", None),
    "edges in a list": change("edges", [1]),
    "figures in a list": change("edges.figures", [1]),
    "no latents": change("latents", {}),
    "latents null": change("latents", lambda _: None),
    "no prefixes": change("prefixes", []),
    "prefixes of another width": change("prefixes", [3, 12, 21]),
    "prefixes in words": change("prefixes", ["three"]),
    "a prefix alone": change("prefixes", 20),
    "no funnels": change("funnels", {}),
    "funnels in a list": change("funnels", [1]),
    "a funnel in a list": change(f"funnels.{THIS}", [1]),
    "no truth": change("truth", None),
    "no about": change("about", None),
    "no tokens": change("about.tokens", 0),
    "tokens in words": change("about.tokens", "many"),
    "no limits": change("about.limits", None),
    "a limit that is none": change("about.limits.msc", 0.7),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_load_refuses_what_is_broken_in_one_line(file, broken) -> None:
    content = json.loads(file.read_text())
    BROKEN[broken](content)
    file.write_text(json.dumps(content))
    again = r"\([^\n]+\); run python -m msae.hierarchy again$"
    refuses(file, rf"{re.escape(str(file))} is not a hierarchy of this msae {again}")


CORRUPT = {
    "empty": b"",
    "half": b'{"format": "msae-hierarchy", "version": 1,',
    "no object": b"[1, 2]",
    "null": b"null",
    "a number": b"1",
    "a string": b'"format"',
    "no text": b"\xff\xfe\x00\x81",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("corrupt", CORRUPT)
def test_load_refuses_what_is_corrupt_in_one_line(tmp_path, corrupt) -> None:
    (tmp_path / FILE).write_bytes(CORRUPT[corrupt])
    refuses(tmp_path / FILE, r"is not a hierarchy of this msae \([^\n]+\); run python -m msae.hierarchy again$")


def test_load_of_no_file_says_what_to_type(tmp_path) -> None:
    refuses(tmp_path / FILE, rf"there is no {re.escape(str(tmp_path / FILE))}; run python -m msae.hierarchy first$")
    (tmp_path / FILE).mkdir()
    refuses(tmp_path / FILE, r"run python -m msae.hierarchy")


def refuses(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)
