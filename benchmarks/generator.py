"""Rows a second of the synthetic source: the 20-feature tree, and SynthSAEBench-16k with and without its correlations.

    python benchmarks/generator.py [--peers-python ../peers/bin/python] [--rounds 5] [--threads 2]

`msae …` makes rows as a harvest does, `draw` the active features alone. With --peers-python (see benchmarks/step.py)
SAELens's generator of the same 16,384 features at d_in 768 takes turns with them, without orthogonalisation, which is
no part of a row, in batches of 1024 as its trainer asks for, dense (its default), which is faster than its sparse form
on a CPU. Each is a process of its own that waits while another computes. Medians over the rounds, and the median of the
rounds' ratios; cores: CPU seconds a second; L0: active features a row. No accelerator is used.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONF = Path(__file__).parents[1] / "conf"
OURS = ("tree", "tree, draw", "16k", "16k, draw", "16k correlated", "16k correlated, draw")
PEERS = ("saelens 16k", "saelens 16k correlated")
SECONDS = 3.0  # of a turn, at least


def msae_rows(name: str) -> tuple[Callable[[], int], float]:
    """What makes rows and returns how many, and the rows' L0."""
    from omegaconf import OmegaConf

    from msae.data.synthetic import BLOCK, ForestSource

    options: dict[str, Any] = {}
    if name.startswith("16k"):
        options = OmegaConf.to_container(OmegaConf.load(CONF / "experiment/forest_16k.yaml"))["data"]["source"]
        if "correlated" not in name:
            options["correlation_rank"] = 0
    source = ForestSource(**options)
    generator, rows = torch.Generator().manual_seed(0), BLOCK if name.startswith("16k") else 16 * BLOCK
    l0 = len(source.draw(BLOCK, generator)[0]) / BLOCK
    if name.endswith("draw"):
        return lambda: len([source.draw_csr(BLOCK, generator) for _ in range(rows // BLOCK)]) * BLOCK, l0
    options = {**options, "rows": rows, "chunk_rows": rows, "val_rows": 1}
    source = ForestSource(**options)

    def run() -> int:
        chunk = next(source.chunks(None))
        return sum(len(split.activations["synthetic"]) for split in chunk.splits.values())

    return run, l0


def saelens_rows(name: str) -> tuple[Callable[[], int], float]:
    """The same for SAELens's generator with the published settings of SynthSAEBench-16k."""
    import sae_lens.synthetic as s

    config = s.SyntheticModelConfig(
        num_features=16_384,
        hidden_dim=768,
        firing_probability=s.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=s.HierarchyConfig(
            total_root_nodes=128,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        correlation=s.LowRankCorrelationConfig(rank=25, correlation_scale=0.1) if "correlated" in name else None,
        mean_firing_magnitudes=s.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=s.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=0,
    )
    model = s.SyntheticModel(config, s.FeatureDictionary(16_384, 768, bias=0.5, initializer=None, seed=0))
    return lambda: len(model.sample(1024)), float((model.activation_generator.sample(1024) > 0).sum(1).float().mean())


def serve(name: str, threads: int) -> None:
    """Answer each line on stdin with a turn, in JSON on what was stdout; packages print to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    run, l0 = (saelens_rows if name in PEERS else msae_rows)(name)
    run()
    print(json.dumps(l0), file=answers)
    for _ in sys.stdin:
        rows, begun, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() < begun + SECONDS:
            rows += run()
        seconds = time.perf_counter() - begun
        print(json.dumps({"rate": rows / seconds, "cores": (time.process_time() - cpu) / seconds}), file=answers)


class Worker:
    """A process that makes rows of one kind when asked."""

    def __init__(self, name: str, python: str, threads: int) -> None:
        command = [python, __file__, "--worker", name, "--threads", str(threads)]
        self.name = name
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.l0: float = self.answer()

    def answer(self) -> Any:
        """The next line it says. Raises RuntimeError if it ended."""
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"{self.name} failed, see above")
        return json.loads(line)

    def ask(self) -> dict[str, float]:
        """A turn."""
        print(file=self.process.stdin, flush=True)
        return self.answer()


def compare(arguments: argparse.Namespace) -> None:
    """Let all take turns, then print the table."""
    pythons = dict.fromkeys(OURS, sys.executable)
    if arguments.peers_python:
        pythons |= dict.fromkeys(PEERS, arguments.peers_python)
    workers: dict[str, Worker] = {}
    try:
        for name, python in pythons.items():
            workers[name] = Worker(name, python, arguments.threads)
        turns = [{name: worker.ask() for name, worker in workers.items()} for _ in range(arguments.rounds)]
    finally:
        for worker in workers.values():
            worker.process.kill()
    print(f"{arguments.threads} threads, torch {torch.__version__}; medians of {arguments.rounds} rounds")
    print(f"{'':24}{'rows/s':>12}{'cores':>8}{'L0':>8}{'× saelens':>12}")
    for name in workers:
        rate, cores = (statistics.median(turn[name][key] for turn in turns) for key in ("rate", "cores"))
        peer = f"saelens {name.removesuffix(', draw')}"
        ratio = ""
        if peer in workers and not name.endswith("draw"):
            ratio = f"{statistics.median(turn[name]['rate'] / turn[peer]['rate'] for turn in turns):.1f}"
        print(f"{name:24}{rate:12,.0f}{cores:8.2f}{workers[name].l0:8.2f}{ratio:>12}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="the interpreter of benchmarks/peers/requirements.txt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, arguments.threads)
    else:
        try:
            compare(arguments)
        except RuntimeError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
