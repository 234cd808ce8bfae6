"""Contexts, labels and counts of latents, compared with the dense activations of every token."""

import re
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from msae.data.harvest import harvest
from msae.data.shards import Shards
from msae.data.synthetic import ForestSource
from msae.evaluation.matching import cosines
from msae.hierarchy import examples as module
from msae.hierarchy.examples import (
    AFTER,
    BEFORE,
    HOLES,
    LABEL_FROM,
    QUANTILES,
    TOP,
    Column,
    Examples,
    Names,
    Text,
    feature_labels,
    fires_on,
    histogram,
    text_of,
    words,
)
from msae.hierarchy.firings import Firings, Piece, collect
from msae.sae import MatryoshkaSAE
from tests.tiny_lm import EOT, tiny_tokenizer

CONTEXT, VOCABULARY = 40, 30
SHARDS = [("val", 9), ("val", 7), ("train", 11), ("train", 8)]  # sequences of each, in the order they are read in
WHOLE = [9, 7, 11, 3]  # of which so many are read
WORDS = [" dog", " cat", "  ", "\n", "$", "\t", *(f" w{i}" for i in range(VOCABULARY - 6))]


class TextShards:
    """What the code asks of a shard directory of text: rows at most tokens, none at token 0, in any order."""

    truth = None

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.shards: dict[str, list[dict[str, torch.Tensor]]] = {"val": [], "train": []}
        for split, sequences in SHARDS:
            tokens = torch.randint(0, VOCABULARY, (sequences, CONTEXT), generator=random, dtype=torch.int32)
            sequence, position = (tokens != 0).nonzero()[torch.randperm(int((tokens != 0).sum()), generator=random)].T
            shard = {"activations": torch.randn(len(sequence), 8, generator=random), "tokens": tokens}
            shard |= {"sequence": sequence.int(), "position": position.short()}
            self.shards[split].append(shard)

    def rows(self, split: str) -> list[int]:
        return [len(shard["activations"]) for shard in self.shards[split]]

    def activations(self, split: str, shard: int) -> torch.Tensor:
        return self.shards[split][shard]["activations"]

    def index(self, split: str, shard: int) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.shards[split][shard].items() if name != "activations"}


@pytest.fixture(scope="module")
def text() -> SimpleNamespace:
    """An SAE's firings on text of several shards, the last of them in part, and `dense` [sequences, context, d_sae]."""
    shards = TextShards()
    sae = MatryoshkaSAE(8, 24, [6, 24], 3, decoder_init_norm=0.3, seed=1)
    with torch.no_grad():
        sae.threshold.fill_(0.15)
        sae.W_dec.mul_(torch.linspace(0.5, 2, 24)[:, None])
        sae.b_enc[5] = -100.0  # never fires
        sae.b_enc[0] = 0.3  # fires often
    firings = collect(sae, shards, sum(shards.rows("val")) + shards.rows("train")[0] + 90)
    tokens, dense, rows = [], [], []
    for (split, _), shard, keep in zip(SHARDS, [0, 1, 0, 1], WHOLE, strict=True):
        of = shards.shards[split][shard]
        acts = (sae.encode(of["activations"]) * sae.W_dec.norm(dim=1)).detach().numpy()
        grid = np.zeros((len(of["tokens"]), CONTEXT, 24), dtype=np.float32)
        there = of["sequence"].numpy() < keep
        sequence, position = of["sequence"].numpy()[there], of["position"].numpy()[there]
        grid[sequence, position] = acts[there]
        rows += [(len(tokens) + s, p) for s, p in zip(sequence.tolist(), position.tolist(), strict=True)]
        tokens += list(of["tokens"].numpy())
        dense += list(grid)
    return SimpleNamespace(
        shards=shards,
        sae=sae,
        firings=firings,
        tokens=np.array(tokens),
        dense=np.array(dense),
        rows=rows,
        text=text_of(shards, firings, WORDS),
    )


# Columns and text ------------------------------------------------------------------------------------------------


def test_a_column_at_rows():
    column = Column(np.array([2, 5, 9]), np.array([0.5, 1.5, 2.5], dtype=np.float32))
    asked = np.array([-1, 0, 2, 3, 5, 8, 9, 10, 5])
    np.testing.assert_array_equal(column.at(asked), [0, 0, 0.5, 0, 1.5, 0, 2.5, 0, 1.5])
    nothing = Column(np.array([], dtype=np.int32), np.array([], dtype=np.float32))
    np.testing.assert_array_equal(nothing.at(np.array([-1, 0, 4])), [0, 0, 0])
    first = Column(np.array([0]), np.array([3.0]))
    np.testing.assert_array_equal(first.at(np.array([-1, 0])), [0, 3])


