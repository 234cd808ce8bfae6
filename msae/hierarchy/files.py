"""The files that keep a hierarchy: hierarchy.json, and firings.safetensors beside it."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from msae.files import checksum, read_json, write, write_json
from msae.hierarchy.edges import Edges, levels
from msae.hierarchy.extract import THIS, About, Hierarchy
from msae.hierarchy.firings import Array, Firings
from msae.hierarchy.limits import LINES, STAGES, TESTS
from msae.sae import SparseCode
from msae.settings import Count, Natural, NonNegative, Share, as_plain, settings

VERSION = 3
AGAIN = "python -m msae.explore makes it anew"


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
    firings: str | None  # checksum of the file beside this one
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


def save(hierarchy: Hierarchy, path: Path, firings: str | None = None) -> None:
    """Write JSON in columns: of latents, and of every candidate edge its figures, tests and whether it survives.

    `firings` is the checksum of the firings that are kept beside it.
    """
    edges = hierarchy.edges
    content = HierarchyFile(
        format="msae-hierarchy",
        version=VERSION,
        verdict=hierarchy.verdict(),
        about=hierarchy.about,
        firings=firings,
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


def load(path: Path) -> tuple[Hierarchy, str | None]:
    """Read what `save` wrote: a hierarchy, and the checksum of its firings. Raises ValueError in one line."""
    file = read_json(path, HierarchyFile, "a hierarchy of this msae", AGAIN, VERSION)
    edges = file.edges.as_arrays(file.funnels[THIS]["pairs"])
    rate, largest = np.array(file.latents.rate), np.array(file.latents.largest)
    truth = {name: np.nan if value is None else value for name, value in file.truth.items()}
    hierarchy = Hierarchy(file.prefixes, levels(file.prefixes), rate, largest, edges, file.funnels, file.about, truth)
    return hierarchy, file.firings


def save_firings(firings: Firings, path: Path) -> str:
    """Write offsets int64 [rows + 1], latents int32 and acts float32 [activations]; the checksum of the file."""
    code = firings.code
    tensors = {"offsets": code.offsets, "latents": code.latents, "acts": code.acts}
    write(path, lambda temporary: save_file(tensors, temporary), "free space or give keep_firings=false")
    return checksum(path)


def load_firings(path: Path, expected: str, d_sae: int) -> Firings:
    """Read what `save_firings` wrote. Raises ValueError in one line where the checksum is another."""
    try:
        if checksum(path) != expected:
            raise ValueError("its checksum is another")
        return Firings(SparseCode(**load_file(path), d_sae=d_sae))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} does not hold the firings of the hierarchy beside it ({error})") from None
