"""Which latents may be active: BatchTopK while training, one threshold afterwards."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def batch_topk(pre: Float[Tensor, "*batch d_sae"], k: float) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k · tokens largest positive pre-activations of the whole batch, set all others to zero.

    BatchTopK (Bussmann et al. 2024, arXiv 2412.06410, eq. 4). A token is every position of the leading dimensions,
    so a [sequences, positions, d_sae] input keeps k · sequences · positions entries. Under several devices each one
    selects within its own batch. Gradients reach the kept entries alone.
    """
    acts = pre.relu().flatten()
    tokens = pre.numel() // pre.shape[-1]
    keep = min(round(k * tokens), acts.numel())
    values, index = acts.topk(keep, sorted=False)
    return torch.zeros_like(acts).scatter(0, index, values).view_as(pre)


@torch.no_grad()
def quantile_threshold(batches: Iterable[Float[Tensor, "_ d_sae"]], k: float, tokens: int) -> float:
    """The threshold above which k pre-activations a token lie on average: the (k · tokens + 1)-th largest of all.

    Exact in one streaming pass that holds k · tokens numbers, however they are spread over the batches. `tokens` is the
    number of rows that the batches hold together. At least 0, since a latent is never negative. Raises ValueError if
    there are no tokens.
    """
    if tokens <= 0:
        raise ValueError("there are no held-out rows to calibrate the threshold on; harvest more of them")
    wanted = round(k * tokens) + 1
    largest: Tensor | None = None
    bar = 0.0
    for pre in batches:
        candidates = pre[pre > bar].float()
        merged = candidates if largest is None else torch.cat([largest, candidates])
        largest = merged.topk(wanted, sorted=False).values if len(merged) > wanted else merged
        if len(largest) == wanted:
            bar = float(largest.min())
    return bar
