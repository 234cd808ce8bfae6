"""The page of latents: what is packed comes back, and in a browser it is found, walked through, and never runs."""

import base64
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msae.explorer.examples import Context
from msae.explorer.page import LATENTS_PER_BLOCK, SCRIPTS, TEMPLATE, Page, fill, quantise, write_page
from msae.hierarchy.edges import Edges, levels
from msae.hierarchy.extract import FIRINGS, ORDER, THIS, VANILLA, About, Asked, Hierarchy
from msae.hierarchy.firings import Array
from msae.hierarchy.limits import LINES, STAGES, TESTS, Limits

CHROMIUM = os.environ.get("MSAE_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = ["--no-sandbox", "--no-first-run"]
ARGUMENTS += [f"--disable-{what}" for what in ("gpu", "background-networking", "component-update", "sync")]
GROUPS = {
    "animals": {"pets": "dog cat hamster", "farm": "cow sheep horse", "birds": "owl crow heron"},
    "food": {"fruit": "apple pear plum", "drinks": "tea coffee milk", "meals": "soup bread stew"},
    "the city": {"ways": "road bridge street", "transport": "bus train tram", "buildings": "house tower school"},
    "time": {"days": "Monday Friday Sunday", "hours": "morning evening night", "seasons": "spring summer winter"},
    "people": {"family": "mother father sister", "work": "teacher doctor baker", "power": "king mayor judge"},
}
WORDS = [word for group in GROUPS.values() for members in group.values() for word in members.split()]
SENTENCE = "The A One the a of near by was were had saw met left stood in on at and but quiet old small cold again"
PLAIN = SENTENCE.split()
VOCABULARY = [*(f" {word}" for word in WORDS + PLAIN), *WORDS, ".", ",", "\n", "\n\n", ";", "?", "�", "\t"]
PREFIXES = [20, 60, 140, 300]
HOSTILE = [
    "<script>window.hacked=1</script>",
    '<img src=x onerror="window.hacked=1">',
    "</script><script>window.hacked=1</script>",
    "{{script}}",
]
ATTACK = " ".join(HOSTILE)


@cache
def example() -> Page:
    """300 latents: five topics, fifteen groups, 45 words in a forest, and many that stand alone."""
    random = np.random.default_rng(0)
    n, word_tokens = PREFIXES[-1], len(WORDS)
    label, parent = [""] * n, np.full(n, -1)
    fires: list[set[int]] = [set() for _ in range(n)]
    latents = [iter(range(first, last)) for first, last in zip([0, *PREFIXES], PREFIXES, strict=False)]
    for topic, groups in GROUPS.items():
        top = next(latents[0])
        label[top] = topic
        for group, members in groups.items():
            middle = next(latents[1])
            label[middle], parent[middle] = group, top
            for word in members.split():
                leaf = next(latents[2])
                label[leaf], parent[leaf] = word, middle
                fires[leaf] = {VOCABULARY.index(f" {word}"), VOCABULARY.index(word)}
                fires[middle] |= fires[leaf]
                fires[top] |= fires[leaf]
    for latent in range(n):
        if not fires[latent]:
            fires[latent] = {int(token) for token in random.integers(0, word_tokens + 26, random.integers(1, 4))}

    largest = np.round(random.gamma(6, 1.5, n) + 2, 3)
    rate = np.array([0.003 * len(tokens) for tokens in fires])
    rate[-1] = 0
    kept = np.flatnonzero(parent >= 0)
    extra = random.integers(0, n, (2, 400))
    ends = np.concatenate([[parent[kept], kept], extra[:, extra[0] != extra[1]]], axis=1)
    survives = np.arange(ends.shape[1]) < len(kept)
    n_edges = len(survives)
    figures = {key: np.where(survives, random.beta(9, 2, n_edges), random.beta(2, 4, n_edges)) for key in TESTS}
    figures["z"][::17] = np.nan
    passed = {key: survives | (random.random(n_edges) < 0.7) for key in LINES} | {"rank": survives}
    edges = Edges(*ends, np.zeros(n_edges, dtype=int), figures, passed, 5000)
    funnels = {
        name: dict(zip(STAGES, range(first, first - 12 * step, -step), strict=True))
        for name, first, step in ((THIS, 412, 30), (ORDER, 398, 33), (FIRINGS, 371, 30), (VANILLA, 405, 31))
    }
    asked = Asked("w", "i", None, Limits(), 0, None)
    about = About(n, 20_000_000, 3.0, "shards", "gpt2-small", "blocks.8.hook_resid_pre", asked)
    return Page(
        hierarchy=Hierarchy(PREFIXES, levels(PREFIXES), rate, largest, edges, funnels, about),
        title="gpt2-small layer 8, 300 latents",
        facts={"model": "gpt2-small", "hook": "blocks.8.hook_resid_pre", "tokens": "20 000 000", "seed": "0"},
        label=label,
        nearest=random.integers(0, n, (n, 8)),
        nearest_cos=-np.sort(-random.uniform(-0.1, 0.8, (n, 8)), axis=1),
        histogram=np.round(4000 * np.exp(-np.arange(24) / 5) * random.uniform(0.3, 1.2, (n, 24))).astype(int),
        vocabulary=VOCABULARY,
        contexts=lambda latent: contexts_of(latent, fires, parent, largest),
        fires_on={
            token: [(i, round(0.97 - 0.01 * len(tokens), 3)) for i, tokens in enumerate(fires) if token in tokens]
            for token in range(word_tokens)
        },
        promoted=random.integers(0, word_tokens, (n, 10)),
        suppressed=random.integers(0, word_tokens, (n, 10)),
    )


def contexts_of(latent: int, fires: list[set[int]], parent: Array, largest: Array) -> list[Context]:
    """Sentences with a word on which the latent fires in the middle; its parent is silent on some of them."""
    random, above = np.random.default_rng(latent), parent[latent]
    plain = [VOCABULARY.index(f" {word}") for word in PLAIN[3:]]
    contexts = []
    for number in range(13):
        tokens = random.choice(plain, 24)
        tokens[::5] = random.integers(0, len(WORDS), 5)
        tokens[[0, 22, 23]] = [VOCABULARY.index(token) for token in (" The", ".", "\n" if number % 2 else "\n\n")]
        tokens[12] = random.choice(sorted(fires[latent]))
        strength = random.uniform(0.2, 1, 24) * (1 - 0.05 * number)
        acts = np.where([token in fires[latent] for token in tokens], strength, 0) * largest[latent]
        of_parent = None
        if above >= 0:
            of_parent = np.where([token in fires[above] for token in tokens], strength, 0) * largest[above]
            of_parent[12] *= number % 4 != 1  # a hole
        group = "top" if number < 7 else "quantile 90 %" if number < 10 else "quantile 50 %"
        contexts.append(Context(group, tokens, acts, 12, of_parent, f"sequence {17 * number + latent}"))
    return contexts


def hostile() -> Page:
    """The example, with text everywhere that would run if it were taken for HTML."""
    page = example()
    contexts = [
        replace(context, tokens=np.arange(24) % 4, group=ATTACK, where=ATTACK, parent_acts=None)
        for context in page.contexts(0)
    ]
    funnels = {ATTACK if name == VANILLA else name: funnel for name, funnel in page.hierarchy.funnels.items()}
    return replace(
        page,
        hierarchy=replace(page.hierarchy, funnels=funnels),
        title=ATTACK,
        facts={ATTACK: ATTACK},
        label=[ATTACK] * 300,
        vocabulary=HOSTILE + VOCABULARY[len(HOSTILE) :],
        promoted=np.tile(np.arange(4), (300, 1)),
        contexts=lambda latent: contexts,
    )


# Packing --------------------------------------------------------------------------------------------------------------


def unpacked(path: Path) -> dict[str, Any]:
    """The page's data elements by their id, read as the browser does."""
    elements = re.findall(
        r'<script type="application/octet-stream" id="([\w-]+)">([^<]*)</script>', path.read_text("utf-8")
    )
    return {name: json.loads(gzip.decompress(base64.b64decode(text))) for name, text in elements}


def latents_of(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """What is packed of each latent, of all blocks in order."""
    return [latent for i in range(len(parts) - 3) for latent in parts[f"block-{i}"]]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The example's page."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(example(), path)
    assert list(path.parent.iterdir()) == [path]
    return path


def test_what_is_packed_comes_back(file):
    page, parts = example(), unpacked(file)
    hierarchy, core, latents = page.hierarchy, parts["core"], latents_of(parts)
    assert list(parts) == ["core", "vocabulary", *(f"block-{i}" for i in range(5)), "fires-on"]
    assert core["level"] == (hierarchy.level + 1).tolist()
    assert core["parent"] == hierarchy.parent.tolist()
    assert core["label"] == page.label
    assert core["verdict"] == hierarchy.verdict()
    np.testing.assert_allclose(core["rate"], hierarchy.rate, rtol=1e-3)
    assert parts["vocabulary"] == VOCABULARY
    assert parts["fires-on"]["3"] == [number for pair in page.fires_on[3] for number in pair]
    assert len(latents) == 300
    for latent in (0, LATENTS_PER_BLOCK, 299):
        assert latents[latent]["histogram"] == page.histogram[latent].tolist()
        assert latents[latent]["nearest"] == page.nearest[latent].tolist()
        ends = {"acts": latent, "parent": hierarchy.parent[latent]}
        for packed, context in zip(latents[latent]["contexts"], page.contexts(latent), strict=True):
            assert packed["tokens"] == context.tokens.tolist()
            for key, acts in (("acts", context.acts), ("parent", context.parent_acts)):
                assert (packed[key] is None) == (acts is None)
                if acts is not None:
                    largest = hierarchy.largest[ends[key]]
                    np.testing.assert_allclose(np.array(packed[key]) / 255 * largest, acts, atol=largest / 255)


def test_each_edge_is_with_both_its_latents(file):
    edges, latents = example().hierarchy.edges, latents_of(unpacked(file))
    assert sum(len(latent["edges"]) for latent in latents) == 2 * len(edges.parent)
    for i in (17, 300):  # one survives and one does not
        ends = [int(edges.parent[i]), int(edges.child[i])]
        for end in ends:
            (row,) = (edge for edge in latents[end]["edges"] if edge[:2] == ends)
            figures, passed = (dict(zip(TESTS, column, strict=True)) for column in row[3:])
            assert row[2] == (i == 17)
            assert figures["coverage"] == pytest.approx(edges.figures["coverage"][i], rel=1e-3)
            assert (figures["z"] is None) == (i == 17), "NaN"
            assert passed == {key: edges.passed[key][i] if key in LINES else None for key in TESTS}


@pytest.mark.parametrize("largest", [1e-3, 1.0, 37.5])
def test_quantised_activations_keep_their_sign_and_size(largest):
    acts = np.array([0, 1e-9, 0.001, 0.5, 0.998, 1.0, 1.2]) * largest
    steps = quantise(acts, largest)
    assert steps[0] == 0
    assert (steps[1:] >= 1).all(), "what fires is not silent"
    assert steps.max() == 255
    np.testing.assert_allclose(steps[2:6] / 255 * largest, acts[2:6], atol=largest / 255)
    assert quantise(np.zeros(3), 0.0).tolist() == [0, 0, 0]


def test_columns_of_another_length_are_refused():
    for name in ("label", "nearest", "nearest_cos", "histogram", "promoted", "suppressed"):
        with pytest.raises(AssertionError, match="300 latents"):
            replace(example(), **{name: getattr(example(), name)[1:]})


def test_data_closes_no_element(tmp_path):
    write_page(hostile(), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "hacked" not in re.sub(r"<title>.*?</title>|<a class=\"name\".*?</a>", "", text)
    assert text.count("<script") == text.count("</script>") == len(unpacked(tmp_path / "page.html")) + 1


def test_a_placeholder_in_a_title_stays_a_title():
    assert fill("{{title}} {{script}}", {"title": "{{script}}", "script": "1"}) == "{{script}} 1"


def test_the_script_makes_no_html_of_text_and_asks_for_nothing():
    assert sorted(path.name for path in TEMPLATE.glob("*.js")) == sorted(SCRIPTS)
    script = "".join((TEMPLATE / name).read_text("utf-8") for name in SCRIPTS)
    html = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "</script")
    assert not [word for word in (*html, "eval(", "Function(", "fetch(") if word in script]
    for name in (*SCRIPTS, "style.css", "index.html"):
        addresses = set(re.findall(r"\w+://[^\s\"']+", (TEMPLATE / name).read_text("utf-8")))
        assert addresses <= {"http://www.w3.org/2000/svg"}, "a name, not an address that is fetched"


# In the browser -------------------------------------------------------------------------------------------------------


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


@pytest.fixture
def visit(browser: Any, file: Path, tmp_path: Path) -> Iterator[Any]:
    """Opens the example or another page; afterwards no error, nothing refused by the policy and no request is left."""
    contexts, errors, requests = [], [], []

    def go(latent: int | str | None = None, other: Page | None = None, width: int = 1280, scheme: Any = "light") -> Any:
        path = file if other is None else tmp_path / "page.html"
        if other is not None:
            write_page(other, path)
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url.split("#")[0]))
        page.goto(path.as_uri() + ("" if latent is None else f"#latent={latent}"))
        page.locator("main h1").wait_for()
        if isinstance(latent, int):
            at(page, latent)
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


