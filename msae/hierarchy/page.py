"""One HTML file in which a person walks through the latents and the forest between them, without a network."""

import base64
import gzip
import hashlib
import html
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = Path(__file__).parent / "page"
SCRIPTS = ("elements.js", "data.js", "outline.js", "latent.js", "start.js", "search.js", "app.js")  # in this order
LATENTS_PER_BLOCK = 64  # decoded together when one of them is shown


@dataclass(frozen=True)
class Context:
    """A piece of text in which a latent was looked at; `t` tokens.

    group        contexts of one group stand together under this heading: "top", "quantile 90 %", "holes of the parent"
    tokens       int [t], indices into the vocabulary
    acts         float [t], the latent's activations; 0 where it is silent
    peak         the position for which the context was chosen
    parent_acts  float [t], the activations of the latent's surviving parent; None without a parent or if not looked up.
                 A token with acts > 0 and parent_acts = 0 is marked as a hole.
    where        where the text is from, such as "val shard 0, sequence 17"
    """

    group: str
    tokens: np.ndarray
    acts: np.ndarray
    peak: int
    parent_acts: np.ndarray | None = None
    where: str = ""


@dataclass(frozen=True)
class PageData:
    """What the page shows of `n` latents and of `e` candidate edges between them.

    title, facts, verdict    the start page: its heading, what was measured on what, and the conclusion in a sentence
    funnel_columns, funnel   names of what is compared; (stage, a count for each column), the first stage whole
    prefixes                 cumulative widths, strictly increasing, the last is n
    level, rate, largest     [n] level from 1, share of tokens on which it fires, its largest activation
    label                    [n] a few words, or ""
    parent                   int [n], the parent of the one surviving edge that the forest keeps, or -1
    tests                    (key, name of the column, what it measures and when it is passed)
    figures                  key → float [e], NaN where the test says nothing
    passed                   key → bool [e], for the keys that are tests and not only figures
    edge_parent, edge_child  int [e], all candidates;  survives  bool [e]
    nearest, nearest_cos     [n, m] the latents with the nearest decoder rows, nearest first, and the cosines
    histogram                int [n, bins] counts over equal bins of (0, largest]
    vocabulary               the string of each token as it stands in text, such as " dog"
    contexts                 a function from latent to its contexts, or a sequence with a list for each latent
    fires_on                 token → [(latent, share of the token's occurrences on which it fires)], for the search
    promoted, suppressed     int [n, m] tokens, strongest first, by the unembedding; None without a language model
    joined                   tokens are pieces of a text; False: they are names that stand apart
    """

    title: str
    facts: Mapping[str, str]
    verdict: str
    funnel_columns: Sequence[str]
    funnel: Sequence[tuple[str, Sequence[int]]]
    prefixes: Sequence[int]
    level: np.ndarray
    rate: np.ndarray
    largest: np.ndarray
    label: Sequence[str]
    parent: np.ndarray
    tests: Sequence[tuple[str, str, str]]
    figures: Mapping[str, np.ndarray]
    passed: Mapping[str, np.ndarray]
    edge_parent: np.ndarray
    edge_child: np.ndarray
    survives: np.ndarray
    nearest: np.ndarray
    nearest_cos: np.ndarray
    histogram: np.ndarray
    vocabulary: Sequence[str]
    contexts: Callable[[int], Sequence[Context]] | Sequence[Sequence[Context]]
    fires_on: Mapping[int, Sequence[tuple[int, float]]] = field(default_factory=dict)
    promoted: np.ndarray | None = None
    suppressed: np.ndarray | None = None
    joined: bool = True


def write_page(data: PageData, path: Path, on_latents: Callable[[int], object] = lambda n: None) -> None:
    """Write `data` as one HTML file that asks for nothing else; raises ValueError where lengths or indices disagree.

    `on_latents` is told how many more latents are written.
    """
    check(data)
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
        "title": html.escape(data.title),
        "policy": policy,
        "style": style,
        "script": script,
        "core": element("core", core(data)),
    }
    template = (TEMPLATE / "index.html").read_text(encoding="utf-8")
    before, after = template.split("{{blocks}}")
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(fill(before, parts))
            file.write(element("vocabulary", list(data.vocabulary)))
            for block, latents in enumerate(details(data)):
                file.write(element(f"block-{block}", latents))
                on_latents(len(latents))
            file.write(element("fires-on", fires_on(data)))
            file.write(fill(after, parts))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Each {{name}} replaced, in one pass: a title that reads {{script}} stays a title."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def digest(text: str) -> str:
    """The source expression of a Content-Security-Policy that allows exactly this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def pack(value: Any) -> str:
    """JSON, gzip, base64: letters that cannot close a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone half of a surrogate pair, which some tokens are, has no UTF-8.
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()


