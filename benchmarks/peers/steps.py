"""The training steps that others publish, as their own trainers take them, from the same rows and weights.

Nothing here imports msae, so it runs where the published packages are installed and msae is not.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

DEAD_AFTER_TOKENS = 10_000_000
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class Settings:
    """Sizes of a step; `dead` is the share of the latents that is dead, which turns AuxK on.

    `lr` is so small that weights stay almost where they are. `bf16`: autocast, where a package has it as an option.
    """

    d_in: int
    d_sae: int
    batch: int
    k: int
    dead: float
    lr: float = 1e-5
    bf16: bool = False

    @property
    def prefixes(self) -> list[int]:
        """Cumulative widths."""
        return [round(f * self.d_sae) for f in FRACTIONS]

    @property
    def dead_after_steps(self) -> int:
        """The steps in which DEAD_AFTER_TOKENS pass."""
        return DEAD_AFTER_TOKENS // self.batch


class Start(NamedTuple):
    """The start of all methods: rows x [batch, d_in], W_dec [d_sae, d_in], W_enc [d_in, d_sae], b_dec, dead [d_sae]."""

    x: Tensor
    W_dec: Tensor
    W_enc: Tensor
    b_dec: Tensor
    dead: Tensor


class Step(NamedTuple):
    """run() takes one step and returns (loss, AuxK's loss); dead() is the mask that the next step will use.

    Losses that lie on a GPU stay there, so that none is waited for but by a trainer itself.
    """

    run: Callable[[], tuple[Tensor | float, Tensor | float]]
    dead: Callable[[], Tensor]
    parameters: dict[str, nn.Parameter]
    optimizer: Any


def make_start(s: Settings) -> Start:
    """Rows like activations: 20 of 1024 directions each, by exponential amounts, some noise and a mean.

    Encoder and decoder have the same random directions. The dead are spread over all prefixes; their encoder columns
    are a tenth as long, so that no selection ever takes them, but as many of them are positive as of the others: AuxK
    has work to do and they stay dead of themselves.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    directions = normalize(normal(1024, s.d_in), dim=1)
    present = torch.rand(s.batch, 1024, generator=generator) < 20 / 1024
    amounts = torch.empty(s.batch, 1024).exponential_(generator=generator)
    x = (present * amounts) @ directions + 0.05 * normal(s.batch, s.d_in) + 3 * normalize(normal(s.d_in), dim=0)
    W_dec = normalize(normal(s.d_sae, s.d_in), dim=1)
    dead = torch.zeros(s.d_sae, dtype=torch.bool)
    dead[torch.randperm(s.d_sae, generator=generator)[: round(s.dead * s.d_sae)]] = True
    W_enc = torch.where(dead, 0.1, 1.0) * W_dec.T
    return Start(x, W_dec, W_enc.contiguous(), x.mean(0), dead)


@torch.no_grad()
def begin(module: nn.Module, start: Start) -> dict[str, nn.Parameter]:
    """Give a module with our names these weights."""
    for name in ("W_enc", "W_dec", "b_dec"):
        getattr(module, name).copy_(getattr(start, name))
    return dict(module.named_parameters())


def saelens(s: Settings, start: Start) -> Step:
    """SAETrainer.step and what `fit` does around it; defaults, no logging."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    device = str(start.x.device)
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=s.d_in, d_sae=s.d_sae, matryoshka_widths=s.prefixes, k=s.k, device=device
    )
    sae = MatryoshkaBatchTopKTrainingSAE(config)
    parameters = begin(sae, start)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=s.batch,
            lr=s.lr,
            lr_end=s.lr,
            dead_feature_window=s.dead_after_steps,
            logger=LoggingConfig(log_to_wandb=False),
            device=device,
            autocast=s.bf16,
        ),
        sae,
        iter(()),
    )
    trainer.n_forward_passes_since_fired[start.dead] = s.dead_after_steps + 1

    def run() -> tuple[Tensor, Tensor]:
        trainer.maybe_reset_sparsity()
        output = trainer.step(start.x)
        trainer.n_training_steps += 1
        return output.loss.detach(), output.losses["auxiliary_reconstruction_loss"].detach()

    return Step(run, lambda: trainer.dead_neurons, parameters, trainer.optimizer)


def dictionary_learning(s: Settings, start: Start) -> Step:
    """MatryoshkaBatchTopKTrainer.update; defaults, after the first 1000 steps, so that it moves its threshold."""
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    fractions = [b - a for a, b in pairwise([0.0, *FRACTIONS])]
    options = {"group_fractions": fractions, "lr": s.lr, "warmup_steps": 0, "device": str(start.x.device)}
    trainer = MatryoshkaBatchTopKTrainer(10**6, s.d_in, s.d_sae, s.k, 0, "none", **options)
    assert trainer.group_sizes == [b - a for a, b in pairwise([0, *s.prefixes])]
    parameters = begin(trainer.ae, start)
    trainer.num_tokens_since_fired[start.dead] = DEAD_AFTER_TOKENS

    def run() -> tuple[float, Tensor | float]:
        loss = trainer.update(trainer.threshold_start_step + 1, start.x)
        auxiliary = trainer.pre_norm_auxk_loss  # a tensor, or -1 where it is off
        return loss, auxiliary.detach() if isinstance(auxiliary, Tensor) else 0.0

    def dead() -> Tensor:
        return trainer.num_tokens_since_fired >= trainer.dead_feature_threshold

    return Step(run, dead, parameters, trainer.optimizer)


def sparsify(s: Settings, start: Start, adam: bool = False) -> Step:
    """SparseCoder in the order of `Trainer.fit`, which is one function and needs a language model; TopK, one prefix.

    On a CPU its decoder is the one without Triton; on a GPU it chooses, and autocasts by itself. AuxK by 1/32 where
    latents are dead (its default is none). Its optimizer is
    its default, schedule-free sign descent, or with `adam` that of its optimizer=adam where there is no bitsandbytes.
    """
    on_cpu = start.x.device.type == "cpu"
    if on_cpu:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from sparsify.utils import decoder_impl

    assert not on_cpu or decoder_impl.__name__ == "eager_decode"
    sae = SparseCoder(s.d_in, SparseCoderConfig(num_latents=s.d_sae, k=s.k), device=start.x.device)
    with torch.no_grad():
        sae.encoder.weight.copy_(start.W_enc.T)
        sae.W_dec.copy_(start.W_dec)
        sae.b_dec.copy_(start.b_dec)
    optimizer: Any
    if adam:
        optimizer = torch.optim.Adam(sae.parameters(), lr=s.lr)
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=s.lr), momentum=0.95)
        optimizer.train()
    alpha = 1 / 32 if s.dead else 0.0
    silent = torch.where(start.dead, DEAD_AFTER_TOKENS + 1, 0)
    fired = torch.zeros_like(start.dead)

    def run() -> tuple[Tensor, Tensor]:
        sae.set_decoder_norm_to_unit_norm()
        mask = silent > DEAD_AFTER_TOKENS if alpha else None
        variance = (start.x - start.x.mean(0)).pow(2).sum()
        out = sae(x=start.x, y=start.x, dead_mask=mask, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        loss = out.fvu + alpha * out.auxk_loss + out.multi_topk_fvu / 8
        losses = loss.detach(), out.auxk_loss.detach()
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(s.batch)
        silent[fired] = 0
        fired.zero_()
        return losses

    parameters = dict(sae.named_parameters()) | {"W_enc": sae.encoder.weight}
    del parameters["encoder.weight"]
    return Step(run, lambda: silent > DEAD_AFTER_TOKENS, parameters, optimizer)


def bussmann(s: Settings, start: Start) -> Step:
    """The step of bartbussmann/matryoshka_sae written out densely from its description; it is no package.

    L = mean over b_dec alone and every prefix of E(x − recon)² averaged over d_in, + 1/32 of AuxK's: the 512 largest
    dead latents reconstruct the residual, which is not detached. No encoder bias. Clipping at 1e5, then unit rows and
    the projection, then Adam(0.9, 0.99); a threshold's average from 0 by 0.01; batches since each latent fired.
    """
    W_enc, W_dec, b_dec = (nn.Parameter(t.clone()) for t in (start.W_enc, start.W_dec, start.b_dec))
    optimizer = torch.optim.Adam([W_enc, W_dec, b_dec], lr=s.lr, betas=(0.9, 0.99))
    silent = torch.where(start.dead, s.dead_after_steps, 0)
    threshold = torch.zeros(())
    sizes = [b - a for a, b in pairwise([0, *s.prefixes])]
    x = start.x

    def run() -> tuple[float, float]:
        positive = ((x - b_dec) @ W_enc).relu()
        chosen = positive.flatten().topk(s.k * len(x), sorted=False)
        acts = torch.zeros_like(positive).flatten().scatter(0, chosen.indices, chosen.values).view_as(positive)
        with torch.no_grad():
            active = acts > 0
            threshold.lerp_(acts[active].min(), 0.01)
            silent.add_(1).masked_fill_(active.any(0), 0)
        recon = b_dec.expand_as(x)
        errors = [(x - recon).square().mean()]
        for part, rows in zip(acts.split(sizes, dim=1), W_dec.split(sizes), strict=True):
            recon = recon + part @ rows
            errors.append((x - recon).square().mean())
        loss, auxiliary = torch.stack(errors).mean(), 0.0
        dead = (silent >= s.dead_after_steps).nonzero().squeeze(1)
        if len(dead) > 0:
            candidates = positive[:, dead]
            largest = candidates.topk(min(512, len(dead)), dim=1, sorted=False)
            codes = torch.zeros_like(candidates).scatter(1, largest.indices, largest.values)
            error = (x - recon - codes @ W_dec[dead]).square().mean()
            loss, auxiliary = loss + error / 32, float(error.detach())
        losses = float(loss.detach()), auxiliary
        loss.backward()
        torch.nn.utils.clip_grad_norm_([W_enc, W_dec, b_dec], 100_000)
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
            assert W_dec.grad is not None
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
        optimizer.step()
        optimizer.zero_grad()
        return losses

    parameters = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec}
    return Step(run, lambda: silent >= s.dead_after_steps, parameters, optimizer)


sparsify_adam = partial(sparsify, adam=True)