def test_the_start_page_has_title_verdict_facts_and_funnel(visit):
    shown, page = visit(), example()
    assert shown.locator("main h1").inner_text() == page.title == shown.title()
    text = shown.locator("main").inner_text()
    assert page.hierarchy.verdict() in text
    assert all(fact in text and value in text for fact, value in page.facts.items())
    rows = shown.locator(".funnel tbody tr")
    counts = [[cell.split()[0] for cell in row.locator("td").all_inner_texts()] for row in rows.all()]
    assert rows.locator("th").all_inner_texts() == [TESTS[key].name for key in LINES]
    assert counts == [[str(funnel[key]) for funnel in page.hierarchy.funnels.values()] for key in LINES]


@pytest.mark.parametrize(("text", "latent"), [("123", 123), ("#123", 123), ("TRANSP", named("transport"))])
def test_a_number_or_a_part_of_a_label_finds_its_latent(visit, text, latent):
    page = visit()
    ask(page, text)
    page.keyboard.press("Enter")
    at(page, latent)
    assert page.title().startswith(f"#{latent}")


@pytest.mark.parametrize("text", ["dog", " dog"])
def test_text_finds_the_latents_that_fire_on_it(visit, text):
    page, leaf = visit(), named("dog")
    ask(page, text)
    page.locator("#results h2", has_text="Fires on ␣dog").wait_for()
    first = page.locator("#results ul").first.locator("li")
    assert f"#{leaf}" in "".join(first.all_inner_texts()[:2])
    shares = [float(value.removesuffix(" %")) for value in first.locator(".value").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) >= 3
    first.locator("a", has_text=f"#{leaf}").click()
    at(page, leaf)


