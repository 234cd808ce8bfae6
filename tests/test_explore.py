"""The command `explore` from a run to a page, what it finds by itself, what it keeps, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msae import explore, export, train
from msae.data.shards import Shards
from msae.explorer import job, pictures
from msae.explorer.inputs import Explore, Inputs, words
from msae.hierarchy import firings as firings_module
from msae.hierarchy.edges import Edges, levels
from msae.hierarchy.extract import FIRINGS, ORDER, THIS, VANILLA, Hierarchy
from msae.hierarchy.files import load
from msae.hierarchy.firings import FirstRows
from msae.hierarchy.limits import LINES, STAGES, TESTS, Limits
from msae.interop import load as load_sae
from msae.runs import open_run
from msae.sae import MatryoshkaSAE, permute, save_sae
from msae.sources.bridge import load_bridge
from tests.commands import ENVIRONMENT, one_line
from tests.fake_cuda import fake_cuda, waits
from tests.test_firings import firings_of
from tests.test_page import latents_of, unpacked
from tests.tiny_lm import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("elsewhere")
PICTURES = ["forest", "funnel", "levels"]


def trained(root: Path, *arguments: str) -> Path:
    """`root`/run as training leaves it, with its shards in `root`/shards; without checkpoints."""
    quick = ["checkpoint_every_steps=10_000", "trainer.log_every_n_steps=100", "trainer.val_check_interval=10_000"]
    paths = [f"data.root={root / 'shards'}", f"run_dir={root / 'run'}"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["train", *arguments, *quick, *paths])
        train.main()
    shutil.rmtree(root / "run" / "checkpoints")
    return root / "run"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A run on the synthetic tree with two arms."""
    return trained(
        tmp_path_factory.mktemp("tree"),
        *("data.source.rows=3000", "data.source.val_rows=1000", "data.source.chunk_rows=2000", "data.batch_tokens=128"),
        *("tokens=60_000", "arms={matryoshka: {}, vanilla: {prefixes: [1.0]}}"),
    )


@pytest.fixture(scope="module")
def lm(lm, tmp_path_factory) -> Path:
    """A run on a tiny language model, whose embedding has more rows than its tokenizer has tokens, as many have."""
    return trained(tmp_path_factory.mktemp("run"), *lm, "tokens=15_000", "model.lr=3e-3")


@pytest.fixture
def arms(tree, tmp_path) -> Path:
    """The tree's run, to be written to."""
    return Path(shutil.copytree(tree, tmp_path / "tree"))


@pytest.fixture
def run(lm, tmp_path) -> Path:
    """The language model's run, to be written to."""
    return Path(shutil.copytree(lm, tmp_path / "lm"))


def shards_of(run: Path) -> Path:
    (directory,) = (run.parent / "shards").iterdir()
    return directory


def model_of(run: Path) -> Path:
    return Path(open_run(run).setting("data.source.model"))


def inputs(run: Path | str, **paths: Path | str) -> Inputs:
    return Inputs(Explore(run=str(run), **{key: str(path) for key, path in paths.items()}))


def write_arms(run: Path, **errors: str | None) -> None:
    """Say that a run has these arms, and why they failed."""
    arms = [{"name": name, "arm": name, "settings": {}, "error": error} for name, error in errors.items()]
    (run / "arms.json").write_text(json.dumps({"arms": arms}))


def silent(directory: Path | str, prefixes: Sequence[int] = (4, 12), **metadata: Any) -> None:
    """Save an SAE that never fires."""
    sae = MatryoshkaSAE(20, prefixes[-1], prefixes, 2, seed=3)
    sae.metadata = metadata
    with torch.no_grad():
        sae.threshold.fill_(0.0)
        sae.b_enc.fill_(-1000.0)
    save_sae(sae, directory)


def done(call, command, *arguments: str) -> str:
    """What a command prints, which ends well."""
    code, out, err = call(command, *arguments)
    assert code == 0, out + err
    return str(out + err)


def refused(call, command, *arguments: str) -> str:
    """The one line that a command says to a mistake, with exit code 1."""
    code, _, err = call(command, *arguments)
    assert code == 1, err
    return one_line(err)


def hierarchy_of(directory: Path | str) -> Hierarchy:
    return load(Path(directory) / "hierarchy" / "hierarchy.json")[0]


def metadata_of(directory: Path) -> list[list[str]]:
    """The rows of the projector, the header first."""
    file = directory / "hierarchy" / "tensorboard" / "00000" / "decoder" / "metadata.tsv"
    return [line.split("\t") for line in file.read_text().splitlines()]


def page_of(directory: Path | str) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """What the page holds of all latents, of each, and its vocabulary."""
    parts = unpacked(Path(directory) / "report.html")
    return parts["core"], latents_of(parts), parts["vocabulary"]


# The commands, from a run to what is looked at ------------------------------------------------------------------------


