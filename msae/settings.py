"""Settings are dataclasses: pydantic checks types, ranges and names; here are the errors of one line and the tables.

A setting is declared once, in the dataclass of the code that uses it, with a docstring line below it. What YAML, the
command line and our JSON files hold is decoded by `decode`; `keys` lists what may be set, for help and documentation.
"""

import difflib
import inspect
import json
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import ConfigDict, Field, ImportString, TypeAdapter, ValidationError, create_model
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails, PydanticUndefined
from typing_extensions import dataclass_transform

CONFIG = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, arbitrary_types_allowed=True
)
TARGET, NOT_SET = "_target_", "???"
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
T = TypeVar("T")

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose fields are checked whenever it is made."""
    return dataclass(cls, frozen=True, config=CONFIG)  # type: ignore[return-value]


def as_plain(made: Any) -> dict[str, Any]:
    """Settings as a plain tree, which `decode` makes them of again."""
    tree: dict[str, Any] = TypeAdapter(type(made)).dump_python(made, mode="json")
    return tree


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """{a: {b: 1}} → {"a.b": 1}."""
    if isinstance(node, Mapping) and node:
        return {k: v for key, value in node.items() for k, v in flat(value, f"{path}.{key}").items()}
    return {path[1:]: node}


def changed(made: T, **changes: Any) -> T:
    """A copy of settings with other values, checked anew."""
    return replace(made, **changes)  # type: ignore[type-var]


class Key(NamedTuple):
    """One setting: its dotted name, what it may be, its default as it is typed ("" where it must be given), meaning."""

    name: str
    expected: str
    default: str
    meaning: str


def keys(cls: type, prefix: str = "") -> list[Key]:
    """Every key that may be set below `prefix`, groups unfolded, in the order of declaration."""
    listed = []
    for name, field in fields_of(cls).items():
        dotted = f"{prefix}.{name}" if prefix else name
        if fields_of(field.annotation):
            listed += keys(field.annotation, dotted)
        else:
            default = field.get_default(call_default_factory=True)
            given = "" if default is PydanticUndefined else as_typed(adapter_of(field).dump_python(default))
            listed.append(Key(dotted, expected(field), given, " ".join((field.description or "").split())))
    return listed


def fields_of(cls: Any) -> dict[str, Any]:
    """The fields of a dataclass of settings; none of anything else."""
    return getattr(cls, "__pydantic_fields__", {})


def decode(cls: type[T], values: Mapping[str, Any], prefix: str = "", may_lack: tuple[str, ...] = ()) -> T:
    """The settings that a plain tree (of YAML or JSON) holds, below the dotted key `prefix`.

    Raises ValueError in one line: unknown keys with the nearest that is known, then keys that are not set (unless they
    belong to one of `may_lack`; then what is returned is None), then values that are not what is expected.
    """
    unset: list[str] = []
    tree = without_unset(values, prefix, unset)
    made = None
    try:
        made = TypeAdapter(cls).validate_json(json.dumps(tree))
    except ValidationError as error:
        if line := one_line(error, cls, tree, prefix, unset, may_lack):
            raise ValueError(line) from None
    if missing := [key for key in unset if key.split(".")[0] not in may_lack]:
        raise ValueError(not_set(missing))
    return made  # type: ignore[return-value]


def without_unset(node: Any, path: str, unset: list[str]) -> Any:
    """The tree without the keys whose value is ???, which are noted."""
    if isinstance(node, Mapping):
        inside = {str(k): without_unset(v, f"{path}.{k}" if path else str(k), unset) for k, v in node.items()}
        return {key: value for key, value in inside.items() if value != NOT_SET}
    if node == NOT_SET:
        unset.append(path)
    return [without_unset(item, path, unset) for item in node] if isinstance(node, (list, tuple)) else node


def one_line(
    error: ValidationError,
    cls: type,
    tree: Mapping[str, Any],
    prefix: str = "",
    unset: Iterable[str] = (),
    may_lack: tuple[str, ...] = (),
) -> str:
    """What is wrong with the tree of values given for `cls`, in one line; "" if only what may lack is missing."""
    unknown, missing, wrong = list[str](), list(unset), dict[str, str]()
    for detail in error.errors(include_url=False):
        key, field, value = named(detail, cls, prefix, tree)
        if detail["type"] in UNKNOWN:
            unknown.append(key)
        elif detail["type"].startswith("missing"):
            missing.append(key)
        elif detail["type"] == "value_error":
            wrong[key] = str(detail["ctx"]["error"])
        else:
            wrong[key] = f"{key}={as_typed(value)}: expected {expected(field) if field else detail['msg']}"
    if unknown:
        return f"unknown key {unknown[0]}; {suggestion(unknown[0], [key.name for key in keys(cls, prefix)])}"
    missing = [key for key in dict.fromkeys(missing) if key.split(".")[0] not in may_lack]
    shortest = {line.partition("=")[2]: line for line in sorted(wrong.values(), key=len, reverse=True)}  # seed=x
    return not_set(missing) if missing else "; ".join(reversed(shortest.values()))


def named(detail: ErrorDetails, cls: type, prefix: str, tree: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The dotted key of an error, its field and its value: what is wrong inside a value is of that value."""
    path, field = [prefix] if prefix else [], None
    inside: Any = cls
    value: Any = tree
    for part in detail["loc"]:
        fields = fields_of(inside)
        if not isinstance(part, str) or not fields:
            break
        path.append(part)
        field = fields.get(part)
        inside = None if field is None else field.annotation
        value = value.get(part, detail["input"]) if isinstance(value, Mapping) else detail["input"]
    return ".".join(path), field, value