def test_two_tokens_are_ranked_by_the_mean_share(visit):
    page, fires_on = visit(), example().fires_on
    ask(page, "dog cat")
    page.locator("#results p", has_text="mean").first.wait_for()
    shares = {latent: [dict(fires_on[token]).get(latent, 0) for token in (0, 1)] for latent in range(300)}
    best = max(shares, key=lambda latent: (sum(shares[latent]), -latent))
    row = page.locator("#results ul").first.locator("li").first.inner_text()
    assert f"#{best}" in row
    assert f"{50 * sum(shares[best]):.1f} %" in row


def test_a_search_without_result_says_so(visit):
    page = visit()
    ask(page, "xyzzy")
    assert "xyzzy" in page.locator("#results").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#results").is_hidden()
    assert page.evaluate("document.activeElement === document.body")


def test_links_lead_to_the_children_and_back_goes_back(visit):
    page, top, middle = visit(), named("animals"), named("pets")
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


def test_a_deep_link_opens_the_latent_and_its_branch(visit):
    here = visit(named("cat")).locator("#rows [aria-current=page]")
    assert "cat" in here.inner_text()
    assert here.is_visible()


@pytest.mark.parametrize("asked", ["300", "-1", "x", "1e1", "%"])
def test_a_link_to_no_latent_says_so(visit, asked):
    assert visit(asked).locator("main h1").inner_text() == "No such latent"


