"""Activations of a language model on text: the rows at the tokens that count, cast and shuffled."""

import importlib.metadata
import math
import re
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from msae.devices import check_device, pick_device
from msae.seeds import stream
from msae.settings import Count, Natural, as_plain, settings
from msae.sources.bridge import (
    DTYPES,
    TOKENIZER,
    Dtype,
    capture,
    hook_widths,
    load_bridge,
    load_tokenizer,
    model_identity,
)
from msae.sources.int8 import quantise
from msae.sources.source import Chunk, Split
from msae.sources.text import documents, text_identity
from msae.sources.tokens import keep_mask, one_ahead, special_ids, token_chunks

NAMES = ("model", "tokenizer", "revision", "text", "text_split", "text_config")  # the identity holds their content
NOT_IN_A_ROW = ("hook_names", "device")  # settings that do not change a row
STORED = {**DTYPES, "int8": torch.int8}  # int8 rows have a float32 scale each
WEIGHTS = ("*.safetensors", "*.bin", "config.json")


@settings
class LanguageModelSource:
    """Rows of several hooks of one language model, made in one pass over a text and so aligned row by row.

    Documents are packed into sequences of `context` tokens, and attention reaches across the documents in a sequence.
    Rows at special tokens (BOS too) are dropped. Model, hooks and text are opened only when they are needed.
    """

    budget_key: ClassVar[str] = "data.source.tokens"

    model: str
    """Hub name, or a directory made by save_pretrained."""
    hook_names: Annotated[list[str], Field(min_length=1)]
    """Hooks of transformer_lens, such as blocks.8.hook_resid_pre."""
    text: str
    """Hub name, file (.txt, .jsonl, .parquet, .arrow), directory or glob."""
    tokens: Count
    """Training rows; fewer if the text ends."""
    text_split: str = "train"
    """Split of a hub dataset."""
    text_field: str = "text"
    """Column that holds the text."""
    text_config: str | None = None
    """Configuration of a hub dataset."""
    context: Count = 128
    """Tokens of a sequence."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the documents that is held out."""
    val_tokens: Natural = 500_000
    """Most held-out rows; and no more than their share."""
    prepend_bos: bool = True
    """Each sequence begins with BOS (or EOS)."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Type of the stored rows; int8 has a scale for each row and takes half the disk."""
    model_dtype: Dtype = "float32"
    """Type in which the model runs."""
    chunk_tokens: Count = 262_144
    """Tokens of a chunk, within which rows are shuffled."""
    model_batch: Count = 16
    """Sequences of a forward pass."""
    seed: int = 0
    """Seed of the split into held-out and training documents, and of the shuffle."""
    device: str = "auto"
    """Where the model runs."""
    tokenizer: str | None = None
    """Hub name or directory; null: the model's."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    compatibility_mode: bool = False
    """Fold LayerNorm and centre weights as the first TransformerLens did; else activations are transformers' own."""

    def __post_init__(self) -> None:
        if self.context < 1 + self.prepend_bos:
            raise ValueError(f"data.source.context={self.context} has no room for text; set it to 2 or more")
        if len(set(self.hook_names)) < len(self.hook_names):
            raise ValueError(f"data.source.hook_names={self.hook_names} must name each hook once")

    @property
    def name(self) -> str:
        """The last part of the model's path or name, fit for a directory's name."""
        last = Path(self.model).expanduser().resolve().name
        return re.sub(r"[^A-Za-z0-9_.]+", "-", last).strip("-.").lower()

    @cached_property
    def _content(self) -> dict[str, Any]:
        """The identity of what `NAMES` name. Raises ValueError if a file or hub repository does not exist."""
        return {
            "text": text_identity(self.text, split=self.text_split, config=self.text_config),
            "model": model_identity(self.model, self.revision, WEIGHTS),
            "tokenizer": model_identity(*self._tokenizer, TOKENIZER),
            "dropped_ids": special_ids(load_tokenizer(*self._tokenizer)),
        }

    def identity(self, hook_name: str) -> dict[str, Any]:
        others = {key: value for key, value in as_plain(self).items() if key not in (*NAMES, *NOT_IN_A_ROW)}
        return {"source": "language_model", "hook_name": hook_name, **self._content, **others}

    def provenance(self) -> dict[str, Any]:
        libraries = ("torch", "transformer_lens", "transformers", "datasets")
        versions = {name: importlib.metadata.version(name) for name in libraries}
        names = {key: getattr(self, key) for key in NAMES}
        return {**names, "device": str(pick_device(self.device)), "versions": versions}

    def expected_rows(self) -> int:
        """The most rows there can be, train and val: a token is at least a byte of a local text."""
        file = Path(self.text).expanduser()
        most = file.stat().st_size if file.suffix in (".txt", ".jsonl", ".json") and file.is_file() else math.inf
        return int(min(self.tokens + self._val_limit, most))

    @property
    def _val_limit(self) -> int:
        """The most val rows: `val_tokens`, or their share if that is less, so that the estimate is close."""
        return min(self.val_tokens, math.ceil(self.tokens * self.val_fraction / (1 - self.val_fraction)))

    def most_rows(self) -> tuple[int, int]:
        return self._chunk_sequences * self.context, self._val_limit

    @property
    def _chunk_sequences(self) -> int:
        return max(1, self.chunk_tokens // self.context)

    def width(self, hook_name: str) -> int:
        """The width of a row, measured by running the model on a few tokens. Raises as `chunks` does."""
        return self._widths[hook_name]

    def bytes_per_row(self, hook_name: str) -> int:
        index = 3 * 4  # sequence, position and token
        return self.width(hook_name) * STORED[self.dtype].itemsize + 4 * (self.dtype == "int8") + index

    def truth(self) -> dict[str, Tensor] | None:
        return None

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        """Yield chunks from the start or after `state`; each holds the same bytes either way.

        Raises ValueError in one line for a model, tokenizer, hook or text that cannot be had or do not fit together,
        for rows that are not finite in the storage dtype, and for a chunk without a token to keep.
        """
        self.width(self.hook_names[0])  # refuses a wrong hook before the text is read
        bridge = self._bridge
        tokenizer = load_tokenizer(*self._tokenizer)  # not the bridge's own, which always has a BOS and an EOS
        before = state or {}
        pass_over_text = token_chunks(
            self._open_documents,
            tokenizer,
            context=self.context,
            tokens=self.tokens,
            chunk_sequences=self._chunk_sequences,
            val_fraction=self.val_fraction,
            val_tokens=self._val_limit,
            prepend_bos=self.prepend_bos,
            seed=self.seed,
            state=state,
        )
        special = special_ids(tokenizer)
        try:
            for number, chunk in enumerate(one_ahead(pass_over_text), start=before.get("chunk", 0)):
                after = {**chunk.state, "chunk": number + 1}
                most = {
                    "train": self.tokens - before.get("train_tokens", 0),
                    "val": self._val_limit - before.get("val_tokens", 0),
                }
                splits = {
                    split: partial(self._harvest, bridge, split, tokens, special, most[split], number)
                    for split, tokens in (("train", chunk.train), ("val", chunk.val))
                    if len(tokens)
                }
                yield Chunk(splits, after)
                before = after
        finally:
            self.__dict__.pop("_bridge", None)  # training follows in the same process and needs the memory

    @property
    def _tokenizer(self) -> tuple[str, str | None]:
        """The name and revision of the tokenizer."""
        return (self.tokenizer, None) if self.tokenizer else (self.model, self.revision)

    def _open_documents(self, skip: int) -> Iterator[str]:
        return documents(
            self.text,
            split=self.text_split,
            field=self.text_field,
            config=self.text_config,
            revision=self._content["text"].get("revision"),
            skip=skip,
        )

    def load_model(self, device: str | None = None) -> Any:
        """The model as a bridge, on its own device or another. Raises ValueError in one line."""
        device = device or self.device
        check_device(device, "data.source.device")
        return load_bridge(
            self.model,
            device=device,
            dtype=self.model_dtype,
            compatibility_mode=self.compatibility_mode,
            revision=self.revision,
            tokenizer=self.tokenizer,
        )

    @cached_property
    def _bridge(self) -> Any:
        """The model, which `chunks` lets go of at its end. Raises ValueError if it has too short a context."""
        bridge = self.load_model()
        if self.context > bridge.cfg.n_ctx:
            raise ValueError(
                f"data.source.context={self.context} is longer than the model's {bridge.cfg.n_ctx}; "
                f"set data.source.context={bridge.cfg.n_ctx} or less"
            )
        return bridge

    @cached_property
    def _widths(self) -> dict[str, int]:
        """Hook → width of a row. Raises ValueError for a hook that gives no rows."""
        return hook_widths(self._bridge, self.hook_names)

    def _harvest(self, bridge: Any, split: str, tokens: Tensor, special: list[int], most: int, number: int) -> Split:
        """Rows of a chunk's sequences [n, context] in one split, which needs `most` rows more."""
        keep = keep_mask(tokens, special)
        if not keep.any():
            raise ValueError(
                f"all {tokens.numel()} {split} tokens are special ({special[:8]}), none is left to keep; "
                "the tokenizer does not fit the text, set data.source.tokenizer"
            )
        keep &= (keep.flatten().cumsum(0) <= most).view_as(keep)  # the last sequence may bring more
        slots = torch.randperm(int(keep.sum()), generator=stream(self.seed, "rows", number, split))
        rows, scales = self._forward(bridge, tokens, keep, slots)
        order = slots.argsort()
        sequence, position = (i[order].int() for i in keep.nonzero(as_tuple=True))
        return Split(rows, {"sequence": sequence, "position": position, "tokens": tokens}, scales)

    @torch.no_grad()
    def _forward(
        self, bridge: Any, tokens: Tensor, keep: Tensor, slots: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows [kept, d_in] of each hook in the storage dtype, row i of the text in slot i of `slots`; scales if int8.

        On CUDA nothing waits for the running batch: tokens and indices are copied before the first one, and a batch is
        copied into pinned memory and checked while the next one runs.
        """
        device, dtype = bridge.cfg.device, STORED[self.dtype]
        rows = {hook: torch.empty(len(slots), self.width(hook), dtype=dtype) for hook in self.hook_names}
        scales = {hook: torch.empty(len(slots)) for hook in self.hook_names} if dtype == torch.int8 else {}
        kept = [int(k.sum()) for k in keep.split(self.model_batch)]
        inside = (keep.flatten().nonzero()[:, 0] % keep[: self.model_batch].numel()).to(device)
        batches = zip(tokens.to(device).split(self.model_batch), inside.split(kept), slots.split(kept), strict=True)
        computed = (
            (into, Computed(capture(bridge, batch, self.hook_names), index, dtype))
            for batch, index, into in batches
            if len(into)
        )
        for (into, done), _ in pairwise(chain(computed, [(slots, None)])):  # the next one runs
            assert done is not None
            for hook, (extremes, values, *scale) in done.arrived().items():
                self._check_finite(hook, extremes)
                rows[hook].index_copy_(0, into, values)
                if scale:
                    scales[hook].index_copy_(0, into, scale[0])
        return rows, scales

    def _check_finite(self, hook_name: str, extremes: Tensor) -> None:
        """Raise ValueError for rows that the storage type cannot hold; int8, with a scale, holds any finite ones."""
        if not extremes.isfinite().all():
            raise ValueError(
                f"{hook_name} is NaN or Inf in the model itself, which ran in {self.model_dtype}; "
                "set data.source.model_dtype=float32, or check the weights"
            )
        if not extremes.to(STORED[self.dtype]).isfinite().all():
            raise ValueError(
                f"{hook_name} reaches {float(extremes.abs().max()):.3g}, which overflows {self.dtype}; "
                "store it with data.source.dtype=bfloat16"
            )


class Computed:
    """One batch's rows on their way to the host, in the storage dtype, with each hook's least and greatest value."""

    def __init__(self, captured: dict[str, Tensor], index: Tensor, dtype: torch.dtype) -> None:
        self._event = torch.cuda.Event() if index.is_cuda else None
        self._values = {}
        for hook, values in captured.items():
            rows = values.flatten(0, 1).index_select(0, index).flatten(1)
            stored = quantise(rows) if dtype == torch.int8 else (rows.to(dtype),)
            # Two numbers are enough: a cast keeps order, so it overflows at the extremes if anywhere, and NaN spreads.
            extremes = torch.stack(rows.aminmax())
            self._values[hook] = [t.to("cpu", non_blocking=index.is_cuda) for t in (extremes, *stored)]  # pinned
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(index.device))  # not that of the current device

    def arrived(self) -> dict[str, list[Tensor]]:
        """Hook → least and greatest value [2], rows [kept, d_in], and scales [kept] if int8; waits for the copies."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
