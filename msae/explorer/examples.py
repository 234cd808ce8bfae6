"""What a person looks at to understand a latent: where it fires, in context, and where its parent is silent."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from msae.evaluation.matching import match
from msae.hierarchy.firings import Array, Firings, FirstRows
from msae.progress import progress
from msae.sae import MatryoshkaSAE

TOP, HOLES = 6, 3  # contexts of a latent
QUANTILES = (0.9, 0.75, 0.5, 0.25)
BEFORE, AFTER = 16, 7  # tokens around the peak
LABEL_FROM = 30  # strongest firings whose tokens make a label
SEARCH_ROWS, SEARCH_LATENTS = 2_000_000, 16
SEARCH_SHARE = 0.05  # of a token's occurrences, below which a latent is no answer


@dataclass(frozen=True)
class Context:
    """A piece of text in which a latent was looked at; `t` tokens.

    group        contexts of one group stand together under this heading: "top", "holes of its parent"
    tokens       int [t], indices into the vocabulary
    acts         float [t], the latent's activations; 0 where it is silent
    peak         the position for which the context was chosen
    parent_acts  float [t], the activations of the latent's surviving parent; None without one.
                 A token with acts > 0 and parent_acts = 0 is marked as a hole.
    where        where the text is from, such as "sequence 17, position 4"
    """

    group: str
    tokens: Array
    acts: Array
    peak: int
    parent_acts: Array | None = None
    where: str = ""


class Column(NamedTuple):
    """One latent's firings: rows in order, and its activation on them."""

    rows: Array
    values: Array

    def at(self, rows: Array) -> Array:
        """Its activation on these rows; 0 where it is silent, and for row −1."""
        if not len(self.rows):
            return np.zeros(len(rows), dtype=np.float32)
        nearest = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return np.where(self.rows[nearest] == rows, self.values[nearest], 0)

    @property
    def strongest_first(self) -> Array:
        """Indices into the rows by activation; of equal ones the first row comes first."""
        return np.argsort(-self.values, kind="stable")


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

    def around(self, row: int) -> tuple[Array, Array, int, str]:
        """Tokens around a row, their rows, the row's index among them, and where that is."""
        sequence, position = int(self.sequence[row]), int(self.position[row])
        start = max(0, position - BEFORE)
        span = (sequence, slice(start, position + AFTER + 1))
        return self.tokens[span], self.row[span], position - start, f"sequence {sequence}, position {position}"


@dataclass
class Names:
    """Synthetic rows, whose words are the names of the features active on them; known for held-out rows alone."""

    offsets: Array
    feature: Array
    vocabulary: Sequence[str]
    joined = False

    def around(self, row: int) -> tuple[Array, Array, int, str]:
        """The row's features; the first of them stands for the row itself, the others for none."""
        active = self.feature[self.offsets[row] : self.offsets[row + 1]]
        rows = np.full(1 + len(active), -1)
        rows[0] = row
        return np.concatenate([[len(self.vocabulary) - 1], active]), rows, 0, f"row {row}"


