"""Mistakes that implementations of sparse autoencoders have made and that only training shows.

A `check` states what must hold: it passes with the code as it is, and fails with the mistake put in. Mistakes inside a
function are found by the tests of that function.
"""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import msae.training.step
from msae.training.module import MatryoshkaTraining
from tests.test_model import rows, same
from tests.training import differing, merged, module_of, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
D_IN, D_SAE, K = 6, 16, 3


@pytest.fixture
def guards(monkeypatch):
    """The check passes, and fails as soon as what `owner` has under this name is the mistaken one."""

    def of(check: Callable[..., None], owner: Any, name: str, mistaken: Any, *arguments: object) -> None:
        check(*arguments)
        monkeypatch.setattr(owner, name, mistaken)
        with pytest.raises(AssertionError):
            check(*arguments)

    return of


def started(prefixes: list[int], **recipe: Any) -> MatryoshkaTraining:
    quick = {"schedule": {"warmup_steps": 2}, "lr": 1e-2, "dead": {"after_tokens": 100}}
    module = module_of(D_IN, D_SAE, prefixes, K, **merged(quick, recipe))
    x = rows(5000, D_IN, dtype=torch.float32)
    module.step().start_from((x.mean(0), float(x.square().sum(1).mean())))
    return module


def fit(module: MatryoshkaTraining, steps: int, **options: Any) -> MatryoshkaTraining:
    trainer_of(steps, **options).fit(module, batches(steps))
    return module


def batches(n: int) -> DataLoader[Tensor]:
    return DataLoader(rows(n * 8, D_IN, 2), batch_size=8)  # type: ignore[arg-type]


# --- latents are sorted, what belongs to them is not ------------------------------------------------------------


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


PERMUTE = msae.training.step.permute


def check_sorting_changes_the_order_alone() -> None:
    """With one prefix the order says nothing: a sorted run has the losses and, in another order, the state of any."""
    losses, saes = [], []
    for is_sorted in (True, False):
        seen, dead = Losses(), {"after_tokens": 20}
        with pytest.MonkeyPatch.context() as patch:
            if not is_sorted:  # how much latents are used is measured, and they stay where they are
                patch.setattr(msae.training.step, "permute", lambda *_: None)
            module = started([D_SAE], resort_rate=0.5, dead=dead)
            saes.append(fit(module, 30, precision="64-true", callbacks=[seen]).sae)
        losses.append(seen.values)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    torch.testing.assert_close(saes[0].use, saes[1].use.sort(descending=True).values)
    assert torch.equal(saes[0].tokens_since_fired.sort().values, saes[1].tokens_since_fired.sort().values)
    order = saes[1].use.argsort(descending=True)
    torch.testing.assert_close(saes[0].W_dec, saes[1].W_dec[order])
    assert not torch.equal(order, torch.arange(D_SAE))


def leaves_adam(sae, order, optimizer=None) -> None:
    PERMUTE(sae, order)


def leaves(name: str):
    def mistaken(sae, order, optimizer=None) -> None:
        before = getattr(sae, name).clone()
        PERMUTE(sae, order, optimizer)
        getattr(sae, name).copy_(before)

    return mistaken


@pytest.mark.parametrize(
    "mistaken", [leaves_adam, leaves("use"), leaves("tokens_since_fired")], ids=["adam", "ema", "counters"]
)
def test_sorting_moves_the_optimizer_state_the_ema_and_the_counters(mistaken, guards) -> None:
    guards(check_sorting_changes_the_order_alone, msae.training.step, "permute", mistaken)


# --- a threshold in bf16 stands still ---------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["batch_topk", {"name": "jumprelu", "bandwidth": 0.5}], ids=["topk", "jumprelu"])
def test_training_in_mixed_precision_keeps_thresholds_and_averages_exact(sparsity) -> None:
    module = started([4, D_SAE], sparsity=sparsity, resort_rate=0.1)
    sae = fit(module, 20, precision="bf16-mixed").sae
    exact, before = ("threshold", "threshold_ema", "use", "scale"), started([4, D_SAE], sparsity=sparsity).sae
    assert {getattr(sae, name).dtype for name in exact} == {torch.float32}
    assert not same(sae.threshold.detach(), before.threshold.detach())
    as_bfloat16 = sae.threshold.detach().bfloat16().float()
    assert not torch.equal(as_bfloat16, sae.threshold.detach())  # more digits than bf16 has


# --- evaluating changes what is evaluated -----------------------------------------------------------------------


def check_validating_moves_nothing() -> None:
    module = fit(started([4, D_SAE], resort_rate=0.1), 3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer_of(1).validate(module, batches(3), verbose=False)
    assert differing(dict(module.state_dict()), before) == []


def moves_the_threshold(self, batch, batch_idx) -> None:
    self.sae.update_threshold(self.sae.select(self.sae.pre(batch.float())), 0.1)


def moves_the_counters(self, batch, batch_idx) -> None:
    self.sae.update_fired((self.sae.encode(batch.float()) > 0).sum(0), len(batch))


@pytest.mark.parametrize("mistaken", [moves_the_threshold, moves_the_counters])
def test_validating_moves_nothing(mistaken, guards) -> None:
    step = MatryoshkaTraining.validation_step

    def validates(self, *batch) -> None:
        mistaken(self, *batch)
        step(self, *batch)

    guards(check_validating_moves_nothing, MatryoshkaTraining, "validation_step", validates)
