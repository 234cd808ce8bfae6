"""The body of `python -m msae.explore`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize
from torch.utils.tensorboard import SummaryWriter

from msae.data.rows import Rows
from msae.evaluation.matching import match
from msae.evaluation.truth import edge_scores
from msae.explorer import pictures
from msae.explorer.examples import Examples, Text, feature_labels, fires_on, histogram, text_of
from msae.explorer.inputs import Explore, Inputs
from msae.explorer.page import Page, write_page
from msae.hierarchy.extract import Hierarchy, extract
from msae.hierarchy.files import load, load_firings, save, save_firings
from msae.hierarchy.firings import Array, Firings, FirstRows, collect
from msae.hierarchy.limits import STAGES, TESTS
from msae.progress import progress, say
from msae.sae import MatryoshkaSAE

NEAREST, PROMOTED = 8, 10  # shown of each latent
PROJECTED = 4096  # latents in TensorBoard's projector, which takes text files


def explore(settings: Explore, rows: Rows | None = None) -> Path:
    """Find the edges, test them and keep them, unless that was done before with these settings; and write the page.

    rows: those to look at, instead of those that the settings name. Returns the page's path.
    """
    inputs = Inputs(settings, rows)
    before = kept(inputs)
    hierarchy, firings = before or find(inputs)
    examples, labels = examples_of(inputs, hierarchy, firings)
    if before is None:
        summarise(hierarchy, inputs, labels)
        keep(inputs, hierarchy, firings)  # last: where it is, the rest is too
        hierarchy = load(inputs.hierarchy_file)[0]  # rounded, so that a page made later is the same
        say(f"hierarchy: {inputs.hierarchy_file}\ncharts:    tensorboard --logdir {inputs.out}")
    page, path = page_of(inputs, hierarchy, firings, examples, labels), inputs.out.page
    with progress(inputs.sae.d_sae, "page", unit="latents") as bar:
        write_page(page, path, bar.update)
    say(f"page:      {path} ({size(path)}); open it in a browser, no server is needed")
    return path


def kept(inputs: Inputs) -> tuple[Hierarchy, Firings] | None:
    """The hierarchy and firings of an earlier call; None, with a line that says why, if it had other settings."""
    file = inputs.hierarchy_file
    if not file.exists():
        return None
    try:
        hierarchy, firings = load(file)
    except ValueError as error:
        say(str(error))
        return None
    if differing := hierarchy.about.asked.differs_in(inputs.asked):
        say(f"hierarchy: {file} was made with other settings ({', '.join(differing)}); it is made anew")
        return None
    say(f"hierarchy: {file}, made before with these settings\n{hierarchy.verdict()}")
    return hierarchy, kept_firings(inputs, hierarchy, firings)


def kept_firings(inputs: Inputs, hierarchy: Hierarchy, expected: str | None) -> Firings:
    """The firings that were kept with this checksum; otherwise the rows are encoded again."""
    if expected is not None:
        try:
            return load_firings(inputs.firings_file, expected, inputs.sae.d_sae)
        except ValueError as error:
            say(f"{error}; the rows are encoded again")
    (firings,) = collect([inputs.sae], FirstRows(inputs.shards, inputs.asked.tokens), inputs.asked.limits.floor)
    keep(inputs, hierarchy, firings)
    return firings


def find(inputs: Inputs) -> tuple[Hierarchy, Firings]:
    """Extract and test, and say what was found."""
    asked = inputs.asked
    hierarchy, firings = extract(inputs.sae, inputs.shards, asked.tokens, asked.limits, inputs.vanilla, asked.seed)
    if (truth := inputs.shards.truth) is not None:
        matching = match(inputs.sae.W_dec.detach(), truth["features"].float())
        hierarchy.truth = edge_scores(hierarchy.edges, matching, truth["parent"])
    print_funnel(hierarchy)
    return hierarchy, firings


def keep(inputs: Inputs, hierarchy: Hierarchy, firings: Firings) -> None:
    """Write the firings, unless they are not to be kept, and then the hierarchy with their checksum."""
    checksum, file = None, inputs.firings_file
    file.unlink(missing_ok=True)
    if inputs.explore.keep_firings:
        checksum = save_firings(firings, file)
        say(f"firings:   {file} ({size(file)}); keep_firings=false keeps none")
    save(hierarchy, inputs.hierarchy_file, checksum)


def size(path: Path) -> str:
    """The size of a file in MB."""
    return f"{path.stat().st_size / 1e6:.1f} MB"


def examples_of(inputs: Inputs, hierarchy: Hierarchy, firings: Firings) -> tuple[Examples, list[str]]:
    """Examples of every latent, and a few words for it."""
    rows = FirstRows(inputs.shards, inputs.asked.tokens)
    examples = Examples(firings, text_of(rows, inputs.vocabulary), hierarchy.parent)
    truth = inputs.shards.truth
    return examples, examples.labels() if truth is None else feature_labels(inputs.sae, truth["features"])


def print_funnel(hierarchy: Hierarchy) -> None:
    """How many edges survive each test, beside the controls."""
    table = Table("left after", "line", *hierarchy.funnels)
    for stage in STAGES:
        test = TESTS.get(stage)
        first = [test.name, test.line_at(hierarchy.about.asked.limits)] if test else ["pairs looked at", ""]
        table.add_row(*first, *(f"{funnel[stage]:,}" for funnel in hierarchy.funnels.values()))
    for column in table.columns[2:]:
        column.justify = "right"
    Console(stderr=True).print(table)
    survives = hierarchy.edges.survives
    if survives.any():
        fires = hierarchy.rate[hierarchy.edges.child[survives]] * hierarchy.about.tokens
        share = hierarchy.edges.holes[survives].sum() / fires.sum()
        say(f"holes: on {share:.1%} of a surviving child's tokens its parent is silent")
    if hierarchy.truth:
        say(", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in hierarchy.truth.items()))
    say(hierarchy.verdict())


def summarise(hierarchy: Hierarchy, inputs: Inputs, labels: list[str]) -> None:
    """PNG files and TensorBoard: the funnel, edges by level, the largest trees, and decoder rows in the projector."""
    figures = {
        "funnel": pictures.funnel(hierarchy),
        "levels": pictures.by_level(hierarchy),
        "forest": pictures.forest(hierarchy, labels),
    }
    directory = inputs.out.hierarchy
    directory.mkdir(parents=True, exist_ok=True)
    inputs.hierarchy_file.unlink(missing_ok=True)  # that of other pictures
    shutil.rmtree(directory / "tensorboard", ignore_errors=True)  # of an earlier extraction
    with SummaryWriter(directory / "tensorboard") as writer:
        for name, figure in figures.items():
            figure.savefig(directory / f"{name}.png", dpi=150)
            writer.add_figure(f"hierarchy/{name}", figure)
        writer.add_text("hierarchy/verdict", hierarchy.verdict())
        for name, funnel in hierarchy.funnels.items():
            tag = name.replace(" ", "_")
            for step, stage in enumerate(STAGES):
                writer.add_scalar(f"funnel/{tag}", funnel[stage], step)
            writer.add_scalar(f"edges/{tag}", funnel[STAGES[-1]], 0)
        level_of_child = hierarchy.level[hierarchy.edges.child[hierarchy.edges.survives]]
        for level in range(len(hierarchy.prefixes)):
            writer.add_scalar("edges/by_level_of_child", int((level_of_child == level).sum()), level + 1)
        shown = projected(hierarchy)
        columns = {
            "latent": shown,
            "level": hierarchy.level[shown] + 1,
            "parent": hierarchy.parent[shown],
            "rate": [f"{rate:.2g}" for rate in hierarchy.rate[shown]],
            "fires on": [pictures.plain(labels[latent]) for latent in shown],
        }
        metadata = [list(map(str, row)) for row in zip(*columns.values(), strict=True)]
        rows = inputs.sae.W_dec.detach().float()[shown]
        writer.add_embedding(rows, metadata, tag="decoder", metadata_header=list(columns))


def projected(hierarchy: Hierarchy) -> Array:
    """Latents for the projector: those of surviving edges first, then the ones that fire most."""
    in_forest = np.zeros(len(hierarchy.level), dtype=bool)
    survives = hierarchy.edges.survives
    in_forest[hierarchy.edges.parent[survives]] = in_forest[hierarchy.edges.child[survives]] = True
    return np.sort(np.lexsort((-hierarchy.rate, ~in_forest))[:PROJECTED])


def page_of(inputs: Inputs, hierarchy: Hierarchy, firings: Firings, examples: Examples, labels: list[str]) -> Page:
    """Everything that the page shows; the contexts of a latent are made when they are asked for."""
    text, vocabulary = examples.text, inputs.vocabulary
    nearest, cosines = neighbours(inputs.sae)
    promoted = suppressed = None
    if isinstance(text, Text) and vocabulary is not None:
        promoted, suppressed = unembedded(inputs.sae, inputs.load_model(), len(vocabulary))
    names = (hierarchy.about.model, hierarchy.about.hook_name, f"{inputs.sae.d_sae:,} latents")
    return Page(
        hierarchy=hierarchy,
        title=" · ".join(name for name in names if name),
        facts=facts(hierarchy, is_named=vocabulary is not None or inputs.shards.truth is not None),
        label=labels,
        nearest=nearest,
        nearest_cos=cosines,
        histogram=histogram(firings, np.maximum(hierarchy.largest, 1e-30)),
        vocabulary=text.vocabulary if text is not None else [],
        contexts=examples.contexts,
        fires_on=fires_on(firings, text) if isinstance(text, Text) else {},
        promoted=promoted,
        suppressed=suppressed,
        joined=text is None or text.joined,
    )


def facts(hierarchy: Hierarchy, is_named: bool) -> dict[str, str]:
    """What the start page says of what was measured on what."""
    about, alive = hierarchy.about, int((hierarchy.rate > 0).sum())
    return {
        **({"model": about.model} if about.model else {}),
        "hook": about.hook_name,
        "tokens": f"{about.tokens:,}",
        "latents": f"{len(hierarchy.level):,}, {alive:,} fire",
        "active a token (L0)": f"{about.l0:.1f}",
        "shards": about.shards,
        "pairs looked at": f"{hierarchy.edges.looked_at:,}",
        **{name.replace("_", " "): f"{value:.3f}" for name, value in hierarchy.truth.items()},
        **({} if is_named else {"tokens shown as": "numbers: no model was given"}),
    }


@torch.no_grad()
def neighbours(sae: MatryoshkaSAE, block: int = 2**24) -> tuple[Array, Array]:
    """The latents with the nearest decoder rows [d_sae, NEAREST], and the cosines."""
    rows = normalize(sae.W_dec.detach().float(), dim=1)
    nearest, cosines = [], []
    for start in range(0, sae.d_sae, size := max(1, block // sae.d_sae)):
        cosine = rows[start : start + size] @ rows.T
        cosine.diagonal(start).fill_(-2)
        top = cosine.topk(min(NEAREST, sae.d_sae - 1), dim=1)
        nearest.append(top.indices.cpu().numpy())
        cosines.append(top.values.cpu().numpy())
    return np.concatenate(nearest), np.concatenate(cosines)


@torch.no_grad()
def unembedded(
    sae: MatryoshkaSAE, bridge: Any, tokens: int, block: int = 2**26
) -> tuple[Array, Array] | tuple[None, None]:
    """Tokens [d_sae, PROMOTED] that each decoder row raises and lowers most through the last norm and W_U.

    logits = (norm(d) − norm(0)) W_U with the model's own last norm (the logit lens), of the first `tokens` embeddings:
    the others are padding. None where the hook is not of the residual width.
    """
    W_U = bridge.W_U.detach().float()[:, :tokens]
    if W_U.shape[0] != sae.d_in:
        return None, None
    rows = sae.W_dec.detach().float().to(W_U)
    if (norm := getattr(bridge, "ln_final", None)) is not None:  # a direction has no size, and a bias is of no latent
        rows = norm(1000 * rows[:, None])[:, 0] - norm(torch.zeros_like(rows[:1, None]))[:, 0]
    up, down = [], []
    for part in rows.split(max(1, block // W_U.shape[1])):
        logits = part @ W_U
        up.append(logits.topk(PROMOTED, dim=1).indices.cpu().numpy())
        down.append((-logits).topk(PROMOTED, dim=1).indices.cpu().numpy())
    return np.concatenate(up), np.concatenate(down)
