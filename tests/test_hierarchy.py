"""The commands `hierarchy` and `report` from a run to a page, what they find by themselves, and what they refuse."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, open_dict
from scipy.sparse import csr_array
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msae import export, report, train
from msae.config import compose
from msae.data.shards import Shards
from msae.hierarchy import __main__ as hierarchy
from msae.hierarchy import job, pictures
from msae.hierarchy.edges import Edges
from msae.hierarchy.extract import FIRINGS, ORDER, THIS, VANILLA, Hierarchy, load
from msae.hierarchy.firings import Firings, collect
from msae.hierarchy.limits import TESTS
from msae.interop import load as load_sae
from msae.sae import MatryoshkaSAE, save_sae
from tests.test_cli import ENVIRONMENT, call, elsewhere, one_line
from tests.test_page import unpacked
from tests.tiny_lm import sentences, tiny_model, tiny_tokenizer

__all__ = ["call", "elsewhere"]  # fixtures
MODEL = "language_model"  # the key that names the language model
LEVELS = ["hierarchy/forest", "hierarchy/funnel", "hierarchy/levels"]


def trained(root: Path, *arguments: str) -> Path:
    """`root`/run as training leaves it, with its shards in `root`/shards; without checkpoints."""
    quick = ["checkpoint_every_steps=10_000", "trainer.log_every_n_steps=100", "trainer.val_check_interval=10_000"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(
            sys, "argv", ["train", *arguments, *quick, f"data.root={root / 'shards'}", f"run_dir={root / 'run'}"]
        )
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
def lm(tmp_path_factory) -> Path:
    """A run on a tiny language model, whose embedding has more rows than its tokenizer has tokens, as many have."""
    root = tmp_path_factory.mktemp("lm")
    (root / "text.txt").write_text("\n".join(sentences(300)))
    model = tiny_model(root / "model")
    return trained(
        root,
        *("+experiment=gpt2_l8", f"data.source.model={model}", f"data.source.text={root / 'text.txt'}"),
        *("data.source.hook_names=[blocks.1.hook_resid_pre]", "data.source.context=32", "data.source.tokens=3000"),
        *("data.source.chunk_tokens=1024", "data.source.val_fraction=0.2", "data.batch_tokens=128", "tokens=15_000"),
        *("model.d_sae=64", "model.k=4", "model.warmup_steps=5", "model.lr=3e-3", "evaluation.ce_sequences=4"),
    )


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
    return run.parent / "model"


def config(run: Path | str, **keys: Any) -> DictConfig:
    cfg = compose("hierarchy", [f"run={run}"])
    with open_dict(cfg):
        cfg.update(keys)
    return cfg


def inputs(run: Path | str, **keys: Any) -> job.Inputs:
    return job.Inputs(config(run, **keys))


def refused(call, command, *arguments: str) -> str:
    """The one line that a command says to a mistake, with exit code 1."""
    code, _, err = call(command, *arguments)
    assert code == 1, err
    return one_line(err)


# The commands, from a run to what is looked at -------------------------------------------------------------------


def test_the_hierarchy_of_a_synthetic_tree(call, arms):
    code, _, err = call(hierarchy, f"run={arms}/matryoshka")
    assert code == 0, err
    directory = arms / "matryoshka" / "hierarchy"
    found = load(directory / "hierarchy.json")
    assert list(found.funnels) == [THIS, ORDER, FIRINGS, VANILLA]
    assert found.edges.survives.sum() >= 2
    assert found.about["tokens"] == 4000
    assert found.truth["edge_precision"] > 0.5
    for name in ("funnel", "levels", "forest"):
        picture = (directory / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
    assert found.verdict() in err
    kept = found.edges.survives
    share = found.edges.holes[kept].sum() / (found.rate[found.edges.child[kept]] * 4000).sum()
    said = re.search(r"holes: on ([\d.]+)% of a surviving child's tokens its parent is silent", err)
    assert said
    assert float(said[1]) / 100 == pytest.approx(share, abs=1e-3)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in err.splitlines() if line.startswith("│")]
    table = {row[0]: row[1:] for row in rows}
    for stage, test in TESTS.items():
        if stage in found.funnels[THIS]:
            counts = [f"{funnel[stage]:,}" for funnel in found.funnels.values()]
            assert table[test.name] == [test.line.format(**found.about["limits"]), *counts]

    sae, latents = load_sae(arms / "matryoshka"), 32
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert sorted(events.Tags()["images"]) == LEVELS
    for name, funnel in found.funnels.items():
        scalars = events.Scalars(f"funnel/{name.replace(' ', '_')}")
        assert [(e.step, e.value) for e in scalars] == list(enumerate(funnel.values()))
        assert events.Scalars(f"edges/{name.replace(' ', '_')}")[0].value == list(funnel.values())[-1]
    children = found.edges.child[found.edges.survives]
    by_level = [(e.step, e.value) for e in events.Scalars("edges/by_level_of_child")]
    assert by_level == [(i + 1, (found.level[children] == i).sum()) for i in range(3)]
    verdict = events.Tensors("hierarchy/verdict/text_summary")[0].tensor_proto.string_val[0].decode()
    assert verdict == found.verdict()
    projector = directory / "tensorboard" / "00000" / "decoder"
    header, *lines = (projector / "metadata.tsv").read_text().splitlines()
    assert header.split("\t") == ["latent", "level", "parent", "rate", "fires on"]
    columns = list(zip(*(line.split("\t") for line in lines), strict=True))
    assert columns[0] == tuple(map(str, range(latents)))
    assert columns[1] == tuple(str(level + 1) for level in found.level)
    assert columns[2] == tuple(map(str, found.parent))
    assert all(label.startswith("feature ") or not label for label in columns[4])
    rows = np.loadtxt(projector / "tensors.tsv")
    np.testing.assert_allclose(rows, sae.W_dec.detach(), atol=1e-5)
    assert "decoder" in (directory / "tensorboard" / "projector_config.pbtxt").read_text()


def test_the_vanilla_arm_has_the_funnel_that_it_has_by_itself(call, arms):
    assert call(hierarchy, f"run={arms}/matryoshka", "tokens=2000")[0] == 0
    assert call(hierarchy, f"run={arms}/vanilla/sae", "tokens=2000")[0] == 0  # the directory of an SAE
    beside, alone = (load(arms / name / "hierarchy" / "hierarchy.json") for name in ("matryoshka", "vanilla"))
    assert list(alone.funnels) == [THIS, FIRINGS]  # one prefix: no order, and no vanilla SAE beside itself
    assert beside.funnels[VANILLA] == alone.funnels[THIS]
    assert beside.funnels[THIS] != alone.funnels[THIS]
    assert alone.prefixes == [32]
    assert (alone.level == 0).all()


def test_running_again_replaces(call, arms):
    directory = arms / "matryoshka" / "hierarchy"
    assert call(hierarchy, f"run={arms}/matryoshka")[0] == 0
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    code, out, err = call(hierarchy, f"run={arms}/matryoshka", "tokens=1500", "limits.mcs=0.99", "seed=3")
    assert code == 0, err
    found = load(directory / "hierarchy.json")
    assert (found.about["tokens"], found.about["limits"]["mcs"]) == (1500, 0.99)
    after = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] == after[name]] == []
    assert len(list((directory / "tensorboard").glob("events*"))) == 1
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("funnel/this_SAE")] == list(found.funnels[THIS].values())
    assert "warning" not in out + err


def page_of(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    parts = unpacked(file)
    blocks = sorted((name for name in parts if name.startswith("block-")), key=lambda name: int(name[6:]))
    return parts["core"], [latent for block in blocks for latent in parts[block]], parts


def test_the_page_of_a_synthetic_tree_shows_what_the_file_says(call, tree, arms):
    code, out, err = call(report, f"run={arms}/matryoshka", "tokens=3000", "limits.floor=0.3")  # no hierarchy.json yet
    assert code == 0, out + err
    directory = arms / "matryoshka"
    found = load(directory / "hierarchy" / "hierarchy.json")
    assert found.verdict() in err
    core, latents, parts = page_of(directory / "report.html")
    assert core["verdict"] == found.verdict()
    assert core["funnelColumns"] == list(found.funnels)
    assert core["funnel"][-1][1] == [list(funnel.values())[-1] for funnel in found.funnels.values()]
    assert core["funnel"][0][0] == "coverage"
    assert core["parent"] == found.parent.tolist()
    assert core["level"] == (found.level + 1).tolist()
    assert core["rate"] == found.rate.tolist()
    assert core["candidates"] == len(found.edges.parent)
    assert core["joined"] is False
    assert parts["vocabulary"] == [*(f"feature {i}" for i in range(20)), "row"]
    facts = dict(core["facts"])
    assert facts["tokens"] == "3,000"
    assert facts["edge precision"] == f"{found.truth['edge_precision']:.3f}"
    sae, shards = load_sae(directory), Shards(shards_of(tree))
    firings = collect(sae, shards, 3000, 0.3)
    assert firings.matrix.nnz < collect(sae, shards, 3000).matrix.nnz
    assert [sum(latent["histogram"]) for latent in latents] == firings.counts().tolist()
    child = int(np.flatnonzero(found.parent >= 0)[0])
    (edge,) = [e for e in latents[child]["edges"] if e[1] == child and e[2]]
    assert edge[0] == found.parent[child]
    assert all(mark in (None, 1) for mark in edge[4])
    own = core["label"][child]
    top = latents[child]["contexts"][0]
    assert top["group"] == "top"
    assert own in [parts["vocabulary"][token] for token in top["tokens"]]  # its feature is active on its strongest row

    assert call(report, f"run={directory}")[0] == 0  # from the file, with the tokens that it says
    again, same, _ = page_of(directory / "report.html")
    assert again == core
    assert [(latent["edges"], latent["nearest"]) for latent in same] == [(e["edges"], e["nearest"]) for e in latents]
    assert [sum(latent["histogram"]) for latent in same] == firings.counts().tolist()
    second = (directory / "report.html").read_bytes()
    assert call(report, f"run={directory}")[0] == 0
    assert (directory / "report.html").read_bytes() == second


def test_a_page_does_not_say_none(call, tree):
    """Of an SAE whose file names no model."""
    silent(Path("silent"))
    code, out, err = call(report, "run=silent", f"shards={shards_of(tree)}", "tokens=300")
    assert code == 0, out + err
    core, _, _ = page_of(Path("silent/report.html"))
    assert "None" not in dict(core["facts"]).values()
    assert core["title"] == "synthetic · 12 latents"


def test_both_commands_on_a_language_model(call, lm, run):
    """In a process of its own, as a user types it, and the page of what it has left; the words are the model's."""
    loose = ["limits.mcs=0.1", "limits.coverage=0.4", "limits.least=5", "limits.z=-1e9", "limits.gain=-1"]
    command = [sys.executable, "-m", "msae.hierarchy", f"run={run}", *loose]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    code, out, err = call(report, f"run={run}")
    assert code == 0, out + err
    found = load(run / "hierarchy" / "hierarchy.json")
    core, latents, parts = page_of(run / "report.html")
    tokenizer = tiny_tokenizer()
    assert parts["vocabulary"] == job.words(tokenizer)
    assert core["joined"] is True
    assert core["verdict"] == found.verdict()
    facts = dict(core["facts"])
    assert facts["hook"] == "blocks.1.hook_resid_pre"
    assert "tokens shown as" not in facts
    assert facts["tokens"] == f"{found.about['tokens']:,}"
    alive = [i for i, rate in enumerate(found.rate) if rate > 0]
    assert len(alive) > 10
    for latent in alive:
        assert core["label"][latent]
        contexts = latents[latent]["contexts"]
        assert contexts[0]["group"] == "top"
        text = "".join(parts["vocabulary"][token] for token in contexts[0]["tokens"])
        assert " " in text
    metadata = (run / "hierarchy" / "tensorboard" / "00000" / "decoder" / "metadata.tsv").read_text().splitlines()
    assert [line.split("\t")[4].replace("\\$", "$") for line in metadata[1:]] == [
        pictures.plain(label).replace("\\$", "$") for label in core["label"]
    ]
    promoted = np.array([latent["promoted"] for latent in latents])
    suppressed = np.array([latent["suppressed"] for latent in latents])
    sae = load_sae(run)
    for shown, wanted in zip((promoted, suppressed), logit_lens(model_of(lm), sae), strict=True):
        np.testing.assert_array_equal(shown, wanted)
    holes = [c for latent in latents for c in latent["contexts"] if "holes" in c["group"]]
    assert holes
    assert all(c["parent"][c["peak"]] == 0 < c["acts"][c["peak"]] for c in holes)


