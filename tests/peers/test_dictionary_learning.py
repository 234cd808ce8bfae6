"""Loss, gradients and training of dictionary_learning 0.1.0, update by update."""

import pytest
import torch
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

from msae.sae import geometric_median
from tests.published import (
    BATCH,
    D_IN,
    D_SAE,
    STEPS,
    K,
    assert_close,
    assert_same_loss,
    assert_same_training,
    batches,
    each_dtype,
    loss_of,
    preset,
    randomise,
    rows,
    share,
    statistics,
    train,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")
FRACTIONS = [8 / 48, 12 / 48, 28 / 48]
WEIGHED = [0.2, 0.5, 0.3]


def their_trainer(dtype: torch.dtype, **changed) -> MatryoshkaBatchTopKTrainer:
    """Theirs, with their defaults but for the warm-up."""
    settings = {"group_fractions": FRACTIONS, "warmup_steps": 0} | changed
    trainer = MatryoshkaBatchTopKTrainer(STEPS, D_IN, D_SAE, K, 0, "none", device="cpu", **settings)
    assert trainer.group_sizes == [8, 12, 28]
    trainer.ae.to(dtype)
    return trainer


def in_the_mean(group_weights: list[float] | None):
    """They average over the groups what they have weighed."""
    return "mean_twice" if group_weights is None else [w / len(group_weights) for w in group_weights]


@each_dtype
@pytest.mark.parametrize("group_weights", [None, WEIGHED], ids=["default", "weighed"])
@pytest.mark.parametrize("dead", ["none", "few", "some", "all"])
def test_loss_and_gradients(dead, group_weights, dtype):
    module = preset("dictionary_learning", dtype, objective={"reduction": in_the_mean(group_weights)})
    trainer = their_trainer(dtype, group_weights=group_weights)
    randomise(module.sae)
    module.sae.b_enc.data -= 1  # so that some latents are silent
    share(module.sae, trainer.ae)
    x = rows(dtype=dtype)
    silent = (loss_of(module, x).code.dense() == 0).all(0)
    if dead == "all":  # they count the batch before they ask who is dead
        trainer.dead_feature_threshold = 0
        silent[:] = True
    else:
        silent &= silent.cumsum(0) <= {"none": 0, "few": 3, "some": 99}[dead]
        trainer.num_tokens_since_fired[silent] = trainer.dead_feature_threshold
    assert {"none": silent.sum() == 0, "few": silent.sum() == 3, "some": silent.sum() > 8}.get(dead, True)
    loss = loss_of(module, x, silent)
    their_loss = trainer.loss(x, step=0)
    assert trainer.dead_features == silent.sum()
    assert (float(loss.aux) > 0) == (dead != "none")
    assert_same_loss(loss, module.sae, their_loss, trainer.ae)


def test_the_geometric_median_and_the_learning_rate():
    x = rows(500)
    theirs = MatryoshkaBatchTopKTrainer.geometric_median(x)
    assert (geometric_median(x) - theirs).norm() <= 1e-12 * theirs.norm()
    recipe = preset("dictionary_learning").step().recipe
    assert recipe.learning_rate == pytest.approx(their_trainer(torch.float32).lr, rel=1e-12)


def test_both_start_alike():
    """The same weights from the same seed, and the same defaults of training."""
    module = preset("dictionary_learning", torch.float32)
    recipe = module.step().recipe
    torch.manual_seed(recipe.seed)
    trainer = MatryoshkaBatchTopKTrainer(9999, D_IN, D_SAE, K, 0, "none", FRACTIONS, device="cpu")
    assert_close(weights(module.sae), weights(trainer.ae), 1e-6)
    assert tuple(recipe.adam.betas) == trainer.optimizer.defaults["betas"]
    assert recipe.schedule.warmup_steps == trainer.warmup_steps
    assert recipe.dead.after_tokens == trainer.dead_feature_threshold
    assert recipe.objective.aux.coefficient == trainer.auxk_alpha
    assert recipe.threshold_rate == pytest.approx(1 - trainer.threshold_beta)


TRAINING = {
    "the preset": {},
    "weights of groups": {"group_weights": WEIGHED},
    "decay": {"decay_start": 15},
    "normalised": {"normalise": "unit_mean_square"},
    "warm-up and decay": {"warmup_steps": 5, "decay_start": 15},
    "latents revive": {"lr": 0.02},
}


@each_dtype
@pytest.mark.parametrize("case", TRAINING)
def test_training_by_their_trainer(case, dtype):
    changed = {"normalise": "none", "lr": 1e-3} | TRAINING[case]
    normalise, dead_after = changed.pop("normalise"), 3 * BATCH
    trainer = their_trainer(dtype, **changed)
    trainer.dead_feature_threshold = dead_after
    data = batches(dtype=dtype)
    decay_start = changed.get("decay_start", STEPS) / STEPS
    module = preset(
        "dictionary_learning",
        dtype,
        normalise=normalise,
        objective={"reduction": in_the_mean(changed.get("group_weights"))},
        dead={"after_tokens": dead_after},
        lr=changed["lr"],
        schedule={"warmup_steps": trainer.warmup_steps, "decay_start": decay_start},
    )
    module.step().start_from(statistics(data), first_batch=data[0])
    scale = module.sae.scale.to(dtype)
    module.sae.b_enc.data[::3] = -4 * scale  # seldom positive, and then too small to be selected
    share(module.sae, trainer.ae)
    trainer.ae.b_dec.data.zero_()  # they set it at their first update
    start, theirs, aux, dead, revived = weights(trainer.ae), [], [], torch.zeros(D_SAE, dtype=torch.bool), False
    for step, x in enumerate(data):
        loss = trainer.update(step, x * scale)
        theirs.append((torch.tensor(loss, dtype=torch.float64), weights(trainer.ae)))
        aux.append(float(trainer.pre_norm_auxk_loss) > 0)
        revived |= bool((dead & (trainer.num_tokens_since_fired == 0)).any())
        dead = trainer.num_tokens_since_fired >= dead_after
    assert 0 < sum(aux) < STEPS, "AuxK must be on in some steps"
    assert revived == (case == "latents revive")
    record = train(module, data)
    assert [a > 0 for a in record.aux] == aux
    # not 1e-9 in float64: they divide by the norm + 1e-6 before they project the gradient
    assert_same_training(record, theirs, start, {torch.float32: 1e-5, torch.float64: 1e-6}[dtype])
