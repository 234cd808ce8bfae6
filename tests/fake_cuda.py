"""CUDA where there is none: tensors that say they lie on it and hold real ones, so that results are true.

Within `fake_cuda()` tensors get there as usual (`.to("cuda")`, `torch.zeros(…, device=…)`, `module.to(…)`), and what a
GPU refuses raises: an operator on tensors of both sides, `.numpy()`, a host tensor indexed by one of the device. A copy
to the host with `non_blocking` is garbage until something waits for its stream, as it may be on a GPU; `waits` has what
made the host wait. PyTorch's FakeTensorMode has no values, and without a GPU its tensors cannot be moved to one.

Not imitated: kernels, with their rounding and order of addition, and memory, pinned or not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

MAKERS = "arange as_tensor empty empty_like full linspace ones rand randn randperm tensor zeros"
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
SIZED_BY_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
late: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}  # copies to the host under way: into what, and what
waits: list[str] = []


class OnCuda(torch.Tensor):
    """A tensor that lies on the device `where`, and its values as a tensor of the host."""

    held: Tensor
    where: torch.device
    is_cuda, is_cpu = True, False  # type: ignore[assignment]
    device = property(lambda self: self.where)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor, where: torch.device) -> "OnCuda":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: OnCuda = torch.Tensor._make_wrapper_subclass(cls, held.size(), device="cpu", **layout)
        made.held, made.where = held, where
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnCuda({self.held})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.where} device type tensor to numpy")

    def cpu(self, **_: Any) -> Tensor:
        return move(self, "cpu")

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnCuda)}
        where, *others = {tensor.where for tensor in ours.values()}
        if others or not all(isinstance(tensor, OnCuda) or may_mix(func, args, tensor) for tensor in tensors):
            raise RuntimeError(f"{func} got tensors on {where} and elsewhere")
        is_mask = func._schema.name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if is_mask or (func._schema.name not in INDEXING and set(SIZED_BY_VALUES) & set(func.tags)):
            wait(where, str(func))
        result = func(*held_in(args), **held_in(kwargs or {}))
        if func._schema.name == "aten::copy_" and not isinstance(args[0], OnCuda):
            return args[0]
        # what was written in place is what was given
        return tree_map_only(Tensor, lambda t: ours[id(t)] if id(t) in ours else OnCuda(t, where), result)


def held_in(tree: Any) -> Any:
    """The tree with the values of its tensors."""
    return tree_map_only(OnCuda, lambda tensor: tensor.held, tree)


def may_mix(func: Any, args: Any, host: Tensor) -> bool:
    """Whether a GPU takes this tensor of the host beside its own: to copy, as an index, as a number."""
    name = func._schema.name
    if name == "aten::copy_":
        return True
    if name in INDEXING and isinstance(args[0], OnCuda):
        return host.ndim == 0 or any(index is host for index in args[1])
    is_target = func._schema.is_mutable and args[0] is host
    return host.ndim == 0 and torch.Tag.pointwise in func.tags and not is_target


def wait(where: torch.device, why: str, until: int | None = None) -> None:
    """The host waits for the device: copies that are under way arrive, or the first `until` of them."""
    waits.append(why)
    for target, values in late.get(where, [])[:until]:
        target.copy_(values)
    del late.get(where, [])[:until]


def move(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
    """The tensor on a device; itself if it is there, or no device is given."""
    device = tensor.device if device is None else torch.device(device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    if device == tensor.device:
        return tensor
    assert not (tensor.requires_grad and torch.is_grad_enabled()), "no gradient goes through here"
    values = held_in(tensor.detach()).clone()
    if not non_blocking:
        wait(device if device.type == "cuda" else tensor.device, f"to {device}")
    if device.type == "cuda":
        return OnCuda(values, device)
    if not non_blocking:
        return values
    garbage = torch.full_like(values, 77)
    late.setdefault(tensor.device, []).append((garbage, values))
    return garbage


def moves(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Tensor.to`, to a device too."""

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return to(move(self, device, non_blocking), dtype or self.dtype)

    return moved


def makes(maker: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of torch that makes a tensor, on a device too."""

    @wraps(maker)
    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return move(maker(*args, **kwargs), device, non_blocking=True)

    return made


class Event:
    """`torch.cuda.Event`: what was under way on a stream when it was recorded."""

    def record(self, stream: Any = None) -> None:
        self.device = (stream or torch.cuda.current_stream()).device
        self.until = len(late.get(self.device, []))

    def synchronize(self) -> None:
        wait(self.device, "event", self.until)


@contextmanager
def fake_cuda(current: int = 0) -> Iterator[torch.device]:
    """For a while there are CUDA devices, of which one is the current one."""

    def stream(device: Any = None) -> Any:
        return SimpleNamespace(device=torch.device("cuda", current if device is None else torch.device(device).index))

    late.clear(), waits.clear()
    cuda = {"is_available": lambda: True, "is_initialized": lambda: True, "current_device": lambda: current}
    cuda |= {"set_device": lambda device: None, "current_stream": stream, "Event": Event}
    with pytest.MonkeyPatch.context() as patch:
        for name in MAKERS.split():
            patch.setattr(torch, name, makes(getattr(torch, name)))
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(Tensor, "to", moves(Tensor.to))
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        yield torch.device("cuda", current)