def logit_lens(directory: Path, sae: MatryoshkaSAE) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that the model's own last norm and unembedding raise and lower most on every decoder row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory)
    return tops(model, sae.W_dec.detach(), len(AutoTokenizer.from_pretrained(directory).get_vocab()))


@torch.no_grad()
def tops(model: Any, rows: torch.Tensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    logits = model.lm_head(norm(1000 * rows) - norm(torch.zeros_like(rows)))[:, :size]  # a norm knows no scale
    order = logits.argsort(dim=1, descending=True).numpy()
    return order[:, : job.PROMOTED], order[:, : -job.PROMOTED - 1 : -1]


def test_a_page_without_a_model_shows_numbers(call, lm, run):
    (run / "config.yaml").unlink()
    code, out, err = call(report, f"run={run}", f"shards={shards_of(lm)}", "tokens=600")
    assert code == 0, out + err
    core, latents, parts = page_of(run / "report.html")
    assert dict(core["facts"])["tokens shown as"] == "numbers: no model was given"
    assert parts["vocabulary"][7] == "⟨7⟩"
    assert all(latent["promoted"] is None for latent in latents)


# SAEs in other forms, odd ones, and pages of another ------------------------------------------------------------


@pytest.mark.parametrize("to", ["dictionary_learning", "saelens"])
def test_an_sae_in_the_form_of_another_library(to, call, tree, arms):
    source = arms / "matryoshka"
    assert call(export, f"sae={source}", f"to={to}", "out=exported")[0] == 0
    shards = f"shards={shards_of(tree)}"
    assert call(hierarchy, f"run={source}", shards, "tokens=2000")[0] == 0
    code, out, err = call(report, "run=exported", shards, "tokens=2000")
    assert code == 0, out + err
    there, here = (load(Path(of) / "hierarchy" / "hierarchy.json") for of in ("exported", source))
    assert there.funnels[THIS] == here.funnels[THIS]
    assert there.prefixes == here.prefixes
    assert VANILLA not in there.funnels  # no arm stands beside it
    np.testing.assert_array_equal(there.parent, here.parent)
    assert Path("exported/report.html").exists()
    code, _, err = call(hierarchy, "run=exported", shards, "tokens=2000", f"vanilla={arms / 'vanilla'}", "out=more")
    assert code == 0, err
    assert load(Path("more/hierarchy/hierarchy.json")).funnels[VANILLA] == here.funnels[VANILLA]
    assert Path("more/hierarchy/funnel.png").exists()
    assert list(Path("more/hierarchy/tensorboard").glob("events*"))


def silent(directory: Path, width: int = 12, **settings: Any) -> Path:
    sae = MatryoshkaSAE(20, width, settings.pop("prefixes", [4, width]), 2, seed=3)
    sae.metadata = settings
    with torch.no_grad():
        sae.threshold.fill_(0.0)
        sae.b_enc.fill_(-1000.0)
    save_sae(sae, directory)
    return directory


@pytest.mark.parametrize("prefixes", [[4, 12], [12]])
def test_an_sae_that_never_fires_has_a_page_and_pictures(prefixes, call, tree):
    silent(Path("silent"), prefixes=prefixes)
    code, out, err = call(hierarchy, "run=silent", f"shards={shards_of(tree)}", "tokens=500")
    assert code == 0, out + err
    assert "Nothing is found" in err
    found = load(Path("silent/hierarchy/hierarchy.json"))
    assert len(found.edges.parent) == 0
    assert (found.rate == 0).all()
    assert (found.parent == -1).all()
    for name in ("funnel", "levels", "forest"):
        assert Path(f"silent/hierarchy/{name}.png").stat().st_size > 3000
    code, out, err = call(report, "run=silent", f"shards={shards_of(tree)}")
    assert code == 0, out + err
    core, latents, _ = page_of(Path("silent/report.html"))
    assert dict(core["facts"])["latents"] == "12, 0 fire"
    assert all(latent["contexts"] == [] and sum(latent["histogram"]) == 0 for latent in latents)


def test_no_edge_survives_and_there_is_a_page(call, arms):
    code, out, err = call(report, f"run={arms}/matryoshka", "tokens=1500", "limits.z=1e9")
    assert code == 0, out + err
    assert "Nothing is found" in err
    assert "holes:" not in err
    found = load(arms / "matryoshka" / "hierarchy" / "hierarchy.json")
    assert len(found.edges.parent) > 5
    assert not found.edges.survives.any()
    core, latents, _ = page_of(arms / "matryoshka" / "report.html")
    assert set(core["parent"]) == {-1}
    assert sum(len(latent["edges"]) for latent in latents) == 2 * len(found.edges.parent)


def test_one_latent_alone_has_a_page(call, tree):
    sae = MatryoshkaSAE(20, 1, [1], 1)
    sae.threshold.fill_(0.0)
    save_sae(sae, "one")
    code, out, err = call(report, "run=one", f"shards={shards_of(tree)}", "tokens=500")
    assert code == 0, out + err


def another(directory: Path, to: Path, change: str) -> None:
    """An SAE that is not the one of `directory`, at `to`."""
    sae = load_sae(directory)
    if change == "prefixes":
        other = MatryoshkaSAE(20, 32, [16, 32], sae.k, seed=5)
        other.threshold.fill_(0.1)
        save_sae(other, to)
    elif change == "weights":
        with torch.no_grad():
            sae.permute(torch.arange(31, -1, -1))
        save_sae(sae, to)


@pytest.mark.parametrize("change", ["prefixes", "weights"])
def test_a_hierarchy_of_another_sae_is_refused(change, call, tree, arms):
    """Of other prefixes, or of the same shape and trained on the same shards, as two seeds are."""
    assert call(hierarchy, f"run={arms}/matryoshka", "tokens=1000", "out=page")[0] == 0
    another(arms / "matryoshka", Path("other"), change)
    line = refused(call, report, "run=other", f"shards={shards_of(tree)}", "out=page")
    assert "page/hierarchy/hierarchy.json is of another SAE" in line
    assert "run python -m msae.hierarchy run=other" in line
    assert not Path("page/report.html").exists()


def test_a_hierarchy_of_other_shards_is_refused(call, arms):
    assert call(hierarchy, f"run={arms}/matryoshka", "tokens=1000")[0] == 0
    file = arms / "matryoshka" / "hierarchy" / "hierarchy.json"
    content = json.loads(file.read_text())
    content["about"]["identity_hash"] = "0" * 12
    file.write_text(json.dumps(content))
    assert "of another SAE or of other shards" in refused(call, report, f"run={arms}/matryoshka")
    file.write_text("{}")
    assert f"{file} is not a hierarchy of this msae" in refused(call, report, f"run={arms}/matryoshka")


def test_a_page_is_of_the_limits_that_were_asked_for(call, arms):
    """A hierarchy that was made before is used, and said to be; with other limits it is refused."""
    run = f"run={arms}/matryoshka"
    code, *said = call(hierarchy, run, "tokens=1000", "limits.mcs=0.7", "out=here")
    assert code == 0
    assert f"python -m msae.report {run} out=here" in str(said)
    assert "was made with other limits" in refused(call, report, run, "limits.mcs=0.5", "out=here")
    assert not Path("here/report.html").exists()
    for limits in ([], ["limits.mcs=0.7"]):
        code, *said = call(report, run, *limits, "out=here")
        assert code == 0
        assert "hierarchy.json, made before" in str(said)


# Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [hierarchy, report], ids=["hierarchy", "report"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run=x", "limit.mcs=0.7"], "unknown key limit; did you mean limits?"),
        (["run=x", "limits.msc=0.7"], "unknown key limits.msc; did you mean limits.mcs?"),
        (["runn=x"], "unknown key runn; did you mean run?"),
        (["run=x", "shard=y"], "unknown key shard; did you mean shards?"),
        ([], "not set: run; give run=…"),
        (["run=x", "limits.mcs=high"], "limits.mcs is 'high', expected float"),
        (["run=x", "tokens=many"], "tokens is 'many', expected int | None"),
        (["run=x"], "no SAE in x"),
    ],
)
def test_a_mistyped_key_is_one_line(command, arguments, said, call):
    assert said in refused(call, command, *arguments)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("setting", ["tokens=0", "tokens=-5", "limits.matched=0"])