def test_every_row_has_its_token_sequence_and_position(text):
    found = text.text
    assert isinstance(found, Text)
    assert text.firings.pieces[-1].index is not None  # the last piece is a part of its shard
    assert text.firings.rows == len(text.rows)
    np.testing.assert_array_equal(np.stack([found.sequence, found.position], 1), text.rows)
    np.testing.assert_array_equal(found.tokens, text.tokens)
    np.testing.assert_array_equal(found.token, [text.tokens[place] for place in text.rows])
    back = {place: row for row, place in enumerate(text.rows)}
    wanted = [[back.get((s, p), -1) for p in range(CONTEXT)] for s in range(len(text.tokens))]
    np.testing.assert_array_equal(found.row, wanted)
    assert (found.row[text.tokens == 0] == -1).all()
    assert (found.row[sum(WHOLE) :] == -1).all()  # sequences of the last shard that were not read
    assert list(found.vocabulary) == WORDS


def test_rows_are_those_whose_activations_were_encoded(text):
    """Row r of the firings is token r of the text: the two read the shards in one order."""
    wanted = np.array([text.dense[place] for place in text.rows])
    np.testing.assert_allclose(text.firings.matrix.toarray(), wanted, rtol=1e-5, atol=1e-6)


def test_without_a_vocabulary_tokens_are_numbers(text):
    found = text_of(text.shards, text.firings, None)
    assert [found.vocabulary[token] for token in (0, 7, VOCABULARY - 1)] == ["⟨0⟩", "⟨7⟩", f"⟨{VOCABULARY - 1}⟩"]
    assert len(found.vocabulary) == int(text.tokens.max()) + 1


def test_rows_without_text_have_none():
    shards = SimpleNamespace(truth=None, index=lambda split, shard: {})
    firings = Firings(csr_array((3, 2), dtype=np.float32), [Piece("val", 0, 0, 3)])
    assert text_of(shards, firings, None) is None
    examples = Examples(firings, None, np.array([-1, 0]))
    assert examples.contexts(1) == []
    assert examples.labels() == ["", ""]


