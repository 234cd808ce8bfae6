"""One HTML file in which a person walks through the latents and the forest between them, without a network."""

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msae.explorer.examples import Context
from msae.files import write
from msae.hierarchy.extract import Hierarchy
from msae.hierarchy.files import numbers
from msae.hierarchy.firings import Array
from msae.hierarchy.limits import LINES, TESTS

TEMPLATE = Path(__file__).parent / "page"
SCRIPTS = ("elements.js", "data.js", "outline.js", "latent.js", "start.js", "search.js", "app.js")  # in this order
LATENTS_PER_BLOCK = 64  # decoded together when one of them is shown


@dataclass(frozen=True)
class Page:
    """What the page shows of a hierarchy of `n` latents.

    title, facts            the start page: its heading, and what was measured on what
    label                   [n] a few words, or ""
    nearest, nearest_cos    [n, m] the latents with the nearest decoder rows, nearest first, and the cosines
    histogram               int [n, bins] counts over equal bins of (0, largest]
    vocabulary              the string of each token as it stands in text, such as " dog"
    contexts                a function from latent to its contexts
    fires_on                token → [(latent, share of the token's occurrences on which it fires)], for the search
    promoted, suppressed    int [n, m] tokens, strongest first, by the unembedding; None without a language model
    joined                  tokens are pieces of a text; False: they are names that stand apart
    """

    hierarchy: Hierarchy
    title: str
    facts: Mapping[str, str]
    label: Sequence[str]
    nearest: Array
    nearest_cos: Array
    histogram: Array
    vocabulary: Sequence[str]
    contexts: Callable[[int], Sequence[Context]]
    fires_on: Mapping[int, Sequence[tuple[int, float]]]
    promoted: Array | None = None
    suppressed: Array | None = None
    joined: bool = True

    def __post_init__(self) -> None:
        columns = (self.label, self.nearest, self.nearest_cos, self.histogram, self.promoted, self.suppressed)
        n = len(self.hierarchy.level)
        assert all(len(column) == n for column in columns if column is not None), f"columns of other than {n} latents"