def test_an_impossible_number_is_one_line(setting, call, arms):
    assert setting.partition("=")[0] in refused(call, hierarchy, f"run={arms}/matryoshka", setting)


def test_the_model_can_be_named_on_the_command_line(call, lm, run):
    """Not the one that was harvested, whose tokens would be other words; nor one that is not there."""
    other = tiny_model(Path("other"), tiny_tokenizer(size=290))
    line = refused(call, hierarchy, f"run={run}", f"{MODEL}={other}", "tokens=300")
    assert f"the tokenizer of {other} is not the one that {shards_of(lm)} was made with" in line
    assert f"give {MODEL}=" in line
    assert not (run / "hierarchy").exists()
    assert "nowhere" in refused(call, hierarchy, f"run={run}", f"{MODEL}=./nowhere", "tokens=300")
    (run / "config.yaml").unlink()
    code, _, err = call(hierarchy, f"run={run}", f"{MODEL}={model_of(lm)}", f"shards={shards_of(lm)}", "tokens=300")
    assert code == 0, err
    metadata = (run / "hierarchy" / "tensorboard" / "00000" / "decoder" / "metadata.tsv").read_text()
    assert "⟨" not in metadata


def test_shards_that_do_not_fit_or_are_not_there(call, tree, lm, run):
    line = refused(call, hierarchy, f"run={run}", f"shards={shards_of(tree)}")
    assert f"shards in {shards_of(tree)} have d_in=20, the SAE expects 32; give shards=" in line
    assert "nothere has no manifest.json" in refused(call, report, f"run={run}", "shards=nothere")
    line = refused(call, hierarchy, f"run={run}", f"vanilla={tree / 'vanilla'}")
    assert "d_in=32, the SAE expects 20" in line
    assert not (run / "report.html").exists()


