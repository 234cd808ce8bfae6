"""What it costs to train without a disk: how rows mix in small pools (FVU), and how much of the source is hidden.

    python benchmarks/stream.py --model DIRECTORY --text FILE [--layer 3] [--tokens 1000000] [--held 1 4 16]

Trains one SAE on one pass over the same rows: harvested to disk first, with all of them in memory, and streamed through
pools of so many chunks; the runs of a round take turns. Every SAE is measured on the same held-out rows, those on disk.
Seconds are those of the whole command: for the disk with its harvest, or with --shards DIRECTORY without.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import cpu_model

from msae.data.order import Spread
from msae.data.stream import BESIDE
from msae.sources.bridge import load_bridge

CHUNK, CONTEXT = 16_384, 128


def settings(a: argparse.Namespace) -> list[str]:
    """The command line of every run."""
    return [
        "+experiment=gpt2_l8",
        f"data.source.model={a.model}",
        f"data.source.text={a.text}",
        f"data.source.hook_names=[blocks.{a.layer}.hook_resid_pre]",
        f"data.source.tokens={a.tokens}",
        f"data.source.val_tokens={a.tokens // 50}",
        f"data.source.context={CONTEXT}",
        f"data.source.chunk_tokens={CHUNK}",
        f"tokens={a.tokens}",
        "data.batch_tokens=1024",
        f"model.d_sae={a.d_sae}",
        "model.lr=1e-3",
        "model.schedule.warmup_steps=20",
        "evaluation.ce_sequences=0",
    ]


def memory_gb(a: argparse.Namespace, width: int, held: int) -> float:
    """The least memory that holds so many chunks of float16 rows."""
    row = 2 * width + 12
    return (a.tokens // 50 + (held + BESIDE) * CHUNK) * row / 1e9 * (1 + 1e-6)


def timed(*arguments: str) -> float:
    """Seconds of `python -m msae.train` with these arguments."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "msae.train", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--held", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=1)
    a = parser.parse_args()
    print(f"{cpu_model()}, {os.cpu_count()} cores; {a.tokens:,} rows of chunks of {CHUNK:,} tokens, d_sae {a.d_sae}")
    width = load_bridge(a.model, device="cpu").cfg.d_model
    chunks = -(-a.tokens // (CHUNK - CHUNK // CONTEXT)) + 1
    with tempfile.TemporaryDirectory() as scratch:
        rows = {"disk": [], **{f"{held} chunks": [memory_gb(a, width, held)] for held in [*a.held, chunks]}}
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for number in range(a.rounds):
            for name, gb in rows.items():
                run, root = f"{scratch}/{name.split()[0]}-{number}", f"{scratch}/shards-{number}"
                where = [f"data.memory_gb={gb[0]}", f"data.root={scratch}/none"] if gb else [f"data.root={root}"]
                seconds[name].append(timed(*settings(a), *where, f"run_dir={run}"))
        (shards,) = Path(f"{scratch}/shards-0").iterdir()
        runs = [f"{scratch}/{name.split()[0]}-0" for name in rows]
        evaluate = [f"sae=[{','.join(runs)}]", f"shards={shards}", "rows=all", f"out={scratch}/out"]
        subprocess.run([sys.executable, "-m", "msae.evaluate", *evaluate], check=True, capture_output=True)
        figures = json.loads(Path(f"{scratch}/out/evaluation.json").read_text())["saes"]
    print(f"{'rows':>10} {'GB':>7} {'rows mix over':>14} {'FVU':>8} {'seconds':>8}")
    for (name, gb), run in zip(rows.items(), runs, strict=True):
        held = int(name.split()[0]) if gb else chunks
        over = a.tokens if held >= chunks else min(a.tokens, Spread(held, 4).span * CHUNK)
        fvu = figures[run]["figures"][f"val/fvu/p{a.d_sae}"]
        size = f"{gb[0]:.3f}" if gb else "disk"
        print(f"{name:>10} {size:>7} {over:>14,} {fvu:>8.4f} {statistics.median(seconds[name]):>8.1f}")


if __name__ == "__main__":
    main()
