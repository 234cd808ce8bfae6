"""The contract of a source of activations, which a language model and a synthetic world keep alike."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass
class Split:
    """The rows that one chunk of a harvest contributes to one split.

    activations: hook name → [rows, d_in] in the storage dtype, rows already shuffled across documents.
    scales: hook name → [rows] float32 where the storage dtype is int8 (both from `msae.sources.int8.quantise`).
    index: tensors written beside them in every shard; for text `sequence [rows] int32` (a row of `tokens` in the
    same shard), `position [rows] int32`, `tokens [n_seq, context] int32`. Empty for synthetic data.
    """

    activations: dict[str, Tensor]
    index: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Chunk:
    """One resumable step of a source: the state from which the next chunk follows, and what makes this one's rows.

    splits: "train" and "val", as far as the chunk has rows of them → a function that makes them, called once if at all:
    ranks that share a source pass over each other's chunks, and a resumed run over those that it has read.
    """

    splits: Mapping[str, Callable[[], Split]]
    state: dict[str, Any]  # JSON, for `Source.chunks`


@runtime_checkable
class Source(Protocol):
    """A maker of activations. Everything that decides a byte of its shards is in `identity`."""

    @property
    def hook_names(self) -> list[str]:
        """The sites harvested in one pass; each gets a shard directory of its own."""

    @property
    def name(self) -> str:
        """A short readable name for directories, such as `gpt2` or `tree`."""

    @property
    def budget_key(self) -> str:
        """The configuration key that says how many rows to make, for messages."""

    def identity(self, hook_name: str) -> dict[str, Any]:
        """JSON that decides the content of this hook's shards; equal identity, equal directory."""

    def provenance(self) -> dict[str, Any]:
        """JSON that is recorded but does not decide the directory: paths, library versions."""

    def expected_rows(self) -> int:
        """The most rows, train and val, of one pass."""

    def most_rows(self) -> tuple[int, int]:
        """The most training rows of one chunk, and the most held-out rows of all chunks together."""

    def width(self, hook_name: str) -> int:
        """The width of a row at this hook."""

    def bytes_per_row(self, hook_name: str) -> int:
        """Bytes that one row takes, in int8 with the 4 of its scale."""

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        """The chunks from the start (None) or after the chunk of this state; deterministic either way."""

    def truth(self) -> dict[str, Tensor] | None:
        """The features that a synthetic source knows, written as truth.safetensors beside its shards."""