# What is found beside an SAE -------------------------------------------------------------------------------------


def test_an_sae_is_found_in_a_run_in_its_directory_and_in_an_arm(tree, lm):
    for given, run, width in [
        (lm, lm, 64),
        (lm / "sae", lm, 64),
        (tree / "vanilla", tree / "vanilla", 32),
        (tree / "matryoshka" / "sae", tree / "matryoshka", 32),
    ]:
        found = inputs(given)
        assert (found.run, found.sae.d_sae, found.out) == (run, width, run)
        assert found.shards.directory == shards_of(lm if width == 64 else tree)
    assert inputs(lm, out="elsewhere").out == Path("elsewhere")
    assert (inputs(lm).model, inputs(tree / "vanilla").model) == (str(model_of(lm)), None)


def test_a_run_with_several_saes_is_refused_with_their_names(tree, tmp_path):
    with pytest.raises(ValueError) as error:
        inputs(tree)
    assert str(error.value) == f"{tree} has several SAEs; give run={tree}/<one of matryoshka, vanilla>"
    run = Path(shutil.copytree(tree, tmp_path / "copy"))
    described = json.loads((run / "arms.json").read_text())
    described[0]["error"] = "diverged"
    described.append({"name": "../copy/vanilla", "error": None})
    described.append({"name": "never", "error": None})
    (run / "arms.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"<one of vanilla>$"):
        inputs(run)
    for broken in ("[", "{}", '{"a": 1}', "[1]", "null", '[{"name": "a"}]'):
        (run / "arms.json").write_text(broken)
        with pytest.raises(ValueError, match=r"[^\n]+") as error:
            inputs(run)
        assert "\n" not in str(error.value)


def test_the_vanilla_arm_of_the_same_run_is_found(tree, tmp_path):
    found = inputs(tree / "matryoshka").vanilla(None)
    assert found.prefixes == [32]
    assert torch.equal(found.W_dec, load_sae(tree / "vanilla").W_dec)
    assert inputs(tree / "vanilla").vanilla(None) is None
    assert torch.equal(
        inputs(tree / "matryoshka").vanilla(str(tree / "matryoshka")).W_dec, load_sae(tree / "matryoshka").W_dec
    )
    run = Path(shutil.copytree(tree, tmp_path / "more"))
    (run / "config.yaml").write_text((tree / "config.yaml").read_text())
    for name, d_in, d_sae, prefixes in [
        ("wide", 20, 64, [64]),
        ("near", 20, 30, [30]),
        ("narrow", 20, 8, [8]),
        ("other", 8, 32, [32]),
    ]:
        sae = MatryoshkaSAE(d_in, d_sae, prefixes, 1)
        sae.threshold.fill_(0.0)
        save_sae(sae, run / name / "sae")
    names = ["matryoshka", "wide", "near", "narrow", "other"]
    (run / "arms.json").write_text(json.dumps([{"name": name, "error": None} for name in names]))
    assert inputs(run / "matryoshka").vanilla(None).d_sae == 30  # of this width, and the nearest in latents


def test_an_arm_that_is_the_working_directory_has_its_run_beside_it(tree, monkeypatch):
    monkeypatch.chdir(tree / "matryoshka")
    for given in (".", "sae"):
        found = inputs(given)
        assert found.vanilla(None) is not None
        assert found.shards.directory == shards_of(tree)


@pytest.mark.parametrize(
    "shards", [{"identity_hash": "*"}, {"identity_hash": "../x"}, {"identity_hash": "?" * 12}, {}, None, "x", ["x"], 7]
)
def test_metadata_is_no_pattern(shards, tree):
    """An SAE from elsewhere says what it likes: nothing but twelve hex digits is looked for."""
    made = shards_of(tree)
    for name in (f"tree-synthetic-{'?' * 12}", "tree-x"):
        shutil.copytree(made, Path("shards") / name)
    silent(Path("sae"), shards=shards)
    with pytest.raises(ValueError) as error:
        inputs("sae")
    assert str(error.value) == "no shards for .; give shards=<a directory that python -m msae.harvest made>"


def test_shards_are_found_by_the_metadata_where_no_run_is(tree):
    made = shards_of(tree)
    name = made.name.rpartition("-")[2]
    silent(Path("one"), shards={"identity_hash": name})
    with pytest.raises(ValueError, match="no shards for one; give shards="):
        inputs("one")
    shutil.copytree(made, Path("shards") / made.name)
    assert inputs("one").shards.directory == Path("shards") / made.name
    Path("one/config.yaml").write_text("data: {root: nowhere}")  # where the run says they are, and nowhere else
    with pytest.raises(ValueError, match="no shards for one"):
        inputs("one")
    assert inputs("one", shards=str(made)).shards.directory == made


@pytest.mark.parametrize("content", ["", "data: null", "[1]", "data: {source: null}", "data: x", "data: {root: null}"])
def test_a_configuration_of_something_else_beside_an_sae(content, tree):
    silent(Path("one"))
    Path("one/config.yaml").write_text(content)
    found = inputs("one", shards=str(shards_of(tree)))
    assert (found.model, found.revision, found.tokenizer) == (None, None, None)


def test_the_words_are_of_the_tokenizer_that_the_rows_were_made_with(lm, tree):
    assert inputs(lm).vocabulary() == job.words(tiny_tokenizer())
    assert inputs(tree / "vanilla").vocabulary() is None
    other = tiny_model(Path("other"), tiny_tokenizer(size=290))
    with pytest.raises(ValueError, match=r"^the tokenizer of other is not the one that [^\n]*; give [^\n]+$"):
        inputs(lm, **{MODEL: str(other)}).vocabulary()
    same = shutil.copytree(model_of(lm), "same")
    assert inputs(lm, **{MODEL: str(same)}).vocabulary() == job.words(tiny_tokenizer())


# Numbers of the page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2**24, 1, 100])
def test_neighbours_are_those_of_all_cosines(block):
    sae = MatryoshkaSAE(8, 30, [30], 2, seed=1)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.1, 3, 30)[:, None])
        sae.W_dec[4] = -sae.W_dec[9]
    rows = sae.W_dec.detach().double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -np.inf)
    nearest, cosines = job.neighbours(sae, block)
    assert nearest.shape == (30, job.NEAREST)
    np.testing.assert_array_equal(nearest, np.argsort(-cosine, axis=1)[:, : job.NEAREST])
    np.testing.assert_allclose(cosines, np.take_along_axis(cosine, nearest, 1), atol=1e-6)


