"""Seconds an optimizer step takes, with glibc's allocator as it is and as training sets it (keep_freed_memory).

    python benchmarks/step.py [--d-in 256] [--d-sae 4096] [--batch 4096] [--rounds 5]

Each measurement is a process of its own, the two alternate, medians and their ratio are printed.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch

from msae.sae import MatryoshkaSAE, matryoshka_loss
from msae.training.memory import keep_freed_memory


def seconds_per_step(d_in: int, d_sae: int, batch: int, steps: int = 4) -> float:
    """The median over a few whole steps (loss, backward, clip, Adam, unit norm, statistics) after two to warm up."""
    torch.manual_seed(0)
    sae = MatryoshkaSAE(d_in, d_sae, [0.0625, 0.125, 0.25, 0.5, 1.0], 32)
    x = torch.randn(batch, d_in)
    sae.set_statistics(x.mean(0), float(x.square().sum(1).mean()))
    optimizer = torch.optim.Adam(sae.parameters(), 3e-4, fused=True)
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = matryoshka_loss(sae, x, dead=sae.dead(10_000_000))
        loss.total.backward()
        sae.project_decoder_gradient()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.normalise_decoder()
        sae.update_fired((loss.acts > 0).sum(0), batch)
        sae.update_threshold(loss.acts, 0.01)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--allocator", choices=["default", "kept"], help="measure this one, in this process")
    arguments = parser.parse_args()
    if arguments.allocator:
        if arguments.allocator == "kept":
            keep_freed_memory()
        print(seconds_per_step(arguments.d_in, arguments.d_sae, arguments.batch))
        return
    found: dict[str, list[float]] = {"default": [], "kept": []}
    for _ in range(arguments.rounds):
        for allocator, times in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--allocator", allocator]
            times.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {allocator: statistics.median(times) for allocator, times in found.items()}
    print(f"{torch.get_num_threads()} threads, batch {arguments.batch}, {arguments.d_in} → {arguments.d_sae}")
    for allocator, median in medians.items():
        print(f"{allocator:>8}: {median:.3f} s a step, {arguments.batch / median:,.0f} tokens/s")
    print(f"   ratio: {medians['default'] / medians['kept']:.2f}")


if __name__ == "__main__":
    main()
