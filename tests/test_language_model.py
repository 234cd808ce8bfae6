"""The language-model source: rows against transformers, splits, resuming, and what it refuses."""

import gc
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from msae.data import harvest as writing
from msae.data.shards import MANIFEST
from msae.settings import decode
from msae.sources import language_model, tokens
from msae.sources.bridge import PROBE_TOKENS, TOKENIZER, capture, load_bridge, load_tokenizer, model_identity
from msae.sources.int8 import quantise
from msae.sources.language_model import LanguageModelSource
from msae.sources.source import Source
from tests.fake_cuda import fake_cuda, waits
from tests.sources import made
from tests.test_harvest import contents
from tests.tiny_lm import close_hub, sentences, tiny_model, tiny_tokenizer

FIRST, RESID, LAST = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"
NEURONS, MLP_OUT = "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"
HEADS, ATTN_OUT = "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"
WIDTHS = {FIRST: 32, RESID: 32, LAST: 32, NEURONS: 128, MLP_OUT: 32, HEADS: 32, ATTN_OUT: 32}
WIDTHS |= {"ln_final.hook_normalized": 32}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("lm")
    (root / "text.txt").write_text("\n".join(sentences(400)))
    tiny_model(root / "Tiny LM")
    for directory in ("empty", "notes"):
        (root / directory).mkdir()
    (root / "notes" / "notes.md").write_text("x")
    return root


@pytest.fixture
def source(files):
    def make(**settings):
        names = {"model": str(files / "Tiny LM"), "hook_names": [RESID], "text": str(files / "text.txt")}
        sizes = {"tokens": 1000, "context": 16, "chunk_tokens": 320, "model_batch": 8}
        return LanguageModelSource(**{**names, **sizes, "dtype": "float32", "device": "cpu", **settings})

    return make


def chunks_of(source, state=None):
    return made(source.chunks(state))


def first_train(source):
    return chunks_of(source)[0].splits["train"]


def first_rows(source):
    return first_train(source).activations[source.hook_names[0]]


def refuses(source, *patterns):
    with pytest.raises(ValueError) as error:
        chunks_of(source)
    message = str(error.value)
    assert "\n" not in message
    for pattern in patterns:
        assert re.search(pattern, message), message


# ---- what it gives


