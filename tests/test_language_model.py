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
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from msae.data import harvest as writing
from msae.data import language_model, tokens
from msae.data.bridge import capture, load_bridge
from msae.data.datamodule import ActivationData
from msae.data.language_model import LanguageModelSource
from msae.data.shards import MANIFEST, quantise
from msae.data.source import Source
from tests.tiny_lm import sentences, tiny_model, tiny_tokenizer

RESID = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("lm")
    (root / "text.txt").write_text("\n".join(sentences(400)))
    tiny_model(root / "Tiny LM")
    return root


def source(files, **settings):
    given = {
        "model": str(files / "Tiny LM"),
        "hook_names": [RESID],
        "text": str(files / "text.txt"),
        "tokens": 1000,
    }
    given |= {"context": 16, "chunk_tokens": 320, "model_batch": 8, "dtype": "float32", "device": "cpu"}
    return LanguageModelSource(**(given | settings))


def harvest(some, state=None):
    return list(some.chunks(state))


def refuses(some, *patterns):
    with pytest.raises(ValueError, match=patterns[0]) as error:
        harvest(some)
    message = str(error.value)
    assert "\n" not in message
    for pattern in patterns:
        assert re.search(pattern, message), message


# ---- what it gives


def test_is_a_source_and_cheap_to_construct(files):
    some = source(files)
    assert isinstance(some, Source)
    assert some.name == "tiny-lm"
    assert some.expected_rows() == 1000 + 53
    long = source(files, tokens=10**8)
    assert long.expected_rows() == Path(long.text).stat().st_size  # a token is at least a byte
    assert source(files, val_fraction=0).expected_rows() == 1000
    assert some.truth() is None
    code = (
        "import sys; from msae.data.language_model import LanguageModelSource as S;"
        "s = S(model='m', hook_names=['h'], text='t', tokens=1);"
        "sys.exit(any(m in sys.modules for m in ('transformer_lens', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_rows_are_the_hidden_states_of_transformers(files):
    from transformers import AutoModelForCausalLM

    some = source(files)
    assert some.d_in(RESID) == 32
    assert some.bytes_per_row(RESID) == 32 * 4 + 12
    plain = AutoModelForCausalLM.from_pretrained(files / "Tiny LM", attn_implementation="eager")
    rows = {"train": 0, "val": 0}
    for chunk in harvest(some):
        assert json.loads(json.dumps(chunk.state)) == chunk.state
        for split, part in chunk.splits.items():
            acts, index = part.activations[RESID], part.index
            assert {k: v.dtype for k, v in index.items()} == dict.fromkeys(index, torch.int32)
            assert acts.shape == (len(index["sequence"]), 32)
            with torch.no_grad():
                states = plain(index["tokens"].long(), output_hidden_states=True).hidden_states[1]
            where = (index["sequence"].long(), index["position"].long())
            torch.testing.assert_close(acts, states[where], atol=1e-5, rtol=1e-5)
            assert (index["tokens"][where] != 0).all()
            assert len(set(zip(*(w.tolist() for w in where), strict=True))) == len(acts)
            assert not torch.equal(where[0], where[0].sort().values)
            rows[split] += len(acts)
    assert rows["train"] == 1000
    assert 0 < rows["val"] <= 53
    assert sum(rows.values()) <= some.expected_rows()


def test_hooks_of_one_pass_are_aligned_and_each_is_what_it_is_alone(files):
    names = [
        "blocks.1.attn.hook_z",
        RESID,
        "blocks.1.hook_resid_post",
        "ln_final.hook_normalized",
        "blocks.0.mlp.hook_post",
    ]
    together = harvest(source(files, hook_names=names))
    for name in names:
        alone = harvest(source(files, hook_names=[name]))
        for a, b in zip(together, alone, strict=True):
            for split in a.splits:
                assert torch.equal(a.splits[split].activations[name], b.splits[split].activations[name])
                assert torch.equal(a.splits[split].index["position"], b.splits[split].index["position"])
    widths = source(files, hook_names=names)
    assert [widths.d_in(name) for name in names] == [32, 32, 32, 32, 128]


def test_heads_are_flattened_in_order(files):
    bridge = load_bridge(str(files / "Tiny LM"), device="cpu")
    tokens = torch.arange(1, 13).view(1, 12)
    z = capture(bridge, tokens, ["blocks.1.attn.hook_z"])["blocks.1.attn.hook_z"]
    assert z.shape == (1, 12, 4, 8)
    (chunk, *_) = harvest(source(files, hook_names=["blocks.1.attn.hook_z"]))
    part = chunk.splits["train"]
    again = capture(bridge, part.index["tokens"], ["blocks.1.attn.hook_z"])["blocks.1.attn.hook_z"]
    rows = again[part.index["sequence"].long(), part.index["position"].long()]
    torch.testing.assert_close(part.activations["blocks.1.attn.hook_z"], rows.reshape(len(rows), 32))


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "ln_final.hook_normalized"])
def test_first_and_last_sites_equal_a_whole_pass(files, hook):
    bridge = load_bridge(str(files / "Tiny LM"), device="cpu")
    tokens = torch.arange(24).view(2, 12)
    _, cache = bridge.run_with_cache(tokens, names_filter=[hook])
    assert torch.equal(capture(bridge, tokens, [hook])[hook], cache[hook])
    assert torch.isfinite(bridge(tokens)).all()  # an ended pass leaves nothing behind
    assert bridge(tokens).shape[-1] == 320


