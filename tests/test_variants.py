"""Every option of training, in company: gradients, the loss in its plainest form, training, selection, files, resuming.

One list of variants holds every sparsity with every decoder it is allowed, every other option at least twice, and two
mechanisms that are defined here alone, each in one class.
"""

import copy
import math
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.nn.functional import normalize

from msae.data.activations import Activations, Data
from msae.data.batches import sample
from msae.data.datamodule import ActivationData
from msae.evaluation.evaluate import Evaluation
from msae.interop import dictionary_learning, load, saelens, sparsify
from msae.runs import Run as RunDirectory
from msae.runs import flat
from msae.sae import Objective, Sparsity, batch_topk, load_sae, matryoshka_loss, save_sae
from msae.sae.sparsity import Entries, Screen
from msae.seeds import stream
from msae.settings import NonNegative, as_plain, decode, keys, settings
from msae.sources.forest import ForestSource
from msae.sources.source import Chunk, Split
from msae.training.job import export
from msae.training.module import MatryoshkaTraining
from msae.training.settings import Recipe
from tests.sources import ready
from tests.test_model import SPARSITIES
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
            "reduction": LISTED, "terms": {"orthogonality": 0.1}, "aux": {"scale_by_dead": True, "k": 8},
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
ALIKE = {  # one value is enough
    "kernels", "d_in", "d_sae", "prefixes", "k", "seed", "dead.after_tokens", "schedule.warmup_steps",
    "schedule.decay_start", "adam.grad_clip",
}  # fmt: skip


def recipe_of(name: str) -> dict[str, Any]:
    base = {"d_sae": D_SAE, "prefixes": PREFIXES, "k": K, "lr": 1e-2}
    return merged(base, {"schedule": {"warmup_steps": 5}, "dead": {"after_tokens": 500}}, VARIANTS[name])


def module_named(name: str) -> MatryoshkaTraining:
    return module_of(20, **recipe_of(name))


def options_of(variant: dict[str, Any]) -> dict[str, Any]:
    """The variant's options by their dotted keys; a mechanism by its name, the terms as one."""
    sparsity = variant.get("sparsity", "batch_topk")
    named = variant | {"sparsity": sparsity["name"] if isinstance(sparsity, dict) else sparsity}
    return {"objective.terms" if "terms" in key else key: value for key, value in flat(named).items()}


def test_every_choice_and_every_number_is_in_two_variants_at_least() -> None:
    defaults = flat(as_plain(decode(Recipe, recipe_of("the published recipe"))))
    variants = [options_of(variant) for variant in VARIANTS.values()]
    options = {key.name: key.expected.split(" | ") for key in keys(Recipe) if key.name not in ALIKE}
    for option, expected in (options | {"sparsity": [*SPARSITIES, "halves", "soft"]}).items():
        counts = Counter(str((defaults | variant)[option]).lower() for variant in variants)
        choices = [word for word in expected if word.isidentifier() and word != "null"]
        assert [choice for choice in choices if counts[choice] < 2] == [], option
        assert choices or sum(option in variant for variant in variants) >= 2, option
    assert sum(isinstance(variant.get("objective.reduction"), list) for variant in variants) >= 2
    forbidden = {("topk", "free"), ("topk", "unit_norm_before_step")}
    pairs = set(product(SPARSITIES, options["decoder"])) - forbidden
    assert pairs <= {(variant["sparsity"], variant.get("decoder", "unit_norm")) for variant in variants}
    for sparsity, decoder in forbidden:
        with pytest.raises(ValueError, match="cannot be exported"):
            module_of(4, 6, [6], 2, sparsity=sparsity, decoder=decoder)


# --- the objective written out ----------------------------------------------------------------------------------------


class Example:
    """A variant away from its start, in float64, on rows of which some latents are dead for AuxK."""

    def __init__(self, name: str, n: int) -> None:
        generator = torch.Generator().manual_seed(7)
        recipe = recipe_of(name)
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


def moments(x: Tensor) -> tuple[Tensor, float]:
    return x.mean(0), float(x.square().sum(1).mean())


