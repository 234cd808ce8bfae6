"""Pictures of what was learned, drawn without a display."""

from itertools import cycle
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from msae.data.shards import Shards
from msae.evaluation.matching import Match, cosines, match
from msae.evaluation.truth import Codes, at_features, firing, latent_codes, true_codes
from msae.sae import MatryoshkaSAE

Points = list[tuple[Any, float, float, float]]  # (x, mean, low, high); x is a number, or a word
# Okabe and Ito's colours, which the colour-blind tell apart, with markers that print in grey
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]


def tree_order(parent: Tensor, most: int) -> list[tuple[int, int]]:
    """(feature, depth) of the first whole trees, depth first, then of features that stand alone; at most `most`.

    A first tree with more features than that is cut.
    """
    children: dict[int, list[int]] = {}
    for feature, above in enumerate(parent.tolist()):
        children.setdefault(above, []).append(feature)
    order: list[tuple[int, int]] = []
    for root in sorted(children[-1], key=lambda root: root not in children):
        tree, waiting = [], [(root, 0)]
        while waiting:
            feature, depth = waiting.pop()
            tree.append((feature, depth))
            waiting += [(child, depth + 1) for child in reversed(children.get(feature, []))]
        if order and len(order) + len(tree) > most:
            break
        order += tree
    return order[:most]


def name_columns(axis: Axes, order: list[tuple[int, int]]) -> None:
    """The features' numbers below the columns; the rows unnamed."""
    size = 7 if len(order) <= 24 else 5
    axis.set_xticks(range(len(order)), [str(feature) for feature, _ in order], fontsize=size, rotation=90)
    axis.set_yticks([])
    axis.set_xlabel("true feature")


def name_rows(axis: Axes, order: list[tuple[int, int]]) -> None:
    """The features' numbers beside the rows, indented by their depth."""
    names = [f"{'  ' * depth}{'└ ' if depth else ''}{feature}" for feature, depth in order]
    names = [name.ljust(max(map(len, names))) for name in names]
    axis.set_yticks(range(len(order)), names, fontsize=7 if len(order) <= 24 else 5, family="monospace")


def decoder_against_truth(
    arms: dict[str, Tensor],
    features: Tensor,
    parent: Tensor,
    matches: dict[str, Match] | None = None,
    most: int = 60,
) -> Figure:
    """cos(decoder row, true feature) of each arm [d_sae, d_in], latents and features ordered by the tree.

    A perfect dictionary is the diagonal; a child's latent that absorbed its parent shows a second, smaller square in
    the parent's column, a parent that hedges shows its children in its row. Of large forests the first trees alone,
    `most` features; a feature without a latent has a grey row. `matches` are made unless they are given.
    """
    order = tree_order(parent, most)
    shown = torch.tensor([feature for feature, _ in order])
    side = max(4.2, 0.1 * len(order))
    figure = Figure(figsize=(1.4 + side * len(arms), 0.7 + side), layout="constrained")
    axes = figure.subplots(1, len(arms), squeeze=False)[0]
    for axis, (name, W_dec) in zip(axes, arms.items(), strict=True):
        W_dec = W_dec.detach().cpu()
        found = match(W_dec, features) if matches is None else matches[name]
        latent = found.latent_of(len(features))[shown]
        cos = cosines(W_dec[latent], features[shown])
        cos[latent < 0] = torch.nan
        axis.set_facecolor("0.85")
        image = axis.imshow(cos.numpy(), cmap="RdBu", vmin=-1, vmax=1)
        name_columns(axis, order)
        axis.set_title(name)
    name_rows(axes[0], order)
    axes[0].set_ylabel("latent, by the feature it matches")
    figure.colorbar(image, ax=list(axes), label="cosine", shrink=0.8)
    return figure


def rows_to_show(truth: Codes, order: list[tuple[int, int]], rows: int) -> list[int]:
    """Rows in which the shown features are active, in their order; each is seen with as few others as can be."""
    shown = torch.tensor([feature for feature, _ in order])
    truth = truth.where(torch.isin(truth.index, shown))
    others = truth.row.bincount(minlength=truth.rows)
    each, rest = divmod(rows, len(order))
    chosen: list[int] = []
    for place, feature in enumerate(shown.tolist()):
        candidates = truth.row[truth.index == feature].tolist()
        candidates = sorted(set(candidates) - set(chosen), key=lambda row: (int(others[row]), row))
        chosen += candidates[: each + (place < rest)]
    return chosen


def dense(codes: Codes, rows: list[int], features: list[int]) -> Tensor:
    """These rows and columns of the codes, as a matrix."""
    row, column = torch.full((codes.rows,), -1), torch.full((codes.size,), -1)
    row[rows], column[features] = torch.arange(len(rows)), torch.arange(len(features))
    at = row[codes.row], column[codes.index]
    inside = (at[0] >= 0) & (at[1] >= 0)
    return torch.zeros(len(rows), len(features)).index_put_((at[0][inside], at[1][inside]), codes.value[inside])


