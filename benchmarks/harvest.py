"""Tokens/s of a harvest, writing included, against the bare forward pass that ends at the same layer.

    python benchmarks/harvest.py [--model DIRECTORY --text FILE] [--layer 3] [--context 128 ...] [--model-batch 16 ...]
    python benchmarks/harvest.py --fvu --model DIRECTORY --text FILE      what each storage dtype costs in FVU

Without a model and a text, a random GPT-2-shaped model with a tokenizer and random words are made in place. Everything
runs in each round, one after the other, and ratios are medians over the rounds. A harvest is timed from a loaded model
to opened shards: opening the text, tokenising, forward passes, statistics, checksums, writing and syncing.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from msae.data.harvest import harvest
from msae.data.shards import Shards
from msae.evaluation.reconstruction import reconstruction_metrics
from msae.runs import open_run
from msae.sources.bridge import capture, load_bridge
from msae.sources.language_model import LanguageModelSource
from msae.training.memory import keep_freed_memory

SAE = {  # what is trained by --fvu
    "tokens": 300_000,
    "data.batch_tokens": 1024,
    "data.val_rows": 4096,
    "model.d_sae": 1024,
    "model.k": 32,
    "model.lr": 1e-3,
    "model.schedule.warmup_steps": 20,
}


def random_model(directory: Path) -> tuple[Path, Path]:
    """A random GPT-2 (6 layers, width 256), a byte-level BPE tokenizer of 4096 tokens, and 2 MB of random words."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(0)
    letters = [torch.randint(97, 123, (2 + i % 8,), generator=generator).tolist() for i in range(3000)]
    words = [bytes(word).decode() for word in letters]
    picks = (3000 ** torch.rand(300_000, generator=generator)).long() % 3000  # few words make most of a text
    text = directory / "text.txt"
    text.write_text("\n".join(" ".join(words[i] for i in line) for line in picks.split(200)))
    trained = ByteLevelBPETokenizer()
    trained.train([str(text)], vocab_size=4096, special_tokens=["<|endoftext|>"], show_progress=False)
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **end).save_pretrained(directory / "model")
    sizes = {"n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 1024, "vocab_size": 4096}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(directory / "model")
    return directory / "model", text


def transformers_forward(model: str, layer: int, attention: str) -> Callable[[torch.Tensor], None]:
    """transformers' own forward pass up to the input of a block, without hooks anywhere but there."""
    from transformers import AutoModel

    class Reached(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Reached

    plain = AutoModel.from_pretrained(model, attn_implementation=attention, dtype=torch.float32).eval()
    blocks = next(part for part in plain.children() if isinstance(part, torch.nn.ModuleList))
    blocks[layer].register_forward_pre_hook(stop)

    def forward(tokens: torch.Tensor) -> None:
        with contextlib.suppress(Reached):
            plain(tokens.long(), use_cache=False)

    return forward


def settings(a: argparse.Namespace, dtype: str, context: int, model_batch: int) -> dict[str, Any]:
    """The source's settings for one harvest."""
    sizes = {"tokens": a.tokens, "chunk_tokens": a.chunk_tokens, "context": context, "model_batch": model_batch}
    return {"model": a.model, "text": a.text, "hook_names": [a.hook], "dtype": dtype, "device": "cpu", **sizes}


def measure(a: argparse.Namespace, root: Path, context: int, model_batch: int) -> None:
    """Print the table of one context and model_batch."""

    def timed_harvest(dtype: str, directory: Path) -> tuple[float, Shards]:
        source = LanguageModelSource(**settings(a, dtype, context, model_batch))
        source.identity(a.hook)
        source.width(a.hook)  # from here on the files are hashed and the model is loaded
        start = time.perf_counter()
        shards = harvest(source, directory, show=False)[a.hook]
        return time.perf_counter() - start, shards

    bridge = load_bridge(a.model, device="cpu")
    opened = {dtype: timed_harvest(dtype, root / f"{context}-{model_batch}")[1] for dtype in a.dtypes}
    shards = opened[a.dtypes[0]]
    sequences = [shards.index(split, i)["tokens"] for split in shards.entries for i in range(len(shards.rows(split)))]
    batches = [batch for tokens in sequences for batch in tokens.split(model_batch)]
    computed, rows = sum(map(torch.numel, batches)), sum(sum(shards.rows(split)) for split in shards.entries)
    forwards: dict[str, Callable[[torch.Tensor], object]] = {"bare forward": lambda b: capture(bridge, b, [a.hook])}
    for attention in ("eager", "sdpa"):
        forwards[f"transformers {attention}"] = transformers_forward(a.model, a.layer, attention)

    seconds: dict[str, list[float]] = {name: [] for name in [*forwards, *opened]}
    for _ in range(a.rounds):
        for name, forward in forwards.items():
            start = time.perf_counter()
            with torch.no_grad():
                for batch in batches:
                    forward(batch)
            seconds[name].append(time.perf_counter() - start)
        for dtype in opened:
            with tempfile.TemporaryDirectory(dir=root) as directory:
                seconds[dtype].append(timed_harvest(dtype, Path(directory))[0])

    print(
        f"context {context}, model_batch {model_batch}, {a.hook}, {torch.get_num_threads()} threads: "
        f"{rows:,} rows of {computed:,} tokens computed ({rows / computed:.2%})\n"
        f"{'':>20}  tokens/s  ratio  bytes/row"
    )
    for name, times in seconds.items():
        ratio = statistics.median(bare / other for bare, other in zip(seconds["bare forward"], times, strict=True))
        size = f"  {sum(e.bytes for e in opened[name].manifest.shards) / rows:9.1f}" if name in opened else ""
        print(f"{name:>20}  {computed / statistics.median(times):8,.0f}  {ratio:5.3f}{size}")


def effect_on_fvu(a: argparse.Namespace, root: Path) -> None:
    """Train the same SAE on the same rows in each storage dtype and measure each on the float32 rows held out."""
    sources = {d: settings(a, d, a.context[0], a.model_batch[0]) for d in dict.fromkeys(["float32", *a.dtypes])}
    opened = {d: harvest(LanguageModelSource(**s), root / "shards", show=False)[a.hook] for d, s in sources.items()}
    exact = opened["float32"]
    held_out = [exact.activations("val", i) for i in range(len(exact.rows("val")))]
    rows, variance = sum(exact.rows("train")), exact.mean_square - float(exact.mean.square().sum())
    print(
        f"{a.hook}, {rows:,} training rows, FVU of {sum(map(len, held_out)):,} held-out ones\n"
        f"{'':>9}  storage E‖x−x̂‖²/Var  FVU with seed {'  '.join(map(str, range(a.seeds)))}"
    )
    for dtype, shards in opened.items():
        pairs = (
            [of.activations("train", i).double() for of in (shards, exact)] for i in range(len(exact.rows("train")))
        )
        error = sum(float((stored - x).square().sum()) for stored, x in pairs) / rows / variance
        fvus = []
        for seed in range(a.seeds):
            run = root / f"{dtype}-{seed}"
            keys = {f"++data.source.{key}": value for key, value in sources[dtype].items()}
            keys |= {"data.root": root / "shards", "run_dir": run, "seed": seed, **SAE}
            overrides = [f"{key}={value}" for key, value in keys.items()]
            command = [sys.executable, "-m", "msae.train", "data=language_model", *overrides]
            subprocess.run(command, check=True, capture_output=True)
            sae = open_run(run).load_sae()
            metrics = reconstruction_metrics(sae, (batch for x in held_out for batch in x.split(4096)))
            fvus.append(f"{metrics[f'fvu/p{sae.d_sae}']:.5f}")
        print(f"{dtype:>9}  {error:21.3e}  {'  '.join(fvus)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory made by save_pretrained, or a hub name")
    parser.add_argument("--text", help="a .txt, .jsonl, .parquet or .arrow file")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--chunk-tokens", type=int, default=16_384)
    parser.add_argument("--context", type=int, nargs="+", default=[128])
    parser.add_argument("--model-batch", type=int, nargs="+", default=[16])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "int8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fvu", action="store_true", help="measure what storage dtypes cost instead of speed")
    parser.add_argument("--seeds", type=int, default=2, help="trainings for each dtype with --fvu")
    a = parser.parse_args()
    a.hook = f"blocks.{a.layer}.hook_resid_pre"
    keep_freed_memory()  # as training does; the forward pass gains most
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if a.model is None or a.text is None:
            a.model, a.text = map(str, random_model(root))
        if a.fvu:
            return effect_on_fvu(a, root)
        for context in a.context:
            for model_batch in a.model_batch:
                measure(a, root, context, model_batch)


if __name__ == "__main__":
    main()
