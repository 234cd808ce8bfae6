"""Time and memory of the steps of `python -m msae.hierarchy`, on an SAE and shards of one's own.

    python benchmarks/hierarchy.py --sae runs/<run> --shards <directory> --tokens 1_000_000

Memory is what the process holds itself (RssAnon, Linux), without the shards, which are mapped and may be dropped.
"""

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from machine import resident

from msae.data.shards import Shards
from msae.hierarchy.edges import grade
from msae.hierarchy.extract import levels
from msae.hierarchy.firings import collect
from msae.hierarchy.limits import Limits
from msae.hierarchy.pairs import covering_pairs
from msae.runs import open_run


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
    parser.add_argument("--sae", required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    a = parser.parse_args()
    limits, shards, sae = Limits(), Shards(a.shards), open_run(a.sae).load_sae()
    level = levels(sae.prefixes)
    with measured("encode"):
        firings = collect(sae, shards, a.tokens, limits.floor)
    print(f"{firings.rows:,} rows, {firings.d_sae:,} latents, {len(firings.code.acts) / firings.rows:.1f} active a row")
    with measured("pairs"):
        covering = covering_pairs(firings, limits.coverage, limits.least)
    with measured("tests"):
        edges = grade(sae, shards, firings, covering, level, limits)
    print(f"{len(edges.parent):,} candidates, {int(edges.survives.sum()):,} survive")
    with measured("shuffle the firings"):
        strangers = firings.shuffled(0)
    with measured("pairs among strangers"):
        covering = covering_pairs(strangers, limits.coverage, limits.least)
    with measured("tests of strangers"):
        grade(sae, shards, strangers, covering, level, limits)


if __name__ == "__main__":
    main()