def activations_side_by_side(codes: dict[str, Codes], parent: Tensor, rows: int = 40, most: int = 40) -> Figure:
    """Activations of the same held-out rows, one panel each: the truth, which comes first, then the arms.

    Columns are the features of the first trees, depth first; an arm's codes are those `at_features`. Colour is
    activation · ‖direction‖, so that an exact SAE looks like the truth.
    """
    truth = next(iter(codes.values()))
    order = tree_order(parent, most)
    shown = [feature for feature, _ in order]
    chosen = rows_to_show(truth, order, rows)
    panels = {name: dense(of, chosen, shown) for name, of in codes.items()}
    norm = Normalize(0, max(float(panel.max()) for panel in panels.values()))
    width, height = max(2.4, 0.1 * len(order)), max(3.2, 0.1 * len(chosen))
    figure = Figure(figsize=(1.2 + width * len(panels), 1 + height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        panel[panel == 0] = torch.nan  # white
        image = axis.imshow(panel.numpy(), cmap="magma_r", norm=norm, aspect="auto", interpolation="nearest")
        name_columns(axis, order)
        for place, (_, depth) in enumerate(order):
            if place and (depth == 0 and (order[place - 1][1] or order[(place + 1) % len(order)][1])):
                axis.axvline(place - 0.5, color="0.6", linewidth=0.6)  # where a tree begins
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
    every = list(dict.fromkeys(p[0] for series in panels.values() for points in series.values() for p in points))
    words = any(isinstance(x, str) for x in every)
    if log_x and (words or min(every) <= 0):
        raise ValueError(f"log_x needs positive numbers, not {every}")
    labels = list(dict.fromkeys(label for series in panels.values() for label in series))
    style = dict(zip(labels, cycle(STYLES), strict=False))
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    down = -(-len(panels) // columns)
    figure = Figure(figsize=(0.4 + 3.6 * columns, 0.5 + 2.9 * down), layout="constrained")
    axes = figure.subplots(down, columns, squeeze=False).flatten()
    for axis, (ylabel, series) in zip(axes, panels.items(), strict=False):
        for label, points in series.items():
            x, mean, low, high = zip(*(points if words else sorted(points)), strict=True)
            colour, marker = style[label]
            if words:  # beside each other
                aside = 0.6 * ((labels.index(label) + 0.5) / len(labels) - 0.5)
                bars = [
                    [m - a for m, a in zip(mean, low, strict=True)],
                    [b - m for m, b in zip(mean, high, strict=True)],
                ]
                at = [every.index(word) + aside for word in x]
                axis.errorbar(at, mean, bars, color=colour, marker=marker, linestyle="", capsize=2.5, label=label)
            else:
                axis.plot(x, mean, color=colour, marker=marker, markersize=4, label=label)
                axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        if references and ylabel in references:
            axis.axhline(references[ylabel], color="0.4", linestyle="--", linewidth=1)
        name_x(axis, every, words, log_x)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if len(labels) > 1:
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def name_x(axis: Axes, every: list[Any], words: bool, log_x: bool) -> None:
    """Words as they are; on a logarithmic axis the values themselves, where they are few."""
    if words:
        long = max(len(str(x)) for x in every) * len(every) > 36
        axis.set_xticks(range(len(every)), every, rotation=30 if long else 0, ha="right" if long else "center")
        axis.set_xlim(-0.5, len(every) - 0.5)
    elif log_x:
        axis.set_xscale("log")
        if len(every) <= 6:
            axis.set_xticks(sorted(every), [f"{int(x) if x == int(x) else x:,}" for x in sorted(every)])
            axis.minorticks_off()


@torch.no_grad()
def truth_pictures(
    saes: dict[str, MatryoshkaSAE], shards: Shards, rows: int = 8192, most: int = 4
) -> dict[str, Figure]:
    """The first `most` SAEs against the truth of their shards: `truth`, their directions, and `activations`.

    Activations are those of the last `rows` held-out rows at most, which no threshold was calibrated on.
    """
    truth = shards.truth
    assert truth is not None, "shards without a truth"
    shown = dict(list(saes.items())[:most])
    features, parent = truth["features"], truth["parent"]
    matches = {name: match(sae.W_dec, features) for name, sae in shown.items()}
    last = len(shards.rows("val")) - 1
    x = shards.activations("val", last)[-rows:].float()
    codes = {"truth": true_codes(truth, sum(shards.rows("val")) - len(x), len(x))}
    for name, sae in shown.items():
        codes[name] = at_features(firing(latent_codes(sae, x)), matches[name], len(features))
    return {
        "truth": decoder_against_truth({n: sae.W_dec for n, sae in shown.items()}, features, parent, matches),
        "activations": activations_side_by_side(codes, parent),
    }
