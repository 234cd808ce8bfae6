"""The hierarchy of one SAE with the same tests run on controls, and the file that keeps all of it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msae.data.shards import Shards, write_json
from msae.evaluation.matching import match
from msae.evaluation.truth import edge_scores
from msae.hierarchy.edges import Edges, grade
from msae.hierarchy.firings import Array, Firings, collect
from msae.hierarchy.limits import TESTS, Limits
from msae.hierarchy.pairs import covering_pairs
from msae.sae import MatryoshkaSAE

FILE, FORMAT, VERSION = "hierarchy.json", "msae-hierarchy", 1
THIS, FIRINGS, ORDER, VANILLA = "this SAE", "firings shuffled", "order shuffled", "vanilla"
SAYS = {  # what it means if a control keeps as many edges
    FIRINGS: "chance alone gives as many: nothing is found",
    ORDER: "the order of its latents adds nothing: it finds no hierarchy by prefixes",
    VANILLA: "a vanilla SAE gives as many: nested prefixes add nothing",
}


@dataclass
class Hierarchy:
    """What was found in one SAE: its latents [d_sae], edges, the funnels of it and its controls, and a verdict."""

    prefixes: list[int]
    level: Array  # 0, 1, … : the first prefix that holds the latent
    rate: Array
    largest: Array
    edges: Edges
    funnels: dict[str, dict[str, int]]
    truth: dict[str, float]
    about: dict[str, Any]

    @property
    def parent(self) -> Array:
        """The surviving parent of each latent [d_sae], −1 without one."""
        return self.edges.parents(len(self.level))

    def verdict(self) -> str:
        """One sentence: how many edges survive, and whether a control keeps as many."""
        kept = {name: list(funnel.values())[-1] for name, funnel in self.funnels.items()}
        mine = kept.pop(THIS)
        candidates = len(self.edges.parent)
        beside = ", ".join(
            f"{n:,} with {name}" if name != VANILLA else f"{n:,} in a vanilla SAE" for name, n in kept.items()
        )
        said = f"{mine:,} of {candidates:,} candidate edges survive every test; {beside}"
        if not mine:
            return f"{said}. Nothing is found."
        if failed := [says for name, says in SAYS.items() if kept.get(name, -1) >= mine]:
            said += f". {failed[0][0].upper()}{failed[0][1:]}"
        return said + "."


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


def levels(sae: MatryoshkaSAE) -> Array:
    """The first prefix that holds each latent [d_sae]."""
    return np.searchsorted(sae.prefixes, np.arange(sae.d_sae), side="right")


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
    level = levels(sae)
    firings = collect(sae, shards, tokens, limits.floor)
    covering = covering_pairs(firings, limits.coverage, limits.least)
    edges = grade(sae, shards, firings, covering, level, limits)
    funnels = {THIS: edges.funnel()}
    if len(sae.prefixes) > 1:
        shuffled = np.random.default_rng(seed).permutation(level)
        funnels[ORDER] = grade(sae, shards, firings, covering, shuffled, limits).funnel()
    strangers = firings.shuffled(seed)
    covering = covering_pairs(strangers, limits.coverage, limits.least)
    funnels[FIRINGS] = grade(sae, shards, strangers, covering, level, limits).funnel()
    del strangers
    if vanilla is not None:
        of_vanilla = collect(vanilla, shards, tokens, limits.floor)
        covering = covering_pairs(of_vanilla, limits.coverage, limits.least)
        funnels[VANILLA] = grade(vanilla, shards, of_vanilla, covering, levels(vanilla), limits).funnel()
    about = {
        "d_sae": sae.d_sae,
        "tokens": firings.rows,
        "l0": firings.matrix.nnz / firings.rows,
        "shards": shards.directory.name,
        "weights": weights_hash(sae),
        "identity_hash": shards.manifest["identity_hash"],
        "model": short(str(sae.metadata.get("model_name") or "")),
        "hook_name": shards.manifest["hook_name"],
        "limits": asdict(limits),
    }
    counts, largest = firings.counts(), firings.largest()
    truth = against_truth(sae, shards, edges)
    return Hierarchy(sae.prefixes, level, counts / firings.rows, largest, edges, funnels, truth, about), firings


def short(model: str) -> str:
    """A hub name as it is; of a path the last part, since what is written here may be shown to others."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def against_truth(sae: MatryoshkaSAE, shards: Shards, edges: Edges) -> dict[str, float]:
    """Precision and recall of the surviving edges where the true tree is known; else nothing."""
    if shards.truth is None:
        return {}
    found = match(sae.W_dec.detach(), shards.truth["features"].float())
    surviving = np.stack([edges.parent[edges.survives], edges.child[edges.survives]], axis=1)
    return edge_scores(torch.from_numpy(surviving), found, shards.truth["parent"])


