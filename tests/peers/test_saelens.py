"""Loss, gradients and training of SAELens 6.54, step by step."""

import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from msae.sae import Loss
from msae.training.module import MatryoshkaTraining
from tests.published import (
    BATCH,
    D_IN,
    D_SAE,
    PREFIXES,
    STEPS,
    TOLERANCE,
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


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def matryoshka(dtype: torch.dtype, **changed) -> MatryoshkaBatchTopKTrainingSAE:
    """Theirs, with their defaults."""
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "matryoshka_widths": list(PREFIXES), "k": K}
    return MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**sizes | changed, dtype=name_of(dtype)))


def mask(kind: str) -> torch.Tensor:
    """Dead latents: none, a few (less than k_aux), the whole second level and some others, all."""
    dead = torch.rand(D_SAE, generator=torch.Generator().manual_seed(3)) < 0.6
    if kind == "few":
        dead = torch.arange(D_SAE) % 19 == 0
    if kind == "level":
        dead[: PREFIXES[0]] = False
        dead[PREFIXES[0] : PREFIXES[1]] = True
    return {"none": torch.zeros_like(dead), "all": torch.ones_like(dead)}.get(kind, dead)


def assert_same_as(
    module: MatryoshkaTraining,
    theirs: TrainingSAE,
    dead: torch.Tensor | None = None,
    *more: str,
    tolerance: float | None = None,
    **penalty: float,
) -> tuple[Loss, TrainStepOutput]:
    """The same loss of a batch, active latents and gradients; returns both losses. penalty: their name of λ."""
    sae = module.sae
    share(sae, theirs, *more)
    x = rows(dtype=sae.W_dec.dtype)
    loss = loss_of(module, x, dead, sparsity_weight=sum(penalty.values()))
    output = theirs.training_forward_pass(TrainStepInput(x, penalty, dead, 0, False))
    assert torch.equal(loss.code.dense() > 0, output.feature_acts > 0)
    assert_same_loss(loss, sae, output.loss, theirs, *more, tolerance=tolerance)
    return loss, output


@each_dtype
@pytest.mark.parametrize("k", [4, 2.5])
@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize("dead", ["none", "few", "some", "level", "all"])
@pytest.mark.parametrize("rescale", [True, False])
def test_matryoshka_loss_and_gradients(rescale, dead, per_level, k, dtype):
    decoder = "rescaled" if rescale else "free"
    module = preset("saelens", dtype, k=k, decoder=decoder, objective={"aux": {"per_level": per_level}})
    theirs = matryoshka(dtype, k=k, rescale_acts_by_decoder_norm=rescale, use_matryoshka_aux_loss=per_level)
    randomise(module.sae)
    loss, output = assert_same_as(module, theirs, mask(dead))
    assert (float(output.losses["auxiliary_reconstruction_loss"]) > 0) == (dead != "none")
    assert (loss.code.dense() > 0).sum() == k * BATCH


TRAINING = {
    "the preset": {},
    "warm-up and decay": {"schedule": {"warmup_steps": 5, "decay_start": 0.6}},
    "a level at a time": {"objective": {"aux": {"per_level": True}}},
    "free decoder": {"decoder": "free"},
    "fractional k": {"k": 2.5},
    "scaled": {"normalise": "unit_rms"},
}


