"""The evaluate command: the figures of training without training, of any SAE, several beside each other; mistakes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import msae.evaluation.job
from msae import evaluate, export, train
from msae.data.batches import ValBatches
from msae.data.harvest import harvest
from msae.data.shards import Shards
from msae.evaluation.evaluate import HeldOut, calibrate
from msae.evaluation.evaluate import evaluate as measure
from msae.runs import open_run
from msae.sae import MatryoshkaSAE, save_sae
from msae.sources.forest import ForestSource
from tests.commands import ENVIRONMENT, SHORT, TREE, metrics_of
from tests.fake_cuda import fake_cuda, waits
from tests.tiny_lm import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
ARMS = "arms={vanilla: {prefixes: [1.0]}, topk: {sparsity: topk, k: 2}}"
HOOKS = ("blocks.1.hook_resid_mid", "blocks.1.mlp.hook_pre", "blocks.1.hook_resid_pre")


def run_in(directory: Path, *commands: tuple[Any, ...]) -> Path:
    """Run commands in a directory, for fixtures that several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for command, *arguments in commands:
            patch.setattr(sys, "argv", [command.__name__, *arguments])
            command.main()
    return directory


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    """A run of one SAE and one of two arms, with what they were trained on."""
    of_one, of_arms = (train, *TREE, *SHORT, "run_dir=one"), (train, *TREE, *SHORT, ARMS, "run_dir=family")
    return run_in(tmp_path_factory.mktemp("synthetic"), of_one, of_arms)


@pytest.fixture(scope="module")
def text(tmp_path_factory, lm) -> Path:
    """A run on a language model, a transcoder of it, and an SAE of a hook that can be read but not replaced."""
    of_hooks = f"data.source.hook_names=[{','.join(HOOKS)}]"
    common = [argument for argument in lm if "hook_names" not in argument] + ["tokens=2000", of_hooks]
    runs = {
        "sae": [f"data.hook_name={HOOKS[2]}"],
        "transcoder": [f"data.target_hook_name={HOOKS[1]}"],
        "resid_mid": [f"data.hook_name={HOOKS[0]}"],
    }
    return run_in(
        tmp_path_factory.mktemp("text"), *((train, *common, *keys, f"run_dir={name}") for name, keys in runs.items())
    )


@pytest.fixture
def figures(done, tmp_path, monkeypatch):
    """Runs the command in a directory; the figures of each SAE, what it printed, and what it said."""

    def of(directory: Path, *arguments: str) -> tuple[dict[str, dict[str, float]], str, str]:
        monkeypatch.chdir(directory)
        out, err = done(evaluate, *arguments, f"out={tmp_path / 'out'}")
        content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        return {name: sae["figures"] for name, sae in content["saes"].items()}, out, err

    return of


def measured(run: Path) -> dict[str, float]:
    """What training measured on the held-out rows."""
    return {key: value for key, value in metrics_of(run).items() if key not in ("train/tokens", "seconds")}


# --- what training measures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["one", "one/sae", "family/vanilla"])
def test_a_run_or_an_arm_has_the_figures_that_its_training_measured(given, synthetic, figures) -> None:
    by_name, out, _ = figures(synthetic, f"sae={given}")
    ((name, of_sae),) = by_name.items()
    assert name == given.removesuffix("/sae")
    assert of_sae == measured(synthetic / name)
    assert {"val/fvu/p32", "truth/mcc"} <= of_sae.keys()
    assert f"{of_sae['val/fvu/p32']:.4g}" in out
    assert "truth/mcc_chance" in out


def test_several_are_as_each_alone_and_a_run_stands_for_its_arms(synthetic, figures) -> None:
    together, out, err = figures(synthetic, "sae=[family,one]")
    assert together == {name: measured(synthetic / name) for name in ("family/vanilla", "family/topk", "one")}
    for name, of_sae in together.items():
        assert f"{of_sae['val/fvu/p32']:.4g}" in out
        assert f"{name}\n" in err
    assert "evaluation.json" in err


def test_a_text_run_has_its_cross_entropies_and_the_model_is_loaded_once(text, figures, monkeypatch) -> None:
    loaded, load = [], msae.evaluation.job.load_bridge
    monkeypatch.setattr(msae.evaluation.job, "load_bridge", lambda *a, **k: loaded.append(a) or load(*a, **k))
    shutil.copytree(text / "sae/sae", text / "other", dirs_exist_ok=True)
    together, out, _ = figures(text, "sae=[sae,other]")
    assert together["sae"] == together["other"] == measured(text / "sae")
    assert {"val/ce/orig", "val/ce_score/p64", "val/kl_score/p64"} <= together["sae"].keys()
    assert "ce_score" in out
    assert len(loaded) == 1


