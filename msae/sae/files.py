"""An SAE as a directory: cfg.json and sae_weights.safetensors, in the layout of SAELens 6 inference SAEs."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msae.files import write, write_json
from msae.sae.forms import folded_copy
from msae.sae.model import MatryoshkaSAE
from msae.sae.sparsity import SPARSITIES, sparsity_as_plain

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT_VERSION = "6.54.12"  # of SAELens; it reads directories of versions before 6 another way
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
OF_TRANSCODER = {"standard": "transcoder"}  # SAELens's other names end in _transcoder
SPARSITY = {"jumprelu": "jumprelu", "topk": "topk", "standard": "l1"}  # of a file that SAELens wrote
UNIT_NORM = 1e-5  # how far the norm of a decoder row may be from 1


def save_sae(sae: MatryoshkaSAE, directory: str | Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write the SAE for inference on raw activations, normalisation folded in, float32, JSON and safetensors only.

    `cfg.json` has SAELens's keys: architecture `jumprelu` (active where pre > threshold), `topk`, `standard` (a ReLU),
    or the transcoder of one. What SAELens has no key for is under `metadata`: prefixes, k, and metadata such as
    model_name and hook_name, the SAE's own unless given.
    Raises ValueError if no threshold is set or the disk is full; files that exist are then kept.
    """
    refuse_unset_threshold(sae)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # SAELens rescales topk's pre-activations by decoder norms by default, although it folds these to 1.
    folded = folded_copy(sae, rescaled=sae.ranks_at_inference and not sae.is_transcoder and has_unit_rows(sae))
    architecture = sae.sparsity.architecture
    if architecture == "standard" and bool(folded.threshold.any()):
        architecture = "jumprelu"
    known = {**sae.metadata, **(metadata or {})}
    of_topk = {"k": int(sae.k), "rescale_acts_by_decoder_norm": folded.rescale_acts_by_decoder_norm}
    config = {
        "architecture": transcoder_of(architecture) if sae.is_transcoder else architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": reshaped(known),
        **({"d_out": sae.d_out} if sae.is_transcoder else {}),
        **(of_topk if architecture == "topk" else {}),
        "metadata": {
            "sae_lens_version": LAYOUT_VERSION,
            "training_architecture": sae.sparsity.trained_as,
            **known,
            "training_architecture_details": {
                **(known.get("training_architecture_details") or {}),
                "k": sae.k,
                "matryoshka_widths": sae.prefixes,
            },
            "msae": {
                **(known.get("msae") or {}),
                "sparsity": sparsity_as_plain(sae.sparsity),
                "prefix_thresholds": thresholds_to_json(folded),
            },
        },
    }
    write_sae(directory, config, folded, tensors_of(architecture))
    return directory


def refuse_unset_threshold(sae: MatryoshkaSAE) -> None:
    """Raises ValueError in one line while an SAE has no threshold that its inference needs."""
    if sae.threshold.isnan().any() and not sae.ranks_at_inference:
        raise ValueError("this SAE has no threshold yet; train it or calibrate it before saving")


def has_unit_rows(sae: MatryoshkaSAE) -> bool:
    """Whether every decoder row has norm 1."""
    return bool(((sae.W_dec.norm(dim=1) - 1).abs() < UNIT_NORM).all())


def reshaped(metadata: dict[str, Any]) -> str:
    """SAELens's word for how activations are flattened before they enter the SAE."""
    return "hook_z" if str(metadata.get("hook_name")).endswith("hook_z") else "none"


def transcoder_of(architecture: str) -> str:
    """SAELens's name of the transcoder of an architecture."""
    return OF_TRANSCODER.get(architecture, f"{architecture}_transcoder")


def tensors_of(architecture: str) -> tuple[str, ...]:
    """The tensors that a file of this architecture holds."""
    return TENSORS[:-1] if architecture in ("topk", "standard") else TENSORS


