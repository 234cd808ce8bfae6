"""dictionary_learning's form: ae.pt, a pickle of tensors, and config.json with what its trainer was given."""

import math
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msae.files import write, write_json
from msae.interop.convert import common_threshold, explained, move_b_dec, read_json
from msae.sae import MatryoshkaSAE
from msae.sae.files import refuse_unset_threshold, thresholds_from_json, thresholds_to_json
from msae.sae.forms import folded_copy

CONFIG, WEIGHTS = "config.json", "ae.pt"
KEPT = "dictionary_learning"  # under metadata: the config.json that was read
UNSET = -1.0  # where its thresholds start
OUR_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
LINEAR_NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")


@dataclass(frozen=True)
class Form:
    """One dict_class: what selects, its tensors beside the weights, its trainer, nn.Linear (transposed) or not."""

    sparsity: str
    others: tuple[str, ...]
    trainer_class: str
    linear: bool = False

    def names(self) -> dict[str, str]:
        """Our names of the weights, and its own."""
        return dict(zip(OUR_NAMES, LINEAR_NAMES if self.linear else OUR_NAMES, strict=True))

    def turned(self, tensor: Tensor) -> Tensor:
        """Turn a tensor of its own into ours, or one of ours into its own."""
        return tensor.T.contiguous() if self.linear and tensor.ndim == 2 else tensor.contiguous()


FORMS = {
    "MatryoshkaBatchTopKSAE": Form("batch_topk", ("k", "threshold", "group_sizes"), "MatryoshkaBatchTopKTrainer"),
    "BatchTopKSAE": Form("batch_topk", ("k", "threshold"), "BatchTopKTrainer", linear=True),
    "AutoEncoderTopK": Form("topk", ("k", "threshold"), "TopKTrainer", linear=True),
    "JumpReluAutoEncoder": Form("jumprelu", ("threshold",), "JumpReluTrainer"),
}


# --- reading ----------------------------------------------------------------------------------------------------------


def load(directory: str | Path) -> MatryoshkaSAE:
    """Read `ae.pt` and `config.json` of a MatryoshkaBatchTopKSAE, BatchTopKSAE, AutoEncoderTopK or JumpReluAutoEncoder.

    A threshold below 0 was never trained, and stays not set. Raises ValueError in one line for anything else, and for
    an `ae.pt` that holds more than tensors.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    tensors = read_pickle(directory / WEIGHTS)
    with explained(f"{directory} is not an SAE of dictionary_learning"):
        return _from_dictionary(config, tensors).eval()


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickled state dict so that no code in it can run. Raises ValueError in one line."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; give the directory that holds it") from None
    except Exception as error:  # bytes of others: unpickling them fails in more ways than can be listed
        raise ValueError(
            f"{path} is not a plain file of tensors ({type(error).__name__}), and opening it any other way could run "
            "code; ask for the SAE as safetensors"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} does not hold a state dict of tensors")
    return tensors


def _from_dictionary(config: dict[str, Any], tensors: dict[str, Tensor]) -> MatryoshkaSAE:
    trainer, ours = config["trainer"], config.get("msae") or {}
    dict_class = trainer["dict_class"]
    if dict_class not in FORMS:
        raise ValueError(f"trainer.dict_class is {dict_class!r}, expected one of {', '.join(FORMS)}")
    form = FORMS[dict_class]
    weights = {name: form.turned(tensors[its_name]).float() for name, its_name in form.names().items()}
    others = {name: tensors[name] for name in form.others}
    if extra := tensors.keys() - form.names().values() - others.keys():
        raise ValueError(f"{WEIGHTS} holds {', '.join(sorted(extra))} too, which no {dict_class} has")
    d_in, d_sae = weights["W_enc"].shape
    is_jumprelu = form.sparsity == "jumprelu"
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= {"k": (), "threshold": (d_sae,) if is_jumprelu else ()}
    for name, tensor in {**weights, **others}.items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shapes[name])} beside W_enc")
    prefixes = list(accumulate(others["group_sizes"].long().tolist())) if "group_sizes" in others else None
    k = int(others["k"]) if "k" in others else min(trainer.get("target_l0") or 1.0, d_sae)
    exact = ours.get("k", k)
    sae = MatryoshkaSAE(
        d_in,
        d_sae,
        prefixes or ours.get("prefixes") or [d_sae],
        exact if is_jumprelu or whole(exact) == k else k,
        sparsity=form.sparsity,
        apply_b_dec_to_input=not is_jumprelu,
    )
    threshold = others["threshold"].float()
    if is_jumprelu:
        weights["threshold"] = threshold
    elif threshold >= 0 and not sae.ranks_at_inference:
        sae.threshold.fill_(float(threshold))
    sae.load_state_dict(weights, strict=False)
    thresholds_from_json(sae, ours.get("prefix_thresholds"))
    sae.metadata = ours.get("metadata") or _metadata(config)
    sae.metadata[KEPT] = {key: value for key, value in config.items() if key != "msae"}
    if sae.ranks_at_inference:
        sae.metadata[KEPT]["threshold"] = float(threshold)
    return sae


def whole(k: float) -> int:
    """Round k as a dictionary needs it: an int, at least 1."""
    return max(1, round(k))


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    trainer, buffer = config["trainer"], config.get("buffer") or {}
    name = trainer.get("submodule_name")
    residual = re.fullmatch(r"resid_post_layer_(\d+)", str(name))
    return {
        "model_name": trainer.get("lm_name"),
        "hook_name": f"blocks.{residual[1]}.hook_resid_post" if residual else name,
        "context_size": buffer.get("ctx_len"),
    }


# --- writing ----------------------------------------------------------------------------------------------------------


def save(sae: MatryoshkaSAE, directory: str | Path) -> Path:
    """Write the SAE for `dictionary_learning.utils.load_dictionary`, normalisation folded in, float32.

    The groups of a MatryoshkaBatchTopKSAE are the prefixes; one threshold is needed, and k is rounded. Thresholds that
    differ between latents, and a ReLU, make a JumpReluAutoEncoder, which knows no groups and does not subtract b_dec
    from its input: b_enc takes it in. `topk` makes an AutoEncoderTopK. What these cannot hold (exact k, prefixes, their
    thresholds, metadata) is under `msae` in config.json. Raises ValueError in one line for a transcoder.
    """
    if sae.is_transcoder:
        raise ValueError("dictionary_learning has no transcoders; use to=saelens")
    plain = folded_copy(sae)
    kept = plain.metadata.pop(KEPT, {})  # from a copy
    dict_class = _dict_class(plain, kept)
    form = FORMS[dict_class]
    move_b_dec(plain, to_input=dict_class != "JumpReluAutoEncoder")
    group_sizes = [stop - start for start, stop in pairwise([0, *plain.prefixes])]
    others = {
        "k": torch.tensor(whole(plain.k), dtype=torch.int32),
        "group_sizes": torch.tensor(group_sizes),
        "threshold": _threshold(plain, form, kept),
    }
    tensors = {its_name: form.turned(getattr(plain, name).detach()) for name, its_name in form.names().items()}
    tensors |= {name: others[name] for name in form.others}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / WEIGHTS, lambda path: _write_pickle(tensors, path))
    write_json(directory / CONFIG, _config(plain, dict_class, group_sizes, kept), indent=4)
    return directory


def _write_pickle(tensors: dict[str, Tensor], path: Path) -> None:
    with open(path, "wb") as file:  # given a path, torch makes a RuntimeError of a full disk
        torch.save(tensors, file)


def _dict_class(plain: MatryoshkaSAE, kept: dict[str, Any]) -> str:
    """Choose the form that holds what the SAE's inference does. Raises ValueError in one line if none does."""
    if plain.sparsity.architecture == "topk":
        return "AutoEncoderTopK"
    if plain.sparsity.name == "batch_topk" and common_threshold(plain) is not None:
        before = (kept.get("trainer") or {}).get("dict_class")
        return "BatchTopKSAE" if before == "BatchTopKSAE" and len(plain.prefixes) == 1 else "MatryoshkaBatchTopKSAE"
    if plain.sparsity.architecture not in ("jumprelu", "standard"):
        raise ValueError(f"dictionary_learning has no {plain.sparsity.name} SAEs; use to=saelens")
    refuse_unset_threshold(plain)
    return "JumpReluAutoEncoder"