@pytest.mark.parametrize("run", ["sae", "transcoder"])
def test_a_gpu_gives_the_same_figures(run, text, figures) -> None:
    """Of the language model too."""
    with fake_cuda():
        of, *_ = figures(text, f"sae={run}", "device=cuda")
    assert {"to cuda:0", "to cpu"} <= set(waits)
    assert of[run] == pytest.approx(measured(text / run), rel=1e-5)


def test_a_transcoder_finds_its_target(text, figures, refused) -> None:
    of_run, _, err = figures(text, "sae=transcoder")
    assert of_run["transcoder"] == measured(text / "transcoder")
    assert "val/ce_score/p64" in of_run["transcoder"]
    assert "note:" not in err
    (target,) = Path("shards").glob("*mlp.hook_pre-*")
    given, _, _ = figures(text, "sae=transcoder", f"target_shards={target}")
    assert given == of_run
    assert "sae is not; evaluate them one by one" in refused(evaluate, "sae=[transcoder,sae]", "ce_sequences=0")


@pytest.mark.parametrize(
    ("keys", "sequences"), [([], 4), (["language_model=null"], 0), (["ce_sequences=0"], 0), (["ce_sequences=2"], 2)]
)
def test_cross_entropies_are_of_as_many_sequences_as_asked_for(keys, sequences, text, figures) -> None:
    of_sae = figures(text, "sae=sae", *keys)[0]["sae"]
    assert ("val/ce/orig" in of_sae) == (sequences > 0)
    assert (of_sae.get("val/ce/orig") == metrics_of(text / "sae")["val/ce/orig"]) == (sequences == 4)


