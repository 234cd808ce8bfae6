"""The hierarchy with its controls: what they are, what is said of them, and the file, which refuses what is broken."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msae.data.harvest import harvest
from msae.data.shards import Shards
from msae.hierarchy.edges import Trial, grade, levels
from msae.hierarchy.extract import (
    FIRINGS,
    ORDER,
    THIS,
    VANILLA,
    About,
    Asked,
    Hierarchy,
    asked_of,
    extract,
    weights_hash,
    without_directory,
)
from msae.hierarchy.files import load, load_firings, numbers, save, save_firings
from msae.hierarchy.firings import Array, Firings, FirstRows
from msae.hierarchy.limits import TESTS, Limits
from msae.hierarchy.pairs import covering_pairs
from msae.sae import MatryoshkaSAE
from msae.settings import as_plain
from msae.sources.forest import ForestSource
from tests.test_edges import edges_among, survivors
from tests.test_firings import firings_of, given_shards, of_dense, random_dense, sae_of

SOURCE = ForestSource(rows=6000, val_rows=3000, chunk_rows=2500, root_p=0.25, magnitude_std=0.15)
PARENT = SOURCE.parent.tolist()
TREE = edges_among(range(20), PARENT)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    return harvest(SOURCE, tmp_path_factory.mktemp("shards"), show=False)["synthetic"]


def perfect(prefixes: list[int], order: list[int] | None = None) -> MatryoshkaSAE:
    """Latent i has the true activations of feature order[i]."""
    features = SOURCE.features[list(range(20)) if order is None else order]
    return sae_of(features, torch.linalg.pinv(features).T, prefixes)


def absorbed() -> MatryoshkaSAE:
    """One prefix; children contain their parent, and the parent is silent under them."""
    sae = perfect([20])
    with torch.no_grad():
        for p, c in TREE:
            sae.W_enc[:, p] -= 9 * sae.W_enc[:, c]
            sae.W_dec[c] += SOURCE.features[p]
    return sae


@pytest.fixture(scope="module")
def nested(shards) -> tuple[Hierarchy, Firings]:
    return extract(perfect([3, 12, 20]), shards, None, Limits(), absorbed())


# What is found --------------------------------------------------------------------------------------------------------


def test_a_perfect_sae_of_the_tree_is_found_whole_and_no_control_finds_it(nested, shards):
    hierarchy, firings = nested
    assert hierarchy.parent.tolist() == PARENT
    assert list(hierarchy.funnels) == [THIS, ORDER, FIRINGS, VANILLA]
    kept = {name: funnel["rank"] for name, funnel in hierarchy.funnels.items()}
    assert (kept[THIS], kept[FIRINGS], kept[VANILLA]) == (9, 0, 0)
    assert kept[ORDER] < 9
    assert hierarchy.verdict() == (
        f"9 of {len(hierarchy.edges.parent)} candidate edges survive every test; {kept[ORDER]} with order shuffled, "
        "0 with firings shuffled, 0 in a vanilla SAE."
    )
    assert hierarchy.level.tolist() == [0] * 3 + [1] * 9 + [2] * 8
    assert hierarchy.rate.tolist() == (firings.counts / 9000).tolist()
    assert hierarchy.largest.tolist() == firings.largest.tolist()
    assert hierarchy.about == About(
        d_sae=20,
        tokens=9000,
        l0=firings.matrix.nnz / 9000,
        shards=shards.directory.name,
        model="",
        hook_name="synthetic",
        asked=Asked(
            sae=weights_hash(perfect([3, 12, 20])),
            shards=shards.manifest.identity_hash,
            tokens=None,
            limits=Limits(),
            seed=0,
            vanilla=weights_hash(absorbed()),
        ),
    )


@pytest.mark.parametrize(
    ("prefixes", "vanilla", "controls"),
    [([20], False, [FIRINGS]), ([3, 20], False, [ORDER, FIRINGS]), ([20], True, [FIRINGS, VANILLA])],
)
def test_the_order_is_a_control_only_where_there_are_prefixes_and_vanilla_only_if_given(
    shards, prefixes, vanilla, controls
):
    hierarchy, _ = extract(perfect(prefixes), shards, 3000, Limits(), perfect([20]) if vanilla else None)
    assert list(hierarchy.funnels) == [THIS, *controls]
    assert hierarchy.parent.tolist() == PARENT
    assert not vanilla or hierarchy.funnels[VANILLA] == hierarchy.funnels[THIS]


def test_edges_of_latents_that_are_not_there_are_missing(shards):
    """Without the latents of parent 0 and child 6 there are five of nine edges, and a latent matched to nothing."""
    order = [1, 2, *range(3, 6), *range(7, 20)]
    hierarchy, _ = extract(perfect([18], order), shards, None, Limits())
    assert survivors(hierarchy.edges) == edges_among(order, PARENT)

    nothing, _ = extract(absorbed(), shards, 3000, Limits())
    assert nothing.verdict().endswith("0 with firings shuffled. Nothing is found.")


def test_what_is_asked_differs_where_anything_that_decides_differs(shards):
    sae, other = perfect([3, 12, 20]), perfect([3, 20])
    scaled = perfect([3, 12, 20])
    scaled.scale.fill_(2.0)

    def asked(of=sae, tokens=None, limits=None, vanilla=None, seed=0) -> Asked:
        return asked_of(of, shards, tokens, limits or Limits(), vanilla, seed)

    assert asked().differs_in(asked(perfect([3, 12, 20]))) == []
    assert asked().differs_in(asked(other)) == asked().differs_in(asked(scaled)) == ["sae"]
    assert asked().differs_in(asked(tokens=9000)) == ["tokens"]
    assert asked().differs_in(asked(limits=Limits(mcs=0.7), seed=1)) == ["limits", "seed"]
    assert asked(vanilla=sae).differs_in(asked(vanilla=other)) == asked().differs_in(asked(vanilla=sae)) == ["vanilla"]
    assert asked().differs_in(replace(asked(), shards="0" * 12)) == ["shards"]


def test_what_was_measured_says_which_model_and_hook(tmp_path):
    x = torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    sae = MatryoshkaSAE(3, 4, [2, 4], 1, sparsity="l1")
    sae.metadata["model_name"] = "/somewhere/private/tiny"
    hierarchy, _ = extract(sae, given_shards(tmp_path, [x[:100]], [x[100:]]), None, Limits())
    assert (hierarchy.about.model, hierarchy.about.hook_name) == ("tiny", "given")


@pytest.mark.parametrize(
    ("model", "shown"),
    [("gpt2", "gpt2"), ("someone/a-model", "someone/a-model"), ("../private/tiny/", "tiny"), ("~/tiny", "tiny")],
)
def test_a_model_is_shown_without_its_directory(model, shown):
    assert without_directory(model) == shown


@pytest.mark.parametrize("seed", [0, 2])
def test_controls_are_the_same_tests_on_other_levels_firings_and_saes(shards, seed):
    sae, vanilla, limits = perfect([3, 12, 20]), absorbed(), Limits(floor=0.5, least=5, coverage=0.15, superparent=1.0)
    firings, of_vanilla = (firings_of(one, shards, 2000, 0.5) for one in (sae, vanilla))
    level, no_level = np.array([0] * 3 + [1] * 9 + [2] * 8), np.zeros(20, dtype=int)

    def funnel(of: MatryoshkaSAE, firings: Firings, level: Array) -> dict[str, int]:
        trial = Trial(of, firings, covering_pairs(firings, 0.15, 5), [level], limits)
        return grade(FirstRows(shards, 2000), [trial])[0][0].funnel()

    expected = {
        THIS: funnel(sae, firings, level),
        ORDER: funnel(sae, firings, np.random.default_rng(seed).permutation(level)),
        FIRINGS: funnel(sae, firings.shuffled(seed), level),
        VANILLA: funnel(vanilla, of_vanilla, no_level),
    }
    assert len({tuple(counts.values()) for counts in expected.values()}) == 4, "no two are alike"
    assert extract(sae, shards, 2000, limits, vanilla, seed)[0].funnels == expected


@pytest.mark.parametrize("prefixes", [[7], [1, 7], [2, 3, 7], [1, 2, 3, 4, 5, 6, 7]])
def test_levels_are_the_first_prefix_that_holds_a_latent(prefixes):
    assert levels(prefixes).tolist() == [next(i for i, m in enumerate(prefixes) if latent < m) for latent in range(7)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_in": 21}, r"^\S+ has d_in=20, the SAE expects 21; give shards=[^\n]*$"),
        ({"d_in": 20, "d_out": 20}, r"^this is a transcoder[^\n]*$"),
    ],
)
def test_an_sae_that_does_not_fit_is_refused_in_one_line(shards, sizes, message):
    wrong = MatryoshkaSAE(**sizes, d_sae=20, prefixes=[20], k=2, sparsity="l1")
    for sae, vanilla in ((wrong, None), (perfect([20]), wrong)):
        with pytest.raises(ValueError, match=message):
            extract(sae, shards, 100, Limits(), vanilla)


# The verdict ----------------------------------------------------------------------------------------------------------

ADDS = " The order of its latents adds nothing: it finds no hierarchy by prefixes."
CHANCE = " Chance alone gives as many: nothing is found."
NESTED = " A vanilla SAE gives as many: nested prefixes add nothing."


@pytest.mark.parametrize(
    ("this", "controls", "end"),
    [
        (1234, {ORDER: 12, FIRINGS: 0, VANILLA: 1233}, ""),
        (9, {FIRINGS: 8}, ""),
        (9, {FIRINGS: 9}, CHANCE),
        (9, {FIRINGS: 10}, CHANCE),
        (9, {ORDER: 9, FIRINGS: 0}, ADDS),
        (9, {ORDER: 8, FIRINGS: 0, VANILLA: 9}, NESTED),
        (0, {FIRINGS: 0}, " Nothing is found."),
        (0, {ORDER: 0, FIRINGS: 3, VANILLA: 2}, " Nothing is found."),
        (9, {ORDER: 9, FIRINGS: 9, VANILLA: 9}, CHANCE),  # what says most
    ],
)
def test_the_verdict_says_whether_a_control_keeps_as_many(nested, this, controls, end):
    funnels = {name: {"pairs": 10**6, "coverage": 5000, "rank": n} for name, n in {THIS: this, **controls}.items()}
    hierarchy = replace(nested[0], funnels=funnels)
    words = {ORDER: "with order shuffled", FIRINGS: "with firings shuffled", VANILLA: "in a vanilla SAE"}
    listed = ", ".join(f"{n:,} {words[name]}" for name, n in controls.items())
    candidates = len(hierarchy.edges.parent)
    assert hierarchy.verdict() == f"{this:,} of {candidates} candidate edges survive every test; {listed}.{end}"


# The file -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def messy(shards) -> Hierarchy:
    """Some edges survive and some do not, and what is not known of some is NaN."""
    hierarchy, _ = extract(perfect([3, 12, 20]), shards, None, Limits(coverage=0.22, lift=1.02, superparent=1.0))
    assert 0 < hierarchy.edges.survives.sum() < len(hierarchy.edges.parent) - 5
    assert any(np.isnan(values).any() for values in hierarchy.edges.figures.values())
    return hierarchy


@pytest.fixture(scope="module")
def empty(shards) -> Hierarchy:
    """No candidate."""
    hierarchy, _ = extract(perfect([3, 12, 20]), shards, 500, Limits(least=10**6), absorbed())
    assert hierarchy.verdict().startswith("0 of 0 candidate edges survive")
    return hierarchy


@pytest.fixture
def file(nested, tmp_path) -> Path:
    save(nested[0], tmp_path / "hierarchy.json")
    return tmp_path / "hierarchy.json"


def parts(of: Hierarchy) -> tuple[list[Any], list[Array]]:
    """What is kept exactly, and what to four significant digits."""
    edges = of.edges
    exact = [of.prefixes, of.level, of.parent, of.funnels, of.truth, as_plain(of.about), edges.looked_at]
    exact += [edges.parent, edges.child, edges.holes, edges.survives, edges.passed]
    return exact, [of.rate, of.largest, *edges.figures.values()]


@pytest.mark.parametrize("which", ["nested", "messy", "empty"])
def test_what_is_saved_is_loaded(nested, messy, empty, tmp_path, which):
    """To four significant digits."""
    before, file = {"nested": nested[0], "messy": messy, "empty": empty}[which], tmp_path / "hierarchy.json"
    save(before, file)
    after, _ = load(file)
    (exact, rounded), (saved, known) = parts(after), parts(before)
    np.testing.assert_equal(exact, saved)
    assert after.verdict() == before.verdict()
    for loaded, values in zip(rounded, known, strict=True):
        values = np.where(np.isfinite(values.astype(float)), values, np.nan)
        np.testing.assert_allclose(loaded, values, rtol=5.1e-4, atol=0)
    again = file.with_name("again.json")
    save(after, again)
    assert again.read_text() == file.read_text()


def test_the_file_says_what_it_holds(nested, file):
    content = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (content["format"], content["version"]) == ("msae-hierarchy", 3)
    assert content["verdict"] == nested[0].verdict()
    assert content["latents"]["parent"] == PARENT
    assert content["edges"]["survives"] == nested[0].edges.survives.tolist()
    assert set(content["tests"]) == set(TESTS)
    assert content["tests"]["mcs"]["line"] == "≥ {mcs}"


def test_numbers_have_four_digits_and_null():
    values = np.array([1 / 3, 123456.0, 1e-9 / 3, np.nan, np.inf, -np.inf, 0.0, -2 / 3])
    assert numbers(values) == [0.3333, 123500.0, 3.333e-10, None, None, None, 0.0, -0.6667]
    assert numbers(values.astype(np.float32))[:2] == [0.3333, 123500.0]
    for exact in ([1, 123456], [True, False]):
        assert numbers(np.array(exact)) == exact


def test_firings_that_are_kept_come_back_bit_for_bit(tmp_path):
    for firings in (of_dense(random_dense(300, 20)), of_dense(np.zeros((7, 3)))):
        file = tmp_path / "firings.safetensors"
        before, d_sae = firings.code, firings.d_sae
        after = load_firings(file, save_firings(firings, file), d_sae).code
        for name, dtype in {"offsets": torch.int64, "latents": torch.int32, "acts": torch.float32}.items():
            assert getattr(after, name).dtype == dtype
            assert torch.equal(getattr(after, name), getattr(before, name))
        assert file.stat().st_size < 8 * (firings.rows + 1 + len(before.acts)) + 400


@pytest.mark.parametrize("damage", ["a byte", "shorter", "gone", "another"])
def test_firings_that_are_damaged_are_refused_in_one_line(tmp_path, damage):
    file = tmp_path / "firings.safetensors"
    checksum = save_firings(of_dense(random_dense(300, 20)), file)
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "another":
        save_firings(of_dense(random_dense(300, 20, seed=1)), file)
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content[:-4] if damage == "shorter" else content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} does not hold the firings [^\n]*$"):
        load_firings(file, checksum, 20)


def test_the_checksum_of_the_firings_is_kept_with_the_hierarchy(nested, file):
    assert load(file)[1] is None
    save(nested[0], file, "0123456789abcdef")
    assert load(file)[1] == "0123456789abcdef"


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what is at a.b.c, by a function of what is there, or leave it out if the value is None."""

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
    """The column with another first value."""
    return lambda column: [value, *column[1:]]


