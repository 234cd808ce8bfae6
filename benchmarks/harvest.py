"""Tokens/s of a harvest, writing included, against the bare forward pass that ends at the same layer.

    python benchmarks/harvest.py [--model DIRECTORY --text FILE] [--layer 3] [--context 128 ...] [--model-batch 16 ...]
    python benchmarks/harvest.py --device cuda --model-dtype bfloat16 --dtypes bfloat16 --tokens 1000000 ...
    python benchmarks/harvest.py --fvu --model DIRECTORY --text FILE      what each storage dtype costs in FVU

Without a model and a text, a random GPT-2-shaped model with a tokenizer and random words are made in place. Everything
runs in each round, one after the other, and ratios are medians over the rounds. A harvest is timed from a loaded model
to opened shards: opening the text, tokenising, forward passes, statistics, checksums, writing and syncing. On a GPU a
clock is read only when the device has done all it was given.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from msae.data.harvest import harvest
from msae.data.shards import Shards
from msae.evaluation.reconstruction import reconstruction_metrics
from msae.runs import open_run
from msae.sources.bridge import DTYPES, Dtype, capture, load_bridge, quiet
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


@dataclass
class Job:
    """What is harvested of which text, where the model runs, and how often it is timed."""

    model: str
    text: str
    layer: int = 3
    tokens: int = 131_072
    chunk_tokens: int = 16_384
    dtypes: Sequence[str] = ("float16", "bfloat16", "int8")
    attentions: Sequence[str] = ("eager", "sdpa")  # of transformers
    rounds: int = 5
    device: str = "cpu"
    model_dtype: Dtype = "float32"

    @property
    def hook(self) -> str:
        return f"blocks.{self.layer}.hook_resid_pre"

    def source(self, dtype: str, context: int, model_batch: int) -> dict[str, Any]:
        """The source's settings for one harvest."""
        where = {"device": self.device, "model_dtype": self.model_dtype}
        sizes = {"tokens": self.tokens, "chunk_tokens": self.chunk_tokens, "context": context}
        names = {"model": self.model, "text": self.text, "hook_names": [self.hook]}
        return {**names, **sizes, **where, "dtype": dtype, "model_batch": model_batch}


