"""Loss, gradients and training of SAELens 6.54, step by step."""

import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from msae.sae import matryoshka_loss
from tests.peers.common import (
    BATCH,
    D_IN,
    D_SAE,
    DTYPES,
    PREFIXES,
    TOLERANCE,
    WEIGHTS,
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


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def matryoshka(dtype: torch.dtype, **changed) -> MatryoshkaBatchTopKTrainingSAE:
    """Theirs, with their defaults."""
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "matryoshka_widths": list(PREFIXES), "k": K}
    return MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**sizes | changed, dtype=name_of(dtype)))


def step_input(x: torch.Tensor, dead: torch.Tensor | None = None, **coefficients: float) -> TrainStepInput:
    return TrainStepInput(x, coefficients, dead, n_training_steps=0, is_logging_step=False)


def mask(kind: str) -> torch.Tensor:
    """Dead latents: none, a few (less than k_aux), the whole second level and some others, all."""
    dead = torch.rand(D_SAE, generator=torch.Generator().manual_seed(3)) < 0.6
    if kind == "few":
        dead = torch.arange(D_SAE) % 19 == 0
    if kind == "level":
        dead[: PREFIXES[0]] = False
        dead[PREFIXES[0] : PREFIXES[1]] = True
    return {"none": torch.zeros_like(dead), "all": torch.ones_like(dead)}.get(kind, dead)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("k", [4, 2.5])
@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize("dead", ["none", "few", "some", "level", "all"])
@pytest.mark.parametrize("rescale", [True, False])
def test_matryoshka_loss_and_gradients(rescale, dead, per_level, k, dtype):
    decoder = "rescaled" if rescale else "free"
    module = preset("saelens", dtype, k=k, decoder=decoder, aux={"per_level": per_level})
    theirs = matryoshka(dtype, k=k, rescale_acts_by_decoder_norm=rescale, use_matryoshka_aux_loss=per_level)
    randomise(module.sae)
    share(module.sae, theirs)
    x = rows(dtype=dtype)
    loss = matryoshka_loss(module.sae, x, module.objective, mask(dead))
    output = theirs.training_forward_pass(step_input(x, mask(dead)))
    assert (float(output.losses["auxiliary_reconstruction_loss"]) > 0) == (dead != "none")
    assert torch.equal(loss.acts > 0, output.feature_acts > 0)
    assert (loss.acts > 0).sum() == k * BATCH
    assert_close(gradients(loss.total, module.sae), gradients(output.loss, theirs), TOLERANCE[dtype])


