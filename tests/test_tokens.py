"""The sequences that documents are packed into."""

import json
import os
import threading

import pytest
import torch

from msae.data import tokens as tokens_module
from msae.data.tokens import Packer, in_val, keep_mask, one_ahead, special_ids, token_chunks, tokenised
from tests.tiny_lm import sentences, tiny_tokenizer

TOKENIZER, BARE = tiny_tokenizer(), tiny_tokenizer(special=False)
EOT = 0


def run(texts, tokenizer=TOKENIZER, state=None, **settings):
    settings = {"context": 16, "tokens": 10**6, "chunk_sequences": 5, "val_fraction": 0.2} | settings
    return list(token_chunks(lambda n: iter(texts[n:]), tokenizer, state=state, **settings))


def test_keep_mask_is_by_id_never_by_position():
    bos, pad = 0, 9
    right = torch.tensor([[bos, 5, 6, bos, 7, pad, pad]])
    left = torch.tensor([[pad, pad, bos, 5, 6, bos, 7]])
    none = torch.tensor([[5, 6, 7]])
    assert keep_mask(right, [bos, pad]).tolist() == [[False, True, True, False, True, False, False]]
    assert keep_mask(left, [bos, pad]).tolist() == [[False, False, False, True, True, False, True]]
    assert keep_mask(none, [bos, pad]).all()
    assert keep_mask(none, []).all()
    # An attention mask drops padding that looks like text, and pad == eos needs no mask.
    assert keep_mask(none, [bos], torch.tensor([[0, 1, 1]])).tolist() == [[False, True, True]]
    assert keep_mask(torch.tensor([[5, bos, bos]]), [bos], torch.tensor([[1, 1, 0]])).tolist() == [[True, False, False]]


def test_special_ids_have_added_tokens_too():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    before = special_ids(tokenizer)
    assert before == [EOT, tokenizer.pad_token_id]
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    assert special_ids(tokenizer) == [*before, len(tokenizer) - 1]
    assert special_ids(BARE) == []


# ---- packing


def drain(packer):
    return list(iter(packer.pop, None))


def test_packer_by_hand():
    with_bos = Packer(4, EOT, prepend_bos=True)
    for ids in ([1, 2, 3], [4], [], [5, 6], [7, 8, 9, 10]):
        with_bos.add(ids)
    # The separator after 1 2 3 opens the second sequence and is not doubled.
    assert drain(with_bos) == [[0, 1, 2, 3], [0, 4, 0, 5], [0, 6, 0, 7], [0, 8, 9, 10]]
    assert with_bos.left == [0]
    without = Packer(4, EOT, prepend_bos=False)
    bare = Packer(4, None, prepend_bos=False)
    for packer in (without, bare):
        packer.add([1, 2, 3])
        packer.add([4, 5, 6, 7])
    assert drain(without) == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert drain(bare) == [[1, 2, 3, 4]]
    assert bare.left == [5, 6, 7]


def test_separators_in_the_text_are_not_doubled():
    packer = Packer(4, EOT, prepend_bos=True)
    for ids in ([EOT, 1, 2, EOT], [EOT], [EOT, EOT, 3, 4, 5, EOT, EOT, 6, 7]):
        packer.add(ids)
    sequences = drain(packer)
    assert sequences[0] == [0, 1, 2, 0]
    assert sequences[1] == [0, 3, 4, 5]
    assert all(s[0] == EOT and s[1] != EOT for s in sequences)
    packer = Packer(8, EOT, prepend_bos=True)
    for ids in ([1, EOT, EOT], [EOT, 2, 3], [4, 5, 6]):
        packer.add(ids)
    assert packer.pop() == [0, 1, 0, 2, 3, 0, 4, 5]


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_sequences_hold_the_whole_text_once(prepend_bos):
    texts = sentences(60)
    chunks = run(texts, val_fraction=0, prepend_bos=prepend_bos)
    train = torch.cat([c.train for c in chunks])
    assert train.dtype == torch.int32
    assert train.shape[1] == 16
    if prepend_bos:
        assert (train[:, 0] == EOT).all()
        assert (train[:, 1] != EOT).all()
    ids = [i for text in texts for i in TOKENIZER(text)["input_ids"]]
    found = [i for i in train.flatten().tolist() if i != EOT]
    assert found == ids[: len(found)]
    assert len(ids) - len(found) < 16


def test_empty_documents_and_no_tokens_are_passed_over():
    texts = sentences(30)
    sparse = [t for text in texts for t in (text, "", "")]
    dense, holes = run(texts, val_fraction=0), run(sparse, val_fraction=0)
    assert all(torch.equal(a.train, b.train) for a, b in zip(dense, holes, strict=True))
    assert [len(x) > 0 for x in tokenised(sparse[:6], TOKENIZER, batch_characters=100)] == [
        True,
        False,
        False,
    ] * 2


def test_tokenizer_without_bos_and_eos():
    with pytest.raises(ValueError, match=r"neither BOS nor EOS; set data.source.prepend_bos=false"):
        run(sentences(20), BARE)
    train = torch.cat([c.train for c in run(sentences(20), BARE, val_fraction=0, prepend_bos=False)])
    ids = [i for text in sentences(20) for i in BARE(text)["input_ids"]]
    assert train.flatten().tolist() == ids[: train.numel()]


