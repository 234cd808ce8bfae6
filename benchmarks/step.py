"""Seconds and memory of one whole optimizer step: ours, those of the published packages, and the floor below all.

    python benchmarks/step.py                                        # ours, what is written out, and the floor
    python benchmarks/step.py --peers-python ../peers/bin/python     # and the packages, from their own environment
    python benchmarks/step.py --d-sae 24576 --dead 0.1 --ours dense  # AuxK on for a tenth of the latents
    python benchmarks/step.py --device cuda --bf16 --ours dense triton --against floor

A step is everything a trainer does for a batch that it has: forward, loss, backward, gradient projection and clipping
where it has them, its optimizer, renormalisation, its bookkeeping of dead latents and threshold; no logging. All see
the same rows, sizes and first weights, in float32 on CPU. `msae …` is the default objective with BatchTopK; `saelens`,
`dictionary_learning` and `bussmann` are Matryoshka too; `sparsify` is not (TopK of each row, one prefix), so it does
less work. `floor` is the encoder's product alone, x W_enc into a matrix that exists already: no method that computes
all pre-activations in float32 is faster. With --device cuda the device is waited for around each step, with --bf16
encoding and loss are under autocast: both are for ours and the floor alone.

With --dead, that share of the latents is dead in every method for its own AuxK (k d_in / 2, in bussmann 512): their
counters start there, and their encoder columns are a tenth as long, so that they never fire and stay dead of
themselves. sparsify's AuxK trains the decoder alone: its encoder's backward takes no gradient of pre-activations.

Each method is a process of its own that waits while another computes. They take turns: a few steps to warm up and
--steps timed ones, --rounds times. Every turn is checked: the loss is finite and falls, encoder and decoder move,
exactly the wanted latents are dead, and AuxK's loss is positive if and only if there are any.

s/step: the median of the rounds' medians; × ours: median of the rounds' ratios to the first of --ours. fastest: of all
timed steps, and its ratio: the better measure where other programs run too. cores: CPU seconds a second; far below the
number of threads, other programs had the machine. memory: the highest resident memory during a turn, less weights,
gradients and optimizer state (of 'kept' freed memory what lies unused counts too).
--allocator kept: glibc keeps freed memory in every process, as msae.training does; default: in ours alone, the others
as they come; untouched: in none.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peers import steps as others
from peers.steps import DEAD_AFTER_TOKENS, Settings, Start, Step, begin

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


def msae_step(kernels: str, s: Settings, given: Start, bf16: bool) -> Step:
    """One of our implementations, as `msae.training.module` calls it. Raises ValueError for a name it does not know."""
    from msae.sae import DictionaryAdam, MatryoshkaSAE, choose_kernels, encode_for_training, matryoshka_loss

    if kernels not in ("dense", "plain", "compiled", "triton"):
        raise ValueError(f"--ours {kernels} is unknown; there are dense, plain, compiled and triton")
    sae = MatryoshkaSAE(s.d_in, s.d_sae, s.prefixes, s.k).to(given.x.device)
    choose_kernels(kernels, sae, given.x)  # refuses what cannot run
    parameters = begin(sae, given)
    sae.set_statistics(given.x.mean(0), float(given.x.square().sum(1).mean()))
    sae.tokens_since_fired[given.dead] = DEAD_AFTER_TOKENS
    optimizer = DictionaryAdam(sae, s.lr, (0.9, 0.999), 1.0, "unit_norm", kernels)

    def run() -> tuple[float, float]:
        optimizer.zero_grad()
        with torch.autocast(given.x.device.type, torch.bfloat16, enabled=bf16):
            code = encode_for_training(sae, given.x, kernels)
            loss = matryoshka_loss(sae, given.x, dead=sae.dead(DEAD_AFTER_TOKENS), code=code)
        loss.total.backward()
        sae.update_threshold(code.values.detach(), 0.01)
        sae.update_fired(code.fired(), s.batch)
        optimizer.step()
        return float(loss.total.detach()), float(loss.aux)

    return Step(run, lambda: sae.dead(DEAD_AFTER_TOKENS), parameters, optimizer)


def floor(s: Settings, given: Start, bf16: bool) -> Step:
    """The encoder's product into a matrix that exists already; nothing is trained."""
    x, W_enc = (t.bfloat16() if bf16 else t for t in (given.x, given.W_enc))
    out = x.new_zeros(s.batch, s.d_sae)

    def run() -> tuple[float, float]:
        torch.mm(x, W_enc, out=out)
        return 0.0, 0.0

    return Step(run, lambda: given.dead, {}, None)


