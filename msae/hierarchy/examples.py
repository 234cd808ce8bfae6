"""What a person looks at to understand a latent: where it fires, in context, and where its parent is silent."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csc_array, csr_array

from msae.data.shards import Shards
from msae.evaluation.matching import match
from msae.hierarchy.firings import Array, Firings
from msae.hierarchy.page import Context
from msae.progress import progress
from msae.sae import MatryoshkaSAE

TOP, HOLES = 6, 3  # contexts of a latent
QUANTILES = (0.9, 0.75, 0.5, 0.25)
BEFORE, AFTER = 16, 7  # tokens around the peak
LABEL_FROM = 30  # strongest firings whose tokens make a label
SEARCH_ROWS, SEARCH_LATENTS = 2_000_000, 16


class Column(NamedTuple):
    """One latent's firings: rows in order, and its activation on them."""

    rows: Array
    values: Array

    def at(self, rows: Array) -> Array:
        """Its activation on these rows; 0 where it is silent, and for row −1."""
        if not len(self.rows):
            return np.zeros(len(rows), dtype=np.float32)
        place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return np.where(self.rows[place] == rows, self.values[place], 0)


@dataclass
class Text:
    """The text around each row: `token`, `sequence`, `position` [rows]; `tokens`, `row` [sequences, context]."""

    token: Array
    sequence: Array
    position: Array
    tokens: Array
    row: Array  # −1 where the token has no row
    vocabulary: Sequence[str]
    joined = True

    def context(self, row: int) -> tuple[Array, Array, int, str]:
        """Tokens around a row, their rows, the row's place among them, and where that is."""
        sequence, position = int(self.sequence[row]), int(self.position[row])
        start = max(0, position - BEFORE)
        span = slice(start, position + AFTER + 1)
        return (
            self.tokens[sequence, span],
            self.row[sequence, span],
            position - start,
            f"sequence {sequence}, position {position}",
        )


@dataclass
class Names:
    """Synthetic rows, whose words are the names of the features active on them; known for held-out rows alone."""

    offsets: Array
    feature: Array
    vocabulary: Sequence[str]
    joined = False

    def context(self, row: int) -> tuple[Array, Array, int, str]:
        """The row's features; the first of them stands for the row itself, the others for none."""
        there = self.feature[self.offsets[row] : self.offsets[row + 1]]
        tokens = np.concatenate([[len(self.vocabulary) - 1], there])
        rows = np.full(len(tokens), -1)
        rows[0] = row
        return tokens, rows, 0, f"row {row}"


def text_of(shards: Shards, firings: Firings, vocabulary: Sequence[str] | None) -> Text | Names | None:
    """What stands beside the rows; None where nothing does. Without a vocabulary tokens are shown as numbers."""
    truth = shards.truth
    if truth is not None:
        names = [*(f"feature {i}" for i in range(len(truth["features"]))), "row"]
        return Names(truth["offsets"].numpy(), truth["feature"].numpy(), names)
    parts, first = [], 0
    for piece in firings.pieces:
        index = shards.index(piece.split, piece.shard)
        if "sequence" not in index:
            return None
        keep = slice(None) if piece.index is None else piece.index
        sequence, position = (index[key][keep].long().numpy() for key in ("sequence", "position"))
        tokens = index["tokens"].numpy()
        parts.append((sequence + first, position, tokens))
        first += len(tokens)
    sequence, position, tokens = (np.concatenate(part) for part in zip(*parts, strict=True))
    row = np.full(tokens.shape, -1, dtype=np.int64)
    row[sequence, position] = np.arange(len(sequence))
    if vocabulary is None:
        vocabulary = [f"⟨{i}⟩" for i in range(int(tokens.max()) + 1)]
    return Text(tokens[sequence, position], sequence, position, tokens, row, vocabulary)


def words(tokenizer: Any) -> list[str]:
    """The string of every token as it stands in text: after another one, since some decoders drop a first space."""
    first, size = min(ids := tokenizer.get_vocab().values()), 1 + max(ids)
    before = len(tokenizer.decode([first], clean_up_tokenization_spaces=False))
    return [tokenizer.decode([first, i], clean_up_tokenization_spaces=False)[before:] for i in range(size)]


