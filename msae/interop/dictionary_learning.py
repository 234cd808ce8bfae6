"""dictionary_learning's form: ae.pt, a pickle of tensors, and config.json with what its trainer was given."""

import json
import math
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msae.interop.convert import common_threshold, move_b_dec, read_json
from msae.sae import MatryoshkaSAE
from msae.sae.files import raw_copy, replace, thresholds_from_json, thresholds_to_json
from msae.sae.model import Sparsity

CONFIG, WEIGHTS = "config.json", "ae.pt"
KEPT = "dictionary_learning"  # under metadata: the config.json that was read
UNSET = -1.0  # where its thresholds start


@dataclass(frozen=True)
class Form:
    """One dict_class: what selects, its tensors beside the weights, its trainer, nn.Linear (transposed) or not."""

    sparsity: Sparsity
    others: tuple[str, ...]
    trainer_class: str
    linear: bool = False

    def names(self) -> dict[str, str]:
        """Our names of the weights, and its own."""
        if self.linear:
            return {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}
        return {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

    def turned(self, tensor: Tensor) -> Tensor:
        """A tensor of its own as ours, or one of ours as its own."""
        return tensor.T.contiguous() if self.linear and tensor.ndim == 2 else tensor.contiguous()


FORMS = {
    "MatryoshkaBatchTopKSAE": Form("batch_topk", ("k", "threshold", "group_sizes"), "MatryoshkaBatchTopKTrainer"),
    "BatchTopKSAE": Form("batch_topk", ("k", "threshold"), "BatchTopKTrainer", linear=True),
    "AutoEncoderTopK": Form("topk", ("k", "threshold"), "TopKTrainer", linear=True),
    "JumpReluAutoEncoder": Form("jumprelu", ("threshold",), "JumpReluTrainer"),
}


def load(directory: str | Path) -> MatryoshkaSAE:
    """Read `ae.pt` and `config.json` of a MatryoshkaBatchTopKSAE, BatchTopKSAE, AutoEncoderTopK or JumpReluAutoEncoder.

    A threshold below 0 was never trained, and stays not set. Raises ValueError in one line for anything else, and for
    an `ae.pt` that holds more than tensors.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    tensors = read_pickle(directory / WEIGHTS)
    try:
        return _from_dictionary(config, tensors).eval()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{directory} is not an SAE of dictionary_learning: {reason}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, opened so that no code in it can run. Raises ValueError in one line."""
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
    if trainer["dict_class"] not in FORMS:
        raise ValueError(f"trainer.dict_class is {trainer['dict_class']!r}, expected one of {', '.join(FORMS)}")
    form = FORMS[trainer["dict_class"]]
    weights = {name: form.turned(tensors[its_name]).float() for name, its_name in form.names().items()}
    d_in, d_sae = weights["W_enc"].shape
    others = {name: tensors[name] for name in form.others}
    if extra := tensors.keys() - form.names().values() - others.keys():
        raise ValueError(f"{WEIGHTS} holds {', '.join(sorted(extra))} too, which no {trainer['dict_class']} has")
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
    elif threshold >= 0 and form.sparsity == "batch_topk":
        sae.threshold.fill_(float(threshold))
    sae.load_state_dict(weights, strict=False)
    thresholds_from_json(sae, ours.get("prefix_thresholds"))
    sae.metadata = ours.get("metadata") or _metadata(config)
    sae.metadata[KEPT] = {key: value for key, value in config.items() if key != "msae"}
    if form.sparsity == "topk":  # selects without it
        sae.metadata[KEPT]["threshold"] = float(threshold)
    return sae


def whole(k: float) -> int:
    """k as a dictionary needs it: an int, at least 1."""
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


def save(sae: MatryoshkaSAE, directory: str | Path) -> Path:
    """Write the SAE for `dictionary_learning.utils.load_dictionary`, normalisation folded in, float32.

    The groups of a MatryoshkaBatchTopKSAE are the prefixes; one threshold is needed, and k is rounded. Thresholds that
    differ between latents, and a ReLU, make a JumpReluAutoEncoder, which knows no groups and does not subtract b_dec
    from its input: b_enc takes it in. `topk` makes an AutoEncoderTopK. What these cannot hold (exact k, prefixes, their
    thresholds, metadata) is under `msae` in config.json. Raises ValueError in one line for a transcoder.
    """
    if sae.is_transcoder:
        raise ValueError("dictionary_learning has no transcoders; use to=saelens")
    plain = raw_copy(sae)
    metadata = plain.metadata  # a copy's
    kept = metadata.pop(KEPT, {})
    threshold = common_threshold(plain)
    dict_class = _dict_class(plain, threshold, kept)
    form = FORMS[dict_class]
    move_b_dec(plain, to_input=dict_class != "JumpReluAutoEncoder")
    sizes = [stop - start for start, stop in pairwise([0, *plain.prefixes])]
    if form.sparsity == "topk":
        threshold = kept.pop("threshold", UNSET)
    elif threshold is not None and form.sparsity == "batch_topk":
        threshold = UNSET if math.isnan(threshold) else max(threshold, 0.0)  # below 0 all do as at 0: acts are ≥ 0
    others = {
        "k": torch.tensor(whole(plain.k), dtype=torch.int32),
        "group_sizes": torch.tensor(sizes),
        "threshold": plain.threshold.detach() if form.sparsity == "jumprelu" else torch.tensor(threshold),
    }
    tensors = {its_name: form.turned(getattr(plain, name).detach()) for name, its_name in form.names().items()}
    tensors |= {name: others[name] for name in form.others}
    config = _config(plain, dict_class, sizes, metadata, kept)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    replace(directory / WEIGHTS, lambda path: _write_pickle(tensors, path))
    replace(directory / CONFIG, lambda path: path.write_text(json.dumps(config, indent=4) + "\n"))
    return directory


def _write_pickle(tensors: dict[str, Tensor], path: Path) -> None:
    with open(path, "wb") as file:  # given a path, torch makes a RuntimeError of a full disk
        torch.save(tensors, file)


def _dict_class(plain: MatryoshkaSAE, threshold: float | None, kept: dict[str, Any]) -> str:
    if plain.sparsity == "topk":
        return "AutoEncoderTopK"
    if plain.sparsity == "batch_topk" and threshold is not None:
        before = (kept.get("trainer") or {}).get("dict_class")
        return "BatchTopKSAE" if before == "BatchTopKSAE" and len(plain.prefixes) == 1 else "MatryoshkaBatchTopKSAE"
    if plain.threshold.isnan().any():
        raise ValueError("this SAE has no threshold yet; train it or calibrate it before saving")
    return "JumpReluAutoEncoder"


def _config(
    plain: MatryoshkaSAE, dict_class: str, sizes: list[int], metadata: dict[str, Any], kept: dict[str, Any]
) -> dict[str, Any]:
    form, before, hook = FORMS[dict_class], kept.get("trainer") or {}, str(metadata.get("hook_name"))
    layer, residual = re.match(r"blocks\.(\d+)\.", hook), re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook)
    if before.get("dict_class") != dict_class:
        before = {}
    if "group_sizes" in form.others and before.get("group_sizes") != sizes:
        fractions = [size / plain.d_sae for size in sizes]
        before = {key: value for key, value in before.items() if key != "group_weights"} | {
            "group_fractions": fractions
        }
    trainer = {
        "trainer_class": form.trainer_class,
        "lm_name": metadata.get("model_name"),
        "layer": int(layer[1]) if layer else None,
        "submodule_name": f"resid_post_layer_{residual[1]}" if residual else metadata.get("hook_name"),
        **before,
        "dict_class": dict_class,
        "activation_dim": plain.d_in,
        "dict_size": plain.d_sae,
        **({"k": whole(plain.k)} if "k" in form.others else {}),
        **({"group_sizes": sizes} if "group_sizes" in form.others else {}),
    }
    buffer = {"ctx_len": metadata["context_size"]} if metadata.get("context_size") else None
    return {
        **({"buffer": buffer} if buffer else {}),
        **kept,
        "trainer": trainer,
        "msae": {
            "k": plain.k,
            "prefixes": plain.prefixes,
            "prefix_thresholds": thresholds_to_json(plain),
            "metadata": metadata,
        },
    }