def write_sae(
    directory: Path, config: dict[str, Any], sae: MatryoshkaSAE, names: tuple[str, ...], **more: Tensor
) -> None:
    """Write weights and configuration in SAELens's layout, each as a whole file."""
    tensors = {name: getattr(sae, name).detach().contiguous() for name in names} | more
    write(directory / WEIGHTS, lambda path: save_file(tensors, path))
    write_json(directory / CONFIG, config, indent=2)


def load_sae(directory: str | Path, device: str | torch.device = "cpu") -> MatryoshkaSAE:
    """Read what `save_sae` or SAELens 6 wrote for inference; metadata is at `sae.metadata`.

    An SAE without Matryoshka widths has one prefix. Raises ValueError in one line for anything else.
    """
    directory = Path(directory)
    try:
        config = json.loads((directory / CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        sae, architecture = from_config(config)
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {CONFIG}; give the sae/ directory of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{directory / CONFIG} is not the configuration of a Matryoshka SAE: {reason}") from None
    shapes = {name: tuple(getattr(sae, name).shape) for name in tensors_of(architecture)}
    sae.load_state_dict(read_tensors(directory / WEIGHTS, shapes), strict=False)
    return sae.to(device).eval()


def from_config(config: dict[str, Any]) -> tuple[MatryoshkaSAE, str]:
    """The untrained SAE that a cfg.json describes, and its architecture (a transcoder's too, as `jumprelu`).

    Raises ValueError, KeyError or TypeError for anything else.
    """
    metadata = config["metadata"]
    details, ours = metadata.get("training_architecture_details") or {}, metadata.get("msae") or {}
    architectures = {*SPARSITY, *(mechanism.architecture for mechanism in SPARSITIES.values())}
    names = {name: name for name in sorted(architectures)} | {transcoder_of(name): name for name in architectures}
    if config["architecture"] not in names:
        raise ValueError(f"architecture is {config['architecture']!r}, expected one of {', '.join(names)}")
    architecture = names[config["architecture"]]
    refuse_scale(config, "fold it into the weights first")
    batch_topk = "batchtopk" in str(metadata.get("training_architecture"))
    sparsity = ours.get("sparsity", "batch_topk" if batch_topk else SPARSITY.get(architecture, architecture))
    d_sae = config["d_sae"]
    sae = MatryoshkaSAE(
        config["d_in"],
        d_sae,
        details.get("matryoshka_widths") or [d_sae],
        config.get("k") or details.get("k") or min(d_sae, max(1.0, metadata.get("l0") or 1.0)),
        d_out=config["d_out"] if config["architecture"] != architecture else None,
        sparsity=sparsity,
        rescale_acts_by_decoder_norm=architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm")),
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
    )
    sae.metadata = metadata
    thresholds_from_json(sae, ours.get("prefix_thresholds"))
    return sae, architecture


def refuse_scale(config: dict[str, Any], advice: str) -> None:
    """Raises ValueError in one line for a file that scales activations by statistics which it does not hold."""
    if (normalise := config.get("normalize_activations", "none")) != "none":
        raise ValueError(f"normalize_activations is {normalise!r}, expected 'none'; {advice}")


def thresholds_to_json(sae: MatryoshkaSAE) -> list[float | None]:
    """`prefix_thresholds`, with None where one is not set, since JSON has no NaN."""
    return [None if math.isnan(t) else t for t in sae.prefix_thresholds.tolist()]


def thresholds_from_json(sae: MatryoshkaSAE, thresholds: list[float | None] | None) -> None:
    """Set `prefix_thresholds`, unless there are none or they are of other prefixes."""
    if thresholds is not None and len(thresholds) == len(sae.prefixes):
        sae.prefix_thresholds.copy_(torch.tensor([math.nan if t is None else t for t in thresholds]))


def read_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError in one line unless it holds exactly `expected`."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if shapes != expected:
                raise ValueError(f"{path} holds {shapes}, expected {expected} from {CONFIG}")
            return {name: file.get_tensor(name) for name in expected}
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); export the SAE again") from None