# --- other SAEs, other rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "to"),
    [("one", "saelens"), ("one", "saelens_training"), ("one", "dictionary_learning"), ("family/topk", "sparsify")],
)
def test_the_forms_of_others_have_the_same_figures(run, to, synthetic, figures, done, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(synthetic)
    done(export, f"sae={run}", f"to={to}", f"out={tmp_path / 'layers.1'}")
    of_form = figures(synthetic, f"sae={tmp_path / 'layers.1'}", "batch_tokens=128")[0][str(tmp_path / "layers.1")]
    assert of_form == pytest.approx(measured(synthetic / run), rel=1e-4, abs=1e-5)


def test_rows_in_batches_of_any_size(synthetic, figures) -> None:
    of_all = figures(synthetic, "sae=one", "rows=all", "batch_tokens=77")[0]["one"]
    (directory,) = Path("shards").iterdir()
    expected = measure(open_run("one").load_sae(), HeldOut(Shards(directory), batch_tokens=1000))
    assert of_all == pytest.approx(expected, rel=1e-6)
    assert of_all["val/fvu/p32"] != metrics_of("one")["val/fvu/p32"]


def test_calibrating_meets_k_on_rows_that_are_not_measured(synthetic, figures, refused, tmp_path) -> None:
    """A threshold far from these rows' is set so that k latents are active; one that is not calibrated is kept."""
    sae = open_run(synthetic / "one").load_sae()
    sae.threshold.fill_(0.9)
    save_sae(sae, tmp_path / "strict")
    name, k = str(tmp_path / "strict"), float(sae.k)
    strict = figures(synthetic, f"sae={name}")[0][name]
    assert strict["val/l0/p32"] < 0.7 * k
    calibrated, _, err = figures(synthetic, f"sae=[{name},family/topk]", "calibrate=true")
    assert calibrated[name]["val/l0/p32"] == pytest.approx(k, rel=0.1)
    assert calibrated[name]["val/l0/p32"] == pytest.approx(metrics_of("one")["val/l0/p32"], rel=0.05)
    assert "on the first 500 rows" in err
    assert calibrated["family/topk"] == measured(synthetic / "family/topk")
    assert "family/topk: thresholds kept, those of topk are not calibrated" in err


@pytest.mark.parametrize(("most", "stop"), [(10_000, 500), (200, 200)])
def test_calibration_reads_rows_before_those_that_are_measured(most, stop, synthetic) -> None:
    held_out = HeldOut(Shards(next((synthetic / "shards").iterdir())), start=500)
    sae, expected, of_all = (open_run(synthetic / "one").load_sae() for _ in range(3))
    msae.evaluation.job.set_thresholds("one", sae, held_out, most)
    calibrate(expected, ValBatches(held_out.rows, 4096, stop=stop))
    calibrate(of_all, ValBatches(held_out.rows, 4096))
    assert torch.equal(sae.threshold, expected.threshold)
    assert not torch.equal(sae.threshold, of_all.threshold)


def test_a_hook_that_differs_is_said(text, figures) -> None:
    (other,) = (text / "shards").glob("*resid_mid-*")
    of_sae, _, err = figures(text, "sae=sae", f"shards={other}")
    assert f"note: sae was trained on {HOOKS[2]}, these rows are of {HOOKS[0]}\n" in err
    assert of_sae["sae"]["val/fvu/p64"] != metrics_of("sae")["val/fvu/p64"]


@pytest.mark.parametrize(
    ("sae", "said"),
    [("resid_mid", f"{HOOKS[0]} can be read but not replaced"), ("nameless", "no run names its language model; give")],
)
def test_without_a_model_to_splice_into_there_is_a_line_and_no_cross_entropy(sae, said, text, figures) -> None:
    shutil.copytree(text / "sae/sae", text / "nameless", dirs_exist_ok=True)
    of_sae, _, err = figures(text, f"sae={sae}")
    assert f"no cross-entropy: {said}" in err
    assert "val/fvu/p64" in of_sae[sae]
    assert not [key for key in of_sae[sae] if "/ce" in key]


@pytest.mark.parametrize(
    ("trained", "used"),
    [("dense", "dense"), ("plain", "plain"), ("triton", "auto"), ("of others", "auto"), (None, "auto")],
)
def test_the_kernels_are_those_of_training_where_they_run_anywhere(trained, used) -> None:
    sae = MatryoshkaSAE(4, 8, [8], 1)
    sae.metadata = {"msae": {"training": {"kernels": trained}}} if trained else {"msae": None}
    assert msae.evaluation.job.with_its_kernels(sae).kernels == used


# --- what it leaves -----------------------------------------------------------------------------------------------


def test_nothing_is_written_unless_out_is_given(synthetic, done, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(synthetic)
    before = sorted(Path().rglob("*"))
    done(evaluate, "sae=one")
    assert sorted(Path().rglob("*")) == before
    done(evaluate, "sae=[one,family]", f"out={tmp_path / 'new' / 'out'}")
    written = tmp_path / "new" / "out"
    assert sorted(path.name for path in written.iterdir()) == ["evaluation.json", "evaluation.png"]
    assert (written / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads((written / "evaluation.json").read_text())
    assert content["shards"]["directory"] == next(Path("shards").iterdir()).name
    assert (content["rows"], content["settings"]["batch_tokens"]) == (500, 128)
    assert content["saes"]["one"]["prefixes"] == [4, 12, 32]


def test_the_picture_has_a_point_for_each_prefix_and_names_that_tell_saes_apart() -> None:
    saes = {name: MatryoshkaSAE(4, 8, [2, 8], 1) for name in ("a/x", "b/x")}
    values = {"val/fvu/p2": 0.5, "val/fvu/p8": 0.25, "val/l0/p2": 1.0, "val/l0/p8": 3.0}
    panels = msae.evaluation.job.against_l0(saes, {"a/x": values, "b/x": values | {"val/fvu/p2": float("nan")}})
    assert panels == {"FVU": {"a/x": [(1.0, *3 * (0.5,)), (3.0, *3 * (0.25,))], "b/x": [(3.0, *3 * (0.25,))]}}
    one = msae.evaluation.job.against_l0({"a/x": saes["a/x"]}, {"a/x": values | {"val/ce_score/p8": 0.9}})
    assert one["CE score"] == {"x": [(3.0, *3 * (0.9,))]}


def test_it_imports_neither_lightning_nor_transformer_lens(synthetic, monkeypatch) -> None:
    code = (
        "import sys; sys.argv[1:] = ['sae=one']\n"
        "from msae.evaluate import main\nmain()\n"
        "print({'lightning', 'transformer_lens', 'transformers', 'datasets', 'matplotlib'} & sys.modules.keys())"
    )
    monkeypatch.chdir(synthetic)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert out.stdout.splitlines()[-1] == "set()"


# --- mistakes -----------------------------------------------------------------------------------------------------

MISTAKES = {
    "": "not set: sae; give sae=…",
    "sae=[]": "sae=[] names no SAE; give sae=runs/<run>",
    "sae=nowhere": "there is no directory nowhere; see python -m msae.runs",
    "sae=shards": "no SAE in shards: looked for",
    "sae=empty": "no arm of empty has an SAE; see python -m msae.runs",
    "sae=one shards=nowhere": "nowhere has no manifest.json",
    "sae=stranger": "no shards for stranger; give shards=",
    "sae=stranger shards=SHARDS": "has d_in=20, stranger expects 5; give shards=<the directory of the hook",
    "sae=[one,stranger]": "one has d_in=20, stranger has d_in=5; evaluate them one by one",
    "sae=one shards=few": "has 1 held-out rows, expected at least 2; give shards=",
    "sae=transcoder shards=SHARDS": "a transcoder, reconstructs; give target_shards=<the directory of that hook>",
    "sae=transcoder shards=SHARDS target_shards=SHARDS": "has d_in=20, transcoder expects 7; give target_shards=",
    "sae=one target_shards=SHARDS": "is for a transcoder, which one is not; drop it",
    "sae=one language_model=gpt2": "has no rows of a language model; drop language_model",
    "sae=one rows=most": "rows=most: expected half | all",
    "sae=one rows=all calibrate=true": "calibrate=true uses the first half of the rows, so rows=all would measure it",
    "sae=one out=one/config.yaml": "out=one/config.yaml is a file; give out=<directory>",
    "sae=one device=cuda": "device=cuda, but PyTorch sees no GPU; give device=cpu",
    "sae=one raws=all": "unknown key raws; did you mean rows?",
}


@pytest.fixture(scope="module")
def mistaken(synthetic) -> Path:
    """Beside the runs: SAEs of other widths, a run without an SAE, shards with a single held-out row."""
    with torch.no_grad():
        for name, d_in, d_out in (("stranger", 5, None), ("transcoder", 20, 7)):
            sae = MatryoshkaSAE(d_in, 8, [8], 1, d_out=d_out)
            sae.threshold.fill_(0.1)
            save_sae(sae, synthetic / name)
    (synthetic / "empty").mkdir()
    (synthetic / "empty/arms.json").write_text('{"arms": [{"name": "a", "arm": "a", "settings": {}, "error": "x"}]}')
    source = ForestSource(rows=64, val_rows=1, chunk_rows=64)
    harvest(source, synthetic / "harvested", show=False)["synthetic"].directory.rename(synthetic / "few")
    return synthetic


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line(arguments, mistaken, refused, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(mistaken)
    shards = next(path for path in Path("shards").iterdir())
    assert MISTAKES[arguments] in refused(evaluate, *arguments.replace("SHARDS", str(shards)).split())
    assert not Path("out").exists()


def test_an_sae_without_a_threshold_is_one_line_and_calibrating_sets_it(
    synthetic, refused, figures, done, monkeypatch, tmp_path
) -> None:
    """As SAELens saves it at the start of a training."""
    monkeypatch.chdir(synthetic)
    name = str(tmp_path / "begun")
    done(export, "sae=one", "to=saelens_training", f"out={name}")
    weights, config = Path(name, "sae_weights.safetensors"), Path(name, "cfg.json")
    tensors = load_file(weights)
    save_file(tensors | {"topk_threshold": torch.tensor(0.0)}, weights)
    content = json.loads(config.read_text())
    del content["metadata"]["msae"]["prefix_thresholds"]
    config.write_text(json.dumps(content))
    assert f"{name} has no threshold yet; give calibrate=true" in refused(evaluate, f"sae={name}")
    calibrated = figures(synthetic, f"sae={name}", "calibrate=true")[0][name]
    assert calibrated["val/l0/p32"] == pytest.approx(metrics_of("one")["val/l0/p32"], rel=0.05)


def test_a_language_model_that_was_not_harvested_is_one_line(text, refused, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(text)
    other = tiny_model(tmp_path / "other", seed=1)
    said = f"{other} is not the language model that shards/"
    assert said in refused(evaluate, "sae=sae", f"language_model={other}")
    missing = refused(evaluate, "sae=sae", f"language_model={tmp_path / 'gone'}")
    assert f"there is no directory {tmp_path / 'gone'}; set language_model=" in missing
    model = open_run("sae").setting("data.source.model")
    assert "can be read but not replaced" in refused(evaluate, "sae=resid_mid", f"language_model={model}")


def test_a_copy_of_the_model_is_the_one_that_was_harvested(text, figures, tmp_path) -> None:
    copy = shutil.copytree(open_run(text / "sae").setting("data.source.model"), tmp_path / "copy")
    assert figures(text, "sae=sae", f"language_model={copy}")[0]["sae"] == measured(text / "sae")
