"""The sparse autoencoder as plain torch: weights, encode, decode, prefixes, sparsity, loss, files."""

from msae.sae.adam import DictionaryAdam
from msae.sae.auxk import AuxK, auxk_loss
from msae.sae.files import load_sae, save_sae
from msae.sae.initial import geometric_median
from msae.sae.loss import DenseCode, Loss, Objective, encode_for_training, matryoshka_loss, prefix_errors
from msae.sae.model import MatryoshkaSAE
from msae.sae.prefixes import pareto_prefixes, resolve_prefixes
from msae.sae.sparse import SparseCode, choose_kernels, encode_sparse, reconstruct
from msae.sae.sparsity import L0Controller, batch_topk, jumprelu, quantile_thresholds, topk

__all__ = [
    "AuxK",
    "DenseCode",
    "DictionaryAdam",
    "L0Controller",
    "Loss",
    "MatryoshkaSAE",
    "Objective",
    "SparseCode",
    "auxk_loss",
    "batch_topk",
    "choose_kernels",
    "encode_for_training",
    "encode_sparse",
    "geometric_median",
    "jumprelu",
    "load_sae",
    "matryoshka_loss",
    "pareto_prefixes",
    "prefix_errors",
    "quantile_thresholds",
    "reconstruct",
    "resolve_prefixes",
    "save_sae",
    "topk",
]
