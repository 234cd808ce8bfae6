"""Every option of training, in company: gradients, the loss in its plainest form, training, selection, files, resuming.

One list of variants holds every sparsity with every decoder it is allowed, every other option at least twice, and two
mechanisms that are defined here alone, each in one class.
"""

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.nn.functional import normalize

from msae.data.activations import Activations, Data
from msae.data.batches import TrainBatches
from msae.data.datamodule import ActivationData
from msae.evaluation.evaluate import Evaluation
from msae.interop import dictionary_learning, load, saelens, sparsify
from msae.runs import Run as RunDirectory
from msae.runs import flat
from msae.sae import (
    DenseCode,
    MatryoshkaSAE,
    Objective,
    Sparsity,
    batch_topk,
    encode_for_training,
    encode_sparse,
    load_sae,
    matryoshka_loss,
    save_sae,
)
from msae.sae.fast.code import TrainingCode
from msae.sae.forms import folded_copy
from msae.sae.sparsity import Entries, Screen
from msae.seeds import stream
from msae.settings import NonNegative, as_plain, decode, keys, settings
from msae.sources.forest import ForestSource
from msae.sources.source import Chunk, Split
from msae.training.job import export
from msae.training.module import MatryoshkaTraining
from msae.training.settings import Recipe
from tests.test_model import same
from tests.training import differing, everything, merged, module_of, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
D_SAE, PREFIXES, K = 24, [4, 10, 24], 2
LISTED = [0.5, 2.0, 1.0]


class Halves(Sparsity):
    """BatchTopK within each half of a batch: a mechanism of one method, trained densely, calibrated, exported."""

    name = "halves"

    def select(self, pre: Tensor, k: float, threshold: Tensor) -> Tensor:
        return torch.cat([batch_topk(part, k) for part in pre.chunk(2)])


@settings
class Soft(Sparsity):
    """relu(pre − θ) with θ learned, which costs Σ a²: with a setting, a sparse path and inference of its own."""

    name = "soft"
    threshold_is = "learned"
    architecture = "soft"
    start: NonNegative = 0.1
    """θ of every latent at the start."""

    def first_threshold(self) -> float:
        return self.start

    def activate(self, pre: Tensor, threshold: Tensor) -> Tensor:
        return (pre - threshold).relu()

    def select(self, pre: Tensor, k: float, threshold: Tensor) -> Tensor:
        return self.activate(pre, threshold)

    infer = select

    def penalty(self, entries: Entries, k: float) -> Tensor:
        return entries.by_row(entries.contribution.square()).mean()

    def active(self, screen: Screen, k: float, threshold: Tensor) -> Any:
        return screen.above(threshold)

    infer_active = active


def jumprelu(threshold_init: float = 0.001) -> dict[str, Any]:
    return {"name": "jumprelu", "threshold_init": threshold_init, "bandwidth": 0.1}


