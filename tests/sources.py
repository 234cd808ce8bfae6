"""Sources of known rows for tests."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from msae.sources.int8 import quantise
from msae.sources.source import Chunk, Split


def ready(splits: dict[str, Split]) -> dict[str, Callable[[], Split]]:
    """Splits of a chunk whose rows are there already."""
    return {name: partial(lambda rows: rows, rows) for name, rows in splits.items()}


class Made(NamedTuple):
    """A chunk whose rows have been made."""

    splits: dict[str, Split]
    state: dict[str, Any]


def made(chunks: Iterable[Chunk]) -> list[Made]:
    """The chunks with their rows."""
    return [Made({name: make() for name, make in chunk.splits.items()}, chunk.state) for chunk in chunks]


class FakeSource:
    """Everything that a `Source` has besides its chunks, for hooks of these widths; `settings` are its identity."""

    name, budget_key = "fake", "data.source.rows"

    def __init__(self, widths: dict[str, int], dtype: torch.dtype, promised: int, **settings: Any) -> None:
        self.widths, self.dtype, self.promised, self.hook_names = widths, dtype, promised, list(widths)
        self.settings = {"dtype": str(dtype), **settings}

    def identity(self, hook_name: str) -> dict[str, Any]:
        return {**self.settings, "hook_name": hook_name}

    def provenance(self) -> dict[str, Any]:
        return {"by": "a test"}

    def expected_rows(self) -> int:
        return self.promised

    def most_rows(self) -> tuple[int, int]:
        return self.promised, self.promised

    def width(self, hook_name: str) -> int:
        return self.widths[hook_name]

    def bytes_per_row(self, hook_name: str) -> int:
        return self.widths[hook_name] * self.dtype.itemsize + 4 * (self.dtype == torch.int8)

    def truth(self) -> dict[str, Tensor]:
        return {"answer": torch.tensor([42])}

    def split(self, rows: dict[str, Tensor], **index: Tensor) -> Split:
        """These float32 rows in the source's type."""
        if self.dtype != torch.int8:
            return Split({hook: x.to(self.dtype) for hook, x in rows.items()}, index)
        pairs = {hook: quantise(x) for hook, x in rows.items()}
        return Split({h: q for h, (q, _) in pairs.items()}, index, {h: scales for h, (_, scales) in pairs.items()})


class Numbered(FakeSource):
    """Shards of given sizes whose rows hold their own number times FACTORS, train from 0 and val from 0.

    The index of the shard `other`, a split and a number, is not the usual one, and the identity does not say so.
    """

    name = "numbered"
    FACTORS: ClassVar = {"hook": [1.0, -1.0], "target": [2.0, 3.0, -1.0], "wide": [1.0] * 64}

    def __init__(
        self,
        train: list[int],
        val: list[int],
        hook_names: tuple[str, ...] = ("hook", "target"),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        other: tuple[str, int] | None = None,
    ) -> None:
        widths = {hook: len(self.FACTORS[hook]) for hook in hook_names}
        super().__init__(widths, dtype, sum(train) + sum(val), train=train, val=val, seed=seed)
        self.sizes, self.other = {"train": train, "val": val}, other

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        for number in range(state["next"] if state else 0, max(map(len, self.sizes.values()))):
            splits = {}
            for split, sizes in self.sizes.items():
                if number < len(sizes):
                    rows = sum(sizes[:number]) + torch.arange(sizes[number])
                    values = {hook: rows[:, None] * torch.tensor(self.FACTORS[hook]) for hook in self.hook_names}
                    splits[split] = self.split(values, position=rows.int() + int((split, number) == self.other))
            yield Chunk(ready(splits), {"next": number + 1})


class TextLike(FakeSource):
    """Two hooks, val rows in every other chunk, and a state without which a chunk cannot be made."""

    name, budget_key = "textlike", "data.source.tokens"

    def __init__(
        self, chunks: int = 4, promised: int = 100, seed: int = 0, pause: float = 0, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        widths = {"blocks.0.hook_mlp_out": 3, "blocks.1.hook_resid_pre": 5}
        super().__init__(widths, dtype, promised, chunks=chunks, seed=seed)
        self.count, self.seed, self.pause = chunks, seed, pause
        self.started: list[int] = []  # the number of the first chunk of every pass
        self.made: list[int] = []

    def text(self, generator: torch.Generator, rows: int) -> Split:
        x = {hook: torch.randn(rows, d, generator=generator) for hook, d in self.widths.items()}
        tokens = torch.randint(0, 99, (2, 4), generator=generator, dtype=torch.int32)
        row = torch.arange(rows, dtype=torch.int32)
        return self.split(x, sequence=row // 4, position=row % 4, tokens=tokens)

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        number, carry = (state["next"], state["carry"]) if state else (0, self.seed)
        self.started.append(number)
        while number < self.count:
            time.sleep(self.pause)
            generator = torch.Generator().manual_seed(carry)
            splits = {"train": self.text(generator, 7 + number % 2)}
            if number % 2 == 0:
                splits["val"] = self.text(generator, 2)
            carry = int(torch.randint(1 << 30, (1,), generator=generator))
            self.made.append(number)
            number += 1
            yield Chunk(ready(splits), {"next": number, "carry": carry})
