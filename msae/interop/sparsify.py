"""sparsify's form: a directory named after the hook, with cfg.json and sae.safetensors; k latents of each token."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msae.files import write, write_json
from msae.interop.convert import explained, move_b_dec, read_json
from msae.sae import MatryoshkaSAE
from msae.sae.files import has_unit_rows, read_tensors
from msae.sae.forms import folded_copy

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
KEPT = "sparsify"  # under metadata: the cfg.json that was read
READABLE = {"activation": "topk", "skip_connection": False, "signed": False}


def load(directory: str | Path) -> MatryoshkaSAE:
    """Read what sparsify's `SparseCoder.save_to_disk` wrote: a TopK autoencoder or, with `transcode`, a transcoder.

    Raises ValueError in one line for skip connections, other activations, and a file without a decoder.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    with explained(f"{directory / CONFIG} is not the configuration of a TopK SAE of sparsify"):
        sae = _from_config(config)
    refuse_missing_decoder(directory / WEIGHTS)
    d_in, d_sae = sae.d_in, sae.d_sae
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    tensors = read_tensors(directory / WEIGHTS, shapes)
    tensors["W_enc"], tensors["b_enc"] = tensors.pop("encoder.weight").T, tensors.pop("encoder.bias")
    sae.load_state_dict(tensors, strict=False)
    layer = re.fullmatch(r"(?:layers|h)\.(\d+)", directory.resolve().name)
    if layer and not sae.metadata.get("hook_name"):
        sae.metadata["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    sae.metadata[KEPT] = {key: value for key, value in config.items() if key != "msae"}
    return sae.eval()


def refuse_missing_decoder(path: Path) -> None:
    """Raise ValueError in one line where the file was saved without W_dec."""
    try:
        with safe_open(path, framework="pt") as file:
            has_decoder = "W_dec" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); export the SAE again") from None
    if not has_decoder:
        raise ValueError(f"{path} has no W_dec: it was saved without its decoder, and nothing can be decoded with it")


def _from_config(config: dict[str, Any]) -> MatryoshkaSAE:
    for key, value in READABLE.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} is {config[key]!r}, expected {value!r}, which is all that can be read")
    d_in, ours = config["d_in"], config.get("msae") or {}
    d_sae = config.get("num_latents") or d_in * config["expansion_factor"]
    d_out = d_in if config.get("transcode") else None
    sae = MatryoshkaSAE(d_in, d_sae, ours.get("prefixes") or [d_sae], config["k"], d_out=d_out, sparsity="topk")
    sae.metadata = dict(ours.get("metadata") or {})
    return sae


def save(sae: MatryoshkaSAE, directory: str | Path) -> Path:
    """Write the SAE for sparsify's `SparseCoder.load_from_disk`, normalisation folded in, float32.

    Prefixes and metadata, for which it has no key, are under `msae` in cfg.json. Raises ValueError in one line unless
    inference keeps each token's k largest latents, and for a transcoder into another width.
    """
    if sae.sparsity.architecture != "topk":
        raise ValueError(
            f"sparsify keeps k latents of each token, this SAE was trained with sparsity={sae.sparsity.name}; "
            "train with model.sparsity=topk, or use to=saelens"
        )
    if sae.d_out != sae.d_in:
        raise ValueError(f"sparsify's transcoders have d_out = d_in, this one has {sae.d_out} and {sae.d_in}")
    plain = folded_copy(sae)
    kept = plain.metadata.pop(KEPT, {})  # from a copy
    move_b_dec(plain, to_input=not plain.is_transcoder)
    config = {
        "expansion_factor": max(1, plain.d_sae // plain.d_in),
        "multi_topk": False,
        "normalize_decoder": has_unit_rows(plain),
        **kept,
        "activation": "topk",
        "num_latents": plain.d_sae,
        "k": int(plain.k),
        "skip_connection": False,
        "transcode": plain.is_transcoder,
        "d_in": plain.d_in,
        "msae": {"prefixes": plain.prefixes, "metadata": plain.metadata},
    }
    weights = {"encoder.weight": plain.W_enc.T, "encoder.bias": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / WEIGHTS, lambda path: save_file(tensors, path))
    write_json(directory / CONFIG, config, indent=2)
    return directory