def test_a_latent_shows_all_that_is_known(visit):
    page, latent = example(), named("cow")
    shown, contexts = visit(latent), page.contexts(latent)
    text = shown.locator("main").inner_text()
    assert f"{100 * page.hierarchy.rate[latent]:.2g} % of tokens" in text
    assert f"{page.hierarchy.largest[latent]:.3g}" in text
    assert shown.locator(".histogram rect:not(.behind)").count() == page.histogram.shape[1]
    assert shown.locator(".contexts > li").count() == len(contexts)
    assert shown.locator("h3").all_inner_texts() == ["top", "quantile 90 %", "quantile 50 %"]
    for name, tokens in (("Promotes", page.promoted), ("Suppresses", page.suppressed)):
        chips = shown.locator("section", has=shown.get_by_role("heading", name=name, exact=True)).locator(".chip")
        assert chips.all_inner_texts() == [VOCABULARY[token].replace(" ", "␣") for token in tokens[latent]]
    nearest = shown.locator(".nearest li")
    assert nearest.count() == 8
    assert f"{page.nearest_cos[latent, 0]:.2f}" in nearest.first.inner_text()
    first = "".join(VOCABULARY[token] for token in contexts[0].tokens).replace("\n", "↵").lstrip()
    assert shown.locator(".contexts .text").first.text_content() == first


