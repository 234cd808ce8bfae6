"""Arms: several models in one run, each what differs from `model`; a grid makes them in every combination."""

import itertools
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from msae.cli.command import config_dir, plain
from msae.runs import RESERVED, RESERVED_SUFFIXES, Arm
from msae.settings import decode
from msae.training.settings import Recipe, Train


def describe_arms(plan: Train) -> list[Arm]:
    """Every arm × grid; none for one model alone. Raises ValueError in one line for names that cannot be told apart."""
    if not plan.arms and not plan.grid:
        return []
    grid = plan.grid or {}
    described = []
    for arm, values in itertools.product(plan.arms or {"": None}, itertools.product(*grid.values())):
        parts = [*([arm] if arm else []), *(f"{key}{value}" for key, value in zip(grid, values, strict=True))]
        settings = {f"model.{key}": value for key, value in zip(grid, values, strict=True)}
        described.append(Arm(re.sub(r"[^\w.+=-]+", "_", "-".join(parts)), arm or plan.name, settings))
    names = [arm.name for arm in described]
    taken = {n for n in names if names.count(n) > 1 or n in RESERVED or n.endswith(RESERVED_SUFFIXES)}
    if not names or taken or any(not name.strip(".") for name in names):
        raise ValueError(f"arms and grid name {', '.join(sorted(taken)) or 'nothing'} ambiguously; rename an arm")
    return described


def recipes_of(plan: Train, arms: list[Arm], model: DictConfig) -> dict[str, Recipe]:
    """The recipe of every arm by its name; {"": that of `model`} for one alone. Raises ValueError in one line.

    An arm says what differs from `model`; its `preset` is a recipe of conf/preset, which the arm's own keys beat.
    """
    recipes = {}
    for described in arms:
        arm: dict[str, Any] = dict((plan.arms or {}).get(described.arm) or {})
        merged = OmegaConf.create(plain(model))
        if (preset := arm.pop("preset", None)) is not None:
            merged.merge_with(preset_of(preset, f"arms.{described.arm}"))
        merged.merge_with(OmegaConf.create(arm))
        for key, value in described.settings.items():
            OmegaConf.update(merged, key.removeprefix("model."), value, merge=False)
        try:
            recipes[described.name] = decode(Recipe, plain(merged), "model")
        except ValueError as error:
            raise ValueError(f"arm {described.name}: {error}") from None
    return recipes or {"": plan.model}


def preset_of(preset: Any, where: str) -> DictConfig:
    """The model of a published recipe. Raises ValueError in one line if there is none of this name."""
    known = {path.stem: path for path in sorted((config_dir("conf") / "preset").glob("*.yaml"))}
    if preset not in known:
        raise ValueError(f"{where}.preset={preset} is none of {', '.join(known)}")
    model = OmegaConf.load(known[preset]).model
    assert isinstance(model, DictConfig)
    return OmegaConf.create(plain(model))
