"""The bodies of `python -m msae.hierarchy` and `python -m msae.report`."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize
from torch.utils.tensorboard import SummaryWriter

from msae.data.bridge import TOKENIZER, load_bridge, load_tokenizer, model_identity
from msae.data.shards import Shards
from msae.hierarchy import pictures
from msae.hierarchy.examples import Examples, Text, feature_labels, fires_on, histogram, text_of, words
from msae.hierarchy.extract import FILE, THIS, Hierarchy, check_fits, extract, load, save, weights_hash
from msae.hierarchy.firings import Array, Firings, collect
from msae.hierarchy.limits import TESTS, Limits
from msae.hierarchy.page import PageData, write_page
from msae.interop import load as load_sae
from msae.progress import progress
from msae.sae import MatryoshkaSAE

NEAREST, PROMOTED = 8, 10  # shown of each latent
PROJECTED = 4096  # latents in TensorBoard's projector, which takes text files


class Inputs:
    """The SAE, its shards, a vanilla one beside it, and the words of its model, as the configuration names them."""

    def __init__(self, cfg: DictConfig) -> None:
        given = Path(cfg.run)
        self.run = given.parent if given.name == "sae" and not (given / "sae").exists() else given
        if (self.run / "arms.json").exists() and not (self.run / "sae").exists():
            raise ValueError(f"{self.run} has several SAEs; give run={self.run}/<one of {', '.join(arms(self.run))}>")
        self.sae = load_sae(given)
        self.config = config_of(self.run)
        self.out = Path(cfg.out) if cfg.out is not None else self.run
        self.shards = Shards(self.find_shards(cfg.shards))
        check_fits(self.sae, self.shards)
        source = mapping(mapping(self.config.get("data")).get("source"))
        self.model = cfg.language_model or source.get("model")
        same = cfg.language_model in (None, source.get("model"))
        self.revision = source.get("revision") if same else None
        self.tokenizer = (source.get("tokenizer") if same else None) or self.model

    def find_shards(self, given: str | None) -> Path:
        """The directory that was given, or the one that the SAE was trained on, where its run says."""
        if given is not None:
            return Path(given)
        name = str(mapping(self.sae.metadata.get("shards")).get("identity_hash"))
        root = Path(str(mapping(self.config.get("data")).get("root") or "shards"))
        if re.fullmatch("[0-9a-f]{12}", name) and (found := sorted(root.glob(f"*-{name}"))):
            return found[0]
        raise ValueError(f"no shards for {self.run}; give shards=<a directory that python -m msae.harvest made>")

    def vanilla(self, given: str | None) -> MatryoshkaSAE | None:
        """The SAE that was given, or an arm of the same run that has one prefix, best as many latents."""
        if given is not None:
            return load_sae(given)
        here = self.run.resolve()
        if len(self.sae.prefixes) == 1 or not (here.parent / "arms.json").exists():
            return None
        beside = [load_sae(here.parent / name) for name in arms(here.parent) if name != here.name]
        one_prefix = [sae for sae in beside if len(sae.prefixes) == 1 and sae.d_in == self.sae.d_in]
        return min(one_prefix, key=lambda sae: abs(sae.d_sae - self.sae.d_sae), default=None)

    def vocabulary(self) -> list[str] | None:
        """The strings of the tokens; None without text or a model. Raises ValueError for another tokenizer."""
        if self.shards.truth is not None or self.tokenizer is None:
            return None
        there = self.shards.identity.get("tokenizer")
        if there is not None and model_identity(self.tokenizer, self.revision, TOKENIZER) != there:
            raise ValueError(
                f"the tokenizer of {self.tokenizer} is not the one that {self.shards.directory} was made with; "
                "give language_model=<the model that was harvested>"
            )
        return words(load_tokenizer(self.tokenizer, self.revision))


def mapping(found: Any) -> dict[str, Any]:
    """What was read where a mapping was expected; empty for anything else."""
    return found if isinstance(found, dict) else {}


def arms(run: Path) -> list[str]:
    """Names of the arms of a run that ended well."""
    try:
        described = json.loads((run / "arms.json").read_text())
        names = [str(arm["name"]) for arm in described if arm["error"] is None]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / 'arms.json'} cannot be read ({error}); give run=<an SAE's directory>") from None
    return [name for name in names if Path(name).name == name and (run / name / "sae").is_dir()]


def config_of(run: Path) -> dict[str, Any]:
    """The configuration of a run, or of the run that an arm belongs to; empty without one."""
    for directory in (run, run.resolve().parent):
        if (directory / "config.yaml").exists():
            found = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
            return mapping(found)
    return {}


# python -m msae.hierarchy ------------------------------------------------------------------------------------


def hierarchy(cfg: DictConfig) -> None:
    """Extract, test, and write hierarchy.json, pictures and TensorBoard's summary to `out`/hierarchy."""
    inputs = Inputs(cfg)
    vocabulary = inputs.vocabulary()
    found, firings = find(inputs, cfg)
    labels = labels_of(inputs, firings, found, vocabulary)[1]
    print_funnel(found)
    summarise(found, inputs.sae, labels, inputs.out / "hierarchy")
    say(f"hierarchy: {inputs.out / 'hierarchy' / FILE}\ncharts:    tensorboard --logdir {inputs.out}")
    given = [f"{key}={cfg[key]}" for key in ("run", "shards", "language_model", "out") if cfg[key] is not None]
    say(f"page:      python -m msae.report {' '.join(given)}")


