"""Adam with what belongs to an SAE's step: projection, clipping, and decoder rows of unit norm."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from msae.sae.kernels import compiled, triton
from msae.sae.model import MatryoshkaSAE

KERNELS: dict[str, Any] = {"compiled": compiled, "triton": triton}
Decoder = Literal["unit_norm", "unit_norm_before_step", "free", "rescaled"]


class DictionaryAdam(torch.optim.Adam):
    """Adam (arXiv 1412.6980) on the parameters of an SAE, its gradient clipped to the norm `grad_clip`.

    With `decoder` unit_norm the part of each decoder row's gradient along the row is removed before, and the row
    brought back to unit norm after the update; with unit_norm_before_step both are done before. `grad_norm` is that of
    the last step, before clipping, summed in float64. Before the update W_enc shrinks by lr · `encoder_decay` of itself
    (decoupled weight decay, arXiv 1711.05101). With `kernels` compiled or triton these do it in two passes over
    memory, where they can; triton's never wait for the device.
    """

    def __init__(
        self,
        sae: MatryoshkaSAE,
        lr: float,
        betas: tuple[float, float],
        grad_clip: float,
        decoder: Decoder,
        kernels: str = "plain",
        encoder_decay: float = 0.0,
    ) -> None:
        self.sae, self.grad_clip, self.decoder, self.kernels = sae, grad_clip, decoder, kernels
        self.encoder_decay = encoder_decay
        self.grad_norm = torch.zeros(())
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
        if self.encoder_decay:
            self.sae.W_enc.mul_(1 - float(self.param_groups[0]["lr"]) * self.encoder_decay)
        parameters = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        use = KERNELS.get(self.kernels)
        if use is not None and all(use.able_to_step(rows(p), rows(p.grad)) for p in parameters):
            self._step_by(use, parameters)
            return loss
        if self.decoder.startswith("unit_norm"):
            self.sae.project_decoder_gradient()
        squares = [torch.linalg.vector_norm(rows(p.grad), dim=1).double().square().sum() for p in parameters]
        self.grad_norm = torch.stack(squares).sum().sqrt()
        torch._foreach_mul_([p.grad for p in parameters], self._clipping().to(parameters[0].dtype))
        super().step()
        if self.decoder == "unit_norm":
            self.sae.normalise_decoder()
        return loss

    def _clipping(self) -> Tensor:
        return (self.grad_clip / (self.grad_norm + 1e-6)).clamp(max=1.0)

    def _step_by(self, use: Any, parameters: list[Tensor]) -> None:
        group, W_dec = self.param_groups[0], self.sae.W_dec
        along = W_dec if self.decoder.startswith("unit_norm") else None
        squares = [use.project(rows(p.grad), along if p is W_dec else None).sum() for p in parameters]
        self.grad_norm = torch.stack(squares).sum().sqrt()
        scale = self._clipping()
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            use.adam(
                rows(p),
                rows(p.grad),
                (rows(state["exp_avg"]), rows(state["exp_avg_sq"])),
                scale,
                float(group["lr"]),
                group["betas"],
                group["eps"],
                state["step"],
                p is W_dec and self.decoder == "unit_norm",
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Adam's; its averages get the memory layout of their parameters, which fused kernels rely on."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    state[name] = torch.empty_like(p).copy_(value)


def rows(tensor: Tensor | None) -> Tensor:
    """A parameter as rows that lie in memory one after the other: W_enc is a transposed view."""
    assert tensor is not None, "no gradient"
    if tensor.ndim == 1:
        return tensor[None]
    return tensor if tensor.is_contiguous() else tensor.T