TRAINING = {
    "the preset": {},
    "warm-up and decay": {"warmup_steps": 5, "decay_start": 0.6},
    "a level at a time": {"aux": {"per_level": True}},
    "free decoder": {"decoder": "free"},
    "fractional k": {"k": 2.5},
    "scaled": {"normalise": "unit_rms"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("changed", TRAINING.values(), ids=TRAINING.keys())
def test_training_by_their_trainer(changed, dtype, monkeypatch):
    steps, window = 25, 3
    data = batches(steps, dtype)
    module = preset("saelens", dtype, dead_after_steps=window + 1, **changed)
    every = torch.cat(data).double()
    module.start_from((every.mean(0), float(every.square().sum(1).mean())))
    theirs = matryoshka(
        dtype,
        k=module.sae.k,
        rescale_acts_by_decoder_norm=module.decoder == "rescaled",
        use_matryoshka_aux_loss=module.objective.aux.per_level,
    )
    if "normalise" in changed:  # it starts at E x, theirs at 0
        module.sae.b_dec.data.zero_()
    share(module.sae, theirs)
    config = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr_end=3e-5,
        lr_warm_up_steps=module.schedule.warmup_steps,
        lr_decay_steps=round((1 - module.schedule.decay_start) * steps),
        dead_feature_window=window,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, theirs, iter(data))
    trainer.activation_scaler.scaling_factor = float(module.sae.scale)
    start, found, aux = weights(theirs), [], []
    for x in data:
        output = trainer.step(x)
        trainer.n_training_steps += 1
        found.append((output.loss.detach(), weights(theirs)))
        aux.append(float(output.losses["auxiliary_reconstruction_loss"]))
    record = train_ours(module, data, monkeypatch)
    assert 0 < sum(a > 0 for a in aux) < steps  # AuxK was on in some steps
    assert_close({"aux": torch.tensor(record.aux)}, {"aux": torch.tensor(aux)}, 1e-5)
    assert_same_training(record, found, start, TOLERANCE[dtype], 100 * TOLERANCE[dtype])
    assert_close({"threshold": module.sae.threshold_ema}, {"threshold": theirs.topk_threshold}, 1e-5)


def test_both_start_alike():
    """The same weights from the same seed, and the same defaults of training."""
    module = preset("saelens")
    torch.manual_seed(module.seed)
    theirs = matryoshka(torch.float32)
    assert_close(weights(module.sae), weights(theirs), 1e-6)
    config = SAETrainerConfig(1, 1)
    assert (module.lr, *module.betas) == (config.lr, config.adam_beta1, config.adam_beta2)
    assert module.dead_after_steps == config.dead_feature_window + 1
    assert (module.schedule.warmup_steps, config.lr_warm_up_steps, config.lr_decay_steps) == (0, 0, 0)
    assert module.threshold_rate == theirs.cfg.topk_threshold_lr
    assert module.objective.aux.coefficient == theirs.cfg.aux_loss_coefficient


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_quadratic_jumprelu_loss_and_gradients(dtype):
    bandwidth, coefficient = 0.5, 0.7  # wide, so that many pre-activations are near a threshold
    module = preset("gemma_scope_2", dtype, prefixes=[D_SAE], bandwidth=bandwidth)
    theirs = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            D_IN,
            D_SAE,
            dtype=name_of(dtype),
            jumprelu_bandwidth=bandwidth,
            jumprelu_sparsity_loss_mode="quadratic",
            l0_coefficient=coefficient,
            target_l0=K,
        )
    )
    randomise(module.sae)
    names = (*WEIGHTS, "threshold")
    module.sae.threshold.data = torch.rand(D_SAE, generator=torch.Generator().manual_seed(5)) / 2
    share(module.sae, theirs, names)
    x = rows(dtype=dtype)
    loss = matryoshka_loss(module.sae, x, module.objective, sparsity_weight=coefficient)
    output = theirs.training_forward_pass(step_input(x, l0=coefficient))
    assert torch.equal(loss.acts > 0, output.feature_acts > 0)
    tolerance = TOLERANCE[dtype] if dtype == torch.float32 else 1e-6  # thresholds are float32
    found = gradients(loss.total, module.sae, names)
    assert (found["threshold"] != 0).sum() > 0.9 * D_SAE
    assert_close(found, gradients(output.loss, theirs, names), tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_l1_loss_and_gradients(apply_b_dec_to_input, dtype):
    coefficient = 1.3
    module = preset(
        "nabeshima", dtype, prefixes=[D_SAE], apply_b_dec_to_input=apply_b_dec_to_input, prefix_sampling="fixed"
    )
    theirs = StandardTrainingSAE(
        StandardTrainingSAEConfig(
            D_IN,
            D_SAE,
            dtype=name_of(dtype),
            l1_coefficient=coefficient,
            apply_b_dec_to_input=apply_b_dec_to_input,
        )
    )
    randomise(module.sae)
    share(module.sae, theirs)
    x = rows(dtype=dtype)
    loss = matryoshka_loss(module.sae, x, module.objective, sparsity_weight=coefficient)
    output = theirs.training_forward_pass(step_input(x, l1=coefficient))
    assert_close(gradients(loss.total, module.sae), gradients(output.loss, theirs), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dead", ["none", "some", "all"])
def test_topk_loss_and_gradients(dead, dtype):
    module = preset("saelens", dtype, prefixes=[D_SAE], sparsity="topk")
    theirs = TopKTrainingSAE(TopKTrainingSAEConfig(D_IN, D_SAE, dtype=name_of(dtype), k=K))
    randomise(module.sae)
    share(module.sae, theirs)
    x = rows(dtype=dtype)
    loss = matryoshka_loss(module.sae, x, module.objective, mask(dead))
    output = theirs.training_forward_pass(step_input(x, mask(dead)))
    assert_close(gradients(loss.total, module.sae), gradients(output.loss, theirs), TOLERANCE[dtype])