def test_pairs_of_two_hooks_are_input_and_output_of_what_is_between(files, tmp_path):
    """A transcoder's data: rows at the MLP's neurons, and what the output matrix makes of each of them."""
    from transformers import AutoModelForCausalLM

    names = ["blocks.0.hook_mlp_out", "blocks.0.mlp.hook_post"]
    data = ActivationData(
        source(files, hook_names=names, val_fraction=0.2),
        batch_tokens=100,
        root=str(tmp_path),
        hook_name=names[1],
        target_hook_name=names[0],
    )
    data.trainer = SimpleNamespace(max_steps=12, accumulate_grad_batches=1, global_rank=0, world_size=1)
    layer = AutoModelForCausalLM.from_pretrained(files / "Tiny LM").requires_grad_(False).transformer.h[0].mlp.c_proj
    for batches in (data.train_dataloader(), data.val_dataloader()):
        for x, y in batches:
            assert (x.shape[1], y.shape[1]) == (128, 32)
            torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(layer(x), y.roll(1, 0), atol=1e-2)


def test_resuming_gives_the_same_bytes(files):
    settings = {"tokens": 1500, "hook_names": [RESID, "blocks.0.hook_mlp_out"], "dtype": "float16"}
    whole = harvest(source(files, **settings))
    assert len(whole) > 3
    for start in range(len(whole)):
        rest = harvest(source(files, **settings), json.loads(json.dumps(whole[start].state)))
        assert [c.state for c in rest] == [c.state for c in whole[start + 1 :]]
        for a, b in zip(rest, whole[start + 1 :], strict=True):
            for split, part in a.splits.items():
                for name, tensor in {**part.activations, **part.index}.items():
                    assert torch.equal(tensor, ({**b.splits[split].activations, **b.splits[split].index})[name])


def test_val_is_cut_at_its_tokens(files):
    chunks = harvest(source(files, val_tokens=30, val_fraction=0.2))
    assert sum(len(c.splits["val"].index["position"]) for c in chunks if "val" in c.splits) == 30


