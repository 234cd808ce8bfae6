"""Loss, gradients and training of dictionary_learning 0.1.0, update by update."""

import pytest
import torch
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

from msae.sae import geometric_median, matryoshka_loss
from tests.peers.common import (
    BATCH,
    D_IN,
    D_SAE,
    TOLERANCE,
    K,
    assert_close,
    assert_same_training,
    batches,
    gradients,
    preset,
    randomise,
    rows,
    share,
    train_ours,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")
FRACTIONS = [8 / 48, 12 / 48, 28 / 48]
STEPS = 25
USERS = [0.2, 0.5, 0.3]


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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group_weights", [None, USERS], ids=["default", "weighed"])
@pytest.mark.parametrize("dead", ["none", "few", "some", "all"])
def test_loss_and_gradients(dead, group_weights, dtype):
    module = preset("dictionary_learning", dtype, reduction=in_the_mean(group_weights))
    trainer = their_trainer(dtype, group_weights=group_weights)
    randomise(module.sae)
    module.sae.b_enc.data -= 1  # so that some latents are silent
    share(module.sae, trainer.ae)
    x = rows(dtype=dtype)
    silent = (matryoshka_loss(module.sae, x, module.objective).acts == 0).all(0)
    if dead == "all":  # they count the batch before they ask who is dead
        trainer.dead_feature_threshold = 0
        silent[:] = True
    elif dead in ("few", "some"):
        long_ago = silent & (silent.cumsum(0) <= (3 if dead == "few" else 99))
        trainer.num_tokens_since_fired[long_ago] = trainer.dead_feature_threshold
        silent = long_ago
    else:
        silent[:] = False
    assert {"none": silent.sum() == 0, "few": silent.sum() == 3, "some": silent.sum() > 8}.get(dead, True)
    loss = matryoshka_loss(module.sae, x, module.objective, silent)
    their_loss = trainer.loss(x, step=0)
    assert trainer.dead_features == silent.sum()
    assert (float(loss.aux) > 0) == (dead != "none")
    assert_close(gradients(loss.total, module.sae), gradients(their_loss, trainer.ae), TOLERANCE[dtype])


def test_the_geometric_median_and_the_learning_rate():
    x = rows(500, dtype=torch.float64)
    theirs = MatryoshkaBatchTopKTrainer.geometric_median(x)
    assert (geometric_median(x) - theirs).norm() <= 1e-12 * theirs.norm()
    assert preset("dictionary_learning").lr == pytest.approx(their_trainer(torch.float32).lr, rel=1e-12)


def test_both_start_alike():
    """The same weights from the same seed, and the same defaults of training."""
    module = preset("dictionary_learning")
    torch.manual_seed(module.seed)
    trainer = MatryoshkaBatchTopKTrainer(9999, D_IN, D_SAE, K, 0, "none", FRACTIONS, device="cpu")
    assert_close(weights(module.sae), weights(trainer.ae), 1e-6)
    assert module.betas == trainer.optimizer.defaults["betas"]
    assert module.schedule.warmup_steps == trainer.warmup_steps
    assert module.dead_after_tokens == trainer.dead_feature_threshold
    assert module.objective.aux.coefficient == trainer.auxk_alpha
    assert module.threshold_rate == pytest.approx(1 - trainer.threshold_beta)


TRAINING = {
    "the preset": {},
    "weights of groups": {"group_weights": USERS},
    "decay": {"decay_start": 15},
    "normalised": {"normalise": "unit_mean_square"},
    "warm-up and decay": {"warmup_steps": 5, "decay_start": 15},
    "latents revive": {"lr": 0.02},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", TRAINING)
def test_training_by_their_trainer(case, dtype, monkeypatch):
    changed = dict(TRAINING[case])
    group_weights, normalise = changed.pop("group_weights", None), changed.pop("normalise", "none")
    lr, dead_after = changed.pop("lr", 1e-3), 3 * BATCH
    trainer = their_trainer(dtype, group_weights=group_weights, lr=lr, **changed)
    trainer.dead_feature_threshold = dead_after
    data = batches(STEPS, dtype)
    module = preset(
        "dictionary_learning",
        dtype,
        normalise=normalise,
        reduction=in_the_mean(group_weights),
        dead_after_tokens=dead_after,
        lr=lr,
        warmup_steps=trainer.warmup_steps,
        decay_start=changed.get("decay_start", STEPS) / STEPS,
    )
    every = torch.cat(data).double()
    module.start_from((every.mean(0), float(every.square().sum(1).mean())), first_batch=data[0])
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
    if not 0 < sum(aux) < STEPS or revived != (case == "latents revive"):
        pytest.fail("AuxK must be on in some steps, and latents revive where they should only")
    record = train_ours(module, data, monkeypatch)
    assert [a > 0 for a in record.aux] == aux
    # not 1e-9 in float64: they divide by the norm + 1e-6 before they project the gradient
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    assert_same_training(record, theirs, start, tolerance, 100 * tolerance)