def test_the_hierarchy_of_a_synthetic_tree(call, arms, monkeypatch):
    run = arms / "matryoshka"
    monkeypatch.setenv("COLUMNS", "120")  # no cell of the table is broken
    printed = done(call, explore, f"run={run}")
    directory, hierarchy = run / "hierarchy", hierarchy_of(run)
    assert list(hierarchy.funnels) == [THIS, ORDER, FIRINGS, VANILLA]
    survives, children = hierarchy.edges.survives, hierarchy.edges.child[hierarchy.edges.survives]
    assert survives.sum() >= 2
    assert hierarchy.about.tokens == 4000
    assert hierarchy.truth["edge_precision"] > 0.5
    assert hierarchy.verdict() in printed
    share = hierarchy.edges.holes[survives].sum() / (hierarchy.rate[children] * 4000).sum()
    said = re.search(r"holes: on ([\d.]+)% of a surviving child's tokens its parent is silent", printed)
    assert said
    assert float(said[1]) / 100 == pytest.approx(share, abs=1e-3)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    counts = {stage: [f"{funnel[stage]:,}" for funnel in hierarchy.funnels.values()] for stage in STAGES}
    lines = [[TESTS[key].name, TESTS[key].line_at(Limits()), *counts[key]] for key in LINES]
    assert rows == [["pairs looked at", "", *counts["pairs"]], *lines]

    for name in PICTURES:
        picture = (directory / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert sorted(events.Tags()["images"]) == [f"hierarchy/{name}" for name in PICTURES]
    for name, funnel in hierarchy.funnels.items():
        tag = name.replace(" ", "_")
        assert [(e.step, e.value) for e in events.Scalars(f"funnel/{tag}")] == list(enumerate(funnel.values()))
        assert events.Scalars(f"edges/{tag}")[0].value == funnel["rank"]
    by_level = [(e.step, e.value) for e in events.Scalars("edges/by_level_of_child")]
    assert by_level == [(i + 1, (hierarchy.level[children] == i).sum()) for i in range(3)]
    verdict = events.Tensors("hierarchy/verdict/text_summary")[0].tensor_proto.string_val[0].decode()
    assert verdict == hierarchy.verdict()
    header, *latents = metadata_of(run)
    assert header == ["latent", "level", "parent", "rate", "fires on"]
    expected = zip(range(32), hierarchy.level + 1, hierarchy.parent, strict=True)
    assert [row[:3] for row in latents] == [list(map(str, row)) for row in expected]
    assert all(row[4].startswith("feature ") or not row[4] for row in latents)
    rows = np.loadtxt(directory / "tensorboard" / "00000" / "decoder" / "tensors.tsv")
    np.testing.assert_allclose(rows, load_sae(run / "sae").W_dec.detach(), atol=1e-5)
    assert "decoder" in (directory / "tensorboard" / "projector_config.pbtxt").read_text()


def test_the_vanilla_arm_has_the_funnel_that_it_has_by_itself(call, arms):
    done(call, explore, f"run={arms}/matryoshka", "tokens=2000")
    done(call, explore, f"run={arms}/vanilla/sae", "tokens=2000")  # the directory of an SAE
    beside, alone = (hierarchy_of(arms / name) for name in ("matryoshka", "vanilla"))
    assert list(alone.funnels) == [THIS, FIRINGS]  # one prefix: no order, and no vanilla SAE beside itself
    assert beside.funnels[VANILLA] == alone.funnels[THIS] != beside.funnels[THIS]
    assert alone.prefixes == [32]


def test_running_again_replaces(call, arms):
    run = arms / "matryoshka"
    directory = run / "hierarchy"
    done(call, explore, f"run={run}")
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    printed = done(call, explore, f"run={run}", "tokens=1500", "limits.mcs=0.99", "seed=3")
    hierarchy = hierarchy_of(run)
    assert (hierarchy.about.tokens, hierarchy.about.asked.limits.mcs) == (1500, 0.99)
    after = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] == after[name]] == []
    assert len(list((directory / "tensorboard").glob("events*"))) == 1
    assert "warning" not in printed


def test_the_page_of_a_synthetic_tree_shows_what_the_file_says(call, tree, arms):
    run = arms / "matryoshka"
    printed = done(call, explore, f"run={run}", "tokens=3000", "limits.floor=0.3")
    hierarchy, (core, latents, vocabulary) = hierarchy_of(run), page_of(run)
    assert hierarchy.verdict() in printed
    assert core["verdict"] == hierarchy.verdict()
    assert core["parent"] == hierarchy.parent.tolist()
    assert core["joined"] is False
    assert vocabulary == [*(f"feature {i}" for i in range(20)), "row"]
    facts = dict(core["facts"])
    assert facts["tokens"] == "3,000"
    assert facts["edge precision"] == f"{hierarchy.truth['edge_precision']:.3f}"
    sae, shards = load_sae(run / "sae"), Shards(shards_of(tree))
    firings = firings_of(sae, shards, 3000, 0.3)
    assert firings.matrix.nnz < firings_of(sae, shards, 3000).matrix.nnz
    assert [sum(latent["histogram"]) for latent in latents] == firings.counts.tolist()
    child = int(np.flatnonzero(hierarchy.parent >= 0)[0])
    (edge,) = [e for e in latents[child]["edges"] if e[1] == child and e[2]]
    assert edge[0] == hierarchy.parent[child]
    assert all(mark in (None, 1) for mark in edge[4])
    top = latents[child]["contexts"][0]
    assert top["group"] == "top"
    assert core["label"][child] in [vocabulary[token] for token in top["tokens"]]  # active on its strongest row