def test_dtypes_and_compatibility_mode(files):
    plain, centred = (
        harvest(source(files, tokens=100, compatibility_mode=c))[0].splits["train"] for c in (False, True)
    )
    assert torch.equal(plain.index["tokens"], centred.index["tokens"])
    x, y = plain.activations[RESID], centred.activations[RESID]
    torch.testing.assert_close(x - x.mean(1, keepdim=True), y, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(x, y, atol=1e-2)
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        stored = harvest(source(files, tokens=100, dtype=name))[0].splits["train"].activations[RESID]
        assert torch.equal(stored, x.to(dtype))
        assert not harvest(source(files, tokens=100, dtype=name))[0].splits["train"].scales
        run = harvest(source(files, tokens=100, model_dtype=name))[0].splits["train"].activations[RESID]
        torch.testing.assert_close(run, x, atol=0.1, rtol=0.1)


def test_int8_rows_have_scales_in_the_same_slots(files, tmp_path):
    exact, small = source(files), source(files, dtype="int8")
    rows, opened = (writing.harvest(s, tmp_path, show=False)[RESID] for s in (exact, small))
    assert small.bytes_per_row(RESID) == exact.bytes_per_row(RESID) - 3 * 32 + 4
    for split in ("train", "val"):
        for i in range(len(rows.rows(split))):
            x, found = rows.activations(split, i), opened.activations(split, i)
            half_a_step = x.abs().amax(1, keepdim=True) / 127 / 2
            assert ((x - found).abs() <= half_a_step * 1.001).all()
            assert not torch.equal(x, found)
            q, scales = quantise(x)
            assert torch.equal(found, q * scales[:, None])
            assert torch.equal(rows.index(split, i)["position"], opened.index(split, i)["position"])


def test_what_is_dropped_may_overflow(files, tmp_path):
    """BOS is where activations are largest, and its rows are not stored."""
    shutil.copytree(files / "Tiny LM", tmp_path / "sink")
    weights = load_file(tmp_path / "sink" / "model.safetensors")
    weights["transformer.wte.weight"][0] = 1e6
    save_file(weights, tmp_path / "sink" / "model.safetensors", metadata={"format": "pt"})
    given = {"hook_names": ["blocks.0.hook_resid_pre"], "dtype": "float16"}
    plain, sink = (harvest(source(files, model=str(m), **given)) for m in (files / "Tiny LM", tmp_path / "sink"))
    for a, b in zip(plain, sink, strict=True):
        assert torch.equal(*(c.splits["train"].activations[given["hook_names"][0]] for c in (a, b)))


def test_batches_without_a_token_to_keep(files, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(["the cat sat on a mat", "<|x|>" * 100, *sentences(20)]))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|x|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    given = {"text": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path), "val_fraction": 0, "tokens": 200}
    (single, *_), (eight, *_) = (harvest(source(files, model_batch=n, **given)) for n in (1, 8))
    assert (single.splits["train"].index["tokens"][1:4] == len(tokenizer) - 1).sum() > 40
    assert torch.equal(single.splits["train"].index["position"], eight.splits["train"].index["position"])
    torch.testing.assert_close(*(c.splits["train"].activations[RESID] for c in (single, eight)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_copied_while_the_gpu_computes_are_those_of_the_cpu(files):
    names = ["blocks.0.mlp.hook_post", RESID]
    for a, b in zip(*(harvest(source(files, hook_names=names, device=d)) for d in ("cpu", "cuda")), strict=True):
        for split in a.splits:
            for name in names:
                x, y = (c.splits[split].activations[name] for c in (a, b))
                torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)


# ---- what runs at the same time


def test_a_chunk_is_written_while_the_model_runs_and_never_two(files, tmp_path, monkeypatch):
    """Chunk n is not written before the forward passes of chunk n + 1 began; those of n + 2 wait for it."""
    began, whole, real = [threading.Event() for _ in range(99)], [], writing.write_chunk
    forward, number = language_model.LanguageModelSource._harvest, iter(range(99))

    def make(self, *given):
        now = next(number)
        began[now].set()
        assert len(whole) >= now - 1, "two chunks wait to be written"
        return forward(self, *given)

    def write(directory, now, *given):
        assert threading.current_thread() is not threading.main_thread()
        if now < last:
            assert began[now + 1].wait(30), "the model waits for the disk"
        whole.append(now)
        return real(directory, now, *given)

    monkeypatch.setattr(writing, "spare_core", lambda: True)
    last = len(harvest(source(files))) - 1
    monkeypatch.setattr(language_model.LanguageModelSource, "_harvest", make)
    monkeypatch.setattr(writing, "write_chunk", write)
    writing.harvest(source(files), tmp_path, show=False)
    assert whole == list(range(last + 1))
    assert last > 2


@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_fails_stops_the_model_at_the_next_chunk(beside, files, tmp_path, monkeypatch):
    made, forward = [], language_model.LanguageModelSource._harvest

    def make(self, *given):
        made.append(1)
        return forward(self, *given)

    def fail(*_):
        raise ValueError("cannot write it; free space")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "spare_core", lambda: beside)
        patch.setattr(language_model.LanguageModelSource, "_harvest", make)
        patch.setattr(writing, "write_chunk", fail)
        with pytest.raises(ValueError, match=r"^cannot write it; free space$"):
            writing.harvest(source(files), tmp_path, show=False)
    assert len(made) == 1 + beside
    assert not list(tmp_path.rglob("*.safetensors")) + list(tmp_path.rglob(MANIFEST))
    writing.harvest(source(files), tmp_path, show=False)


