"""What is explored: one SAE, the shards it is looked at on, a vanilla SAE beside it, and the words of its model."""

from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any

from msae.data.rows import Rows
from msae.devices import Device, check_device, pick_device
from msae.hierarchy.extract import Asked, asked_of, check_fits
from msae.hierarchy.limits import Limits
from msae.runs import Run, open_run
from msae.sae import MatryoshkaSAE
from msae.settings import Count, settings
from msae.sources.bridge import TOKENIZER, load_bridge, load_tokenizer, model_identity


@settings
class Explore:
    """`python -m msae.explore`."""

    run: str
    """runs/<run>, runs/<run>/<arm>, or a directory with an SAE in any form that is read."""
    shards: str | None = None
    """Shard directory; null: the one that the SAE was trained on."""
    tokens: Count | None = 1_000_000
    """Rows to encode, held-out ones first, then training rows; null: all."""
    vanilla: str | None = None
    """Directory of a vanilla SAE as a control; null: an arm of the same run with one prefix, if there is one."""
    language_model: str | None = None
    """Model whose tokens are shown: a hub name or a directory; null: that of the run."""
    device: Device = "auto"
    """Where the SAEs and the language model run."""
    out: str | None = None
    """Directory to write to; null: that of the run."""
    seed: int = 0
    """Seed of the shuffled controls."""
    keep_firings: bool = True
    """Keep what fires where beside the hierarchy, 8 bytes for each activation, so that no row is encoded again."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_device(self.device)


class Inputs:
    """The SAE, its shards, a vanilla one beside it, and the words of its model, as the settings name them.

    Both SAEs lie on the device that is asked for; what is found does not depend on it, but for rounding.
    """

    def __init__(self, explore: Explore, rows: Rows | None = None) -> None:
        self.explore, self.device = explore, pick_device(explore.device)
        self.run = open_run(explore.run)
        self.sae = self.run.load_sae().to(self.device)
        self.out = Run(explore.out) if explore.out is not None else self.run
        self.shards = self.run.rows(self.sae, explore.shards) if rows is None else rows
        check_fits(self.sae, self.shards)
        model, revision, tokenizer = (self.run.setting(f"data.source.{k}") for k in ("model", "revision", "tokenizer"))
        is_other = explore.language_model not in (None, model)
        self.model: str | None = explore.language_model or model
        self.revision: str | None = None if is_other else revision
        self.tokenizer: str | None = self.model if is_other or tokenizer is None else tokenizer
        self.vocabulary = self._vocabulary()

    @property
    def hierarchy_file(self) -> Path:
        """Where the hierarchy is kept."""
        return self.out.hierarchy / "hierarchy.json"

    @property
    def firings_file(self) -> Path:
        """Where what fires where is kept."""
        return self.out.hierarchy / "firings.safetensors"

    @cached_property
    def asked(self) -> Asked:
        """What decides the hierarchy."""
        explore = self.explore
        return asked_of(self.sae, self.shards, explore.tokens, explore.limits, self.vanilla, explore.seed)

    @cached_property
    def vanilla(self) -> MatryoshkaSAE | None:
        """The SAE that was given, or an arm of the same run that has one prefix, the nearest in latents."""
        if self.explore.vanilla is not None:
            return open_run(self.explore.vanilla).load_sae().to(self.device)
        if len(self.sae.prefixes) == 1 or self.run.of is None:
            return None
        names = [arm.name for arm in self.run.of.arms() if arm.error is None]
        others = [self.run.of.arm(name) for name in names if name != self.run.path.resolve().name]
        saes = [other.load_sae() for other in others if other.sae_directory.is_dir()]
        vanilla = [sae for sae in saes if len(sae.prefixes) == 1 and sae.d_in == self.sae.d_in]
        nearest = min(vanilla, key=lambda sae: abs(sae.d_sae - self.sae.d_sae), default=None)
        return None if nearest is None else nearest.to(self.device)

    def _vocabulary(self) -> list[str] | None:
        """The strings of the tokens; None without text or a model. Raises ValueError for another tokenizer."""
        if self.shards.truth is not None or self.tokenizer is None:
            return None
        harvested = self.shards.identity.get("tokenizer")
        if harvested is not None and model_identity(self.tokenizer, self.revision, TOKENIZER) != harvested:
            raise ValueError(
                f"the tokenizer of {self.tokenizer} is not the one that {self.shards} was made with; "
                "give language_model=<the model that was harvested>"
            )
        return words(load_tokenizer(self.tokenizer, self.revision))

    def load_model(self) -> Any:
        """The model as a bridge."""
        assert self.model is not None, "words without a model"
        return load_bridge(self.model, device=str(self.device), revision=self.revision, tokenizer=self.tokenizer)


def words(tokenizer: Any) -> list[str]:
    """The string of every token as it stands in text: after another one, since some decoders drop a first space."""
    ids = tokenizer.get_vocab().values()
    first, size = min(ids), 1 + max(ids)
    before = len(tokenizer.decode([first], clean_up_tokenization_spaces=False))
    return [tokenizer.decode([first, i], clean_up_tokenization_spaces=False)[before:] for i in range(size)]