def text_of(rows: FirstRows, vocabulary: Sequence[str] | None) -> Text | Names | None:
    """The text or the features beside the rows; None where nothing is. Without a vocabulary tokens are numbers.

    Raises ValueError in one line if the vocabulary lacks a token.
    """
    shards, truth = rows.shards, rows.shards.truth
    if truth is not None:
        names = [*(f"feature {i}" for i in range(len(truth["features"]))), "row"]
        return Names(truth["offsets"].numpy(), truth["feature"].numpy(), names)
    parts, sequences = [], 0
    for piece in rows.pieces:
        index = shards.index(piece.split, piece.shard)
        if "sequence" not in index:
            return None
        kept = slice(None) if piece.index is None else piece.index
        sequence, position = (index[key][kept].long().numpy() for key in ("sequence", "position"))
        parts.append((sequence + sequences, position, index["tokens"].numpy()))
        sequences += len(index["tokens"])
    sequence, position, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
    row = np.full(tokens.shape, -1, dtype=np.int64)
    row[sequence, position] = np.arange(len(sequence))
    size = 1 + int(tokens.max())
    if vocabulary is None:
        vocabulary = [f"⟨{i}⟩" for i in range(size)]
    if size > len(vocabulary):
        raise ValueError(
            f"{shards} has token {size - 1}, the tokenizer has {len(vocabulary)}; "
            "give language_model=<the model that was harvested>"
        )
    return Text(tokens[sequence, position], sequence, position, tokens, row, vocabulary)


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
        contexts = []
        for row, group in self.choose(own, above).items():
            tokens, rows, peak, where = self.text.around(row)
            parent_acts = None if above is None else above.at(rows)
            contexts.append(Context(group, tokens, own.at(rows), peak, parent_acts, where))
        return contexts

    def choose(self, own: Column, above: Column | None) -> dict[int, str]:
        """Row → group of the contexts to show; the top ones are from different sequences."""
        order = own.strongest_first
        chosen: dict[int, str] = {}
        sequences: set[int] = set()
        for row in own.rows[order[: 20 * TOP]].tolist():
            sequence = int(self.text.sequence[row]) if isinstance(self.text, Text) else row
            if len(chosen) < TOP and sequence not in sequences:
                chosen[row] = "top"
                sequences.add(sequence)
        for quantile in QUANTILES:
            if len(order):
                row = int(own.rows[order[int((1 - quantile) * (len(order) - 1))]])
                chosen.setdefault(row, f"{quantile:.0%} of its firings are weaker")
        if above is not None:
            holes = order[above.at(own.rows[order]) == 0][:HOLES]
            for row in own.rows[holes].tolist():
                chosen.setdefault(row, "holes of its parent")
        return chosen

    def labels(self) -> list[str]:
        """The tokens on which each latent fires most, up to three; "" without text."""
        d_sae = self.columns.shape[1]
        if not isinstance(self.text, Text):
            return [""] * d_sae
        labels = []
        with progress(d_sae, "labels", unit="latents") as bar:
            for latent in range(d_sae):
                labels.append(self.label(latent, self.text))
                bar.update()
        return labels

    def label(self, latent: int, text: Text) -> str:
        """The tokens of the latent's strongest firings, those with the largest sum of activations first."""
        own = self.column(latent)
        best = own.strongest_first[:LABEL_FROM]
        weight: Counter[str] = Counter()
        for row, value in zip(own.rows[best].tolist(), own.values[best].tolist(), strict=True):
            word = text.vocabulary[text.token[row]]
            weight[word.strip() or repr(word)[1:-1]] += value
        return ", ".join(word for word, _ in weight.most_common(3))


def feature_labels(sae: MatryoshkaSAE, features: Tensor) -> list[str]:
    """The true feature that each latent is matched to, for synthetic data."""
    matched = match(sae.W_dec.detach(), features.float()).feature_of(sae.d_sae).tolist()
    return [f"feature {feature}" if feature >= 0 else "" for feature in matched]


def fires_on(firings: Firings, text: Text, rows: int = SEARCH_ROWS) -> dict[int, list[tuple[int, float]]]:
    """Token → the latents that fire on it, with the share of its occurrences on which they do.

    Of the latents that fire on at least SEARCH_SHARE of them the few with the highest share · log(share / firing rate).
    """
    rows = min(rows, firings.rows)
    token = text.token[:rows]
    is_at = csr_array((np.ones(rows, dtype=np.int32), (token, np.arange(rows))), shape=(len(text.vocabulary), rows))
    together = csr_array(is_at @ firings.fires[:rows])
    occurs, rate = np.bincount(token, minlength=len(text.vocabulary)), firings.counts / firings.rows
    answers = {}
    for number in np.flatnonzero(occurs).tolist():
        span = slice(*together.indptr[number : number + 2])
        latents, share = together.indices[span], together.data[span] / occurs[number]
        latents, share = latents[share >= SEARCH_SHARE], share[share >= SEARCH_SHARE]
        best = np.argsort(-share * np.log(share / rate[latents]), kind="stable")[:SEARCH_LATENTS]
        best = best[np.argsort(-share[best], kind="stable")]
        answers[number] = list(zip(latents[best].tolist(), share[best].tolist(), strict=True))
    return answers


def histogram(firings: Firings, largest: Array, bins: int = 20) -> Array:
    """How often each latent fires in equal bins of (0, its largest activation] [d_sae, bins]."""
    latent, value = firings.matrix.indices, firings.matrix.data
    filled = np.minimum((value / largest[latent] * bins).astype(np.int64), bins - 1)
    counts = np.bincount(latent.astype(np.int64) * bins + filled, minlength=firings.d_sae * bins)
    return counts.reshape(firings.d_sae, bins)