def element(name: str, value: Any) -> str:
    """A script element that the browser does not run and the page's script reads."""
    return f'<script type="application/octet-stream" id="{name}">{pack(value)}</script>\n'


def quantise(acts: np.ndarray, largest: float) -> np.ndarray:
    """Activations in 0 … 255 of the largest; what is positive stays at least 1."""
    acts = np.asarray(acts, dtype=np.float64)
    steps = np.clip(np.rint(acts * (255 / largest)), 1, 255) if largest > 0 else np.ones_like(acts)
    return np.where(acts > 0, steps, 0).astype(np.int64)


def figure(value: float) -> float | str | None:
    """Four digits; None for NaN, and a word for the infinite, which JSON has not."""
    if np.isfinite(value):
        return float(f"{value:.4g}")
    return None if np.isnan(value) else ("∞" if value > 0 else "−∞")


def figures(values: np.ndarray) -> list[float | str | None]:
    """`figure` of each."""
    return [figure(value) for value in np.asarray(values, dtype=np.float64).tolist()]


def core(data: PageData) -> dict[str, Any]:
    """What the outline and the start page need of all latents."""
    return {
        "title": data.title,
        "facts": list(data.facts.items()),
        "verdict": data.verdict,
        "funnelColumns": list(data.funnel_columns),
        "funnel": [[stage, [int(count) for count in counts]] for stage, counts in data.funnel],
        "prefixes": [int(width) for width in data.prefixes],
        "level": data.level.tolist(),
        "rate": figures(data.rate),
        "largest": figures(data.largest),
        "label": list(data.label),
        "parent": data.parent.tolist(),
        "tests": [[name, text, key in data.passed] for key, name, text in data.tests],
        "joined": data.joined,
        "latentsPerBlock": LATENTS_PER_BLOCK,
        "candidates": len(data.edge_parent),
    }


def details(data: PageData) -> Any:
    """Yields, block by block, what is shown of each latent when it is looked at."""
    n = len(data.level)
    edges = edges_of(data)
    read = data.contexts if callable(data.contexts) else data.contexts.__getitem__
    for start in range(0, n, LATENTS_PER_BLOCK):
        yield [
            {
                "histogram": data.histogram[latent].tolist(),
                "promoted": None if data.promoted is None else data.promoted[latent].tolist(),
                "suppressed": None if data.suppressed is None else data.suppressed[latent].tolist(),
                "nearest": data.nearest[latent].tolist(),
                "cosines": figures(data.nearest_cos[latent]),
                "edges": edges[latent],
                "contexts": [packed_context(data, latent, context) for context in read(latent)],
            }
            for latent in range(start, min(n, start + LATENTS_PER_BLOCK))
        ]


def edges_of(data: PageData) -> list[list[list[Any]]]:
    """For each latent, its candidate edges as parent or child: [parent, child, survives, figures, passed]."""
    columns = [figures(data.figures[key]) for key, _, _ in data.tests]
    marks = [
        data.passed[key].astype(int).tolist() if key in data.passed else [None] * len(data.edge_parent)
        for key, _, _ in data.tests
    ]
    of: list[list[list[Any]]] = [[] for _ in range(len(data.level))]
    ends = zip(data.edge_parent.tolist(), data.edge_child.tolist(), data.survives.astype(int).tolist(), strict=True)
    for edge, (parent, child, survives) in enumerate(ends):
        row = [parent, child, survives, [column[edge] for column in columns], [mark[edge] for mark in marks]]
        of[parent].append(row)
        of[child].append(row)
    return of


def packed_context(data: PageData, latent: int, context: Context) -> dict[str, Any]:
    """A context with activations in 256 steps of the largest that its latent, or its parent, has."""
    t = len(context.tokens)
    of_parent, parent = context.parent_acts, int(data.parent[latent])
    lengths = [len(context.acts), t if of_parent is None else len(of_parent)]
    require(lengths == [t, t], f"a context of latent {latent} has {t} tokens, but {lengths} activations")
    require(0 <= context.peak < t, f"a context of latent {latent} has its peak at {context.peak} of {t} tokens")
    require(within(context.tokens, len(data.vocabulary)), f"a context of latent {latent} has tokens out of vocabulary")
    require(of_parent is None or parent >= 0, f"latent {latent} has no parent, but a context with parent_acts")
    return {
        "group": context.group,
        "tokens": np.asarray(context.tokens).tolist(),
        "acts": quantise(context.acts, float(data.largest[latent])).tolist(),
        "parent": None if of_parent is None else quantise(of_parent, float(data.largest[parent])).tolist(),
        "peak": int(context.peak),
        "where": context.where,
    }