def not_set(missing: Iterable[str]) -> str:
    """The line for keys without a value."""
    names = list(missing)
    return f"not set: {', '.join(names)}; give {' '.join(f'{name}=…' for name in names)}"


def suggestion(key: str, valid: Iterable[str]) -> str:
    """The valid key that an unknown one may stand for: beside it, else anywhere (k=32 for model.k=32), else all."""
    parent, _, leaf = key.rpartition(".")
    valid = [*valid, "+experiment", "+sweeps"]
    beside = {v.removeprefix(f"{parent}.").split(".")[0]: v for v in valid if not parent or v.startswith(f"{parent}.")}
    if near := difflib.get_close_matches(leaf, beside, 1, 0.6):
        return f"did you mean {parent}.{near[0]}?" if parent else f"did you mean {near[0]}?"
    anywhere = {v.rpartition(".")[2]: v for v in reversed(valid)}
    if near := difflib.get_close_matches(leaf, anywhere, 1, 0.8):
        return f"did you mean {anywhere[near[0]]}?"
    return f"valid here: {', '.join(sorted(name for name in beside if name[0] != '+'))}"


# What a field may be, in words ----------------------------------------------------------------------------------------


def adapter_of(field: Any) -> TypeAdapter[Any]:
    """What checks, writes and describes a field: of its type and of all that annotates it."""
    parts = (field.annotation, *field.metadata)
    annotation: Any = Annotated[parts] if field.metadata else field.annotation
    return TypeAdapter(annotation, config=None if hasattr(field.annotation, "__pydantic_fields__") else CONFIG)


def expected(field: Any) -> str:
    """What a field may be, such as `number > 0 | null`, from its type and range."""
    return in_words(adapter_of(field).json_schema())


