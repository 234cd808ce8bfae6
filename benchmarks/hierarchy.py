"""Time and memory of the steps of `python -m msae.hierarchy`, on an SAE and shards of one's own.

    python benchmarks/hierarchy.py --sae runs/<run> --shards <directory> --tokens 1_000_000

Memory is what the process holds itself (RssAnon, Linux), without the shards, which are mapped and may be dropped.
"""

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msae.data.shards import Shards
from msae.hierarchy.edges import grade
from msae.hierarchy.extract import levels
from msae.hierarchy.firings import collect
from msae.hierarchy.limits import Limits
from msae.hierarchy.pairs import covering_pairs
from msae.interop import load


def held() -> float:
    """GB of anonymous memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e6


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print seconds and the most memory, looked at ten times a second."""
    done, most = threading.Event(), [held()]

    def watch() -> None:
        while not done.wait(0.1):
            most[0] = max(most[0], held())

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watching.join()
    print(f"{name:<22} {seconds:7.1f} s   at most {most[0]:5.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sae", required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    given = parser.parse_args()
    limits, shards, sae = Limits(), Shards(given.shards), load(given.sae)
    level = levels(sae)
    with step("encode"):
        firings = collect(sae, shards, given.tokens, limits.floor)
    print(f"{firings.rows:,} rows, {firings.d_sae:,} latents, {firings.matrix.nnz / firings.rows:.1f} active a row")
    with step("pairs"):
        covering = covering_pairs(firings, limits.coverage, limits.least)
    with step("tests"):
        edges = grade(sae, shards, firings, covering, level, limits)
    print(f"{len(edges.parent):,} candidates, {int(edges.survives.sum()):,} survive")
    with step("shuffle the firings"):
        strangers = firings.shuffled(0)
    with step("pairs among strangers"):
        covering = covering_pairs(strangers, limits.coverage, limits.least)
    with step("tests of strangers"):
        grade(sae, shards, strangers, covering, level, limits)


if __name__ == "__main__":
    main()