# ---- splits, ends and resuming


def numbers(sequences):
    """The numbers, from 1000, of the documents that begin in the sequences."""
    words = TOKENIZER.decode(sequences.flatten().tolist()).replace("<|endoftext|>", " ").split()
    return {int(w) for w in words if w.isdigit() and int(w) >= 1000}


def test_no_document_is_in_both_splits():
    texts = [f"{1000 + i} the cat sat on a mat" for i in range(300)]
    chunks = run(texts)
    train = numbers(torch.cat([c.train for c in chunks]))
    val = numbers(torch.cat([c.val for c in chunks]))
    assert not train & val
    assert 0.1 < len(val) / 300 < 0.3
    assert val <= {1000 + i for i in range(300) if in_val(i, 0, 0.2)}
    other = numbers(torch.cat([c.val for c in run(texts, seed=1)]))
    assert val != other


def test_val_is_capped_and_then_all_goes_to_train():
    texts = sentences(300)
    chunks = run(texts, val_tokens=50)
    last = chunks[-1].state
    assert 50 <= last["val_tokens"] < 50 + 16
    assert sum(len(c.val) for c in chunks) == last["val_sequences"]
    assert last["val_left"] == []
    assert last["train_tokens"] > 0.9 * sum(len(ids) for ids in tokenised(texts, TOKENIZER)) - 50


def test_stops_at_tokens_that_will_be_kept():
    chunks = run(sentences(300), tokens=400)
    train = torch.cat([c.train for c in chunks])
    kept = keep_mask(train, [EOT]).sum(1)
    assert chunks[-1].state["train_tokens"] == kept.sum()
    assert kept[:-1].sum() < 400 <= kept.sum()
    assert all(len(c.train) == 5 for c in chunks[:-1])
    assert run(sentences(300), tokens=400, state=chunks[-1].state) == []


def test_text_that_ends_early_gives_a_smaller_last_chunk():
    chunks = run(sentences(40))
    assert len(chunks[-1].train) + len(chunks[-1].val) > 0
    assert len(chunks[-1].train) < 5
    assert run(sentences(40), state=chunks[-1].state) == []


@pytest.mark.parametrize("batch_characters", [200, 1 << 20])
def test_resuming_gives_the_same_sequences(monkeypatch, batch_characters):
    monkeypatch.setattr(tokens_module.tokenised, "__defaults__", (batch_characters,))
    texts = [*sentences(80, high=10), "the cat sat " * 500, *sentences(80, seed=1)]
    whole = run(texts, tokens=3000, val_tokens=100)
    assert len(whole) > 20
    for start in range(len(whole) - 1):
        state = json.loads(json.dumps(whole[start].state))
        rest = run(texts, tokens=3000, val_tokens=100, state=state)
        assert len(rest) == len(whole) - start - 1
        for a, b in zip(rest, whole[start + 1 :], strict=True):
            assert torch.equal(a.train, b.train)
            assert torch.equal(a.val, b.val)
            assert a.state == b.state


def test_one_ahead_gives_the_same_items_and_makes_the_next_meanwhile(monkeypatch):
    monkeypatch.setattr(tokens_module, "spare_core", lambda: True)
    made = [threading.Event() for _ in range(5)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    found = []
    for number in one_ahead(items()):
        found.append(number)
        if number < 4:
            assert made[number + 1].wait(10), "the next item is not being made"
        assert not any(event.is_set() for event in made[number + 2 :]), "more than one ahead"
    assert found == list(range(5))
    assert list(one_ahead(iter(()))) == []


@pytest.mark.parametrize("spare", [False, True])
def test_one_ahead_raises_after_what_came_before(spare, monkeypatch):
    monkeypatch.setattr(tokens_module, "spare_core", lambda: spare)

    def items():
        yield from (1, 2)
        raise ValueError("no more text")

    found = []
    with pytest.raises(ValueError, match=r"^no more text$"):  # noqa: PT012 (what came before is part of it)
        for number in one_ahead(items()):
            found.append(number)
    assert found == [1, 2]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity")
def test_a_core_is_free_when_torch_uses_fewer_or_a_gpu_computes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5, 7})
    for gpu, threads, free in ((False, 4, False), (False, 8, False), (False, 3, True), (True, 4, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert tokens_module.spare_core() == free


def test_too_little_text():
    with pytest.raises(ValueError, match=r"gave 0 tokens in 0 documents.*data.source.context=16"):
        run([])
    with pytest.raises(ValueError, match="in 1 documents, one sequence needs"):
        run(["the cat"])
    only_train = ["the cat sat on a mat while two dogs ran over old hills"] * 3
    assert not any(in_val(i, 0, 0.01) for i in range(3))
    with pytest.raises(ValueError, match=r"too few for a val sequence with data.source.val_fraction=0.01"):
        run(only_train, val_fraction=0.01)
    assert run(only_train, val_fraction=0.01, val_tokens=0)
