"""Every option of training, in company: gradients, the loss in its plainest form, training, selection, files, resuming.

One list of variants holds every sparsity with every decoder it is allowed, and every other option at least twice.
"""

import copy
import inspect
import math
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import normalize

from msae.data.batches import TrainBatches
from msae.data.datamodule import ActivationData
from msae.data.seeds import stream
from msae.data.source import Chunk, Split
from msae.data.synthetic import ForestSource
from msae.sae import AuxK, load_sae, matryoshka_loss, save_sae
from msae.sae.files import raw_copy
from msae.training.job import finish
from msae.training.module import MatryoshkaTraining
from tests.test_model import same

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
D_SAE, PREFIXES, K = 24, [4, 10, 24], 2
LISTED = [0.5, 2.0, 1.0]

VARIANTS: dict[str, dict[str, Any]] = {
    "the published recipe": {},
    "bussmann": {
        "decoder": "unit_norm_before_step", "normalise": "none", "encoder_bias": False, "init": "uniform",
        "b_dec_init": "zero", "bias_level": True, "reduction": "mean", "error": "mean",
        "aux": {"k": 5, "detach": False, "normalise": "none"}, "dead_after_steps": 3, "betas": [0.9, 0.99],
    },
    "dictionary_learning": {
        "normalise": "unit_mean_square", "init": "tied_uniform", "b_dec_init": "geometric_median",
        "reduction": "mean_twice", "aux": {"normalise": "variance"}, "lr": None, "threshold_rate": 0.1,
    },
    "saelens": {
        "decoder": "rescaled", "normalise": "none", "init": "tied_uniform", "decoder_init_norm": 0.1,
        "b_dec_init": "zero", "dead_after_steps": 2, "dead_includes_batch": True,
        "aux": {"coefficient": 1.0, "normalise": "none", "relu": False, "scale_by_dead": True},
    },
    "batch_topk free, random": {
        "decoder": "free", "prefix_sampling": "random", "n_prefixes": 4, "resort_rate": 0.05, "balance": 0.75,
        "apply_b_dec_to_input": False, "init": "normal", "normalise": "unit_rms",
        "inner_decay": [0.3, 0.7], "inner_end": 0.1, "encoder_decay": 0.1,
    },
    "topk, every": {"sparsity": "topk", "prefix_sampling": "every", "reduction": "mean", "orthogonality": 0.25},
    "topk rescaled, stop": {
        "sparsity": "topk", "decoder": "rescaled", "stop_gradient": True, "normalise": "centred",
        "inner_decay": [0.2, 0.6], "inner_end": 0.0, "encoder_decay": 0.01,
        "aux": {"per_level": True, "k": 2}, "bias_level": True, "encoder_bias": False,
    },
    "topk of a transcoder": {
        "sparsity": "topk", "d_out": 7, "normalise": "centred", "reduction": LISTED, "resort_rate": 0.1,
        "aux": {"detach": False},
    },
    "gemma_scope_2": {
        "sparsity": "jumprelu", "normalise": "unit_mean_square", "aux": {"coefficient": 0.0}, "betas": [0.0, 0.999],
        "warmup_shape": "cosine", "warmup_start": 0.1, "sparsity_warmup_steps": 20, "sparsity_weight": 0.1,
    },
    "jumprelu before the step, random": {
        "sparsity": "jumprelu", "decoder": "unit_norm_before_step", "prefix_sampling": "random", "balance": 0.5,
        "b_dec_init": "geometric_median", "sparsity_weight": 0.05, "sparsity_control": 0.01,
        "aux": {"normalise": "variance", "scale_by_dead": True},
    },
    "jumprelu free, sorted": {
        "sparsity": "jumprelu", "decoder": "free", "decoder_init_norm": 0.5, "resort_rate": 0.05, "error": "mean",
        "init": "normal", "normalise": "unit_rms", "sparsity_weight": 0.02, "threshold_init": 0.05,
    },
    "jumprelu rescaled, every": {
        "sparsity": "jumprelu", "decoder": "rescaled", "prefix_sampling": "every", "reduction": "mean",
        "bias_level": True, "apply_b_dec_to_input": False, "sparsity_weight": 0.05, "threshold_init": 0.05,
    },
    "jumprelu of a transcoder": {
        "sparsity": "jumprelu", "d_out": 24, "stop_gradient": True, "reduction": [1.0, *LISTED], "bias_level": True,
        "sparsity_weight": 0.05, "aux": {"per_level": True, "relu": False},
    },
    "nabeshima": {
        "sparsity": "l1", "decoder": "free", "prefix_sampling": "random", "n_prefixes": 5, "reduction": "mean",
        "normalise": "unit_rms", "apply_b_dec_to_input": False, "init": "normal", "decoder_init_norm": 0.1,
        "b_dec_init": "zero", "resort_rate": 0.05, "aux": {"coefficient": 0.0}, "sparsity_weight": 0.2,
        "sparsity_warmup_steps": 0.2, "sparsity_control": 3e-4, "betas": [0.5, 0.9375], "decay_end": 0.1,
    },
    "l1 on unit rows": {
        "sparsity": "l1", "reduction": LISTED, "orthogonality": 0.1, "orthogonality_chunk": 7,
        "sparsity_weight": 0.05, "aux": {"scale_by_dead": True, "k": 3}, "lr": None,
    },
    "l1 before the step": {
        "sparsity": "l1", "decoder": "unit_norm_before_step", "stop_gradient": True, "encoder_bias": False,
        "init": "tied_uniform", "sparsity_weight": 0.05, "decay_end": 0.2, "warmup_shape": "cosine",
        "dead_includes_batch": True,
    },
    "l1 rescaled, every": {
        "sparsity": "l1", "decoder": "rescaled", "prefix_sampling": "every", "balance": 0.9, "sparsity_weight": 0.01,
        "error": "mean", "aux": {"detach": False, "relu": False},
    },
    "log on unit rows": {
        "sparsity": "log", "prefix_sampling": "random", "reduction": "mean_twice", "sparsity_weight": 0.05,
        "sparsity_control": 0.01, "sparsity_warmup_steps": 0.5, "normalise": "unit_variance", "warmup_start": 0.5,
    },
    "log before the step, every": {
        "sparsity": "log", "decoder": "unit_norm_before_step", "prefix_sampling": "every", "reduction": "mean",
        "resort_rate": 0.2, "init": "uniform", "sparsity_weight": 0.02,
    },
    "log free, of a transcoder": {
        "sparsity": "log", "decoder": "free", "d_out": 7, "decoder_init_norm": 0.3, "balance": 0.75,
        "sparsity_weight": 0.02, "orthogonality": 0.1, "orthogonality_chunk": 7, "normalise": "unit_mean_square",
    },
    "log rescaled": {
        "sparsity": "log", "decoder": "rescaled", "bias_level": True, "apply_b_dec_to_input": False,
        "sparsity_weight": 0.02, "threshold_rate": 0.1, "sparsity_warmup_steps": 20,
    },
}  # fmt: skip
variants = pytest.mark.parametrize("name", VARIANTS)
BOTH = ("bias_level", "stop_gradient", "encoder_bias", "apply_b_dec_to_input", "dead_includes_batch")
OPTIONS: dict[str, tuple[Any, ...]] = {
    "sparsity": ("batch_topk", "topk", "jumprelu", "l1", "log"),
    "decoder": ("unit_norm", "unit_norm_before_step", "free", "rescaled"),
    "normalise": ("none", "unit_mean_square", "unit_rms", "unit_variance", "centred"),
    "prefix_sampling": ("fixed", "random", "every"),
    "reduction": ("sum", "mean", "mean_twice"),
    "init": ("tied", "tied_uniform", "uniform", "normal"),
    "b_dec_init": ("zero", "mean", "geometric_median"),
    "error": ("sum", "mean"),
    "warmup_shape": ("linear", "cosine"),
    "aux.normalise": ("energy", "variance", "none"),
    **dict.fromkeys(BOTH, (False, True)),
    **{f"aux.{key}": (False, True) for key in ("per_level", "detach", "relu", "scale_by_dead")},
}
NUMBERS = (  # options with a number: another than the default
    *("balance", "orthogonality", "orthogonality_chunk", "resort_rate", "decoder_init_norm", "d_out", "n_prefixes"),
    *("sparsity_weight", "sparsity_warmup_steps", "sparsity_control", "threshold_init", "dead_after_steps", "betas"),
    *("warmup_start", "decay_end", "threshold_rate", "lr", "aux.coefficient", "aux.k"),
    *("inner_decay", "inner_end", "encoder_decay"),
)


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for key, value in settings.items():
        out |= {f"aux.{k}": v for k, v in value.items()} if key == "aux" else {key: value}
    return out


