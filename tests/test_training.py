"""The LightningModule and its surroundings: steps, logs, checkpoints, and resuming bit for bit."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import msae.sae.fast.code
import msae.training.step
from msae.data.activations import Activations, Data
from msae.data.datamodule import ActivationData
from msae.runs import Run
from msae.sae import DenseCode, geometric_median
from msae.sae.fast.code import TrainingCode
from msae.sources.forest import ForestSource
from msae.training.callbacks import Interrupted, PrefixCharts, SaveWhenStopping
from msae.training.checkpoints import AtomicCheckpointIO, checkpoint_callbacks, resume_from
from msae.training.module import MatryoshkaTraining
from msae.training.step import METRICS, Step
from tests.training import QUICK, differing, everything, merged, module_of, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
PREFIXES = [4, 8, 20]


class At(L.Callback):
    """Runs an action at the given hook: at every step, or once, at the first from `step` on."""

    def __init__(self, hook: str, action, step: int | None = None) -> None:
        self.done = False

        def run(trainer, module, *args):
            if step is None or (trainer.global_step >= step and not self.done):
                self.done = True
                action(trainer, module, *args)

        setattr(self, hook, run)


def stop_at(step: int, hook: str = "on_train_batch_start") -> At:
    return At(hook, lambda *_: os.kill(os.getpid(), signal.SIGTERM), step)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shards")


def module_20(**recipe: Any) -> MatryoshkaTraining:
    return module_of(20, 20, PREFIXES, **{"k": 1.5} | merged(QUICK, recipe))


def fit(
    root: Path,
    path: Path,
    steps: int = 40,
    *,
    resume: bool = False,
    accumulate: int = 1,
    callbacks=(),
    batch_tokens: int = 128,
    precision: str = "32-true",
    **recipe: Any,
):
    source, run = ForestSource(rows=3000, val_rows=600, chunk_rows=1000), Run(path)
    data = Activations(Data(source, batch_tokens, str(root)))
    module = module_20(**recipe)
    module.step().start_from((data.rows.mean, data.rows.mean_square))
    trainer = trainer_of(
        steps,
        precision=precision,
        accumulate_grad_batches=accumulate,
        val_check_interval=10 * accumulate,
        check_val_every_n_epoch=None,
        log_every_n_steps=10,
        enable_checkpointing=True,
        logger=TensorBoardLogger(path, name="", version="tensorboard", default_hp_metric=False),
        plugins=[AtomicCheckpointIO(run)],
        callbacks=[
            SaveWhenStopping(run.last_checkpoint),
            PrefixCharts(),
            *checkpoint_callbacks(run, 5, "val/fvu/p20"),
            *callbacks,
        ],
    )
    checkpoint = str(resume_from(run)) if resume else None
    trainer.fit(module, datamodule=ActivationData(data), ckpt_path=checkpoint, weights_only=True)
    return trainer, module


def final_state(trainer, module) -> dict[str, torch.Tensor]:
    rate = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"])
    return everything(trainer, module) | {"lr": rate, "rng": torch.get_rng_state()}


# --- stopping and resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("hook", "steps"),
    [("on_train_batch_start", [17]), ("on_train_batch_start", [7, 11]), ("on_validation_batch_start", [10])],
    ids=["mid-epoch", "twice-in-one-epoch", "during-validation"],
)
def test_a_stopped_run_ends_where_an_uninterrupted_one_does(root, tmp_path, hook, steps, accumulate):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def seen_by(batches: list[torch.Tensor]) -> At:
        return At("on_train_batch_start", lambda trainer, module, batch, _: batches.append(batch.clone()))

    torch.manual_seed(0)
    of_whole, of_parts = [], []
    whole = final_state(*fit(root, tmp_path / "whole", accumulate=accumulate, callbacks=[seen_by(of_whole)]))
    torch.manual_seed(0)
    options = {"accumulate": accumulate}
    for number, step in enumerate(steps):
        callbacks = [seen_by(of_parts), stop_at(step, hook)]
        with pytest.raises(Interrupted, match="SIGTERM"):
            fit(root, tmp_path / "parts", resume=number > 0, callbacks=callbacks, **options)
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
        torch.manual_seed(1234 + number)  # what the restarted process would have
    parts = final_state(*fit(root, tmp_path / "parts", resume=True, callbacks=[seen_by(of_parts)], **options))
    assert len(of_parts) == len(of_whole) == 40 * accumulate
    assert all(torch.equal(a, b) for a, b in zip(of_parts, of_whole, strict=True))
    assert differing(whole, parts) == []


@pytest.mark.parametrize("kernels", ["plain", "compiled"])
def test_training_with_sparse_kernels_is_dense_training_and_resumes_exactly(root, tmp_path, kernels, monkeypatch):
    """The same run within rounding; stopped and resumed, the same in every bit."""
    monkeypatch.setattr(msae.sae.fast.code, "DENSEST", 1.0)  # of 20 latents many are active
    codes = []
    encode = msae.training.step.encode_for_training
    monkeypatch.setattr(msae.training.step, "encode_for_training", lambda *a: codes.append(encode(*a)) or codes[-1])
    recipe = {"objective": {"aux": {"k": 2}}}
    _, dense = fit(root, tmp_path / "dense", kernels="dense", **recipe)
    assert {type(code) for code in codes} == {DenseCode}
    codes.clear()
    _, whole = fit(root, tmp_path / "whole", kernels=kernels, **recipe)
    assert {type(code) for code in codes} == {TrainingCode}
    for name, tensor in dense.sae.state_dict().items():
        torch.testing.assert_close(whole.sae.state_dict()[name], tensor, rtol=2e-3, atol=2e-4, equal_nan=True)
    with pytest.raises(Interrupted):
        fit(root, tmp_path / "stopped", callbacks=[stop_at(17)], kernels=kernels, **recipe)
    _, resumed = fit(root, tmp_path / "stopped", resume=True, kernels=kernels, **recipe)
    assert differing(resumed.state_dict(), whole.state_dict()) == []


def test_a_truncated_last_checkpoint_falls_back_to_the_one_before(root, tmp_path, capsys):
    torch.manual_seed(0)
    whole = final_state(*fit(root, tmp_path / "whole"))
    torch.manual_seed(0)
    run = Run(tmp_path / "parts")
    last, previous = run.last_checkpoint, run.previous_checkpoint
    with pytest.raises(Interrupted):
        fit(root, run.path, callbacks=[stop_at(23)])
    last.write_bytes(last.read_bytes()[:-2000])
    parts = final_state(*fit(root, run.path, resume=True))
    error = capsys.readouterr().err
    assert f"{last} cannot be read" in error
    assert f"going on from {previous}" in error
    assert differing(whole, parts) == []

    last.write_bytes(b"PK")
    torch.save({"state_dict": {}, "evil": os.system}, previous)  # would run code
    with pytest.raises(ValueError, match=r"^no checkpoint in [^\n]* can be read [^\n]*start a new run[^\n]*$"):
        resume_from(run)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path)
    io, last = AtomicCheckpointIO(run), run.last_checkpoint
    io.save_checkpoint({"step": 1}, last)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("msae.training.checkpoints.torch.save", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left.*ckpt_path=last"):
        io.save_checkpoint({"step": 2}, last)
    assert torch.load(last, weights_only=True) == {"step": 1}
    assert list(run.checkpoints.iterdir()) == [last]


def test_a_changed_batch_size_is_refused(root, tmp_path):
    with pytest.raises(Interrupted):
        fit(root, tmp_path, callbacks=[stop_at(5)])
    with pytest.raises(ValueError, match="batch_tokens=128, this run has batch_tokens=64"):
        fit(root, tmp_path, resume=True, batch_tokens=64)


def test_checkpoints_load_safely_with_their_recipe(root, tmp_path):
    _, module = fit(root, tmp_path, steps=10)
    run = Run(tmp_path)
    again = MatryoshkaTraining.load_from_checkpoint(run.last_checkpoint, weights_only=True)
    assert differing(module.state_dict(), again.state_dict()) == []
    assert again.step().recipe == module.step().recipe
    assert {path.name for path in run.checkpoints.iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_a_diverged_run_is_refused(root, tmp_path, bias):
    diverge = At("on_train_batch_start", lambda trainer, module, *_: module.sae.W_enc.data.fill_(torch.nan), 2)
    with pytest.raises(ValueError, match="training diverged by step"):
        fit(root, tmp_path, 8, callbacks=[diverge], encoder_bias=bias)


# --- what a step does -------------------------------------------------------------------------------------------------


def test_silence_is_counted_in_tokens(root, tmp_path):
    silence = At("on_train_batch_start", lambda trainer, module, *_: module.sae.b_enc.data[0].fill_(-1e6), 0)
    _, module = fit(root, tmp_path, steps=7, callbacks=[silence], objective={"aux": {"coefficient": 0.0}})
    assert int(module.sae.tokens_since_fired[0]) == 7 * 128
    assert int(module.sae.tokens_since_fired.min()) == 0


def test_a_latent_may_be_dead_after_so_many_steps(root, tmp_path):
    counted = []

    def count(trainer, module, outputs, batch, batch_idx):
        module.sae.tokens_since_fired[3] = 128 * (batch_idx + 1)
        counted.append(bool(module.step().dead(len(batch))[3]))

    dead = {"after_steps": 3, "after_tokens": 1}
    fit(root, tmp_path, steps=5, callbacks=[At("on_train_batch_end", count)], dead=dead)
    assert counted == [False, False, True, True, True]


@pytest.mark.parametrize("warmup", [4, 0.4])
def test_the_penalty_warms_up_over_steps_or_a_share_of_them(root, tmp_path, warmup):
    _, module = fit(root, tmp_path, steps=10, sparsity="l1", penalty={"warmup_steps": warmup})
    assert module.step().controller.warmup_steps == 4
    weights = {e.step: e.value for e in events_of(tmp_path).Scalars("train/sparsity_weight")}
    assert weights == pytest.approx({1: 0.25, 10: 1.0})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_penalty_moves_once_a_step(root, tmp_path, accumulate):
    penalty = {"control": 0.1, "weight": 1e-3}
    _, module = fit(root, tmp_path, steps=4, accumulate=accumulate, sparsity="l1", penalty=penalty)
    assert float(module.step().controller.weight) == pytest.approx(1e-3 * 1.1**4)  # a ReLU's L0 is over k for longer


def test_learned_thresholds_are_never_negative(root, tmp_path):
    """Below zero the gate would let negative pre-activations through, in training but not at inference."""
    jumprelu = {"name": "jumprelu", "bandwidth": 0.5, "threshold_init": 0.01}
    _, module = fit(root, tmp_path, steps=10, sparsity=jumprelu, lr=0.1, penalty={"weight": 0.0})
    assert float(module.sae.threshold.min()) == 0
    assert float(module.sae.threshold.max()) > 0
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.sae.encode(x), module.sae.select(module.sae.pre(x)))


@pytest.mark.parametrize("decoder", ["free", "rescaled"])
def test_use_is_what_latents_contribute(root, tmp_path, decoder):
    """E (a ‖row‖)², whichever of a and the row has the norm."""
    expected = []

    @torch.no_grad()
    def contribute(trainer, module, batch, batch_idx):
        sae = module.sae
        sae.W_dec.mul_(torch.linspace(0.5, 2, 20)[:, None])
        pre = (batch * sae.scale - sae.b_dec) @ sae.W_enc * sae.W_dec.norm(dim=1) ** (decoder == "rescaled")
        contributed = pre.relu() * sae.W_dec.norm(dim=1) ** (decoder == "free")
        expected.append(contributed.square().mean(0).sort(descending=True).values)

    callbacks = [At("on_train_batch_start", contribute)]
    _, module = fit(root, tmp_path, steps=1, callbacks=callbacks, decoder=decoder, sparsity="l1", resort_rate=1.0)
    torch.testing.assert_close(module.sae.use, expected[0])


def test_training_in_bfloat16_alone(root, tmp_path):
    fit(root, tmp_path, 3, precision="bf16-true")


def test_training_learns_the_tree(root, tmp_path):
    trainer, _ = fit(root, tmp_path, steps=400)
    assert float(trainer.callback_metrics["val/fvu/p20"]) < 0.2


# --- what is logged ---------------------------------------------------------------------------------------------------


def events_of(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_tensorboard_has_every_prefix_and_logs_only_when_due(root, tmp_path, monkeypatch):
    calls = []
    figures = Step.figures
    monkeypatch.setattr(Step, "figures", lambda self, batch, at: calls.append(at.step) or figures(self, batch, at))
    fit(root, tmp_path, steps=40)
    assert calls == [0, 9, 19, 29, 39]
    events = events_of(tmp_path)
    per_prefix = {f"{split}/{name}/p{w}" for split in ("train", "val") for name in METRICS for w in PREFIXES}
    names = ("lr", "tokens_per_s", "threshold", "dead_latents", "grad_norm", "aux_loss", "loss")
    assert per_prefix | {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/fvu/p20")] == [1, 10, 20, 30, 40]
    assert [e.step for e in events.Scalars("val/fvu/p20")] == [10, 20, 30, 40]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    for e in events.Scalars("val/loss/p20"):  # in scaled units the loss is the FVU, but for the sampling of the mean
        fvu = next(f.value for f in events.Scalars("val/fvu/p20") if f.step == e.step)
        assert e.value == pytest.approx(fvu, rel=0.1)


# --- settings ---------------------------------------------------------------------------------------------------------

EVERY, TOPK = {"sampling": {"kind": "every"}}, {"sparsity": "topk", "k": 2}
IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "init.decoder_norm": {"init": {"decoder_norm": 0.1}},
    "objective.reduction": {"objective": {"reduction": [1.0]}},
    "k": {"sparsity": "topk"},
    "sampling.n_prefixes": {"sampling": {"n_prefixes": 21, "kind": "random"}},
    "sampling.kind=every knows neither objective.stop_gradient": {**EVERY, "objective": {"stop_gradient": True}},
    "sampling.kind=every knows neither": {**EVERY, "objective": {"aux": {"per_level": True}}},
    "sparsity=topk with model.decoder=free": {**TOPK, "decoder": "free"},
    "sparsity=topk with model.decoder=unit_norm_before_step": {**TOPK, "decoder": "unit_norm_before_step"},
    "fading.between=[0.6, 0.4]": {"fading": {"between": [0.6, 0.4]}},
}


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_impossible_settings_are_one_line(line):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        module_20(**IMPOSSIBLE[line])
    assert str(error.value).startswith((f"model.{line}=", f"model.{line} ", f"model.{line}:"))


@pytest.mark.parametrize("d_out", [None, 7])
@pytest.mark.parametrize("normalise", ["unit_variance", "centred"])
def test_where_b_dec_starts(normalise, d_out):
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(0)).exp() + 3
    y = x if d_out is None else -2 * x[:, :7]
    of_x, of_y = ((part.mean(0), float(part.square().sum(1).mean())) for part in (x, y))
    b_dec = {}
    for where in ("zero", "mean", "geometric_median"):
        step = module_20(normalise=normalise, d_out=d_out, init={"b_dec": where}).step()
        step.start_from(of_x, None if d_out is None else of_y, y[:100])
        b_dec[where] = step.sae.b_dec.detach()
    scaled = step.sae.normalise_target(y)
    assert not b_dec["zero"].any()
    torch.testing.assert_close(b_dec["mean"], scaled.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b_dec["geometric_median"], geometric_median(scaled[:100]))
    assert (b_dec["mean"] - b_dec["geometric_median"]).norm() > 0.01


def test_the_learning_rate_warms_up_and_decays_by_step(root, tmp_path):
    rates = []
    note = At("on_train_batch_start", lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"]))
    schedule = {"warmup_steps": 4, "decay_start": 0.5}
    fit(root, tmp_path, steps=20, callbacks=[note], lr=1.0, schedule=schedule, adam={"grad_clip": 1e9})
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 8 + [1 - i / 10 for i in range(1, 10)])


HALF, COSINE = 0.5**0.5, {"warmup_steps": 4, "warmup_start": 0.1, "warmup_shape": "cosine"}


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0]),
        ({"warmup_steps": 4, "warmup_start": 0.2}, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (COSINE, [0.1 + 0.9 * (1 - c) / 2 for c in (1, HALF, 0, -HALF, -1)]),
        ({"warmup_steps": 0, "decay_start": 0.5, "decay_end": 0.1}, [1.0] * 6 + [0.82, 0.64, 0.46, 0.28]),
        ({"warmup_steps": 1000}, [1 / 3, 2 / 3, 1]),  # a warm-up fits the run
    ],
    ids=str,
)
def test_the_shape_of_the_learning_rate(schedule, factors):
    schedule = module_20(schedule={"decay_start": 1.0} | schedule).step().recipe.schedule
    total = len(factors)
    assert [schedule.factor(step, total) for step in range(total)] == pytest.approx(factors)


def test_the_learning_rate_may_follow_the_width():
    for d_sae, rate in ((2**14, 2e-4), (2**12, 4e-4)):
        assert module_of(20, d_sae, [d_sae], 1, lr=None).step().recipe.learning_rate == pytest.approx(rate)


def test_random_prefixes_are_drawn_by_seed_and_step():
    def drawn(seed: int) -> list[list[int]]:
        step = module_20(sampling={"kind": "random", "n_prefixes": 4}, seed=seed).step()
        return [step.prefixes(number) for number in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert all(len(widths) == 4 and widths[-1] == 20 for widths in drawn(1))
    assert len({tuple(widths) for widths in drawn(1)}) > 15


def test_the_weight_of_inner_levels_over_a_run():
    def fading(**settings: Any):
        return module_20(fading=settings).step().recipe.fading

    exponential = fading(end=0.01, between=[0.25, 0.75])
    assert [exponential.weight(step, 100) for step in (0, 24, 25)] == [1, 1, 1]
    assert exponential.weight(50, 100) == pytest.approx(0.1)
    assert [exponential.weight(step, 100) for step in (75, 99)] == [0, 0]
    assert fading(end=0.0, between=[0.5, 1.0]).weight(75, 100) == pytest.approx(0.5)
    assert fading().weight(99, 100) == 1