def no_encoding(*_: Any) -> None:
    raise AssertionError("rows were encoded")


@pytest.mark.parametrize("kind", ["tree", "lm"])
def test_a_second_call_writes_the_same_page_without_encoding(kind, call, tree, lm, arms, run, monkeypatch):
    """To the byte, from what the first has kept."""
    of, settings = (arms / "matryoshka" if kind == "tree" else run), ["tokens=900", "limits.least=5"]
    read = {"encode": 0, "test": 0}
    reading = FirstRows.read
    monkeypatch.setattr(FirstRows, "read", lambda rows, what: count(read, what) or reading(rows, what))
    printed = done(call, explore, f"run={of}", *settings)
    assert read == {"encode": 1, "test": 1}  # by the vanilla SAE of the tree's run too
    first, kept = (of / "report.html").read_bytes(), of / "hierarchy" / "firings.safetensors"
    assert f"{kept} ({kept.stat().st_size / 1e6:.1f} MB)" in printed
    files = {path: path.stat().st_mtime_ns for path in (of / "hierarchy").rglob("*") if path.is_file()}

    monkeypatch.setattr(firings_module, "latent_codes", no_encoding)
    printed = done(call, explore, f"run={of}", *settings)
    assert "hierarchy.json, made before with these settings" in printed
    assert hierarchy_of(of).verdict() in printed
    assert (of / "report.html").read_bytes() == first
    assert read == {"encode": 1, "test": 1}
    assert {path: path.stat().st_mtime_ns for path in (of / "hierarchy").rglob("*") if path.is_file()} == files


def count(read: dict[str, int], what: str) -> None:
    read[what] += 1


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_call_that_was_stopped_at_the_pictures_begins_anew(call, arms, monkeypatch):
    """Where hierarchy.json is, the pictures are its own."""
    run = arms / "matryoshka"
    done(call, explore, f"run={run}", "tokens=800")
    with monkeypatch.context() as patch:
        patch.setattr(job.SummaryWriter, "add_embedding", interrupt)
        assert call(explore, f"run={run}", "tokens=900")[0] == 130
    assert not (run / "hierarchy" / "hierarchy.json").exists()
    printed = done(call, explore, f"run={run}", "tokens=900")
    assert "made before" not in printed
    assert hierarchy_of(run).about.tokens == 900


def test_without_kept_firings_rows_are_encoded_again_for_the_same_page(call, arms):
    run = arms / "matryoshka"
    kept, page = run / "hierarchy" / "firings.safetensors", run / "report.html"
    printed = done(call, explore, f"run={run}", "tokens=900", "keep_firings=false")
    assert "firings" not in {path.stem for path in kept.parent.iterdir()}
    assert "firings:" not in printed
    first = page.read_bytes()
    assert "made before" in done(call, explore, f"run={run}", "tokens=900", "keep_firings=false")
    assert not kept.exists()
    assert page.read_bytes() == first
    done(call, explore, f"run={run}", "tokens=900")  # and now they are kept
    assert page.read_bytes() == first
    content = kept.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        kept.write_bytes(damaged)
        printed = done(call, explore, f"run={run}", "tokens=900")
        assert f"{kept} does not hold the firings of the hierarchy beside it (its checksum is another)" in printed
        assert page.read_bytes() == first
        assert kept.read_bytes() == content
    done(call, explore, f"run={run}", "tokens=800", "keep_firings=false")
    assert not kept.exists()  # those of before are of other rows


