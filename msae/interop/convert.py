"""What all formats need: a configuration file, errors of one line, b_dec on the input or not, one threshold for all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from msae.sae import MatryoshkaSAE


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration file as it is. Raises ValueError in one line if it is missing or no JSON object."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; give the directory that holds it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected a JSON object")
    return config


@contextmanager
def explained(problem: str) -> Iterator[None]:
    """Raise whatever another library's file makes fail as a ValueError in one line, `problem` first."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{problem}: {' '.join(str(error).split())}") from None


@torch.no_grad()
def move_b_dec(sae: MatryoshkaSAE, to_input: bool) -> None:
    """Subtract b_dec from the input or not, without changing pre: b_dec W_enc moves into or out of b_enc."""
    if sae.apply_b_dec_to_input != to_input:
        shift = sae.b_dec.double() @ sae.W_enc.double()
        sae.b_enc.copy_(sae.b_enc.double() + (shift if to_input else -shift))
        sae.apply_b_dec_to_input = to_input


def common_threshold(sae: MatryoshkaSAE) -> float | None:
    """Return the threshold that all latents share (NaN while it is not set), None if they differ."""
    thresholds = sae.threshold.detach()
    is_common = bool((thresholds == thresholds[0]).all() or thresholds.isnan().all())
    return float(thresholds[0]) if is_common else None