@pytest.mark.parametrize("d_sae", [1, 2, 5])
def test_few_latents_have_few_neighbours(d_sae):
    nearest, cosines = job.neighbours(MatryoshkaSAE(8, d_sae, [d_sae], 1))
    assert nearest.shape == cosines.shape == (d_sae, d_sae - 1)
    assert all(sorted([i, *row]) == list(range(d_sae)) for i, row in enumerate(nearest.tolist()))


def small(kind: str, directory: Path, size: int = 300) -> Any:
    """A random language model of width 32 whose last norm has a gain of its own, and what transformers makes of it."""
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


def given(directory: Path, sae: MatryoshkaSAE) -> Any:
    return SimpleNamespace(model=str(directory), revision=None, tokenizer=str(directory), sae=sae)


@pytest.mark.parametrize(("kind", "size"), [("gpt2", 300), ("gpt2", 320), ("llama", 300)])
def test_tokens_that_a_latent_raises_and_lowers(kind, size):
    """Against the model's own last norm and head; of 320 embeddings 20 are of no token."""
    model = small(kind, Path("model"), size)
    sae = MatryoshkaSAE(32, 20, [20], 2, seed=4)
    with torch.no_grad():
        sae.W_dec.add_(0.15)  # a mean that a layer norm takes out, and an RMS norm does not
    up, down = job.unembedded(given(Path("model"), sae))
    wanted_up, wanted_down = tops(model, sae.W_dec.detach(), 300)
    np.testing.assert_array_equal(up, wanted_up)
    np.testing.assert_array_equal(down, wanted_down)
    again = job.unembedded(given(Path("model"), sae), block=1000)  # a few rows at a time
    np.testing.assert_array_equal(again[0], up)
    np.testing.assert_array_equal(again[1], down)