def test_the_command_on_a_language_model(call, lm, run):
    """In a process of its own, as a user types it; the words are the model's."""
    loose = ["limits.mcs=0.1", "limits.coverage=0.4", "limits.least=5", "limits.z=-1e9", "limits.gain=-1"]
    command = [sys.executable, "-m", "msae.explore", f"run={run}", *loose]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert not re.search("Traceback|Warning", process.stderr)
    hierarchy, (core, latents, vocabulary) = hierarchy_of(run), page_of(run)
    assert vocabulary == words(tiny_tokenizer())
    assert core["joined"] is True
    assert core["verdict"] == hierarchy.verdict()
    facts = dict(core["facts"])
    assert (facts["hook"], facts["tokens"]) == ("blocks.1.hook_resid_pre", f"{hierarchy.about.tokens:,}")
    assert "tokens shown as" not in facts
    alive = np.flatnonzero(hierarchy.rate > 0).tolist()
    assert len(alive) > 10
    for latent in alive:
        assert core["label"][latent]
        top = latents[latent]["contexts"][0]
        assert top["group"] == "top"
        assert " " in "".join(vocabulary[token] for token in top["tokens"])
    shown = [row[4].replace("\\$", "$") for row in metadata_of(run)[1:]]
    assert shown == [pictures.plain(label).replace("\\$", "$") for label in core["label"]]
    holes = [c for latent in latents for c in latent["contexts"] if "holes" in c["group"]]
    assert holes
    assert all(c["parent"][c["peak"]] == 0 < c["acts"][c["peak"]] for c in holes)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_of(lm))
    expected = logit_lens(model, load_sae(run / "sae").W_dec.detach(), len(vocabulary))
    for name, tokens in zip(("promoted", "suppressed"), expected, strict=True):
        np.testing.assert_array_equal([latent[name] for latent in latents], tokens)


@torch.no_grad()
def logit_lens(model: Any, rows: torch.Tensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that the model's own last norm and unembedding raise and lower most on every decoder row."""
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    logits = model.lm_head(norm(1000 * rows) - norm(torch.zeros_like(rows)))[:, :size]  # a norm knows no scale
    order = logits.argsort(dim=1, descending=True).numpy()
    return order[:, : job.PROMOTED], order[:, : -job.PROMOTED - 1 : -1]


def test_a_page_without_a_model_shows_numbers(call, lm, run):
    (run / "config.yaml").unlink()
    done(call, explore, f"run={run}", f"shards={shards_of(lm)}", "tokens=600")
    core, latents, vocabulary = page_of(run)
    assert dict(core["facts"])["tokens shown as"] == "numbers: no model was given"
    assert vocabulary[7] == "⟨7⟩"
    assert all(latent["promoted"] is None for latent in latents)


# SAEs in other forms, odd ones, and pages of another ------------------------------------------------------------------


def test_an_sae_in_the_form_of_another_library(call, tree, arms):
    source, shards = arms / "matryoshka", f"shards={shards_of(tree)}"
    done(call, export, f"sae={source}", "to=saelens", "out=exported")
    done(call, explore, f"run={source}", shards, "tokens=2000")
    done(call, explore, "run=exported", shards, "tokens=2000")
    ours, exported = hierarchy_of(source), hierarchy_of("exported")
    assert exported.funnels[THIS] == ours.funnels[THIS]
    assert exported.prefixes == ours.prefixes
    assert exported.parent.tolist() == ours.parent.tolist()
    assert VANILLA not in exported.funnels  # no arm stands beside it
    done(call, explore, "run=exported", shards, "tokens=2000", f"vanilla={arms / 'vanilla'}", "out=more")
    assert hierarchy_of("more").funnels[VANILLA] == ours.funnels[VANILLA]
    assert Path("more/hierarchy/funnel.png").exists()
    assert list(Path("more/hierarchy/tensorboard").glob("events*"))


@pytest.mark.parametrize("prefixes", [[4, 12], [12]])
def test_an_sae_that_never_fires_has_a_page_and_pictures(prefixes, call, tree):
    """And the page of one whose file names no model does not say None."""
    silent("silent", prefixes)
    shards = f"shards={shards_of(tree)}"
    assert "Nothing is found" in done(call, explore, "run=silent", shards, "tokens=500")
    hierarchy = hierarchy_of("silent")
    assert len(hierarchy.edges.parent) == 0
    assert (hierarchy.rate == 0).all()
    assert (hierarchy.parent == -1).all()
    assert all(Path(f"silent/hierarchy/{name}.png").stat().st_size > 3000 for name in PICTURES)
    core, latents, _ = page_of("silent")
    facts = dict(core["facts"])
    assert facts["latents"] == "12, 0 fire"
    assert "None" not in facts.values()
    assert core["title"] == "synthetic · 12 latents"
    assert all(latent["contexts"] == [] and sum(latent["histogram"]) == 0 for latent in latents)


def test_no_edge_survives_and_there_is_a_page(call, arms):
    printed = done(call, explore, f"run={arms}/matryoshka", "tokens=1500", "limits.z=1e9")
    assert "Nothing is found" in printed
    assert "holes:" not in printed
    hierarchy, (core, latents, _) = hierarchy_of(arms / "matryoshka"), page_of(arms / "matryoshka")
    assert len(hierarchy.edges.parent) > 5
    assert not hierarchy.edges.survives.any()
    assert set(core["parent"]) == {-1}
    assert sum(len(latent["edges"]) for latent in latents) == 2 * len(hierarchy.edges.parent)


def test_one_latent_alone_has_a_page(call, tree):
    sae = MatryoshkaSAE(20, 1, [1], 1)
    sae.threshold.fill_(0.0)
    save_sae(sae, "one")
    done(call, explore, "run=one", f"shards={shards_of(tree)}", "tokens=500")


def test_a_hierarchy_of_another_sae_of_other_shards_or_that_is_damaged_is_made_anew(call, tree, arms):
    """Of other prefixes, or of the same shape and trained on the same shards, as two seeds are."""
    run, shards = arms / "matryoshka", f"shards={shards_of(tree)}"
    vanilla, file = f"vanilla={arms / 'vanilla'}", Path("page/hierarchy/hierarchy.json")
    common = ["tokens=1000", vanilla, "out=page"]
    done(call, explore, f"run={run}", *common)
    ours = file.read_bytes()
    nested, permuted = (load_sae(run / "sae") for _ in range(2))
    nested.prefixes = [16, 32]
    permute(permuted, torch.arange(31, -1, -1))
    for name, sae in (("nested", nested), ("permuted", permuted)):
        save_sae(sae, name)
        line = f"hierarchy: {file} was made with other settings (sae); it is made anew"
        assert line in done(call, explore, f"run={name}", shards, *common)
        assert hierarchy_of("page").about.asked.sae != json.loads(ours)["about"]["asked"]["sae"]
    done(call, explore, f"run={run}", *common)
    assert file.read_bytes() == ours
    content = json.loads(ours)
    content["about"]["asked"]["shards"] = "0" * 12
    for damaged, said in ((json.dumps(content), "(shards)"), ("{}", f"{file} is not a hierarchy of this msae")):
        file.write_text(damaged)
        assert said in done(call, explore, f"run={run}", *common)
        assert file.read_bytes() == ours


def test_a_page_is_of_the_settings_that_were_asked_for(call, arms):
    run = f"run={arms}/matryoshka"
    done(call, explore, run, "tokens=1000", "limits.mcs=0.7", "out=here")
    assert "made before" in done(call, explore, run, "tokens=1000", "limits.mcs=0.7", "out=here")
    changes = {
        "limits": ["tokens=1000", "limits.mcs=0.5"],
        "tokens": ["tokens=900", "limits.mcs=0.5"],
        "seed": ["tokens=900", "limits.mcs=0.5", "seed=1"],
        "vanilla": ["tokens=900", "limits.mcs=0.5", "seed=1", f"vanilla={arms}/matryoshka"],
    }
    for name, settings in changes.items():
        assert f"made with other settings ({name}); it is made anew" in done(call, explore, run, *settings, "out=here")
    hierarchy, (core, _, _) = hierarchy_of("here"), page_of("here")
    assert (hierarchy.about.tokens, hierarchy.about.asked.limits.mcs) == (900, 0.5)
    assert core["verdict"] == hierarchy.verdict()


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("kind", ["tree", "lm"])
def test_a_gpu_finds_the_same_and_what_was_kept_is_of_every_device(kind, call, arms, run):
    of, settings = (arms / "matryoshka" if kind == "tree" else run), ["tokens=900", "limits.least=5"]
    done(call, explore, f"run={of}", *settings, "device=cpu")
    with fake_cuda():
        assert "made before with these settings" in done(call, explore, f"run={of}", *settings)
        waits.clear()
        done(call, explore, f"run={of}", *settings, "device=cuda", "out=gpu")
        there = Inputs(Explore(run=str(of), device="cuda"))
        assert there.sae.W_dec.is_cuda
        assert there.load_model().W_U.is_cuda if there.vanilla is None else there.vanilla.W_dec.is_cuda
    assert {"to cuda:0", "aten.nonzero.default", "to cpu"} <= set(waits)
    for name in ("hierarchy/hierarchy.json", "hierarchy/firings.safetensors", "report.html"):
        assert (Path("gpu") / name).read_bytes() == (of / name).read_bytes()


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run=x", "device=cuda"], "device=cuda, but PyTorch sees no GPU; give device=cpu"),
        (["run=x", "device=gpu"], "device=gpu: expected auto | cpu | cuda"),
        (["run=x", "limits.msc=0.7"], "unknown key limits.msc; did you mean limits.mcs?"),
        ([], "not set: run; give run=…"),
        (["run=x", "limits.matched=0"], "limits.matched=0: expected int ≥ 1"),
        (["run=x", "tokens=0"], "tokens=0: expected int ≥ 1 | null"),
        (["run=x"], "there is no directory x"),
    ],
)
def test_a_mistyped_key_is_one_line(arguments, said, call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said in refused(call, explore, *arguments)
    assert list(Path().iterdir()) == []


def test_the_model_can_be_named_on_the_command_line(call, lm, run):
    """Not the one that was harvested, whose tokens would be other words; nor one that is not there."""
    other = tiny_model(Path("other"), tiny_tokenizer(size=290))
    line = refused(call, explore, f"run={run}", f"language_model={other}", "tokens=300")
    assert f"the tokenizer of {other} is not the one that {shards_of(lm)} was made with; give language_model=" in line
    assert "nowhere" in refused(call, explore, f"run={run}", "language_model=./nowhere", "tokens=300")
    assert not (run / "hierarchy").exists()
    (run / "config.yaml").unlink()
    done(call, explore, f"run={run}", f"language_model={model_of(lm)}", f"shards={shards_of(lm)}", "tokens=300")
    assert not any("⟨" in row[4] for row in metadata_of(run))


def test_shards_that_do_not_fit_or_are_not_there(call, tree, lm, run):
    line = refused(call, explore, f"run={run}", f"shards={shards_of(tree)}")
    assert f"{shards_of(tree)} has d_in=20, the SAE expects 32; give shards=" in line
    assert "nothere has no manifest.json" in refused(call, explore, f"run={run}", "shards=nothere")
    line = refused(call, explore, f"run={run}", f"vanilla={tree / 'vanilla'}")
    assert "d_in=32, the SAE expects 20" in line
    assert not (run / "report.html").exists()


# What lies beside an SAE ----------------------------------------------------------------------------------------------


def test_an_sae_is_found_in_a_run_in_its_directory_and_in_an_arm(tree, lm):
    arm = tree / "matryoshka"
    for path, run, made in [(lm, lm, lm), (lm / "sae", lm, lm), (arm, arm, tree), (arm / "sae", arm, tree)]:
        opened = inputs(path)
        assert (opened.run.path, opened.out.path, opened.shards.directory) == (run, run, shards_of(made))
    assert inputs(lm, out="elsewhere").out.path == Path("elsewhere")
    assert (inputs(lm).model, inputs(tree / "vanilla").model) == (str(model_of(lm)), None)


def test_the_vanilla_arm_of_the_same_run_is_found(tree, arms):
    def vanilla(run: Path, **keys: Any) -> MatryoshkaSAE | None:
        return inputs(run, shards=shards_of(tree), **keys).vanilla

    assert torch.equal(vanilla(tree / "matryoshka").W_dec, load_sae(tree / "vanilla" / "sae").W_dec)
    assert vanilla(tree / "vanilla") is None
    opened = vanilla(tree / "matryoshka", vanilla=tree / "matryoshka")
    assert torch.equal(opened.W_dec, load_sae(tree / "matryoshka" / "sae").W_dec)
    for name, d_in, d_sae in (("wide", 20, 64), ("near", 20, 30), ("narrow", 20, 8), ("other", 8, 32)):
        sae = MatryoshkaSAE(d_in, d_sae, [d_sae], 1)
        sae.threshold.fill_(0.0)
        save_sae(sae, arms / name / "sae")
    write_arms(arms, matryoshka=None, wide=None, near=None, narrow=None, other=None, vanilla="diverged")
    assert vanilla(arms / "matryoshka").d_sae == 30  # of this width, and the nearest in latents


def test_an_arm_that_is_the_working_directory_has_its_run_beside_it(tree, monkeypatch):
    monkeypatch.chdir(tree / "matryoshka")
    for path in (".", "sae"):
        assert inputs(path).vanilla is not None
        assert inputs(path).shards.directory == shards_of(tree)


@pytest.mark.parametrize("shards", [*({"identity_hash": name} for name in ("*", "../x", "?" * 12)), {}, None, ["x"], 7])
def test_metadata_is_no_pattern(shards, tree):
    """An SAE from elsewhere says what it likes: nothing but twelve hex digits is looked for."""
    for name in (f"tree-synthetic-{'?' * 12}", "tree-x"):
        shutil.copytree(shards_of(tree), Path("shards") / name)
    silent("sae", shards=shards)
    with pytest.raises(ValueError) as error:
        inputs("sae")
    assert str(error.value) == "no shards for .; give shards=<a directory that python -m msae.harvest made>"


def test_shards_are_found_by_the_metadata_where_no_run_is(tree):
    made = shards_of(tree)
    silent("one", shards={"identity_hash": made.name.rpartition("-")[2]})
    with pytest.raises(ValueError, match="no shards for one; give shards="):
        inputs("one")
    shutil.copytree(made, Path("shards") / made.name)
    assert inputs("one").shards.directory == Path("shards") / made.name
    Path("one/config.yaml").write_text("data: {root: nowhere}")  # where the run says they are, and nowhere else
    with pytest.raises(ValueError, match="no shards for one"):
        inputs("one")
    assert inputs("one", shards=made).shards.directory == made


@pytest.mark.parametrize("content", ["", "data: null", "[1]", "data: {source: null}", "data: x", "data: {root: null}"])
def test_a_configuration_of_something_else_beside_an_sae(content, tree):
    silent("one")
    Path("one/config.yaml").write_text(content)
    opened = inputs("one", shards=shards_of(tree))
    assert (opened.model, opened.revision, opened.tokenizer) == (None, None, None)


def test_the_words_are_of_the_tokenizer_that_the_rows_were_made_with(lm, tree):
    same = shutil.copytree(model_of(lm), "same")
    assert inputs(lm).vocabulary == inputs(lm, language_model=same).vocabulary == words(tiny_tokenizer())
    assert inputs(tree / "vanilla").vocabulary is None


# Numbers of the page --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_sae", "block"), [(30, 2**24), (30, 1), (30, 100), (1, 9), (2, 9), (5, 9)])
def test_neighbours_are_those_of_all_cosines(d_sae, block):
    sae = MatryoshkaSAE(8, d_sae, [d_sae], 1, seed=1)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.1, 3, d_sae)[:, None])
        sae.W_dec[0] = -sae.W_dec[-1]
    rows = sae.W_dec.detach().double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -np.inf)
    nearest, cosines = job.neighbours(sae, block)
    np.testing.assert_array_equal(nearest, np.argsort(-cosine, axis=1)[:, : min(job.NEAREST, d_sae - 1)])
    np.testing.assert_allclose(cosines, np.take_along_axis(cosine, nearest, 1), atol=1e-6)


