"""Draws figures: decoders and activations against the truth, metrics against a setting; needs no display."""

from itertools import cycle
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy import subtract
from torch import Tensor

from msae.data.rows import Rows
from msae.evaluation.matching import Match, cosines, match
from msae.evaluation.truth import FLOOR, at_features, true_codes
from msae.hierarchy.firings import as_csr, latent_codes
from msae.sae import MatryoshkaSAE, SparseCode

Order = list[tuple[int, int]]  # (feature, depth in its tree)
Points = list[tuple[Any, float, float, float]]  # (x, mean, low, high); x is a number, or a word
# Okabe and Ito's colours, which the colour-blind tell apart, with markers that print in grey
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]


def tree_order(parent: Tensor, most: int) -> Order:
    """The features of the first whole trees, depth first, then those that stand alone; at most `most`.

    A first tree with more features than that is cut.
    """
    children: dict[int, list[int]] = {}
    for feature, above in enumerate(parent.tolist()):
        children.setdefault(above, []).append(feature)
    order: Order = []
    for root in sorted(children[-1], key=lambda root: root not in children):
        tree = depth_first(children, root)
        if order and len(order) + len(tree) > most:
            break
        order += tree
    return order[:most]


def depth_first(children: dict[int, list[int]], root: int) -> Order:
    """A tree from its root on, each with its depth; deeper than Python's stack may be."""
    order, stack = [], [(root, 0)]
    while stack:
        at, depth = stack.pop()
        order.append((at, depth))
        stack += [(child, depth + 1) for child in reversed(children.get(at, []))]
    return order


def name_columns(axis: Axes, order: Order) -> None:
    """Write the features' numbers below the columns, and nothing beside the rows."""
    axis.set_xticks(range(len(order)), [str(feature) for feature, _ in order], fontsize=font_size(order), rotation=90)
    axis.set_yticks([])
    axis.set_xlabel("true feature")


def name_rows(axis: Axes, order: Order) -> None:
    """Write the features' numbers beside the rows, indented by their depth."""
    names = [f"{'  ' * depth}{'└ ' if depth else ''}{feature}" for feature, depth in order]
    names = [name.ljust(max(map(len, names))) for name in names]
    axis.set_yticks(range(len(order)), names, fontsize=font_size(order), family="monospace")


def font_size(order: Order) -> int:
    """Smaller where many features are shown."""
    return 7 if len(order) <= 24 else 5


def decoder_against_truth(
    decoders: dict[str, Tensor], matches: dict[str, Match], features: Tensor, parent: Tensor, most: int = 60
) -> Figure:
    """cos(decoder row, true feature) of each decoder [d_sae, d_in], latents and features ordered by the tree.

    A perfect dictionary is the diagonal. A child's latent that absorbed its parent shows a second, smaller square in
    the parent's column; a parent that hedges shows its children in its row. Of large forests only the first trees are
    drawn, `most` features; a feature without a latent has a grey row.
    """
    order = tree_order(parent, most)
    shown = torch.tensor([feature for feature, _ in order])
    side = max(4.2, 0.1 * len(order))
    figure = Figure(figsize=(1.4 + side * len(decoders), 0.7 + side), layout="constrained")
    axes = figure.subplots(1, len(decoders), squeeze=False)[0]
    for axis, (name, W_dec) in zip(axes, decoders.items(), strict=True):
        latent = matches[name].latent_of(len(features))[shown]
        cos = cosines(W_dec.detach().cpu()[latent], features[shown])
        cos[latent < 0] = torch.nan
        axis.set_facecolor("0.85")
        image = axis.imshow(cos.numpy(), cmap="RdBu", vmin=-1, vmax=1)
        name_columns(axis, order)
        axis.set_title(name)
    name_rows(axes[0], order)
    axes[0].set_ylabel("latent, by the feature it matches")
    figure.colorbar(image, ax=list(axes), label="cosine", shrink=0.8)
    return figure


def rows_to_show(truth: SparseCode, order: Order, rows: int) -> list[int]:
    """Rows in which the shown features are active, feature by feature, each with as few others as can be."""
    shown = torch.tensor([feature for feature, _ in order])
    truth = truth.where(torch.isin(truth.latents, shown))
    others = truth.offsets.diff()
    each, rest = divmod(rows, len(order))
    chosen: list[int] = []
    for column, feature in enumerate(shown.tolist()):
        candidates = truth.rows[truth.latents == feature].tolist()
        candidates = sorted(set(candidates) - set(chosen), key=lambda row: (int(others[row]), row))
        chosen += candidates[: each + (column < rest)]
    return chosen


