"""Contexts, labels and counts of latents, compared with the dense activations of every token."""

import re
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from msae.data.harvest import harvest
from msae.explorer import examples as module
from msae.explorer.examples import (
    AFTER,
    BEFORE,
    HOLES,
    LABEL_FROM,
    QUANTILES,
    TOP,
    Examples,
    Names,
    Text,
    feature_labels,
    fires_on,
    histogram,
    text_of,
)
from msae.explorer.inputs import words
from msae.hierarchy.firings import Array, Firings, FirstRows, collect
from msae.sae import MatryoshkaSAE
from msae.sources.forest import ForestSource
from tests.test_firings import given_shards, of_dense, sae_of
from tests.tiny_lm import EOT, tiny_tokenizer

CONTEXT, VOCABULARY = 40, 30
SHARDS = [("val", 0, 9), ("val", 1, 7), ("train", 0, 11), ("train", 1, 8)]  # and the sequences of each
WHOLE = [9, 7, 11, 3]  # of which so many are read
WORDS = [" dog", " cat", "  ", "\n", "$", "\t", *(f" w{i}" for i in range(VOCABULARY - 6))]
PARENT = np.full(24, -1)
PARENT[[9, 10, 11, 5]] = [3, 5, 1, 2]  # 5 never fires, as a child and as a parent
PARENT[[7, 8, *range(12, 18)]] = 0  # 0 fires most


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> SimpleNamespace:
    """An SAE's firings on text of several shards, the last of them in part, and `dense` [sequences, context, d_sae].

    Rows are at most tokens, none at token 0, in any order.
    """
    random = torch.Generator().manual_seed(0)
    rows, index = [], []
    for _, _, sequences in SHARDS:
        tokens = torch.randint(0, VOCABULARY, (sequences, CONTEXT), generator=random, dtype=torch.int32)
        sequence, position = (tokens != 0).nonzero()[torch.randperm(int((tokens != 0).sum()), generator=random)].T
        rows.append(torch.randn(len(sequence), 8, generator=random))
        index.append({"tokens": tokens, "sequence": sequence.int(), "position": position.short()})
    shards = given_shards(tmp_path_factory.mktemp("text"), rows[:2], rows[2:], index)
    sae = MatryoshkaSAE(8, 24, [6, 24], 3, decoder_init_norm=0.3, seed=1)
    with torch.no_grad():
        sae.threshold.fill_(0.15)
        sae.W_dec.mul_(torch.linspace(0.5, 2, 24)[:, None])
        sae.b_enc[5] = -100.0  # never fires
        sae.b_enc[0] = 0.3  # fires often
    read = FirstRows(shards, sum(map(len, rows[:3])) + 90)
    (firings,) = collect([sae], read)
    tokens, dense, at = [], [], []
    for x, beside, whole in zip(rows, index, WHOLE, strict=True):
        kept = beside["sequence"] < whole
        sequence, position = beside["sequence"][kept].long(), beside["position"][kept].long()
        acts = (sae.encode(x[kept]) * sae.W_dec.norm(dim=1)).detach()
        grid = np.zeros((len(beside["tokens"]), CONTEXT, 24), dtype=np.float32)
        grid[sequence, position] = acts
        at += [(len(tokens) + s, p) for s, p in zip(sequence.tolist(), position.tolist(), strict=True)]
        tokens += list(beside["tokens"].numpy())
        dense += list(grid)
    return SimpleNamespace(
        rows=read,
        firings=firings,
        tokens=np.array(tokens),
        dense=np.array(dense),
        at=at,  # (sequence, position) of each row
        text=text_of(read, WORDS),
    )


