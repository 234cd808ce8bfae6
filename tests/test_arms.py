"""Arms: trained together as each alone, told apart by name, failing alone; inner levels that fade."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msae import train
from msae.cli.arms import describe_arms, recipes_of
from msae.cli.command import compose, plain
from msae.runs import Arm, Run
from msae.sae import MatryoshkaSAE, Objective, encode_for_training, matryoshka_loss
from msae.sae.fast import code as sparse_code
from msae.settings import decode
from msae.training.settings import Recipe, Train
from tests.commands import SHORT, TREE, one_line, only_run, same_weights, start, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
ALONE = {
    "vanilla": ["model.prefixes=[1.0]"],
    "random": ["model.sampling={kind: random, n_prefixes: 4}", "model.resort_rate=0.05", "model.lr=0.02"],
    "nabeshima": ["preset=nabeshima", "model.penalty.control=0.01"],
    "fading": ["model.fading={between: [0.2, 0.8], encoder_decay: 0.1}", "model.seed=3"],
}
ARMS = (
    "arms={vanilla: {prefixes: [1.0]}, random: {sampling: {kind: random, n_prefixes: 4}, resort_rate: 0.05, lr: 0.02}, "
    "nabeshima: {preset: nabeshima, penalty: {control: 0.01}}, "
    "fading: {fading: {between: [0.2, 0.8], encoder_decay: 0.1}, seed: 3}}"
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
    assert Run("together").arms() == [Arm(name, name, {}) for name in ALONE]
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
    wild = "{lr: 1e30, adam: {grad_clip: 1e30}, decoder: free, schedule: {warmup_steps: 0}}"
    two = f"arms={{good: {{}}, wild: {wild}}}"
    code, _, err = call(train, *TREE, *SHORT, two, "run_dir=two")
    assert code == 1
    assert "arm wild: training diverged by step" in err
    assert "Traceback" not in err
    assert call(train, *TREE, *SHORT, "run_dir=alone")[0] == 0
    same_weights(Path("alone"), Path("two/good"))
    assert [arm.error is None for arm in Run("two").arms()] == [True, False]
    assert not Path("two/wild/sae").exists()


def composed(*overrides: str) -> tuple[list[Arm], dict[str, Recipe], Train]:
    """Arms, their recipes by name, and all of the settings."""
    cfg = compose("train", overrides)
    train = decode(Train, plain(cfg))
    arms = describe_arms(train)
    return arms, recipes_of(train, arms, cfg.model), train


def test_a_grid_is_every_combination():
    arms, recipes, train = composed("arms={a: {lr: 0.1}, b: null}", "grid={k: [1, 2], prefixes: [[1.0], [0.5, 1.0]]}")
    assert [arm.name for arm in arms][:2] == ["a-k1-prefixes_1.0_", "a-k1-prefixes_0.5_1.0_"]
    assert arms[-1].arm == "b"
    assert arms[-1].settings == {"model.k": 2, "model.prefixes": [0.5, 1.0]}
    assert len(recipes) == 8
    assert recipes["a-k1-prefixes_1.0_"].lr == 0.1
    assert recipes["b-k2-prefixes_0.5_1.0_"].lr == train.model.lr
    assert recipes["b-k2-prefixes_0.5_1.0_"].prefixes == [0.5, 1.0]
    ((name, recipe),) = composed("grid={seed: [7], objective.balance: [0.5]}", "name=tree")[1].items()
    assert name == "seed7-objective.balance0.5"
    assert (recipe.seed, recipe.objective.balance) == (7, 0.5)


def test_without_arms_there_is_one_recipe():
    arms, recipes, train = composed()
    assert (arms, recipes) == ([], {"": train.model})


def test_a_preset_of_an_arm_is_beaten_by_its_own_keys():
    recipe = composed("arms={a: {preset: nabeshima, lr: 0.5}}")[1]["a"]
    assert (recipe.sparsity.name, recipe.lr, recipe.d_sae) == ("l1", 0.5, 32)


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
        ("grid={k: 3}", "grid={k: 3}: expected mapping"),
        ("grid={nothing: [1]}", "unknown key model.nothing"),
    ],
)
def test_a_mistake_in_an_arm_is_one_line_and_leaves_no_run(call, arms, said):
    code, _, err = call(train, *TREE, *SHORT, arms)
    assert code == 1
    assert said in one_line(err)
    assert not Path("runs").exists()


# Inner levels that fade -------------------------------------------------------------------------------------


def gradients(sae: MatryoshkaSAE, total: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(total, [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec])


@pytest.mark.parametrize("inner", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("kernels", ["dense", "plain"])
def test_inner_weighs_every_level_but_the_outermost(inner, kernels, monkeypatch):
    monkeypatch.setattr(sparse_code, "DENSEST", 1.0)
    generator = torch.Generator().manual_seed(0)
    sae = MatryoshkaSAE(12, 24, [4, 10, 24], 3).double()
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)

    code = encode_for_training(sae, x, kernels)
    assert isinstance(code, sparse_code.TrainingCode) == (kernels == "plain")
    loss = matryoshka_loss(sae, x, Objective(reduction="mean"), code=code, inner=inner)
    listed = Objective(reduction=[inner / 3, inner / 3, 1 / 3])
    wanted = matryoshka_loss(sae, x, listed, code=encode_for_training(sae, x))
    torch.testing.assert_close(loss.total, wanted.total)
    torch.testing.assert_close(gradients(sae, loss.total), gradients(sae, wanted.total))


def test_training_fades_and_decays_when_it_should(call):
    """Until the inner levels fade neither key changes a bit; then each of them changes the weights."""
    plain = ["tokens=2560", "checkpoint_every_steps=10", "trainer.log_every_n_steps=5", "trainer.val_check_interval=10"]

    def train_one(name: str, *settings: str) -> dict[str, torch.Tensor]:
        code, _, err = call(train, *TREE, *plain, "model.schedule.warmup_steps=2", f"run_dir={name}", *settings)
        assert code == 0, err
        checkpoint = torch.load(Run(name).last_checkpoint, weights_only=True)
        assert checkpoint["global_step"] == 20
        return {key.removeprefix("steps.0.sae."): value for key, value in checkpoint["state_dict"].items()}

    never, vanilla = train_one("never"), train_one("vanilla", "model.prefixes=[32]")
    late = train_one("late", "model.fading={between: [1.0, 1.0], encoder_decay: 5}")
    assert torch.equal(late["W_enc"], never["W_enc"])
    without_levels = train_one("without levels", "model.prefixes=[32]", "model.fading.between=[0.5,0.6]")
    assert torch.equal(without_levels["W_enc"], vanilla["W_enc"])
    fading = train_one("fading", "model.fading.between=[0.5,0.5]")
    assert not torch.equal(fading["W_dec"], never["W_dec"])
    decaying = train_one("decaying", "model.fading={between: [0.5, 0.5], encoder_decay: 5}")
    assert decaying["W_enc"].norm() < 0.9 * fading["W_enc"].norm()
    from_the_start = train_one("from the start", "model.fading.encoder_decay=5")
    assert from_the_start["W_enc"].norm() < 0.9 * decaying["W_enc"].norm()