def of_module(name: str, d_in: int = 20, **other: Any) -> MatryoshkaTraining:
    settings: dict[str, Any] = {"d_sae": D_SAE, "prefixes": PREFIXES, "k": K, "warmup_steps": 5, "lr": 1e-2}
    settings |= {"dead_after_tokens": 500, "bandwidth": 0.1}
    return MatryoshkaTraining(d_in, **(settings | VARIANTS[name] | other))


ALIKE = (
    "kernels",
    "d_in",
    "d_sae",
    "prefixes",
    "k",
    "bandwidth",
    "dead_after_tokens",
    "warmup_steps",
    "decay_start",
    "grad_clip",
)


def test_no_option_is_missing_here() -> None:
    arguments = {*inspect.signature(MatryoshkaTraining).parameters} - {"aux", "seed"}
    arguments |= {f"aux.{field.name}" for field in fields(AuxK)}
    assert {*OPTIONS, *NUMBERS, *ALIKE} == arguments


def test_every_option_is_in_two_variants_at_least() -> None:
    settings = [flat(v) for v in VARIANTS.values()]
    defaults = flat(dict(of_module("the published recipe").hparams) | {"aux": vars(AuxK())})
    for option, values in OPTIONS.items():
        found = Counter(str((defaults | s)[option]) for s in settings)
        assert [value for value in values if found[str(value)] < 2] == [], option
    assert sum(isinstance(s.get("reduction"), list) for s in settings) >= 2
    for option in NUMBERS:
        assert sum(option in s for s in settings) >= 2, option
    forbidden = {("topk", "free"), ("topk", "unit_norm_before_step")}
    pairs = {(s, d) for s in OPTIONS["sparsity"] for d in OPTIONS["decoder"]} - forbidden
    assert {(s.get("sparsity", "batch_topk"), s.get("decoder", "unit_norm")) for s in settings} == pairs
    for sparsity, decoder in forbidden:
        with pytest.raises(ValueError, match="cannot be exported"):
            MatryoshkaTraining(4, 6, [6], 2, sparsity=sparsity, decoder=decoder)


