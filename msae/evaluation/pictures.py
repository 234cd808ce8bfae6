"""Pictures of what was learned, drawn without a display."""

from matplotlib.figure import Figure
from torch import Tensor

from msae.evaluation.truth import cosines, match


def decoder_against_truth(arms: dict[str, Tensor], features: Tensor, parent: Tensor) -> Figure:
    """cos(decoder row, true feature) of each arm [d_sae, d_in], latents and features ordered by the tree.

    A perfect dictionary is the diagonal; a child's latent that absorbed its parent shows a second, smaller square in
    the parent's column, a parent that hedges shows its children in its row.
    """
    order: list[int] = []
    for root in (parent < 0).nonzero().flatten().tolist():
        order += [root, *(parent == root).nonzero().flatten().tolist()]
    figure = Figure(figsize=(0.6 + 4.6 * len(arms), 4.9), layout="constrained")
    axes = figure.subplots(1, len(arms), squeeze=False)[0]
    image = None
    for axis, (name, W_dec) in zip(axes, arms.items(), strict=True):
        cos = cosines(W_dec.detach().cpu(), features)
        latents, matched = match(cos)
        latent_of = dict(zip(matched.tolist(), latents.tolist(), strict=True))
        rows = [latent_of[f] for f in order if f in latent_of]
        image = axis.imshow(cos[rows][:, order].numpy(), cmap="RdBu", vmin=-1, vmax=1)
        labels = [f"{'  └ ' if parent[f] >= 0 else ''}{f}" for f in order]
        axis.set_xticks(range(len(order)), [str(f) for f in order], fontsize=6, rotation=90)
        axis.set_yticks(range(len(rows)), labels[: len(rows)], fontsize=6, family="monospace")
        axis.set(title=name, xlabel="true feature", ylabel="latent, by the feature it matches")
    assert image is not None
    figure.colorbar(image, ax=list(axes), label="cosine", shrink=0.8)
    return figure


def lines(panels: dict[str, dict[str, list[tuple]]], xlabel: str, log_x: bool = False) -> Figure:
    """A panel for each y label, with a line through (x, mean, low, high) for each label; x may be a category."""
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(0.6 + 3.8 * across, 0.6 + 3.1 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (ylabel, arms) in zip(axes, panels.items(), strict=False):
        for label, points in arms.items():
            xs, means, lows, highs = map(list, zip(*points, strict=True))
            below = [mean - low for mean, low in zip(means, lows, strict=True)]
            above = [high - mean for mean, high in zip(means, highs, strict=True)]
            axis.errorbar(xs, means, (below, above), marker="o", markersize=4, capsize=3, label=label)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        if log_x:
            axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    if any(label for arms in panels.values() for label in arms):
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure
