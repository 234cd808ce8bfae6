"""Time and memory of the steps by which `python -m msae.explore` finds edges, on an SAE and shards of one's own.

    python benchmarks/explore.py --sae runs/<run> --shards <directory> --tokens 1_000_000
    python benchmarks/explore.py --random 65_536 --shards <directory> --tokens 10_000

Memory is what the process holds itself (RssAnon, Linux), without the shards, which are mapped and may be dropped.
"""

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from machine import resident

from msae.data.shards import Shards
from msae.hierarchy.edges import Trial, grade, levels
from msae.hierarchy.firings import FirstRows, collect
from msae.hierarchy.limits import Limits
from msae.hierarchy.pairs import covering_pairs
from msae.runs import open_run
from msae.sae import MatryoshkaSAE, quantile_thresholds


def random_sae(shards: Shards, d_sae: int, k: int) -> MatryoshkaSAE:
    """An SAE of random directions, of which about k are active in a row."""
    sae = MatryoshkaSAE(shards.d_in, d_sae, [d_sae // 16, d_sae // 4, d_sae], k)
    sae.set_statistics(shards.mean, shards.mean_square)
    x = shards.activations("val", 0)[:2048].float()
    sae.threshold.fill_(quantile_thresholds((sae.pre(x) for x in [x]), k, len(x), [d_sae])[0])
    return sae


@contextmanager
def measured(name: str) -> Iterator[None]:
    """Print the seconds of a step and the most memory in it, looked at ten times a second."""
    done, most = threading.Event(), [resident("RssAnon")]

    def watch() -> None:
        while not done.wait(0.1):
            most[0] = max(most[0], resident("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watching.join()
    print(f"{name:<22} {seconds:7.1f} s   at most {most[0] / 1e9:5.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae")
    parser.add_argument("--random", type=int, help="latents of a random SAE, in place of --sae")
    parser.add_argument("--shards", required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=32, help="active latents of a random SAE")
    a = parser.parse_args()
    limits, shards = Limits(), Shards(a.shards)
    with torch.no_grad():
        sae = open_run(a.sae).load_sae() if a.random is None else random_sae(shards, a.random, a.k)
    rows, level = FirstRows(shards, a.tokens), levels(sae.prefixes)
    with measured("encode"):
        (firings,) = collect([sae], rows, limits.floor)
    print(f"{firings.rows:,} rows, {firings.d_sae:,} latents, {len(firings.code.acts) / firings.rows:.1f} active a row")
    with measured("pairs"):
        covering = covering_pairs(firings, limits.coverage, limits.least)
    with measured("tests"):  # as at the end of training
        ((edges,),) = grade(rows, [Trial(sae, firings, covering, [level], limits)])
    print(f"{len(edges.parent):,} candidates, {int(edges.survives.sum()):,} survive")
    with measured("shuffle the firings"):
        strangers = firings.shuffled(0)
    with measured("pairs among strangers"):
        of_strangers = covering_pairs(strangers, limits.coverage, limits.least)
    with measured("tests with controls"):
        orders = [level, np.random.default_rng(0).permutation(level)]
        of_sae = Trial(sae, firings, covering, orders, limits)
        grade(rows, [of_sae, Trial(sae, strangers, of_strangers, [level], limits)])


if __name__ == "__main__":
    main()