def test_is_a_source_and_cheap_to_construct(source):
    assert isinstance(source(), Source)
    assert source().name == "tiny-lm"
    assert source().expected_rows() == 1000 + 53
    long = source(tokens=10**8)
    assert long.expected_rows() == Path(long.text).stat().st_size  # a token is at least a byte
    assert source(val_fraction=0).expected_rows() == 1000
    assert source().truth() is None
    code = (
        "import sys; from msae.sources.language_model import LanguageModelSource as S;"
        "s = S(model='m', hook_names=['h'], text='t', tokens=1);"
        "sys.exit(any(m in sys.modules for m in ('transformer_lens', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_rows_of_every_hook_are_what_transformers_computes(source, files):
    """The residual stream at the first and last sites and between; attention's heads and the MLP into their outputs."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(files / "Tiny LM", attn_implementation="eager").requires_grad_(False)
    attention, mlp = plain.transformer.h[1].attn.c_proj, plain.transformer.h[1].mlp.c_proj
    whole = source(hook_names=list(WIDTHS))
    assert {hook: whole.width(hook) for hook in WIDTHS} == WIDTHS
    assert whole.bytes_per_row(RESID) == 32 * 4 + 12
    rows = {"train": 0, "val": 0}
    for chunk in chunks_of(whole):
        assert json.loads(json.dumps(chunk.state)) == chunk.state
        for split, part in chunk.splits.items():
            x, index = part.activations, part.index
            assert {v.dtype for v in index.values()} == {torch.int32}
            states = plain(index["tokens"].long(), output_hidden_states=True).hidden_states
            where = (index["sequence"].long(), index["position"].long())
            pairs = [(x[FIRST], states[0][where]), (x[RESID], states[1][where])]
            pairs += [(plain.transformer.ln_f(x[LAST]), states[2][where]), (mlp(x[NEURONS]), x[MLP_OUT])]
            pairs += [(attention(x[HEADS]), x[ATTN_OUT]), (x[RESID] + x[ATTN_OUT] + x[MLP_OUT], x[LAST])]
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            assert (index["tokens"][where] != 0).all()
            assert len(set(zip(*(w.tolist() for w in where), strict=True))) == len(where[0])
            assert not torch.equal(where[0], where[0].sort().values)
            rows[split] += len(where[0])
    assert rows["train"] == 1000
    assert 0 < rows["val"] <= 53
    assert sum(rows.values()) <= whole.expected_rows()


def test_hooks_of_one_pass_are_aligned_and_each_is_what_it_is_alone(source):
    whole = chunks_of(source(hook_names=list(WIDTHS)))
    for name in WIDTHS:
        for a, b in zip(whole, chunks_of(source(hook_names=[name])), strict=True):
            for split in a.splits:
                assert torch.equal(a.splits[split].activations[name], b.splits[split].activations[name])
                assert torch.equal(a.splits[split].index["position"], b.splits[split].index["position"])


def test_resuming_gives_the_same_bytes_and_val_is_cut_at_its_tokens(source):
    settings = {"tokens": 1500, "hook_names": [RESID, MLP_OUT], "dtype": "float16"}
    settings |= {"val_tokens": 250, "val_fraction": 0.2}
    whole = chunks_of(source(**settings))
    assert sum(len(c.splits["val"].index["position"]) for c in whole if "val" in c.splits) == 250
    assert len([c for c in whole if "val" in c.splits]) > 1
    assert len(whole) > 3
    for done, chunk in enumerate(whole, start=1):
        rest = chunks_of(source(**settings), json.loads(json.dumps(chunk.state)))
        assert [c.state for c in rest] == [c.state for c in whole[done:]]
        for a, b in zip(rest, whole[done:], strict=True):
            assert a.splits.keys() == b.splits.keys()
            for split, part in a.splits.items():
                for expected, rows in zip(astuple(b.splits[split]), astuple(part), strict=True):
                    torch.testing.assert_close(rows, expected, rtol=0, atol=0)


def test_dtypes_and_compatibility_mode(source):
    plain, centred = (first_train(source(tokens=100, compatibility_mode=c)) for c in (False, True))
    assert torch.equal(plain.index["tokens"], centred.index["tokens"])
    x, y = plain.activations[RESID], centred.activations[RESID]
    torch.testing.assert_close(x - x.mean(1, keepdim=True), y, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(x, y, atol=1e-2)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        stored = first_train(source(tokens=100, dtype=name))
        assert torch.equal(stored.activations[RESID], x.to(dtype))
        assert not stored.scales
        torch.testing.assert_close(first_rows(source(tokens=100, model_dtype=name)), x, atol=0.1, rtol=0.1)


def test_int8_rows_have_scales_in_the_same_slots(source, tmp_path):
    exact, small = source(), source(dtype="int8")
    assert small.bytes_per_row(RESID) == exact.bytes_per_row(RESID) - 3 * 32 + 4
    shards, small_shards = (writing.harvest(s, tmp_path, show=False)[RESID] for s in (exact, small))
    for split in ("train", "val"):
        for i in range(len(shards.rows(split))):
            x, rows = shards.activations(split, i), small_shards.activations(split, i)
            half_a_step = x.abs().amax(1, keepdim=True) / 127 / 2
            assert ((x - rows).abs() <= half_a_step * 1.001).all()
            assert not torch.equal(x, rows)
            q, scales = quantise(x)
            assert torch.equal(rows, q * scales[:, None])
            assert torch.equal(shards.index(split, i)["position"], small_shards.index(split, i)["position"])


def test_rows_that_are_dropped_may_overflow(source, files, tmp_path):
    """BOS is where activations are largest, and its rows are not stored."""
    shutil.copytree(files / "Tiny LM", tmp_path / "sink")
    weights = load_file(tmp_path / "sink" / "model.safetensors")
    weights["transformer.wte.weight"][0] = 1e6
    save_file(weights, tmp_path / "sink" / "model.safetensors", metadata={"format": "pt"})
    settings = {"hook_names": [FIRST], "dtype": "float16"}
    assert torch.equal(first_rows(source(**settings)), first_rows(source(**settings, model=str(tmp_path / "sink"))))


def test_batches_without_a_token_to_keep(source, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(["the cat sat on a mat", "<|x|>" * 100, *sentences(20)]))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|x|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    settings = {"text": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path), "val_fraction": 0, "tokens": 200}
    single, eight = (first_train(source(model_batch=n, **settings)) for n in (1, 8))
    assert (single.index["tokens"][1:4] == len(tokenizer) - 1).sum() > 40
    assert torch.equal(single.index["position"], eight.index["position"])
    torch.testing.assert_close(single.activations[RESID], eight.activations[RESID])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_row_is_read_before_it_has_arrived(device, dtype, source):
    """On a pretended device, also where another one is the current one, and there is a stream for each."""
    settings = {"hook_names": [NEURONS, RESID], "dtype": dtype}
    expected = chunks_of(source(**settings))
    with fake_cuda():
        got = chunks_of(source(**settings, device=device))
    where = "cuda:0" if device == "cuda" else device
    assert set(waits) == {f"to {where}", "event"}  # at the beginning, and for a batch while the next one runs
    for a, b in zip(expected, got, strict=True):
        for split, part in a.splits.items():
            there = b.splits[split]
            for ours, theirs in ((part.activations, there.activations), (part.scales, there.scales)):
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[hook], theirs[hook]) for hook in ours)


def test_a_model_is_used_where_it_lies_by_threads_whose_device_is_another(source):
    """That of training may be another than the one that was current when the model was loaded."""
    expected = chunks_of(source())
    with fake_cuda(), pytest.MonkeyPatch.context() as patch:
        chunks = source(device="cuda").chunks(None)
        got = [{name: make() for name, make in next(chunks).splits.items()}]
        patch.setattr(torch.cuda, "current_device", lambda: 1)
        got += [{name: make() for name, make in chunk.splits.items()} for chunk in chunks]
    for a, b in zip(expected, got, strict=True):
        for split, part in a.splits.items():
            assert torch.equal(part.activations[RESID], b[split].activations[RESID])


def test_a_device_that_is_not_there_is_refused(source, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^data\.source\.device=cuda:1, but PyTorch sees no GPU; give [^\n]*=cpu$"):
        chunks_of(source(device="cuda:1"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_copied_while_the_gpu_computes_are_those_of_the_cpu(source):
    for a, b in zip(*(chunks_of(source(hook_names=[NEURONS, RESID], device=d)) for d in ("cpu", "cuda")), strict=True):
        for split, part in a.splits.items():
            torch.testing.assert_close(part.activations, b.splits[split].activations, atol=1e-2, rtol=1e-2)


# ---- what runs at the same time


def before_each_chunk(patch, act):
    """Call `act(number)` before the forward passes of each chunk."""
    begun, forward = set[int](), LanguageModelSource._harvest

    def harvest(*given):
        if given[-1] not in begun:
            begun.add(given[-1])
            act(given[-1])
        return forward(*given)

    patch.setattr(LanguageModelSource, "_harvest", harvest)


def test_a_chunk_is_written_while_the_model_runs_and_never_two(source, tmp_path, monkeypatch):
    """Chunk n is not written before the forward passes of chunk n + 1 began; those of n + 2 wait for it."""
    began, written, write_chunk = [threading.Event() for _ in range(99)], [], writing.write_chunk
    last = len(chunks_of(source())) - 1
    assert last > 2

    def begin(number):
        began[number].set()
        assert len(written) >= number - 1, "two chunks wait to be written"

    def write(directory, number, *given):
        assert threading.current_thread() is not threading.main_thread()
        assert number == last or began[number + 1].wait(30), "the model waits for the disk"
        written.append(number)
        return write_chunk(directory, number, *given)

    monkeypatch.setattr(writing, "spare_core", lambda: True)
    before_each_chunk(monkeypatch, begin)
    monkeypatch.setattr(writing, "write_chunk", write)
    writing.harvest(source(), tmp_path, show=False)
    assert written == list(range(last + 1))


@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_fails_stops_the_model_at_the_next_chunk(beside, source, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("cannot write it; free space")

    begun = []
    with monkeypatch.context() as patch:
        patch.setattr(writing, "spare_core", lambda: beside)
        before_each_chunk(patch, begun.append)
        patch.setattr(writing, "write_chunk", fail)
        with pytest.raises(ValueError, match=r"^cannot write it; free space$"):
            writing.harvest(source(), tmp_path, show=False)
    assert len(begun) == 1 + beside
    assert not list(tmp_path.rglob("*.safetensors")) + list(tmp_path.rglob(MANIFEST))
    writing.harvest(source(), tmp_path, show=False)


def test_a_model_that_fails_leaves_what_was_written(source, tmp_path, monkeypatch):
    writing.harvest(source(), tmp_path / "whole", show=False)
    with monkeypatch.context() as patch:
        before_each_chunk(patch, lambda number: 1 // (2 - number))
        with pytest.raises(ZeroDivisionError):
            writing.harvest(source(), tmp_path / "cut", show=False)
    assert {p.name for p in tmp_path.glob("cut/*/chunk-*")} == {"chunk-00000.json", "chunk-00001.json"}
    writing.harvest(source(), tmp_path / "cut", show=False)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_source_lets_go_of_a_chunk_that_was_taken(source):
    chunks = source().chunks(None)
    rows = weakref.ref(next(chunks).splits["train"]().activations[RESID])
    gc.collect()
    assert rows() is None
    chunks.close()


def test_without_a_core_to_spare_nothing_runs_beside_the_model(source, tmp_path, monkeypatch):
    threads, write_chunk = set(), writing.write_chunk
    writing.harvest(source(), tmp_path / "beside", show=False)
    for module in (tokens, writing):
        monkeypatch.setattr(module, "spare_core", lambda: False)
    monkeypatch.setattr(tokens, "ThreadPoolExecutor", None)
    monkeypatch.setattr(
        writing, "write_chunk", lambda *given: threads.add(threading.current_thread()) or write_chunk(*given)
    )
    writing.harvest(source(), tmp_path / "alone", show=False)
    assert threads == {threading.main_thread()}
    assert contents(tmp_path / "beside") == contents(tmp_path / "alone")


# ---- identity


def test_identity_is_content_not_name(source, files, tmp_path):
    identity = source().identity(RESID)
    assert json.loads(json.dumps(identity)) == identity
    assert identity["dropped_ids"] == [0]
    copy = tmp_path / "other name"
    shutil.copytree(files / "Tiny LM", copy)
    assert source(model=str(copy), hook_names=[RESID, FIRST]).identity(RESID) == identity
    assert source().identity(FIRST) != identity
    assert "Tiny LM" in source().provenance()["model"]
    assert source().provenance()["versions"]["transformer_lens"]
    changes = {"context": 17, "tokens": 7, "seed": 1, "val_tokens": 9, "val_fraction": 0.5, "text_field": "x"}
    changes |= {"dtype": "float16", "model_dtype": "bfloat16", "prepend_bos": False, "compatibility_mode": True}
    changes |= {"chunk_tokens": 64, "model_batch": 2}
    for key, value in changes.items():
        assert source(**{key: value}).identity(RESID) != identity, key
    tiny_model(copy, seed=1)
    other = source(model=str(copy)).identity(RESID)
    assert other["model"] != identity["model"]
    assert other["tokenizer"] == identity["tokenizer"]
    tiny_tokenizer(size=290).save_pretrained(copy)
    assert source(model=str(copy)).identity(RESID)["tokenizer"] != identity["tokenizer"]


# ---- what it refuses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 1}, r"data\.source\.context=1 has no room for text; set it to 2 or more"),
        ({"hook_names": [RESID, RESID]}, r"data\.source\.hook_names=.* must name each hook once"),
    ],
)
def test_impossible_settings(settings, message):
    needed = {"model": "m", "hook_names": [RESID], "text": "t", "tokens": 1}
    with pytest.raises(ValueError, match=f"^{message}$"):
        decode(LanguageModelSource, needed | settings, "data.source")


@pytest.mark.parametrize(
    ("settings", "patterns"),
    [
        (
            {"hook_names": ["blocks.1.hook_resid_pr"]},
            [r"no hook blocks\.1\.hook_resid_pr;", rf"hook_names=\[{RESID}\]"],
        ),
        ({"hook_names": [RESID, "blocks.0.attn.hook_result"]}, ["gated", r"hook_names=\[blocks\.0\.attn\.hook_z\]"]),
        ({"hook_names": ["blocks.9.hook_resid_pre"]}, ["layers 0 to 1", rf"hook_names=\[{RESID}\]"]),
        ({"hook_names": [RESID, "blocks.0.attn.hook_pattern"]}, ["not a row for each token"]),
        ({"context": 65}, ["data.source.context=65 is longer than the model's 64; set data.source.context=64"]),
        ({"model": "/nowhere/model"}, ["there is no directory /nowhere/model; set data.source.model="]),
        ({"model": "{files}/text.txt"}, ["there is no directory"]),
        ({"model": "{files}/empty"}, ["is empty"]),
        ({"model": "{files}/notes"}, ["has no config.json"]),
        ({"text": "/nowhere.txt"}, [r"there is no text at /nowhere\.txt"]),
    ],
)
def test_what_does_not_exist_or_fit_the_model_is_refused(settings, patterns, source, files):
    if "model" in settings:
        settings = {"model": settings["model"].format(files=files)}
    refuses(source(**settings), *patterns)


def test_as_many_heads_as_probed_tokens_are_no_row_for_each_token(source, tmp_path):
    seven = tiny_model(tmp_path, n_head=PROBE_TOKENS, n_embd=5 * PROBE_TOKENS)
    refuses(source(model=str(seven), hook_names=["blocks.0.attn.hook_pattern"]), "not a row for each token")


def test_a_hub_model_while_offline_is_refused_at_once(source, files, tmp_path, monkeypatch):
    close_hub(monkeypatch, tmp_path)
    load_bridge(str(files / "Tiny LM"), device="cpu")  # a directory needs no hub, and the imports are paid for
    start = time.perf_counter()
    refuses(source(model="owner/name"), "out of reach", "data.source.model=<directory made by save_pretrained>")
    with pytest.raises(ValueError, match="out of reach"):
        source(model="owner/name").identity(RESID)
    assert time.perf_counter() - start < 2


def test_a_cached_hub_model_works_offline(source, files, tmp_path, monkeypatch):
    close_hub(monkeypatch, tmp_path)
    repository, commit = tmp_path / "models--owner--name", "a" * 40
    shutil.copytree(files / "Tiny LM", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    cached = source(model="owner/name")
    assert cached.identity(RESID)["model"] == {"name": "owner/name", "commit": commit}
    assert cached.name == "name"
    assert torch.equal(first_rows(cached), first_rows(source()))


def test_an_architecture_that_is_not_known_is_refused(source, tmp_path):
    from transformers import ConvNextConfig

    tiny_tokenizer().save_pretrained(tmp_path)
    ConvNextConfig().save_pretrained(tmp_path)
    refuses(source(model=str(tmp_path)), "transformer_lens cannot run", "set data.source.model to")
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    refuses(source(model=str(tmp_path)), "transformer_lens cannot run|has no tokenizer")


def test_a_model_without_a_tokenizer_needs_one(source, files, tmp_path):
    bare = str(tmp_path / "bare")
    shutil.copytree(files / "Tiny LM", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    refuses(source(model=bare), "has no tokenizer", "set data.source.tokenizer")
    for load in (load_tokenizer, lambda path: model_identity(path, None, TOKENIZER), load_bridge):
        with pytest.raises(ValueError, match="has no tokenizer"):  # transformers would make up an empty one
            load(bare)
    assert torch.equal(first_rows(source(model=bare, tokenizer=str(files / "Tiny LM"))), first_rows(source()))


def test_a_tokenizer_that_is_not_the_models_is_refused(source, tmp_path):
    larger = tiny_tokenizer()
    larger.add_tokens([f"word{i}" for i in range(40)])
    larger.save_pretrained(tmp_path)
    refuses(source(tokenizer=str(tmp_path)), r"ids up to 3[2-3]\d, .* embeds 320; set data.source.tokenizer")


def test_a_tokenizer_without_bos_and_eos_gives_every_token(source, tmp_path):
    tiny_tokenizer(special=False).save_pretrained(tmp_path)
    refuses(source(tokenizer=str(tmp_path)), "neither BOS nor EOS; set data.source.prepend_bos=false")
    without_bos = source(tokenizer=str(tmp_path), prepend_bos=False)
    parts = [chunk.splits["train"].index for chunk in chunks_of(without_bos)]
    assert all(len(index["position"]) == index["tokens"].numel() for index in parts[:-1])
    assert without_bos.identity(RESID)["dropped_ids"] == []


def test_a_text_of_special_tokens_alone_is_refused(source, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["the"]})
    tokenizer.save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the" * 200)
    refuses(source(tokenizer=str(tmp_path), text=str(text), val_fraction=0), "all .* train tokens are special")


def test_rows_that_are_not_finite_are_refused_at_the_next_batch(source, tmp_path, monkeypatch):
    big = str(tiny_model(tmp_path / "big", scale=4e6))
    refuses(source(model=big, dtype="float16"), RESID, "overflows float16", r"data\.source\.dtype=bfloat16")
    assert chunks_of(source(model=big, dtype="bfloat16"))
    nan = str(tiny_model(tmp_path / "nan", scale=float("nan")))
    for dtype in ("float32", "int8"):
        passes = []
        monkeypatch.setattr(language_model, "capture", lambda *given, runs=passes: runs.append(1) or capture(*given))
        patterns = [RESID, "NaN or Inf in the model", r"data\.source\.model_dtype=float32"]
        refuses(source(model=nan, dtype=dtype, model_batch=1), *patterns)
        assert len(passes) == 2  # a batch is checked while the next one runs


def test_loading_is_quiet(files, capfd):
    load_bridge(str(files / "Tiny LM"), device="cpu", compatibility_mode=True)
    out, err = capfd.readouterr()
    assert out + err == ""
