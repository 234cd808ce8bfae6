"""The sparse autoencoder as plain torch: weights, encode, decode, prefixes, sparsity, loss, files."""

from msae.sae.auxk import AuxK, auxk_loss
from msae.sae.files import load_sae, save_sae
from msae.sae.initial import geometric_median
from msae.sae.loss import DenseCode, Loss, Objective, encode_for_training, matryoshka_loss
from msae.sae.model import MatryoshkaSAE
from msae.sae.prefixes import pareto_prefixes, resolve_prefixes
from msae.sae.sparse import SparseCode
from msae.sae.sparsity import L0Controller, batch_topk, jumprelu, quantile_thresholds, topk

__all__ = [
    "AuxK",
    "DenseCode",
    "L0Controller",
    "Loss",
    "MatryoshkaSAE",
    "Objective",
    "SparseCode",
    "auxk_loss",
    "batch_topk",
    "encode_for_training",
    "geometric_median",
    "jumprelu",
    "load_sae",
    "matryoshka_loss",
    "pareto_prefixes",
    "quantile_thresholds",
    "resolve_prefixes",
    "save_sae",
    "topk",
]
