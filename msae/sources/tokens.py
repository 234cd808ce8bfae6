"""The token sequences that documents are packed into: split by document, resumable, no padding."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

COUNTS = ("documents", "train_tokens", "train_sequences", "val_tokens", "val_sequences", "read")
T = TypeVar("T")


def special_ids(tokenizer: Any) -> list[int]:
    """Sorted ids of the tokens that are no text: BOS, EOS, padding, unknown, added ones (`<|im_start|>`)."""
    added = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return sorted(added | {i for i in tokenizer.all_special_ids if i is not None})


def keep_mask(tokens: Tensor, special_ids: Iterable[int]) -> Tensor:
    """Which tokens count, bool of the shape of `tokens`: those not special by id, whatever their position."""
    return ~torch.isin(tokens, torch.tensor(sorted(special_ids), dtype=tokens.dtype, device=tokens.device))


class Packer:
    """Packs documents into sequences of exactly `context` tokens, with one separator after each document.

    With `prepend_bos` a sequence is the separator and context − 1 tokens more, and a separator that would follow the
    first is dropped: BOS never stands twice at a start. Tokens that do not fill a sequence yet are `left`.
    """

    def __init__(self, context: int, separator: int | None, prepend_bos: bool, left: Iterable[int] = ()) -> None:
        assert separator is not None or not prepend_bos, "prepend_bos needs a separator"
        self.separator = separator
        self.head = [separator] if prepend_bos and separator is not None else []
        self.need = context - len(self.head)
        self.buffer = list(left)
        self.start = 0  # an offset, because deleting from the front for each sequence is quadratic in a long document

    @property
    def left(self) -> list[int]:
        return self.buffer[self.start :]

    def add(self, ids: list[int]) -> None:
        """Append a document; separators that the text itself has at its ends are not doubled."""
        first, last = 0, len(ids)
        while first < last and ids[first] == self.separator:
            first += 1
        while last > first and ids[last - 1] == self.separator:
            last -= 1
        if first == last:
            return
        self.buffer = self.left + ids[first:last]
        self.start = 0
        if self.separator is not None:
            self.buffer.append(self.separator)

    def pop(self) -> list[int] | None:
        """The next sequence, or None while there are too few tokens."""
        start = self.start
        while self.head and start < len(self.buffer) and self.buffer[start] == self.separator:
            start += 1
        if len(self.buffer) - start < self.need:
            return None
        self.start = start + self.need
        return self.head + self.buffer[start : self.start]


@dataclass
class TokenChunk:
    """Sequences of one chunk, train [n, context] and val [m, context] int32, and the JSON state after it."""

    train: Tensor
    val: Tensor
    state: dict[str, Any]


def separator_of(tokenizer: Any, prepend_bos: bool) -> int | None:
    """BOS, or EOS where there is none. Raises ValueError if `prepend_bos` is on and there is neither."""
    ids = [int(i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if prepend_bos and not ids:
        raise ValueError("the tokenizer has neither BOS nor EOS; set data.source.prepend_bos=false")
    return ids[0] if ids else None


def in_val(index: int, seed: int, val_fraction: float) -> bool:
    """Whether document `index` is for validation: a seeded hash, the same in every pass."""
    return xxhash.xxh3_64_intdigest(f"{seed}/val/{index}".encode()) < val_fraction * 2**64


def tokenised(texts: Iterable[str], tokenizer: Any, batch_characters: int = 1 << 18) -> Iterator[list[int]]:
    """Token ids of each document; a batch is one call, which fast tokenizers run in parallel."""

    def flush(batch: list[str]) -> list[list[int]]:
        full = [text for text in batch if text]
        ids = iter(tokenizer(full, add_special_tokens=False, verbose=False)["input_ids"] if full else [])
        return [next(ids) if text else [] for text in batch]

    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 64  # so that empty rows fill a batch too
        if size >= batch_characters:
            yield from flush(batch)
            batch, size = [], 0
    yield from flush(batch)


def token_chunks(
    open_documents: Callable[[int], Iterator[str]],
    tokenizer: Any,
    *,
    context: int,
    tokens: int,
    chunk_sequences: int,
    val_fraction: float = 0.05,
    val_tokens: int = 500_000,
    prepend_bos: bool = True,
    seed: int = 0,
    state: dict[str, Any] | None = None,
) -> Iterator[TokenChunk]:
    """Yield chunks of packed sequences; from a chunk's `state` they go on exactly as without a break.

    `open_documents(n)` gives the documents from the n-th on. `in_val` sends documents to val until it has `val_tokens`;
    train and val are packed apart, so no document is in both. Special tokens are not counted, since they are not kept:
    the pass ends with the sequence that brings train to `tokens`, or with the text. A chunk has `chunk_sequences` train
    sequences (the last one fewer) and the val sequences completed meanwhile. Tokens that fill no sequence at the end
    are dropped. Raises ValueError if the text fills not even one train sequence, or no val sequence where val is asked
    for, or if the tokenizer lacks BOS and EOS and `prepend_bos` is on.
    """
    before = state or {}
    special = set(special_ids(tokenizer))
    separator = separator_of(tokenizer, prepend_bos)
    count = {key: int(before.get(key, 0)) for key in COUNTS}
    limits = {"train": tokens, "val": val_tokens}
    packers = {s: Packer(context, separator, prepend_bos, before.get(f"{s}_left", ())) for s in limits}
    ready: dict[str, list[list[int]]] = {"train": [], "val": []}

    def take(split: str, most: float) -> None:
        """Move sequences out of the packer until the chunk has `most` or the split is full."""
        while len(ready[split]) < most and count[f"{split}_tokens"] < limits[split]:
            sequence = packers[split].pop()
            if sequence is None:
                return
            ready[split].append(sequence)
            count[f"{split}_tokens"] += context - sum(map(special.__contains__, sequence))
            count[f"{split}_sequences"] += 1

    def chunk() -> TokenChunk:
        train, val = (torch.tensor(ready[s], dtype=torch.int32).reshape(-1, context) for s in limits)
        ready.update(train=[], val=[])
        return TokenChunk(train, val, {**count, **{f"{s}_left": packer.left for s, packer in packers.items()}})

    ids_of_documents = tokenised(open_documents(count["documents"]), tokenizer)
    while True:
        take("train", chunk_sequences)
        if count["train_tokens"] >= tokens:
            break
        if len(ready["train"]) == chunk_sequences:
            yield chunk()
            continue
        ids = next(ids_of_documents, None)
        if ids is None:
            break
        to_val = count["val_tokens"] < val_tokens and in_val(count["documents"], seed, val_fraction)
        count["documents"] += 1
        count["read"] += len(ids)
        packers["val" if to_val else "train"].add(ids)
        take("val", float("inf"))
        if count["val_tokens"] >= val_tokens:
            packers["val"] = Packer(context, separator, prepend_bos)
    check_enough(count, context, val_fraction if val_tokens else 0.0)
    if ready["train"] or ready["val"]:
        yield chunk()


def check_enough(count: dict[str, int], context: int, val_fraction: float) -> None:
    """Raise ValueError if the text was too short for a train sequence, or for a val sequence that was asked for."""
    text = f"the text gave {count['read']} tokens in {count['documents']} documents"
    if count["train_sequences"] == 0:
        raise ValueError(
            f"{text}, one sequence needs data.source.context={context}; give more text or a shorter context"
        )
    if val_fraction and count["val_sequences"] == 0:
        raise ValueError(
            f"{text}, too few for a val sequence with data.source.val_fraction={val_fraction:g}; "
            "raise it or give more text (data.source.tokens)"
        )


def spare_core() -> bool:
    """Whether a thread beside the model costs it nothing: a GPU computes, or not every core does.

    On a CPU each operation ends when the slowest of torch's threads does: with a core fewer than threads, it waits.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.cuda.is_available() or torch.get_num_threads() < cores


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is in use, if a core is free for that.

    Raises what making an item raises, after the items before it.
    """
    if not spare_core():
        yield from items
        return
    end = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