def plain_text(sequences: int, length: int, vocabulary: list[str]) -> Text:
    """Sequences whose rows and tokens count up."""
    flat = np.arange(sequences * length)
    grid = flat.reshape(sequences, length)
    return Text(flat, flat // length, flat % length, grid, grid, vocabulary)


# Columns and text -----------------------------------------------------------------------------------------------------


def test_every_row_has_its_token_sequence_and_position(text):
    beside = text.text
    assert text.rows.pieces[-1].index is not None  # the last piece is a part of its shard
    np.testing.assert_array_equal(np.stack([beside.sequence, beside.position], 1), text.at)
    np.testing.assert_array_equal(beside.tokens, text.tokens)
    np.testing.assert_array_equal(beside.token, [text.tokens[at] for at in text.at])
    row = np.full((len(text.tokens), CONTEXT), -1)  # at token 0, and in sequences that were not read
    row[tuple(np.transpose(text.at))] = np.arange(len(text.at))
    np.testing.assert_array_equal(beside.row, row)
    assert (row == -1).sum() > (text.tokens == 0).sum() > 10
    assert beside.vocabulary == WORDS
    # Row r of the firings is token r of the text: the two read the shards in one order.
    dense = np.array([text.dense[at] for at in text.at])
    np.testing.assert_allclose(text.firings.matrix.toarray(), dense, rtol=1e-5, atol=1e-6)


def test_without_a_vocabulary_tokens_are_numbers(text):
    assert text_of(text.rows, None).vocabulary == [f"⟨{i}⟩" for i in range(VOCABULARY)]


def test_a_vocabulary_that_lacks_a_token_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^[^\n]* has token 29, the tokenizer has 29; give language_model=[^\n]*$"):
        text_of(text.rows, WORDS[:-1])


def test_rows_without_text_have_no_contexts(tmp_path):
    firings = of_dense(np.eye(3, 2))
    shards = given_shards(tmp_path, [torch.ones(3, 2)], [torch.ones(3, 2)])
    assert text_of(FirstRows(shards), None) is None
    examples = Examples(firings, None, np.array([-1, 0]))
    assert examples.contexts(1) == []
    assert examples.labels() == ["", ""]


# Contexts -------------------------------------------------------------------------------------------------------------


def place(where: str) -> tuple[int, int]:
    match = re.fullmatch(r"sequence (\d+), position (\d+)", where)
    assert match
    return int(match[1]), int(match[2])


def by_value(values: Array, rows: Any) -> list[Any]:
    """Rows by value, the largest first, of equal ones the first row."""
    return [row for _, row in sorted(zip(-values, rows, strict=True))]


def test_contexts_are_the_dense_encode_at_their_tokens(text):
    examples, kinds = Examples(text.firings, text.text, PARENT), set()
    for latent, parent in enumerate(PARENT.tolist()):
        own, above = text.dense[:, :, latent], text.dense[:, :, parent]
        contexts = examples.contexts(latent)
        places = [place(context.where) for context in contexts]
        assert len(set(places)) == len(places)  # each token once
        groups = defaultdict(list)
        for context, (sequence, position) in zip(contexts, places, strict=True):
            groups[context.group].append((sequence, position))
            span = slice(max(0, position - BEFORE), position + AFTER + 1)
            np.testing.assert_array_equal(context.tokens, text.tokens[sequence, span])
            np.testing.assert_allclose(context.acts, own[sequence, span], rtol=1e-5, atol=1e-6)
            assert context.peak == position - span.start
            assert (context.parent_acts is None) == (parent < 0)
            if parent >= 0:
                np.testing.assert_allclose(context.parent_acts, above[sequence, span], rtol=1e-5, atol=1e-6)

        strongest = by_value(own[own > 0], list(map(tuple, np.argwhere(own > 0).tolist())))
        best: dict[int, tuple[int, int]] = {}
        for sequence, position in strongest:
            best.setdefault(sequence, (sequence, position))
        top = groups.pop("top", [])
        assert top == list(best.values())[:TOP]  # the strongest token of the strongest sequences
        holes = groups.pop("holes of its parent", [])
        samples = [at for group in groups.values() for at in group]
        silent = [at for at in strongest if parent >= 0 and above[at] == 0][:HOLES]
        assert holes == [at for at in silent if at not in top + samples]
        for quantile in QUANTILES:
            for at in groups.pop(f"{quantile:.0%} of its firings are weaker", []):
                assert abs((own[own > 0] < own[at]).mean() - quantile) <= 1.5 / len(strongest)
        assert not groups
        assert len(samples) >= 3 or len(strongest) <= 100
        kinds.add((bool(holes), bool(samples), bool(top)))
    assert kinds == {(True, True, True), (False, True, True), (False, False, False)}


# Labels and the search ------------------------------------------------------------------------------------------------


def test_labels_are_the_tokens_that_weigh_most(text):
    labels = Examples(text.firings, text.text, PARENT).labels()
    assert len(labels) == 24
    assert labels[5] == ""
    for latent in range(24):
        fires = text.dense[:, :, latent] > 0
        tokens, values = text.tokens[fires], text.dense[:, :, latent][fires]
        weight: dict[str, float] = defaultdict(float)
        for i in by_value(values, range(len(values)))[:LABEL_FROM]:
            word = WORDS[tokens[i]]
            weight[word.strip() or word.replace("\n", "\\n").replace("\t", "\\t")] += float(values[i])
        assert labels[latent] == ", ".join(sorted(weight, key=lambda word: -weight[word])[:3])


def test_blank_tokens_have_a_label_that_is_seen():
    examples = Examples(of_dense(np.eye(3)), plain_text(1, 3, ["\n", "  ", "\t"]), np.full(3, -1))
    assert examples.labels() == ["\\n", "  ", "\\t"]


@pytest.mark.parametrize("rows", [10**6, 200])
def test_fires_on_against_naive_counting(text, rows, monkeypatch):
    monkeypatch.setattr(module, "SEARCH_LATENTS", 4)
    answers = fires_on(text.firings, text.text, rows)
    fires = np.array([text.dense[at] > 0 for at in text.at])
    token = np.array([text.tokens[at] for at in text.at])
    rate = fires.mean(0)
    fires, token = fires[:rows], token[:rows]
    assert sorted(answers) == sorted(set(token.tolist()))
    for number, latents in answers.items():
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
    dense = np.zeros((40, 2))
    dense[0, 0] = dense[[0, 1], 1] = 1
    text = plain_text(1, 40, ["x"])
    text.token[:] = 0
    assert fires_on(of_dense(dense), text) == {0: [(1, pytest.approx(0.05))]}


def test_histogram_counts_every_firing_in_its_bin(text):
    largest = np.maximum(text.dense.max((0, 1)), 1e-30)
    counts = histogram(text.firings, largest, bins=5)
    assert counts.shape == (24, 5)
    np.testing.assert_array_equal(counts.sum(1), text.firings.counts)
    assert (counts[text.firings.counts > 0, -1] >= 1).all()
    for latent in range(24):
        values = text.dense[:, :, latent][text.dense[:, :, latent] > 0]
        expected = np.histogram(values, bins=np.linspace(0, largest[latent], 6))[0]
        assert np.abs(counts[latent] - expected).sum() <= 2  # one may lie on an edge to the last digit


def test_what_lies_on_an_edge_of_bins_belongs_to_the_bin_above_and_the_largest_to_the_last():
    dense = np.zeros((8, 2))
    dense[:, 1] = [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]  # powers of two are exact
    assert histogram(of_dense(dense), np.array([1e-30, 4.0]), bins=4).tolist() == [[0] * 4, [1, 2, 2, 3]]
    assert histogram(of_dense(dense), np.array([1e-30, 3.999]), bins=4).sum() == 8  # the largest as a file has it


# Words ----------------------------------------------------------------------------------------------------------------


def test_words_have_their_leading_spaces():
    tokenizer = tiny_tokenizer()
    vocabulary = words(tokenizer)
    assert len(vocabulary) == len(tokenizer.get_vocab())
    shown = [vocabulary[i] for i in tokenizer("the old hills and rain")["input_ids"]]
    assert "".join(shown) == "the old hills and rain"
    assert shown[-2:] == [" and", " rain"]
    assert [vocabulary[tokenizer.convert_tokens_to_ids(token)] for token in (EOT, "Ċ")] == [EOT, "\n"]


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
    tokenizer = SimpleNamespace(
        get_vocab=lambda: {"a": 0, "b": 3},
        decode=lambda ids, **options: "".join({0: "a", 3: "b"}.get(i, "") for i in ids),
    )
    assert words(tokenizer) == ["a", "", "", "b"]


# Synthetic data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forest(tmp_path_factory) -> SimpleNamespace:
    """The features themselves as an SAE, on 300 rows of which the first 100 are held out."""
    source = ForestSource(rows=600, val_rows=100, chunk_rows=256, norm_spread=0.3)
    shards = harvest(source, tmp_path_factory.mktemp("forest"), show=False)["synthetic"]
    features = source.features.float()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    sae = sae_of(features[order], torch.linalg.pinv(features)[:, order].T, [4, 20], 0.01)
    x = torch.cat([shards.activations("val", 0), shards.activations("train", 0)])[:300]
    active = (x.double() @ torch.linalg.pinv(features.double())).numpy() > 0.01
    (firings,) = collect([sae], FirstRows(shards, 300))
    names, order = text_of(FirstRows(shards, 300), None), order.tolist()
    return SimpleNamespace(sae=sae, order=order, active=active, firings=firings, features=features, names=names)


def test_words_of_synthetic_rows_are_the_features_active_on_them(forest):
    names = forest.names
    assert isinstance(names, Names)
    assert not names.joined
    for row in range(100):
        tokens, rows, peak, where = names.around(row)
        active = [f"feature {i}" for i in np.flatnonzero(forest.active[row])]
        assert [names.vocabulary[token] for token in tokens] == ["row", *active]
        assert (rows.tolist(), peak, where) == ([row] + [-1] * len(active), 0, f"row {row}")


def test_examples_of_synthetic_data_are_of_held_out_rows_alone(forest):
    parent = np.full(20, -1)
    child, other = forest.order.index(3), forest.order.index(15)  # no parent of it: mostly silent
    parent[child] = other
    examples = Examples(forest.firings, forest.names, parent)
    assert examples.labels() == [""] * 20
    dense = forest.firings.matrix.toarray()
    for latent, feature in enumerate(forest.order):
        rows = np.flatnonzero(forest.active[:, feature])
        np.testing.assert_array_equal(np.flatnonzero(dense[:, latent]), rows)
        held_out = rows[rows < 100]
        assert len(held_out) < len(rows)
        contexts = examples.contexts(latent)
        shown = [int(context.where.removeprefix("row ")) for context in contexts]
        assert set(shown) <= set(held_out.tolist())
        top = [row for context, row in zip(contexts, shown, strict=True) if context.group == "top"]
        assert top == by_value(dense[held_out, latent], held_out.tolist())[:TOP]
        for context, row in zip(contexts, shown, strict=True):
            silent = [0] * (len(context.tokens) - 1)
            assert feature in context.tokens
            assert context.acts.tolist() == [dense[row, latent], *silent]
            assert latent != child or context.parent_acts.tolist() == [dense[row, other], *silent]
            assert context.group != "holes of its parent" or context.parent_acts[0] == 0


def test_feature_labels_are_of_the_nearest_feature(forest):
    labels = [f"feature {i}" for i in forest.order]
    assert feature_labels(forest.sae, forest.features) == labels
    more = MatryoshkaSAE(20, 24, [4, 24], 2)
    with torch.no_grad():
        more.W_dec[4:] = forest.sae.W_dec
    assert feature_labels(more, forest.features) == ["", "", "", "", *labels]


def test_examples_change_nothing_of_the_firings(text):
    """They sort the columns of a copy; the page's histogram reads the same firings after them."""
    acts, latents = text.firings.code.acts.clone(), text.firings.code.latents.clone()
    Examples(text.firings, text.text, PARENT).contexts(0)
    assert isinstance(text.firings, Firings)
    assert torch.equal(text.firings.code.acts, acts)
    assert torch.equal(text.firings.code.latents, latents)