# --- gradients -------------------------------------------------------------------------------------------------


class Example:
    """A variant away from its start, in float64, on rows of which some latents are dead for AuxK."""

    def __init__(self, name: str, n: int = 40, **other: Any) -> None:
        generator = torch.Generator().manual_seed(7)
        module = of_module(name, 5, **({"bandwidth": 0.5} | other)).double()
        self.sae, self.objective, self.widths = module.sae, module.objective, module._widths(3)
        d_out = self.sae.d_out
        self.x = 3 * torch.randn(n, 5, generator=generator, dtype=torch.float64) + 1
        self.y = torch.randn(n, d_out, generator=generator, dtype=torch.float64) - 2 if d_out != 5 else self.x
        self.sae.set_statistics(*moments(self.x), normalise=module.normalise, target=moments(self.y))
        with torch.no_grad():
            for parameter in self.sae.parameters():
                if parameter.requires_grad:
                    move = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(0.1 * parameter.abs().mean() * move + 0.05 * move)
            if self.sae.sparsity == "jumprelu":
                self.sae.threshold.abs_()
        self.dead = torch.arange(D_SAE) % 5 == 3

    def loss(self, **other: Any):
        torch.manual_seed(0)  # orthogonality deals its chunks
        given = {"prefixes": self.widths, "sparsity_weight": 0.2} | other
        return matryoshka_loss(self.sae, self.x, self.objective, self.dead, self.y, **given)