def test_rows_of_another_width_raise_no_tokens(lm):
    assert job.unembedded(given(model_of(lm), MatryoshkaSAE(16, 20, [20], 2))) is None


def small_hierarchy(
    parent: list[int], rate: list[float], prefixes: list[int], extra: list[tuple[int, int]] = ()
) -> Hierarchy:
    """Surviving edges as in `parent`, and candidates of which the i-th passes the first i + 1 tests alone."""
    kept = [(p, c) for c, p in enumerate(parent) if p >= 0]
    ends = np.array([*kept, *extra], dtype=np.int64).reshape(-1, 2)
    beyond = np.arange(len(ends)) - len(kept)
    lines = [key for key in TESTS if TESTS[key].line]
    passed = {key: (beyond < 0) | (beyond >= place) for place, key in enumerate(lines)}
    figures = {key: np.ones(len(ends)) for key in TESTS}
    edges = Edges(ends[:, 0], ends[:, 1], np.zeros(len(ends), dtype=np.int64), figures, passed, 50)
    level = np.searchsorted(prefixes, np.arange(len(parent)), side="right")
    funnels = {name: edges.funnel() for name in (THIS, ORDER, FIRINGS, VANILLA)}
    return Hierarchy(prefixes, level, np.array(rate), np.array(rate), edges, funnels, {}, {})


