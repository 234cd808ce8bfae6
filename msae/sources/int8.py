"""Rows in eight bits: a scale for each row."""

import torch
from torch import Tensor


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(q [rows, d_in] int8, scales [rows] float32): scale = max|x| / 127 of its row, q = round(x / scale).

    |x − q · scale| ≤ scale / 2, up to the 2⁻¹⁶ of scale that float32 rounds. Works on any device. A row with NaN or Inf
    gets a scale that is not finite: a harvest refuses to write it.
    """
    rows = rows.float()
    scales = (rows.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros is zeros
    return (rows / scales[:, None]).round().to(torch.int8), scales


def dequantise(q: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """q · scale [rows, d_in] float32, into `out` if given, of tensors on the CPU."""
    out = torch.empty(q.shape) if out is None else out
    values = out.numpy()  # NumPy's loops start none of torch's threads; a product of mixed types would be slower
    values[...] = q.numpy()
    values *= scales.numpy()[:, None]
    return out