VARIANTS: dict[str, dict[str, Any]] = {
    "the published recipe": {},
    "bussmann": {
        "decoder": "unit_norm_before_step", "normalise": "none", "encoder_bias": False,
        "init": {"weights": "uniform", "b_dec": "zero"},
        "objective": {
            "bias_level": True, "reduction": "mean", "error": "mean",
            "aux": {"k": 5, "detach": False, "normalise": "none"},
        },
        "dead": {"after_steps": 3}, "adam": {"betas": [0.9, 0.99]},
    },
    "dictionary_learning": {
        "normalise": "unit_mean_square", "init": {"weights": "tied_uniform", "b_dec": "geometric_median"},
        "objective": {"reduction": "mean_twice", "aux": {"normalise": "variance"}}, "lr": None, "threshold_rate": 0.1,
    },
    "saelens": {
        "decoder": "rescaled", "normalise": "none",
        "init": {"weights": "tied_uniform", "decoder_norm": 0.1, "b_dec": "zero"},
        "dead": {"after_steps": 2, "includes_batch": True},
        "objective": {"aux": {"coefficient": 1.0, "normalise": "none", "relu": False, "scale_by_dead": True}},
    },
    "batch_topk free, random": {
        "decoder": "free", "sampling": {"kind": "random", "n_prefixes": 4}, "resort_rate": 0.05,
        "objective": {"balance": 0.75}, "apply_b_dec_to_input": False, "init": {"weights": "normal"},
        "normalise": "unit_rms", "fading": {"between": [0.3, 0.7], "end": 0.1, "encoder_decay": 0.1},
    },
    "topk, every": {
        "sparsity": "topk", "sampling": {"kind": "every"},
        "objective": {"reduction": "mean", "terms": {"orthogonality": 0.25}},
    },
    "topk rescaled, stop": {
        "sparsity": "topk", "decoder": "rescaled", "normalise": "centred", "encoder_bias": False,
        "objective": {"stop_gradient": True, "aux": {"per_level": True, "k": 2}, "bias_level": True},
        "fading": {"between": [0.2, 0.6], "end": 0.0, "encoder_decay": 0.01},
    },
    "topk of a transcoder": {
        "sparsity": "topk", "d_out": 7, "normalise": "centred", "resort_rate": 0.1,
        "objective": {"reduction": LISTED, "aux": {"detach": False}},
    },
    "gemma_scope_2": {
        "sparsity": jumprelu(), "normalise": "unit_mean_square", "objective": {"aux": {"coefficient": 0.0}},
        "adam": {"betas": [0.0, 0.999]}, "schedule": {"warmup_shape": "cosine", "warmup_start": 0.1},
        "penalty": {"warmup_steps": 20, "weight": 0.1},
    },
    "jumprelu before the step, random": {
        "sparsity": jumprelu(), "decoder": "unit_norm_before_step", "sampling": {"kind": "random"},
        "init": {"b_dec": "geometric_median"}, "penalty": {"weight": 0.05, "control": 0.01},
        "objective": {"balance": 0.5, "aux": {"normalise": "variance", "scale_by_dead": True}},
    },
    "jumprelu free, sorted": {
        "sparsity": jumprelu(0.05), "decoder": "free", "resort_rate": 0.05, "objective": {"error": "mean"},
        "init": {"weights": "normal", "decoder_norm": 0.5}, "normalise": "unit_rms", "penalty": {"weight": 0.02},
    },
    "jumprelu rescaled, every": {
        "sparsity": jumprelu(0.05), "decoder": "rescaled", "sampling": {"kind": "every"},
        "objective": {"reduction": "mean", "bias_level": True}, "apply_b_dec_to_input": False,
        "penalty": {"weight": 0.05},
    },
    "jumprelu of a transcoder": {
        "sparsity": jumprelu(), "d_out": 24, "penalty": {"weight": 0.05},
        "objective": {
            "stop_gradient": True, "reduction": [1.0, *LISTED], "bias_level": True,
            "aux": {"per_level": True, "relu": False},
        },
    },
    "nabeshima": {
        "sparsity": "l1", "decoder": "free", "sampling": {"kind": "random", "n_prefixes": 5},
        "objective": {"reduction": "mean", "aux": {"coefficient": 0.0}}, "normalise": "unit_rms",
        "apply_b_dec_to_input": False, "init": {"weights": "normal", "decoder_norm": 0.1, "b_dec": "zero"},
        "resort_rate": 0.05, "penalty": {"weight": 0.2, "warmup_steps": 0.2, "control": 3e-4},
        "adam": {"betas": [0.5, 0.9375]}, "schedule": {"decay_end": 0.1},
    },
    "l1 on unit rows": {
        "sparsity": "l1", "penalty": {"weight": 0.05}, "lr": None,
        "objective": {
            "reduction": LISTED, "terms": {"orthogonality": 0.1}, "aux": {"scale_by_dead": True, "k": 3},
        },
    },
    "l1 before the step": {
        "sparsity": "l1", "decoder": "unit_norm_before_step", "objective": {"stop_gradient": True},
        "encoder_bias": False, "init": {"weights": "tied_uniform"}, "penalty": {"weight": 0.05},
        "schedule": {"decay_end": 0.2, "warmup_shape": "cosine"}, "dead": {"includes_batch": True},
    },
    "l1 rescaled, every": {
        "sparsity": "l1", "decoder": "rescaled", "sampling": {"kind": "every"}, "penalty": {"weight": 0.01},
        "objective": {"balance": 0.9, "error": "mean", "aux": {"detach": False, "relu": False}},
    },
    "log on unit rows": {
        "sparsity": "log", "sampling": {"kind": "random"}, "objective": {"reduction": "mean_twice"},
        "penalty": {"weight": 0.05, "control": 0.01, "warmup_steps": 0.5}, "normalise": "unit_variance",
        "schedule": {"warmup_start": 0.5},
    },
    "log before the step, every": {
        "sparsity": "log", "decoder": "unit_norm_before_step", "sampling": {"kind": "every"},
        "objective": {"reduction": "mean"}, "resort_rate": 0.2, "init": {"weights": "uniform"},
        "penalty": {"weight": 0.02},
    },
    "log free, of a transcoder": {
        "sparsity": "log", "decoder": "free", "d_out": 7, "init": {"decoder_norm": 0.3},
        "objective": {"balance": 0.75, "terms": {"orthogonality": 0.1}}, "penalty": {"weight": 0.02},
        "normalise": "unit_mean_square",
    },
    "log rescaled": {
        "sparsity": "log", "decoder": "rescaled", "objective": {"bias_level": True}, "apply_b_dec_to_input": False,
        "penalty": {"weight": 0.02, "warmup_steps": 20}, "threshold_rate": 0.1,
    },
    "a mechanism of one's own": {"sparsity": "halves", "objective": {"balance": 0.5}},
    "a mechanism of one's own, rescaled": {"sparsity": "halves", "decoder": "rescaled", "normalise": "centred"},
    "another with settings": {"sparsity": {"name": "soft", "start": 0.2}, "penalty": {"weight": 0.02}},
    "another, rescaled": {"sparsity": "soft", "decoder": "rescaled", "penalty": {"weight": 0.02}, "resort_rate": 0.1},
}  # fmt: skip
variants = pytest.mark.parametrize("name", VARIANTS)
BOTH = (
    "objective.bias_level", "objective.stop_gradient", "encoder_bias", "apply_b_dec_to_input", "dead.includes_batch",
    *(f"objective.aux.{key}" for key in ("per_level", "detach", "relu", "scale_by_dead")),
)  # fmt: skip
OPTIONS: dict[str, tuple[Any, ...]] = {
    "sparsity": ("batch_topk", "topk", "jumprelu", "l1", "log", "halves", "soft"),
    "decoder": ("unit_norm", "unit_norm_before_step", "free", "rescaled"),
    "normalise": ("none", "unit_mean_square", "unit_rms", "unit_variance", "centred"),
    "sampling.kind": ("fixed", "random", "every"),
    "objective.reduction": ("sum", "mean", "mean_twice"),
    "init.weights": ("tied", "tied_uniform", "uniform", "normal"),
    "init.b_dec": ("zero", "mean", "geometric_median"),
    "objective.error": ("sum", "mean"),
    "schedule.warmup_shape": ("linear", "cosine"),
    "objective.aux.normalise": ("energy", "variance", "none"),
    **dict.fromkeys(BOTH, (False, True)),
}
NUMBERS = (  # options with a number: another than the default
    "objective.balance", "objective.terms", "resort_rate", "init.decoder_norm", "d_out", "sampling.n_prefixes",
    "penalty.weight", "penalty.warmup_steps", "penalty.control", "dead.after_steps", "adam.betas", "lr",
    "schedule.warmup_start", "schedule.decay_end", "threshold_rate", "objective.aux.coefficient", "objective.aux.k",
    "fading.between", "fading.end", "fading.encoder_decay",
)  # fmt: skip
ALIKE = (
    "kernels", "d_in", "d_sae", "prefixes", "k", "seed", "dead.after_tokens", "schedule.warmup_steps",
    "schedule.decay_start", "adam.grad_clip",
)  # fmt: skip


