"""What benchmarks/gpu.py does with a step: proves it, times it beside the others and the floor, looks inside it."""

import copy
import gc
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peers import steps as peers
from peers.steps import DEAD_AFTER_TOKENS, Settings, Start
from report import Report, Scale, first_line

from msae.sae.fast import KERNELS
from msae.sae.fast.code import ROOM, Screen, TrainingCode
from msae.sae.fast.triton import Triton
from msae.settings import decode
from msae.training.settings import Recipe
from msae.training.step import Moment
from msae.training.step import Step as TrainingStep

REPOSITORY = Path(__file__).resolve().parent.parent
WIDTHS = [(768, 24_576), (2304, 24_576), (768, 65_536), (2304, 65_536)]  # (d_in, d_sae)
BATCHES = (4096, 16_384, 8192)  # the order in which they are timed
TINY_WIDTHS, TINY_BATCHES = [(8, 32)], (4,)
K, TINY_K = 32, 1
VARIANTS = {
    "triton": Triton(),
    "triton, product by PyTorch": Triton(product=True),
    "triton, two passes": Triton(two_passes=True),
    "triton, 128 registers": Triton(registers=128),
}
PEERS = ("saelens", "sparsify")
GIB = 2**30
MOMENT = Moment(0, total=10**6)


# --- exactness ----------------------------------------------------------------------------------------------------


def exactness(scale: Scale, report: Report) -> None:
    """The tests of the Triton kernels on the device: dense against Triton, values and gradients.

    On a card at 768 × 24,576 and 2304 × 65,536, in float32 and under autocast to bfloat16, with dead latents and
    without; then every variant of the objective at small sizes, ties, rows with nothing active, NaN, the optimizer. On
    a CPU the first of these at tiny sizes, in Triton's interpreter: the test suite has the others.
    """
    real = ["tests/test_real_sizes.py", *scale.pick([], ["-k", "one_pass and none or optimizer"])]
    rest = ["tests/test_triton.py", "tests/test_sparse.py", "tests/test_adam.py"]
    rest += ["-k", "(triton or optimizer or update) and not compiles_for_gpus"]
    sets = {scale.pick("at real sizes", "at tiny sizes, in Triton's interpreter"): real}
    if not scale.is_tiny:
        sets["of every variant"] = rest
    for name, tests in sets.items():
        try:
            passed, failed, skipped = tests_of(tests, scale, report.left() - 3)
        except subprocess.TimeoutExpired:
            report.row(f"tests {name}", ok=False, not_done="no time left")
            return
        report.row(f"tests {name}", ok=passed > 0 and not failed, passed=passed, failed=len(failed), skipped=skipped)
        for test in failed:
            report.row(test, ok=False)


def tests_of(tests: list[str], scale: Scale, seconds: float) -> tuple[int, list[str], int]:
    """How many pass, the names of those that fail, and how many are skipped."""
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory) / "results.xml"
        workers = ["-n", "4"] if not scale.is_tiny and importlib.util.find_spec("xdist") else []
        settings = ["-o", "addopts=", "-o", "filterwarnings=default"]  # a warning of the machine's is no inexactness
        options = [*settings, "-p", "no:cacheprovider", "-q", "--junitxml", str(results), *workers]
        result = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=REPOSITORY,
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not results.exists():
            raise RuntimeError(f"pytest: {result.stdout.strip().splitlines()[-1]}")
        if result.returncode not in (0, 5):
            print(result.stdout[-6000:])
        cases = list(ElementTree.parse(results).iter("testcase"))
    failed = [c.get("name", "") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases) - len(failed) - skipped, failed, skipped


# --- the step -----------------------------------------------------------------------------------------------------


