"""Where Triton's functions are tested: on a GPU if there is one, otherwise in Triton's interpreter on the CPU."""

import os

import torch

DEVICE = os.environ.get("MSAE_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def device_of(kernels: str) -> str:
    """Where an SAE with these kernels is tested; all but Triton's on the CPU."""
    return DEVICE if kernels == "triton" else "cpu"