# --- the process of one method ------------------------------------------------------------------------------------


def resident(what: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM at its highest since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024


def release_freed_memory() -> None:
    """Hand freed memory back, so that the processes that wait hold little, and start measuring the highest anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def serve(name: str, s: Settings, device: str, bf16: bool) -> None:
    """Answer each number n on stdin with n timed steps, in JSON on what was stdout; packages print to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    given = Start(*(t.to(device) for t in others.start(s)))
    kernels = name.removeprefix("msae ")
    if kernels != name:
        step = msae_step(kernels, s, given, bf16)
    else:
        step = floor(s, given, bf16) if name == "floor" else getattr(others, name)(s, given)
    release_freed_memory()
    cuda = device == "cuda"
    # with the weights, without gradients and optimizer state
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    package = PACKAGES.get(name)
    found = f"{package} {version(package)}, " if package else ""
    print(json.dumps(f"{found}torch {torch.__version__}, {torch.get_num_threads()} threads"), file=answers)
    for line in sys.stdin:
        release_freed_memory()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        answer = turn(step, given, int(line))
        answer["peak"] = (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before - held(step)
        print(json.dumps(answer), file=answers)
        release_freed_memory()


def turn(step: Step, given: Start, n: int) -> dict[str, Any]:
    """The seconds of n steps after a few to warm up, the last losses, and the checks that they were real steps."""
    weights = {name: step.parameters[name].detach() for name in ("W_enc", "W_dec") if step.parameters}
    before = {name: weight[:64].clone() for name, weight in weights.items()}
    times, losses, auxiliary = [], [], []
    for i in range(WARM_STEPS + n):
        if i == WARM_STEPS:
            cpu = time.process_time()
        begun = time.perf_counter()
        loss, aux = step.run()
        if given.x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        losses.append(loss)
        auxiliary.append(aux)
    cores = (time.process_time() - cpu) / sum(times[WARM_STEPS:])
    if step.parameters:
        assert all(map(math.isfinite, losses)), f"losses {losses} are not finite"
        assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
        assert all(not torch.equal(before[name], weights[name][:64]) for name in weights), "weights stay as they are"
        assert torch.equal(step.dead(), given.dead), f"{int(step.dead().sum())} dead, wanted {int(given.dead.sum())}"
        wanted = bool(given.dead.any())
        assert all((aux > 0) == wanted for aux in auxiliary), f"AuxK's losses {auxiliary}, wanted them on: {wanted}"
    return {"seconds": times[WARM_STEPS:], "cores": cores, "loss": losses[-1], "aux": auxiliary[-1]}


def held(step: Step) -> int:
    """Bytes of gradients and optimizer state."""
    tensors: list[torch.Tensor] = list(step.parameters.values())
    for state in step.optimizer.state.values() if step.optimizer else ():
        tensors += [t for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


# --- the parent ---------------------------------------------------------------------------------------------------


class Worker:
    """A process that takes steps of one method when asked."""

    def __init__(self, name: str, python: str, environment: dict[str, str]) -> None:
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [python, __file__, *sys.argv[1:], "--worker", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, env={**os.environ, **environment}, **pipes)  # type: ignore[call-overload]
        self.versions: str = self.answer()

    def answer(self) -> Any:
        """The next line it says. Raises RuntimeError with what it wrote to stderr if it ended."""
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.name} failed:\n{self.errors.read()}")
        return json.loads(line)

    def ask(self, n: int) -> dict[str, Any]:
        """A turn of n timed steps."""
        print(n, file=self.process.stdin, flush=True)
        return self.answer()


def cpu_model() -> str:
    """The name that the kernel gives the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def compare(arguments: argparse.Namespace) -> None:
    """Let the methods take turns, then print the table."""
    pythons = {f"msae {kernels}": sys.executable for kernels in arguments.ours}
    for name in arguments.against:
        if name in WRITTEN_OUT:
            pythons[name] = sys.executable
        elif arguments.peers_python:
            pythons[name] = arguments.peers_python
    if not arguments.peers_python:
        print(HOW)
    workers: dict[str, Worker] = {}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    try:
        for _ in range(arguments.rounds):
            for name, python in pythons.items():
                if name not in workers:  # one starts when those before it wait
                    keeps = arguments.allocator == "kept" or (arguments.allocator == "default" and "msae" in name)
                    workers[name] = Worker(name, python, KEEP if keeps else {})
                turns[name].append(workers[name].ask(arguments.steps))
    finally:
        for worker in workers.values():
            worker.process.kill()
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_model()
    machine += ", bf16" if arguments.bf16 else ""
    print(
        f"{machine}; batch {arguments.batch}, d_in {arguments.d_in}, d_sae {arguments.d_sae}, k {arguments.k}, "
        f"{arguments.dead:.0%} dead, allocator {arguments.allocator}; {arguments.rounds} × {arguments.steps} steps"
    )
    heads = zip(
        ("", "s/step", "× ours", "fastest", "× ours", "cores", "memory", "loss", "AuxK"),
        (24, 8, 8, 9, 8, 7, 10, 10, 10),
        strict=True,
    )
    print("".join(f"{head:>{width}}" for head, width in heads) + "  versions")
    medians = {name: [statistics.median(t["seconds"]) for t in found] for name, found in turns.items()}
    fastest = {name: min(s for t in found for s in t["seconds"]) for name, found in turns.items()}
    first = next(iter(turns))
    for name, found in turns.items():
        ratio = statistics.median(theirs / own for theirs, own in zip(medians[name], medians[first], strict=True))
        peak = statistics.median(t["peak"] for t in found) / 2**30
        cores = statistics.median(t["cores"] for t in found)
        losses = "".join(f"{found[-1][key]:10.4g}" if found[-1][key] else f"{'–':>10}" for key in ("loss", "aux"))
        print(
            f"{LABELS.get(name, name):24}{statistics.median(medians[name]):8.3f}{ratio:8.2f}{fastest[name]:9.3f}"
            f"{fastest[name] / fastest[first]:8.2f}{cores:7.2f}{peak:6.2f} GiB{losses}  {workers[name].versions}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dead", type=float, default=0.0, help="share of the latents that is dead")
    parser.add_argument("--ours", nargs="+", default=["dense"], help="our implementations; the first is the measure")
    parser.add_argument("--against", nargs="*", choices=[*PACKAGES, *WRITTEN_OUT], default=[*PACKAGES, *WRITTEN_OUT])
    parser.add_argument("--peers-python", help="the interpreter of benchmarks/peers/requirements.txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each method in a round")
    parser.add_argument("--allocator", choices=["kept", "default", "untouched"], default="kept")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (arguments.device, arguments.bf16) != ("cpu", False) and {*arguments.against} - {"floor"}:
        parser.error("--device cuda and --bf16 are for ours and the floor; add --against floor")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; use --device cpu")
    if arguments.worker:
        sizes = (arguments.d_in, arguments.d_sae, arguments.batch, arguments.k, arguments.dead)
        serve(arguments.worker, Settings(*sizes), arguments.device, arguments.bf16)
    else:
        try:
            compare(arguments)
        except RuntimeError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