def steps(scale: Scale, report: Report) -> None:
    """The step: dense, Triton and its variants, SAELens and sparsify where they are installed, beside the floor.

    On a card every combination of d_in 768 and 2304, d_sae 24,576 and 65,536, batch 4096, 8192 and 16,384; k 32, 5
    prefixes, autocast to bfloat16; the first of these sizes in float32 too. ms is the median of three rounds of steps
    that nobody waits for one by one. The floor is the encoder's product alone, at the rate measured in that precision,
    and 28 bytes of each parameter (Adam reads and writes weights and averages, and reads gradients) at the measured
    bandwidth; no step reaches it. `as_fast_as_dense` 3: a third of the time. GiB: most memory of a step, weights,
    gradients and Adam included.
    """
    bandwidth = measured_bandwidth(scale)
    report.row("copy of a large tensor", GB_per_s=bandwidth / 1e9)
    for d_in, d_sae in scale.pick(WIDTHS, TINY_WIDTHS):
        batches = scale.pick(BATCHES, TINY_BATCHES)
        start = start_of(scale, d_in, d_sae, max(batches))
        step = training_step(start, scale)
        for batch in batches:
            if report.left() < 15 and not scale.is_tiny:
                report.row(f"{d_in} × {d_sae:,}, batch {batch}", not_run="no time left")
                continue
            of_batch = start._replace(x=start.x[:batch])
            one_size(scale, report, of_batch, step, bandwidth)
            if (d_in, batch) == (scale.pick(WIDTHS, TINY_WIDTHS)[0][0], batches[0]) and d_sae < 65_536:
                one_size(scale, report, of_batch, step, bandwidth, torch.float32)
        del step, start
        release()


def one_size(
    scale: Scale,
    report: Report,
    start: Start,
    step: TrainingStep,
    bandwidth: float,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """The rows of one size and precision."""
    (batch, d_in), d_sae = start.x.shape, start.W_enc.shape[1]
    sizes = {"precision": str(dtype).removeprefix("torch."), "d_in": d_in, "d_sae": d_sae, "batch": batch}
    product = seconds(scale, product_of(start, dtype), 5)
    floor = product + 28 * 2 * d_in * d_sae / bandwidth
    tflops = 2 * batch * d_in * d_sae / product / 1e12
    size = f"{d_in} × {d_sae:,}, batch {batch}{'' if dtype == torch.bfloat16 else ', float32'}"
    report.row(f"{size}: floor", ms=floor * 1e3, product_ms=product * 1e3, TFLOPS=tflops, method="floor", **sizes)
    dense = None
    others = [name for name in PEERS if importlib.util.find_spec(PACKAGES[name]) and dtype == torch.bfloat16]
    names = ["dense", *VARIANTS, *others]
    if scale.is_tiny and dtype == torch.float32:
        names = ["dense", "triton"]
    for name in names:
        before = 0 if scale.is_tiny else torch.cuda.memory_allocated()
        try:
            run = runner(scale, name, start, step, dtype)
            time_of_step = seconds(scale, run, 8)
        except Exception as error:  # of a package that does not fit its others, say: the next one goes on
            report.row(f"{size}: {name}", ok=None if name in PEERS else False, error=first_line(error))
            release()
            continue
        finally:
            run = None  # its weights, gradients and averages
        dense = time_of_step if name == "dense" else dense
        report.row(
            f"{size}: {name}",
            ms=time_of_step * 1e3,
            rows_per_s=batch / time_of_step,
            share_of_floor=floor / time_of_step,
            **({"as_fast_as_dense": dense / time_of_step} if dense else {}),
            **({} if scale.is_tiny else {"GiB": (torch.cuda.max_memory_allocated() - before) / GIB}),
            method=name,
            **sizes,
        )
        release()


PACKAGES = {"saelens": "sae_lens", "sparsify": "sparsify"}


def start_of(scale: Scale, d_in: int, d_sae: int, batch: int) -> Start:
    """The rows and weights that all methods start from, on the device."""
    return Start(
        *(t.to(scale.device) for t in peers.make_start(Settings(d_in, d_sae, batch, scale.pick(K, TINY_K), 0)))
    )


def training_step(start: Start, scale: Scale, **recipe: Any) -> TrainingStep:
    """Ours, as training makes it, on the device."""
    d_in, d_sae = start.W_enc.shape
    sizes = Settings(d_in, d_sae, len(start.x), scale.pick(K, TINY_K), 0)
    settings = {"d_sae": d_sae, "prefixes": sizes.prefixes, "k": sizes.k, "lr": sizes.lr, **recipe}
    settings["dead"] = {"after_tokens": DEAD_AFTER_TOKENS * 1000}  # none ever is
    step = TrainingStep(decode(Recipe, settings, "model"), d_in).to(scale.device)
    peers.begin(step.sae, start)
    step.start_from((start.x.mean(0), float(start.x.square().sum(1).mean())))
    return step


def runner(scale: Scale, name: str, start: Start, step: TrainingStep, dtype: torch.dtype) -> Callable[[], Any]:
    """What takes one whole step by this method, on weights of its own."""
    if name in PEERS:
        d_in, d_sae = start.W_enc.shape
        sizes = Settings(d_in, d_sae, len(start.x), scale.pick(K, TINY_K), 0, bf16=not scale.is_tiny)
        return getattr(peers, name)(sizes, start).run
    return ours(scale, copy.deepcopy(step), name, start.x, dtype)


def ours(
    scale: Scale, step: TrainingStep, kernels: str, x: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], torch.Tensor]:
    """What takes one of our steps, and gives its loss, for which nobody waits."""
    step.sae.kernels = kernels if kernels in KERNELS else "triton"
    variant = VARIANTS.get(kernels)
    optimizer = step.prepare(MOMENT.total)

    def run() -> torch.Tensor:
        with patch.dict(KERNELS, {"triton": variant} if variant else {}):
            optimizer.zero_grad()
            with torch.autocast(scale.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = step.loss(x, x, MOMENT).loss
            assert isinstance(loss.code, TrainingCode) == (kernels != "dense"), f"{kernels} took another way"
            loss.total.backward()
            optimizer.step()
            step.after_update()
        return loss.total.detach()

    return run


def product_of(start: Start, dtype: torch.dtype) -> Callable[[], Any]:
    """The encoder's product into a matrix that exists already."""
    x, W_enc = start.x.to(dtype), start.W_enc.to(dtype)
    out = x.new_zeros(len(x), W_enc.shape[1])
    return lambda: torch.mm(x, W_enc, out=out)


def measured_bandwidth(scale: Scale) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.zeros(scale.pick(1 << 29, 1 << 20), device=scale.device)
    into = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(scale, lambda: into.copy_(source), 10)


def seconds(scale: Scale, run: Callable[[], Any], count: int, rounds: int = 3, warm: int = 3) -> float:
    """Seconds of one call: the median over rounds of `count` calls that end when the device has done them all."""
    if scale.is_tiny:
        count = rounds = warm = 1
    else:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm):
        run()
    times = []
    for _ in range(rounds):
        scale.wait()
        begun = time.perf_counter()
        for _ in range(count):
            run()
        scale.wait()
        times.append((time.perf_counter() - begun) / count)
    return statistics.median(times)