def write_page(page: Page, path: Path, on_latents: Callable[[int], object] = lambda n: None) -> None:
    """Write one HTML file that asks for nothing else; `on_latents` is called with how many more latents are written."""
    style = (TEMPLATE / "style.css").read_text(encoding="utf-8")
    # One function around all files: they see each other's names, and may wait for what is unpacked.
    pieces = "\n".join((TEMPLATE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(async () => {{\n{pieces}\n}})();\n'
    # The browser runs only what has these hashes, and the page may load nothing: text from a model cannot act.
    policy = (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    parts = {
        "title": html.escape(page.title),
        "policy": policy,
        "style": style,
        "script": script,
        "core": element("core", core(page)),
    }
    template = (TEMPLATE / "index.html").read_text(encoding="utf-8")
    before, after = template.split("{{blocks}}")

    def fill_file(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(fill(before, parts))
            file.write(element("vocabulary", list(page.vocabulary)))
            for number, block in enumerate(blocks(page)):
                file.write(element(f"block-{number}", block))
                on_latents(len(block))
            file.write(element("fires-on", searchable(page)))
            file.write(fill(after, parts))

    write(path, fill_file, "free space or give out=<another directory>")


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Each {{name}} replaced, in one pass: a title that reads {{script}} stays a title."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def digest(text: str) -> str:
    """The source expression of a Content-Security-Policy that allows exactly this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def element(name: str, value: Any) -> str:
    """A script element that the browser does not run: JSON, gzip, base64, whose letters cannot close it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone half of a surrogate pair, which some tokens are, has no UTF-8.
    packed = base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()
    return f'<script type="application/octet-stream" id="{name}">{packed}</script>\n'


def core(page: Page) -> dict[str, Any]:
    """What the outline and the start page need of all latents."""
    hierarchy, limits = page.hierarchy, page.hierarchy.about.asked.limits
    funnels = hierarchy.funnels.values()
    return {
        "title": page.title,
        "facts": list(page.facts.items()),
        "verdict": hierarchy.verdict(),
        "funnelColumns": list(hierarchy.funnels),
        "funnel": [[TESTS[key].name, [funnel[key] for funnel in funnels]] for key in LINES],
        "prefixes": hierarchy.prefixes,
        "level": (hierarchy.level + 1).tolist(),
        "rate": numbers(hierarchy.rate),
        "largest": numbers(hierarchy.largest),
        "label": list(page.label),
        "parent": hierarchy.parent.tolist(),
        "tests": [
            [test.name, f"{test.says} (survives with {test.line_at(limits)})" if test.line else test.says, key in LINES]
            for key, test in TESTS.items()
        ],
        "joined": page.joined,
        "latentsPerBlock": LATENTS_PER_BLOCK,
        "candidates": len(hierarchy.edges.parent),
    }


def blocks(page: Page) -> Iterator[list[dict[str, Any]]]:
    """What is shown of each latent when it is looked at, LATENTS_PER_BLOCK at once."""
    n, edges = len(page.hierarchy.level), edges_of(page.hierarchy)
    for start in range(0, n, LATENTS_PER_BLOCK):
        yield [
            {
                "histogram": page.histogram[latent].tolist(),
                "promoted": None if page.promoted is None else page.promoted[latent].tolist(),
                "suppressed": None if page.suppressed is None else page.suppressed[latent].tolist(),
                "nearest": page.nearest[latent].tolist(),
                "cosines": numbers(page.nearest_cos[latent]),
                "edges": edges[latent],
                "contexts": [packed(page.hierarchy, latent, context) for context in page.contexts(latent)],
            }
            for latent in range(start, min(n, start + LATENTS_PER_BLOCK))
        ]


def edges_of(hierarchy: Hierarchy) -> list[list[tuple[Any, ...]]]:
    """For each latent, its candidate edges as parent or child: [parent, child, survives, figures, passed]."""
    edges, nothing = hierarchy.edges, [None] * len(hierarchy.edges.parent)
    figures = zip(*(numbers(edges.figures[key]) for key in TESTS), strict=True)
    passed = zip(*(edges.passed[key].astype(int).tolist() if key in LINES else nothing for key in TESTS), strict=True)
    ends = (edges.parent.tolist(), edges.child.tolist(), edges.survives.astype(int).tolist())
    of_latents: list[list[tuple[Any, ...]]] = [[] for _ in hierarchy.level]
    for row in zip(*ends, figures, passed, strict=True):
        for latent in row[:2]:
            of_latents[latent].append(row)
    return of_latents


def packed(hierarchy: Hierarchy, latent: int, context: Context) -> dict[str, Any]:
    """A context with activations in 256 steps of the largest that its latent, or its parent, has."""
    above, parent = context.parent_acts, int(hierarchy.parent[latent])
    return {
        "group": context.group,
        "tokens": context.tokens.tolist(),
        "acts": quantise(context.acts, float(hierarchy.largest[latent])).tolist(),
        "parent": None if above is None else quantise(above, float(hierarchy.largest[parent])).tolist(),
        "peak": context.peak,
        "where": context.where,
    }


def quantise(acts: Array, largest: float) -> Array:
    """Activations in 0 … 255 of the largest; what is positive stays at least 1."""
    acts = np.asarray(acts, dtype=np.float64)
    steps = np.clip(np.rint(acts * (255 / largest)), 1, 255) if largest > 0 else np.ones_like(acts)
    return np.where(acts > 0, steps, 0).astype(np.int64)


def searchable(page: Page) -> dict[int, list[float]]:
    """Token → latent, share, latent, share, …"""
    return {
        token: [number for latent, share in pairs for number in (latent, round(share, 4))]
        for token, pairs in page.fires_on.items()
    }
