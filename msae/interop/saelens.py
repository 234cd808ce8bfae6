"""SAELens's form for training: k and the widths at the top of cfg.json, one float64 threshold for all latents."""

import math
from pathlib import Path
from typing import Any

import torch

from msae.interop.convert import common_threshold, explained, read_json
from msae.sae import MatryoshkaSAE
from msae.sae.files import (
    CONFIG,
    LAYOUT_VERSION,
    TENSORS,
    WEIGHTS,
    read_tensors,
    refuse_scale,
    reshaped,
    thresholds_from_json,
    thresholds_to_json,
    write_sae,
)
from msae.sae.forms import folded_copy

ARCHITECTURES = ("matryoshka_batchtopk", "batchtopk")
KEPT = "saelens_training"  # under metadata: what this form has and an SAE of ours has not
OWN = ("d_in", "d_sae", "dtype", "k", "matryoshka_widths", "rescale_acts_by_decoder_norm", "metadata")


def load_training(directory: str | Path) -> MatryoshkaSAE:
    """Read what SAELens's `TrainingSAE.save_model` wrote for a BatchTopK SAE, Matryoshka or not.

    A threshold of 0, where SAELens starts, is not set yet. Raises ValueError in one line for anything else.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    with explained(f"{directory / CONFIG} is not the configuration of a BatchTopK SAE in training"):
        sae = _from_config(config)
    shapes = {name: tuple(getattr(sae, name).shape) for name in TENSORS[:-1]}
    tensors = read_tensors(directory / WEIGHTS, {**shapes, "topk_threshold": ()})
    threshold = float(tensors.pop("topk_threshold"))
    sae.load_state_dict(tensors, strict=False)
    is_set = threshold != 0 or not bool(sae.prefix_thresholds.isnan().all())
    sae.threshold.fill_(threshold if is_set else math.nan)
    sae.metadata[KEPT] = {key: value for key, value in config.items() if key not in OWN} | {"threshold": threshold}
    return sae.eval()


def _from_config(config: dict[str, Any]) -> MatryoshkaSAE:
    if config["architecture"] not in ARCHITECTURES:
        raise ValueError(f"architecture is {config['architecture']!r}, expected one of {', '.join(ARCHITECTURES)}")
    refuse_scale(config, "call fold_activation_norm_scaling_factor in SAELens and save it again")
    sae = MatryoshkaSAE(
        config["d_in"],
        config["d_sae"],
        config.get("matryoshka_widths") or [config["d_sae"]],
        config["k"],
        rescale_acts_by_decoder_norm=config["rescale_acts_by_decoder_norm"],
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
    )
    sae.metadata = config.get("metadata") or {}
    thresholds_from_json(sae, (sae.metadata.get("msae") or {}).get("prefix_thresholds"))
    return sae


def save_training(sae: MatryoshkaSAE, directory: str | Path) -> Path:
    """Write the SAE as SAELens's trainer would, to go on training there; normalisation is folded into a copy first.

    What `load_training` read comes out again, every bit of every tensor and every key. Raises ValueError in one line
    for transcoders, other sparsities than `batch_topk`, and thresholds that differ between latents.
    """
    if sae.sparsity.name != "batch_topk" or sae.is_transcoder:
        kind = "a transcoder" if sae.is_transcoder else f"trained with sparsity={sae.sparsity.name}"
        raise ValueError(f"SAELens's training form holds BatchTopK autoencoders, this SAE is {kind}; use to=saelens")
    plain = folded_copy(sae, rescaled=True)
    threshold = common_threshold(plain)
    if threshold is None:
        raise ValueError("SAELens's training form has one threshold, those of this SAE differ; use to=saelens")
    kept = plain.metadata.pop(KEPT, {})  # from a copy
    exact = kept.pop("threshold", math.nan)  # float64
    if math.isnan(threshold):
        exact = 0.0
    elif float(torch.tensor(exact, dtype=torch.float32)) != threshold:
        exact = threshold
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    topk_threshold = torch.tensor(exact, dtype=torch.float64)
    write_sae(directory, _to_config(plain, kept), plain, TENSORS[:-1], topk_threshold=topk_threshold)
    return directory


def _to_config(plain: MatryoshkaSAE, kept: dict[str, Any]) -> dict[str, Any]:
    """Build cfg.json; `kept` is what `load_training` kept of the one it read."""
    metadata = plain.metadata
    is_nested = len(plain.prefixes) > 1 or kept.get("architecture") == "matryoshka_batchtopk"
    architecture = "matryoshka_batchtopk" if is_nested else "batchtopk"
    details = {
        **(metadata.get("training_architecture_details") or {}),
        "k": plain.k,
        "rescale_acts_by_decoder_norm": plain.rescale_acts_by_decoder_norm,
        "matryoshka_widths": plain.prefixes,
    }
    if not is_nested:
        del details["matryoshka_widths"]
    ours = metadata.get("msae") or {}
    if ours or not bool(plain.prefix_thresholds.isnan().all()):
        metadata["msae"] = {**ours, "prefix_thresholds": thresholds_to_json(plain)}
    return {
        "reshape_activations": reshaped(metadata),
        "device": "cpu",
        **details,
        **kept,
        "architecture": architecture,
        "d_in": plain.d_in,
        "d_sae": plain.d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": plain.apply_b_dec_to_input,
        "normalize_activations": "none",
        "metadata": {
            "sae_lens_version": LAYOUT_VERSION,
            **metadata,
            "training_architecture": architecture,
            "training_architecture_details": details,
        },
    }