@each_dtype
@pytest.mark.parametrize("changed", TRAINING.values(), ids=TRAINING.keys())
def test_training_by_their_trainer(changed, dtype):
    window = 3
    data = batches(dtype=dtype)
    module = preset("saelens", dtype, dead={"after_steps": window + 1}, **changed)
    recipe = module.step().recipe
    module.step().start_from(statistics(data))
    theirs = matryoshka(
        dtype,
        k=recipe.k,
        rescale_acts_by_decoder_norm=recipe.decoder == "rescaled",
        use_matryoshka_aux_loss=recipe.objective.aux.per_level,
    )
    if "normalise" in changed:  # it starts at E x, theirs at 0
        module.sae.b_dec.data.zero_()
    share(module.sae, theirs)
    config = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr_end=3e-5,
        lr_warm_up_steps=recipe.schedule.warmup_steps,
        lr_decay_steps=round((1 - recipe.schedule.decay_start) * STEPS),
        dead_feature_window=window,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, theirs, iter(data))
    trainer.activation_scaler.scaling_factor = float(module.sae.scale)
    start, steps, aux = weights(theirs), [], []
    for x in data:
        output = trainer.step(x)
        trainer.n_training_steps += 1
        steps.append((output.loss.detach(), weights(theirs)))
        aux.append(float(output.losses["auxiliary_reconstruction_loss"]))
    record = train(module, data)
    assert 0 < sum(a > 0 for a in aux) < STEPS  # AuxK was on in some steps
    assert_close({"aux": torch.tensor(record.aux)}, {"aux": torch.tensor(aux)}, 1e-5)
    assert_same_training(record, steps, start, TOLERANCE[dtype])
    assert_close({"threshold": module.sae.threshold_ema}, {"threshold": theirs.topk_threshold}, 1e-5)


def test_both_start_alike():
    """The same weights from the same seed, and the same defaults of training."""
    module = preset("saelens", torch.float32)
    recipe = module.step().recipe
    torch.manual_seed(recipe.seed)
    theirs, config = matryoshka(torch.float32), SAETrainerConfig(1, 1)
    assert_close(weights(module.sae), weights(theirs), 1e-6)
    assert (recipe.lr, *recipe.adam.betas) == (config.lr, config.adam_beta1, config.adam_beta2)
    assert recipe.dead.after_steps == config.dead_feature_window + 1
    assert (recipe.schedule.warmup_steps, config.lr_warm_up_steps, config.lr_decay_steps) == (0, 0, 0)
    assert recipe.threshold_rate == theirs.cfg.topk_threshold_lr
    assert recipe.objective.aux.coefficient == theirs.cfg.aux_loss_coefficient


@each_dtype
def test_quadratic_jumprelu_loss_and_gradients(dtype):
    bandwidth, weight = 0.5, 0.7  # wide, so that many pre-activations are near a threshold
    sparsity = {"name": "jumprelu", "bandwidth": bandwidth}
    module = preset("gemma_scope_2", dtype, prefixes=[D_SAE], sparsity=sparsity)
    config = JumpReLUTrainingSAEConfig(
        D_IN,
        D_SAE,
        dtype=name_of(dtype),
        jumprelu_bandwidth=bandwidth,
        jumprelu_sparsity_loss_mode="quadratic",
        l0_coefficient=weight,
        target_l0=K,
    )
    randomise(module.sae)
    module.sae.threshold.data = torch.rand(D_SAE, generator=torch.Generator().manual_seed(5)) / 2
    tolerance = TOLERANCE[dtype] if dtype == torch.float32 else 1e-6  # thresholds are float32
    assert_same_as(module, JumpReLUTrainingSAE(config), None, "threshold", tolerance=tolerance, l0=weight)
    assert (module.sae.threshold.grad != 0).sum() > 0.9 * D_SAE


@each_dtype
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_l1_loss_and_gradients(apply_b_dec_to_input, dtype):
    b_dec = {"apply_b_dec_to_input": apply_b_dec_to_input}
    module = preset("nabeshima", dtype, prefixes=[D_SAE], sampling={"kind": "fixed"}, **b_dec)
    config = StandardTrainingSAEConfig(D_IN, D_SAE, dtype=name_of(dtype), l1_coefficient=1.3, **b_dec)
    randomise(module.sae)
    assert_same_as(module, StandardTrainingSAE(config), l1=1.3)


@each_dtype
@pytest.mark.parametrize("dead", ["none", "some", "all"])
def test_topk_loss_and_gradients(dead, dtype):
    module = preset("saelens", dtype, prefixes=[D_SAE], sparsity="topk")
    randomise(module.sae)
    config = TopKTrainingSAEConfig(D_IN, D_SAE, dtype=name_of(dtype), k=K)
    assert_same_as(module, TopKTrainingSAE(config), mask(dead))