def small_model(kind: str, directory: Path, size: int) -> Any:
    """A random language model of width 32 whose last norm has a gain of its own, as transformers has it."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if kind == "gpt2":
        tiny_model(directory, vocab_size=size)
        model = AutoModelForCausalLM.from_pretrained(directory)
        norm = model.transformer.ln_f
        norm.bias.data = torch.randn(32, generator=torch.Generator().manual_seed(1))
    else:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=size, max_position_embeddings=64))
        norm = model.model.norm
        tiny_tokenizer().save_pretrained(directory)
    norm.weight.data = 0.2 + 2 * torch.rand(32, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(("kind", "size"), [("gpt2", 300), ("gpt2", 320), ("llama", 300)])
def test_tokens_that_a_latent_raises_and_lowers(kind, size):
    """Against the model's own last norm and head; of 320 embeddings 20 are of no token."""
    model = small_model(kind, Path("model"), size)
    bridge = load_bridge("model", tokenizer="model")
    sae = MatryoshkaSAE(32, 20, [20], 2, seed=4)
    with torch.no_grad():
        sae.W_dec.add_(0.15)  # a mean that a layer norm takes out, and an RMS norm does not
    for block in (2**26, 1000):  # all rows at once, or a few
        up, down = job.unembedded(sae, bridge, 300, block)
        expected_up, expected_down = logit_lens(model, sae.W_dec.detach(), 300)
        np.testing.assert_array_equal(up, expected_up)
        np.testing.assert_array_equal(down, expected_down)
    assert job.unembedded(MatryoshkaSAE(16, 20, [20], 2), bridge, 300) == (None, None)  # of another width


