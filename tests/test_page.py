"""The page of latents: what is packed comes back, and in a browser it is found, walked through, and never runs."""

import base64
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msae.hierarchy.page import LATENTS_PER_BLOCK, SCRIPTS, TEMPLATE, Context, PageData, fill, quantise, write_page

CHROMIUM = os.environ.get("MSAE_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
GROUPS = {
    "animals": {"pets": "dog cat hamster", "farm": "cow sheep horse", "birds": "owl crow heron"},
    "food": {"fruit": "apple pear plum", "drinks": "tea coffee milk", "meals": "soup bread stew"},
    "the city": {"ways": "road bridge street", "transport": "bus train tram", "buildings": "house tower school"},
    "time": {"days": "Monday Friday Sunday", "hours": "morning evening night", "seasons": "spring summer winter"},
    "people": {"family": "mother father sister", "work": "teacher doctor baker", "power": "king mayor judge"},
}
PLAIN = "The A One the a of near by was were had saw met left stood in on at and but quiet old small cold again"
ENDS = [".", ",", "\n", "\n\n", ";", "?"]
PREFIXES = [20, 60, 140, 300]
HOSTILE = [
    "<script>window.hacked=1</script>",
    '<img src=x onerror="window.hacked=1">',
    "</script><script>window.hacked=1</script>",
    "{{script}}",
]


def example(seed: int = 0) -> PageData:
    """300 latents: five topics, fifteen groups, 45 words in a forest, and many that stand alone."""
    random = np.random.default_rng(seed)
    n = PREFIXES[-1]
    words: list[str] = [word for group in GROUPS.values() for each in group.values() for word in each.split()]
    vocabulary = [*(f" {word}" for word in words), *(f" {word}" for word in PLAIN.split()), *words, *ENDS, "�", "\t"]
    index = {text: token for token, text in enumerate(vocabulary)}

    label, parent = [""] * n, np.full(n, -1)
    fires: list[set[int]] = [set() for _ in range(n)]
    places = [iter(range(first, last)) for first, last in zip([0, *PREFIXES], PREFIXES, strict=False)]
    for topic, groups in GROUPS.items():
        top = next(places[0])
        label[top] = topic
        for group, members in groups.items():
            middle = next(places[1])
            label[middle], parent[middle] = group, top
            for word in members.split():
                leaf = next(places[2])
                label[leaf], parent[leaf], fires[leaf] = word, middle, {index[f" {word}"], index[word]}
                fires[middle] |= fires[leaf]
                fires[top] |= fires[leaf]
    for latent in range(n):
        if not fires[latent]:
            fires[latent] = {int(token) for token in random.integers(0, len(words) + 26, random.integers(1, 4))}

    width = {latent: len(fires[latent]) for latent in range(n)}
    largest = np.round(random.gamma(6, 1.5, n) + 2, 3)
    level = np.searchsorted(PREFIXES, np.arange(n), side="right") + 1
    kept = np.flatnonzero(parent >= 0)
    extra = random.integers(0, n, (2, 400))
    extra = extra[:, extra[0] != extra[1]]
    edge_parent, edge_child = np.concatenate([[parent[kept], kept], extra], axis=1)
    survives = np.arange(len(edge_parent)) < len(kept)
    keys = ("contained", "cosine", "ablation", "seeds")
    figures = {
        key: np.where(survives, random.beta(9, 2, len(survives)), random.beta(2, 4, len(survives))) for key in keys
    }
    figures["seeds"][::17] = np.nan
    return PageData(
        title="gpt2-small layer 8, 300 latents",
        facts={"model": "gpt2-small", "hook": "blocks.8.hook_resid_pre", "tokens": "20 000 000", "seed": "0"},
        verdict="60 of 412 candidate edges survive every test, 3 when the order is shuffled: the hierarchy is there.",
        funnel_columns=["this SAE", "order shuffled", "firings shuffled", "vanilla"],
        funnel=[
            ("candidates", [412, 398, 371, 405]),
            ("contained", [220, 190, 21, 201]),
            ("ablation", [96, 31, 4, 60]),
            ("seeds", [60, 3, 0, 22]),
        ],
        prefixes=PREFIXES,
        level=level,
        rate=np.array([0.0 if latent == n - 1 else 0.003 * width[latent] for latent in range(n)]),
        largest=largest,
        label=label,
        parent=parent,
        tests=[
            ("contained", "contained", "Share of the child's firings on which the parent fires too; passed from 0.8."),
            ("cosine", "cosine", "Cosine of the decoder rows."),
            ("ablation", "ablation", "Rise of the error when the parent is left out; passed from 0.5."),
            ("seeds", "in 3 seeds", "The edge has a counterpart in SAEs of other seeds."),
        ],
        figures=figures,
        passed={key: figures[key] > 0.55 for key in ("contained", "ablation", "seeds")},
        edge_parent=edge_parent,
        edge_child=edge_child,
        survives=survives,
        nearest=random.integers(0, n, (n, 8)),
        nearest_cos=-np.sort(-random.uniform(-0.1, 0.8, (n, 8)), axis=1),
        histogram=np.round(4000 * np.exp(-np.arange(24) / 5) * random.uniform(0.3, 1.2, (n, 24))).astype(int),
        vocabulary=vocabulary,
        contexts=[example_contexts(latent, fires, parent, largest, len(words), index) for latent in range(n)],
        fires_on={
            token: [(latent, round(0.97 - 0.01 * width[latent], 3)) for latent in range(n) if token in fires[latent]]
            for token in range(len(words))
        },
        promoted=random.integers(0, len(words), (n, 10)),
        suppressed=random.integers(0, len(words), (n, 10)),
    )


def example_contexts(
    latent: int, fires: list[set[int]], parent: np.ndarray, largest: np.ndarray, words: int, index: dict[str, int]
) -> list[Context]:
    """Sentences with a word on which the latent fires in the middle; its parent is silent on some of them."""
    random = np.random.default_rng(latent)
    plain = [index[f" {word}"] for word in PLAIN.split()[3:]]
    contexts = []
    for number in range(13):
        tokens = random.choice(plain, 24)
        tokens[::5] = random.integers(0, words, 5)
        tokens[0], tokens[22], tokens[23] = index[" The"], index["."], index["\n" if number % 2 else "\n\n"]
        tokens[12] = random.choice(sorted(fires[latent]))
        strength = random.uniform(0.2, 1, 24) * (1 - 0.05 * number)
        acts = np.where([token in fires[latent] for token in tokens], strength, 0) * largest[latent]
        above = parent[latent]
        of_parent = None
        if above >= 0:
            of_parent = np.where([token in fires[above] for token in tokens], strength, 0) * largest[above]
            of_parent[12] *= number % 4 != 1  # a hole
        group = "top" if number < 7 else "quantile 90 %" if number < 10 else "quantile 50 %"
        contexts.append(
            Context(group, tokens, acts, 12, of_parent, f"val shard {number % 3}, sequence {17 * number + latent}")
        )
    return contexts


def unpacked(path: Path) -> dict[str, Any]:
    """The page's data elements by their id, read as the browser does."""
    found = re.findall(
        r'<script type="application/octet-stream" id="([\w-]+)">([^<]*)</script>', path.read_text("utf-8")
    )
    return {name: json.loads(gzip.decompress(base64.b64decode(text))) for name, text in found}


# ---- packing


def test_what_is_packed_comes_back(tmp_path: Path) -> None:
    data = example()
    write_page(data, tmp_path / "page.html")
    blocks = unpacked(tmp_path / "page.html")
    assert list(blocks) == ["core", "vocabulary", *(f"block-{i}" for i in range(5)), "fires-on"]
    core = blocks["core"]
    assert core["level"] == data.level.tolist()
    assert core["parent"] == data.parent.tolist()
    assert core["label"] == data.label
    np.testing.assert_allclose(core["rate"], data.rate, rtol=1e-3)
    assert blocks["vocabulary"] == data.vocabulary
    assert blocks["fires-on"]["3"] == [part for pair in data.fires_on[3] for part in pair]
    found = [latent for i in range(5) for latent in blocks[f"block-{i}"]]
    assert len(found) == len(data.level)
    for latent in (0, LATENTS_PER_BLOCK, 299):
        assert found[latent]["histogram"] == data.histogram[latent].tolist()
        assert found[latent]["nearest"] == data.nearest[latent].tolist()
        for kept, given in zip(found[latent]["contexts"], data.contexts[latent], strict=True):
            assert kept["tokens"] == given.tokens.tolist()
            exact = np.asarray(kept["acts"]) / 255 * data.largest[latent]
            np.testing.assert_allclose(exact, given.acts, atol=data.largest[latent] / 255)


def test_each_edge_is_with_both_its_latents(tmp_path: Path) -> None:
    data = example()
    write_page(data, tmp_path / "page.html")
    blocks = unpacked(tmp_path / "page.html")
    found = [latent["edges"] for i in range(5) for latent in blocks[f"block-{i}"]]
    assert sum(map(len, found)) == 2 * len(data.edge_parent)
    parent, child = int(data.edge_parent[17]), int(data.edge_child[17])
    for end in (parent, child):
        (row,) = (edge for edge in found[end] if edge[:2] == [parent, child])
        assert row[2] == 1
        assert row[3][0] == pytest.approx(data.figures["contained"][17], rel=1e-3)
        assert row[3][3] is None, "NaN"
        assert row[4] == [int(data.passed["contained"][17]), None, int(data.passed["ablation"][17]), 0]


def test_an_infinite_figure_is_no_broken_json(tmp_path: Path) -> None:
    data = example()
    data.figures["contained"][0] = np.inf
    write_page(data, tmp_path / "page.html")
    child = int(data.edge_child[0])
    rows = unpacked(tmp_path / "page.html")[f"block-{child // LATENTS_PER_BLOCK}"][child % LATENTS_PER_BLOCK]["edges"]
    assert rows[0][3][0] == "∞"


@pytest.mark.parametrize("largest", [1e-3, 1.0, 37.5])
def test_quantised_activations_keep_their_sign_and_size(largest: float) -> None:
    acts = np.array([0, 1e-9, 0.001, 0.5, 0.998, 1.0, 1.2]) * largest
    steps = quantise(acts, largest)
    assert steps[0] == 0
    assert (steps[1:] >= 1).all(), "what fires is not silent"
    assert steps.max() == 255
    np.testing.assert_allclose(steps[2:6] / 255 * largest, acts[2:6], atol=largest / 255)
    assert quantise(np.zeros(3), 0.0).tolist() == [0, 0, 0]


def test_contexts_may_be_a_function(tmp_path: Path) -> None:
    data = example()
    write_page(data, tmp_path / "list.html")
    write_page(replace(data, contexts=lambda latent: data.contexts[latent]), tmp_path / "function.html")
    assert (tmp_path / "list.html").read_bytes() == (tmp_path / "function.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["function.html", "list.html"]


def mistakes() -> dict[str, dict[str, Any]]:
    """What is wrong, by the words that the error must have."""
    data = example()
    few, e = data.contexts[0][0], len(data.edge_parent)
    around = data.parent.copy()
    around[0] = 80  # a leaf's leaf
    edges = {
        "edge_parent": np.append(data.edge_parent, 80),
        "edge_child": np.append(data.edge_child, 0),
        "survives": np.append(data.survives, True),
        "figures": {key: np.append(value, 1) for key, value in data.figures.items()},
        "passed": {key: np.append(value, True) for key, value in data.passed.items()},
    }
    loop = data.parent.copy()
    loop[0] = next(leaf for leaf in range(60, 140) if data.parent[data.parent[leaf]] == 0)
    edges["edge_parent"][-1] = loop[0]

    def one(context: Context) -> dict[str, Any]:
        return {"contexts": lambda latent: [context]}

    return {
        "rate has 299 rows": {"rate": data.rate[1:]},
        "label has 1 rows": {"label": ["a"]},
        "nearest has": {"nearest": data.nearest[:5]},
        "promoted has 5 rows": {"promoted": data.promoted[:5]},
        "contexts has 3 lists": {"contexts": data.contexts[:3]},
        f"survives has {e - 1} edges": {"survives": data.survives[1:]},
        "cosine has 2 edges": {"figures": {**data.figures, "cosine": np.zeros(2)}},
        "seeds has no figures": {"figures": {key: data.figures[key] for key in ("contained", "cosine", "ablation")}},
        "has sees": {"passed": {**data.passed, "sees": data.survives}},
        "'candidates' has 2 counts": {"funnel": [("candidates", [1, 2])]},
        "prefixes": {"prefixes": [20, 60, 140]},
        "differ in shape": {"nearest_cos": data.nearest_cos[:, 1:]},
        "levels count from 1": {"level": data.level - 1},
        "nearest points": {"nearest": data.nearest + 1000},
        "fires_on": {"fires_on": {0: [(300, 0.5)]}},
        "parent points": {"parent": data.parent + 300},
        "not among those that survive": {"parent": around},
        "circle": {"parent": loop, **edges},
        "its own parent": {"edge_parent": np.append(data.edge_parent[1:], data.edge_child[-1])},
        "activations": one(replace(few, acts=few.acts[1:])),
        "peak": one(replace(few, peak=24)),
        "out of vocabulary": one(replace(few, tokens=few.tokens + 1000)),
        "no parent, but": one(replace(few, parent_acts=few.acts)),
    }


@pytest.mark.parametrize("words", list(mistakes()))
def test_what_does_not_match_is_refused_in_one_line(words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        write_page(replace(example(), **mistakes()[words]), tmp_path / "page.html")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "no half a page is left"


def test_data_closes_no_element(tmp_path: Path) -> None:
    write_page(hostile(), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "hacked" not in re.sub(r"<title>.*?</title>|<a class=\"name\".*?</a>", "", text)
    assert text.count("<script") == text.count("</script>") == len(unpacked(tmp_path / "page.html")) + 1


def test_a_placeholder_in_a_title_stays_a_title() -> None:
    assert fill("{{title}} {{script}}", {"title": "{{script}}", "script": "1"}) == "{{script}} 1"


def test_the_script_makes_no_html_of_text_and_asks_for_nothing() -> None:
    assert sorted(path.name for path in TEMPLATE.glob("*.js")) == sorted(SCRIPTS)
    script = "".join((TEMPLATE / name).read_text("utf-8") for name in SCRIPTS)
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        "</script",
    ):
        assert word not in script
    for name in (*SCRIPTS, "style.css", "index.html"):
        addresses = set(re.findall(r"\w+://[^\s\"']+", (TEMPLATE / name).read_text("utf-8")))
        assert addresses <= {"http://www.w3.org/2000/svg"}, "a name, not an address that is fetched"


# ---- in the browser


def hostile() -> PageData:
    """The example, with text everywhere that would run if it were taken for HTML."""
    data = example()
    attack = " ".join(HOSTILE)
    vocabulary = [*data.vocabulary]
    vocabulary[: len(HOSTILE)] = HOSTILE
    contexts = [
        [replace(context, tokens=np.arange(24) % 4, group=attack, where=attack) for context in data.contexts[0]]
    ] * 300
    return replace(
        data,
        title=attack,
        verdict=attack,
        facts={attack: attack},
        funnel_columns=[attack, *data.funnel_columns[1:]],
        funnel=[(attack, [4, 3, 2, 1])],
        tests=[(key, attack, attack) for key, _, _ in data.tests],
        label=[attack] * 300,
        vocabulary=vocabulary,
        promoted=np.tile(np.arange(4), (300, 1)),
        contexts=lambda latent: [replace(context, parent_acts=None) for context in contexts[latent]],
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, from MSAE_CHROMIUM or the path."""
    if CHROMIUM is None:
        pytest.skip("no Chromium; set MSAE_CHROMIUM to one")
    if "MSAE_CHROMIUM" not in os.environ:
        pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the example's page."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(example(), path)
    return path.as_uri()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens an address; afterwards no error, nothing refused by the policy and no request but the file may be left."""
    contexts, errors, requests = [], [], []

    def go(address: str, width: int = 1280, height: int = 800, scheme: Any = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url.split("#")[0]))
        page.goto(address)
        page.locator("main h1").wait_for()
        return page

    yield go
    for context in contexts:
        context.close()
    assert not errors
    assert len(requests) == len(contexts)
    assert all(url.startswith("file://") for url in requests)


def at(page: Any, latent: int) -> None:
    """Waits until the page shows this latent."""
    page.locator("main h1 .number").get_by_text(f"#{latent}", exact=True).wait_for()
    assert page.url.endswith(f"#latent={latent}")


def ask(page: Any, text: str) -> None:
    """Types into the search and waits for results."""
    page.keyboard.press("/")
    page.keyboard.insert_text(text)  # at once: no results of half the text
    page.locator("#results").wait_for()


def named(label: str) -> int:
    """The example's latent with this label."""
    return example().label.index(label)


def test_the_start_page_has_title_verdict_facts_and_funnel(visit: Any, written: str) -> None:
    page, data = visit(written), example()
    assert page.locator("main h1").inner_text() == data.title == page.title()
    text = page.locator("main").inner_text()
    assert data.verdict in text
    assert all(fact in text and value in text for fact, value in data.facts.items())
    rows = [row.split() for row in page.locator(".funnel tbody tr").all_inner_texts()]
    assert [(row[0], row[1::3]) for row in rows] == [(stage, list(map(str, counts))) for stage, counts in data.funnel]


@pytest.mark.parametrize("text", ["123", "#123"])
def test_a_number_finds_its_latent(visit: Any, written: str, text: str) -> None:
    page = visit(written)
    ask(page, text)
    page.keyboard.press("Enter")
    at(page, 123)
    assert page.title().startswith("#123")


@pytest.mark.parametrize("text", ["dog", " dog"])
def test_text_finds_the_latents_that_fire_on_it(visit: Any, written: str, text: str) -> None:
    page = visit(written)
    ask(page, text)
    page.locator("#results h2", has_text="Fires on ␣dog").wait_for()
    first = page.locator("#results ul").first.locator("li")
    leaf = named("dog")
    assert f"#{leaf}" in first.all_inner_texts()[0] + first.all_inner_texts()[1]
    shares = [float(value.removesuffix(" %")) for value in first.locator(".value").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) >= 3
    first.locator("a", has_text=f"#{leaf}").click()
    at(page, leaf)


def test_two_tokens_are_ranked_by_the_mean_share(visit: Any, written: str) -> None:
    page, data = visit(written), example()
    ask(page, "dog cat")
    page.locator("#results p", has_text="mean").first.wait_for()
    shares = {latent: [dict(data.fires_on[token]).get(latent, 0) for token in (0, 1)] for latent in range(300)}
    best = max(shares, key=lambda latent: (sum(shares[latent]), -latent))
    row = page.locator("#results ul").first.locator("li").first
    assert f"#{best}" in row.inner_text()
    assert f"{50 * sum(shares[best]):.1f} %" in row.inner_text()


def test_a_part_of_a_label_finds_its_latent(visit: Any, written: str) -> None:
    page = visit(written)
    ask(page, "TRANSP")
    page.keyboard.press("Enter")
    at(page, named("transport"))


def test_a_search_without_result_says_so(visit: Any, written: str) -> None:
    page = visit(written)
    ask(page, "xyzzy")
    assert "xyzzy" in page.locator("#results").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#results").is_hidden()
    assert page.evaluate("document.activeElement === document.body")


def test_links_lead_to_the_children_and_back_goes_back(visit: Any, written: str) -> None:
    page = visit(written)
    top, middle = named("animals"), named("pets")
    page.locator("#rows a", has_text="animals").click()
    at(page, top)
    page.locator(".edges a", has_text="pets").click()
    at(page, middle)
    assert page.locator(".path a").all_inner_texts()[0].split() == ["1", f"#{top}", "animals"]
    page.go_back()
    at(page, top)
    page.go_back()
    page.locator(".verdict").wait_for()
    page.go_forward()
    at(page, top)


def test_a_deep_link_opens_the_latent_and_its_branch(visit: Any, written: str) -> None:
    latent = named("cat")
    page = visit(f"{written}#latent={latent}")
    at(page, latent)
    here = page.locator("#rows [aria-current=page]")
    assert "cat" in here.inner_text()
    assert here.is_visible()


@pytest.mark.parametrize("asked", ["300", "-1", "x", "1e1", "%"])
def test_a_link_to_no_latent_says_so(visit: Any, written: str, asked: str) -> None:
    page = visit(f"{written}#latent={asked}")
    assert page.locator("main h1").inner_text() == "No such latent"


def test_a_latent_shows_all_that_is_known(visit: Any, written: str) -> None:
    data, latent = example(), named("cow")
    page = visit(f"{written}#latent={latent}")
    at(page, latent)
    text = page.locator("main").inner_text()
    assert f"{100 * data.rate[latent]:.2g} % of tokens" in text
    assert f"{data.largest[latent]:.3g}" in text
    assert page.locator(".histogram rect:not(.behind)").count() == data.histogram.shape[1]
    assert page.locator(".contexts > li").count() == len(data.contexts[latent])
    assert page.locator("h3").all_inner_texts() == ["top", "quantile 90 %", "quantile 50 %"]
    for name, tokens in (("Promotes", data.promoted), ("Suppresses", data.suppressed)):
        chips = page.locator("section", has=page.get_by_role("heading", name=name, exact=True)).locator(".chip")
        assert chips.all_inner_texts() == [data.vocabulary[token].replace(" ", "␣") for token in tokens[latent]]
    nearest = page.locator(".nearest li")
    assert nearest.count() == 8
    assert f"{data.nearest_cos[latent, 0]:.2f}" in nearest.first.inner_text()
    first = data.contexts[latent][0]
    written_out = "".join(data.vocabulary[token] for token in first.tokens).replace("\n", "↵").lstrip()
    assert page.locator(".contexts .text").first.text_content() == written_out


@pytest.mark.parametrize(("label", "fails"), [("dog", False), ("hamster", True)])
def test_an_edge_shows_each_test_passed_or_failed(visit: Any, written: str, label: str, fails: bool) -> None:
    data, latent = example(), named(label)
    page = visit(f"{written}#latent={latent}")
    at(page, latent)
    edge = int(np.flatnonzero((data.edge_child == latent) & data.survives)[0])
    assert fails == any(not passed[edge] for passed in data.passed.values()), "both are looked at"
    cells = page.locator(".edges").first.locator("tbody tr:not(.group) td")
    for i, (key, name, text) in enumerate(data.tests):
        value, *mark = cells.nth(i).inner_text().split()
        expected = data.figures[key][edge]
        assert value == ("–" if np.isnan(expected) else f"{expected:.3f}")
        assert mark == (["✓" if data.passed[key][edge] else "✗"] if key in data.passed else [])
        head = page.locator(".edges").first.locator("thead th").nth(i + 1)
        assert (head.inner_text(), head.get_attribute("title")) == (name, text)


def test_other_candidates_are_folded_away(visit: Any, written: str) -> None:
    data = example()
    latent = int(np.bincount(data.edge_child[~data.survives]).argmax())
    page = visit(f"{written}#latent={latent}")
    at(page, latent)
    others = page.locator("details.others")
    count = sum(
        latent in pair for pair in zip(data.edge_parent[~data.survives], data.edge_child[~data.survives], strict=True)
    )
    assert str(count) in others.locator("summary").inner_text()
    assert not others.locator("table").is_visible()
    others.locator("summary").click()
    assert others.locator("tbody tr:not(.group)").count() == count


def test_arrows_walk_the_forest(visit: Any, written: str) -> None:
    page, data = visit(written), example()
    top = named("animals")
    first, second = (int(latent) for latent in np.flatnonzero(data.parent == top)[:2])
    page.keyboard.press("ArrowDown")
    at(page, top)
    for key, latent in (
        ("ArrowDown", first),
        ("ArrowRight", second),
        ("ArrowLeft", first),
        ("ArrowLeft", first),  # there is none before
        ("ArrowUp", top),
        ("ArrowRight", named("food")),
        ("ArrowLeft", top),
    ):
        page.keyboard.press(key)
        at(page, latent)


def test_arrows_walk_by_number_without_edges(visit: Any, written: str) -> None:
    page = visit(f"{written}#latent=200")
    at(page, 200)
    page.keyboard.press("ArrowRight")
    at(page, 201)
    page.keyboard.press("ArrowLeft")
    at(page, 200)


def test_arrows_in_the_search_stay_there(visit: Any, written: str) -> None:
    page = visit(f"{written}#latent=200")
    ask(page, "dog")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.closest('#results') !== null")
    assert page.url.endswith("#latent=200")


def test_holes_are_marked_and_nothing_else(visit: Any, written: str) -> None:
    data, latent = example(), named("dog")
    page = visit(f"{written}#latent={latent}")
    at(page, latent)
    holes = sum(int(((each.acts > 0) & (each.parent_acts == 0)).sum()) for each in data.contexts[latent])
    marks = page.locator(".contexts mark.hole")
    assert marks.count() == holes > 0
    assert f"the parent #{data.parent[latent]} is silent" in marks.first.get_attribute("title")
    assert marks.first.evaluate("node => getComputedStyle(node).outlineStyle") == "dashed"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    at(page, named("animals"))
    assert page.locator(".contexts mark").count() == 0, "a root has no parent that could be silent"


def test_the_parent_is_marked_when_asked_and_the_arrows_still_walk(visit: Any, written: str) -> None:
    data, latent = example(), named("dog")
    page = visit(f"{written}#latent={latent}")
    at(page, latent)
    marked = page.locator(".contexts .parent-fires")
    assert marked.count() == sum(int((each.parent_acts > 0).sum()) for each in data.contexts[latent])
    shadow = "node => getComputedStyle(node).boxShadow"
    assert marked.first.evaluate(shadow) == "none"
    page.get_by_label("line above where the parent fires").check()
    assert marked.first.evaluate(shadow) != "none"
    page.keyboard.press("ArrowUp")
    at(page, named("pets"))


def test_the_stronger_activation_has_the_deeper_shade(visit: Any, written: str) -> None:
    data, latent = example(), named("dog")
    page = visit(f"{written}#latent={latent}")
    at(page, latent)
    shades = [
        float(shade)
        for shade in page.locator(".contexts .peak").evaluate_all(
            "nodes => nodes.map(node => parseFloat(node.style.getPropertyValue('--shade')))"
        )
    ]
    acts = [each.acts[each.peak] for each in data.contexts[latent]]
    assert np.corrcoef(shades, acts)[0, 1] > 0.99
    background = "node => getComputedStyle(node).backgroundColor"
    assert page.locator(".contexts .peak").first.evaluate(background) != "rgba(0, 0, 0, 0)"


def test_levels_list_all_their_latents_with_few_elements(visit: Any, written: str) -> None:
    page = visit(written)
    page.locator("#tab-levels").click()
    page.locator("#tools button", has_text="160").click()
    assert page.locator("#rows li").count() < 60
    page.locator("#tools select").select_option("number")
    page.locator("#list").evaluate("node => node.scrollTop = node.scrollHeight")
    page.locator("#rows a", has_text="#299").click()
    at(page, 299)
    assert "no token" in page.locator(".terms").inner_text()


def test_a_branch_opens_and_closes(visit: Any, written: str) -> None:
    page = visit(written)
    roots = page.locator("#rows li").count()
    toggle = page.locator("#rows button.toggle").first
    toggle.click()
    assert page.locator("#rows li").count() == roots + 3
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true", "the focus stays"
    page.locator("#rows button.toggle").first.click()
    assert page.locator("#rows li").count() == roots


def test_what_looks_like_html_is_text(visit: Any, tmp_path: Path) -> None:
    write_page(hostile(), tmp_path / "page.html")
    address = (tmp_path / "page.html").as_uri()
    attack = " ".join(HOSTILE)
    for page in (visit(address), visit(f"{address}#latent=20")):
        text = page.locator("main").inner_text()
        assert attack in text
        page.locator("summary").first.click() if page.locator("summary").count() else None
        ask(page, "<script>")
        assert attack in page.locator("#results").inner_text()
        assert page.locator("img").count() == 0
        assert page.evaluate("window.hacked") is None
        assert attack in page.title()
    assert HOSTILE[0] in page.locator(".contexts .text").first.inner_text()
    assert page.locator(".chip", has_text="onerror").count() > 0


@pytest.mark.parametrize("part", ["", "#latent=0", "#latent=61"])
def test_a_phone_does_not_scroll_sideways(visit: Any, written: str, part: str) -> None:
    page = visit(written + part, width=390, height=844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#list").is_hidden()
    page.locator("#unfold").click()
    page.locator("#rows a", has_text="food").click()
    at(page, named("food"))
    assert page.locator("#list").is_hidden(), "the text has the room"
    ask(page, "dog")
    box = page.locator("#results").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_background_follows_the_colour_scheme(visit: Any, written: str, scheme: str, dark: bool) -> None:
    page = visit(written, scheme=scheme)
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    ground, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
    assert (ground < 60) == dark
    assert (ink > 180) == dark


def test_features_with_names_stand_apart(visit: Any, tmp_path: Path) -> None:
    names = [f"feature {feature}" for feature in range(60)]
    data = example()
    contexts = [Context("top", np.array([3, 31, 7]), np.array([0.0, 2.0, 0.0]), 1)]
    write_page(
        replace(
            data,
            joined=False,
            vocabulary=names,
            contexts=lambda latent: contexts,
            fires_on={31: [(5, 0.9)], 3: [(6, 0.8)]},
            promoted=None,
            suppressed=None,
        ),
        tmp_path / "page.html",
    )
    page = visit(f"{(tmp_path / 'page.html').as_uri()}#latent=5")
    at(page, 5)
    assert page.locator(".contexts .token").all_inner_texts() == ["feature 3", "feature 31", "feature 7"]
    assert page.get_by_role("heading", name="Promotes").count() == 0
    ask(page, "feature 31")
    assert [text.split()[1] for text in page.locator("#results li a").all_inner_texts()] == ["#5"]


def test_without_a_forest_the_levels_are_listed(visit: Any, tmp_path: Path) -> None:
    data = example()
    write_page(
        replace(data, parent=np.full(300, -1), contexts=lambda latent: [], survives=np.zeros_like(data.survives)),
        tmp_path / "page.html",
    )
    page = visit((tmp_path / "page.html").as_uri())
    assert page.locator("#tab-levels").get_attribute("aria-pressed") == "true"
    page.locator("#rows a").first.click()
    page.locator("main h1 .number").wait_for()
    assert "No contexts were kept" in page.locator("main").inner_text()