def test_a_model_that_fails_leaves_what_was_written(files, tmp_path, monkeypatch):
    whole = writing.harvest(source(files), tmp_path / "whole", show=False)[RESID]
    forward, made = language_model.LanguageModelSource._harvest, []

    def make(self, *given):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return forward(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(language_model.LanguageModelSource, "_harvest", make)
        with pytest.raises(KeyboardInterrupt):
            writing.harvest(source(files), tmp_path / "cut", show=False)
    directory = tmp_path / "cut" / whole.directory.name
    assert {p.name for p in directory.glob("chunk-*")} == {"chunk-00000.json", "chunk-00001.json"}
    writing.harvest(source(files), tmp_path / "cut", show=False)
    for path in whole.directory.glob("*[!k]"):  # all but .lock
        assert path.read_bytes() == (directory / path.name).read_bytes(), path.name


def test_the_source_lets_go_of_a_chunk_that_was_taken(files):
    chunks = source(files).chunks(None)
    rows = weakref.ref(next(chunks).splits["train"].activations[RESID])
    gc.collect()
    assert rows() is None
    chunks.close()


def test_rows_that_are_not_finite_are_seen_before_the_chunk_is_done(files, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(language_model, "capture", lambda *given: runs.append(1) or capture(*given))
    nan = tiny_model(tmp_path / "nan", scale=float("nan"))
    refuses(source(files, model=str(nan), model_batch=1), "NaN or Inf in the model")
    assert len(runs) == 2  # a batch is looked at while the next one runs


def test_without_a_core_to_spare_nothing_runs_beside_the_model(files, tmp_path, monkeypatch):
    threads, real = set(), writing.write_chunk

    def write(*given):
        threads.add(threading.current_thread())
        return real(*given)

    beside = writing.harvest(source(files), tmp_path / "beside", show=False)[RESID].directory
    monkeypatch.setattr(tokens, "spare_core", lambda: False)
    monkeypatch.setattr(writing, "spare_core", lambda: False)
    monkeypatch.setattr(tokens, "ThreadPoolExecutor", None)
    monkeypatch.setattr(writing, "write_chunk", write)
    alone = writing.harvest(source(files), tmp_path / "alone", show=False)[RESID].directory
    assert threads == {threading.main_thread()}
    assert {p.name: p.read_bytes() for p in beside.iterdir()} == {p.name: p.read_bytes() for p in alone.iterdir()}


# ---- identity


def test_identity_is_content_not_name(files, tmp_path):
    first = source(files).identity(RESID)
    assert json.loads(json.dumps(first)) == first
    assert first["dropped_ids"] == [0]
    copy = tmp_path / "other name"
    shutil.copytree(files / "Tiny LM", copy)
    assert source(files, model=str(copy)).identity(RESID) == first
    assert source(files).identity("blocks.0.hook_resid_pre") != first
    assert "Tiny LM" in source(files).provenance()["model"]
    assert source(files).provenance()["versions"]["transformer_lens"]
    changes = {
        "context": 17,
        "tokens": 7,
        "seed": 1,
        "dtype": "float16",
        "model_dtype": "bfloat16",
        "val_tokens": 9,
    }
    changes |= {"prepend_bos": False, "compatibility_mode": True, "chunk_tokens": 64, "model_batch": 2}
    changes |= {"val_fraction": 0.5, "text_field": "x"}
    for key, value in changes.items():
        assert source(files, **{key: value}).identity(RESID) != first, key
    tiny_model(copy, seed=1)
    other = source(files, model=str(copy)).identity(RESID)
    assert other["model"] != first["model"]
    assert other["tokenizer"] == first["tokenizer"]
    tiny_tokenizer(size=290).save_pretrained(copy)
    assert source(files, model=str(copy)).identity(RESID)["tokenizer"] != first["tokenizer"]


# ---- what it refuses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float17"}, r"data\.source\.dtype=float17 is unknown; choose float16, bfloat16, float32, int8"),
        ({"model_dtype": "int8"}, r"data\.source\.model_dtype=int8 is unknown"),
        ({"tokens": 0}, r"data\.source\.tokens=0"),
        ({"context": 1}, r"data\.source\.context=1 "),
        ({"val_fraction": 1.0}, r"data\.source\.val_fraction=1\.0"),
        ({"hook_names": []}, r"data\.source\.hook_names=\[\]"),
        ({"hook_names": [RESID, RESID]}, "each once"),
    ],
)
def test_impossible_settings(files, settings, message):
    with pytest.raises(ValueError, match=message):
        source(files, **settings)


