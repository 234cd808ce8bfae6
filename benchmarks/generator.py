"""Rows a second of the synthetic source: the 20-feature tree, and SynthSAEBench-16k with and without its correlations.

    python benchmarks/generator.py [--peers-python ../peers/bin/python] [--rounds 5] [--threads 2]

Each row of the table makes rows as a harvest does, `draw` only the active features. With --peers-python (see
benchmarks/step.py) SAELens's generator of the same 16,384 features at d_in 768 takes turns with them: without
orthogonalisation, which is no part of a row, in batches of 1024 as its trainer asks for, and dense (its default), which
is faster than its sparse form on a CPU. Each is a process of its own that waits while another computes. Printed are
medians over the rounds, and the median of the rounds' ratios; cores: CPU seconds a second; L0: active features a row.
No accelerator is used.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from turns import serve, take_turns

OURS = ("tree", "tree, draw", "16k", "16k, draw", "16k correlated", "16k correlated, draw")
PEERS = ("saelens 16k", "saelens 16k correlated")


def msae_rows(name: str) -> tuple[Callable[[], int], float]:
    """The function that makes rows and returns how many, and the rows' L0."""
    from msae.cli.command import compose, plain
    from msae.settings import build
    from msae.sources.forest import BLOCK

    is_large = name.startswith("16k")
    blocks = 1 if is_large else 16
    overrides = [f"data.source.rows={blocks * BLOCK}", f"data.source.chunk_rows={blocks * BLOCK}"]
    overrides += ["data.source.val_rows=1", *(["+experiment=forest_16k"] if is_large else [])]
    if "correlated" not in name:
        overrides.append("data.source.correlation_rank=0")
    source = build(plain(compose("train", overrides))["data"]["source"], "data.source")
    generator = torch.Generator().manual_seed(0)

    def draw() -> int:
        return len([source.draw(BLOCK, generator) for _ in range(blocks)]) * BLOCK

    def make() -> int:
        return sum(len(make().activations["synthetic"]) for make in next(source.chunks(None)).splits.values())

    l0 = len(source.draw(BLOCK, generator)[1]) / BLOCK
    return draw if name.endswith("draw") else make, l0


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


def prepare(name: str, threads: int) -> tuple[float, Callable[[float], dict[str, float]]]:
    """The L0 of a generator, and its turns of at least so many seconds."""
    torch.set_num_threads(threads)
    run, l0 = (saelens_rows if name in PEERS else msae_rows)(name)
    run()

    def answer(least: float) -> dict[str, float]:
        rows, begun, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() < begun + least:
            rows += run()
        seconds = time.perf_counter() - begun
        return {"rate": rows / seconds, "cores": (time.process_time() - cpu) / seconds}

    return l0, answer


def compare(a: argparse.Namespace) -> None:
    """Let all take turns, then print the table."""
    pythons = dict.fromkeys(OURS, sys.executable)
    if a.peers_python:
        pythons |= dict.fromkeys(PEERS, a.peers_python)
    l0, turns = take_turns(pythons, a.seconds, a.rounds)
    print(f"{a.threads} threads, torch {torch.__version__}; medians of {a.rounds} rounds")
    print(f"{'':24}{'rows/s':>12}{'cores':>8}{'L0':>8}{'× saelens':>12}")
    for name, of in turns.items():
        rate, cores = (statistics.median(turn[key] for turn in of) for key in ("rate", "cores"))
        theirs = turns.get(f"saelens {name}", [])
        ratios = [own["rate"] / their["rate"] for own, their in zip(of, theirs, strict=bool(theirs))]
        ratio = f"{statistics.median(ratios):.1f}" if ratios else ""
        print(f"{name:24}{rate:12,.0f}{cores:8.2f}{l0[name]:8.2f}{ratio:>12}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="the interpreter of benchmarks/peers/requirements.txt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        serve(lambda: prepare(a.worker, a.threads))
    else:
        compare(a)


if __name__ == "__main__":
    main()