def recipe_of(name: str, *others: dict[str, Any]) -> dict[str, Any]:
    base = {"d_sae": D_SAE, "prefixes": PREFIXES, "k": K, "lr": 1e-2}
    return merged(base, {"schedule": {"warmup_steps": 5}, "dead": {"after_tokens": 500}}, VARIANTS[name], *others)


def module_named(name: str) -> MatryoshkaTraining:
    return module_of(20, **recipe_of(name))


def test_no_option_is_missing_here() -> None:
    assert {*OPTIONS, *NUMBERS, *ALIKE} == {key.name for key in keys(Recipe)}


def options_of(variant: dict[str, Any]) -> dict[str, Any]:
    """The variant's options by their dotted keys; a mechanism by its name, the terms as one."""
    sparsity = variant.get("sparsity", "batch_topk")
    named = variant | {"sparsity": sparsity["name"] if isinstance(sparsity, dict) else sparsity}
    return {"objective.terms" if "terms" in key else key: value for key, value in flat(named).items()}


def test_every_option_is_in_two_variants_at_least() -> None:
    defaults = flat(as_plain(decode(Recipe, recipe_of("the published recipe"))))
    variants = [options_of(variant) for variant in VARIANTS.values()]
    for option, values in OPTIONS.items():
        counts = Counter(str((defaults | variant)[option]) for variant in variants)
        assert [value for value in values if counts[str(value)] < 2] == [], option
    assert sum(isinstance(variant.get("objective.reduction"), list) for variant in variants) >= 2
    for option in NUMBERS:
        assert sum(option in variant for variant in variants) >= 2, option
    forbidden = {("topk", "free"), ("topk", "unit_norm_before_step")}
    pairs = {(s, d) for s in OPTIONS["sparsity"][:5] for d in OPTIONS["decoder"]} - forbidden
    assert pairs <= {(variant["sparsity"], variant.get("decoder", "unit_norm")) for variant in variants}
    for sparsity, decoder in forbidden:
        with pytest.raises(ValueError, match="cannot be exported"):
            module_of(4, 6, [6], 2, sparsity=sparsity, decoder=decoder)


