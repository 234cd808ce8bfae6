"""The bodies of `python -m msae.hierarchy` and `python -m msae.report`."""

import shutil
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize
from torch.utils.tensorboard import SummaryWriter

from msae.explorer import pictures
from msae.explorer.examples import Examples, Text, feature_labels, fires_on, histogram, text_of
from msae.explorer.inputs import Explore, Inputs
from msae.explorer.page import Page, write_page
from msae.hierarchy.extract import Hierarchy, extract, load, save, weights_hash
from msae.hierarchy.firings import Array, Firings, collect
from msae.hierarchy.limits import STAGES, TESTS, Limits
from msae.progress import progress, say
from msae.sae import MatryoshkaSAE

NEAREST, PROMOTED = 8, 10  # shown of each latent
PROJECTED = 4096  # latents in TensorBoard's projector, which takes text files


# python -m msae.hierarchy ---------------------------------------------------------------------------------------------


def write_hierarchy(explore: Explore) -> None:
    """Extract, test, and write hierarchy.json, pictures and TensorBoard's summary to `out`/hierarchy."""
    inputs = Inputs(explore)
    hierarchy, firings = extract_and_save(inputs)
    _, labels = examples_of(inputs, hierarchy, firings)
    print_funnel(hierarchy)
    summarise(hierarchy, inputs, labels)
    say(f"hierarchy: {inputs.hierarchy_file}\ncharts:    tensorboard --logdir {inputs.out}")
    typed = {key: getattr(explore, key) for key in ("run", "shards", "language_model", "out")}
    say(f"page:      python -m msae.report {' '.join(f'{k}={v}' for k, v in typed.items() if v is not None)}")


def extract_and_save(inputs: Inputs) -> tuple[Hierarchy, Firings]:
    """Extract the hierarchy and save it."""
    inputs.hierarchy_file.parent.mkdir(parents=True, exist_ok=True)
    explore = inputs.explore
    hierarchy, firings = extract(
        inputs.sae, inputs.shards, explore.tokens, explore.limits, inputs.vanilla(), explore.seed
    )
    save(hierarchy, inputs.hierarchy_file)
    return hierarchy, firings


def examples_of(inputs: Inputs, hierarchy: Hierarchy, firings: Firings) -> tuple[Examples, list[str]]:
    """Examples of every latent, and a few words for it."""
    examples = Examples(firings, text_of(inputs.shards, firings, inputs.vocabulary), hierarchy.parent)
    truth = inputs.shards.truth
    return examples, examples.labels() if truth is None else feature_labels(inputs.sae, truth["features"])


def print_funnel(hierarchy: Hierarchy) -> None:
    """How many edges survive each test, beside the controls."""
    table = Table("left after", "line", *hierarchy.funnels)
    for stage in STAGES:
        test = TESTS.get(stage)
        first = [test.name, test.line_at(hierarchy.about.limits)] if test else ["pairs looked at", ""]
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


# python -m msae.report ------------------------------------------------------------------------------------------------


def write_report(explore: Explore) -> None:
    """Write one HTML file to explore the SAE; its hierarchy is extracted first where there is none."""
    inputs = Inputs(explore)
    if inputs.hierarchy_file.exists():
        hierarchy = load_fitting(inputs)
        say(f"hierarchy: {inputs.hierarchy_file}, made before; python -m msae.hierarchy makes it anew")
        firings = collect(inputs.sae, inputs.shards, hierarchy.about.tokens, hierarchy.about.limits.floor)
    else:
        hierarchy, firings = extract_and_save(inputs)
        print_funnel(hierarchy)
    page, path = page_of(inputs, hierarchy, firings), inputs.out.page
    with progress(inputs.sae.d_sae, "page", unit="latents") as bar:
        write_page(page, path, bar.update)
    say(f"page: {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser, no server is needed")


def load_fitting(inputs: Inputs) -> Hierarchy:
    """The hierarchy that was saved. Raises ValueError in one line if it is of another SAE, shards or limits."""
    hierarchy, file = load(inputs.hierarchy_file), inputs.hierarchy_file
    made_from = hierarchy.prefixes, hierarchy.about.weights, hierarchy.about.identity_hash
    if made_from != (inputs.sae.prefixes, weights_hash(inputs.sae), inputs.shards.manifest.identity_hash):
        raise ValueError(
            f"{file} is of another SAE or of other shards; run python -m msae.hierarchy run={inputs.explore.run}"
        )
    if inputs.explore.limits not in (Limits(), hierarchy.about.limits):
        raise ValueError(f"{file} was made with other limits; run python -m msae.hierarchy with these first")
    return hierarchy


def page_of(inputs: Inputs, hierarchy: Hierarchy, firings: Firings) -> Page:
    """Everything that the page shows; the contexts of a latent are made when they are asked for."""
    examples, labels = examples_of(inputs, hierarchy, firings)
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