def moments(x: Tensor) -> tuple[Tensor, float]:
    return x.mean(0), float(x.square().sum(1).mean())


@variants
def test_gradients_reach_every_parameter_of_every_latent_that_fires(name) -> None:
    example = Example(name, n=400)
    sae, loss = example.sae, example.loss()
    loss.total.backward()
    fired = (loss.acts > 0).any(0)
    assert fired.double().mean() > 0.9
    assert fired[: PREFIXES[0]].all()
    for tensor in (sae.W_enc.grad.T, sae.W_dec.grad):
        assert (tensor[fired].norm(dim=1) > 1e-9).all()
    assert (sae.b_dec.grad != 0).all()
    if sae.b_enc.requires_grad:
        assert (sae.b_enc.grad[fired] != 0).all()
    else:
        assert sae.b_enc.grad is None
        assert not sae.b_enc.any()
    if sae.sparsity == "jumprelu":
        assert (sae.threshold.grad != 0).all()
    assert {n for n, p in sae.named_parameters() if p.grad is not None} == {
        n for n, p in sae.named_parameters() if p.requires_grad
    }


class Constants:
    """While active, `detach` gives what it gave in the first call: what training holds constant, held constant."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[Tensor] = []
        self.place, self.recording = 0, True
        detach = Tensor.detach

        def recalled(tensor: Tensor) -> Tensor:
            if self.recording:
                self.values.append(detach(tensor).clone())
                return detach(tensor)
            self.place += 1
            return self.values[self.place - 1]

        monkeypatch.setattr(Tensor, "detach", recalled)


@variants
def test_gradients_of_every_variant_equal_finite_differences(name, monkeypatch) -> None:
    """Along random directions in each parameter; a learned threshold's straight-through gradient is none of these."""
    example, step = Example(name), 1e-6
    reference = example.loss()
    reference.total.backward()
    gradients = {
        n: p.grad.clone() for n, p in example.sae.named_parameters() if p.grad is not None and n != "threshold"
    }
    constants = Constants(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        assert torch.equal(example.loss().total, reference.total)
        constants.recording = False
        for key, gradient in gradients.items():
            parameter = getattr(example.sae, key)
            for _ in range(3):
                direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                ends, before = [], parameter.clone()
                for sign in (1, -1):
                    parameter.copy_(before + sign * step * direction)
                    constants.place = 0
                    active = example.sae.select(example.sae.pre(example.x)) > 0
                    assert torch.equal(active, reference.acts > 0), "the active set changed"
                    ends.append(float(example.loss().total))
                parameter.copy_(before)
                measured = (ends[0] - ends[1]) / (2 * step)
                assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-6), key


# --- one prefix is a vanilla SAE -------------------------------------------------------------------------------


