"""The hierarchy of one SAE with the same tests run on controls, and the file that keeps all of it."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from msae.data.shards import Shards
from msae.evaluation.matching import match
from msae.evaluation.truth import edge_scores
from msae.files import read_json, write_json
from msae.hierarchy.edges import Edges, grade
from msae.hierarchy.firings import Array, Firings, collect
from msae.hierarchy.limits import LINES, STAGES, TESTS, Limits
from msae.hierarchy.pairs import covering_pairs
from msae.sae import MatryoshkaSAE
from msae.settings import Count, Natural, NonNegative, Share, as_plain, settings

VERSION = 2
THIS, FIRINGS, ORDER, VANILLA = "this SAE", "firings shuffled", "order shuffled", "vanilla"
REFUTES = {  # what it means if a control keeps as many edges, the worst first
    FIRINGS: "Chance alone gives as many: nothing is found",
    ORDER: "The order of its latents adds nothing: it finds no hierarchy by prefixes",
    VANILLA: "A vanilla SAE gives as many: nested prefixes add nothing",
}


@settings
class About:
    """What was measured on what."""

    d_sae: Count
    tokens: Count
    l0: NonNegative
    shards: str
    weights: str
    identity_hash: str
    model: str
    hook_name: str
    limits: Limits


@dataclass
class Hierarchy:
    """One SAE's latents [d_sae] and edges, the funnels of it and of its controls, and a verdict."""

    prefixes: list[int]
    level: Array  # 0, 1, … : the first prefix that holds the latent
    rate: Array
    largest: Array
    edges: Edges
    funnels: dict[str, dict[str, int]]
    truth: dict[str, float]
    about: About

    @cached_property
    def parent(self) -> Array:
        """The surviving parent of each latent [d_sae], −1 without one."""
        return self.edges.parents(len(self.level))

    def verdict(self) -> str:
        """One sentence: how many edges survive, and whether a control keeps as many."""
        kept = {name: funnel[STAGES[-1]] for name, funnel in self.funnels.items()}
        survivors = kept.pop(THIS)
        controls = [f"{n:,} {'in a vanilla SAE' if name == VANILLA else f'with {name}'}" for name, n in kept.items()]
        line = f"{survivors:,} of {len(self.edges.parent):,} candidate edges survive every test; {', '.join(controls)}."
        if not survivors:
            return f"{line} Nothing is found."
        refuted = [f" {meaning}." for name, meaning in REFUTES.items() if kept.get(name, -1) >= survivors]
        return line + "".join(refuted[:1])


def check_fits(sae: MatryoshkaSAE, shards: Shards) -> None:
    """Raises ValueError in one line unless these are rows that the SAE can read and reconstruct."""
    if sae.is_transcoder:
        raise ValueError("this is a transcoder, whose error needs two hooks; the hierarchy is of autoencoders")
    if sae.d_in != shards.d_in:
        raise ValueError(
            f"shards in {shards.directory} have d_in={shards.d_in}, the SAE expects {sae.d_in}; "
            "give shards=<the directory of the hook that it was trained on>"
        )


def weights_hash(sae: MatryoshkaSAE) -> str:
    """Twelve hex digits that tell one SAE from another of its shape."""
    digest = hashlib.sha256()
    for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold):
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def levels(prefixes: list[int]) -> Array:
    """The first prefix that holds each latent [d_sae]: 0, 1, …"""
    return np.searchsorted(prefixes, np.arange(prefixes[-1]), side="right")


def extract(
    sae: MatryoshkaSAE,
    shards: Shards,
    tokens: int | None,
    limits: Limits,
    vanilla: MatryoshkaSAE | None = None,
    seed: int = 0,
) -> tuple[Hierarchy, Firings]:
    """Find and test edges on about `tokens` rows (None: all), in the SAE and in its controls; and its firings.

    Controls go through the same tests: firings shuffled against each other, the order of the latents shuffled (where
    there are several prefixes), and a vanilla SAE. Raises ValueError in one line if SAE and shards do not fit.
    """
    for one in (sae, vanilla):
        if one is not None:
            check_fits(one, shards)

    def funnel(of: MatryoshkaSAE, firings: Firings) -> dict[str, int]:
        covering = covering_pairs(firings, limits.coverage, limits.least)
        return grade(of, shards, firings, covering, levels(of.prefixes), limits).funnel()

    level = levels(sae.prefixes)
    firings = collect(sae, shards, tokens, limits.floor)
    covering = covering_pairs(firings, limits.coverage, limits.least)
    edges = grade(sae, shards, firings, covering, level, limits)
    funnels = {THIS: edges.funnel()}
    if len(sae.prefixes) > 1:
        shuffled = np.random.default_rng(seed).permutation(level)
        funnels[ORDER] = grade(sae, shards, firings, covering, shuffled, limits).funnel()
    funnels[FIRINGS] = funnel(sae, firings.shuffled(seed))
    if vanilla is not None:
        funnels[VANILLA] = funnel(vanilla, collect(vanilla, shards, tokens, limits.floor))
    about = About(
        d_sae=sae.d_sae,
        tokens=firings.rows,
        l0=len(firings.code.acts) / firings.rows,
        shards=shards.directory.name,
        weights=weights_hash(sae),
        identity_hash=shards.manifest.identity_hash,
        model=without_directory(str(sae.metadata.get("model_name") or "")),
        hook_name=shards.manifest.hook_name,
        limits=limits,
    )
    rate, truth = firings.counts / firings.rows, against_truth(sae, shards, edges)
    return Hierarchy(list(sae.prefixes), level, rate, firings.largest, edges, funnels, truth, about), firings