# --- gradients --------------------------------------------------------------------------------------------------------


class Example:
    """A variant away from its start, in float64, on rows of which some latents are dead for AuxK."""

    def __init__(self, name: str, n: int = 40, other: dict[str, Any] | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        recipe = recipe_of(name, other or {})
        if isinstance(recipe.get("sparsity"), dict) and "bandwidth" in recipe["sparsity"]:
            recipe["sparsity"] = recipe["sparsity"] | {"bandwidth": 0.5}
        step = module_of(5, **recipe).step().double()
        self.sae, self.objective, self.widths = step.sae, step.recipe.objective, step.prefixes(3)
        d_out = self.sae.d_out
        self.x = 3 * torch.randn(n, 5, generator=generator, dtype=torch.float64) + 1
        self.y = torch.randn(n, d_out, generator=generator, dtype=torch.float64) - 2 if d_out != 5 else self.x
        self.sae.set_statistics(*moments(self.x), normalise=step.recipe.normalise, target=moments(self.y))
        with torch.no_grad():
            for parameter in self.sae.parameters():
                if parameter.requires_grad:
                    move = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(0.1 * parameter.abs().mean() * move + 0.05 * move)
            if self.sae.sparsity.threshold_is == "learned":
                self.sae.threshold.abs_()
        self.dead = torch.arange(D_SAE) % 5 == 3

    def loss(self, **other: Any):
        torch.manual_seed(0)  # orthogonality deals its chunks
        options = {"prefixes": self.widths, "sparsity_weight": 0.2} | other
        return matryoshka_loss(self.sae, self.x, self.objective, self.dead, self.y, **options)


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
    if sae.sparsity.threshold_is == "learned":
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
    x, y = (example.x - sae.mean) * sae.scale, (example.y - sae.target_mean) * sae.target_scale
    norm = sae.W_dec.norm(dim=1)
    W_dec = sae.W_dec / norm[:, None] if sae.rescale_acts_by_decoder_norm else sae.W_dec
    pre = (x - sae.b_dec if sae.apply_b_dec_to_input else x) @ sae.W_enc + sae.b_enc
    pre = pre * norm if sae.rescale_acts_by_decoder_norm else pre
    sparsity, threshold = sae.sparsity.name, sae.threshold.detach()
    if sparsity in ("batch_topk", "halves"):
        parts = pre.chunk(2) if sparsity == "halves" else [pre]
        active = torch.cat([p >= p.flatten().sort(descending=True).values[K * len(p) - 1] for p in parts])
    elif sparsity == "topk":
        active = pre >= pre.sort(dim=1, descending=True).values[:, K - 1 : K]
    else:
        active = pre > (threshold if sparsity in ("jumprelu", "soft") else 0)
    acts = torch.where(active & (pre > 0), pre - (threshold if sparsity == "soft" else 0), 0.0)
    residual = y - (acts @ W_dec + sae.b_dec)
    share = 1 / sae.d_out if objective.error == "mean" else 1.0
    total = residual.square().sum(1).mean() * share
    paid = acts if sae.rescale_acts_by_decoder_norm else acts * norm
    if sparsity == "l1":
        total = total + weight * paid.sum(1).mean()
    elif sparsity == "log":
        total = total + weight * (torch.log(paid + 0.1) - math.log(0.1)).sum(1).mean()
    elif sparsity == "soft":
        total = total + weight * paid.square().sum(1).mean()
    elif sparsity == "jumprelu":
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
    if weight_of_term := objective.terms.get("orthogonality"):
        cosine = (normalize(sae.W_dec, dim=1) @ normalize(sae.W_dec, dim=1).T).fill_diagonal_(0)
        total = total + weight_of_term * cosine.square().amax(1).mean()
    return total


@variants
def test_with_one_prefix_every_variant_is_a_vanilla_sae(name) -> None:
    kind = "random" if flat(VARIANTS[name]).get("sampling.kind") == "random" else "fixed"
    reduction = flat(VARIANTS[name]).get("objective.reduction", "sum")
    objective = {"bias_level": False, "balance": 1.0, "reduction": [1.0] if isinstance(reduction, list) else reduction}
    one = {"prefixes": [D_SAE], "sampling": {"kind": kind, "n_prefixes": 1}, "objective": objective}
    example = Example(name, other=one)
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

    hook_names: ClassVar[list[str]] = ["synthetic", "of 7", "of 24"]

    def width(self, hook_name: str = "synthetic") -> int:
        return {"of 7": 7, "of 24": 24}.get(hook_name, 20)

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
        if module.sae.sparsity.threshold_is == "calibrated":
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


class Run:
    """One variant, trained as a run does: from the statistics of the shards to the exported directory."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        d_out = VARIANTS[name].get("d_out")
        source = Noisy(rows=6000, val_rows=VAL_ROWS, chunk_rows=3000)
        target = None if d_out is None else f"of {d_out}"
        self.data = Activations(Data(source, BATCH, str(root / "shards"), target_hook_name=target))
        self.rows = self.data.shards.activations("val", 0)
        run = RunDirectory(root / name.replace(" ", "_"))
        self.half, self.exported_to = run.path / "half.ckpt", run.sae_directory
        self.watch = Watch(self.rows[:1000], self.half)
        self.module = self.new()
        self.trainer = self.fit(self.module, [self.watch])
        self.state = everything(self.trainer, self.module)
        self.trained = copy.deepcopy(self.module.sae)  # before `export` folds and calibrates it
        self.metrics = export(self.module.step(), self.data, run, Evaluation(0, VAL_ROWS))

    def new(self) -> MatryoshkaTraining:
        made, shards, target = module_named(self.name), self.data.shards, self.data.target
        of_target = None if target is None else (target.mean, target.mean_square)
        first = TrainBatches(target or shards, BATCH, 1, 0).batch(0)
        made.step().start_from((shards.mean, shards.mean_square), of_target, first)
        return made

    def fit(self, module: MatryoshkaTraining, callbacks: list[L.Callback], checkpoint: Path | None = None) -> L.Trainer:
        trainer = trainer_of(
            STEPS,
            val_check_interval=STEPS // 2,
            check_val_every_n_epoch=None,
            limit_val_batches=2,
            log_every_n_steps=30,
            logger=DummyLogger(),
            callbacks=callbacks,
        )
        torch.manual_seed(0)
        trainer.fit(module, datamodule=ActivationData(self.data), ckpt_path=checkpoint, weights_only=True)
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
    if sae.sparsity.name in ("batch_topk", "topk", "halves"):
        assert selected == pytest.approx(K, rel=0.01)
    else:
        assert inferred == selected


@variants
def test_inference_selects_the_latents_that_training_selects(name, trained) -> None:
    """`export` folds decoder norms in: that must not change which latents are the largest."""
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
    if sae.sparsity.name in ("batch_topk", "topk", "halves"):
        assert 0 < watch.first_l0 < 2 * K < D_SAE / 2
    else:  # a ReLU at its start: about half of all, and no other number than training's
        assert watch.first_l0 == watch.first_selected < 0.75 * D_SAE


@variants
def test_a_trained_variant_is_saved_and_loaded_in_every_bit(name, trained, tmp_path) -> None:
    run = trained(name)
    sae, loaded, x = run.module.sae, load_sae(run.exported_to), run.rows[:500]
    folded = folded_copy(sae, rescaled=loaded.rescale_acts_by_decoder_norm)
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
    loaded = MatryoshkaTraining.load_from_checkpoint(run.half, weights_only=True)
    assert loaded.hparams == run.module.hparams
    at_half = {key: tensor for key, tensor in run.watch.at_half.items() if not key.startswith("adam/")}
    assert differing(dict(loaded.state_dict()), at_half) == []
    assert differing(at_half, {key: run.state[key] for key in at_half}) != []

    resumed = module_named(name)
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


# --- a mechanism of one's own: one class, nothing else ----------------------------------------------------------------


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_mechanism_that_says_how_is_computed_by_sparse_work(rescaled) -> None:
    generator = torch.Generator().manual_seed(3)
    sae = MatryoshkaSAE(
        20, 256, [16, 256], 4, sparsity={"name": "soft", "start": 2.0}, rescale_acts_by_decoder_norm=rescaled
    )
    x = torch.randn(64, 20, generator=generator)
    gradients = []
    for kernels, kind in (("dense", DenseCode), ("plain", TrainingCode)):
        code = encode_for_training(sae, x, kernels)
        assert type(code) is kind
        loss = matryoshka_loss(sae, x, Objective(balance=0.5), code=code, sparsity_weight=0.3)
        gradients.append((loss.total, *torch.autograd.grad(loss.total, list(sae.parameters()))))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert len(encode_sparse(sae, x, "plain").acts) > 0
    torch.testing.assert_close(encode_sparse(sae, x, "plain").dense(), sae.encode(x), rtol=1e-5, atol=1e-6)


def test_a_mechanism_that_does_not_is_computed_densely() -> None:
    sae = MatryoshkaSAE(20, 256, [16, 256], 4, sparsity="halves")
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(3))
    assert type(encode_for_training(sae, x, "plain")) is DenseCode
    assert not torch.equal(encode_for_training(sae, x).acts, batch_topk(sae.pre(x), 4))


def test_a_mechanism_is_exported_or_refused_in_one_line(trained, tmp_path) -> None:
    run = trained("a mechanism of one's own")
    halves, soft = load_sae(run.exported_to), load_sae(trained("another with settings").exported_to)
    exported = load(dictionary_learning.save(halves, tmp_path / "halves"))  # a threshold is all that it needs
    torch.testing.assert_close(exported.encode(run.rows[:500]), halves.encode(run.rows[:500]))
    for save, name in ((saelens.save_training, "training"), (sparsify.save, "sparsify")):
        with pytest.raises(ValueError, match=r"^[^\n]*sparsity=halves[^\n]*$"):
            save(halves, tmp_path / name)
    with pytest.raises(ValueError, match=r"^dictionary_learning has no soft SAEs[^\n]*$"):
        dictionary_learning.save(soft, tmp_path / "soft")