def vanilla(example: Example, weight: float) -> Tensor:
    """‖y' − recon‖² + λ penalty + α aux + γ orthogonality, written out for one dictionary of all latents."""
    sae, objective, aux = example.sae, example.objective, example.objective.aux
    x, y, n = (example.x - sae.mean) * sae.scale, (example.y - sae.target_mean) * sae.target_scale, len(example.x)
    norm = sae.W_dec.norm(dim=1)
    W_dec = sae.W_dec / norm[:, None] if sae.rescale_acts_by_decoder_norm else sae.W_dec
    pre = (x - sae.b_dec if sae.apply_b_dec_to_input else x) @ sae.W_enc + sae.b_enc
    pre = pre * norm if sae.rescale_acts_by_decoder_norm else pre
    if sae.sparsity == "batch_topk":
        active = pre >= pre.flatten().sort(descending=True).values[K * n - 1]
    elif sae.sparsity == "topk":
        active = pre >= pre.sort(dim=1, descending=True).values[:, K - 1 : K]
    else:
        active = pre > (sae.threshold.detach() if sae.sparsity == "jumprelu" else 0)
    acts = torch.where(active & (pre > 0), pre, 0.0)
    residual = y - (acts @ W_dec + sae.b_dec)
    share = 1 / sae.d_out if objective.error == "mean" else 1.0
    total = residual.square().sum(1).mean() * share
    paid = acts if sae.rescale_acts_by_decoder_norm else acts * norm
    if sae.sparsity == "l1":
        total = total + weight * paid.sum(1).mean()
    elif sae.sparsity == "log":
        total = total + weight * (torch.log(paid + 0.1) - math.log(0.1)).sum(1).mean()
    elif sae.sparsity == "jumprelu":
        total = total + weight * (2 / K * (active.sum(1).double() - K).square()).mean()
    if aux.coefficient:
        e = residual.detach() if aux.detach else residual
        k = aux.k or max(1, sae.d_out // 2)
        k_dead = min(k, int(example.dead.sum()))
        of_dead = torch.where(example.dead, pre, -torch.inf)
        chosen = of_dead >= of_dead.sort(dim=1, descending=True).values[:, k_dead - 1 : k_dead]
        made = torch.where(chosen, pre.relu() if aux.relu else pre, 0.0) @ W_dec
        left = residual.detach()
        scale = {
            "energy": left.square().sum(1).mean(),
            "variance": (left - left.mean(0)).square().sum(1).mean(),
            "none": torch.tensor(1 / share),
        }[aux.normalise]
        dead_share = min(int(example.dead.sum()) / k, 1) if aux.scale_by_dead else 1
        total = total + aux.coefficient * dead_share * (e - made).square().sum(1).mean() / scale
    if objective.orthogonality:
        cosine = (normalize(sae.W_dec, dim=1) @ normalize(sae.W_dec, dim=1).T).fill_diagonal_(0)
        total = total + objective.orthogonality * cosine.square().amax(1).mean()
    return total


@variants
def test_with_one_prefix_every_variant_is_a_vanilla_sae(name) -> None:
    sampling = "random" if VARIANTS[name].get("prefix_sampling") == "random" else "fixed"
    reduction = [1.0] if isinstance(VARIANTS[name].get("reduction"), list) else VARIANTS[name].get("reduction", "sum")
    one = {"prefixes": [D_SAE], "prefix_sampling": sampling, "n_prefixes": 1, "reduction": reduction}
    example = Example(name, **one, bias_level=False, balance=1.0, orthogonality_chunk=D_SAE)
    assert example.widths == [D_SAE]
    ours, plain = example.loss().total, vanilla(example, 0.2)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    trained = [p for n, p in example.sae.named_parameters() if p.requires_grad and n != "threshold"]
    found, expected = torch.autograd.grad(ours, trained), torch.autograd.grad(plain, trained)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# --- trained by the real trainer -------------------------------------------------------------------------------

STEPS, BATCH, VAL_ROWS = 60, 128, 20_000


class Noisy(ForestSource):
    """The tree's rows with noise, so that no two are alike, and at two more hooks what linear maps make of them."""

    hook_names = ("synthetic", "of 7", "of 24")

    def d_in(self, hook_name: str) -> int:
        return {"of 7": 7, "of 24": 24}.get(hook_name, self.features_count)

    def truth(self) -> None:
        """None: its features are of the first hook alone."""

    def chunks(self, state):
        for chunk in super().chunks(state):
            splits = {}
            for split, content in chunk.splits.items():
                noise = stream(self.seed, "noise", split, chunk.state["chunks"])
                x = content.activations["synthetic"]
                x = x + 0.1 * torch.randn(x.shape, generator=noise)
                made = 2 + x @ torch.randn(20, 24, generator=stream(self.seed, "map"))
                splits[split] = Split({"synthetic": x, "of 7": made[:, :7], "of 24": made})
            yield Chunk(splits, chunk.state)


class Watch(L.Callback):
    """Notes what inference does before and after the first step, and the state at half of the steps."""

    def __init__(self, x: Tensor, half: Path) -> None:
        self.x, self.half = x, half

    def on_train_start(self, trainer, module) -> None:
        if module.sae.sparsity == "batch_topk":
            with pytest.raises(ValueError, match="no threshold yet"):
                module.sae.encode(self.x)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            self.first_l0 = l0(module.sae.encode(self.x))
            self.first_selected = l0(module.sae.select(module.sae.pre(self.x)))
        if trainer.global_step == STEPS // 2:
            trainer.save_checkpoint(self.half)
            self.at_half = everything(trainer, module)


def l0(acts: Tensor) -> float:
    return float((acts > 0).sum(1).double().mean())


def everything(trainer: L.Trainer, module: MatryoshkaTraining) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for i, moments_ in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"adam/{i}/{name}": torch.as_tensor(value).clone() for name, value in moments_.items()}
    return state


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not same(a[name], b[name])]


