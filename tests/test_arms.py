"""Arms: trained together as each alone, told apart by name, failing alone; inner levels that fade."""

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
from tests.commands import SHORT, TREE, metrics_of, only_run, same_weights, start, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
OF_ARM = {
    "vanilla": {"prefixes": "[1.0]"},
    "random": {"sampling": "{kind: random, n_prefixes: 4}", "resort_rate": "0.05", "lr": "0.02"},
    "nabeshima": {"preset": "nabeshima", "penalty": "{control: 0.01}"},
    "fading": {"fading": "{between: [0.2, 0.8], encoder_decay: 0.1}", "seed": "3"},
}
ARMS = "arms={" + ", ".join(f"{name}: {{{', '.join(map(': '.join, of.items()))}}}" for name, of in OF_ARM.items()) + "}"


def scalars(run: Path) -> dict[str, list[str]]:
    """What TensorBoard shows, NaN too, without what depends on the clock."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"]) - {"train/tokens_per_s", "final/seconds", "epoch"}
    return {tag: [repr(event.value) for event in events.Scalars(tag)] for tag in tags}


def same_metrics(together: str | Path, alone: str | Path) -> None:
    assert metrics_of(together) == {key: value for key, value in metrics_of(alone).items() if key != "seconds"}


def test_arms_are_trained_as_each_one_alone_and_leave_what_it_leaves(done):
    out, _ = done(train, *TREE, *SHORT, ARMS, "run_dir=together")
    for name, settings in OF_ARM.items():
        keys = [f"{'' if key == 'preset' else 'model.'}{key}={value}" for key, value in settings.items()]
        done(train, *TREE, *SHORT, *keys, f"run_dir={name}")
        alone, together = Path(name), Path("together") / name
        same_weights(alone, together)
        same_metrics(together, alone)
        assert scalars(together) == scalars(alone)
        assert (together / "truth.png").stat().st_size > 1000
        assert name[:5] in out
    assert Run("together").arms() == [Arm(name, name, {}) for name in OF_ARM]
    assert metrics_of("together")["seconds"] > 0
    images = EventAccumulator("together/tensorboard").Reload().Tags()["images"]
    assert sorted(images) == ["activations", "truth"]
    assert all((Path("together") / f"{picture}.png").stat().st_size > 1000 for picture in images)
    assert sorted(p.name for p in Path("together/checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_family_is_trained_from_one_harvest_of_a_language_model(done, lm):
    done(train, *lm, *SHORT, "grid={k: [2, 4], seed: [0, 1]}", "run_dir=family")
    assert len(list(Path("shards").iterdir())) == 1
    done(train, *lm, *SHORT, "model.k=4", "model.seed=1", "run_dir=alone")
    same_weights(Path("alone"), Path("family/k4-seed1"))
    same_metrics("family/k4-seed1", "alone")
    assert any("ce_score" in key for key in metrics_of("alone"))


def test_killed_arms_go_on_and_end_with_the_same_weights(done):
    arguments = [*TREE, *SHORT, "tokens=40_000", "trainer.val_check_interval=200", ARMS]
    done(train, *arguments, "run_dir=whole")
    with start(*arguments) as process:
        wait_for("runs/*/checkpoints/last.ckpt", process)
        process.kill()
    run = only_run()
    assert not (run / "arms.json").exists(), "the run was not killed in time"
    done(train, *arguments, "ckpt_path=last")
    for name in OF_ARM:
        same_weights(Path("whole") / name, run / name)


def test_an_arm_that_diverges_is_left_and_the_others_go_on(done, call):
    two = "arms={good: {}, wild: {lr: 1e30, adam: {grad_clip: 1e30}, decoder: free, schedule: {warmup_steps: 0}}}"
    code, _, err = call(train, *TREE, *SHORT, two, "run_dir=two")
    assert code == 1
    assert "arm wild: training diverged by step" in err
    assert "Traceback" not in err
    done(train, *TREE, *SHORT, "run_dir=alone")
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
def test_a_mistake_in_an_arm_is_one_line_and_leaves_no_run(refused, arms, said):
    assert said in refused(train, *TREE, *SHORT, arms)
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


def test_training_fades_and_decays_when_it_should(done):
    """Until the inner levels fade neither key changes a bit; then each of them changes the weights."""

    def trained(name: str, *settings: str) -> MatryoshkaSAE:
        done(train, *TREE, *SHORT, "model.schedule.warmup_steps=2", f"run_dir={name}", *settings)
        return Run(name).load_sae()

    never, vanilla = trained("never"), trained("vanilla", "model.prefixes=[32]")
    late = trained("late", "model.fading={between: [1.0, 1.0], encoder_decay: 5}")
    assert torch.equal(late.W_enc, never.W_enc)
    without_levels = trained("without levels", "model.prefixes=[32]", "model.fading.between=[0.5,0.6]")
    assert torch.equal(without_levels.W_enc, vanilla.W_enc)
    fading = trained("fading", "model.fading.between=[0.5,0.5]")
    assert not torch.equal(fading.W_dec, never.W_dec)
    decaying = trained("decaying", "model.fading={between: [0.5, 0.5], encoder_decay: 5}")
    assert decaying.W_enc.norm() < 0.9 * fading.W_enc.norm()
    from_the_start = trained("from the start", "model.fading.encoder_decay=5")
    assert from_the_start.W_enc.norm() < 0.9 * decaying.W_enc.norm()
