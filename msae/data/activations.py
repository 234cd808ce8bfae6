"""The activations of a run: the `data.*` settings, and the open rows that they describe."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, WithJsonSchema

from msae.data.harvest import harvest
from msae.data.rows import Rows
from msae.data.stream import Stream, open_stream
from msae.settings import Count, Positive, build, settings
from msae.sources.source import Source


def source_of(value: Any) -> Source:
    """The source that `data.source` describes. Raises ValueError in one line."""
    source = build(value, "data.source")
    if not isinstance(source, Source):
        raise ValueError(f"data.source={value} is not a source of activations; see conf/data")
    return source


@settings
class Data:
    """The activations that an SAE is trained on: the keys `data.*`."""

    source: Annotated[Any, BeforeValidator(source_of), WithJsonSchema({"title": "a source, by its _target_"})]
    """Where activations come from: the class named by `_target_`, with its settings."""
    batch_tokens: Count = 4096
    """Rows of a batch, on each device."""
    root: str = "shards"
    """Directory of the shard directories."""
    hook_name: str | None = None
    """The source's hook to train on; null: its first."""
    target_hook_name: str | None = None
    """The hook that a transcoder reconstructs; null: the input itself."""
    seed: int = 0
    """Seed of the row order."""
    exhausted: Literal["repeat", "stop"] = "repeat"
    """When `tokens` exceeds the data: repeat the rows in another order, or stop after one epoch."""
    max_disk_gb: Positive | None = 100.0
    """Refuse a harvest that needs more disk; null: no limit."""
    memory_gb: Positive | None = None
    """Keep rows in memory alone, made while training reads them, in so many GB of each process; null: on disk."""
    memory_device: Literal["cuda"] | None = None
    """Where rows wait that do not all fit, cuda; null: host memory, where those that all fit stay."""
    val_rows: Count | None = None
    """Held-out rows that validation reads; null: all."""
    prefetch: Count = 4
    """Batches made ahead."""

    def __post_init__(self) -> None:
        for key, name in (("hook_name", self.hook_name), ("target_hook_name", self.target_hook_name)):
            if name is not None and name not in self.source.hook_names:
                raise ValueError(
                    f"data.{key}={name} is not among the harvested {list(self.source.hook_names)}; "
                    "add it to data.source.hook_names"
                )
        if self.target_hook_name == self.hook:
            raise ValueError(
                f"data.target_hook_name={self.hook} is the input itself; drop it, or set data.hook_name to "
                "another of data.source.hook_names"
            )
        if self.memory_gb is not None and self.exhausted == "stop":
            raise ValueError(
                "data.exhausted=stop needs the number of rows before training, which data.memory_gb learns only at "
                "the end of the data; drop one of the two, and set tokens=… to the rows you want"
            )
        if self.memory_device is not None and self.memory_gb is None:
            raise ValueError(f"data.memory_device={self.memory_device} is of rows in memory; give data.memory_gb too")
        if self.memory_device is not None and not torch.cuda.is_available():
            raise ValueError(f"data.memory_device={self.memory_device}, but PyTorch sees no GPU; drop it")

    def identify(self) -> None:
        """Compute the source's identity, which needs its model and text. Raises ValueError in one line."""
        for hook_name in self.source.hook_names:
            self.source.identity(hook_name)

    @property
    def hook(self) -> str:
        """The hook to train on."""
        return self.hook_name or str(self.source.hook_names[0])


class Activations:
    """The open rows that `Data` describes: shards, harvested if they are missing, or a stream's.

    A run that resumes has no statistics of streamed rows; they are in its checkpoint.
    """

    def __init__(self, data: Data, resuming: bool = False) -> None:
        self.data = data
        self.stream: Stream | None = None
        opened: Mapping[str, Rows]
        if data.memory_gb is None:
            opened = harvest(data.source, data.root, data.max_disk_gb)
        else:
            hooks = [data.hook, *filter(None, [data.target_hook_name])]
            opened, self.stream = open_stream(
                data.source, hooks, data.root, data.memory_gb, data.memory_device, resuming
            )
        self.rows: Rows = opened[data.hook]
        self.target: Rows | None = opened[data.target_hook_name] if data.target_hook_name else None

    def steps(self, tokens: int, world: int = 1, accumulate: int = 1) -> int:
        """Optimizer steps for a token budget: ceil(tokens / (batch_tokens · world · accumulate)), or one epoch.

        Raises ValueError if there are fewer rows than a batch, or not one step fits.
        """
        per_step, rows = self.data.batch_tokens * world * accumulate, sum(self.rows.rows("train"))
        if rows < self.data.batch_tokens * world and not self.rows.is_endless:
            raise ValueError(
                f"{self.rows} has {rows} training rows, fewer than a batch of {self.data.batch_tokens} × {world}; "
                f"lower data.batch_tokens or raise {self.data.source.budget_key}"
            )
        steps = -(-tokens // per_step)
        if self.data.exhausted == "stop":
            steps = min(steps, rows // per_step)
        if steps <= 0:
            raise ValueError(f"tokens={tokens} with {rows} training rows is not one step of {per_step}; raise tokens")
        return steps

    def close(self) -> None:
        """Stop what makes rows ahead of training."""
        if self.stream is not None:
            self.stream.close()
