"""The LightningModule and its surroundings: steps, logs, checkpoints, and resuming bit for bit."""

import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import msae.sae.sparse
import msae.training.module
from msae.data.datamodule import ActivationData
from msae.data.synthetic import ForestSource
from msae.sae import AuxK, DenseCode, SparseCode, geometric_median
from msae.training.callbacks import Interrupted, PrefixCharts, SaveWhenStopping
from msae.training.checkpoints import (
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    checkpoint_callbacks,
    resume_from,
)
from msae.training.module import MatryoshkaTraining
from tests.test_model import same

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
PREFIXES = [4, 8, 20]


class At(L.Callback):
    """Runs an action once, at the given step, at the hook of that name."""

    def __init__(self, hook: str, step: int, action) -> None:
        self.done = False

        def run(trainer, *args, **kwargs):
            if trainer.global_step >= step and not self.done:
                self.done = True
                action(trainer)

        setattr(self, hook, run)


def terminate(trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Seen(L.Callback):
    """Remembers every batch."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.batches.append(batch.clone())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shards")


def fit(
    root: Path,
    run: Path,
    steps: int = 40,
    *,
    resume: bool = False,
    accumulate: int = 1,
    callbacks=(),
    every: int = 5,
    batch_tokens: int = 128,
    precision: str = "32-true",
    **model,
):
    data = ActivationData(ForestSource(rows=3000, val_rows=600, chunk_rows=1000), batch_tokens, root=str(root))
    settings = {"lr": 1e-2, "warmup_steps": 5, "dead_after_tokens": 1000} | model
    module = MatryoshkaTraining(data.shards.d_in, 20, PREFIXES, 1.5, **settings)
    module.sae.set_statistics(data.shards.mean, data.shards.mean_square)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=10 * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(run, name="", version="tb", default_hp_metric=False),
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            SaveWhenStopping(run / "checkpoints" / LAST),
            PrefixCharts(),
            *checkpoint_callbacks(run / "checkpoints", every, "val/fvu/p20"),
            *callbacks,
        ],
    )
    path = str(resume_from(run / "checkpoints")) if resume else None
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return trainer, module


def final_state(trainer, module) -> dict[str, torch.Tensor]:
    state = dict(module.state_dict())
    for i, per_parameter in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"adam/{i}/{name}": torch.as_tensor(value) for name, value in per_parameter.items()}
    state["lr"] = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"])
    state["rng"] = torch.get_rng_state()
    return state


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not same(a[name], b[name])]
    assert not different, different


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("hook", "steps"),
    [("on_train_batch_start", [17]), ("on_train_batch_start", [7, 11]), ("on_validation_batch_start", [10])],
    ids=["mid-epoch", "twice-in-one-epoch", "during-validation"],
)
def test_a_stopped_run_ends_where_an_uninterrupted_one_does(root, tmp_path, hook, steps, accumulate):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    torch.manual_seed(0)
    seen_whole = Seen()
    whole = final_state(*fit(root, tmp_path / "whole", accumulate=accumulate, callbacks=[seen_whole]))
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers

    torch.manual_seed(0)
    seen = Seen()
    for number, step in enumerate(steps):
        with pytest.raises(Interrupted, match="SIGTERM"):
            fit(
                root, tmp_path / "parts", resume=number > 0, accumulate=accumulate,
                callbacks=[seen, At(hook, step, terminate)],
            )  # fmt: skip
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
        torch.manual_seed(1234 + number)  # what the restarted process would have
    parts = final_state(*fit(root, tmp_path / "parts", resume=True, accumulate=accumulate, callbacks=[seen]))

    assert len(seen.batches) == len(seen_whole.batches) == 40 * accumulate
    for a, b in zip(seen.batches, seen_whole.batches, strict=True):
        assert torch.equal(a, b)
    assert_same(whole, parts)


@pytest.mark.parametrize("kernels", ["plain", "compiled"])
def test_training_with_sparse_kernels_is_dense_training_and_resumes_exactly(root, tmp_path, kernels, monkeypatch):
    """The same run within rounding; stopped and resumed, the same in every bit."""
    monkeypatch.setattr(msae.sae.sparse, "DENSEST", 1.0)  # of 20 latents many are active
    codes = []
    encode = msae.training.module.encode_for_training
    monkeypatch.setattr(
        msae.training.module,
        "encode_for_training",
        lambda *a: codes.append(encode(*a)) or codes[-1],
    )
    _, dense = fit(root, tmp_path / "dense", kernels="dense", aux={"k": 2})
    assert {type(code) for code in codes} == {DenseCode}
    codes.clear()
    options = {"kernels": kernels, "aux": {"k": 2}}
    _, whole = fit(root, tmp_path / "whole", **options)
    assert {type(code) for code in codes} == {SparseCode}
    for name, tensor in dense.sae.state_dict().items():
        torch.testing.assert_close(whole.sae.state_dict()[name], tensor, rtol=2e-3, atol=2e-4, equal_nan=True)
    with pytest.raises(Interrupted):
        fit(root, tmp_path / "stopped", callbacks=[At("on_train_batch_start", 17, terminate)], **options)
    _, resumed = fit(root, tmp_path / "stopped", resume=True, **options)
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_truncated_last_checkpoint_falls_back_to_the_one_before(root, tmp_path, capsys):
    torch.manual_seed(0)
    whole = final_state(*fit(root, tmp_path / "whole"))
    torch.manual_seed(0)
    with pytest.raises(Interrupted):
        fit(root, tmp_path / "parts", callbacks=[At("on_train_batch_start", 23, terminate)])
    last = tmp_path / "parts" / "checkpoints" / LAST
    last.write_bytes(last.read_bytes()[:-2000])
    parts = final_state(*fit(root, tmp_path / "parts", resume=True))
    error = capsys.readouterr().err
    assert f"{last} cannot be read" in error
    assert f"going on from {last.with_name(PREVIOUS)}" in error
    assert_same(whole, parts)

    for name in (LAST, PREVIOUS):
        last.with_name(name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read .*start a new run") as caught:
        resume_from(last.parent)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_would_unpickle_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "evil": os.system}, tmp_path / LAST)
    with pytest.raises(ValueError, match="cannot be read"):
        resume_from(tmp_path)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / LAST)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("msae.training.checkpoints.torch.save", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left.*ckpt_path=last"):
        io.save_checkpoint({"step": 2}, tmp_path / LAST)
    assert torch.load(tmp_path / LAST, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [LAST]


def test_a_changed_batch_size_is_refused(root, tmp_path):
    with pytest.raises(Interrupted):
        fit(root, tmp_path, callbacks=[At("on_train_batch_start", 5, terminate)])
    with pytest.raises(ValueError, match="batch_tokens=128, this run has batch_tokens=64"):
        fit(root, tmp_path, resume=True, batch_tokens=64)


def test_checkpoints_load_safely_with_their_hyperparameters(root, tmp_path):
    _, module = fit(root, tmp_path, steps=10)
    again = MatryoshkaTraining.load_from_checkpoint(tmp_path / "checkpoints" / LAST, weights_only=True)
    assert_same(module.state_dict(), again.state_dict())
    assert again.hparams["prefixes"] == PREFIXES
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {LAST, PREVIOUS, "best.ckpt"}


def test_decoder_rows_have_unit_norm_and_no_parallel_gradient(root, tmp_path):
    norms, parallels = [], []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.before = module.sae.W_dec.detach().clone()

        def on_before_zero_grad(self, trainer, module, optimizer):  # of the next step: nothing touched it since
            norms.append(float((module.sae.W_dec.detach().norm(dim=1) - 1).abs().max()))
            if module.sae.W_dec.grad is not None:
                parallels.append(float((module.sae.W_dec.grad * self.before).sum(1).abs().max()))

    fit(root, tmp_path, steps=20, callbacks=[Watch()])
    assert len(norms) == 20
    assert len(parallels) == 18
    assert max(norms) < 1e-6
    assert max(parallels) < 1e-6


def test_silence_is_counted_in_tokens(root, tmp_path):
    def silence(trainer):
        with torch.no_grad():
            trainer.lightning_module.sae.b_enc[0] = -1e6

    _, module = fit(
        root, tmp_path, steps=7, callbacks=[At("on_train_batch_start", 0, silence)], aux={"coefficient": 0.0}
    )
    assert int(module.sae.tokens_since_fired[0]) == 7 * 128
    assert int(module.sae.tokens_since_fired.min()) == 0


def test_learning_rate_warms_up_and_decays_by_step(root, tmp_path):
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(root, tmp_path, steps=20, callbacks=[Watch()], lr=1.0, warmup_steps=4, decay_start=0.5, grad_clip=1e9)
    expected = [0.25, 0.5, 0.75] + [1.0] * 8 + [1 - i / 10 for i in range(1, 10)]
    assert rates == pytest.approx(expected)


def test_gradients_are_clipped(root, tmp_path):
    norms = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            if grads:
                norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    fit(root, tmp_path, steps=10, callbacks=[Watch()], grad_clip=1e-3)
    assert norms
    assert max(norms) <= 1e-3 * 1.001


def test_tensorboard_has_every_prefix_and_logs_only_when_due(root, tmp_path, monkeypatch):
    calls = []
    original = MatryoshkaTraining._log_step
    monkeypatch.setattr(
        MatryoshkaTraining,
        "_log_step",
        lambda self, *a: (calls.append(self.trainer.global_step), original(self, *a)),
    )
    fit(root, tmp_path, steps=40)
    assert calls == [0, 9, 19, 29, 39]
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    per_prefix = {
        f"{split}/{name}/p{w}"
        for split in ("train", "val")
        for name in ("loss", "mse", "fvu", "l0", "dead")
        for w in PREFIXES
    }
    others = {
        f"train/{n}" for n in ("lr", "tokens_per_s", "threshold", "dead_latents", "grad_norm", "aux_loss", "loss")
    }
    assert per_prefix | others <= tags
    assert [e.step for e in events.Scalars("train/fvu/p20")] == [1, 10, 20, 30, 40]
    assert [e.step + 1 for e in events.Scalars("val/fvu/p20")] == [10, 20, 30, 40]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    for e in events.Scalars("val/loss/p20"):  # in scaled units the loss is the FVU, but for the sampling of the mean
        fvu = next(f.value for f in events.Scalars("val/fvu/p20") if f.step == e.step)
        assert e.value == pytest.approx(fvu, rel=0.1)


def test_training_learns_the_tree(root, tmp_path):
    trainer, _ = fit(root, tmp_path, steps=400)
    assert float(trainer.callback_metrics["val/fvu/p20"]) < 0.2


IMPOSSIBLE = [
    *({"decay_start": 1.5}, {"lr": 0.0}, {"grad_clip": -1.0}, {"decay_end": -0.1}, {"warmup_start": 2}),
    *({"threshold_rate": 1.1}, {"resort_rate": -1}, {"sparsity_control": 3.0}, {"bandwidth": 0}),
    *({"dead_after_steps": 0}, {"orthogonality_chunk": 0}, {"decoder_init_norm": 0.1}, {"balance": -1}),
    *({"sparsity": "topk"}, {"n_prefixes": 21, "prefix_sampling": "random"}, {"reduction": [1.0]}),
    *({"prefix_sampling": "every", "stop_gradient": True}, {"prefix_sampling": "every", "aux": {"per_level": True}}),
]


@pytest.mark.parametrize("settings", IMPOSSIBLE, ids=str)
def test_impossible_settings_are_one_line(settings):
    name = "k" if settings == {"sparsity": "topk"} else next(iter(settings))
    with pytest.raises(ValueError, match=rf"^model\.{name}[= ][^\n]*$"):
        MatryoshkaTraining(20, 20, PREFIXES, 1.5, **settings)


@pytest.mark.parametrize("decoder", ["free", "unit_norm_before_step"])
def test_topk_needs_a_decoder_that_can_be_exported(decoder):
    with pytest.raises(ValueError, match=rf"^model\.sparsity=topk with model\.decoder={decoder} [^\n]*$"):
        MatryoshkaTraining(20, 20, PREFIXES, 2, sparsity="topk", decoder=decoder)


# --- how it starts, and what moves by step ----------------------------------------------------------------------


@pytest.mark.parametrize("d_out", [None, 7])
@pytest.mark.parametrize("normalise", ["unit_variance", "centred"])
def test_b_dec_starts_where_it_is_told_to(normalise, d_out):
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(0)).exp() + 3
    y = x if d_out is None else -2 * x[:, :7]
    found = {}
    for b_dec_init in ("zero", "mean", "geometric_median"):
        options = {"normalise": normalise, "b_dec_init": b_dec_init, "d_out": d_out}
        module = MatryoshkaTraining(20, 20, PREFIXES, 1.5, **options)
        of_x, of_y = ((part.mean(0), float(part.square().sum(1).mean())) for part in (x, y))
        module.start_from(of_x, None if d_out is None else of_y, y[:100])
        found[b_dec_init] = module.sae.b_dec.detach()
    scaled = module.sae.normalise_target(y)
    assert not found["zero"].any()
    torch.testing.assert_close(found["mean"], scaled.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["geometric_median"], geometric_median(scaled[:100]))
    assert (found["mean"] - found["geometric_median"]).norm() > 0.01


def factors(total: int, **options) -> list[float]:
    module = MatryoshkaTraining(20, 20, PREFIXES, 1.5, **options)
    return [module.schedule.factor(step, total) for step in range(total)]


def test_the_learning_rate_has_the_shape_that_it_is_given():
    flat = {"decay_start": 1.0, "warmup_steps": 4}
    assert factors(5, **flat) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors(5, **flat, warmup_start=0.2) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    cosine = factors(5, **flat, warmup_shape="cosine", warmup_start=0.1)
    half = 0.5**0.5
    assert cosine == pytest.approx([0.1 + 0.9 * (1 - c) / 2 for c in (1, half, 0, -half, -1)])
    ending = factors(10, warmup_steps=0, decay_start=0.5, decay_end=0.1)
    assert ending == pytest.approx([1.0] * 6 + [0.1 + 0.9 * share for share in (0.8, 0.6, 0.4, 0.2)])
    assert factors(3, warmup_steps=1000, decay_start=1.0) == pytest.approx([1 / 3, 2 / 3, 1])  # a warm-up fits the run


def test_the_learning_rate_may_follow_the_width():
    assert MatryoshkaTraining(20, 2**14, [2**14], 1, lr=None).lr == pytest.approx(2e-4)
    assert MatryoshkaTraining(20, 2**12, [2**12], 1, lr=None).lr == pytest.approx(4e-4)


def test_random_prefixes_are_drawn_by_seed_and_step():
    def drawn(seed: int) -> list[list[int]]:
        module = MatryoshkaTraining(20, 20, PREFIXES, 1.5, prefix_sampling="random", n_prefixes=4, seed=seed)
        return [module._widths(step) for step in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert all(len(widths) == 4 and widths[-1] == 20 for widths in drawn(1))
    assert len({tuple(widths) for widths in drawn(1)}) > 15


def test_a_latent_may_be_dead_after_so_many_steps(root, tmp_path):
    counted = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.sae.tokens_since_fired[3] = 128 * (batch_idx + 1)
            counted.append(bool(module._dead(len(batch))[3]))

    fit(root, tmp_path, steps=5, callbacks=[Watch()], dead_after_steps=3, dead_after_tokens=1)
    assert counted == [False, False, True, True, True]


@pytest.mark.parametrize("warmup", [4, 0.4])
def test_the_penalty_warms_up_over_steps_or_a_share_of_them(root, tmp_path, warmup):
    _, module = fit(root, tmp_path, steps=10, sparsity="l1", sparsity_warmup_steps=warmup)
    assert module.controller.warmup_steps == 4
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    weights = {e.step: e.value for e in events.Scalars("train/sparsity_weight")}
    assert weights == pytest.approx({1: 0.25, 10: 1.0})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_penalty_moves_once_a_step(root, tmp_path, accumulate):
    settings = {"sparsity": "l1", "sparsity_control": 0.1, "sparsity_weight": 1e-3}
    _, module = fit(root, tmp_path, steps=4, accumulate=accumulate, **settings)
    assert float(module.controller.weight) == pytest.approx(1e-3 * 1.1**4)  # a ReLU's L0 is over k for longer


def test_learned_thresholds_are_never_negative(root, tmp_path):
    """Below zero the gate would let negative pre-activations through, in training but not at inference."""
    settings = {"sparsity": "jumprelu", "bandwidth": 0.5, "threshold_init": 0.01, "lr": 0.1, "sparsity_weight": 0.0}
    _, module = fit(root, tmp_path, steps=10, **settings)
    assert float(module.sae.threshold.min()) == 0
    assert float(module.sae.threshold.max()) > 0
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.sae.encode(x), module.sae.select(module.sae.pre(x)))


@pytest.mark.parametrize("decoder", ["free", "rescaled"])
def test_use_is_what_latents_contribute(root, tmp_path, decoder):
    """E (a ‖row‖)², whichever of a and the row has the norm."""
    expected = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            sae = module.sae
            with torch.no_grad():
                sae.W_dec.mul_(torch.linspace(0.5, 2, 20)[:, None])
                pre = (batch * sae.scale - sae.b_dec) @ sae.W_enc * sae.W_dec.norm(dim=1) ** (decoder == "rescaled")
                contributed = pre.relu() * sae.W_dec.norm(dim=1) ** (decoder == "free")
            expected.append(contributed.square().mean(0).sort(descending=True).values)

    settings = {"decoder": decoder, "sparsity": "l1", "resort_rate": 1.0}
    _, module = fit(root, tmp_path, steps=1, callbacks=[Watch()], **settings)
    torch.testing.assert_close(module.sae.use, expected[0])


def test_aux_may_be_given_as_an_object():
    module = MatryoshkaTraining(20, 20, PREFIXES, 1.5, aux=AuxK(0.5, 3))
    assert module.objective.aux == AuxK(0.5, 3)
    assert module.hparams["aux"] == vars(AuxK(0.5, 3))  # plain, for safe loading


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_a_diverged_run_is_refused(root, tmp_path, bias):
    def diverge(trainer):
        with torch.no_grad():
            trainer.lightning_module.sae.W_enc.fill_(torch.nan)

    with pytest.raises(ValueError, match="training diverged by step"):
        fit(root, tmp_path, 8, callbacks=[At("on_train_batch_start", 2, diverge)], encoder_bias=bias)


def test_training_in_bfloat16_alone(root, tmp_path):
    fit(root, tmp_path, 3, precision="bf16-true")
