"""The DataModule: finds or makes the shards of a source and streams batches from them."""

from typing import Literal

import lightning as L

from msae.data.batches import TrainBatches, ValBatches
from msae.data.harvest import harvest
from msae.data.rolling import Rolling, roll
from msae.data.shards import Shards
from msae.data.source import Source


class ActivationData(L.LightningDataModule):
    """Batches [batch_tokens, d_in] of the activations of `source` at `hook_name` (its first hook unless given).

    `target_hook_name`: the activations that are to be reconstructed, when they are not the input (a transcoder).
    Batches are then pairs (x [batch_tokens, d_in], y [batch_tokens, d_out]) of the same rows.

    `exhausted` says what happens when the training budget is longer than the data: `repeat` reads the rows again in
    another order, `stop` ends training after one epoch. `batch_tokens` is per device. `max_disk_gb` caps the harvest.

    `rolling_gb`: instead of harvesting before training, do so while it reads, with at most so many GB of shards on disk
    (`msae.data.rolling`); every epoch harvests again. A whole harvest is used where there is one.
    """

    def __init__(
        self,
        source: Source,
        batch_tokens: int = 4096,
        root: str = "shards",
        hook_name: str | None = None,
        seed: int = 0,
        exhausted: Literal["repeat", "stop"] = "repeat",
        max_disk_gb: float | None = 100.0,
        val_rows: int | None = None,
        prefetch: int = 4,
        target_hook_name: str | None = None,
        rolling_gb: float | None = None,
    ) -> None:
        super().__init__()
        if batch_tokens <= 0:
            raise ValueError(f"data.batch_tokens={batch_tokens} must be positive")
        if prefetch < 1:
            raise ValueError(f"data.prefetch={prefetch} must be at least 1 batch")
        for key, name in (("hook_name", hook_name), ("target_hook_name", target_hook_name)):
            if name is not None and name not in source.hook_names:
                raise ValueError(
                    f"data.{key}={name} is not among the harvested {list(source.hook_names)}; "
                    "add it to data.source.hook_names"
                )
        self.source, self.batch_tokens, self.root, self.seed = source, batch_tokens, root, seed
        self.hook_name = hook_name or source.hook_names[0]
        self.target_hook_name = target_hook_name
        if target_hook_name == self.hook_name:
            raise ValueError(
                f"data.target_hook_name={target_hook_name} is the input itself; drop it, or set data.hook_name to "
                "another of data.source.hook_names"
            )
        if rolling_gb is not None and exhausted == "stop":
            raise ValueError(
                "data.exhausted=stop needs the number of rows before training, which data.rolling_gb learns only at "
                "the end of the data; drop one of the two, and set tokens=… to the rows you want"
            )
        self.rolling_gb = rolling_gb
        self.exhausted, self.max_disk_gb, self.val_rows, self.prefetch = (
            exhausted,
            max_disk_gb,
            val_rows,
            prefetch,
        )
        self._opened: dict[str, Shards] | None = None

    @property
    def shards(self) -> Shards:
        """The open shards; the first call harvests them unless they are there."""
        return self._open()[self.hook_name]

    @property
    def target_shards(self) -> Shards | None:
        """The same rows at `target_hook_name`, None without one; found or harvested together with `shards`."""
        return None if self.target_hook_name is None else self._open()[self.target_hook_name]

    def _open(self) -> dict[str, Shards]:
        if self._opened is None:
            if self.rolling_gb is None:
                self._opened = harvest(self.source, self.root, self.max_disk_gb)
            else:
                hooks = [self.hook_name, *filter(None, [self.target_hook_name])]
                self._opened = roll(self.source, hooks, self.root, self.rolling_gb)
        return self._opened

    @property
    def _rolling(self) -> Rolling | None:
        return None if self._opened is None else self._opened[self.hook_name].rolling

    def close(self) -> None:
        """End a rolling harvest and let go of its directory."""
        if self._rolling is not None:
            self._rolling.close()
        self._opened = None

    def teardown(self, stage: str) -> None:
        """Stop harvesting ahead once training has ended."""
        if self._rolling is not None:
            self._rolling.halt()

    def on_exception(self, exception: BaseException) -> None:
        """The same when it has failed."""
        self.teardown("fit")

    def steps(self, tokens: int, world: int = 1, accumulate: int = 1) -> int:
        """Optimizer steps for a token budget: ceil(tokens / (batch_tokens · world · accumulate)), or one epoch.

        Raises ValueError if there are fewer rows than a batch, or not one step fits.
        """
        per_step, rows = self.batch_tokens * world * accumulate, sum(self.shards.rows("train"))
        if rows < self.batch_tokens * world:
            more = "harvest more rows" if self._rolling is None else "raise data.rolling_gb"
            raise ValueError(
                f"{self.shards.directory} has {rows} training rows, fewer than a batch of "
                f"{self.batch_tokens} × {world}; lower data.batch_tokens or {more}"
            )
        wanted = -(-tokens // per_step)
        if self.exhausted == "stop":
            wanted = min(wanted, rows // per_step)
        if wanted <= 0:
            raise ValueError(f"tokens={tokens} with {rows} training rows is not one step of {per_step}; raise tokens")
        return wanted

    def train_dataloader(self) -> TrainBatches:
        trainer = self.trainer
        assert trainer is not None
        assert trainer.max_steps > 0, "training needs trainer.max_steps (see train.py)"
        length = trainer.max_steps * trainer.accumulate_grad_batches
        return TrainBatches(
            self.shards,
            self.batch_tokens,
            length,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            self.prefetch,
            target=self.target_shards,
        )

    def val_dataloader(self) -> ValBatches:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return ValBatches(self.shards, self.batch_tokens, rank, world, stop=self.val_rows, target=self.target_shards)
