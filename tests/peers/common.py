"""What the parity tests share."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from msae.config import compose
from msae.sae import Loss, matryoshka_loss
from msae.training.module import MatryoshkaTraining

D_IN, D_SAE, PREFIXES, K, BATCH = 16, 48, [8, 20, 48], 4, 64
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
DTYPES = sorted(TOLERANCE, key=str)


def preset(name: str, dtype: torch.dtype = torch.float32, **changed: Any) -> MatryoshkaTraining:
    """The module of a preset at this size, with `changed` keys of the model."""
    sizes = {"d_sae": D_SAE, "prefixes": PREFIXES, "k": K} | changed
    cfg = compose("train", [f"preset={name}"]).model
    return instantiate(cfg, d_in=D_IN, **sizes).to(dtype)


def rows(n: int = BATCH, seed: int = 1, dtype: torch.dtype = torch.float32, d: int = D_IN) -> Tensor:
    """Activations with a mean and with directions of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, d)
    return (x + torch.linspace(-1, 1, d)).to(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(rows(steps * BATCH, dtype=dtype).split(BATCH))


def randomise(sae: nn.Module, seed: int = 0, names: Sequence[str] = WEIGHTS) -> None:
    """No bias zero, no row of unit norm, W_enc not W_decᵀ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            weight = getattr(sae, name)
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 3)


def share(ours: nn.Module, theirs: nn.Module, names: Sequence[str] = WEIGHTS) -> None:
    """Give them our weights."""
    with torch.no_grad():
        for name in names:
            getattr(theirs, name).copy_(getattr(ours, name))


def weights(sae: nn.Module, names: Sequence[str] = WEIGHTS) -> dict[str, Tensor]:
    return {name: getattr(sae, name).detach().clone() for name in names}


def gradients(loss: Tensor, sae: nn.Module, names: Sequence[str] = WEIGHTS) -> dict[str, Tensor]:
    loss.backward()
    return {"loss": loss.detach()} | {name: getattr(sae, name).grad for name in names}


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    """‖ours − theirs‖ ≤ tolerance · ‖theirs‖ for every tensor."""
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        a, b = ours[name].double(), wanted.double()
        difference = float((a - b).norm()) / (float(b.norm()) or 1.0)
        assert difference <= tolerance, f"{name} differs by {difference:.2e} of its norm"


class Record(L.Callback):
    """The losses and the weights after every step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.weights: list[dict[str, Tensor]] = []
        self.aux: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        self.weights.append(weights(module.sae))


def train_ours(
    module: MatryoshkaTraining,
    batches: Sequence[Any],
    monkeypatch: pytest.MonkeyPatch | None = None,
) -> Record:
    """One step of a real Trainer for every batch."""
    record = Record()
    if monkeypatch is not None:  # to see whether AuxK was on

        def loss(*args: Any, **kwargs: Any) -> Loss:
            found = matryoshka_loss(*args, **kwargs)
            record.aux.append(float(found.aux))
            return found

        monkeypatch.setattr("msae.training.module.matryoshka_loss", loss)
    L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=len(batches),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
    ).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return record


def assert_same_training(
    ours: Record,
    theirs: Sequence[tuple[Tensor, dict[str, Tensor]]],
    start: Mapping[str, Tensor],
    tolerance: float,
    of_change: float,
) -> None:
    """Loss and weights after every step; what training changed is compared by itself, more loosely."""
    assert len(ours.losses) == len(theirs) >= 20
    for loss, after, (their_loss, their_after) in zip(ours.losses, ours.weights, theirs, strict=True):
        assert_close({"loss": loss} | after, {"loss": their_loss} | their_after, tolerance)
    last, their_last = ours.weights[-1], theirs[-1][1]
    change = {name: last[name] - start[name] for name in start}
    assert_close(change, {name: their_last[name] - start[name] for name in start}, of_change)