def test_the_projector_has_the_forest_first_then_what_fires_most(monkeypatch):
    found = small_hierarchy([-1, -1, -1, 0, -1, -1], [0.1, 0.9, 0.2, 0.01, 0.8, 0.3], [2, 6], [(1, 5)])
    assert job.projected(found).tolist() == [0, 1, 2, 3, 4, 5]
    for size, wanted in [(4, [0, 1, 3, 4]), (3, [0, 1, 3]), (2, [0, 3]), (1, [0])]:
        monkeypatch.setattr(job, "PROJECTED", size)
        assert job.projected(found).tolist() == wanted


# Pictures --------------------------------------------------------------------------------------------------------

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


def drawn(figure: Any) -> Any:
    """The figure, once it was drawn: any warning is an error."""
    figure.savefig("figure.png", dpi=40)
    assert Path("figure.png").stat().st_size > 500
    return figure.axes[0]


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_the_funnel_is_drawn_as_it_is_counted():
    found = small_hierarchy(PARENT, RATE, [3, 6, 10], [(1, 5), (0, 9)])
    found.funnels[ORDER] = {stage: 2 * count for stage, count in found.funnels[ORDER].items()}
    axis = drawn(pictures.funnel(found))
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.lines}
    assert lines == {name: [n for stage, n in f.items() if stage != "pairs"] for name, f in found.funnels.items()}
    assert [t.get_text() for t in axis.get_legend().get_texts()] == list(found.funnels)
    assert texts(axis) == ["6", "12", "6", "6"]
    stages = [TESTS[stage].name for stage in found.funnels[THIS] if stage != "pairs"]
    assert [t.get_text() for t in axis.get_xticklabels()] == stages
    assert len({line.get_color() for line in axis.lines}) == 4
    assert axis.get_ylim()[0] == 0


