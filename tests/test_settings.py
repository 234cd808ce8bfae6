"""Settings: what a plain tree is decoded to, errors of one line, and the tables made of them."""

import math
import subprocess
import sys
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import pytest
from omegaconf import OmegaConf
from pydantic import Field

from msae.cli.command import config_dir
from msae.sae.sparsity import JumpReLU
from msae.settings import Count, NonNegative, Positive, Share, as_plain, build, changed, decode, keys, settings
from msae.sources.forest import ForestSource
from msae.training.settings import Recipe


@settings
class Inner:
    """A group."""

    rate: Share = 0.5
    """How much."""
    kind: Literal["a", "b"] = "a"


@settings
class Outer:
    """All kinds of fields."""

    n: Count
    """How many,
    in two lines."""
    inner: Inner = field(default_factory=Inner)
    size: float | None = None
    listed: list[NonNegative] | Literal["even"] = "even"
    pair: Annotated[list[float], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.0, 1.0])
    named: dict[str, Positive] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n == 13:
            raise ValueError("outer.n=13 is unlucky; give another")


def test_a_tree_becomes_settings_and_a_tree_again() -> None:
    tree = {"n": 2, "inner": {"rate": 1}, "size": 3, "listed": [1, 0.5], "named": {"x": 2}}
    decoded = decode(Outer, tree)
    assert decoded == Outer(2, Inner(1.0), 3.0, [1.0, 0.5], named={"x": 2.0})
    assert isinstance(decoded.size, float)  # an int for a float
    plain = as_plain(decoded)
    assert plain == tree | {"inner": {"rate": 1, "kind": "a"}, "pair": [0, 1]}
    assert decode(Outer, plain) == decoded
    assert changed(decoded, n=3) == decode(Outer, plain | {"n": 3})
    assert decode(Outer, {"inner": {}}, may_lack=("n",)) is None  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"n": 2, "innr": {}}, "unknown key outer.innr; did you mean outer.inner?"),
        ({"n": 2, "inner": {"rte": 1}}, "unknown key outer.inner.rte; did you mean outer.inner.rate?"),
        ({"n": 2, "rate": 1}, "unknown key outer.rate; did you mean outer.inner.rate?"),
        ({"n": "x", "zzzz": 1}, "unknown key outer.zzzz; valid here: inner, listed, n, named, pair, size"),
        ({}, "not set: outer.n; give outer.n=…"),
        (
            {"n": "???", "inner": {"rate": "???"}},
            "not set: outer.n, outer.inner.rate; give outer.n=… outer.inner.rate=…",
        ),
        ({"n": 0}, "outer.n=0: expected int ≥ 1"),
        ({"n": 1.5}, "outer.n=1.5: expected int ≥ 1"),
        ({"n": True}, "outer.n=true: expected int ≥ 1"),
        ({"n": 2, "size": "x"}, "outer.size=x: expected number | null"),
        ({"n": 2, "size": math.inf}, "outer.size=inf: expected number | null"),
        ({"n": 2, "inner": {"rate": 1.5}}, "outer.inner.rate=1.5: expected number in [0, 1]"),
        ({"n": 2, "inner": {"kind": "c"}}, "outer.inner.kind=c: expected a | b"),
        ({"n": 2, "listed": [1, -1]}, "outer.listed=[1, -1]: expected list of number ≥ 0 | even"),
        ({"n": 2, "pair": [1]}, "outer.pair=[1]: expected list of 2 number"),
        ({"n": 2, "named": {"x": 0}}, "outer.named={x: 0}: expected mapping to number > 0"),
        ({"n": 13}, "outer.n=13 is unlucky; give another"),
        (
            {"n": 2, "inner": {"rate": -1, "kind": 3}},
            "outer.inner.kind=3: expected a | b; outer.inner.rate=-1: expected ",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(tree, line) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        decode(Outer, tree, "outer")
    assert str(error.value).startswith(line)
    assert line.endswith("expected ") or str(error.value) == line


def test_keys_say_what_may_be_set() -> None:
    assert keys(Outer, "outer")[:3] == [
        ("outer.n", "int ≥ 1", "", "How many, in two lines."),
        ("outer.inner.rate", "number in [0, 1]", "0.5", "How much."),
        ("outer.inner.kind", "a | b", "a", ""),
    ]


def test_what_is_made_by_its_class_is_checked_too() -> None:
    tree = {"_target_": "msae.sources.forest.ForestSource", "rows": 5}
    assert build(tree, "data.source", seed=2) == ForestSource(rows=5, seed=2)
    (callback,) = build([{"_target_": "lightning.pytorch.callbacks.Timer", "interval": "epoch"}], "trainer.callbacks")
    assert isinstance(callback, L.pytorch.callbacks.Timer)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"_target_": "msae.sources.forest.ForestSource", "ros": 5}, "unknown key x.ros; did you mean x.rows?"),
        ({"_target_": "lightning.Trainer", "max_time": 1.5}, "x.max_time=1.5: expected "),
        ({"_target_": "lightning.Trainer", "max_epochs": "???"}, "not set: x.max_epochs;"),
        ({"_target_": "msae.nowhere"}, "x._target_=msae.nowhere cannot be loaded: "),
        ({"_target_": 3}, "x._target_=3 cannot be loaded: "),
    ]
    for tree, line in wrong:
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            build(tree, "x")
        assert str(error.value).startswith(line)


@pytest.mark.parametrize("file", sorted((config_dir("conf") / "preset").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_is_decoded_from_what_it_is_encoded_to(file) -> None:
    model = OmegaConf.to_container(OmegaConf.load(file).model)
    assert isinstance(model, dict)
    recipe = decode(Recipe, {"d_sae": 32, "prefixes": [4, 32], "k": 2, **model}, "model")
    assert decode(Recipe, as_plain(recipe)) == recipe


def test_a_mechanism_is_a_name_or_has_settings() -> None:
    def sparsity(given: Any) -> Any:
        return decode(Recipe, {"d_sae": 4, "prefixes": [4], "k": 2, "sparsity": given}).sparsity

    assert sparsity("jumprelu") == JumpReLU()
    assert sparsity({"name": "jumprelu", "bandwidth": 0.5}) == JumpReLU(bandwidth=0.5)
    recipe = Recipe(4, [4], 2, sparsity=JumpReLU())
    assert as_plain(recipe)["sparsity"] == {"name": "jumprelu", "threshold_init": 0.001, "bandwidth": 0.001}


def test_every_setting_has_a_meaning_and_the_page_of_all_is_current() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = subprocess.run([sys.executable, docs / "settings.py"], capture_output=True, text=True, check=True).stdout
    assert [line for line in page.splitlines() if line.endswith("|  |")] == []
    assert (docs / "settings.md").read_text() == page, "python docs/settings.py > docs/settings.md"