def find(inputs: Inputs, cfg: DictConfig) -> tuple[Hierarchy, Firings]:
    """Extract and save."""
    directory = inputs.out / "hierarchy"
    directory.mkdir(parents=True, exist_ok=True)
    limits = Limits(**cfg.limits)
    found, firings = extract(inputs.sae, inputs.shards, cfg.tokens, limits, inputs.vanilla(cfg.vanilla), cfg.seed)
    save(found, directory / FILE)
    return found, firings


def labels_of(
    inputs: Inputs, firings: Firings, found: Hierarchy, vocabulary: list[str] | None
) -> tuple[Examples, list[str]]:
    """Examples of every latent, and a few words for it."""
    examples = Examples(firings, text_of(inputs.shards, firings, vocabulary), found.parent)
    truth = inputs.shards.truth
    return examples, examples.labels() if truth is None else feature_labels(inputs.sae, truth["features"])


def print_funnel(found: Hierarchy) -> None:
    """How many edges survive each test, beside the controls."""
    table = Table("left after", "line", *found.funnels)
    limits = found.about["limits"]
    for stage in next(iter(found.funnels.values())):
        counts = [f"{funnel[stage]:,}" for funnel in found.funnels.values()]
        if stage == "pairs":
            table.add_row("pairs looked at", "", *counts)
        else:
            table.add_row(TESTS[stage].name, TESTS[stage].line.format(**limits), *counts)
    for column in table.columns[2:]:
        column.justify = "right"
    Console(stderr=True).print(table)
    survives = found.edges.survives
    holes, fires = found.edges.holes[survives], found.rate[found.edges.child[survives]] * found.about["tokens"]
    if survives.any():
        say(f"holes: on {holes.sum() / fires.sum():.1%} of a surviving child's tokens its parent is silent")
    if found.truth:
        say(", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.truth.items()))
    say(found.verdict())


def summarise(found: Hierarchy, sae: MatryoshkaSAE, labels: list[str], directory: Path) -> None:
    """PNG files and TensorBoard: the funnel, edges by level, the largest trees, and decoder rows in the projector."""
    drawn = {
        "funnel": pictures.funnel(found),
        "levels": pictures.by_level(found),
        "forest": pictures.forest(found, labels),
    }
    survives = found.edges.survives
    shutil.rmtree(directory / "tensorboard", ignore_errors=True)  # of an earlier extraction
    with SummaryWriter(directory / "tensorboard") as writer:
        for name, figure in drawn.items():
            figure.savefig(directory / f"{name}.png", dpi=150)
            writer.add_figure(f"hierarchy/{name}", figure)
        writer.add_text("hierarchy/verdict", found.verdict())
        for name, funnel in found.funnels.items():
            for step, count in enumerate(funnel.values()):
                writer.add_scalar(f"funnel/{name.replace(' ', '_')}", count, step)
            writer.add_scalar(f"edges/{name.replace(' ', '_')}", list(funnel.values())[-1], 0)
        for level in range(len(found.prefixes)):
            of_level = int((found.level[found.edges.child[survives]] == level).sum())
            writer.add_scalar("edges/by_level_of_child", of_level, level + 1)
        shown = projected(found)
        metadata = [
            [str(i), str(found.level[i] + 1), str(found.parent[i]), f"{found.rate[i]:.2g}", pictures.plain(labels[i])]
            for i in shown.tolist()
        ]
        header = ["latent", "level", "parent", "rate", "fires on"]
        writer.add_embedding(sae.W_dec.detach().float()[shown], metadata, tag="decoder", metadata_header=header)


def projected(found: Hierarchy) -> Array:
    """Latents for the projector: those of surviving edges first, then the ones that fire most."""
    in_forest = np.zeros(len(found.level), dtype=bool)
    kept = found.edges.survives
    in_forest[found.edges.parent[kept]] = in_forest[found.edges.child[kept]] = True
    return np.sort(np.lexsort((-found.rate, ~in_forest))[:PROJECTED])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# python -m msae.report -----------------------------------------------------------------------------------------


def report(cfg: DictConfig) -> None:
    """Write one HTML file to explore the SAE; its hierarchy is extracted first where there is none."""
    inputs = Inputs(cfg)
    vocabulary = inputs.vocabulary()
    file = inputs.out / "hierarchy" / FILE
    if file.exists():
        found = load(file)
        there = (found.prefixes, found.about.get("weights"), found.about.get("identity_hash"))
        if there != (list(inputs.sae.prefixes), weights_hash(inputs.sae), inputs.shards.manifest["identity_hash"]):
            raise ValueError(f"{file} is of another SAE or of other shards; run python -m msae.hierarchy run={cfg.run}")
        limits = found.about["limits"]
        if cfg.limits and Limits(**cfg.limits) != Limits(**limits):
            raise ValueError(f"{file} was made with other limits; run python -m msae.hierarchy with these first")
        say(f"hierarchy: {file}, made before; python -m msae.hierarchy makes it anew")
        firings = collect(inputs.sae, inputs.shards, found.about["tokens"], limits["floor"])
    else:
        found, firings = find(inputs, cfg)
        print_funnel(found)
    page = inputs.out / "report.html"
    data = page_data(inputs, found, firings, vocabulary)
    with progress(inputs.sae.d_sae, "page", unit="latents") as bar:
        write_page(data, page, bar.update)
    say(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB); open it in a browser, no server is needed")


def page_data(inputs: Inputs, found: Hierarchy, firings: Firings, vocabulary: list[str] | None) -> PageData:
    """Everything that the page shows; the contexts of a latent are made when they are asked for."""
    examples, labels = labels_of(inputs, firings, found, vocabulary)
    text, limits, edges = examples.text, found.about["limits"], found.edges
    promoted = unembedded(inputs) if isinstance(text, Text) and vocabulary is not None else None
    nearest, cosines = neighbours(inputs.sae)
    names = (found.about.get("model"), found.about.get("hook_name"), f"{inputs.sae.d_sae:,} latents")
    stages = [stage for stage in found.funnels[THIS] if stage != "pairs"]
    lines = {key: test.line.format(**limits) for key, test in TESTS.items()}
    return PageData(
        title=" · ".join(str(name) for name in names if name),
        facts=facts(found, inputs, vocabulary),
        verdict=found.verdict(),
        funnel_columns=list(found.funnels),
        funnel=[(TESTS[s].name, [funnel[s] for funnel in found.funnels.values()]) for s in stages],
        prefixes=found.prefixes,
        level=found.level + 1,
        rate=found.rate,
        largest=found.largest,
        label=labels,
        parent=found.parent,
        tests=[(k, t.name, f"{t.says} (survives with {lines[k]})" if t.line else t.says) for k, t in TESTS.items()],
        figures=edges.figures,
        passed=edges.passed,
        edge_parent=edges.parent,
        edge_child=edges.child,
        survives=edges.survives,
        nearest=nearest,
        nearest_cos=cosines,
        histogram=histogram(firings, np.maximum(found.largest, 1e-30)),
        vocabulary=text.vocabulary if text is not None else [],
        contexts=examples.contexts,
        fires_on=fires_on(firings, text) if isinstance(text, Text) else {},
        promoted=promoted[0] if promoted else None,
        suppressed=promoted[1] if promoted else None,
        joined=text.joined if text is not None else True,
    )


def facts(found: Hierarchy, inputs: Inputs, vocabulary: list[str] | None) -> dict[str, str]:
    """What the start page says of what was measured on what."""
    alive = int((found.rate > 0).sum())
    named = vocabulary is not None or inputs.shards.truth is not None
    model = found.about.get("model")
    return {
        **({"model": str(model)} if model else {}),
        "hook": str(found.about.get("hook_name")),
        "tokens": f"{found.about['tokens']:,}",
        "latents": f"{len(found.level):,}, {alive:,} fire",
        "active a token (L0)": f"{found.about['l0']:.1f}",
        "shards": str(found.about["shards"]),
        "pairs looked at": f"{found.edges.looked_at:,}",
        **{name.replace("_", " "): f"{value:.3f}" for name, value in found.truth.items()},
        **({} if named else {"tokens shown as": "numbers: no model was given"}),
    }


@torch.no_grad()
def neighbours(sae: MatryoshkaSAE, block: int = 2**24) -> tuple[Array, Array]:
    """The latents with the nearest decoder rows [d_sae, NEAREST], and the cosines."""
    rows = normalize(sae.W_dec.detach().float(), dim=1)
    k = min(NEAREST, sae.d_sae - 1)
    found: list[tuple[Array, Array]] = []
    for start in range(0, sae.d_sae, size := max(1, block // sae.d_sae)):
        cosine = rows[start : start + size] @ rows.T
        own = torch.arange(start, start + len(cosine), device=rows.device)
        cosine[torch.arange(len(cosine), device=rows.device), own] = -2
        value, place = cosine.topk(k, dim=1)
        found.append((place.cpu().numpy(), value.cpu().numpy()))
    nearest, cosines = (np.concatenate(part) for part in zip(*found, strict=True))
    return nearest, cosines


@torch.no_grad()
def unembedded(inputs: Inputs, block: int = 2**26) -> tuple[Array, Array] | None:
    """Tokens [d_sae, PROMOTED] that each decoder row raises and lowers most through the last norm and W_U.

    logits = (norm(d) − norm(0)) W_U with the model's own last norm (the logit lens); None where the hook is not of the
    residual width.
    """
    assert inputs.model is not None, "words without a model"
    bridge = load_bridge(inputs.model, revision=inputs.revision, tokenizer=inputs.tokenizer)
    tokens = 1 + max(load_tokenizer(inputs.tokenizer or inputs.model, inputs.revision).get_vocab().values())
    W_U = bridge.W_U.detach().float()[:, :tokens]  # embeddings are often padded
    if W_U.shape[0] != inputs.sae.d_in:
        return None
    rows = inputs.sae.W_dec.detach().float().to(W_U)
    if (norm := getattr(bridge, "ln_final", None)) is not None:  # a direction has no size, and a bias is of no latent
        rows = norm(1000 * rows[:, None])[:, 0] - norm(torch.zeros_like(rows[:1, None]))[:, 0]
    up, down = [], []
    for part in rows.split(max(1, block // W_U.shape[1])):
        logits = part @ W_U
        up.append(logits.topk(PROMOTED, dim=1).indices.cpu().numpy())
        down.append((-logits).topk(PROMOTED, dim=1).indices.cpu().numpy())
    return np.concatenate(up), np.concatenate(down)