def in_words(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "title" in schema and schema.get("type") is None and "anyOf" not in schema and "enum" not in schema:
        return str(schema["title"])
    if "anyOf" in schema:
        bounds = bounds_in_words(schema)
        arms = [in_words(arm) + bounds * (arm.get("type") != "null") for arm in schema["anyOf"]]
        numbers = {arm.replace("number", "int", 1) for arm in arms if arm.startswith("number")}  # an int is one
        return " | ".join(arm for arm in dict.fromkeys(arms) if arm not in numbers)
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type", "anything")
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        length = f"{least} " if least == most else "at least one " if least == 1 else ""
        return f"list of {length}{grouped(schema.get('items', {}))}"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"mapping to {grouped(values)}" if isinstance(values, Mapping) else "mapping"
    return {"integer": "int", "boolean": "true | false"}.get(kind, kind) + bounds_in_words(schema)


def grouped(schema: Mapping[str, Any]) -> str:
    """What an item may be, in parentheses where it is one of several."""
    words = in_words(schema)
    return f"({words})" if " | " in words else words


def bounds_in_words(schema: Mapping[str, Any]) -> str:
    """The range of a number, as ` in [0, 1)` or ` > 0`; what a union has in common stands under pydantic's names."""
    names = {
        "≥": ("minimum", "ge"),
        ">": ("exclusiveMinimum", "gt"),
        "≤": ("maximum", "le"),
        "<": ("exclusiveMaximum", "lt"),
    }
    bounds = {sign: schema[key] for sign, keys in names.items() for key in keys if schema.get(key) is not None}
    if len(bounds) == 2:
        (low, least), (high, most) = bounds.items()
        return f" in {'[' if low == '≥' else '('}{least:g}, {most:g}{']' if high == '≤' else ')'}"
    return "".join(f" {sign} {bound:g}" for sign, bound in bounds.items())


def as_typed(value: Any) -> str:
    """A value as it is typed on a command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value) if not math.isfinite(value) or value != int(value) else f"{value:g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_typed(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(as_typed, value))}]" if isinstance(value, (list, tuple)) else " ".join(str(value).split())


# Objects that a configuration names by their class --------------------------------------------------------------------


def build(node: Any, where: str, **more: Any) -> Any:
    """The object that {_target_: dotted.path, **arguments} describes; anything else as it is, lists and dicts within.

    Arguments are checked against the target's signature. Raises ValueError in one line.
    """
    if isinstance(node, list):
        return [build(item, f"{where}.{i}") for i, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    if TARGET not in node:
        return {key: build(value, f"{where}.{key}") for key, value in node.items()}
    target, given = check_target(node, where)
    return decode(target, given | more, where) if fields_of(target) else target(**given, **more)  # type: ignore[arg-type]


def check_target(node: Mapping[str, Any], where: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a node with a _target_ would call, and with what. Raises ValueError in one line if that does not fit."""
    target = locate(node[TARGET], f"{where}.{TARGET}")
    given = {key: value for key, value in node.items() if key != TARGET}
    if not fields_of(target):
        given = {key: build(value, f"{where}.{key}") for key, value in given.items()}
        check_call(target, given, where)
    return target, given


def locate(path: Any, where: str) -> Callable[..., Any]:
    """The class or function of a dotted path. Raises ValueError in one line."""
    try:
        return TypeAdapter(ImportString[Callable[..., Any]]).validate_python(path)
    except Exception as error:  # importing runs whatever the module holds
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{where}={path} cannot be loaded: {' '.join(reason.split())}") from error


def check_call(target: Callable[..., Any], given: Mapping[str, Any], where: str) -> None:
    """Raises ValueError in one line unless the arguments fit the signature of a class or function."""
    parameters = inspect.signature(target).parameters
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    hints = typing.get_type_hints(function)
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if p.default is p.empty else p.default) for name, p in named.items()
    }
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    config = CONFIG | ConfigDict(extra="allow" if is_open else "forbid", use_attribute_docstrings=False)
    unset: list[str] = []
    tree = without_unset(given, where, unset)
    model = create_model("arguments", __config__=config, **fields)
    try:
        model.model_validate(tree)
    except ValidationError as error:
        raise ValueError(one_line(error, model, tree, where, unset)) from None
    if unset:
        raise ValueError(not_set(unset))
