"""The hierarchy of one SAE, with the same tests run on controls."""

import hashlib
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from msae.data.rows import Rows
from msae.hierarchy.edges import Edges, Trial, grade, levels
from msae.hierarchy.firings import Array, Firings, FirstRows, collect
from msae.hierarchy.limits import STAGES, Limits
from msae.hierarchy.pairs import covering_pairs
from msae.sae import MatryoshkaSAE
from msae.settings import Count, NonNegative, settings

THIS, FIRINGS, ORDER, VANILLA = "this SAE", "firings shuffled", "order shuffled", "vanilla"
REFUTES = {  # what it means if a control keeps as many edges, the worst first
    FIRINGS: "Chance alone gives as many: nothing is found",
    ORDER: "The order of its latents adds nothing: it finds no hierarchy by prefixes",
    VANILLA: "A vanilla SAE gives as many: nested prefixes add nothing",
}


@settings
class Asked:
    """What decides a hierarchy; `sae` and `vanilla` are hashes of weights, `shards` that of their identity."""

    sae: str
    shards: str
    tokens: Count | None
    limits: Limits
    seed: int
    vanilla: str | None

    def differs_in(self, other: "Asked") -> list[str]:
        """The names of what differs."""
        return [f.name for f in fields(Asked) if getattr(self, f.name) != getattr(other, f.name)]


@settings
class About:
    """What was measured on what: `tokens` were read."""

    d_sae: Count
    tokens: Count
    l0: NonNegative
    shards: str
    model: str
    hook_name: str
    asked: Asked


@dataclass
class Hierarchy:
    """One SAE's latents [d_sae] and edges, the funnels of it and of its controls, and a verdict."""

    prefixes: list[int]
    level: Array  # 0, 1, … : the first prefix that holds the latent
    rate: Array
    largest: Array
    edges: Edges
    funnels: dict[str, dict[str, int]]
    about: About
    truth: dict[str, float] = field(default_factory=dict)  # figures against the true edges, where these are known

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


def check_fits(sae: MatryoshkaSAE, shards: Rows) -> None:
    """Raises ValueError in one line unless these are rows that the SAE can read and reconstruct."""
    if sae.is_transcoder:
        raise ValueError("this is a transcoder, whose error needs two hooks; the hierarchy is of autoencoders")
    if sae.d_in != shards.d_in:
        raise ValueError(
            f"{shards} has d_in={shards.d_in}, the SAE expects {sae.d_in}; "
            "give shards=<the directory of the hook that it was trained on>"
        )


def weights_hash(sae: MatryoshkaSAE) -> str:
    """Twelve hex digits that tell one SAE from another of its shape."""
    digest = hashlib.sha256(str(sae.prefixes).encode())
    for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold, sae.scale, sae.mean):
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def asked_of(
    sae: MatryoshkaSAE, shards: Rows, tokens: int | None, limits: Limits, vanilla: MatryoshkaSAE | None, seed: int
) -> Asked:
    """What `extract` is asked by these arguments."""
    of_vanilla = None if vanilla is None else weights_hash(vanilla)
    return Asked(weights_hash(sae), shards.identity_hash, tokens, limits, seed, of_vanilla)


def extract(
    sae: MatryoshkaSAE,
    shards: Rows,
    tokens: int | None,
    limits: Limits,
    vanilla: MatryoshkaSAE | None = None,
    seed: int = 0,
) -> tuple[Hierarchy, Firings]:
    """Find and test edges on about `tokens` rows (None: all), in the SAE and in its controls; and its firings.

    Controls go through the same tests: firings shuffled against each other, the order of the latents shuffled (where
    there are several prefixes), and a vanilla SAE. All rows are read twice: to encode them, by both SAEs, and for the
    tests of everything. Raises ValueError in one line if SAE and shards do not fit.
    """
    saes = [sae] if vanilla is None else [sae, vanilla]
    for one in saes:
        check_fits(one, shards)

    def trial(of: MatryoshkaSAE, firings: Firings, *orders: Array) -> Trial:
        covering = covering_pairs(firings, limits.coverage, limits.least)
        return Trial(of, firings, covering, orders, limits)

    rows, orders = FirstRows(shards, tokens), {THIS: levels(sae.prefixes)}
    firings, *others = collect(saes, rows, limits.floor)
    if len(sae.prefixes) > 1:
        orders[ORDER] = np.random.default_rng(seed).permutation(orders[THIS])
    trials = [trial(sae, firings, *orders.values()), trial(sae, firings.shuffled(seed), orders[THIS])]
    if vanilla is not None:
        trials.append(trial(vanilla, others[0], levels(vanilla.prefixes)))
    found = [edges for of_trial in grade(rows, trials) for edges in of_trial]
    names = [*orders, FIRINGS, *([] if vanilla is None else [VANILLA])]
    about = About(
        d_sae=sae.d_sae,
        tokens=firings.rows,
        l0=len(firings.code.acts) / firings.rows,
        shards=shards.name,
        model=without_directory(str(sae.metadata.get("model_name") or "")),
        hook_name=shards.hook_name,
        asked=asked_of(sae, shards, tokens, limits, vanilla, seed),
    )
    funnels = {name: edges.funnel() for name, edges in zip(names, found, strict=True)}
    rate = firings.counts / firings.rows
    return Hierarchy(list(sae.prefixes), orders[THIS], rate, firings.largest, found[0], funnels, about), firings


def without_directory(model: str) -> str:
    """A hub name as it is; of a path the last part, since what is written here may be shown to others."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model