@pytest.mark.parametrize("position", [0, 1, BEFORE, BEFORE + 1, CONTEXT - AFTER - 1, CONTEXT - AFTER, CONTEXT - 1])
def test_a_context_ends_where_its_sequence_does(text, position):
    """At both ends the window is cut, and never reaches into the sequence beside it."""
    tokens = np.arange(3 * CONTEXT).reshape(3, CONTEXT)
    row = tokens + 1000
    flat = np.arange(3 * CONTEXT)
    whole = Text(flat, flat // CONTEXT, flat % CONTEXT, tokens, row, [])
    found, rows, peak, where = whole.context(CONTEXT + position)
    first, last = max(0, position - BEFORE), min(CONTEXT, position + AFTER + 1)
    np.testing.assert_array_equal(found, [CONTEXT + i for i in range(first, last)])
    np.testing.assert_array_equal(rows, found + 1000)
    assert found[peak] == CONTEXT + position
    assert where == f"sequence 1, position {position}"


# Contexts --------------------------------------------------------------------------------------------------------


def place(where: str) -> tuple[int, int]:
    found = re.fullmatch(r"sequence (\d+), position (\d+)", where)
    assert found
    return int(found[1]), int(found[2])


def order(values: Any, rows: Any) -> list[Any]:
    """Rows by value, the largest first, of equal ones the first row."""
    return [row for _, row in sorted(zip(-values, rows, strict=True))]


PARENT = np.full(24, -1)
PARENT[[9, 10, 11, 5]] = [3, 5, 1, 2]  # 5 never fires, as a child and as a parent
PARENT[[7, 8, *range(12, 18)]] = 0  # 0 fires most


@pytest.mark.parametrize("latent", range(24))
def test_contexts_are_the_dense_encode_at_their_tokens(text, latent):
    own = text.dense[:, :, latent]
    parent = int(PARENT[latent])
    contexts = Examples(text.firings, text.text, PARENT).contexts(latent)
    for context in contexts:
        sequence, position = place(context.where)
        span = slice(max(0, position - BEFORE), position + AFTER + 1)
        np.testing.assert_array_equal(context.tokens, text.tokens[sequence, span])
        np.testing.assert_allclose(context.acts, own[sequence, span], rtol=1e-5, atol=1e-6)
        assert context.peak == position - span.start
        assert context.acts[context.peak] > 0
        if parent < 0:
            assert context.parent_acts is None
        else:
            np.testing.assert_allclose(context.parent_acts, text.dense[sequence, span, parent], rtol=1e-5, atol=1e-6)
    places = [place(context.where) for context in contexts]
    assert len(set(places)) == len(places)  # each token once

    fires = np.argwhere(own > 0)
    strongest = order(own[own > 0], [tuple(at) for at in fires.tolist()])
    groups = defaultdict(list)
    for context, at in zip(contexts, places, strict=True):
        groups[context.group].append(at)
    if latent == 5:
        assert not contexts
        return
    best: dict[int, tuple[int, int]] = {}
    for at in strongest:
        best.setdefault(at[0], at)
    assert groups.pop("top") == list(best.values())[:TOP]  # the strongest token of the strongest sequences
    holes = groups.pop("holes of its parent", [])
    if parent < 0:
        assert not holes
    else:
        silent = [at for at in strongest if text.dense[(*at, parent)] == 0][:HOLES]
        shown_before = [at for context, at in zip(contexts, places, strict=True) if "holes" not in context.group]
        assert holes == [at for at in silent if at not in shown_before]
    for group, found in groups.items():
        quantile = next(q for q in QUANTILES if group == f"{q:.0%} of its firings are weaker")
        (at,) = found
        weaker = (own[own > 0] < own[at]).mean()
        assert abs(weaker - quantile) <= 1.5 / len(fires)
    if len(fires) > 100:
        assert len(groups) >= 3


def test_the_latents_of_the_comparison_are_of_all_kinds(text):
    """What the test above is worth: there are holes, quantiles, a latent that never fires, and one that always does."""
    counts = (text.dense > 0).sum((0, 1))
    assert counts[5] == 0
    assert (counts[np.arange(24) != 5] > 20).all()
    assert (counts > 100).sum() >= 5
    groups = [{c.group for c in Examples(text.firings, text.text, PARENT).contexts(latent)} for latent in range(24)]
    assert sum("holes of its parent" in found for found in groups) >= 3
    assert "holes of its parent" not in set().union(*(groups[i] for i in np.flatnonzero(PARENT < 0)))


def test_top_contexts_are_few_when_firings_share_a_sequence():
    """Where one sequence has the strongest firings it is shown once; the others follow."""
    matrix = np.zeros((10, 1), dtype=np.float32)
    matrix[:, 0] = [9, 8, 7, 6, 5, 1, 2, 3, 4, 0]
    sequence = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    flat = np.arange(10)
    of = Text(flat, sequence, flat % 5, flat.reshape(2, 5), flat.reshape(2, 5), ["x"] * 10)
    contexts = Examples(Firings(csr_array(matrix), []), of, np.array([-1])).contexts(0)
    assert [c.where for c in contexts if c.group == "top"] == ["sequence 0, position 0", "sequence 1, position 3"]


def test_holes_of_the_parent_by_hand():
    """Child on rows 0–5, parent on 1 and 4: rows 0, 2, 3 are the strongest holes, 5 the fourth."""
    matrix = np.zeros((6, 2), dtype=np.float32)
    matrix[:, 1] = [6, 5, 4, 3, 2, 1]
    matrix[[1, 4], 0] = 1
    flat = np.arange(6)
    of = Text(flat, np.zeros(6, dtype=int), flat, flat[None], flat[None], ["x"] * 6)
    examples = Examples(Firings(csr_array(matrix), []), of, np.array([-1, 0]))
    chosen = examples.choose(examples.column(1), examples.column(0))
    above = examples.column(0)
    rows = {row for _, row in chosen}
    assert {0, 2, 3} <= rows
    assert all(above.at(np.array([row]))[0] == 0 for group, row in chosen if "holes" in group)
    for context in examples.contexts(1):
        np.testing.assert_array_equal(context.parent_acts, [0, 1, 0, 0, 1, 0])
        np.testing.assert_array_equal(context.acts, [6, 5, 4, 3, 2, 1])


# Labels and the search -------------------------------------------------------------------------------------------


def test_labels_are_the_tokens_that_weigh_most(text):
    labels = Examples(text.firings, text.text, PARENT).labels()
    assert len(labels) == 24
    assert labels[5] == ""
    for latent in range(24):
        fires = text.dense[:, :, latent] > 0
        tokens, values = text.tokens[fires], text.dense[:, :, latent][fires]
        strongest = order(values, range(len(values)))
        weight: dict[str, float] = defaultdict(float)
        for i in strongest[:LABEL_FROM]:
            word = WORDS[tokens[i]]
            weight[word.strip() or word.replace("\n", "\\n").replace("\t", "\\t")] += float(values[i])
        wanted = sorted(weight, key=lambda word: -weight[word])[:3]
        assert labels[latent] == ", ".join(wanted)


def test_blank_tokens_have_a_label_that_is_seen():
    matrix = csr_array(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32))
    flat = np.arange(3)
    of = Text(flat, flat * 0, flat, flat[None], flat[None], ["\n", "  ", "\t"])
    assert Examples(Firings(matrix, []), of, np.full(3, -1)).labels() == ["\\n", "  ", "\\t"]


