"""An SAE as a directory: cfg.json and sae_weights.safetensors, in the layout of SAELens 6 inference SAEs."""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msae.sae.model import MatryoshkaSAE, Sparsity

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT_VERSION = "6.54.12"  # of SAELens; it reads directories of versions before 6 another way
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
TRAINED_AS = {"batch_topk": "matryoshka_batchtopk", "topk": "topk", "jumprelu": "jumprelu"}
# SAELens's architectures that are read: what selects, unless metadata knows better. Of transcoders it has no topk.
ARCHITECTURES: dict[str, Sparsity] = {
    "jumprelu": "jumprelu",
    "topk": "topk",
    "standard": "l1",
    "jumprelu_transcoder": "jumprelu",
    "topk_transcoder": "topk",
    "transcoder": "l1",
}
WITHOUT_THRESHOLD = ("topk", "standard", "topk_transcoder", "transcoder")


def save_sae(sae: MatryoshkaSAE, directory: str | Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write the SAE for inference on raw activations, normalisation folded in, float32, JSON and safetensors only.

    `cfg.json` has SAELens's keys: architecture `jumprelu` (active where pre > threshold), `topk`, `standard` (a ReLU),
    or the transcoder of one; what it has no key for (prefixes, k, and metadata such as model_name, hook_name; the SAE's
    own unless given) is under `metadata`.
    Raises ValueError if no threshold is set or the disk is full; what was there is kept.
    """
    if sae.threshold.isnan().any() and sae.sparsity != "topk":
        raise ValueError("this SAE has no threshold yet; train it or calibrate it before saving")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # SAELens can rescale topk's pre-activations by decoder norms, and by default does, although they are folded to 1.
    is_unit = bool(((sae.W_dec.norm(dim=1) - 1).abs() < 1e-5).all())
    folded = raw_copy(sae, rescaled=sae.sparsity == "topk" and not sae.is_transcoder and is_unit)
    is_relu = sae.sparsity in ("l1", "log") and not folded.threshold.any()
    architecture = "topk" if sae.sparsity == "topk" else "standard" if is_relu else "jumprelu"
    of_transcoder = "transcoder" if is_relu else f"{architecture}_transcoder"
    known = {**sae.metadata, **(metadata or {})}
    topk = {"k": int(sae.k), "rescale_acts_by_decoder_norm": folded.rescale_acts_by_decoder_norm}
    config = {
        "architecture": of_transcoder if sae.is_transcoder else architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if str(known.get("hook_name")).endswith("hook_z") else "none",
        **({"d_out": sae.d_out} if sae.is_transcoder else {}),
        **(topk if sae.sparsity == "topk" else {}),
        "metadata": {
            "sae_lens_version": LAYOUT_VERSION,
            "training_architecture": TRAINED_AS.get(sae.sparsity, "standard"),
            **known,
            "training_architecture_details": {
                **(known.get("training_architecture_details") or {}),
                "k": sae.k,
                "matryoshka_widths": sae.prefixes,
            },
            "msae": {
                **(known.get("msae") or {}),
                "sparsity": sae.sparsity,
                "prefix_thresholds": thresholds_to_json(folded),
            },
        },
    }
    names = TENSORS[:-1] if config["architecture"] in WITHOUT_THRESHOLD else TENSORS
    tensors = {name: getattr(folded, name).detach().contiguous() for name in names}
    replace(directory / WEIGHTS, lambda path: save_file(tensors, path))
    replace(directory / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    return directory


def raw_copy(sae: MatryoshkaSAE, rescaled: bool = False) -> MatryoshkaSAE:
    """A float32 copy on the CPU that maps raw activations to raw ones, for files of any format.

    acts × ‖W_dec row‖ is folded too, unless the file can say that pre-activations are `rescaled` and nothing else has
    to be folded; a tensor that needs no folding keeps every bit.
    """
    copied = copy.deepcopy(sae).float().cpu()
    scales, means = (copied.scale, copied.target_scale), (copied.mean, copied.target_mean)
    if any(float(s) != 1 for s in scales) or any(bool(m.any()) for m in means):
        copied.fold()
    elif copied.rescale_acts_by_decoder_norm and not rescaled:
        copied.fold_decoder_norm()
    return copied


def replace(path: Path, write: Callable[[Path], object]) -> None:
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
    """Read what `save_sae` or SAELens 6 wrote for inference; metadata is at `sae.metadata`.

    An SAE without Matryoshka widths has one prefix. Raises ValueError in one line for anything else.
    """
    directory = Path(directory)
    try:
        config = json.loads((directory / CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        sae = from_config(config)
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {CONFIG}; give the sae/ directory of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / CONFIG} is not the configuration of a Matryoshka SAE: {error!s}") from None
    names = TENSORS[:-1] if config["architecture"] in WITHOUT_THRESHOLD else TENSORS
    sae.load_state_dict(read_tensors(directory / WEIGHTS, {n: tuple(getattr(sae, n).shape) for n in names}), False)
    return sae.to(device).eval()


def from_config(config: dict[str, Any]) -> MatryoshkaSAE:
    """The untrained SAE that a SAELens cfg.json describes. Raises ValueError, KeyError or TypeError for others."""
    architecture, metadata = config["architecture"], config["metadata"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
    if (normalise := config.get("normalize_activations", "none")) != "none":
        raise ValueError(f"normalize_activations is {normalise!r}, expected 'none'; fold it into the weights first")
    details, ours = metadata.get("training_architecture_details") or {}, metadata.get("msae") or {}
    sparsity = ours.get("sparsity", ARCHITECTURES[architecture])
    if "sparsity" not in ours and "batchtopk" in str(metadata.get("training_architecture")):
        sparsity = "batch_topk"
    if sparsity not in get_args(Sparsity):
        raise ValueError(f"metadata.msae.sparsity is {sparsity!r}, expected one of {', '.join(get_args(Sparsity))}")
    d_sae = config["d_sae"]
    sae = MatryoshkaSAE(
        config["d_in"],
        d_sae,
        details.get("matryoshka_widths") or [d_sae],
        config.get("k") or details.get("k") or min(d_sae, max(1.0, metadata.get("l0") or 1.0)),
        d_out=config["d_out"] if architecture.endswith("transcoder") else None,
        sparsity=sparsity,
        rescale_acts_by_decoder_norm=architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm")),
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
    )
    sae.metadata = metadata
    thresholds_from_json(sae, ours.get("prefix_thresholds"))
    return sae


def thresholds_to_json(sae: MatryoshkaSAE) -> list[float | None]:
    """`prefix_thresholds` with None for those that are not set, since JSON has no NaN."""
    return [None if math.isnan(t) else t for t in sae.prefix_thresholds.tolist()]


def thresholds_from_json(sae: MatryoshkaSAE, thresholds: list[float | None] | None) -> None:
    """Set `prefix_thresholds`; those of other prefixes, or none, leave them not set."""
    if thresholds is not None and len(thresholds) == len(sae.prefixes):
        sae.prefix_thresholds.copy_(torch.tensor([math.nan if t is None else t for t in thresholds]))


def read_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Exactly these tensors of a safetensors file, float32. Raises ValueError in one line if others are there."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != expected:
                raise ValueError(f"{path} holds {found}, expected {expected} from {CONFIG}")
            return {name: file.get_tensor(name).float() for name in expected}
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); export the SAE again") from None
