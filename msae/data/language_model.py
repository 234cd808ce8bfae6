"""Activations of a language model on text: transformer_lens runs it, here rows are masked, cast, shuffled."""

import importlib.metadata
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msae.data.bridge import (
    DTYPES,
    TOKENIZER,
    capture,
    hook_widths,
    load_bridge,
    load_tokenizer,
    model_identity,
    pick_device,
    torch_dtype,
)
from msae.data.seeds import stream
from msae.data.shards import quantise
from msae.data.source import Chunk, Split
from msae.data.text import documents, text_identity
from msae.data.tokens import TokenChunk, keep_mask, one_ahead, special_ids, token_chunks

SETTINGS = ["context", "prepend_bos", "dtype", "model_dtype", "compatibility_mode", "text_field", "seed"]
SETTINGS += ["tokens", "val_fraction", "val_tokens", "chunk_tokens", "model_batch"]
STORED = {**DTYPES, "int8": torch.int8}  # int8 rows have a float32 scale each
WEIGHTS = ("*.safetensors", "*.bin", "config.json")


class LanguageModelSource:
    """Rows of `hook_names` of one language model, all in one pass over a text and so aligned row by row.

    `model` and `tokenizer` are hub names or directories made by save_pretrained; `text*` are as in
    `msae.data.text.documents`. Documents are packed into sequences of `context` tokens, and attention reaches
    across the documents in a sequence. Rows at special tokens (BOS too) are dropped. Train has `tokens` rows,
    fewer if the text ends; val has at most `val_tokens` and at most its share, from a `val_fraction` of the
    documents. Rows are stored as `dtype` (float32, float16, bfloat16, or int8 with a scale for each row: half the
    disk) and computed in `model_dtype`, `model_batch` sequences a forward. A chunk is `chunk_tokens` tokens of train
    sequences; rows are shuffled within it. `compatibility_mode` folds LayerNorm and centres the weights as the first
    TransformerLens did; without it activations are those of transformers. Raises ValueError for impossible settings;
    the model, hooks and text are looked at only when they are needed.
    """

    def __init__(
        self,
        *,
        model: str,
        hook_names: list[str],
        text: str,
        tokens: int,
        text_split: str = "train",
        text_field: str = "text",
        text_config: str | None = None,
        context: int = 128,
        val_fraction: float = 0.05,
        val_tokens: int = 500_000,
        prepend_bos: bool = True,
        dtype: str = "float16",
        model_dtype: str = "float32",
        chunk_tokens: int = 262_144,
        model_batch: int = 16,
        seed: int = 0,
        device: str = "auto",
        tokenizer: str | None = None,
        revision: str | None = None,
        compatibility_mode: bool = False,
    ) -> None:
        torch_dtype(dtype, "data.source.dtype", STORED)
        torch_dtype(model_dtype, "data.source.model_dtype")
        for key, number in (("tokens", tokens), ("model_batch", model_batch), ("chunk_tokens", chunk_tokens)):
            if number < 1:
                raise ValueError(f"data.source.{key}={number} must be positive")
        if context < 1 + prepend_bos:
            raise ValueError(f"data.source.context={context} has no room for text; set it to 2 or more")
        if not 0 <= val_fraction < 1 or val_tokens < 0:
            raise ValueError(
                f"data.source.val_fraction={val_fraction} must be in [0, 1), val_tokens={val_tokens} not < 0"
            )
        self.hook_names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
        if not self.hook_names or len(set(self.hook_names)) < len(self.hook_names):
            raise ValueError(f"data.source.hook_names={self.hook_names} must be one or more, each once")
        self.model, self.tokenizer, self.revision = model, tokenizer, revision
        self.text, self.text_split = text, text_split
        self.text_field, self.text_config = text_field, text_config
        self.context, self.tokens, self.prepend_bos, self.seed = context, tokens, prepend_bos, seed
        self.val_fraction, self.val_tokens = val_fraction, val_tokens
        self.dtype, self.model_dtype, self.compatibility_mode = dtype, model_dtype, compatibility_mode
        self.chunk_tokens, self.model_batch, self.device = chunk_tokens, model_batch, device
        self._files: dict[str, Any] | None = None  # what is expensive to find, once found
        self._widths: dict[str, int] | None = None
        self._bridge: Any = None

    budget_key = "data.source.tokens"

    @property
    def name(self) -> str:
        """The last part of the model's path or name, fit for a directory's name."""
        last = Path(self.model).expanduser().resolve().name
        return re.sub(r"[^A-Za-z0-9_.]+", "-", last).strip("-.").lower()

    def identity(self, hook_name: str) -> dict[str, Any]:
        """What decides the shards' bytes, from the files alone. Raises ValueError if they are not there."""
        if self._files is None:
            self._files = {
                "text": text_identity(self.text, split=self.text_split, config=self.text_config),
                "model": model_identity(self.model, self.revision, WEIGHTS),
                "tokenizer": model_identity(*self._tokenizer(), TOKENIZER),
                "dropped_ids": special_ids(load_tokenizer(*self._tokenizer())),
            }
        settings = {key: getattr(self, key) for key in SETTINGS}
        return {"source": "language_model", "hook_name": hook_name, **self._files, **settings}

    def provenance(self) -> dict[str, Any]:
        """Paths as they were given, the device, and the versions of what computed the rows."""
        libraries = ("torch", "transformer_lens", "transformers", "datasets")
        keys = ("model", "tokenizer", "revision", "text", "text_split", "text_config")
        given = {key: getattr(self, key) for key in keys}
        versions = {name: importlib.metadata.version(name) for name in libraries}
        return {**given, "device": str(pick_device(self.device)), "versions": versions}

    def expected_rows(self) -> int:
        """The most rows there can be, train and val: a token is at least a byte of a local text."""
        file = Path(self.text).expanduser()
        most = file.stat().st_size if file.suffix in (".txt", ".jsonl", ".json") and file.is_file() else math.inf
        return int(min(self.tokens + self._val_limit(), most))

    def _val_limit(self) -> int:
        """The most val rows: `val_tokens`, or its share if that is less, so that the estimate is close."""
        return min(self.val_tokens, math.ceil(self.tokens * self.val_fraction / (1 - self.val_fraction)))

    def most_rows(self) -> tuple[int, int]:
        """Every token of a chunk's train sequences, and the limit of val rows."""
        return self._chunk_sequences() * self.context, self._val_limit()

    def _chunk_sequences(self) -> int:
        return max(1, self.chunk_tokens // self.context)

    def d_in(self, hook_name: str) -> int:
        """The width of a row, found by running the model on a few tokens. Raises as `chunks` does."""
        if self._widths is None:
            self._load()
        assert self._widths is not None
        return self._widths[hook_name]

    def bytes_per_row(self, hook_name: str) -> int:
        """The row itself, its scale if it is int8, and int32 sequence, position and token."""
        return self.d_in(hook_name) * STORED[self.dtype].itemsize + 4 * (self.dtype == "int8") + 3 * 4

    def truth(self) -> dict[str, Tensor] | None:
        """None: what features a language model has, nobody knows."""
        return None

    def chunks(self, state: dict[str, Any] | None) -> Iterator[Chunk]:
        """Chunks from the start or after `state`; each holds the same bytes either way.

        Raises ValueError in one line for a model, tokenizer, hook or text that cannot be had or do not fit
        together, for rows that are not finite in the storage dtype, and for a chunk without one token to
        keep.
        """
        bridge = self._load()
        tokenizer = load_tokenizer(*self._tokenizer())  # not the bridge's own, which always has a BOS and an EOS
        done = state or {}
        pass_over_text = token_chunks(
            self._open_documents,
            tokenizer,
            context=self.context,
            tokens=self.tokens,
            chunk_sequences=self._chunk_sequences(),
            val_fraction=self.val_fraction,
            val_tokens=self._val_limit(),
            prepend_bos=self.prepend_bos,
            seed=self.seed,
            state=state,
        )
        special = special_ids(tokenizer)
        try:
            for number, chunk in enumerate(one_ahead(pass_over_text), start=done.get("chunk", 0)):
                before, done = done, {**chunk.state, "chunk": number + 1}
                yield Chunk(self._harvest(bridge, chunk, special, before, number), done)  # and no name keeps it alive
        finally:
            self._bridge = None  # training follows in the same process and wants the memory

    def _tokenizer(self) -> tuple[str, str | None]:
        """The name and revision of the tokenizer."""
        return (self.tokenizer, None) if self.tokenizer else (self.model, self.revision)

    def _open_documents(self, skip: int) -> Iterator[str]:
        how = {"split": self.text_split, "field": self.text_field, "config": self.text_config}
        revision = self.identity(self.hook_names[0])["text"].get("revision")
        return documents(self.text, **how, revision=revision, skip=skip)  # type: ignore[arg-type]

    def _load(self) -> Any:
        """The model, checked against the tokenizer and the settings, loaded once."""
        if self._bridge is None:
            bridge = load_bridge(
                self.model,
                device=self.device,
                dtype=self.model_dtype,
                compatibility_mode=self.compatibility_mode,
                revision=self.revision,
                tokenizer=self.tokenizer,
            )
            if self.context > bridge.cfg.n_ctx:
                raise ValueError(
                    f"data.source.context={self.context} is longer than the model's {bridge.cfg.n_ctx}; "
                    f"set data.source.context={bridge.cfg.n_ctx} or less"
                )
            self._widths = hook_widths(bridge, self.hook_names)
            self._bridge = bridge
        return self._bridge

    def _harvest(
        self, bridge: Any, chunk: TokenChunk, special: list[int], done: dict[str, Any], number: int
    ) -> dict[str, Split]:
        """The chunk's splits; the state `done` before it tells how many rows are still wanted."""
        splits = {}
        wanted = {"train": (chunk.train, self.tokens), "val": (chunk.val, self._val_limit())}
        for split, (tokens, total) in wanted.items():
            if len(tokens) == 0:
                continue
            keep = keep_mask(tokens, special)
            if not keep.any():
                raise ValueError(
                    f"all {tokens.numel()} {split} tokens are special ({special[:8]}), none is left to keep; "
                    "the tokenizer does not fit the text, set data.source.tokenizer"
                )
            # The last sequence may bring more than is wanted.
            keep &= (keep.flatten().cumsum(0) <= total - done.get(f"{split}_tokens", 0)).view_as(keep)
            slots = torch.randperm(int(keep.sum()), generator=stream(self.seed, "rows", number, split))
            rows, scales = self._forward(bridge, tokens, keep, slots)
            sequence, position = (place(i.int(), slots) for i in keep.nonzero(as_tuple=True))
            splits[split] = Split(rows, {"sequence": sequence, "position": position, "tokens": tokens}, scales)
        return splits

    @torch.no_grad()
    def _forward(
        self, bridge: Any, tokens: Tensor, keep: Tensor, slots: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of each hook rows [kept, d_in] in the storage dtype, row i of the text in slot i of `slots`; scales if int8.

        On CUDA nothing waits for the batch that is being computed: tokens and indices are there before the first
        one, and a batch is copied into pinned memory and looked at while the next one runs.
        """
        assert self._widths is not None
        device, dtype = bridge.cfg.device, STORED[self.dtype]
        rows = {hook: torch.empty(len(slots), self._widths[hook], dtype=dtype) for hook in self.hook_names}
        scales = {hook: torch.empty(len(slots)) for hook in self.hook_names} if dtype == torch.int8 else {}
        kept = [int(k.sum()) for k in keep.split(self.model_batch)]
        inside = (keep.flatten().nonzero()[:, 0] % keep[: self.model_batch].numel()).to(device)
        computed: Computed | None = None
        for batch, index, here in zip(
            tokens.to(device).split(self.model_batch), inside.split(kept), slots.split(kept), strict=True
        ):
            if len(here) == 0:
                continue
            before, computed = computed, Computed(capture(bridge, batch, self.hook_names), index, here, dtype)
            if before is not None:
                self._place(before, rows, scales)
        assert computed is not None, "a split without a token to keep was refused"
        self._place(computed, rows, scales)
        return rows, scales

    def _place(self, computed: "Computed", rows: dict[str, Tensor], scales: dict[str, Tensor]) -> None:
        """Put a batch's rows into their slots. Raises ValueError if one of them is not finite."""
        for hook, (extremes, values, *scale) in computed.arrived().items():
            held = extremes if values.dtype == torch.int8 else extremes.to(values.dtype)  # a scale holds all of them
            if not held.isfinite().all():
                raise ValueError(not_finite(hook, extremes, self.dtype, self.model_dtype))
            rows[hook].index_copy_(0, computed.slots, values)
            for found in scale:
                scales[hook].index_copy_(0, computed.slots, found)


class Computed:
    """One batch's rows on their way to the host: of each hook their extremes, and they in the storage dtype."""

    def __init__(self, captured: dict[str, Tensor], index: Tensor, slots: Tensor, dtype: torch.dtype) -> None:
        self.slots = slots
        self._event = torch.cuda.Event() if index.is_cuda else None
        self._values = {}
        for hook, values in captured.items():
            found = values.flatten(0, 1).index_select(0, index).flatten(1)
            stored = quantise(found) if dtype == torch.int8 else (found.to(dtype),)
            # Two numbers tell all: a cast keeps order, so it overflows at the extremes if anywhere, and NaN spreads.
            tensors = (torch.stack(found.aminmax()), *stored)
            self._values[hook] = tuple(t.to("cpu", non_blocking=index.is_cuda) for t in tensors)  # pinned by to()
        if self._event is not None:
            self._event.record()

    def arrived(self) -> dict[str, tuple[Tensor, ...]]:
        """Hook → least and greatest value [2], rows [kept, d_in], and scales [kept] if int8, once all is copied."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


def place(values: Tensor, slots: Tensor) -> Tensor:
    """Value i into slot i."""
    return torch.empty_like(values).index_copy_(0, slots, values)


def not_finite(hook_name: str, values: Tensor, dtype: str, model_dtype: str) -> str:
    if values.isfinite().all():
        return (
            f"{hook_name} reaches {float(values.abs().max()):.3g}, which overflows {dtype}; "
            "store it with data.source.dtype=bfloat16"
        )
    return (
        f"{hook_name} is NaN or Inf in the model itself, which ran in {model_dtype}; "
        "set data.source.model_dtype=float32, or check the weights"
    )