@pytest.mark.parametrize("rows", [None, 200])
def test_fires_on_against_naive_counting(text, rows, monkeypatch):
    monkeypatch.setattr(module, "SEARCH_LATENTS", 4)
    found = fires_on(text.firings, text.text) if rows is None else fires_on(text.firings, text.text, rows)
    fires = np.array([text.dense[place] > 0 for place in text.rows])
    token = np.array([text.tokens[place] for place in text.rows])
    rate = fires.mean(0)
    fires, token = fires[:rows], token[:rows]
    assert sorted(found) == sorted(set(token.tolist()))
    for number, latents in found.items():
        share = fires[token == number].mean(0)
        likely = np.flatnonzero(share >= 0.05)
        score = dict(zip(likely.tolist(), share[likely] * np.log(share[likely] / rate[likely]), strict=True))
        assert len({latent for latent, _ in latents}) == len(latents) == min(4, len(likely))
        best = sorted(score.values(), reverse=True)[:4]
        assert sorted((score[latent] for latent, _ in latents), reverse=True) == pytest.approx(best, rel=1e-6)
        assert [s for _, s in latents] == pytest.approx([share[latent] for latent, _ in latents], rel=1e-6)
        assert all(s >= after for (_, s), (_, after) in pairwise(latents))


def test_a_latent_that_fires_on_few_of_a_token_is_not_found():
    """On 1 of 40 tokens is 2.5 %, on 2 of them 5 %."""
    matrix = np.zeros((40, 2), dtype=np.float32)
    matrix[0, 0] = matrix[[0, 1], 1] = 1
    of = Text(
        np.zeros(40, dtype=int), np.zeros(40, dtype=int), np.arange(40), np.zeros((1, 40)), np.zeros((1, 40)), ["x"]
    )
    assert fires_on(Firings(csr_array(matrix), []), of) == {0: [(1, pytest.approx(0.05))]}


def test_histogram_counts_every_firing_in_its_bin(text):
    largest = text.dense.max((0, 1))
    counts = histogram(text.firings, np.maximum(largest, 1e-30), bins=5)
    assert counts.shape == (24, 5)
    np.testing.assert_array_equal(counts.sum(1), (text.dense > 0).sum((0, 1)))
    assert (counts[np.arange(24) != 5, -1] >= 1).all()
    for latent in range(24):
        values = text.dense[:, :, latent][text.dense[:, :, latent] > 0]
        wanted = np.histogram(values, bins=np.linspace(0, max(largest[latent], 1e-30), 6))[0]
        assert np.abs(counts[latent] - wanted).sum() <= 2  # one may lie on an edge to the last digit


def test_edges_of_bins():
    """Powers of two are exact: what lies on an edge belongs to the bin above, the largest to the last."""
    values = np.array([0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4], dtype=np.float32)
    matrix = np.zeros((8, 2), dtype=np.float32)
    matrix[:, 1] = values
    np.testing.assert_array_equal(
        histogram(Firings(csr_array(matrix), []), np.array([1e-30, 4.0]), bins=4), [[0] * 4, [1, 2, 2, 3]]
    )
    rounded = histogram(Firings(csr_array(matrix), []), np.array([1e-30, 3.999]), bins=4)  # as a file has it
    assert rounded.sum() == 8


# Words -----------------------------------------------------------------------------------------------------------


def test_words_have_their_leading_spaces():
    tokenizer = tiny_tokenizer()
    found = words(tokenizer)
    assert len(found) == len(tokenizer.get_vocab())
    ids = tokenizer("the old hills and rain")["input_ids"]
    assert "".join(found[i] for i in ids) == "the old hills and rain"
    assert [found[i] for i in ids][-2:] == [" and", " rain"]
    assert found[tokenizer.convert_tokens_to_ids(EOT)] == EOT
    assert found[tokenizer.convert_tokens_to_ids("Ċ")] == "\n"
    assert " the" in found


