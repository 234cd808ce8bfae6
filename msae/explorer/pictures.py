"""The hierarchy at a glance: the funnel with its controls, edges by level, the forest under the strongest roots."""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from msae.evaluation.pictures import Order, depth_first
from msae.hierarchy.extract import Hierarchy
from msae.hierarchy.firings import Array
from msae.hierarchy.limits import LINES, TESTS

COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#999999")  # of this SAE, which comes first, and of its controls


def funnel(hierarchy: Hierarchy) -> Figure:
    """How many candidates remain after each test, in the SAE and in its controls."""
    names = [TESTS[stage].name for stage in LINES]
    figure = Figure(figsize=(0.75 * len(names) + 1.5, 3.6), layout="constrained")
    axis = figure.subplots()
    for colour, (name, counts) in zip(COLOURS, hierarchy.funnels.items(), strict=False):
        remaining = [counts[stage] for stage in LINES]
        axis.plot(names, remaining, "o-", color=colour, label=name, markersize=4)
        end = (len(names) - 1, remaining[-1])
        axis.annotate(f"{remaining[-1]:,}", end, (6, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set(ylabel="candidate edges remaining", ylim=(0, None))
    axis.tick_params(axis="x", rotation=30)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9")
    axis.legend(frameon=False)
    return figure


def by_level(hierarchy: Hierarchy) -> Figure:
    """Surviving edges between each two levels."""
    n, edges, survives = len(hierarchy.prefixes), hierarchy.edges, hierarchy.edges.survives
    counts = np.zeros((n, n), dtype=np.int64)
    np.add.at(counts, (hierarchy.level[edges.parent[survives]], hierarchy.level[edges.child[survives]]), 1)
    figure = Figure(figsize=(1.8 + 0.7 * n, 1.2 + 0.6 * n), layout="constrained")
    axis = figure.subplots()
    axis.imshow(counts, cmap="Blues", vmin=0)
    for (parent, child), count in np.ndenumerate(counts):
        dark = count > counts.max() / 2
        axis.text(child, parent, f"{count:,}", ha="center", va="center", color="white" if dark else "black")
    for set_ticks in (axis.set_xticks, axis.set_yticks):
        set_ticks(range(n), [str(i + 1) for i in range(n)])
    axis.set(xlabel="level of the child", ylabel="level of the parent", title="surviving edges")
    return figure


def forest(hierarchy: Hierarchy, labels: Sequence[str], roots: int = 8, most: int = 60) -> Figure:
    """The trees with the most latents, depth first, each latent with its label and its firing rate."""
    lines = outline(hierarchy.parent, hierarchy.rate, roots, most)
    figure = Figure(figsize=(7.5, 0.7 + 0.19 * max(4, len(lines))), layout="constrained")
    axis = figure.subplots()
    top, last = float(hierarchy.rate.max(initial=1e-9)), max(1, len(hierarchy.prefixes) - 1)
    line_of: dict[int, int] = {}
    for y, (latent, depth) in enumerate(lines):
        line_of[latent], rate, level = y, hierarchy.rate[latent], hierarchy.level[latent]
        if depth:
            above = line_of[int(hierarchy.parent[latent])] + 0.35
            axis.plot([depth - 1, depth - 1, depth - 0.12], [above, y, y], color="0.7", linewidth=0.8)
        axis.scatter(depth, y, s=8 + 60 * np.sqrt(rate / top), c=[level], cmap="viridis", vmin=0, vmax=last)
        text = f"{latent}  {plain(labels[latent])}".rstrip()
        axis.text(depth + 0.14, y, f"{text}  ({rate:.2%})", va="center", fontsize=7, parse_math=False)
    depth = max((d for _, d in lines), default=0)
    axis.set(xlim=(-0.3, depth + 3), ylim=(max(4, len(lines)) - 0.3, -0.7))
    axis.axis("off")
    axis.set_title("trees with the most latents" if lines else "no edge survives", loc="left", fontsize=10)
    return figure


def outline(parent: Array, rate: Array, roots: int, most: int) -> Order:
    """(latent, depth) of the largest trees, depth first, children by firing rate; at most `most` latents."""
    children: dict[int, list[int]] = {}
    for child in np.flatnonzero(parent >= 0).tolist():
        children.setdefault(int(parent[child]), []).append(child)
    children = {p: sorted(below, key=lambda c: rate[c])[::-1] for p, below in children.items()}
    trees = [depth_first(children, p) for p in children if parent[p] < 0]
    trees.sort(key=lambda lines: (-len(lines), lines[0]))
    return [line for lines in trees[:roots] for line in lines][:most]


@cache
def letters() -> Mapping[int, int]:
    """What matplotlib's font has, by code point."""
    return get_font(findfont("DejaVu Sans")).get_charmap()


def plain(label: str, most: int = 40) -> str:
    """A label that matplotlib draws as it is, with · for what is not printed or not in its font."""
    shown = "".join(c if c.isprintable() and ord(c) in letters() else "·" for c in label)
    return shown if len(shown) <= most else shown[: most - 1] + "…"
