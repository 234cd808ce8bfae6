"""Documents, and the token sequences that they are packed into: split by document, resumable, no padding."""

import difflib
import glob
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

T = TypeVar("T")
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


def hub_reachable(timeout_seconds: float = 2.0) -> bool:
    """Whether the Hugging Face hub answers; if not, its libraries are put in offline mode: only caches count.

    Left alone they retry for 23 s. The endpoint and proxies are those that huggingface_hub uses. The probe
    runs in a thread because name resolution has no timeout of its own.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def probe() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=timeout_seconds)
        except Exception:  # whatever the transport raises, it is not an answer
            return
        answered.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if not answered.is_set():
        import datasets

        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return answered.is_set()


def looks_local(path_or_name: str) -> bool:
    """Whether this can only be a path: a hub name is `name` or `owner/name`, relative to nothing."""
    return (
        path_or_name.startswith(("/", ".", "~"))
        or path_or_name.count("/") > 1
        or any(c in path_or_name for c in "*?\\")
        or Path(path_or_name).suffix in BUILDERS
    )


def local_files(path_or_name: str) -> list[Path] | None:
    """The files of a path, a directory or a glob, sorted; None for a hub name.

    Raises ValueError for a path that is not there, an unknown suffix, or suffixes that are mixed.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in BUILDERS and not f.name.startswith("."))
        files = [f for f in files if f.name not in ("dataset_info.json", "state.json")]  # of save_to_disk
    elif path.is_file():
        files = [path]
    elif any(c in path_or_name for c in "*?"):
        files = sorted(Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
    elif looks_local(path_or_name):
        raise ValueError(
            f"there is no text at {path_or_name}; set data.source.text to a file, a directory or a hub name"
        )
    else:
        return None
    kinds = sorted({f.suffix for f in files})
    if len(kinds) != 1 or kinds[0] not in BUILDERS:
        found = f"holds {', '.join(kinds)}" if kinds else "holds no text file"
        raise ValueError(
            f"{path_or_name} {found}; data.source.text takes files of one kind out of {', '.join(BUILDERS)}"
        )
    return files


def content_hash(files: Iterable[Path]) -> str:
    """xxh3 of the files' bytes and sizes, in the order given; names and dates do not count."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.stat().st_size}:".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def text_identity(path_or_name: str, *, split: str, config: str | None) -> dict[str, Any]:
    """What decides the documents: the content of local files; a hub dataset's name and commit.

    The commit is None while the hub is out of reach. Raises ValueError as `local_files` does.
    """
    files = local_files(path_or_name)
    if files is not None:
        return {"xxh3": content_hash(files), "files": len(files)}
    revision = None
    if hub_reachable():
        from huggingface_hub import HfApi

        try:
            revision = HfApi().dataset_info(path_or_name).sha
        except (OSError, ValueError) as error:
            raise ValueError(unreadable(path_or_name, error)) from None
    return {"name": path_or_name, "config": config, "split": split, "revision": revision}


def documents(
    path_or_name: str,
    *,
    split: str = "train",
    field: str = "text",
    config: str | None = None,
    revision: str | None = None,
    skip: int = 0,
) -> Iterator[str]:
    """The documents of a local file (.txt, .json(l), .parquet, .arrow), directory, glob or hub dataset.

    In .txt files a document is a paragraph, that is what stands between blank lines, if the first file has
    any; otherwise a line. Empty rows are yielded as "", so that `skip` counts rows. Hub datasets are
    streamed; while the hub is out of reach, the local cache is used. Raises ValueError for a path that is not
    there, an unknown suffix, a split of local files, a missing field, or a dataset that cannot be had.
    """
    rows = open_rows(path_or_name, split, config, revision)
    if skip:
        rows = rows.skip(skip)
    iterator = iter(rows)
    try:
        first = next(iterator, None)
    except Exception as error:  # each builder raises its own kind
        raise ValueError(unreadable(path_or_name, error)) from None
    if first is None:
        return
    if field not in first:
        near = difflib.get_close_matches(field, list(first), n=1, cutoff=0) or ["text"]
        columns = ", ".join(first)
        raise ValueError(
            f"{path_or_name} has no field {field!r} (it has {columns}); try data.source.text_field={near[0]}"
        )
    if not isinstance(first[field], str | None):
        kind = type(first[field]).__name__
        raise ValueError(f"field {field!r} of {path_or_name} holds {kind}, not text; set data.source.text_field")
    yield first[field] or ""
    for row in iterator:
        yield row[field] or ""


def open_rows(path_or_name: str, split: str, config: str | None, revision: str | None) -> Any:
    """The dataset behind `documents`, streamed where there is no reason to copy it first."""
    import datasets

    files = local_files(path_or_name)
    if files is None:
        online = hub_reachable()
        try:
            return datasets.load_dataset(path_or_name, config, split=split, streaming=online, revision=revision)
        except Exception as error:
            why = unreadable(path_or_name, error)
            if not online:
                why = f"the hub is out of reach and the dataset {path_or_name} is not in the local cache"
            raise ValueError(f"{why}; set data.source.text to a local {', '.join(BUILDERS)} file") from None
    if split != "train":
        raise ValueError(
            f"local text has no splits, got data.source.text_split={split}; name that split's file instead"
        )
    kind = BUILDERS[files[0].suffix]
    how = {"sample_by": "paragraph" if has_blank_lines(files[0]) else "line"} if kind == "text" else {}
    # Escaped, or a bracket in a directory's name would be taken for a pattern that matches nothing.
    names = [glob.escape(str(file.resolve())) for file in files]
    return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **how)


def has_blank_lines(file: Path) -> bool:
    with open(file, encoding="utf-8", errors="replace") as stream:
        return "\n\n" in stream.read(1 << 20).strip("\n")


def unreadable(path_or_name: str, error: Exception) -> str:
    reason = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
    return f"cannot read {path_or_name}: {reason}"


def special_ids(tokenizer: Any) -> list[int]:
    """Sorted ids of the tokens that are no text: BOS, EOS, padding, unknown, added ones (`<|im_start|>`)."""
    added = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return sorted(added | {i for i in tokenizer.all_special_ids if i is not None})


def keep_mask(tokens: Tensor, special_ids: Iterable[int], attention_mask: Tensor | None = None) -> Tensor:
    """Which tokens count, bool of the shape of `tokens`: not special by id, not masked; never by position."""
    special = torch.tensor(sorted(special_ids), dtype=tokens.dtype, device=tokens.device)
    keep = ~torch.isin(tokens, special)
    return keep if attention_mask is None else keep & attention_mask.bool()


class Packer:
    """Turns documents into sequences of exactly `context` tokens, with one separator after each document.

    With `prepend_bos` a sequence is the separator and context − 1 tokens more, and a separator that would
    follow the first is dropped: BOS never stands twice at a start. What does not fill a sequence waits in
    `left`.
    """

    def __init__(self, context: int, separator: int | None, prepend_bos: bool, left: list[int] | None = None) -> None:
        self.context, self.separator, self.prepend_bos = context, separator, prepend_bos
        self.buffer = list(left or [])
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
        start, need, head = self.start, self.context, []
        if self.prepend_bos:
            assert self.separator is not None, "prepend_bos needs a separator"
            need, head = self.context - 1, [self.separator]
            while start < len(self.buffer) and self.buffer[start] == self.separator:
                start += 1
        if len(self.buffer) - start < need:
            return None
        self.start = start + need
        return head + self.buffer[start : self.start]


@dataclass
class TokenChunk:
    """Sequences of one chunk, train [n, context] and val [m, context] int32, and the JSON state after it."""

    train: Tensor
    val: Tensor
    state: dict[str, Any]


def separator_of(tokenizer: Any, prepend_bos: bool) -> int | None:
    """BOS, or EOS where there is none. Raises ValueError if `prepend_bos` is on and there is neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    if prepend_bos:
        raise ValueError("the tokenizer has neither BOS nor EOS; set data.source.prepend_bos=false")
    return None


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
    """Chunks of packed sequences; after a chunk's `state` they go on exactly as if there had been no break.

    `open_documents(n)` gives the documents from the n-th on. A document is for val by `in_val`, until val has
    `val_tokens`; train and val are packed apart, so no document is in both. Tokens are counted as they will
    be kept, without special ones: the pass ends with the sequence that brings train to `tokens`, or with the
    text. A chunk has `chunk_sequences` train sequences (the last one fewer) and the val sequences that came
    up meanwhile. What is left over at the end and fills no sequence is dropped. Raises ValueError if the text
    gives not even one train sequence, if val is wanted and got none, or if the tokenizer lacks BOS and EOS
    and `prepend_bos` is on.
    """
    separator = separator_of(tokenizer, prepend_bos)
    special = set(special_ids(tokenizer))
    empty = {
        "documents": 0,
        "train_tokens": 0,
        "train_sequences": 0,
        "val_tokens": 0,
        "val_sequences": 0,
        "read": 0,
    }
    count: dict[str, int] = {key: int((state or {}).get(key, 0)) for key in empty}
    packers = {s: Packer(context, separator, prepend_bos, (state or {}).get(f"{s}_left")) for s in ("train", "val")}
    ready: dict[str, list[list[int]]] = {"train": [], "val": []}

    def take(split: str, limit: int) -> None:
        """Move sequences from the packer until the chunk or the split is full."""
        while len(ready[split]) < limit and count[f"{split}_tokens"] < {"train": tokens, "val": val_tokens}[split]:
            sequence = packers[split].pop()
            if sequence is None:
                return
            ready[split].append(sequence)
            count[f"{split}_tokens"] += context - sum(map(special.__contains__, sequence))
            count[f"{split}_sequences"] += 1

    def chunk() -> TokenChunk:
        train, val = (torch.tensor(ready[s], dtype=torch.int32).reshape(-1, context) for s in packers)
        ready["train"], ready["val"] = [], []
        return TokenChunk(train, val, {**count, **{f"{s}_left": packers[s].left for s in packers}})

    ids_of = tokenised(open_documents(count["documents"]), tokenizer)
    while True:
        take("train", chunk_sequences)
        if count["train_tokens"] >= tokens:
            break
        if len(ready["train"]) == chunk_sequences:
            yield chunk()
            continue
        ids = next(ids_of, None)
        if ids is None:
            break
        to_val = count["val_tokens"] < val_tokens and in_val(count["documents"], seed, val_fraction)
        count["documents"] += 1
        count["read"] += len(ids)
        packers["val" if to_val else "train"].add(ids)
        take("val", 1 << 62)
        if count["val_tokens"] >= val_tokens:
            packers["val"] = Packer(context, separator, prepend_bos)
    check_enough(count, context, val_fraction if val_tokens else 0.0)
    if ready["train"] or ready["val"]:
        yield chunk()


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


def check_enough(count: dict[str, int], context: int, val_fraction: float) -> None:
    """Raise ValueError if the text was too short for a train sequence, or for the val sequence wanted."""
    found = f"the text gave {count['read']} tokens in {count['documents']} documents"
    if count["train_sequences"] == 0:
        raise ValueError(
            f"{found}, one sequence needs data.source.context={context}; give more text or a shorter context"
        )
    if val_fraction and count["val_sequences"] == 0:
        raise ValueError(
            f"{found}, too few for a val sequence with data.source.val_fraction={val_fraction:g}; "
            "raise it or give more text (data.source.tokens)"
        )