@pytest.mark.parametrize(
    ("hook", "patterns"),
    [
        (
            "blocks.1.hook_resid_pr",
            [r"no hook blocks\.1\.hook_resid_pr;", r"hook_names=\[blocks\.1\.hook_resid_pre\]"],
        ),
        ("blocks.0.attn.hook_result", ["gated", r"hook_names=\[blocks\.0\.attn\.hook_z\]"]),
        ("blocks.9.hook_resid_pre", ["layers 0 to 1", r"hook_names=\[blocks\.1\.hook_resid_pre\]"]),
        ("blocks.0.attn.hook_pattern", ["not a row for each token"]),
    ],
)
def test_hooks_that_give_no_rows(files, hook, patterns):
    refuses(source(files, hook_names=[hook]), *patterns)
    refuses(source(files, hook_names=[RESID, hook]), *patterns)


def test_context_longer_than_the_models(files):
    refuses(
        source(files, context=65),
        "data.source.context=65 is longer than the model's 64; set data.source.context=64",
    )


def test_paths_that_are_no_model(files, tmp_path):
    refuses(source(files, model="/nowhere/model"), "there is no directory /nowhere/model; set data.source.model=")
    refuses(source(files, model=str(files / "text.txt")), "there is no directory")
    refuses(source(files, model=str(tmp_path)), "is empty")
    (tmp_path / "notes.md").write_text("x")
    refuses(source(files, model=str(tmp_path)), "has no config.json")
    refuses(source(files, text="/nowhere.txt"), "there is no text at /nowhere.txt")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that refuses connections, an empty cache, and offline mode put back afterwards."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_hub_model_while_offline(files, no_hub):
    load_bridge(str(files / "Tiny LM"), device="cpu")  # a directory needs no hub, and the imports are paid for
    start = time.perf_counter()
    refuses(
        source(files, model="owner/name"),
        "out of reach",
        "data.source.model=<directory made by save_pretrained>",
    )
    with pytest.raises(ValueError, match="out of reach"):
        source(files, model="owner/name").identity(RESID)
    assert time.perf_counter() - start < 2