def test_an_edge_shows_each_test_passed_or_failed(visit):
    edges, limits = example().hierarchy.edges, example().hierarchy.about.asked.limits
    latent = int(edges.child[17])  # its z is NaN
    other = int(np.flatnonzero((edges.child == latent) & ~edges.survives)[0])
    page = visit(latent)
    page.locator("details.others summary").click()
    for edge, table in ((17, page.locator(".edges").first), (other, page.locator(".others .edges"))):
        row = table.locator("tbody tr", has=page.locator(f"a[href='#latent={edges.parent[edge]}']"))
        for i, (key, test) in enumerate(TESTS.items()):
            value, *mark = row.locator("td").nth(i).inner_text().split()
            figure = edges.figures[key][edge]
            assert value == ("–" if np.isnan(figure) else f"{figure:.3f}")
            assert mark == (["✓" if edges.passed[key][edge] else "✗"] if test.line else [])
            head = table.locator("thead th").nth(i + 1)
            meaning = f"{test.says} (survives with {test.line_at(limits)})" if test.line else test.says
            assert (head.inner_text(), head.get_attribute("title")) == (test.name, meaning)
    assert not edges.passed["rank"][other], "a failed test was looked at"


def test_other_candidates_are_folded_away(visit):
    edges = example().hierarchy.edges
    ends = np.stack([edges.parent, edges.child])[:, ~edges.survives]
    latent = int(np.bincount(ends[1]).argmax())
    others, count = visit(latent).locator("details.others"), int((ends == latent).any(0).sum())
    assert str(count) in others.locator("summary").inner_text()
    assert not others.locator("table").is_visible()
    others.locator("summary").click()
    assert others.locator("tbody tr:not(.group)").count() == count