def random_model(
    directory: Path,
    layers: int = 6,
    width: int = 256,
    heads: int = 8,
    vocabulary: int = 4096,
    words: int = 300_000,
    document: int = 200,
) -> tuple[Path, Path]:
    """A random GPT-2, a byte-level BPE tokenizer, and random words (2 MB), so many of them a document."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(0)
    letters = [torch.randint(97, 123, (2 + i % 8,), generator=generator).tolist() for i in range(3000)]
    known = [bytes(word).decode() for word in letters]
    picks = (3000 ** torch.rand(words, generator=generator)).long() % 3000  # few words make most of a text
    text = directory / "text.txt"
    text.write_text("\n".join(" ".join(known[i] for i in line.tolist()) for line in picks.split(document)))
    trained = ByteLevelBPETokenizer()
    trained.train([str(text)], vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False)
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **end).save_pretrained(directory / "model")
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024, "vocab_size": vocabulary}
    torch.manual_seed(0)
    with quiet():
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(directory / "model")
    return directory / "model", text


def transformers_forward(job: Job, attention: str) -> Callable[[torch.Tensor], None]:
    """transformers' own forward pass up to the input of a block, without hooks anywhere but there."""
    from transformers import AutoModel

    class Reached(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Reached

    dtype = DTYPES[job.model_dtype]
    plain = AutoModel.from_pretrained(job.model, attn_implementation=attention, dtype=dtype).to(job.device).eval()
    blocks = next(part for part in plain.children() if isinstance(part, torch.nn.ModuleList))
    blocks[job.layer].register_forward_pre_hook(stop)

    def forward(tokens: torch.Tensor) -> None:
        with contextlib.suppress(Reached):
            plain(tokens.long().to(job.device), use_cache=False)

    return forward


def wait() -> None:
    """Until the GPU, if one is used, has done all it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass
class Ways:
    """What is timed of one context and model_batch: each gives its seconds.

    `rows` of `computed` tokens are kept; `opened`: the shards of each storage dtype.
    """

    timed: dict[str, Callable[[], float]]
    opened: dict[str, Shards]
    rows: int
    computed: int

    def ratio(self, times: dict[str, list[float]], name: str, to: str = "bare forward") -> float:
        """Its tokens a second as a share of another's: the median over the rounds."""
        return statistics.median(other / own for other, own in zip(times[to], times[name], strict=True))


def ways(job: Job, root: Path, context: int, model_batch: int) -> Ways:
    """All of them, run once to warm up."""

    def timed_harvest(dtype: str, directory: Path) -> tuple[float, Shards]:
        source = LanguageModelSource(**job.source(dtype, context, model_batch))
        source.identity(job.hook)
        source.width(job.hook)  # from here on the files are hashed and the model is loaded
        wait()
        begun = time.perf_counter()
        shards = harvest(source, directory, show=False)[job.hook]
        return time.perf_counter() - begun, shards

    def harvest_again(dtype: str) -> float:
        with tempfile.TemporaryDirectory(dir=root) as directory:
            return timed_harvest(dtype, Path(directory))[0]

    @torch.no_grad()
    def forward_all(forward: Callable[[torch.Tensor], object], batches: list[torch.Tensor]) -> float:
        begun = time.perf_counter()
        for batch in batches:
            forward(batch)
        wait()
        return time.perf_counter() - begun

    bridge = load_bridge(job.model, device=job.device, dtype=job.model_dtype)
    opened = {dtype: timed_harvest(dtype, root / f"{context}-{model_batch}")[1] for dtype in job.dtypes}
    shards = opened[job.dtypes[0]]
    sequences = [shards.index(split, i)["tokens"] for split in shards.entries for i in range(len(shards.rows(split)))]
    batches = [batch for tokens in sequences for batch in tokens.split(model_batch)]
    forwards: dict[str, Callable[[torch.Tensor], object]] = {"bare forward": lambda b: capture(bridge, b, [job.hook])}
    for attention in job.attentions:
        forwards[f"transformers {attention}"] = transformers_forward(job, attention)
    for forward in forwards.values():
        forward_all(forward, batches[:1])
    timed = {name: partial(forward_all, forward, batches) for name, forward in forwards.items()}
    timed |= {dtype: partial(harvest_again, dtype) for dtype in opened}
    rows, computed = sum(sum(shards.rows(split)) for split in shards.entries), sum(map(torch.numel, batches))
    return Ways(timed, opened, rows, computed)


def measure(job: Job, root: Path, context: int, model_batch: int) -> None:
    """Print the table of one context and model_batch."""
    these = ways(job, root, context, model_batch)
    times: dict[str, list[float]] = {name: [] for name in these.timed}
    for _ in range(job.rounds):
        for name, way in these.timed.items():
            times[name].append(way())
    print(
        f"context {context}, model_batch {model_batch}, {job.hook}, {job.model_dtype} on {job.device}, "
        f"{torch.get_num_threads()} threads: {these.rows:,} rows of {these.computed:,} tokens computed "
        f"({these.rows / these.computed:.2%})\n"
        f"{'':>20}  tokens/s  ratio  bytes/row"
    )
    for name, of in times.items():
        shards = these.opened.get(name)
        size = f"  {sum(e.bytes for e in shards.manifest.shards) / these.rows:9.1f}" if shards else ""
        speed = these.computed / statistics.median(of)
        print(f"{name:>20}  {speed:8,.0f}  {these.ratio(times, name):5.3f}{size}")


def effect_on_fvu(job: Job, root: Path, context: int, model_batch: int, seeds: int) -> None:
    """Train the same SAE on the same rows in each storage dtype and measure each on the float32 rows held out."""
    sources = {d: job.source(d, context, model_batch) for d in dict.fromkeys(["float32", *job.dtypes])}
    opened = {d: harvest(LanguageModelSource(**s), root / "shards", show=False)[job.hook] for d, s in sources.items()}
    exact = opened["float32"]
    held_out = [exact.activations("val", i) for i in range(len(exact.rows("val")))]
    rows, variance = sum(exact.rows("train")), exact.mean_square - float(exact.mean.square().sum())
    print(
        f"{job.hook}, {rows:,} training rows, FVU of {sum(map(len, held_out)):,} held-out ones\n"
        f"{'':>9}  storage E‖x−x̂‖²/Var  FVU with seed {'  '.join(map(str, range(seeds)))}"
    )
    for dtype, shards in opened.items():
        pairs = (
            [of.activations("train", i).double() for of in (shards, exact)] for i in range(len(exact.rows("train")))
        )
        error = sum(float((stored - x).square().sum()) for stored, x in pairs) / rows / variance
        fvus = []
        for seed in range(seeds):
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model-dtype", choices=[*DTYPES], default="float32", help="in which the model runs")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; use --device cpu")
    keep_freed_memory()  # as training does; the forward pass gains most
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if a.model is None or a.text is None:
            a.model, a.text = map(str, random_model(root))
        sizes = {"rounds": a.rounds, "device": a.device, "model_dtype": a.model_dtype}
        job = Job(a.model, a.text, a.layer, a.tokens, a.chunk_tokens, a.dtypes, **sizes)
        if a.fvu:
            return effect_on_fvu(job, root, a.context[0], a.model_batch[0], a.seeds)
        for context in a.context:
            for model_batch in a.model_batch:
                measure(job, root, context, model_batch)


if __name__ == "__main__":
    main()
