"""Adam with what belongs to an SAE's step: projection, clipping, and decoder rows of unit norm."""

from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from msae.sae.fast import KERNELS, PLAIN, choose_kernels
from msae.sae.fast.plain import Moments, Plain, Rates
from msae.sae.model import MatryoshkaSAE
from msae.settings import Positive, Share, settings

Decoder = Literal["unit_norm", "unit_norm_before_step", "free", "rescaled"]


@settings
class Adam:
    """Adam (arXiv 1412.6980) and clipping."""

    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the averages of the gradient and of its square."""
    grad_clip: Positive = 1.0
    """Norm to which the gradient of all parameters is clipped."""


class DictionaryAdam(torch.optim.Adam):
    """Adam on the parameters of an SAE, its gradient clipped.

    With `decoder` unit_norm the part of each decoder row's gradient along the row is removed before the update, and
    the row brought back to unit norm after it; with unit_norm_before_step both are done before. `grad_norm` is that of
    the last step, before clipping, summed in float64. Before the update W_enc shrinks by lr · `encoder_decay` of itself
    (decoupled weight decay, arXiv 1711.05101). The SAE's kernels update in two passes over memory, where they can;
    triton's never wait for the device.
    """

    def __init__(
        self,
        sae: MatryoshkaSAE,
        lr: float,
        adam: Adam = Adam(),  # noqa: B008
        decoder: Decoder = "unit_norm",
        encoder_decay: float = 0.0,
    ) -> None:
        self.sae, self.grad_clip, self.decoder, self.encoder_decay = sae, adam.grad_clip, decoder, encoder_decay
        self.grad_norm = torch.zeros(())
        betas = (adam.betas[0], adam.betas[1])
        super().__init__([p for p in sae.parameters() if p.requires_grad], lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the closure, which Lightning gives, computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.decoder == "unit_norm_before_step":
            self.sae.normalise_decoder()
        group, W_dec = self.param_groups[0], self.sae.W_dec
        if self.encoder_decay:
            self.sae.W_enc.mul_(1 - float(group["lr"]) * self.encoder_decay)
        parameters = [p for p in group["params"] if p.grad is not None]
        kernels = KERNELS[choose_kernels(self.sae)]
        is_fused = all(kernels.can_step(rows(p), rows(p.grad)) for p in parameters)
        along = W_dec if self.decoder.startswith("unit_norm") else None
        project = (kernels if is_fused else PLAIN).project
        squares = [project(rows(p.grad), along if p is W_dec else None).sum() for p in parameters]
        self.grad_norm = torch.stack(squares).sum().sqrt()
        scale = (self.grad_clip / (self.grad_norm + 1e-6)).clamp(max=1.0)
        if is_fused:
            for p in parameters:
                self._update(kernels, p, scale)
            return loss
        torch._foreach_mul_([p.grad for p in parameters], scale.to(parameters[0].dtype))
        super().step()
        if self.decoder == "unit_norm":
            self.sae.normalise_decoder()
        return loss

    def _update(self, kernels: Plain, p: Tensor, scale: Tensor) -> None:
        """One parameter by the kernels; the state is laid out as PyTorch's Adam has it."""
        group, state = self.param_groups[0], self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        moments = Moments(rows(state["exp_avg"]), rows(state["exp_avg_sq"]), state["step"])
        beta1, beta2 = group["betas"]
        rates = Rates(float(group["lr"]), beta1, beta2, group["eps"])
        unit_norm = p is self.sae.W_dec and self.decoder == "unit_norm"
        kernels.adam(rows(p), rows(p.grad), moments, scale, rates, unit_norm, kernels.half_of(p))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Adam's; averages get the memory layout of their parameters, on which fused kernels rely."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    state[name] = torch.empty_like(p).copy_(value)


def rows(tensor: Tensor | None) -> Tensor:
    """A parameter as rows that lie in memory one after the other: W_enc is a transposed view, a bias one row."""
    assert tensor is not None, "no gradient"
    if tensor.ndim == 1:
        return tensor[None]
    return tensor if tensor.is_contiguous() else tensor.T