def activations_side_by_side(codes: dict[str, SparseCode], parent: Tensor, rows: int = 40, most: int = 40) -> Figure:
    """Activations of the same held-out rows, one panel a code: the truth, which comes first, then the arms.

    Columns are the features of the first trees, depth first; an arm's code is that `at_features`. Colour is
    activation · ‖direction‖, so that an exact SAE looks like the truth.
    """
    truth = next(iter(codes.values()))
    order = tree_order(parent, most)
    shown = [feature for feature, _ in order]
    chosen = rows_to_show(truth, order, rows)
    panels = {name: as_csr(code)[chosen][:, shown].toarray() for name, code in codes.items()}
    norm = Normalize(0, max(float(panel.max()) for panel in panels.values()))
    width, height = max(2.4, 0.1 * len(order)), max(3.2, 0.1 * len(chosen))
    figure = Figure(figsize=(1.2 + width * len(panels), 1 + height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        panel[panel == 0] = torch.nan  # white
        image = axis.imshow(panel, cmap="magma_r", norm=norm, aspect="auto", interpolation="nearest")
        name_columns(axis, order)
        for column, (_, depth) in enumerate(order):
            if column and depth == 0 and (order[column - 1][1] or order[(column + 1) % len(order)][1]):
                axis.axvline(column - 0.5, color="0.6", linewidth=0.6)  # where a tree begins
        axis.set_title(name)
    axes[0].set_ylabel("held-out row")
    figure.colorbar(image, ax=list(axes), label="activation · ‖direction‖", shrink=0.8)
    return figure


def lines(
    panels: dict[str, dict[str, Points]],
    xlabel: str,
    log_x: bool = False,
    references: dict[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Means with their intervals against x, a panel for each metric: {ylabel: {label: [(x, mean, low, high), …]}}.

    Numbers are joined by lines in shaded intervals; words, in the order in which they come, are points with bars.
    `references` draws a dashed line for some metrics. Raises ValueError where log_x meets an x that is not positive.
    """
    every_x = list(dict.fromkeys(p[0] for series in panels.values() for points in series.values() for p in points))
    are_words = any(isinstance(x, str) for x in every_x)
    if log_x and (are_words or min(every_x) <= 0):
        raise ValueError(f"log_x needs positive numbers, not {every_x}")
    labels = list(dict.fromkeys(label for series in panels.values() for label in series))
    styles = dict(zip(labels, cycle(STYLES), strict=False))
    handles: dict[str, Any] = {}
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(0.4 + 3.6 * columns, 0.5 + 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (ylabel, series) in zip(axes, panels.items(), strict=False):
        for label, points in series.items():
            x, mean, low, high = zip(*(points if are_words else sorted(points)), strict=True)
            colour, marker = styles[label]
            if are_words:  # series beside each other
                shift = 0.6 * ((labels.index(label) + 0.5) / len(labels) - 0.5)
                bars, at = [subtract(mean, low), subtract(high, mean)], [every_x.index(word) + shift for word in x]
                handles[label] = axis.errorbar(
                    at, mean, bars, color=colour, marker=marker, linestyle="", capsize=2.5, label=label
                )
            else:
                (handles[label],) = axis.plot(x, mean, color=colour, marker=marker, markersize=4, label=label)
                axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        if references and ylabel in references:
            axis.axhline(references[ylabel], color="0.4", linestyle="--", linewidth=1)
        name_x(axis, every_x, are_words, log_x)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if len(labels) > 1:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def name_x(axis: Axes, every_x: list[Any], are_words: bool, log_x: bool) -> None:
    """Write words as they are; on a logarithmic axis the values themselves, where they are few."""
    if are_words:
        is_long = max(len(str(x)) for x in every_x) * len(every_x) > 36
        axis.set_xticks(
            range(len(every_x)), every_x, rotation=30 if is_long else 0, ha="right" if is_long else "center"
        )
        axis.set_xlim(-0.5, len(every_x) - 0.5)
    elif log_x:
        axis.set_xscale("log")
        if len(every_x) <= 6:
            axis.set_xticks(sorted(every_x), [f"{int(x) if x == int(x) else x:,}" for x in sorted(every_x)])
            axis.minorticks_off()


@torch.no_grad()
def truth_pictures(saes: dict[str, MatryoshkaSAE], shards: Rows, rows: int = 8192, most: int = 4) -> dict[str, Figure]:
    """Draws the first `most` SAEs against the truth of their shards: `truth`, their directions, and `activations`.

    The activations are those of at most `rows` rows, the last held-out ones, on which no threshold was calibrated.
    """
    truth = shards.truth
    assert truth is not None, "shards without a truth"
    saes = dict(list(saes.items())[:most])
    features, parent = truth["features"], truth["parent"]
    matches = {name: match(sae.W_dec, features) for name, sae in saes.items()}
    x = shards.activations("val", len(shards.rows("val")) - 1)[-rows:].float()
    codes = {"truth": true_codes(truth, sum(shards.rows("val")) - len(x), len(x))}
    for name, sae in saes.items():
        codes[name] = at_features(latent_codes(sae, x).strong(FLOOR), matches[name], len(features))
    return {
        "truth": decoder_against_truth({n: sae.W_dec for n, sae in saes.items()}, matches, features, parent),
        "activations": activations_side_by_side(codes, parent),
    }
