"""Loading a language model with transformer_lens, and reading its activations at named hooks."""

import difflib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from msae.devices import pick_device
from msae.sources.text import content_hash, first_line, hub_reachable, looks_local

Dtype = Literal["float16", "bfloat16", "float32"]
DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "added_tokens.json", "special_tokens_map.json")
PROBE_TOKENS = 7  # few, and not a usual number of heads, so that [batch, head, …] is not taken for [batch, pos, …]


def model_identity(model: str, revision: str | None, patterns: tuple[str, ...]) -> dict[str, Any]:
    """The identity of a model or tokenizer: the hash of a directory's matching files, or a hub name and commit.

    Raises ValueError if the directory does not exist or has no tokenizer to match, or the hub has no such model.
    """
    directory = local_directory(model)
    if directory is None:
        return {"name": model, "commit": hub_commit(model, revision)}
    return {"xxh3": content_hash(matching_files(model, directory, patterns))}


def matching_files(model: str, directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The model's files that match any of the patterns, sorted. Raises ValueError if there are none of a tokenizer."""
    files = sorted({f for pattern in patterns for f in directory.glob(pattern) if f.is_file()})
    if patterns is TOKENIZER and not files:
        raise ValueError(no_tokenizer(model))
    return files


def local_directory(model: str) -> Path | None:
    """The directory of a model, None for a hub name. Raises ValueError for what cannot be either."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise ValueError(f"the directory {model} is empty; data.source.model takes one made by save_pretrained")
        return path
    if path.exists() or looks_local(model):
        raise ValueError(
            f"there is no directory {model}; set data.source.model=<made by save_pretrained> or a hub name"
        )
    return None


def hub_commit(model: str, revision: str | None) -> str:
    """The commit of a hub name, from the hub or the local cache. Raises ValueError if neither has it."""
    from huggingface_hub import constants, hf_hub_download

    online = hub_reachable()
    reason = ""
    for name in ("config.json", "tokenizer_config.json"):  # a repository of a tokenizer alone has the second
        try:
            return Path(hf_hub_download(model, name, revision=revision, local_files_only=not online)).parent.name
        except (OSError, ValueError) as error:
            reason = reason or first_line(error)
    if not online:
        reason = f"{constants.ENDPOINT} is out of reach and the model is not in the local cache"
    raise ValueError(f"cannot load {model}: {reason}; set data.source.model=<directory made by save_pretrained>")


def no_tokenizer(name: str) -> str:
    """The line for a model without a tokenizer."""
    return f"{name} has no tokenizer; add one with tokenizer.save_pretrained, or set data.source.tokenizer"


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a hub name or a directory. Raises ValueError if there is none."""
    directory = local_directory(name)
    if directory is None:
        revision = hub_commit(name, revision)
    else:
        matching_files(name, directory, TOKENIZER)  # transformers would make an empty one of config.json in silence
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory or name), revision=revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{no_tokenizer(name)} ({first_line(error)})") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and transformer_lens' advice for a while."""
    from transformers.utils import logging

    has_bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def load_bridge(
    model: str,
    *,
    device: str = "auto",
    dtype: Dtype = "float32",
    compatibility_mode: bool = False,
    revision: str | None = None,
    tokenizer: str | None = None,
) -> Any:
    """Load a model as a transformer_lens bridge in evaluation mode, without gradients, with its tokenizer.

    Raises ValueError in one line if the model or its tokenizer cannot be had, transformer_lens does not know
    the architecture, or the tokenizer has ids that the model has no embedding for.
    """
    directory = local_directory(model)
    if directory is not None and not (directory / "config.json").is_file():
        raise ValueError(f"{model} has no config.json; data.source.model takes a directory made by save_pretrained")
    commit = None if directory is not None else hub_commit(model, revision)
    own = load_tokenizer(tokenizer) if tokenizer else load_tokenizer(model, revision)
    top = max(own.get_vocab().values(), default=0)  # before transformer_lens adds what it misses
    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        try:
            bridge = TransformerBridge.boot_transformers(
                str(directory or model), device=pick_device(device), dtype=DTYPES[dtype], revision=commit, tokenizer=own
            )
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"transformer_lens cannot run {model}: {first_line(error)}; "
                "set data.source.model to a causal language model that it knows"
            ) from None
        if compatibility_mode:
            bridge.enable_compatibility_mode()
    bridge.eval().requires_grad_(False)
    if top >= bridge.cfg.d_vocab:
        raise ValueError(
            f"the tokenizer {tokenizer or model} has ids up to {top}, {model} embeds {bridge.cfg.d_vocab}; "
            "set data.source.tokenizer to the one that the model was trained with"
        )
    return bridge


