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