def release() -> None:
    """Give memory back that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- compiled and captured ----------------------------------------------------------------------------------------


def compiled(scale: Scale, report: Report) -> None:
    """torch.compile of the dense step, and a CUDA graph of the sparse one, as far as they run.

    On a card at 768 × 24,576, batch 4096. The graph leaves out the one question of the step, whether enough entries
    exceeded the threshold of the filter; that is asked afterwards, and losses must be those without a graph within
    10⁻⁵. On a CPU nothing is compiled nor captured: the same functions run.
    """
    d_in, d_sae = scale.pick(WIDTHS, TINY_WIDTHS)[0]
    start = start_of(scale, d_in, d_sae, scale.pick(BATCHES, TINY_BATCHES)[0])
    step = training_step(start, scale, objective={"aux": {"coefficient": 0}})
    count = 2 if scale.is_tiny else 20
    report.row("sparse step", ms=1e3 * seconds(scale, ours(scale, copy.deepcopy(step), "triton", start.x), count))
    try:
        captured(scale, report, step, start.x, count)
    except Exception as error:
        report.row("sparse step in a CUDA graph", ok=False, error=first_line(error))
    release()
    report.row("dense step", ms=1e3 * seconds(scale, ours(scale, copy.deepcopy(step), "dense", start.x), count))
    try:
        of_dense = copy.deepcopy(step)
        of_dense.loss = torch.compile(of_dense.loss, backend="eager" if scale.is_tiny else "inductor")  # type: ignore
        milliseconds = 1e3 * seconds(scale, ours(scale, of_dense, "dense", start.x), count)
        compiled_or_not = scale.pick("its loss by torch.compile", "traced but not compiled here")
        report.row(f"dense step, {compiled_or_not}", ms=milliseconds)
    except Exception as error:
        report.row("dense step, its loss by torch.compile", error=first_line(error))


def captured(scale: Scale, report: Report, step: TrainingStep, x: torch.Tensor, count: int) -> None:
    """The row of the sparse step in a CUDA graph, whose losses must be those of steps without one."""
    enough: list[torch.Tensor] = []
    with unasked(enough):
        reference, of_graph = (ours(scale, copy.deepcopy(step), "triton", x) for _ in range(2))
        if scale.is_tiny:
            replay = of_graph
        else:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    of_graph()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            enough.clear()
            with torch.cuda.graph(graph):
                loss = of_graph()

            def replay() -> torch.Tensor:
                graph.replay()
                return loss

            for _ in range(3):
                reference()
        losses = [(float(replay()), float(reference())) for _ in range(scale.pick(3, 1))]
        largest = max(abs(a - b) for a, b in losses)
        report.row(
            scale.pick("sparse step in a CUDA graph", "sparse step, not captured here"),
            ok=largest <= 1e-5 * abs(losses[0][1]) and all(bool(e) for e in enough),
            ms=1e3 * seconds(scale, replay, count),
            largest_difference_of_loss=largest,
        )


@contextmanager
def unasked(enough: list[torch.Tensor]) -> Iterator[None]:
    """BatchTopK's selection by the first bar, without asking the device whether it found enough: `enough` says it."""

    def largest(screen: Screen, k: float) -> Any:
        count = round(k * len(screen.h))
        slack, bar = next(screen._bars(count))
        capacity = min(round(ROOM * slack * count), len(screen.h) * screen.sae.d_sae)
        flat, u, is_enough = screen.kernels.largest(*screen.factors, screen.b, bar, screen.norm, count, capacity)
        enough.append(is_enough)
        return screen._code((flat, u))

    with patch.object(Screen, "largest", largest):
        yield