def small_hierarchy(
    parent: Sequence[int], rate: Sequence[float], prefixes: list[int], more: Sequence[tuple[int, int]] = ()
) -> Hierarchy:
    """Surviving edges as in `parent`, and candidates of which the i-th passes the first i + 1 tests alone."""
    kept = [(p, c) for c, p in enumerate(parent) if p >= 0]
    ends = np.array([*kept, *more], dtype=np.int64).reshape(-1, 2)
    beyond = np.arange(len(ends)) - len(kept)
    passed = {key: (beyond < 0) | (beyond >= i) for i, key in enumerate(LINES)}
    figures = {key: np.ones(len(ends)) for key in TESTS}
    edges = Edges(ends[:, 0], ends[:, 1], np.zeros(len(ends), dtype=np.int64), figures, passed, 50)
    funnels = {name: edges.funnel() for name in (THIS, ORDER, FIRINGS, VANILLA)}
    about: Any = None
    return Hierarchy(prefixes, levels(prefixes), np.array(rate), np.array(rate), edges, funnels, about)


def test_the_projector_has_the_forest_first_then_what_fires_most(monkeypatch):
    hierarchy = small_hierarchy([-1, -1, -1, 0, -1, -1], [0.1, 0.9, 0.2, 0.01, 0.8, 0.3], [2, 6], [(1, 5)])
    for size, latents in [(9, [0, 1, 2, 3, 4, 5]), (4, [0, 1, 3, 4]), (3, [0, 1, 3]), (2, [0, 3]), (1, [0])]:
        monkeypatch.setattr(job, "PROJECTED", size)
        assert job.projected(hierarchy).tolist() == latents


# Pictures -------------------------------------------------------------------------------------------------------------

PARENT = [-1, 0, 0, 1, -1, 4, -1, 4, -1, 8]
RATE = [0.5, 0.2, 0.3, 0.1, 0.4, 0.01, 0.9, 0.02, 0.6, 0.05]