def _threshold(plain: MatryoshkaSAE, form: Form, kept: dict[str, Any]) -> Tensor:
    """Its threshold: of each latent, or of all; one that nothing uses is what was read."""
    if form.sparsity == "jumprelu":
        return plain.threshold.detach()
    if form.sparsity == "topk":
        return torch.tensor(kept.pop("threshold", UNSET))
    threshold = float(plain.threshold[0])
    return torch.tensor(UNSET if math.isnan(threshold) else max(threshold, 0.0))  # below 0 as at 0: acts are ≥ 0


def _config(plain: MatryoshkaSAE, dict_class: str, group_sizes: list[int], kept: dict[str, Any]) -> dict[str, Any]:
    form, metadata, before = FORMS[dict_class], plain.metadata, kept.get("trainer") or {}
    hook = str(metadata.get("hook_name"))
    layer, residual = re.match(r"blocks\.(\d+)\.", hook), re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook)
    if before.get("dict_class") != dict_class:
        before = {}
    if "group_sizes" in form.others and before.get("group_sizes") != group_sizes:
        before = {key: value for key, value in before.items() if key != "group_weights"}
        before["group_fractions"] = [size / plain.d_sae for size in group_sizes]
    sizes = {"k": whole(plain.k), "group_sizes": group_sizes}
    context = metadata.get("context_size")
    return {
        **({"buffer": {"ctx_len": context}} if context else {}),
        **kept,
        "trainer": {
            "trainer_class": form.trainer_class,
            "lm_name": metadata.get("model_name"),
            "layer": int(layer[1]) if layer else None,
            "submodule_name": f"resid_post_layer_{residual[1]}" if residual else metadata.get("hook_name"),
            **before,
            "dict_class": dict_class,
            "activation_dim": plain.d_in,
            "dict_size": plain.d_sae,
            **{name: size for name, size in sizes.items() if name in form.others},
        },
        "msae": {
            "k": plain.k,
            "prefixes": plain.prefixes,
            "prefix_thresholds": thresholds_to_json(plain),
            "metadata": metadata,
        },
    }
