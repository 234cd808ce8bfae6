"""Arms: trained together as each alone, told apart by name, failing alone; inner levels that fade."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msae import train
from msae.config import arm_models, compose, describe_arms
from msae.sae import MatryoshkaSAE, Objective, encode_for_training, matryoshka_loss
from msae.sae import sparse as sparse_module
from msae.sae.sparse import sparse_encode
from msae.training.module import MatryoshkaTraining
from tests.test_cli import SHORT, TREE, call, elsewhere, lm, one_line, only_run, same_weights, start, wait_for

__all__ = ["call", "elsewhere", "lm"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
ALONE = {
    "vanilla": ["model.prefixes=[1.0]"],
    "random": ["model.prefix_sampling=random", "model.n_prefixes=4", "model.resort_rate=0.05", "model.lr=0.02"],
    "nabeshima": ["preset=nabeshima", "model.sparsity_control=0.01"],
    "fading": ["model.inner_decay=[0.2,0.8]", "model.encoder_decay=0.1", "model.seed=3"],
}
ARMS = (
    "arms={vanilla: {prefixes: [1.0]}, random: {prefix_sampling: random, n_prefixes: 4, resort_rate: 0.05, lr: 0.02}, "
    "nabeshima: {preset: nabeshima, sparsity_control: 0.01}, "
    "fading: {inner_decay: [0.2, 0.8], encoder_decay: 0.1, seed: 3}}"
)


def test_arms_are_trained_as_each_one_alone_and_leave_what_it_leaves(call):
    code, out, err = call(train, *TREE, *SHORT, ARMS, "run_dir=together")
    assert code == 0, err
    for name, settings in ALONE.items():
        code, _, err = call(train, *TREE, *SHORT, *settings, f"run_dir={name}")
        assert code == 0, err
        same_weights(Path(name), Path("together") / name)
        together = json.loads((Path("together") / name / "metrics.json").read_text())
        alone = json.loads((Path(name) / "metrics.json").read_text())
        assert together == {key: value for key, value in alone.items() if key != "seconds"}
        assert (Path("together") / name / "truth.png").stat().st_size > 1000
        scalars = {}
        for run in (Path(name), Path("together") / name):
            events = EventAccumulator(str(run / "tensorboard")).Reload()
            tags = set(events.Tags()["scalars"]) - {"train/tokens_per_s", "final/seconds", "epoch"}
            scalars[run] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in sorted(tags)}
        one, other = scalars.values()
        assert one.keys() == other.keys()
        assert {tag: [v for _, v in one[tag]] for tag in one} == {tag: [v for _, v in other[tag]] for tag in other}
        assert name[:5] in out
    assert json.loads(Path("together/arms.json").read_text()) == [
        {"name": name, "arm": name, "settings": {}, "error": None} for name in ALONE
    ]
    assert json.loads(Path("together/metrics.json").read_text())["seconds"] > 0
    images = EventAccumulator("together/tensorboard").Reload().Tags()["images"]
    assert sorted(images) == ["activations", "truth"]
    for picture in ("truth.png", "activations.png"):
        assert (Path("together") / picture).stat().st_size > 1000
    assert sorted(p.name for p in Path("together/checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_family_is_trained_from_one_harvest_of_a_language_model(call, lm):
    code, _, err = call(train, *lm, *SHORT, "grid={k: [2, 4], seed: [0, 1]}", "run_dir=family")
    assert code == 0, err
    assert len(list(Path("shards").iterdir())) == 1
    assert call(train, *lm, *SHORT, "model.k=4", "model.seed=1", "run_dir=alone")[0] == 0
    same_weights(Path("alone"), Path("family/k4-seed1"))
    together = json.loads(Path("family/k4-seed1/metrics.json").read_text())
    alone = json.loads(Path("alone/metrics.json").read_text())
    assert {key for key in together if "ce_score" in key} == {key for key in alone if "ce_score" in key} != set()
    assert together == {key: value for key, value in alone.items() if key != "seconds"}


def test_killed_arms_go_on_and_end_with_the_same_weights(call):
    arguments = [*TREE, *SHORT, "tokens=40_000", "trainer.val_check_interval=200", ARMS]
    assert call(train, *arguments, "run_dir=whole")[0] == 0
    with start(*arguments) as process:
        wait_for("runs/*/checkpoints/last.ckpt", process)
        process.kill()
    run = only_run()
    assert not (run / "arms.json").exists(), "the run was not killed in time"
    code, _, err = call(train, *arguments, "ckpt_path=last")
    assert code == 0, err
    for name in ALONE:
        same_weights(Path("whole") / name, run / name)


def test_an_arm_that_diverges_is_left_and_the_others_go_on(call):
    two = "arms={good: {}, wild: {lr: 1e30, grad_clip: 1e30, decoder: free, warmup_steps: 0}}"
    code, _, err = call(train, *TREE, *SHORT, two, "run_dir=two")
    assert code == 1
    assert "arm wild: training diverged by step" in err
    assert "Traceback" not in err
    assert call(train, *TREE, *SHORT, "run_dir=alone")[0] == 0
    same_weights(Path("alone"), Path("two/good"))
    described = json.loads(Path("two/arms.json").read_text())
    assert [arm["error"] is None for arm in described] == [True, False]
    assert not Path("two/wild/sae").exists()


def test_a_grid_is_every_combination():
    cfg = compose("train", ["arms={a: {lr: 0.1}, b: null}", "grid={k: [1, 2], prefixes: [[1.0], [0.5, 1.0]]}"])
    described = describe_arms(cfg)
    assert [arm["name"] for arm in described][:2] == ["a-k1-prefixes_1.0_", "a-k1-prefixes_0.5_1.0_"]
    assert described[-1]["arm"] == "b"
    assert described[-1]["settings"] == {"model.k": 2, "model.prefixes": [0.5, 1.0]}
    models = arm_models(cfg)
    assert len(models) == 8
    assert models["a-k1-prefixes_1.0_"].lr == 0.1
    assert models["b-k2-prefixes_0.5_1.0_"].lr == cfg.model.lr
    assert OmegaConf.to_container(models["b-k2-prefixes_0.5_1.0_"])["prefixes"] == [0.5, 1.0]
    (alone,) = arm_models(compose("train", ["grid={seed: [7]}", "name=tree"])).items()
    assert alone[0] == "seed7"
    assert alone[1].seed == 7


def test_without_arms_there_is_one_model():
    cfg = compose("train", [])
    assert describe_arms(cfg) == []
    assert arm_models(cfg) == {"": cfg.model}


def test_a_preset_of_an_arm_is_beaten_by_its_own_keys():
    cfg = compose("train", ["arms={a: {preset: nabeshima, lr: 0.5}}"])
    model = arm_models(cfg)["a"]
    assert (model.sparsity, model.lr, model.d_sae) == ("l1", 0.5, 32)


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ("arms={a: {prefixs: [1.0]}}", "did you mean model.prefixes"),
        ("arms={a: {preset: nabeshma}}", "arms.a.preset=nabeshma is none of bussmann"),
        ("arms={a: {prefixes: [0.3, 1.0]}}", "arm a: model.prefixes=[0.3, 1.0] of d_sae=32 are not whole widths"),
        ("arms={sae: {}}", "arms and grid name sae ambiguously"),
        ("arms={a b: {}, a/b: {}}", "arms and grid name a_b"),
        ("grid={name: []}", "ambiguously"),
        ("arms={config.yaml: {}}", "arms and grid name config.yaml ambiguously"),
        ("grid={k: 3}", "grid is"),
        ("grid={nothing: [1]}", "unknown key model.nothing"),
    ],
)
def test_a_mistake_in_an_arm_is_one_line_and_leaves_no_run(call, arms, said):
    code, _, err = call(train, *TREE, *SHORT, arms)
    assert code == 1
    assert said in one_line(err)
    assert not Path("runs").exists()


# Inner levels that fade -------------------------------------------------------------------------------------


def test_the_weight_of_inner_levels_over_a_run():
    module = MatryoshkaTraining(8, 16, [4, 16], 2, inner_end=0.01, inner_decay=[0.25, 0.75])
    assert [module.fading.weight(step, 100) for step in (0, 24, 25)] == [1, 1, 1]
    assert module.fading.weight(50, 100) == pytest.approx(0.1)
    assert [module.fading.weight(step, 100) for step in (75, 99)] == [0, 0]
    linear = MatryoshkaTraining(8, 16, [4, 16], 2, inner_end=0.0, inner_decay=[0.5, 1.0])
    assert linear.fading.weight(75, 100) == pytest.approx(0.5)
    assert MatryoshkaTraining(8, 16, [4, 16], 2).fading.weight(99, 100) == 1


@pytest.mark.parametrize("decay", [[0.6, 0.4], [0.5], [-0.1, 0.5], [0.5, 1.5]])
def test_impossible_shares_are_one_line(decay):
    with pytest.raises(ValueError, match=r"model\.inner_decay=") as error:
        MatryoshkaTraining(8, 16, [4, 16], 2, inner_decay=decay)
    assert "\n" not in str(error.value)


def gradients(sae: MatryoshkaSAE, total: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(
        zip(
            ("W_enc", "b_enc", "W_dec", "b_dec"),
            torch.autograd.grad(total, [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]),
            strict=True,
        )
    )


@pytest.mark.parametrize("inner", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("kernels", ["dense", "plain"])
def test_inner_weighs_every_level_but_the_outermost(inner, kernels, monkeypatch):
    monkeypatch.setattr(sparse_module, "DENSEST", 1.0)
    generator = torch.Generator().manual_seed(0)
    sae = MatryoshkaSAE(12, 24, [4, 10, 24], 3).double()
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)

    def code():
        return encode_for_training(sae, x) if kernels == "dense" else sparse_encode(sae, x, kernels)

    loss = matryoshka_loss(sae, x, Objective(reduction="mean"), code=code(), inner=inner)
    listed = Objective(reduction=[inner / 3, inner / 3, 1 / 3])
    wanted = matryoshka_loss(sae, x, listed, code=encode_for_training(sae, x))
    torch.testing.assert_close(loss.total, wanted.total)
    found, expected = gradients(sae, loss.total), gradients(sae, wanted.total)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_training_fades_and_decays_as_it_is_told(call):
    """Until the inner levels fade neither key changes a bit; then each of them changes the weights."""
    plain = ["tokens=2560", "checkpoint_every_steps=10", "trainer.log_every_n_steps=5", "trainer.val_check_interval=10"]

    def train_one(name: str, *settings: str) -> dict[str, torch.Tensor]:
        code, _, err = call(train, *TREE, *plain, "model.warmup_steps=2", f"run_dir={name}", *settings)
        assert code == 0, err
        checkpoint = torch.load(Path(name) / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 20
        return {key.removeprefix("sae."): value for key, value in checkpoint["state_dict"].items()}

    never = train_one("never")
    for name, settings in {
        "late": ["model.inner_decay=[1.0,1.0]", "model.encoder_decay=5"],
        "without levels": ["model.prefixes=[32]", "model.inner_decay=[0.5,0.6]"],
    }.items():
        reference = never if name == "late" else train_one("vanilla", "model.prefixes=[32]")
        found = train_one(name, *settings)
        assert torch.equal(found["W_enc"], reference["W_enc"]), name
    fading = train_one("fading", "model.inner_decay=[0.5,0.5]")
    assert not torch.equal(fading["W_dec"], never["W_dec"])
    decaying = train_one("decaying", "model.inner_decay=[0.5,0.5]", "model.encoder_decay=5")
    assert decaying["W_enc"].norm() < 0.9 * fading["W_enc"].norm()
    from_the_start = train_one("from the start", "model.encoder_decay=5")
    assert from_the_start["W_enc"].norm() < 0.9 * decaying["W_enc"].norm()