def without_directory(model: str) -> str:
    """A hub name as it is; of a path the last part, since what is written here may be shown to others."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def against_truth(sae: MatryoshkaSAE, shards: Shards, edges: Edges) -> dict[str, float]:
    """Precision and recall of the surviving edges where the true tree is known; else nothing."""
    if shards.truth is None:
        return {}
    matching = match(sae.W_dec.detach(), shards.truth["features"].float())
    surviving = np.stack([edges.parent[edges.survives], edges.child[edges.survives]], axis=1)
    return edge_scores(torch.from_numpy(surviving), matching, shards.truth["parent"])


# The file -------------------------------------------------------------------------------------------------------------


@settings
class LatentColumns:
    """A number for each latent."""

    level: list[Natural]
    rate: list[Share]
    largest: list[NonNegative]
    parent: list[int]


@settings
class EdgeColumns:
    """For each candidate edge its ends, figures and tests."""

    parent: list[Natural]
    child: list[Natural]
    survives: list[bool]
    holes: list[Natural]
    figures: dict[str, list[float | None]]  # four significant digits; JSON has no NaN
    passed: dict[str, list[bool]]

    def as_arrays(self, looked_at: int) -> Edges:
        """The edges that were saved."""
        return Edges(
            np.array(self.parent, dtype=np.int64),
            np.array(self.child, dtype=np.int64),
            np.array(self.holes, dtype=np.int64),
            {key: np.array(self.figures[key], dtype=np.float64) for key in TESTS},
            {key: np.array(self.passed[key], dtype=bool) for key in LINES},
            looked_at,
        )


@settings
class HierarchyFile:
    """hierarchy.json."""

    format: Literal["msae-hierarchy"]
    version: Count
    verdict: str
    about: About
    truth: dict[str, float | None]
    funnels: dict[str, dict[str, Natural]]
    tests: dict[str, dict[str, str]]
    prefixes: list[Count]
    latents: LatentColumns
    edges: EdgeColumns

    def __post_init__(self) -> None:
        edges, of, d_sae = self.edges, self.latents, max(self.prefixes, default=0)
        if sorted({*self.prefixes, d_sae}) != self.prefixes:
            raise ValueError("prefixes that do not rise")
        if set(edges.figures) != set(TESTS) or set(edges.passed) != set(LINES):
            raise ValueError("other tests than this msae has")
        if THIS not in self.funnels or any(set(funnel) != set(STAGES) for funnel in self.funnels.values()):
            raise ValueError("funnels of other stages")
        columns: list[list[Any]] = [edges.child, edges.survives, edges.holes]
        columns += [*edges.figures.values(), *edges.passed.values()]
        if any(len(c) != len(edges.parent) for c in columns) or any(len(c) != d_sae for c in vars(of).values()):
            raise ValueError("columns of different lengths")
        if max([*edges.parent, *edges.child], default=-1) >= d_sae:
            raise ValueError(f"latents beyond {d_sae}")
        ancestor = edges.as_arrays(looked_at=0).parents(d_sae)
        for _ in range(d_sae.bit_length()):  # each round doubles the steps upwards
            ancestor = np.where(ancestor >= 0, ancestor[ancestor], -1)
        if (ancestor >= 0).any():
            raise ValueError("parents that go round in a circle")


def numbers(values: Array) -> list[Any]:
    """A column as JSON: of floats four significant digits, null for what is not finite."""
    if values.dtype.kind != "f":
        return values.tolist()
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]


def save(hierarchy: Hierarchy, path: Path) -> None:
    """Write JSON in columns: of latents, and of every candidate edge its figures, tests and whether it survives."""
    edges = hierarchy.edges
    content = HierarchyFile(
        format="msae-hierarchy",
        version=VERSION,
        verdict=hierarchy.verdict(),
        about=hierarchy.about,
        truth={name: None if np.isnan(value) else value for name, value in hierarchy.truth.items()},
        funnels=hierarchy.funnels,
        tests={key: test._asdict() for key, test in TESTS.items()},
        prefixes=hierarchy.prefixes,
        latents=LatentColumns(
            **{name: numbers(getattr(hierarchy, name)) for name in ("level", "rate", "largest", "parent")}
        ),
        edges=EdgeColumns(
            **{name: numbers(getattr(edges, name)) for name in ("parent", "child", "survives", "holes")},
            figures={key: numbers(values) for key, values in edges.figures.items()},
            passed={key: numbers(values) for key, values in edges.passed.items()},
        ),
    )
    write_json(path, as_plain(content), indent=None)


def load(path: Path) -> Hierarchy:
    """Read what `save` wrote. Raises ValueError in one line for anything else."""
    file = read_json(path, HierarchyFile, "a hierarchy of this msae", "run python -m msae.hierarchy again", VERSION)
    edges = file.edges.as_arrays(file.funnels[THIS]["pairs"])
    rate, largest = np.array(file.latents.rate), np.array(file.latents.largest)
    truth = {name: np.nan if value is None else value for name, value in file.truth.items()}
    return Hierarchy(file.prefixes, levels(file.prefixes), rate, largest, edges, file.funnels, truth, file.about)
