# ruff: noqa: F401
"""The sparse autoencoder as plain torch: weights, encode, decode, prefixes, sparsity, objective, files."""

from msae.sae.auxk import AuxK, Dead, auxk_loss
from msae.sae.fast import automatic, choose_kernels
from msae.sae.fast.adam import DictionaryAdam
from msae.sae.fast.code import SparseCode, encode_for_training, encode_sparse, prefix_errors, reconstruct
from msae.sae.fast.loss import matryoshka_loss
from msae.sae.files import load_sae, save_sae
from msae.sae.forms import fold, fold_decoder_norm, permute, truncate
from msae.sae.initial import geometric_median
from msae.sae.model import MatryoshkaSAE
from msae.sae.objective import DenseCode, Loss, Objective
from msae.sae.prefixes import pareto_prefixes, resolve_prefixes
from msae.sae.sparsity import L0Controller, Sparsity, batch_topk, jumprelu, quantile_thresholds, topk
