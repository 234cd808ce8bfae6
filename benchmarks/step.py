"""Seconds and memory of one whole optimizer step: ours, those of the published packages, and the floor below all.

    python benchmarks/step.py                                        # ours, what is written out, and the floor
    python benchmarks/step.py --peers-python ../peers/bin/python     # and the packages, from their own environment
    python benchmarks/step.py --d-sae 24576 --dead 0.1 --ours dense  # AuxK on for a tenth of the latents
    python benchmarks/step.py --device cuda --bf16 --ours dense triton --against floor

A step is everything a trainer does for a batch that it has: forward, loss, backward, gradient projection and clipping
where it has them, its optimizer, renormalisation, its bookkeeping of dead latents and threshold; no logging. All see
the same rows, sizes and first weights, in float32 on CPU. `msae …` is the default recipe with BatchTopK; `saelens`,
`dictionary_learning` and `bussmann` are Matryoshka too; `sparsify` is not (TopK of each row, one prefix), so it does
less work. `floor` is the encoder's product alone, x W_enc into a matrix that exists already: no method that computes
all pre-activations in float32 is faster. --device cuda waits for the device after each step; --bf16 puts encoding and
loss under autocast. Both are for ours and the floor alone.

With --dead, that share of the latents is dead in every method for its own AuxK (k d_in / 2, in bussmann 512): their
counters start there, and their encoder columns are a tenth as long, so that they never fire and stay dead of
themselves. sparsify's AuxK trains the decoder alone: its encoder's backward takes no gradient of pre-activations.

Each method is a process of its own that waits while another computes. They take turns: a few steps to warm up and
--steps timed ones, --rounds times. Every turn is checked: the loss is finite and falls, encoder and decoder move,
exactly the intended latents are dead, and AuxK's loss is positive if and only if there are any.

s/step: the median of the rounds' medians; × ours: median of the rounds' ratios to the first of --ours. fastest: of all
timed steps, and its ratio: the better measure where other programs run too. cores: CPU seconds a second; far below the
number of threads, other programs had the machine. memory: the highest resident memory during a turn, less weights,
gradients and optimizer state (of 'kept' freed memory what lies unused counts too).
--allocator kept: glibc keeps freed memory in every process, as msae.training does; default: in ours alone, the others
as they come; untouched: in none.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from machine import GIB, cpu_model, release_freed_memory, resident
from peers import steps as peers
from peers.steps import DEAD_AFTER_TOKENS, Settings, Start, Step, begin
from turns import serve, take_turns

OURS = ("dense", "plain", "compiled", "triton")
PACKAGES = {"saelens": "sae-lens", "dictionary_learning": "dictionary-learning"}
PACKAGES |= {"sparsify": "eai-sparsify", "sparsify_adam": "eai-sparsify"}
WRITTEN_OUT = ("bussmann", "floor")
LABELS = {"bussmann": "bussmann (written out)", "sparsify_adam": "sparsify, Adam", "floor": "floor: x W_enc alone"}
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}  # msae.training.memory, for any process
HOW = (
    "without the packages: python -m venv ../peers && ../peers/bin/pip install -c constraints.txt -r "
    "benchmarks/peers/requirements.txt && ../peers/bin/pip uninstall -y torchvision, then --peers-python "
    "../peers/bin/python"
)
WARM_STEPS = 2


# --- what is timed ------------------------------------------------------------------------------------------------


def msae_step(kernels: str, s: Settings, start: Start, bf16: bool) -> Step:
    """Ours, as training takes it."""
    from msae.settings import decode
    from msae.training.settings import Recipe
    from msae.training.step import Moment
    from msae.training.step import Step as TrainingStep

    recipe = {"d_sae": s.d_sae, "prefixes": s.prefixes, "k": s.k, "lr": s.lr, "kernels": kernels}
    recipe["dead"] = {"after_tokens": DEAD_AFTER_TOKENS}
    step = TrainingStep(decode(Recipe, recipe, "model"), s.d_in).to(start.x.device)
    parameters = begin(step.sae, start)
    step.start_from((start.x.mean(0), float(start.x.square().sum(1).mean())))
    step.sae.tokens_since_fired[start.dead] = DEAD_AFTER_TOKENS
    moment = Moment(0, total=10**6)
    optimizer = step.prepare(moment.total)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad()
        with torch.autocast(start.x.device.type, torch.bfloat16, enabled=bf16):
            loss = step.loss(start.x, start.x, moment).loss
        loss.total.backward()
        optimizer.step()
        step.after_update()
        return loss.total.detach(), loss.aux

    return Step(run, lambda: step.dead(s.batch), parameters, optimizer)


def floor(s: Settings, start: Start, bf16: bool) -> Step:
    """The encoder's product into a matrix that exists already; nothing is trained."""
    x, W_enc = (t.bfloat16() if bf16 else t for t in (start.x, start.W_enc))
    out = x.new_zeros(s.batch, s.d_sae)

    def run() -> tuple[float, float]:
        torch.mm(x, W_enc, out=out)
        return 0.0, 0.0

    return Step(run, lambda: start.dead, {}, None)


# --- the process of one method ------------------------------------------------------------------------------------


