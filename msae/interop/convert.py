"""What formats ask of an SAE: a configuration, b_dec on the input or not, one threshold for all."""

import json
from pathlib import Path
from typing import Any

import torch

from msae.sae import MatryoshkaSAE


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file. Raises ValueError in one line if there is none or it is no JSON object."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; give the directory that holds it") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected a JSON object")
    return config


@torch.no_grad()
def move_b_dec(sae: MatryoshkaSAE, to_input: bool) -> None:
    """Subtract b_dec from the input or not, without changing pre: b_dec W_enc moves into or out of b_enc."""
    if sae.apply_b_dec_to_input != to_input:
        shift = sae.b_dec.double() @ sae.W_enc.double()
        sae.b_enc.copy_(sae.b_enc.double() + (shift if to_input else -shift))
        sae.apply_b_dec_to_input = to_input


def common_threshold(sae: MatryoshkaSAE) -> float | None:
    """The threshold that all latents share (NaN while it is not set), None if they differ."""
    values = sae.threshold.detach()
    same = bool((values == values[0]).all() or values.isnan().all())
    return float(values[0]) if same else None
