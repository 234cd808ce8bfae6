"""Documents of a text, from local files or the hub, and the identity of their content."""

import difflib
import glob
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
NOT_TEXT = ("dataset_info.json", "state.json")  # which save_to_disk writes beside its .arrow files


def hub_reachable(timeout_seconds: float = 2.0) -> bool:
    """Whether the Hugging Face hub answers; if not, put its libraries in offline mode, where only caches count.

    Left alone they retry for 23 s. The endpoint and proxies are those that huggingface_hub uses. The probe runs in a
    thread because name resolution has no timeout of its own.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def probe() -> None:
        with suppress(Exception):  # whatever the transport raises, it is not an answer
            get_session().head(constants.ENDPOINT, timeout=timeout_seconds)
            answered.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if not answered.is_set():
        import datasets

        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return answered.is_set()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


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

    Raises ValueError for a path that does not exist, an unknown suffix, or mixed suffixes.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.glob("[!.]*") if f.suffix in BUILDERS and f.name not in NOT_TEXT)
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
    suffixes = sorted({f.suffix for f in files})
    if len(suffixes) != 1 or suffixes[0] not in BUILDERS:
        raise ValueError(
            f"{path_or_name} holds {', '.join(suffixes) or 'no text file'}; "
            f"data.source.text takes files of one kind out of {', '.join(BUILDERS)}"
        )
    return files


def content_hash(files: Iterable[Path]) -> str:
    """xxh3-128 of the files' sizes and bytes, in this order; names and dates do not count."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.stat().st_size}:".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def text_identity(path_or_name: str, *, split: str, config: str | None) -> dict[str, Any]:
    """The identity of the documents: the content of local files, or a hub dataset's name and commit.

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
    """Yield the documents of a local file (.txt, .json(l), .parquet, .arrow), directory, glob or hub dataset.

    In .txt files documents are paragraphs (what stands between blank lines) if the first file has any blank line, else
    lines. Empty rows are yielded as "", so that `skip` counts rows. Hub datasets are streamed, or read from the local
    cache while the hub is out of reach. Raises ValueError for a path that does not exist, an unknown suffix, a split of
    local files, a missing field, or a dataset that cannot be read.
    """
    rows = open_rows(path_or_name, split, config, revision)
    iterator = iter(rows.skip(skip) if skip else rows)
    try:
        first = next(iterator, None)
    except Exception as error:  # each builder raises its own kind
        raise ValueError(unreadable(path_or_name, error)) from None
    if first is None:
        return
    if field not in first:
        nearest = difflib.get_close_matches(field, list(first), n=1, cutoff=0) or ["text"]
        columns = ", ".join(first)
        raise ValueError(
            f"{path_or_name} has no field {field!r} (it has {columns}); try data.source.text_field={nearest[0]}"
        )
    if not isinstance(first[field], str | None):
        kind = type(first[field]).__name__
        raise ValueError(f"field {field!r} of {path_or_name} holds {kind}, not text; set data.source.text_field")
    for row in chain([first], iterator):
        yield row[field] or ""


def open_rows(path_or_name: str, split: str, config: str | None, revision: str | None) -> Any:
    """The dataset behind `documents`, streamed unless only the local cache has it."""
    import datasets

    files = local_files(path_or_name)
    if files is None:
        online = hub_reachable()
        try:
            return datasets.load_dataset(path_or_name, config, split=split, streaming=online, revision=revision)
        except Exception as error:
            reason = unreadable(path_or_name, error)
            if not online:
                reason = f"the hub is out of reach and the dataset {path_or_name} is not in the local cache"
            raise ValueError(f"{reason}; set data.source.text to a local {', '.join(BUILDERS)} file") from None
    if split != "train":
        raise ValueError(
            f"local text has no splits, got data.source.text_split={split}; name that split's file instead"
        )
    kind = BUILDERS[files[0].suffix]
    options = {"sample_by": "paragraph" if has_blank_lines(files[0]) else "line"} if kind == "text" else {}
    # Escaped, or a bracket in a directory's name would be taken for a pattern that matches nothing.
    names = [glob.escape(str(file.resolve())) for file in files]
    return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **options)


def has_blank_lines(file: Path) -> bool:
    """Whether there is a blank line within the first MiB of text."""
    with open(file, encoding="utf-8", errors="replace") as stream:
        return "\n\n" in stream.read(1 << 20).strip("\n")


def unreadable(path_or_name: str, error: Exception) -> str:
    """The line for a text that a library fails to read."""
    return f"cannot read {path_or_name}: {first_line(error.__cause__ or error)}"