def capture(bridge: Any, tokens: Tensor, hook_names: list[str]) -> dict[str, Tensor]:
    """Activations [batch, pos, ...] of the hooks in one forward pass that ends at the deepest of them.

    The last hook that fires ends the pass, not `stop_at_layer`, which is exclusive, silently drops hooks of the layer
    that it names and is ignored from the last layer on. A hook that never fires is not in the result.
    """
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    activations: dict[str, Tensor] = {}

    def save(value: Tensor, name: str) -> None:
        activations.setdefault(name, value)
        if len(activations) == len(hook_names):
            raise StopAtLayerException(value)

    hooks = [(name, lambda value, hook, name=name: save(value, name)) for name in hook_names]
    bridge.run_with_hooks(tokens.long().to(bridge.cfg.device), fwd_hooks=hooks, return_type=None)
    return activations


@torch.no_grad()
def hook_widths(bridge: Any, hook_names: list[str]) -> dict[str, int]:
    """The width of a row at each hook, [batch, pos, heads, d_head] counted as heads · d_head.

    Raises ValueError for a hook that the model does not have or does not fire, or that has no row for each token.
    """
    length = min(PROBE_TOKENS, bridge.cfg.n_ctx)
    tokens = torch.zeros(2, length, dtype=torch.long)
    widths = {}
    for name in hook_names:
        check_hook_name(bridge, name)
        value = None
        try:
            value = capture(bridge, tokens, [name]).get(name)
        except ValueError as error:
            if "Cannot add hook" not in str(error):
                raise
        if value is None:
            firing = [n for n in bridge.hook_dict if bridge._gated_hook_reason(n) is None]
            raise ValueError(
                f"{name} is gated and never fires in this model; "
                f"try data.source.hook_names=[{nearest(name.replace('hook_result', 'hook_z'), firing)}]"
            )
        shape = tuple(value.shape)
        per_token = len(shape) in (3, 4) and shape[:2] == (2, length) and not (len(shape) == 4 and shape[3] == length)
        if not (per_token and value.is_floating_point()):
            raise ValueError(
                f"{name} has shape {shape} for tokens {(2, length)}, not a row for each token; "
                "set data.source.hook_names to one such as blocks.0.hook_resid_pre"
            )
        widths[name] = value[0, 0].numel()
    return widths


def check_hook_name(bridge: Any, name: str) -> None:
    """Raise ValueError for a hook that the model lacks, naming the nearest that it has."""
    if name in bridge.hook_dict:
        return
    layer = re.match(r"blocks\.(\d+)\.", name)
    layers = bridge.cfg.n_layers
    if layer and int(layer[1]) >= layers:
        raise ValueError(
            f"{name} is out of range: the model has layers 0 to {layers - 1}; "
            f"set data.source.hook_names=[blocks.{layers - 1}.{name.split('.', 2)[2]}]"
        )
    raise ValueError(
        f"the model has no hook {name}; try data.source.hook_names=[{nearest(name, list(bridge.hook_dict))}]"
    )


def nearest(name: str, names: list[str]) -> str:
    """The name that is most like this one."""
    return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
