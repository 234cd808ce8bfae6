"""What a configuration may hold: the top-level keys, and for every `_target_` the signature of what it names."""

import difflib
import inspect
import logging
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from msae.hierarchy.limits import Limits

INSTANTIATE_KEYS = ("_target_", "_convert_", "_recursive_", "_partial_", "_args_")

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # a target that is not found is reported here


@dataclass
class Evaluation:
    """How much data the evaluation after training reads."""

    ce_sequences: int = 64
    calibration_tokens: int = 262144


@dataclass
class TrainConfig:
    """The top-level keys of `python -m msae.train`."""

    supplied: ClassVar[tuple[str, ...]] = ("model.d_in",)  # comes from the shards where it is null

    name: str
    tokens: int
    model: Any
    data: Any
    trainer: Any
    evaluation: Evaluation
    arms: dict[str, Any] | None = None
    grid: dict[str, list[Any]] | None = None
    seed: int = 0
    runs: str = "runs"
    run_dir: str | None = None
    ckpt_path: str | None = None
    checkpoint_every_steps: int = 1000


@dataclass
class HarvestConfig(TrainConfig):
    """The top-level keys of `python -m msae.harvest`; an experiment sets those of training too."""

    unused: ClassVar[tuple[str, ...]] = ("tokens", "model", "trainer", "evaluation")  # may be incomplete
    verify: str | None = None


@dataclass
class ExportConfig:
    """The top-level keys of `python -m msae.export`."""

    sae: str
    to: Literal["saelens", "saelens_training", "dictionary_learning", "sparsify"] = "saelens"
    out: str | None = None
    prefix: int | None = None
    own_threshold: bool = False
    push: str | None = None
    private: bool = False
    revision: str | None = None


@dataclass
class HierarchyConfig:
    """The top-level keys of `python -m msae.hierarchy` and `python -m msae.report`."""

    run: str
    limits: Limits
    shards: str | None = None
    tokens: int | None = None
    vanilla: str | None = None
    language_model: str | None = None
    out: str | None = None
    seed: int = 0


@dataclass
class _Findings:
    supplied: tuple[str, ...] = ()  # these may be null, the command fills them in
    valid: list[str] = field(default_factory=list)  # every dotted key that may be set
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def check(cfg: DictConfig, schema: type) -> None:
    """Compare the config with the dataclass `schema`, and every `_target_` node with the target's signature.

    Raises ValueError, in one line: an unknown key and the nearest valid one, the keys that are not set, or
    the values of a wrong type.
    """
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationToMissingValueError as ex:
        name = re.search(r"mandatory value: (\S+)", str(ex))
        raise (ValueError(_missing([name[1]])) if name else ex) from None
    assert isinstance(tree, dict)
    found = _Findings(getattr(schema, "supplied", ()), valid=["+experiment", "+sweeps"])
    _check_node(tree, schema, "", found)
    if found.unknown:
        key = found.unknown[0]
        raise ValueError(f"unknown key {key}; {_suggest(key, found.valid)}")
    unused = getattr(schema, "unused", ())
    if missing := [key for key in found.missing if key.split(".")[0] not in unused]:
        raise ValueError(_missing(missing))
    if found.wrong:
        raise ValueError("; ".join(found.wrong))


def _missing(keys: list[str]) -> str:
    return f"not set: {', '.join(keys)}; give {' '.join(f'{key}=…' for key in keys)}"


def _suggest(key: str, valid: list[str]) -> str:
    parent, _, leaf = key.rpartition(".")
    siblings = {v.rpartition(".")[2]: v for v in valid if v.rpartition(".")[0] == parent}
    if near := difflib.get_close_matches(leaf, siblings, 1, 0.6):
        return f"did you mean {siblings[near[0]]}?"
    elsewhere = {v.rpartition(".")[2]: v for v in valid}  # k=32 for model.k=32
    if near := difflib.get_close_matches(leaf, elsewhere, 1, 0.8):
        return f"did you mean {elsewhere[near[0]]}?"
    return f"valid here: {', '.join(sorted(siblings))}"


def _check_node(node: dict[Any, Any], target: Callable[..., Any], path: str, found: _Findings) -> None:
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some builtins have none
        return
    try:
        function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        hints = typing.get_type_hints(function)
    except (
        NameError,
        TypeError,
        AttributeError,
    ):  # imported for type checkers only: the keys are still checked
        hints = {}
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {k: p for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    found.valid += [path + name for name in named]
    for key, value in node.items():
        dotted = f"{path}{key}"
        if key in named:
            if value is not None or not (named[key].default is None or dotted in found.supplied):
                _check_value(value, hints.get(key, Any), dotted, found)
        elif is_open:
            _check_value(value, Any, dotted, found)
        elif not ("_target_" in node and key in INSTANTIATE_KEYS):
            found.unknown.append(dotted)
    required = [path + k for k, p in named.items() if p.default is p.empty and k not in node]
    if not ("_args_" in node or node.get("_partial_")):
        found.missing += [key for key in required if key not in found.supplied]


def _check_value(value: Any, hint: Any, dotted: str, found: _Findings) -> None:
    if value == "???":
        found.missing.append(dotted)
        return
    if not _accepts(hint, value):
        found.wrong.append(f"{dotted} is {value!r}, expected {_name(hint)}")
    elif isinstance(value, dict) and "_target_" in value:
        _check_node(value, _locate(value["_target_"], dotted), f"{dotted}.", found)
    elif isinstance(value, dict) and (schema := next(filter(_is_schema, _arms(hint)), None)):
        _check_node(value, schema, f"{dotted}.", found)
    elif isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _check_value(item, Any, f"{dotted}.{key}", found)


def _locate(target: Any, dotted: str) -> Callable[..., Any]:
    try:
        return hydra.utils.get_method(target)
    except Exception as ex:
        reason = " ".join(str(ex).split())
        raise ValueError(f"{dotted}._target_ {target!r} cannot be loaded: {reason}") from ex


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_schema(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _accepts(hint: Any, value: Any) -> bool:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Any, object):
        return True
    if origin in (Union, types.UnionType):
        return any(_accepts(arm, value) for arm in args)
    if origin is typing.Annotated:
        return _accepts(args[0], value)
    if origin is Literal:
        return value in args
    if origin is None or origin is type(None):
        return value is None
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin in (int, str, bool):
        return type(value) is origin
    if origin is Path:
        return isinstance(value, str)
    if isinstance(value, dict) and "_target_" in value:
        return True  # an object, and objects are not looked into
    if origin in (list, Sequence, Iterable, set) or (origin is tuple and (not args or args[-1] is ...)):
        return isinstance(value, list) and all(_accepts(args[0] if args else Any, item) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(args) and all(map(_accepts, args, value))
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_accepts(args[1] if args else Any, v) for v in value.values())
    if _is_schema(origin):
        return isinstance(value, dict)
    return not isinstance(origin, type)  # an annotation not understood here


def _name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(_name, get_args(hint)))
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
