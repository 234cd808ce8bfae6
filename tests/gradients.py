"""Gradients of a loss, and whether two ways to it have the same."""

import pytest
import torch
from torch import Tensor

from msae.sae import Loss, MatryoshkaSAE
from msae.sae.fast import triton

NO_TRITON = pytest.mark.skipif(triton.library() is None, reason="triton is not installed")


def gradients(sae: MatryoshkaSAE, loss: Loss) -> dict[str, Tensor]:
    """Those of the parameters that have any."""
    sae.zero_grad()
    loss.total.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Of the same parameters, within a share of each one's largest."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = tolerance * float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
