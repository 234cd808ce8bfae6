"""The sparse autoencoder as plain torch: weights, encode, decode, prefixes, loss, files."""

from msae.sae.files import load_sae, save_sae
from msae.sae.loss import Loss, auxk_loss, matryoshka_loss
from msae.sae.model import MatryoshkaSAE, resolve_prefixes
from msae.sae.sparsity import batch_topk, quantile_threshold

__all__ = [
    "Loss",
    "MatryoshkaSAE",
    "auxk_loss",
    "batch_topk",
    "load_sae",
    "matryoshka_loss",
    "quantile_threshold",
    "resolve_prefixes",
    "save_sae",
]
