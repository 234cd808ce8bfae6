"""The sequences that documents are packed into."""

import json
import os
import threading
from dataclasses import astuple

import pytest
import torch

from msae.sources import tokens as tokens_module
from msae.sources.tokens import Packer, in_val, keep_mask, one_ahead, special_ids, token_chunks, tokenised
from tests.tiny_lm import sentences, tiny_tokenizer

TOKENIZER, BARE = tiny_tokenizer(), tiny_tokenizer(special=False)
EOT = 0


def run(texts, tokenizer=TOKENIZER, state=None, **settings):
    settings = {"context": 16, "tokens": 10**6, "chunk_sequences": 5, "val_fraction": 0.2} | settings
    return list(token_chunks(lambda n: iter(texts[n:]), tokenizer, state=state, **settings))


def train_of(chunks):
    return torch.cat([chunk.train for chunk in chunks])


def val_of(chunks):
    return torch.cat([chunk.val for chunk in chunks])


def test_keep_mask_is_by_id_never_by_position():
    tokens = torch.tensor([[0, 5, 6, 0, 7, 9, 9], [9, 9, 0, 5, 6, 0, 7], [5, 6, 7, 5, 6, 7, 5]])
    assert torch.equal(keep_mask(tokens, [9, 0]), (tokens > 0) & (tokens < 9))
    assert keep_mask(tokens, []).all()


def test_special_ids_have_added_tokens_too():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    assert special_ids(tokenizer) == [EOT, tokenizer.pad_token_id, len(tokenizer) - 1]
    assert special_ids(BARE) == []


# ---- packing


@pytest.mark.parametrize(
    ("separator", "prepend_bos", "documents", "sequences", "left"),
    [
        (EOT, True, "123,4,,56,7891", "0123,0405,0607,0891", "0"),  # the separator after 123 opens the second sequence
        (EOT, False, "123,4567", "1230,4567", "0"),
        (None, False, "123,4567", "1234", "567"),
        (EOT, True, "0120,0,003450067", "0120,0345,0670", ""),  # separators of the text itself, not doubled
        (EOT, True, "100,023,456", "0102,0304,0560", ""),
    ],
)
def test_packing_by_hand(separator, prepend_bos, documents, sequences, left):
    """Each digit is a token, 0 is EOT."""
    packer = Packer(4, separator, prepend_bos)
    for document in documents.split(","):
        packer.add(list(map(int, document)))
    assert list(iter(packer.pop, None)) == [list(map(int, sequence)) for sequence in sequences.split(",")]
    assert packer.left == list(map(int, left))


@pytest.mark.parametrize(("tokenizer", "prepend_bos"), [(TOKENIZER, True), (TOKENIZER, False), (BARE, False)])
def test_sequences_hold_the_whole_text_once(tokenizer, prepend_bos):
    texts = sentences(60)
    train = train_of(run(texts, tokenizer, val_fraction=0, prepend_bos=prepend_bos))
    assert train.dtype == torch.int32
    assert train.shape[1] == 16
    if prepend_bos:
        assert (train[:, 0] == EOT).all()
        assert (train[:, 1] != EOT).all()
    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    packed = [i for i in train.flatten().tolist() if tokenizer is BARE or i != EOT]
    assert packed == ids[: len(packed)]
    assert len(ids) - len(packed) < 16


def test_empty_documents_are_passed_over():
    texts = sentences(30)
    sparse = [t for text in texts for t in (text, "", "")]
    assert torch.equal(train_of(run(texts, val_fraction=0)), train_of(run(sparse, val_fraction=0)))


# ---- splits, ends and resuming


def numbers(sequences):
    """The numbers, from 1000, of the documents that begin in the sequences."""
    words = TOKENIZER.decode(sequences.flatten().tolist()).replace("<|endoftext|>", " ").split()
    return {int(w) for w in words if w.isdigit() and int(w) >= 1000}


def test_no_document_is_in_both_splits():
    texts = [f"{1000 + i} the cat sat on a mat" for i in range(300)]
    chunks = run(texts)
    train, val = numbers(train_of(chunks)), numbers(val_of(chunks))
    assert not train & val
    assert 0.1 < len(val) / 300 < 0.3
    assert val <= {1000 + i for i in range(300) if in_val(i, 0, 0.2)}
    assert val != numbers(val_of(run(texts, seed=1)))