def test_cached_hub_model_works_offline(files, no_hub):
    repo, commit = no_hub / "models--owner--name", "a" * 40
    shutil.copytree(files / "Tiny LM", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    some = source(files, model="owner/name")
    assert some.identity(RESID)["model"] == {"name": "owner/name", "commit": commit}
    assert some.name == "name"
    (first, *_), (local, *_) = harvest(some), harvest(source(files))
    assert torch.equal(first.splits["train"].activations[RESID], local.splits["train"].activations[RESID])


def test_architecture_that_is_not_known(files, tmp_path):
    from transformers import ConvNextConfig

    tiny_tokenizer().save_pretrained(tmp_path)
    ConvNextConfig().save_pretrained(tmp_path)
    refuses(source(files, model=str(tmp_path)), "transformer_lens cannot run", "set data.source.model to")
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    refuses(source(files, model=str(tmp_path)), "transformer_lens cannot run|has no tokenizer")


def test_tokenizer_absent(files, tmp_path):
    shutil.copytree(files / "Tiny LM", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    refuses(source(files, model=str(tmp_path / "bare")), "has no tokenizer", "set data.source.tokenizer")
    with pytest.raises(ValueError, match="has no tokenizer"):
        source(files, model=str(tmp_path / "bare")).identity(RESID)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_bridge(str(tmp_path / "bare"), device="cpu")  # transformers would make up an empty one
    other = source(files, model=str(tmp_path / "bare"), tokenizer=str(files / "Tiny LM"))
    (first, *_), (own, *_) = harvest(other), harvest(source(files))
    assert torch.equal(first.splits["train"].activations[RESID], own.splits["train"].activations[RESID])


def test_tokenizer_that_is_not_the_models(files, tmp_path):
    larger = tiny_tokenizer()
    larger.add_tokens([f"word{i}" for i in range(40)])
    larger.save_pretrained(tmp_path)
    some = source(files, tokenizer=str(tmp_path))
    refuses(some, r"ids up to 3[2-3]\d, .* embeds 320; set data.source.tokenizer")


def test_tokenizer_without_bos_and_eos(files, tmp_path):
    tiny_tokenizer(special=False).save_pretrained(tmp_path)
    refuses(source(files, tokenizer=str(tmp_path)), "neither BOS nor EOS; set data.source.prepend_bos=false")
    chunks = harvest(source(files, tokenizer=str(tmp_path), prepend_bos=False))
    assert all(
        len(c.splits["train"].index["position"]) == c.splits["train"].index["tokens"].numel() for c in chunks[:-1]
    )
    assert source(files, tokenizer=str(tmp_path)).identity(RESID)["dropped_ids"] == []


def test_every_token_masked(files, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["the"]})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("the" * 200)
    some = source(files, tokenizer=str(tmp_path), text=str(tmp_path / "text.txt"), val_fraction=0)
    refuses(some, "all .* train tokens are special")


def test_overflow_and_nan(files, tmp_path):
    big = tiny_model(tmp_path / "big", scale=4e6)
    refuses(
        source(files, model=str(big), dtype="float16"),
        RESID,
        "overflows float16",
        r"data\.source\.dtype=bfloat16",
    )
    assert harvest(source(files, model=str(big), dtype="bfloat16"))
    nan = tiny_model(tmp_path / "nan", scale=float("nan"))
    for dtype in ("float32", "int8"):
        message = [RESID, "NaN or Inf in the model", r"data\.source\.model_dtype=float32"]
        refuses(source(files, model=str(nan), dtype=dtype), *message)


def test_loading_is_quiet(files, capfd):
    load_bridge(str(files / "Tiny LM"), device="cpu", compatibility_mode=True)
    out, err = capfd.readouterr()
    assert out + err == ""