class Run:
    """One variant, trained as a run does: from the statistics of the shards to the exported directory."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        d_out = VARIANTS[name].get("d_out")
        source = Noisy(rows=6000, val_rows=VAL_ROWS, chunk_rows=3000)
        target = None if d_out is None else f"of {d_out}"
        self.data = ActivationData(source, BATCH, root=str(root / "shards"), target_hook_name=target)
        self.rows = self.data.shards.activations("val", 0)
        directory = root / name.replace(" ", "_")
        self.half, self.exported_to = directory / "half.ckpt", directory / "sae"
        self.watch = Watch(self.rows[:1000], self.half)
        self.module = self.new()
        self.trainer = self.fit(self.module, [self.watch])
        self.state = everything(self.trainer, self.module)
        self.trained = copy.deepcopy(self.module.sae)  # before `finish` folds and calibrates it
        evaluation = OmegaConf.create({"evaluation": {"calibration_tokens": VAL_ROWS, "ce_sequences": 0}})
        self.metrics = finish(self.module, self.data, directory, evaluation)

    def new(self) -> MatryoshkaTraining:
        module, shards, target = of_module(self.name), self.data.shards, self.data.target_shards
        of_target = None if target is None else (target.mean, target.mean_square)
        first = TrainBatches(target or shards, BATCH, 1, 0).batch(0)
        module.start_from((shards.mean, shards.mean_square), of_target, first)
        return module

    def fit(self, module: MatryoshkaTraining, callbacks: list[L.Callback], checkpoint: Path | None = None) -> L.Trainer:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=STEPS, max_epochs=-1, val_check_interval=STEPS // 2,
            check_val_every_n_epoch=None, num_sanity_val_steps=0, limit_val_batches=2, log_every_n_steps=30,
            logger=DummyLogger(), enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, callbacks=callbacks,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer.fit(module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        assert trainer.global_step == STEPS
        return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root, runs = tmp_path_factory.mktemp("variants"), {}

    def of(name: str) -> Run:
        if name not in runs:
            runs[name] = Run(name, root)
        return runs[name]

    return of


@variants
def test_training_selects_as_many_latents_as_inference_does(name, trained) -> None:
    run = trained(name)
    sae, x = run.module.sae, run.rows[VAL_ROWS // 2 :]
    selected, inferred = l0(sae.select(sae.pre(x))), l0(sae.encode(x))
    assert inferred == pytest.approx(selected, rel=0.05)
    assert inferred == pytest.approx(run.metrics[f"val/l0/p{D_SAE}"], rel=1e-3)  # of what was exported
    assert run.metrics["train/k"] == K
    if sae.sparsity in ("batch_topk", "topk"):
        assert selected == pytest.approx(K, rel=0.01)
    else:
        assert inferred == selected


@variants
def test_inference_selects_the_latents_that_training_selects(name, trained) -> None:
    """`finish` folds decoder norms in: that must not change which latents are the largest."""
    run = trained(name)
    x = run.rows[VAL_ROWS // 2 :]
    by_training, by_inference = run.trained.select(run.trained.pre(x)) > 0, run.module.sae.encode(x) > 0
    both, either = (by_training & by_inference).sum(), (by_training | by_inference).sum()
    assert both > 0.97 * either


@variants
def test_training_reconstructs_more_than_the_mean(name, trained) -> None:
    run = trained(name)
    assert run.metrics[f"val/fvu/p{D_SAE}"] < 0.9
    assert all(math.isfinite(t.double().nan_to_num().sum()) for t in run.state.values())


@variants
def test_nothing_is_silently_dense(name, trained) -> None:
    """From the first step on inference is about as sparse as training: BatchTopK has a threshold by then."""
    watch, sae = trained(name).watch, trained(name).module.sae
    if sae.sparsity in ("batch_topk", "topk"):
        assert 0 < watch.first_l0 < 2 * K < D_SAE / 2
    else:  # a ReLU at its start: about half of all, and no other number than training's
        assert watch.first_l0 == watch.first_selected < 0.75 * D_SAE


@variants
def test_a_trained_variant_is_saved_and_loaded_in_every_bit(name, trained, tmp_path) -> None:
    run = trained(name)
    sae, loaded, x = run.module.sae, load_sae(run.exported_to), run.rows[:500]
    folded = raw_copy(sae, rescaled=loaded.rescale_acts_by_decoder_norm)
    kept = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "prefix_thresholds", "scale", "mean")
    assert [n for n in kept if not same(getattr(loaded, n).detach(), getattr(folded, n).detach())] == []
    assert torch.equal(loaded.encode(x), folded.encode(x))
    decided = (sae.pre(x) - sae.threshold.nan_to_num(0)).abs() > 1e-4  # nearer than that rounding decides
    in_raw_units = sae.encode(x) / sae.target_scale
    torch.testing.assert_close(loaded.encode(x)[decided], in_raw_units[decided], rtol=1e-3, atol=1e-4)
    again = load_sae(save_sae(loaded, tmp_path))
    assert differing(dict(loaded.state_dict()), dict(again.state_dict())) == []
    assert torch.equal(again.encode(x), loaded.encode(x))
    assert {p.name for p in run.exported_to.iterdir()} == {"cfg.json", "sae_weights.safetensors"}


@variants
def test_a_checkpoint_is_plain_and_goes_on_bit_for_bit(name, trained) -> None:
    run = trained(name)
    module = MatryoshkaTraining.load_from_checkpoint(run.half, weights_only=True)
    assert module.hparams == run.module.hparams
    at_half = {key: tensor for key, tensor in run.watch.at_half.items() if not key.startswith("adam/")}
    assert differing(dict(module.state_dict()), at_half) == []
    assert differing(at_half, {key: run.state[key] for key in at_half}) != []

    resumed = of_module(name)
    trainer = run.fit(resumed, [], run.half)
    assert differing(everything(trainer, resumed), run.state) == []


@variants
def test_decoder_rows_have_the_norms_that_their_constraint_leaves(name, trained) -> None:
    run, decoder = trained(name), VARIANTS[name].get("decoder", "unit_norm")
    norm = run.trained.W_dec.detach().norm(dim=1)
    assert (float((norm - 1).abs().max()) < 1e-5) == (decoder == "unit_norm")
    if decoder == "unit_norm_before_step":
        assert float((norm - 1).abs().max()) < 0.05
    torch.testing.assert_close(load_sae(run.exported_to).W_dec.norm(dim=1), torch.ones(D_SAE), rtol=1e-5, atol=0)


@variants
def test_sorted_latents_are_in_the_order_of_their_use(name, trained) -> None:
    use = trained(name).trained.use
    if VARIANTS[name].get("resort_rate") is None:
        assert not use.any()
    else:
        assert (use.diff() <= 0).all()
        assert use[0] > use[-1]