# The file ----------------------------------------------------------------------------------------------------


def numbers(values: Array) -> list[Any]:
    """Four significant digits are enough; JSON has no NaN."""
    if values.dtype.kind != "f":
        return values.tolist()
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]


def save(hierarchy: Hierarchy, path: Path) -> None:
    """Write JSON in columns: of latents, and of every candidate edge its figures, tests and whether it survives."""
    edges = hierarchy.edges
    write_json(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "verdict": hierarchy.verdict(),
            "about": hierarchy.about,
            "truth": hierarchy.truth,
            "funnels": hierarchy.funnels,
            "tests": {key: test._asdict() for key, test in TESTS.items()},
            "prefixes": hierarchy.prefixes,
            "latents": {
                "level": numbers(hierarchy.level),
                "rate": numbers(hierarchy.rate),
                "largest": numbers(hierarchy.largest),
                "parent": numbers(hierarchy.parent),
            },
            "edges": {
                "parent": numbers(edges.parent),
                "child": numbers(edges.child),
                "survives": numbers(edges.survives),
                "holes": numbers(edges.holes),
                "figures": {key: numbers(values) for key, values in edges.figures.items()},
                "passed": {key: numbers(values) for key, values in edges.passed.items()},
            },
        },
        indent=None,
    )


def load(path: Path) -> Hierarchy:
    """Read what `save` wrote. Raises ValueError in one line for anything else."""
    again = "run python -m msae.hierarchy again"
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(f"its format is {content['format']} {content['version']}, expected {FORMAT} {VERSION}")
        latents, of = content["latents"], content["edges"]
        n, d_sae = len(of["parent"]), content["prefixes"][-1]
        columns = [*of["figures"].values(), *of["passed"].values(), of["child"], of["holes"]]
        ends = np.array([of["parent"], of["child"]], dtype=np.int64)
        if {len(column) for column in columns} - {n} or {len(column) for column in latents.values()} != {d_sae}:
            raise ValueError("columns of different lengths")
        if n and (ends.min() < 0 or ends.max() >= d_sae):
            raise ValueError(f"latents beyond {d_sae}")
        drawn = {key for key, test in TESTS.items() if test.line}
        if set(of["figures"]) != set(TESTS) or set(of["passed"]) != drawn:
            raise ValueError("other tests than this msae has")
        edges = Edges(
            ends[0],
            ends[1],
            np.array(of["holes"], dtype=np.int64),
            {key: np.array(values, dtype=np.float64) for key, values in of["figures"].items()},
            {key: np.array(values, dtype=bool) for key, values in of["passed"].items()},
            content["funnels"][THIS]["pairs"],
        )
        level, rate, largest = (np.array(latents[key]) for key in ("level", "rate", "largest"))
        funnels, truth, about = content["funnels"], content["truth"], content["about"]
        Limits(**about["limits"])  # is relied on, as are these
        if not (type(about["tokens"]) is int and about["tokens"] > 0):
            raise ValueError(f"about.tokens is {about['tokens']!r}")
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; run python -m msae.hierarchy first") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        raise ValueError(f"{path} is not a hierarchy of this msae ({error}); {again}") from None
    return Hierarchy(content["prefixes"], level, rate, largest, edges, funnels, truth, about)