def active_latents(example: Example, pre: Tensor) -> Tensor:
    """Bool [n, d_sae], by sorting or by the threshold."""
    sparsity, threshold = example.sae.sparsity.name, example.sae.threshold.detach()
    if sparsity in ("batch_topk", "halves"):
        parts = pre.chunk(2) if sparsity == "halves" else [pre]
        kept = torch.cat([p >= p.flatten().sort(descending=True).values[K * len(p) - 1] for p in parts])
    elif sparsity == "topk":
        kept = pre >= pre.sort(dim=1, descending=True).values[:, K - 1 : K]
    else:
        kept = pre > (threshold if sparsity in ("jumprelu", "soft") else 0)
    return kept & (pre > 0)


def auxk(objective: Objective, pre: Tensor, residual: Tensor, dead: Tensor, W_dec: Tensor, share: float) -> Tensor:
    """AuxK of the dead among all latents: the k largest of each row reconstruct the residual."""
    aux, n_dead = objective.aux, int(dead.sum())
    k = aux.k or max(1, W_dec.shape[1] // 2)
    bar = torch.where(dead, pre, -torch.inf).sort(dim=1, descending=True).values[:, min(k, n_dead) - 1, None]
    acts = torch.where(dead & (pre >= bar), pre.relu() if aux.relu else pre, 0.0)
    constant = residual.detach()
    scale = {
        "energy": constant.square().sum(1).mean(),
        "variance": (constant - constant.mean(0)).square().sum(1).mean(),
        "none": 1 / share,
    }[aux.normalise]
    error = ((constant if aux.detach else residual) - acts @ W_dec).square().sum(1).mean() / scale
    return error * (min(n_dead / k, 1) if aux.scale_by_dead else 1)


def written_out(example: Example) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """The errors of all levels and their weights; penalty, AuxK and orthogonality."""
    sae, objective = example.sae, example.objective
    x, y = (example.x - sae.mean) * sae.scale, (example.y - sae.target_mean) * sae.target_scale
    norm = sae.W_dec.norm(dim=1)
    W_dec = sae.W_dec / norm[:, None] if sae.rescale_acts_by_decoder_norm else sae.W_dec
    pre = (x - sae.b_dec if sae.apply_b_dec_to_input else x) @ sae.W_enc + sae.b_enc
    pre = pre * norm if sae.rescale_acts_by_decoder_norm else pre
    active, sparsity = active_latents(example, pre), sae.sparsity.name
    acts = torch.where(active, pre - (sae.threshold.detach() if sparsity == "soft" else 0), 0.0)

    widths = [0] * objective.bias_level + [*(range(1, D_SAE + 1) if example.widths == "every" else example.widths)]
    n, reduction = len(widths), objective.reduction
    powers = {"sum": 0, "mean": 1, "mean_twice": 2}
    weights = reduction if isinstance(reduction, list) else [n ** -powers[reduction]] * n
    weights = [w * objective.balance ** (n - 1 - i) for i, w in enumerate(weights)]
    share = 1 / sae.d_out if objective.error == "mean" else 1.0
    residuals = []
    for inner, width in pairwise([0, *widths]):
        recon = acts[:, :inner] @ W_dec[:inner] + sae.b_dec
        recon = recon.detach() if objective.stop_gradient and residuals else recon
        residuals.append(y - recon - acts[:, inner:width] @ W_dec[inner:width])
    errors = torch.stack([residual.square().sum(1).mean() * share for residual in residuals])

    length = acts if sae.rescale_acts_by_decoder_norm else acts * norm
    phi = {"l1": length, "log": torch.log((length + 0.1) / 0.1)}.get(sparsity, torch.zeros_like(acts))
    penalty = sum(w * phi[:, :m].sum(1).mean() for w, m in zip(weights, widths, strict=True))
    if sparsity == "soft":
        penalty = length.square().sum(1).mean()
    elif sparsity == "jumprelu":
        penalty = (2 / K * (active.sum(1).double() - K).square()).mean()
    groups = pairwise([0, *widths]) if objective.aux.per_level else [(0, D_SAE)]
    latents, aux = torch.arange(D_SAE), torch.zeros(())
    for (start, stop), residual in zip(groups, residuals if objective.aux.per_level else residuals[-1:], strict=True):
        dead = example.dead & (latents >= start) & (latents < stop)
        aux = aux + auxk(objective, pre, residual, dead, W_dec, share) if dead.any() else aux
    cosine = (normalize(sae.W_dec, dim=1) @ normalize(sae.W_dec, dim=1).T).fill_diagonal_(0)
    return errors, torch.tensor(weights, dtype=torch.float64), penalty, aux, cosine.square().amax(1).mean()


@variants
def test_every_variant_has_the_loss_and_gradients_of_the_objective_written_out(name) -> None:
    """But for the straight-through gradients of a learned threshold, which are none of the loss's."""
    example = Example(name, n=300)  # more than every width at once takes together
    sae, objective = example.sae, example.objective
    torch.manual_seed(0)
    loss = matryoshka_loss(sae, example.x, objective, example.dead, example.y, example.widths, sparsity_weight=0.2)
    errors, weights, penalty, aux, orthogonality = written_out(example)
    total = weights @ errors + 0.2 * penalty + objective.aux.coefficient * aux
    total = total + objective.terms.get("orthogonality", 0) * orthogonality
    levels = (weights @ errors)[None] if example.widths == "every" else errors
    parts = {"levels": levels, "sparsity": penalty, "aux": aux if objective.aux.coefficient else torch.zeros(())}
    for part, expected in (parts | {"total": total}).items():
        torch.testing.assert_close(getattr(loss, part).double(), expected.double(), rtol=1e-9, atol=0, msg=part)
    assert loss.terms == (pytest.approx({"orthogonality": float(orthogonality)}) if objective.terms else {})
    trained = [p for n, p in sae.named_parameters() if p.requires_grad and n != "threshold"]
    expected = torch.autograd.grad(total, trained)
    assert all(gradient.any() for gradient in expected)
    torch.testing.assert_close(torch.autograd.grad(loss.total, trained), expected, rtol=1e-9, atol=1e-11)


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
            for split, make in chunk.splits.items():
                noise = stream(self.seed, "noise", split, chunk.state["chunks"])
                x = make().activations["synthetic"]
                x = x + 0.1 * torch.randn(x.shape, generator=noise)
                made = 2 + x @ torch.randn(20, 24, generator=stream(self.seed, "map"))
                splits[split] = Split({"synthetic": x, "of 7": made[:, :7], "of 24": made})
            yield Chunk(ready(splits), chunk.state)


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
        self.rows = self.data.rows.activations("val", 0)
        run = RunDirectory(root / name.replace(" ", "_"))
        self.half, self.exported_to = run.path / "half.ckpt", run.sae_directory
        self.watch = Watch(self.rows[:1000], self.half)
        self.module = self.new()
        self.trainer = self.fit(self.module, [self.watch])
        self.state = everything(self.trainer, self.module)
        self.trained = copy.deepcopy(self.module.sae)  # before `export` folds and calibrates it
        self.metrics = export(self.module.step(), self.data, run, Evaluation(0, VAL_ROWS))

    def new(self) -> MatryoshkaTraining:
        made, shards, target = module_named(self.name), self.data.rows, self.data.target
        of_target = None if target is None else (target.mean, target.mean_square)
        first = sample(target or shards, BATCH, 0)
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
def test_inference_selects_the_latents_that_training_selects(name, trained) -> None:
    """`export` folds decoder norms in: that must not change which latents are the largest."""
    run = trained(name)
    x = run.rows[VAL_ROWS // 2 :]
    by_training, by_inference = run.trained.select(run.trained.pre(x)), run.module.sae.encode(x)
    both, either = ((by_training > 0) & (by_inference > 0)).sum(), ((by_training > 0) | (by_inference > 0)).sum()
    assert both > 0.97 * either
    assert l0(by_inference) == pytest.approx(run.metrics[f"val/l0/p{D_SAE}"], rel=1e-3)  # of what was exported
    if run.trained.sparsity.name in ("batch_topk", "topk", "halves"):
        assert l0(by_training) == pytest.approx(K, rel=0.01)
    assert run.metrics["train/k"] == K


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
def test_a_trained_variant_is_saved_in_raw_units_and_again_in_every_bit(name, trained, tmp_path) -> None:
    run = trained(name)
    sae, loaded, x = run.module.sae, load_sae(run.exported_to), run.rows[:500]
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