def test_edges_by_level_are_counted():
    found = small_hierarchy(PARENT, RATE, [3, 6, 10], [(1, 5)])
    axis = drawn(pictures.by_level(found))
    counts = np.zeros((3, 3), dtype=int)
    for child, parent in enumerate(PARENT):
        if parent >= 0:
            counts[found.level[parent], found.level[child]] += 1
    np.testing.assert_array_equal(axis.images[0].get_array(), counts)
    assert texts(axis) == [str(n) for n in counts.flatten()]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "2", "3"]
    assert "child" in axis.get_xlabel()


def test_the_forest_has_a_line_for_each_latent():
    found = small_hierarchy(PARENT, RATE, [3, 6, 10])
    axis = drawn(pictures.forest(found, [f"word {i}" for i in range(10)]))
    lines = pictures.outline(found.parent, found.rate, 8, 60)
    assert texts(axis) == [f"{i}  word {i}  ({RATE[i]:.2%})" for i, _ in lines]
    assert [(round(t.get_position()[0] - 0.14), t.get_position()[1]) for t in axis.texts] == [
        (depth, y) for y, (_, depth) in enumerate(lines)
    ]
    assert len(axis.lines) == 6  # a line to each child
    assert [c.get_array().tolist() for c in axis.collections] == [[found.level[i]] for i, _ in lines]
    sizes = [c.get_sizes()[0] for c in axis.collections]
    assert all((sizes[a] > sizes[b]) == (RATE[i] > RATE[j]) for (a, (i, _)), (b, (j, _)) in pairwise(enumerate(lines)))
    few = drawn(pictures.forest(found, [""] * 10, roots=1, most=2))
    assert texts(few) == ["0  (50.00%)", "2  (30.00%)"]


@pytest.mark.parametrize("prefixes", [[10], [3, 10]])
@pytest.mark.parametrize("parent", [[-1] * 10, PARENT], ids=["no edges", "edges"])
def test_every_picture_is_drawn_without_edges_and_with_one_level(parent, prefixes):
    found = small_hierarchy(parent, [0.0] * 10 if parent[1] < 0 else RATE, prefixes)
    for figure in (pictures.funnel(found), pictures.by_level(found), pictures.forest(found, [""] * 10)):
        axis = drawn(figure)
    assert (axis.get_title(loc="left") == "no edge survives") == (parent[1] < 0)


ODD = [
    "$",
    "$x$",
    "$\\frac{$",
    "a\nb",
    "\t\r\x00\x1b",
    "\\$",
    "{}%_^&#",
    "é ü ß",
    "\ufffd",
    "日本語",
    "😀",
    "\u200b\u202e",
    "x" * 200,
]


def test_odd_labels_are_drawn_as_they_are():
    """No formula, no second line, and no warning of a letter that the font has not."""
    parent = np.full(len(ODD) + 1, 0)
    parent[0] = -1
    found = small_hierarchy(parent.tolist(), [0.5] * len(parent), [1, len(parent)])
    axis = drawn(pictures.forest(found, ["root", *ODD]))
    shown = {int(text.split()[0]): text for text in texts(axis)}
    assert all(text.isprintable() for text in shown.values())
    assert len(shown[len(ODD)]) < 70
    assert shown[1 + ODD.index("a\nb")].split("  ")[1] == "a·b"
    assert shown[1 + ODD.index("é ü ß")].split("  ")[1] == "é ü ß"


@pytest.mark.parametrize("label", ["$", "$x$ and $y$", "\\$", "cost $5"])
def test_dollars_are_no_formula(label):
    found = small_hierarchy([-1, 0], [0.5, 0.2], [1, 2])
    axis = drawn(pictures.forest(found, ["root", label]))
    text = next(text for text in axis.texts if text.get_text().startswith("1 "))
    shown, formula = text._preprocess_math(text.get_text())
    assert formula is False
    assert label in shown


def test_firings_are_not_changed_by_what_looks_at_them(tree):
    """Examples sort columns of a copy; the page's histogram reads the same firings after them."""
    shards, sae = Shards(shards_of(tree)), load_sae(tree / "matryoshka")
    firings = collect(sae, shards, 500, 0.02)
    before = firings.matrix.toarray()
    job.Examples(firings, job.text_of(shards, firings, None), np.full(32, -1)).contexts(0)
    np.testing.assert_array_equal(firings.matrix.toarray(), before)
    assert isinstance(firings, Firings)
    assert isinstance(firings.matrix, csr_array)
