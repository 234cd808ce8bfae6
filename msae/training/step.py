"""A step of one SAE, in plain torch: its loss, its optimizer, what follows an update, its figures."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from msae.sae import (
    Dead,
    DictionaryAdam,
    L0Controller,
    Loss,
    MatryoshkaSAE,
    automatic,
    choose_kernels,
    encode_for_training,
    geometric_median,
    matryoshka_loss,
    pareto_prefixes,
    permute,
    prefix_errors,
)
from msae.seeds import stream
from msae.training.settings import Recipe

METRICS = ("loss", "mse", "fvu", "l0", "dead")


class Moment(NamedTuple):
    """Where a run is: optimizer steps done, of how many, and how many processes share each."""

    step: int
    total: int
    world: int = 1


class StepBatch(NamedTuple):
    """What a batch of a step was: (x, y), loss, firings of it and of all ranks', who was dead, and λ."""

    x: Tensor
    y: Tensor
    loss: Loss
    fired: Tensor
    dead: Tensor
    penalty_weight: Tensor | float


class Step(nn.Module):
    """Trains one SAE by a recipe; `loss`, then backward, then `optimizer.step()`, then `after_update`.

    Raises ValueError in one line for impossible sizes and combinations.
    """

    def __init__(self, recipe: Recipe, d_in: int, d_out: int | None = None) -> None:
        super().__init__()
        self.recipe = recipe
        self.sae = MatryoshkaSAE(
            d_in,
            recipe.d_sae,
            recipe.prefixes,
            recipe.k,
            recipe.seed,
            d_out=d_out,
            sparsity=recipe.sparsity,
            rescale_acts_by_decoder_norm=recipe.decoder == "rescaled",
            apply_b_dec_to_input=recipe.apply_b_dec_to_input,
            encoder_bias=recipe.encoder_bias,
            init=recipe.init.weights,
            decoder_init_norm=recipe.init.decoder_norm,
        )
        self.sae.kernels = recipe.kernels
        recipe.objective.levels(self.sae, self.prefixes(0))  # an impossible one is said now, not at the first step
        penalty = recipe.penalty
        self.controller = L0Controller(penalty.weight, recipe.k, penalty.control)
        self.optimizer: DictionaryAdam | None = None
        self.kernels = "dense"

    def start_from(
        self,
        statistics: tuple[Tensor, float],
        target: tuple[Tensor, float] | None = None,
        first_batch: Tensor | None = None,
    ) -> None:
        """Normalise by (E x, E‖x‖²) of the input (and of a transcoder's target) and set b_dec where it begins.

        `first_batch` [n, d_out] of raw target activations is what the geometric median is taken of.
        """
        sae, begins = self.sae, self.recipe.init.b_dec
        sae.set_statistics(*statistics, normalise=self.recipe.normalise, target=target)
        if begins == "zero":
            sae.b_dec.data.zero_()
        elif begins == "geometric_median":
            assert first_batch is not None, "the geometric median needs a batch"
            sae.b_dec.data.copy_(geometric_median(sae.normalise_target(first_batch.to(sae.W_dec))))

    def prepare(self, total: int) -> DictionaryAdam:
        """The optimizer of a run of so many steps on the device where the SAE is, which decides the kernels too."""
        recipe = self.recipe
        self.kernels = "dense" if self.needs_dense else choose_kernels(self.sae)
        self.controller.warmup_steps = recipe.penalty.steps(total)
        self.optimizer = DictionaryAdam(self.sae, recipe.learning_rate, recipe.adam, recipe.decoder)
        return self.optimizer

    @property
    def why(self) -> str:
        """Why these kernels, as the end of a sentence; "" where it needs no word."""
        if self.needs_dense:
            return f", which {self.needs_dense} needs"
        reason = automatic(self.sae).why if self.sae.kernels == "auto" else ""
        return f" ({reason})" if reason else ""

    @property
    def needs_dense(self) -> str:
        """The setting that needs every activation, whatever the kernels; "" if none does."""
        if self.recipe.sampling.kind == "every":
            return "model.sampling.kind=every"
        return f"model.objective.terms={self.recipe.objective.terms}" if self.recipe.objective.needs_dense else ""

    def prefixes(self, step: int) -> list[int] | Literal["every"]:
        """The prefixes of this step, a pure function of the seed and the step."""
        sampling, sae = self.recipe.sampling, self.sae
        if sampling.kind == "random":
            n = sampling.n_prefixes if sampling.n_prefixes is not None else len(sae.prefixes)
            return pareto_prefixes(sae.d_sae, n, stream(self.recipe.seed, "prefixes", step))
        return "every" if sampling.kind == "every" else sae.prefixes

    def loss(self, x: Tensor, y: Tensor, at: Moment) -> StepBatch:
        """The loss of raw activations x, reconstructing y, with its gradient; thresholds and counters move."""
        sae, recipe, tokens = self.sae, self.recipe, len(x) * at.world
        if not recipe.dead.includes_batch:  # before the batch is encoded: then the host knows their number in time
            dead, for_auxk = self.dead_by_now(tokens)
        code = encode_for_training(sae, x, self.kernels)
        fired = code.fired()
        everywhere = summed(fired.clone(), at.world)
        weight: Tensor | float = 0.0
        if sae.sparsity.has_penalty:
            weight = self.controller(everywhere.sum() / tokens, at.step + 1)
        if recipe.dead.includes_batch:
            sae.update_fired(everywhere, tokens)
            dead, for_auxk = self.dead_by_now(tokens)
        assert self.optimizer is not None, "training needs its optimizer"
        self.optimizer.encoder_decay = recipe.fading.decay(at.step, at.total)
        inner = recipe.fading.weight(at.step, at.total)
        loss = matryoshka_loss(sae, x, recipe.objective, for_auxk, y, self.prefixes(at.step), weight, code, inner)
        if sae.sparsity.threshold_is == "calibrated":
            sae.update_threshold(code.acts.detach(), recipe.threshold_rate)
        if recipe.resort_rate is not None:
            norm = sae.contribution_norm()
            use = code.mean_square(norm.detach() if isinstance(norm, Tensor) else norm)
            sae.update_use((summed(use, at.world) / at.world).detach(), recipe.resort_rate)
        if not recipe.dead.includes_batch:
            sae.update_fired(everywhere, tokens)
        return StepBatch(x, y, loss, fired, dead, weight)

    def dead_by_now(self, tokens: int) -> tuple[Tensor, Dead | None]:
        """As `dead`, and the same for AuxK if there is any."""
        mask = self.dead(tokens)
        return mask, Dead(mask) if self.recipe.objective.aux.coefficient > 0 else None

    def dead(self, tokens: int) -> Tensor:
        """Bool [d_sae]: the latents that are dead by now, with batches of so many tokens."""
        dead = self.recipe.dead
        return self.sae.dead(dead.after_tokens if dead.after_steps is None else dead.after_steps * tokens)

    def after_update(self) -> None:
        """What follows the optimizer's update."""
        if self.sae.sparsity.threshold_is == "learned":  # below zero negative pre-activations would pass
            self.sae.threshold.data.clamp_(min=0)
        if self.recipe.resort_rate is not None:
            permute(self.sae, self.sae.use.argsort(descending=True, stable=True), self.optimizer)

    @torch.no_grad()
    def figures(self, batch: StepBatch, at: Moment) -> dict[str, float]:
        """`train/{name}/p{width}` of a batch for every prefix, and what concerns the whole SAE."""
        sae, (x, y, loss, fired, dead, weight) = self.sae, batch
        # loss = E‖y' − recon‖² in scaled units, mse = E‖y − ŷ‖² / d_out in raw ones, fvu over this batch's variance
        losses = prefix_errors(sae, loss.code, y)
        errors = losses / sae.target_scale.double().square()
        variance = (y - y.mean(0)).double().square().sum(1).mean()
        columns = torch.stack([losses, errors / sae.d_out, errors / variance], 1)
        counts = [torch.stack([fired[:w].sum() / len(x), dead[:w].double().mean()]) for w in sae.prefixes]
        table = torch.cat([columns, torch.stack(counts).double()], 1).tolist()
        of_prefixes = {
            f"train/{name}/p{width}": value
            for width, row in zip(sae.prefixes, table, strict=True)
            for name, value in zip(METRICS, row, strict=True)
        }
        assert self.optimizer is not None
        fading = self.recipe.fading
        return of_prefixes | {
            "train/loss": float(loss.total.detach()),
            "train/aux_loss": float(loss.aux),
            "train/dead_latents": float(dead.sum()),
            **({} if sae.ranks_at_inference else {"train/threshold": float(sae.threshold.mean())}),
            **({"train/sparsity": float(loss.sparsity), "train/sparsity_weight": float(weight)} if weight else {}),
            **{f"train/{name}": float(term) for name, term in loss.terms.items()},
            **({"train/inner": fading.weight(at.step, at.total)} if fading.between else {}),
            "train/lr": self.optimizer.param_groups[0]["lr"],
        }

    def refuse_divergence(self, tensor: Tensor, step: int) -> None:
        """Raises ValueError in one line if it is not finite."""
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"training diverged by step {step}: not a finite number; "
                f"lower model.lr={self.recipe.learning_rate} and resume a checkpoint before it, or start again"
            )


def summed(tensor: Tensor, world: int) -> Tensor:
    """Added up over the processes, in place."""
    if world > 1:
        torch.distributed.all_reduce(tensor)
    return tensor
