"""The device to compute on, by the name that a setting gives it."""

from typing import Literal

import torch

Device = Literal["auto", "cpu", "cuda"]


def pick_device(device: str) -> torch.device:
    """The device of a name; `auto` is CUDA if there is one, otherwise the CPU.

    CUDA without a number is the current device now: in another thread another one may be current.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    picked = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if picked == torch.device("cuda") else picked


def check_device(device: str, key: str = "device") -> None:
    """Raises ValueError in one line if the setting `key` asks for CUDA and there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"{key}={device}, but PyTorch sees no GPU; give {key}=cpu")
