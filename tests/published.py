"""Ours beside a published implementation: presets at a small size, data, gradients, and a training to compare."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from msae.cli.command import compose, plain
from msae.sae import Loss, matryoshka_loss
from msae.training.module import MatryoshkaTraining
from msae.training.step import StepBatch
from tests.training import merged, module_of, trainer_of

D_IN, D_SAE, PREFIXES, K, BATCH, STEPS = 16, 48, [8, 20, 48], 4, 64, 25
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def preset(name: str, dtype: torch.dtype = torch.float64, **changed: Any) -> MatryoshkaTraining:
    """The module of a preset at this size, with `changed` keys of the model."""
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "prefixes": PREFIXES, "k": K}
    model = plain(compose("train", [f"preset={name}"]))["model"]
    return module_of(**merged(model, sizes, changed)).to(dtype)


def rows(n: int = BATCH, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Activations with a mean and with directions of unlike size."""
    x = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * torch.linspace(0.5, 2, D_IN) + torch.linspace(-1, 1, D_IN)).to(dtype)


def batches(steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return list(rows(steps * BATCH, dtype=dtype).split(BATCH))


def statistics(data: Sequence[Tensor]) -> tuple[Tensor, float]:
    """E x and E‖x‖²."""
    x = torch.cat(list(data)).double()
    return x.mean(0), float(x.square().sum(1).mean())


def randomise(sae: nn.Module, seed: int = 0) -> None:
    """No trained bias zero, no row of unit norm, W_enc not W_decᵀ."""
    generator = torch.Generator().manual_seed(seed)
    for name in WEIGHTS:
        weight = getattr(sae, name)
        if weight.requires_grad:
            weight.data = (torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 3).to(weight)


def share(ours: nn.Module, theirs: nn.Module, *more: str) -> None:
    """Give them our weights."""
    with torch.no_grad():
        for name in (*WEIGHTS, *more):
            getattr(theirs, name).copy_(getattr(ours, name))


def weights(sae: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(sae, name).detach().clone() for name in WEIGHTS}


def loss_of(module: MatryoshkaTraining, x: Tensor, dead: Tensor | None = None, **options: Any) -> Loss:
    """The loss of a batch by the module's objective."""
    return matryoshka_loss(module.sae, x.to(module.sae.W_dec), module.step().recipe.objective, dead, **options)


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    """‖ours − theirs‖ ≤ tolerance · ‖theirs‖ for every tensor."""
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        difference = float((ours[name].double() - b.double()).norm()) / (float(b.double().norm()) or 1.0)
        assert difference <= tolerance, f"{name} differs by {difference:.2e} of its norm"


def gradients(loss: Tensor, sae: nn.Module, *more: str) -> dict[str, Tensor]:
    """The loss, and its gradient for every weight that is trained."""
    loss.backward()
    trained = [name for name in (*WEIGHTS, *more) if getattr(sae, name).requires_grad]
    return {"loss": loss.detach()} | {name: getattr(sae, name).grad for name in trained}


def assert_same_loss(
    ours: Loss, sae: nn.Module, theirs: Tensor, their_sae: nn.Module, *more: str, tolerance: float | None = None
) -> None:
    """The same loss and, of every weight, the same gradient, which is none that is zero."""
    expected = gradients(theirs, their_sae, *more)
    assert all(gradient.any() for gradient in expected.values())
    assert_close(gradients(ours.total, sae, *more), expected, tolerance or TOLERANCE[sae.W_dec.dtype])


class Record(L.Callback):
    """The loss and the weights after every step, and AuxK's part of the loss."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.aux: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.steps.append((outputs["loss"].detach().clone(), weights(module.sae)))


def train(module: MatryoshkaTraining, data: Sequence[Any]) -> Record:
    """One step of a real Trainer for every batch."""
    record, step = Record(), module.step()
    loss = step.loss

    def loss_and_record(*arguments: Any) -> StepBatch:
        batch = loss(*arguments)
        record.aux.append(float(batch.loss.aux))
        return batch

    step.loss = loss_and_record
    trainer_of(len(data), callbacks=[record]).fit(module, DataLoader(data, batch_size=None))
    return record


def assert_same_training(
    ours: Record,
    theirs: Sequence[tuple[Tensor, dict[str, Tensor]]],
    start: Mapping[str, Tensor],
    tolerance: float,
) -> None:
    """Loss and weights after every step; what training changed is compared by itself, 100 times more loosely."""
    assert len(ours.steps) == len(theirs) == STEPS
    for (loss, after), (their_loss, their_after) in zip(ours.steps, theirs, strict=True):
        assert_close({"loss": loss} | after, {"loss": their_loss} | their_after, tolerance)
    changes = ({name: steps[-1][1][name] - start[name] for name in start} for steps in (ours.steps, theirs))
    assert_close(*changes, 100 * tolerance)