def test_the_outline_is_depth_first_and_the_largest_tree_first():
    parent, rate = np.array(PARENT), np.array(RATE)
    whole = [(0, 0), (2, 1), (1, 1), (3, 2), (4, 0), (7, 1), (5, 1), (8, 0), (9, 1)]  # 6 has no edge
    assert pictures.outline(parent, rate, 8, 60) == whole
    assert pictures.outline(parent, rate, 2, 60) == whole[:7]
    assert pictures.outline(parent, rate, 8, 5) == whole[:5]
    assert pictures.outline(np.full(4, -1), np.ones(4), 8, 60) == []
    chain = np.arange(-1, 4999)  # deeper than Python's stack
    assert pictures.outline(chain, np.ones(5000), 1, 5000)[-1] == (4999, 4999)
    equal = pictures.outline(np.array([-1, -1, 1, 0]), np.ones(4), 8, 60)
    assert equal == [(0, 0), (3, 1), (1, 0), (2, 1)]  # of equal trees the first


def drawn(figure: Any) -> tuple[Any, list[str]]:
    """The axis and its texts, once the figure was drawn: any warning is an error."""
    figure.savefig("figure.png", dpi=40)
    assert Path("figure.png").stat().st_size > 500
    return figure.axes[0], [text.get_text() for text in figure.axes[0].texts]


def tick_labels(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_xticklabels()]


def test_the_funnel_is_drawn_as_it_is_counted():
    hierarchy = small_hierarchy(PARENT, RATE, [3, 6, 10], [(1, 5), (0, 9)])
    hierarchy.funnels[ORDER] = {stage: 2 * count for stage, count in hierarchy.funnels[ORDER].items()}
    axis, texts = drawn(pictures.funnel(hierarchy))
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.lines}
    assert lines == {name: [funnel[key] for key in LINES] for name, funnel in hierarchy.funnels.items()}
    assert [t.get_text() for t in axis.get_legend().get_texts()] == list(hierarchy.funnels)
    assert texts == ["6", "12", "6", "6"]
    assert tick_labels(axis) == [TESTS[key].name for key in LINES]
    assert len({line.get_color() for line in axis.lines}) == 4
    assert axis.get_ylim()[0] == 0


def test_edges_by_level_are_counted():
    axis, texts = drawn(pictures.by_level(small_hierarchy(PARENT, RATE, [3, 6, 10], [(1, 5)])))
    counts = [[2, 1, 0], [0, 1, 1], [0, 0, 1]]  # from the parent's level to the child's
    assert axis.images[0].get_array().tolist() == counts
    assert texts == [str(n) for row in counts for n in row]
    assert tick_labels(axis) == ["1", "2", "3"]
    assert "child" in axis.get_xlabel()


def test_the_forest_has_a_line_for_each_latent():
    hierarchy = small_hierarchy(PARENT, RATE, [3, 6, 10])
    axis, texts = drawn(pictures.forest(hierarchy, [f"word {i}" for i in range(10)]))
    lines = pictures.outline(hierarchy.parent, hierarchy.rate, 8, 60)
    assert texts == [f"{i}  word {i}  ({RATE[i]:.2%})" for i, _ in lines]
    places = [(round(text.get_position()[0] - 0.14), text.get_position()[1]) for text in axis.texts]
    assert places == [(depth, y) for y, (_, depth) in enumerate(lines)]
    assert len(axis.lines) == 6  # a line to each child
    assert [c.get_array().tolist() for c in axis.collections] == [[hierarchy.level[i]] for i, _ in lines]
    sizes = [c.get_sizes()[0] for c in axis.collections]
    assert all((sizes[a] > sizes[b]) == (RATE[i] > RATE[j]) for (a, (i, _)), (b, (j, _)) in pairwise(enumerate(lines)))
    assert drawn(pictures.forest(hierarchy, [""] * 10, roots=1, most=2))[1] == ["0  (50.00%)", "2  (30.00%)"]
    axis, texts = drawn(pictures.forest(small_hierarchy([-1] * 10, [0.0] * 10, [10]), [""] * 10))
    assert (texts, axis.get_title(loc="left")) == ([], "no edge survives")


ODD = ["$", "$x$ and $y$", "$\\frac{$", "a\nb", "\t\r\x00\x1b", "\\$", "{}%_^&#", "é ü ß", "\ufffd", "日本語", "😀"]
ODD += ["\u200b\u202e", "x" * 200]


def test_odd_labels_are_drawn_as_they_are():
    """No formula, no second line, and no warning of a letter that the font has not."""
    hierarchy = small_hierarchy([-1] + [0] * len(ODD), [0.5] * (1 + len(ODD)), [1, 1 + len(ODD)])
    axis, texts = drawn(pictures.forest(hierarchy, ["root", *ODD]))
    shown = {ODD[int(text.split()[0]) - 1]: text.split("  ", 1)[1] for text in texts if text[:2] != "0 "}
    assert shown.keys() == set(ODD)
    assert all(text.isprintable() for text in texts)
    assert all(text._preprocess_math(text.get_text())[1] is False for text in axis.texts)
    assert len(shown["x" * 200]) < 70
    assert shown["a\nb"].split("  ")[0] == "a·b"
    for label in ("$x$ and $y$", "\\$", "é ü ß"):
        assert shown[label].split("  ")[0] == label