class Examples:
    """Contexts and labels of the latents, from their firings by column."""

    def __init__(self, firings: Firings, text: Text | Names | None, parent: Array) -> None:
        self.columns = csc_array(firings.matrix)
        self.columns.sort_indices()
        self.text, self.parent = text, parent

    def column(self, latent: int) -> Column:
        """The latent's firings; of synthetic data those on held-out rows."""
        span = slice(*self.columns.indptr[latent : latent + 2])
        rows, values = self.columns.indices[span], self.columns.data[span]
        if isinstance(self.text, Names):
            known = int(np.searchsorted(rows, len(self.text.offsets) - 1))
            rows, values = rows[:known], values[:known]
        return Column(rows, values)

    def contexts(self, latent: int) -> list[Context]:
        """The strongest firings, samples below them, and the strongest holes of the parent."""
        if self.text is None:
            return []
        own, parent = self.column(latent), int(self.parent[latent])
        above = self.column(parent) if parent >= 0 else None
        found = []
        for group, row in self.choose(own, above):
            tokens, rows, peak, where = self.text.context(row)
            parent_acts = None if above is None else above.at(rows)
            found.append(Context(group, tokens, own.at(rows), peak, parent_acts, where))
        return found

    def choose(self, own: Column, above: Column | None) -> list[tuple[str, int]]:
        """(group, row) of the contexts to show; each row once, the top ones from different sequences."""
        order = np.argsort(-own.values, kind="stable")
        chosen: dict[int, str] = {}
        places: set[int] = set()
        for row in own.rows[order[: 20 * TOP]].tolist():
            place = int(self.text.sequence[row]) if isinstance(self.text, Text) else row
            if len(chosen) < TOP and place not in places:
                chosen[row] = "top"
                places.add(place)
        for quantile in QUANTILES:
            if len(order):
                row = int(own.rows[order[int((1 - quantile) * (len(order) - 1))]])
                chosen.setdefault(row, f"{quantile:.0%} of its firings are weaker")
        if above is not None:
            holes = order[above.at(own.rows[order]) == 0][:HOLES]
            for row in own.rows[holes].tolist():
                chosen.setdefault(row, "holes of its parent")
        return [(group, row) for row, group in chosen.items()]

    def labels(self) -> list[str]:
        """The tokens on which each latent fires most, up to three; "" without text."""
        d_sae = self.columns.shape[1]
        if not isinstance(self.text, Text):
            return [""] * d_sae
        with progress(d_sae, "labels", unit="latents") as bar:
            labels = []
            for latent in range(d_sae):
                labels.append(self.label(latent, self.text))
                bar.update()
        return labels

    def label(self, latent: int, text: Text) -> str:
        """The tokens of the latent's strongest firings, those with the largest sum of activations first."""
        own = self.column(latent)
        best = np.argsort(-own.values, kind="stable")[:LABEL_FROM]
        weight: Counter[str] = Counter()
        for row, value in zip(own.rows[best].tolist(), own.values[best].tolist(), strict=True):
            word = text.vocabulary[text.token[row]]
            weight[word.strip() or repr(word)[1:-1]] += value
        return ", ".join(word for word, _ in weight.most_common(3))


def feature_labels(sae: MatryoshkaSAE, features: Any) -> list[str]:
    """The true feature that each latent is matched to, for synthetic data."""
    of = match(sae.W_dec.detach(), features.float()).feature_of(sae.d_sae).tolist()
    return [f"feature {feature}" if feature >= 0 else "" for feature in of]


def fires_on(firings: Firings, text: Text, rows: int = SEARCH_ROWS) -> dict[int, list[tuple[int, float]]]:
    """Token → the latents that fire on it, with the share of its occurrences on which they do.

    Of the latents that fire on at least 5 % of them the few for which share · log(share / firing rate) is highest.
    """
    rows = min(rows, firings.rows)
    token = text.token[:rows]
    part = firings.matrix[:rows]
    fires = csr_array((np.ones(part.nnz, dtype=np.float32), part.indices, part.indptr), shape=part.shape)
    which = csr_array((np.ones(rows, dtype=np.float32), (token, np.arange(rows))), shape=(len(text.vocabulary), rows))
    together = csr_array(which @ fires)
    occurs, rate = np.bincount(token, minlength=len(text.vocabulary)), firings.counts() / firings.rows
    found = {}
    for number in np.flatnonzero(occurs).tolist():
        span = slice(*together.indptr[number : number + 2])
        latents, share = together.indices[span], together.data[span] / occurs[number]
        latents, share = latents[share >= 0.05], share[share >= 0.05]
        score = share * np.log(share / rate[latents])
        best = np.argsort(-score, kind="stable")[:SEARCH_LATENTS]
        best = best[np.argsort(-share[best], kind="stable")]
        found[number] = list(zip(latents[best].tolist(), share[best].tolist(), strict=True))
    return found


def histogram(firings: Firings, largest: Array, bins: int = 20) -> Array:
    """How often each latent fires in equal bins of (0, its largest activation] [d_sae, bins]."""
    latent, value = firings.matrix.indices, firings.matrix.data
    place = np.minimum((value / largest[latent] * bins).astype(np.int64), bins - 1)
    counted = np.bincount(latent.astype(np.int64) * bins + place, minlength=firings.d_sae * bins)
    return counted.reshape(firings.d_sae, bins)