# --- inside -------------------------------------------------------------------------------------------------------


def profile(scale: Scale, report: Report) -> None:
    """A profile of ten sparse steps, as a chrome trace beside the figures, and its longest operations.

    On a card at 768 × 24,576, batch 4096. `busy`: share of the time in which the device computes. ms and calls are
    those of one step.
    """
    d_in, d_sae = scale.pick(WIDTHS, TINY_WIDTHS)[0]
    start = start_of(scale, d_in, d_sae, scale.pick(BATCHES, TINY_BATCHES)[0])
    run = ours(scale, training_step(start, scale), "triton", start.x)
    seconds(scale, run, 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    count = 10
    if scale.is_tiny:
        count = 1
    else:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        begun = time.perf_counter()
        for _ in range(count):
            run()
        scale.wait()
        whole = time.perf_counter() - begun
    trace = Path(os.environ.get("MSAE_TRACES", tempfile.gettempdir())) / "sparse_step.json.gz"
    profiled.export_chrome_trace(str(trace))
    of_device = "self_cpu_time_total" if scale.is_tiny else "self_device_time_total"
    events = [event for event in profiled.key_averages() if scale.is_tiny or is_kernel(event)]
    events.sort(key=lambda event: -getattr(event, of_device))
    total = sum(getattr(event, of_device) for event in events) / 1e6
    report.row("ten sparse steps", ms_each=1e3 * whole / count, busy=total / whole, trace=trace.name)
    for event in events[:12]:
        of_event = getattr(event, of_device) / 1e6
        report.row(event.key[:60], share=of_event / total, ms=1e3 * of_event / count, calls=event.count / count)


def is_kernel(event: Any) -> bool:
    """Whether it is one that the device computed, not an operator that launched it or a name for a stretch of time."""
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