def test_val_is_capped_and_then_all_goes_to_train():
    texts = sentences(300)
    chunks = run(texts, val_tokens=50)
    last = chunks[-1].state
    assert 50 <= last["val_tokens"] < 50 + 16
    assert len(val_of(chunks)) == last["val_sequences"]
    assert last["val_left"] == []
    assert last["train_tokens"] > 0.9 * sum(len(ids) for ids in tokenised(texts, TOKENIZER)) - 50


def test_a_pass_stops_at_tokens_that_will_be_kept():
    chunks = run(sentences(300), tokens=400)
    kept = keep_mask(train_of(chunks), [EOT]).sum(1)
    assert chunks[-1].state["train_tokens"] == kept.sum()
    assert kept[:-1].sum() < 400 <= kept.sum()
    assert all(len(c.train) == 5 for c in chunks[:-1])
    assert run(sentences(300), tokens=400, state=chunks[-1].state) == []


def test_a_text_that_ends_early_gives_a_smaller_last_chunk():
    chunks = run(sentences(40))
    assert len(chunks[-1].train) + len(chunks[-1].val) > 0
    assert len(chunks[-1].train) < 5
    assert run(sentences(40), state=chunks[-1].state) == []


@pytest.mark.parametrize("batch_characters", [200, 1 << 20])
def test_resuming_gives_the_same_sequences(monkeypatch, batch_characters):
    monkeypatch.setattr(tokens_module.tokenised, "__defaults__", (batch_characters,))
    texts = [*sentences(80, high=10), "the cat sat " * 500, *(t for s in sentences(80, seed=1) for t in (s, "", ""))]
    whole = run(texts, tokens=3000, val_tokens=100)
    assert len(whole) > 20
    for done, chunk in enumerate(whole[:-1], start=1):
        rest = run(texts, tokens=3000, val_tokens=100, state=json.loads(json.dumps(chunk.state)))
        for a, b in zip(rest, whole[done:], strict=True):
            torch.testing.assert_close(astuple(a), astuple(b), rtol=0, atol=0)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"gave 0 tokens in 0 documents.*data.source.context=16"):
        run([])
    with pytest.raises(ValueError, match="in 1 documents, one sequence needs"):
        run(["the cat"])
    only_train = ["the cat sat on a mat while two dogs ran over old hills"] * 3
    assert not any(in_val(i, 0, 0.01) for i in range(3))
    with pytest.raises(ValueError, match=r"too few for a val sequence with data.source.val_fraction=0.01"):
        run(only_train, val_fraction=0.01)
    assert run(only_train, val_fraction=0.01, val_tokens=0)


# ---- one ahead


def test_one_ahead_gives_the_same_items_and_makes_the_next_meanwhile(monkeypatch):
    monkeypatch.setattr(tokens_module, "spare_core", lambda: True)
    made = [threading.Event() for _ in range(5)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    taken = []
    for number in one_ahead(items()):
        taken.append(number)
        if number < 4:
            assert made[number + 1].wait(10), "the next item is not being made"
        assert not any(event.is_set() for event in made[number + 2 :]), "more than one ahead"
    assert taken == list(range(5))
    assert list(one_ahead(iter(()))) == []


@pytest.mark.parametrize("spare", [False, True])
def test_one_ahead_raises_after_what_came_before(spare, monkeypatch):
    monkeypatch.setattr(tokens_module, "spare_core", lambda: spare)

    def items():
        yield from (1, 2)
        raise ValueError("no more text")

    taken = []
    with pytest.raises(ValueError, match=r"^no more text$"):
        taken.extend(one_ahead(items()))
    assert taken == [1, 2]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity")
@pytest.mark.parametrize(
    ("gpu", "threads", "free"), [(False, 4, False), (False, 8, False), (False, 3, True), (True, 4, True)]
)
def test_a_core_is_free_when_torch_uses_fewer_or_a_gpu_computes(gpu, threads, free, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5, 7})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert tokens_module.spare_core() == free