def test_words_of_a_sentencepiece_tokenizer_have_their_leading_spaces():
    """Llama's and Mistral's decoder drops the space at the beginning of a text, and a token alone is a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "▁the": 1, "▁cat": 2, "s": 3, "cat": 4, "<0x0A>": 5}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert words(tokenizer) == ["<s>", " the", " cat", "s", "cat", "\n"]


def test_words_with_gaps_in_the_ids():
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 3}

        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join({0: "a", 3: "b"}.get(i, "") for i in ids)

    assert words(Tokenizer()) == ["a", "", "", "b"]


# Synthetic data --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forest(tmp_path_factory) -> SimpleNamespace:
    """The features themselves as an SAE, on 300 rows of which the first 100 are held out."""
    source = ForestSource(rows=600, val_rows=100, chunk_rows=256, norm_spread=0.3)
    directory = harvest(source, tmp_path_factory.mktemp("forest"), show=False)["synthetic"].directory
    shards = Shards(directory)
    features = source.features.float()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    sae = MatryoshkaSAE(20, 20, [4, 20], 2)
    with torch.no_grad():
        sae.W_dec.copy_(features[order])
        sae.W_enc.copy_(torch.linalg.pinv(features)[:, order])
        sae.threshold.fill_(0.01)
    x = torch.cat([shards.activations("val", 0), shards.activations("train", 0)])[:300]
    active = (x.double() @ torch.linalg.pinv(features.double())).numpy() > 0.01
    return SimpleNamespace(
        shards=shards, sae=sae, order=order.numpy(), active=active, firings=collect(sae, shards, 300), features=features
    )


def test_words_of_synthetic_rows_are_the_features_active_on_them(forest):
    found = text_of(forest.shards, forest.firings, None)
    assert isinstance(found, Names)
    assert not found.joined
    assert list(found.vocabulary) == [*(f"feature {i}" for i in range(20)), "row"]
    for row in range(100):
        tokens, rows, peak, where = found.context(row)
        assert [found.vocabulary[token] for token in tokens] == [
            "row",
            *(f"feature {i}" for i in np.flatnonzero(forest.active[row])),
        ]
        assert peak == 0
        assert rows.tolist() == [row] + [-1] * (len(tokens) - 1)
        assert where == f"row {row}"


def test_examples_of_synthetic_data_are_of_held_out_rows_alone(forest):
    parent = np.full(20, -1)
    child = int(np.flatnonzero(forest.order == 3)[0])  # feature 3 is a child of feature 0
    parent[child] = other = int(np.flatnonzero(forest.order == 15)[0])  # no parent of it: mostly silent
    examples = Examples(forest.firings, text_of(forest.shards, forest.firings, None), parent)
    assert examples.labels() == [""] * 20
    dense = forest.firings.matrix.toarray()
    for latent in range(20):
        rows = np.flatnonzero(forest.active[:, forest.order[latent]])
        assert (rows >= 100).any()
        np.testing.assert_array_equal(np.flatnonzero(dense[:, latent]), rows)
        held_out = rows[rows < 100]
        column = examples.column(latent)
        np.testing.assert_array_equal(column.rows, held_out)
        np.testing.assert_allclose(column.values, dense[held_out, latent])
        contexts = examples.contexts(latent)
        shown = [int(context.where.removeprefix("row ")) for context in contexts]
        assert set(shown) <= set(held_out.tolist())
        top = [row for context, row in zip(contexts, shown, strict=True) if context.group == "top"]
        assert top == order(dense[held_out, latent], held_out.tolist())[:TOP]
        for context, row in zip(contexts, shown, strict=True):
            assert int(forest.order[latent]) in context.tokens.tolist()
            np.testing.assert_allclose(context.acts, [dense[row, latent]] + [0] * (len(context.tokens) - 1))
    holes = [context for context in examples.contexts(child) if context.group == "holes of its parent"]
    for context in examples.contexts(child):
        row = int(context.where.removeprefix("row "))
        assert context.parent_acts[0] == pytest.approx(dense[row, other])
        assert (context.parent_acts[1:] == 0).all()
    assert all(context.parent_acts[0] == 0 for context in holes)


def test_feature_labels_are_of_the_nearest_feature(forest):
    assert feature_labels(forest.sae, forest.features) == [f"feature {i}" for i in forest.order]
    more = MatryoshkaSAE(20, 24, [4, 24], 2)
    with torch.no_grad():
        more.W_dec[4:] = forest.features[forest.order]
    labels = feature_labels(more, forest.features)
    assert labels[4:] == [f"feature {i}" for i in forest.order]
    assert labels[:4] == [""] * 4
    assert float(cosines(more.W_dec.detach()[4:], forest.features).max(1).values.min()) > 0.999