def prepare(name: str, s: Settings, device: str, bf16: bool) -> tuple[str, Callable[[int], dict[str, Any]]]:
    """The versions of a method, and its turns of n steps with the most memory that they took."""
    start = Start(*(t.to(device) for t in peers.make_start(s)))
    if name.startswith("msae "):
        step = msae_step(name.removeprefix("msae "), s, start, bf16)
    else:
        step = floor(s, start, bf16) if name == "floor" else getattr(peers, name)(s, start)
    release_freed_memory()
    cuda = device == "cuda"
    # with the weights, without gradients and optimizer state
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")

    def answer(n: int) -> dict[str, Any]:
        release_freed_memory()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        figures = turn(step, start, n)
        figures["peak"] = (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before - held(step)
        release_freed_memory()
        return figures

    package = f"{PACKAGES[name]} {version(PACKAGES[name])}, " if name in PACKAGES else ""
    return f"{package}torch {torch.__version__}, {torch.get_num_threads()} threads", answer


def turn(step: Step, start: Start, n: int) -> dict[str, Any]:
    """The seconds of n steps after a few to warm up, the last losses, and the checks that they were real steps."""
    weights = {name: step.parameters[name].detach() for name in ("W_enc", "W_dec") if step.parameters}
    before = {name: weight[:64].clone() for name, weight in weights.items()}
    times, losses, auxiliary = [], [], []
    for i in range(WARM_STEPS + n):
        if i == WARM_STEPS:
            cpu = time.process_time()
        begun = time.perf_counter()
        loss, aux = step.run()
        if start.x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        losses.append(float(loss))
        auxiliary.append(float(aux))
    cores = (time.process_time() - cpu) / sum(times[WARM_STEPS:])
    if step.parameters:
        assert all(map(math.isfinite, losses)), f"losses {losses} are not finite"
        assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
        assert all(not torch.equal(before[name], weights[name][:64]) for name in weights), "weights stay as they are"
        assert torch.equal(step.dead(), start.dead), f"{int(step.dead().sum())} dead, not {int(start.dead.sum())}"
        has_dead = bool(start.dead.any())
        assert all((aux > 0) == has_dead for aux in auxiliary), f"AuxK's losses are {auxiliary}, dead: {has_dead}"
    return {"seconds": times[WARM_STEPS:], "cores": cores, "loss": losses[-1], "aux": auxiliary[-1]}


def held(step: Step) -> int:
    """Bytes of gradients and optimizer state."""
    states = step.optimizer.state.values() if step.optimizer else ()
    tensors = [
        *step.parameters.values(),
        *(t for state in states for t in state.values() if isinstance(t, torch.Tensor)),
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


# --- the parent ---------------------------------------------------------------------------------------------------


def compare(a: argparse.Namespace) -> None:
    """Let the methods take turns, then print the table."""
    pythons = {f"msae {kernels}": sys.executable for kernels in a.ours}
    pythons |= {name: sys.executable if name in WRITTEN_OUT else a.peers_python for name in a.against}
    if None in pythons.values():
        print(HOW)
        pythons = {name: python for name, python in pythons.items() if python}

    def environment(name: str) -> dict[str, str]:
        return KEEP if a.allocator == "kept" or (a.allocator == "default" and name.startswith("msae")) else {}

    versions, turns = take_turns(pythons, a.steps, a.rounds, environment)
    print(
        f"{torch.cuda.get_device_name() if a.device == 'cuda' else cpu_model()}{', bf16' if a.bf16 else ''}; batch "
        f"{a.batch}, d_in {a.d_in}, d_sae {a.d_sae}, k {a.k}, {a.dead:.0%} dead, allocator {a.allocator}; "
        f"{a.rounds} × {a.steps} steps"
    )
    print(
        f"{'':24}{'s/step':>8}{'× ours':>8}{'fastest':>9}{'× ours':>8}{'cores':>7}{'memory':>10}{'loss':>10}"
        f"{'AuxK':>10}  versions"
    )
    medians = {name: [statistics.median(t["seconds"]) for t in of] for name, of in turns.items()}
    fastest = {name: min(s for t in of for s in t["seconds"]) for name, of in turns.items()}
    first = next(iter(turns))
    for name, of in turns.items():
        ratio = statistics.median(theirs / own for theirs, own in zip(medians[name], medians[first], strict=True))
        peak, cores = (statistics.median(t[key] for t in of) for key in ("peak", "cores"))
        losses = "".join(f"{of[-1][key]:10.4g}" if of[-1][key] else f"{'–':>10}" for key in ("loss", "aux"))
        print(
            f"{LABELS.get(name, name):24}{statistics.median(medians[name]):8.3f}{ratio:8.2f}{fastest[name]:9.3f}"
            f"{fastest[name] / fastest[first]:8.2f}{cores:7.2f}{peak / GIB:6.2f} GiB{losses}  {versions[name]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dead", type=float, default=0.0, help="share of the latents that is dead")
    parser.add_argument("--ours", nargs="+", choices=OURS, default=["dense"], help="kernels; the first is the measure")
    parser.add_argument("--against", nargs="*", choices=[*PACKAGES, *WRITTEN_OUT], default=[*PACKAGES, *WRITTEN_OUT])
    parser.add_argument("--peers-python", help="the interpreter of benchmarks/peers/requirements.txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each method in a round")
    parser.add_argument("--allocator", choices=["kept", "default", "untouched"], default="kept")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if (a.device, a.bf16) != ("cpu", False) and {*a.against} - {"floor"}:
        parser.error("--device cuda and --bf16 are for ours and the floor; add --against floor")
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; use --device cpu")
    if a.worker:
        serve(lambda: prepare(a.worker, Settings(a.d_in, a.d_sae, a.batch, a.k, a.dead), a.device, a.bf16))
    else:
        compare(a)


if __name__ == "__main__":
    main()
