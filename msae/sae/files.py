"""An SAE as a directory: cfg.json and sae_weights.safetensors, in the layout of SAELens 6 inference SAEs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msae.sae.model import MatryoshkaSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
READ_AS = {"architecture": "jumprelu", "apply_b_dec_to_input": True, "normalize_activations": "none"}
LAYOUT_VERSION = "6.54.12"  # of SAELens; it reads directories of versions before 6 another way
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def save_sae(sae: MatryoshkaSAE, directory: str | Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write the SAE for inference on raw activations, the scale folded in, float32, JSON and safetensors only.

    `cfg.json` has SAELens's keys (architecture `jumprelu`: active where pre > threshold); what it has no key for
    (prefixes, k, and the given metadata such as model_name, hook_name) is under `metadata`.
    Raises ValueError if no threshold is set or the disk is full; what was there is kept.
    """
    if sae.threshold.isnan().any():
        raise ValueError("this SAE has no threshold yet; train it or calibrate it before saving")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    folded = MatryoshkaSAE(sae.d_in, sae.d_sae, sae.prefixes, sae.k)
    folded.load_state_dict({name: t.detach().float().cpu() for name, t in sae.state_dict().items()}, strict=True)
    folded.fold_scale()
    config = {
        **READ_AS,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": LAYOUT_VERSION,
            "training_architecture": "matryoshka_batchtopk",
            "training_architecture_details": {"k": sae.k, "matryoshka_widths": sae.prefixes},
            "trained_with": "msae",
            **(metadata or {}),
        },
    }
    tensors = {name: getattr(folded, name).detach().contiguous() for name in TENSORS}
    _replace(directory / WEIGHTS, lambda path: save_file(tensors, path))
    _replace(directory / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    return directory


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, sync, rename: what was there stays until the new one is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error}; free space or choose another directory") from error


def load_sae(directory: str | Path, device: str | torch.device = "cpu") -> MatryoshkaSAE:
    """Read what `save_sae` wrote; metadata is at `sae.metadata`. Raises ValueError in one line for anything else."""
    directory = Path(directory)
    try:
        config = json.loads((directory / CONFIG).read_text())
        for key, value in READ_AS.items():
            if config[key] != value:
                raise ValueError(f"{key} is {config[key]!r}, expected {value!r}")
        details = config["metadata"]["training_architecture_details"]
        sae = MatryoshkaSAE(config["d_in"], config["d_sae"], details["matryoshka_widths"], details["k"])
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {CONFIG}; give the sae/ directory of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG} is not the configuration of a Matryoshka SAE: {error!s}") from None
    expected = {name: tuple(getattr(sae, name).shape) for name in TENSORS}
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != expected:
                raise ValueError(f"{directory / WEIGHTS} holds {found}, expected {expected} from {CONFIG}")
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{directory / WEIGHTS} cannot be read ({error}); export the SAE again") from None
    sae.load_state_dict(tensors, strict=False)
    sae.metadata = config["metadata"]
    return sae.to(device).eval()
