"""Training modules and quiet trainers for tests."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from msae.training.module import MatryoshkaTraining
from tests.test_model import same

QUICK = {"lr": 1e-2, "schedule": {"warmup_steps": 5}, "dead": {"after_tokens": 1000}}


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """The trees, later ones over earlier ones, group by group; a mechanism with its name is one value."""
    out: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            is_group = isinstance(value, dict) and isinstance(out.get(key), dict) and "name" not in value
            out[key] = merged(out[key], value) if is_group else value
    return out


def module_of(d_in: int, d_sae: int, prefixes: list[int], k: float, **recipe: Any) -> MatryoshkaTraining:
    """The module of one SAE; `recipe`: further keys of `model` as a plain tree, such as objective={"balance": 0.5}."""
    return MatryoshkaTraining({"": {"d_in": d_in, "d_sae": d_sae, "prefixes": prefixes, "k": k, **recipe}})


def trainer_of(steps: int, **options: Any) -> L.Trainer:
    """A trainer of one CPU process that shows nothing, and keeps nothing unless `options` say so."""
    quiet: dict[str, Any] = {
        **{"accelerator": "cpu", "devices": 1, "max_epochs": -1, "num_sanity_val_steps": 0, "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
        "use_distributed_sampler": False,
    }
    return L.Trainer(max_steps=steps, **quiet | options)


def everything(trainer: L.Trainer, module: MatryoshkaTraining) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state, by name."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return state | adam_state(trainer.optimizers[0].state_dict())


def adam_state(joint: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of what the only arm's optimizer keeps of each parameter."""
    return {
        f"adam/{i}/{name}": torch.as_tensor(value).clone()
        for i, of_parameter in joint["arms"][0]["state"].items()
        for name, value in of_parameter.items()
    }


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that are not the same in every bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not same(a[name], b[name])]