def test_arrows_walk_the_forest(visit):
    page, top = visit(), named("animals")
    first, second = (int(latent) for latent in np.flatnonzero(example().hierarchy.parent == top)[:2])
    for key, latent in (
        ("ArrowDown", top),
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


def test_arrows_walk_by_number_without_edges_and_stay_in_the_search(visit):
    page = visit(200)
    for key, latent in (("ArrowRight", 201), ("ArrowLeft", 200)):
        page.keyboard.press(key)
        at(page, latent)
    ask(page, "dog")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.closest('#results') !== null")
    at(page, 200)


def test_holes_are_marked_and_nothing_else(visit):
    latent = named("dog")
    page, parent = visit(latent), example().hierarchy.parent[latent]
    holes = sum(int(((each.acts > 0) & (each.parent_acts == 0)).sum()) for each in example().contexts(latent))
    marks = page.locator(".contexts mark.hole")
    assert marks.count() == holes > 0
    assert f"the parent #{parent} is silent" in marks.first.get_attribute("title")
    assert marks.first.evaluate("node => getComputedStyle(node).outlineStyle") == "dashed"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    at(page, named("animals"))
    assert page.locator(".contexts mark").count() == 0, "a root has no parent that could be silent"


def test_no_arrow_is_lost_where_two_come_before_the_page_is_drawn(visit):
    page = visit(named("dog"))
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowUp', bubbles: true}))"
    page.evaluate(f"() => {{ {press}; {press}; }}")
    at(page, named("animals"))


def test_the_parent_is_marked_when_asked_and_the_arrows_still_walk(visit):
    latent = named("dog")
    page = visit(latent)
    marked = page.locator(".contexts .parent-fires")
    assert marked.count() == sum(int((each.parent_acts > 0).sum()) for each in example().contexts(latent))
    shadow = "node => getComputedStyle(node).boxShadow"
    assert marked.first.evaluate(shadow) == "none"
    page.get_by_label("line above where the parent fires").check()
    assert marked.first.evaluate(shadow) != "none"
    page.keyboard.press("ArrowUp")
    at(page, named("pets"))


def test_the_stronger_activation_has_the_deeper_shade(visit):
    latent = named("dog")
    peaks = visit(latent).locator(".contexts .peak")
    shades = peaks.evaluate_all("nodes => nodes.map(node => parseFloat(node.style.getPropertyValue('--shade')))")
    acts = [each.acts[each.peak] for each in example().contexts(latent)]
    assert np.corrcoef(shades, acts)[0, 1] > 0.99
    background = "node => getComputedStyle(node).backgroundColor"
    assert peaks.first.evaluate(background) != "rgba(0, 0, 0, 0)"


def test_levels_list_all_their_latents_with_few_elements(visit):
    page = visit()
    page.locator("#tab-levels").click()
    page.locator("#tools button", has_text="160").click()
    assert page.locator("#rows li").count() < 60
    page.locator("#tools select").select_option("number")
    page.locator("#list").evaluate("node => node.scrollTop = node.scrollHeight")
    page.locator("#rows a", has_text="#299").click()
    at(page, 299)
    assert "no token" in page.locator(".terms").inner_text()


def test_a_branch_opens_and_closes(visit):
    page = visit()
    roots = page.locator("#rows li").count()
    toggle = page.locator("#rows button.toggle").first
    toggle.click()
    assert page.locator("#rows li").count() == roots + 3
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true", "the focus stays"
    toggle.click()
    assert page.locator("#rows li").count() == roots


def test_what_looks_like_html_is_text(visit):
    for page in (visit(None, hostile()), visit(20, hostile())):
        assert ATTACK in page.locator("main").inner_text()
        for summary in page.locator("summary").all()[:1]:
            summary.click()
        ask(page, "<script>")
        assert ATTACK in page.locator("#results").inner_text()
        assert page.locator("img").count() == 0
        assert page.evaluate("window.hacked") is None
        assert ATTACK in page.title()
    assert HOSTILE[0] in page.locator(".contexts .text").first.inner_text()
    assert page.locator(".chip", has_text="onerror").count() > 0


@pytest.mark.parametrize("latent", [None, 0, 61])
def test_a_phone_does_not_scroll_sideways(visit, latent):
    page = visit(latent, width=390)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_background_follows_the_colour_scheme(visit, scheme):
    style = "getComputedStyle(document.body)"
    colours = visit(scheme=scheme).evaluate(f"[{style}.backgroundColor, {style}.color]")
    ground, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
    assert (ground < 60, ink > 180) == (scheme == "dark", scheme == "dark")


def test_features_with_names_stand_apart(visit):
    page = replace(
        example(),
        joined=False,
        vocabulary=[f"feature {feature}" for feature in range(60)],
        contexts=lambda latent: [Context("top", np.array([3, 31, 7]), np.array([0.0, 2.0, 0.0]), 1)],
        fires_on={31: [(5, 0.9)], 3: [(6, 0.8)]},
        promoted=None,
        suppressed=None,
    )
    shown = visit(5, page)
    assert shown.locator(".contexts .token").all_inner_texts() == ["feature 3", "feature 31", "feature 7"]
    assert shown.get_by_role("heading", name="Promotes").count() == 0
    ask(shown, "feature 31")
    assert [text.split()[1] for text in shown.locator("#results li a").all_inner_texts()] == ["#5"]


def test_without_a_forest_the_levels_are_listed(visit):
    hierarchy = example().hierarchy
    none = replace(hierarchy.edges, passed={key: np.zeros_like(hierarchy.edges.survives) for key in LINES})
    page = visit(None, replace(example(), hierarchy=replace(hierarchy, edges=none), contexts=lambda latent: []))
    assert page.locator("#tab-levels").get_attribute("aria-pressed") == "true"
    page.locator("#rows a").first.click()
    page.locator("main h1 .number").wait_for()
    assert "No contexts were kept" in page.locator("main").inner_text()