def circle(content: dict[str, Any]) -> None:
    """Let two edges between the first two latents survive, one each way."""
    edges = content["edges"]
    edges["parent"][:2], edges["child"][:2] = [0, 1], [1, 0]
    for passed in edges["passed"].values():
        passed[:2] = [True, True]


COLUMNS = [
    *("edges.parent", "edges.child", "edges.survives", "edges.holes", "edges.figures.z", "edges.passed.rank"),
    *("latents.level", "latents.rate", "latents.largest", "latents.parent"),
]
BROKEN: dict[str, Callable[[dict[str, Any]], None]] = {
    "another format": change("format", "msae-shards"),
    "an earlier version than there is": change("version", 0),
    **{f"{path} too short": change(path, lambda column: column[:-1]) for path in COLUMNS},
    "no column": change("edges.child", None),
    "a parent beyond": change("edges.parent", first(20)),
    "a child beyond": change("edges.child", first(10**30)),
    "a child below": change("edges.child", first(-1)),
    "a figure that is a list": change("edges.figures.mcs", first([1.0])),
    "parents in a circle": circle,
    "a figure more": change("edges.figures", lambda figures: {**figures, "other": figures["mcs"]}),
    "a figure less": change("edges.figures.gain", None),
    "a test less": change("edges.passed.gain", None),
    "a test more": change("edges.passed", lambda passed: {**passed, "pmi": passed["mcs"]}),
    "no prefixes": change("prefixes", []),
    "prefixes of another width": change("prefixes", [3, 12, 21]),
    "prefixes that do not rise": change("prefixes", [12, 3, 20]),
    "no funnels": change("funnels", {}),
    "a funnel without a stage": change(f"funnels.{ORDER}.mcs", None),
    "a limit that is none": change("about.asked.limits.msc", 0.7),
}


@pytest.mark.parametrize("name", BROKEN)
def test_load_refuses_what_is_broken_in_one_line(file, name):
    content = json.loads(file.read_text())
    BROKEN[name](content)
    file.write_text(json.dumps(content))
    refuses(file, r" is not a hierarchy of this msae \([^\n]+\); python -m msae.explore makes it anew")


def test_load_refuses_a_file_that_is_corrupt_newer_or_not_there(file):
    newer = file.read_text().replace('"version": 3', '"version": 4')
    file.write_text(file.read_text()[:-9])
    refuses(file, r" is not a hierarchy of this msae \([^\n]+\); python -m msae.explore makes it anew")
    file.write_text(newer)
    refuses(file, r" is not [^\n]* up to 3\); upgrade: pip install -U msae")
    file.unlink()
    refuses(file, "; python -m msae.explore makes it anew")


def refuses(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(str(path))}{message}$"):
        load(path)