def fires_on(data: PageData) -> dict[int, list[float]]:
    """token → latent, share, latent, share, …"""
    return {
        int(token): [part for latent, share in pairs for part in (int(latent), round(float(share), 4))]
        for token, pairs in data.fires_on.items()
    }


def require(holds: bool, otherwise: str) -> None:
    """ValueError with this line unless it holds."""
    if not holds:
        raise ValueError(otherwise)


def within(indices: Any, width: int) -> bool:
    """All indices are in 0 … width - 1."""
    indices = np.asarray(indices)
    return indices.size == 0 or bool(indices.min() >= 0 and indices.max() < width)


def check(data: PageData) -> None:
    """ValueError in one line for lengths that do not match, indices that point nowhere and a forest that is none."""
    n, e, words = len(data.level), len(data.edge_parent), len(data.vocabulary)
    for name in ("rate", "largest", "label", "parent", "nearest", "nearest_cos", "histogram"):
        rows = len(getattr(data, name))
        require(rows == n, f"{name} has {rows} rows, but level has {n}: one for each latent")
    for name in ("promoted", "suppressed"):
        tokens = getattr(data, name)
        require(tokens is None or len(tokens) == n, f"{name} has {0 if tokens is None else len(tokens)} rows, not {n}")
        require(tokens is None or within(tokens, words), f"{name} has tokens out of the vocabulary of {words}")
    if not callable(data.contexts):
        require(len(data.contexts) == n, f"contexts has {len(data.contexts)} lists, but level has {n} latents")
    for name, values in {
        "edge_child": data.edge_child,
        "survives": data.survives,
        **data.figures,
        **data.passed,
    }.items():
        require(len(values) == e, f"{name} has {len(values)} edges, but edge_parent has {e}")
    for key, _, _ in data.tests:
        require(key in data.figures, f"the test {key} has no figures; there are {', '.join(data.figures) or 'none'}")
    for key in data.passed:
        require(key in {key for key, _, _ in data.tests}, f"passed has {key}, which is none of the tests")
    for stage, counts in data.funnel:
        columns = len(data.funnel_columns)
        require(len(counts) == columns, f"the funnel's stage {stage!r} has {len(counts)} counts for {columns} columns")
    widths = [0, *data.prefixes]
    rising = all(low < high for low, high in pairwise(widths))
    require(rising and widths[-1] == n, f"prefixes {widths[1:]} do not rise to the number of latents, {n}")
    require(data.nearest.shape == data.nearest_cos.shape, "nearest and nearest_cos differ in shape")
    require(bool((data.level >= 1).all()), "levels count from 1")
    for name in ("nearest", "edge_parent", "edge_child"):
        require(within(getattr(data, name), n), f"{name} points to latents that are not among the {n}")
    loops = np.flatnonzero(np.asarray(data.edge_parent) == np.asarray(data.edge_child))
    require(not loops.size, f"{loops.size} edges have a latent as its own parent")
    pairs = [(token, latent) for token, found in data.fires_on.items() for latent, _ in found]
    known = within(list(data.fires_on), words) and within([latent for _, latent in pairs], n)
    require(known, f"fires_on names tokens or latents that are not among {words} and {n}")
    check_forest(data)


def check_forest(data: PageData) -> None:
    """ValueError unless parents are surviving edges and no latent is its own ancestor."""
    n = len(data.level)
    require(within(data.parent + 1, n + 1), f"parent points to latents that are not among the {n}; none is -1")
    kept = np.flatnonzero(data.survives)
    survive = set(zip(data.edge_parent[kept].tolist(), data.edge_child[kept].tolist(), strict=True))
    above = data.parent.copy()
    for child in np.flatnonzero(data.parent >= 0).tolist():
        edge = (int(data.parent[child]), child)
        require(edge in survive, f"latent {child} has parent {edge[0]}, but that edge is not among those that survive")
    for _ in range(n.bit_length()):  # each round doubles the steps upwards
        above = np.where(above >= 0, above[above], -1)
    require(bool((above < 0).all()), "the parents go round in a circle: a forest has none")
