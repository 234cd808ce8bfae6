"""What benchmarks/gpu.py does with data: the loop around a step, the reader that feeds the device, the harvest."""

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import Report, Scale, first_line
from torch import Tensor

GPT2, TINY_WIDTH = 768, 64
# of a run: d_in, d_sae, prefixes, k, batch, rows on disk, steps of a round, rounds
LOOP = (GPT2, 24_576, None, 32, 4096, 262_144, 40, 4)
TINY_LOOP = (TINY_WIDTH, 256, "[16,256]", 8, 128, 4096, 4, 2)
LOOPS = (("dense", "32-true"), ("triton", "bf16-mixed"), ("triton", "32-true"), ("dense", "bf16-mixed"))
TINY_LOOPS = (("dense", "32-true"), ("plain", "bf16-mixed"))
READ, TINY_READ = (1 << 19, 4096, 262_144), (1 << 13, 256, 2048)  # rows, batch, rows of a chunk
READ_ROUNDS = 5
STREAM_CHUNK, TINY_STREAM_CHUNK = 65_536, 1024  # rows
STREAM_CHUNKS = 8  # of a pass, of which few are held at a time
STREAM_HOLDS = 11.5  # chunks that its memory is for, with those that it needs beside
POOL_ROWS = 32_768  # of which a batch is drawn
MODEL = {"layers": 12, "width": GPT2, "heads": 12, "words": 900_000}
TINY_MODEL = {"layers": 2, "width": TINY_WIDTH, "heads": 4, "vocabulary": 1000, "words": 10_000, "document": 20}
TEXT = {"layer": 8, "tokens": 1_000_000, "chunk_tokens": 262_144}
TINY_TEXT = {"layer": 1, "tokens": 2000, "chunk_tokens": 1024}
CONTEXT, TINY_CONTEXT, MODEL_BATCH, TINY_MODEL_BATCH = 512, 32, 32, 8
HARVEST_ROUNDS = 3


def begin(scale: Scale) -> None:
    """One thread for tiny sizes: more would wait for each other longer than they compute."""
    if scale.is_tiny:
        torch.set_num_threads(1)


@contextmanager
def tried(report: Report, name: str) -> Iterator[None]:
    """An error becomes a row, and what comes after is tried all the same; a missing package ends the part."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        report.row(name, ok=False, error=first_line(error))


# --- the loop -----------------------------------------------------------------------------------------------------


def loop(scale: Scale, report: Report) -> None:
    """A whole run's rate as a share of the bare step's: benchmarks/loop.py.

    On a card GPT-2's width (768), 24,576 latents, batch 4096; dense and Triton, in float32 and in bf16-mixed. `share`:
    with progress bar, logs and reader, the median of the rounds' ratios; `share_of_all`: with a checkpoint every 1000
    steps and validation every 2000 too. What is checked is that these kernels ran.
    """
    from loop import Sizes, measure

    from msae.training.job import quiet_lightning
    from msae.training.memory import keep_freed_memory

    begin(scale)
    keep_freed_memory()
    quiet_lightning()
    sizes, longest = Sizes(*scale.pick(LOOP, TINY_LOOP)), 0.0
    with tempfile.TemporaryDirectory() as directory:
        for kernels, precision in scale.pick(LOOPS, TINY_LOOPS):
            name = f"{kernels}, {precision}"
            if skipped(report, name, longest):
                continue
            begun = time.monotonic()
            with tried(report, name):
                run = measure(sizes, Path(directory), scale.device, kernels, precision)
                report.row(
                    name,
                    ok=run.kernels == kernels,
                    bare_ms=1e3 * statistics.median(run.bare),
                    step_ms=1e3 * statistics.median(run.loop),
                    share=run.share(),
                    share_of_all=run.share(rare=True),
                    checkpoint_s=run.checkpoint,
                    validation_s=run.validation,
                )
            release()
            longest = max(longest, time.monotonic() - begun)


def skipped(report: Report, name: str, seconds: float) -> bool:
    """Whether so many seconds are not left any more, with a row that says so."""
    is_late = report.left() < 1.2 * seconds
    if is_late:
        report.row(name, skipped=f"{report.left():.0f} s left, it takes about {seconds:.0f}")
    return is_late


def release() -> None:
    """Give back what nothing holds any more, for the next one's sake."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# --- the reader ---------------------------------------------------------------------------------------------------


def reader(scale: Scale, report: Report) -> None:
    """Rows a second that reach the device from shards in the page cache, beside bare copies of such batches.

    On a card d_in 768 in bfloat16, batch 4096, half a million rows; every copy is waited for, from pinned memory (as
    training has it) and pageable. Then rows that wait in the device's own memory (data.memory_device=cuda): a stream
    of them, chunks made and copied meanwhile, and batches drawn from one pool.
    """
    from msae.training.memory import keep_freed_memory

    begin(scale)
    keep_freed_memory()
    if not scale.is_tiny:
        torch.cuda.init()  # the reader pins its batches where CUDA is in use
    with tried(report, "reader"), tempfile.TemporaryDirectory() as directory:
        from_shards(scale, report, Path(directory))
    if not skipped(report, "rows on the device", scale.pick(6, 1)):
        with tried(report, "rows on the device"):
            on_the_device(scale, report)


def from_shards(scale: Scale, report: Report, root: Path) -> None:
    """The rows of shards on disk, read and copied."""
    from reader import arriving, from_pageable, make, rows_per_second, warm
    from reader import reader as batches_of

    rows, batch, chunk = scale.pick(READ, TINY_READ)
    d_in = scale.pick(GPT2, TINY_WIDTH)
    shards = warm(make(root, rows, d_in, torch.bfloat16, True, chunk))
    x, copies = torch.randn(batch, d_in).bfloat16(), rows // batch
    ways: dict[str, Callable[[], Iterable[Tensor]]] = {}
    if not scale.is_tiny:
        ways["bare copy, pinned"] = partial(copied, scale, x.pin_memory(), copies)
    ways |= {
        "bare copy, pageable": partial(copied, scale, x, copies),
        "reader, left in host memory": partial(batches_of, shards, batch),
        "reader, to the device": lambda: arriving(batches_of(shards, batch), scale.device),
        "reader, 4 threads, to the device": lambda: arriving(batches_of(shards, batch, 4), scale.device),
        "reader, to the device, pageable": lambda: from_pageable(batches_of(shards, batch), scale.device),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + scale.pick(READ_ROUNDS, 1)):
        for name, way in ways.items():
            rate = rows_per_second(way())
            if number:  # the first round warms up
                rates[name].append(rate)
    first = next(iter(ways))
    for name, of in rates.items():
        share = statistics.median(own / bare for own, bare in zip(of, rates[first], strict=True))
        figures = {} if name == first else {"of_the_bare_copy": share}
        row_of(report, name, statistics.median(of), d_in, **figures)


def on_the_device(scale: Scale, report: Report) -> None:
    """Rows that wait in the device's own memory."""
    from reader import Made

    batch, chunk = scale.pick(READ, TINY_READ)[1], scale.pick(STREAM_CHUNK, TINY_STREAM_CHUNK)
    d_in = scale.pick(GPT2, TINY_WIDTH)
    row_of(report, "rows on the device, batches drawn", drawn(scale, batch, d_in), d_in)
    source = Made(chunk * STREAM_CHUNKS, d_in, torch.bfloat16, True, chunk, batch)
    row_of(report, "rows on the device, a stream of them", streamed(scale, source, batch), d_in)


def copied(scale: Scale, x: Tensor, times: int) -> Iterator[Tensor]:
    """x on the device, so often, each copy waited for."""
    into = torch.empty(x.shape, dtype=x.dtype, device=scale.device)
    for _ in range(times):
        into.copy_(x, non_blocking=True)
        scale.wait()
        yield into


def row_of(report: Report, name: str, rate: float, d_in: int, **figures: Any) -> None:
    """A row of so many rows a second of bfloat16."""
    report.row(name, million_rows_s=rate / 1e6, gb_s=rate * d_in * 2 / 1e9, **figures)


def streamed(scale: Scale, source: Any, batch: int) -> float:
    """Rows a second of training batches of rows that wait on the device and are made meanwhile, after those held."""
    from msae.data.activations import Activations, Data
    from msae.data.batches import TrainBatches

    gb = STREAM_HOLDS * source.chunk * source.bytes_per_row("hook") / 1e9
    with tempfile.TemporaryDirectory() as root:
        data = Data(source, batch, root, memory_gb=gb, memory_device=scale.pick("cuda", None))
        activations = Activations(data)
        try:
            warm, steps = source.rows // batch // 4, source.rows // batch
            batches = iter(TrainBatches(activations.rows, batch, warm + steps, 0))
            for _ in range(warm):
                next(batches)
            scale.wait()
            begun = time.perf_counter()
            for x in batches:
                assert x.device.type == scale.device
                scale.wait()
            return steps * batch / (time.perf_counter() - begun)
        finally:
            activations.close()


def drawn(scale: Scale, batch: int, d_in: int) -> float:
    """Rows a second of batches drawn from a pool on the device."""
    from msae.data.rows import take

    pool = {"activations": torch.randn(POOL_ROWS, d_in, device=scale.device).bfloat16()}
    index, out = torch.randint(POOL_ROWS, (batch,)), torch.empty(batch, d_in, dtype=torch.bfloat16, device=scale.device)
    count = scale.pick(200, 2)
    times = []
    for _ in range(1 + READ_ROUNDS):
        scale.wait()
        begun = time.perf_counter()
        for _ in range(count):
            take(pool, index, out)
        scale.wait()
        times.append((time.perf_counter() - begun) / count)
    return batch / statistics.median(times[1:])


# --- the harvest --------------------------------------------------------------------------------------------------


def harvest(scale: Scale, report: Report) -> None:
    """Tokens a second of a harvest, from opened text to synced shards: benchmarks/harvest.py.

    On a card of a random GPT-2 small (12 layers, 768 wide) at blocks.8.hook_resid_pre, context 512, 32 sequences at a
    time, a million tokens; `of_sdpa` and `of_bare`: as a share of transformers' own forward pass with SDPA up to there,
    and of our bare forward pass, on the same batches. In bfloat16, then, if seconds are left, as the defaults have it:
    the model in float32, its rows in float16.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from harvest import random_model

    from msae.training.memory import keep_freed_memory

    begin(scale)
    keep_freed_memory()
    longest = 0.0
    with tempfile.TemporaryDirectory() as directory:
        model, text = random_model(Path(directory), **scale.pick(MODEL, TINY_MODEL))
        for model_dtype, dtype in (("bfloat16", "bfloat16"), *scale.pick((("float32", "float16"),), ())):
            name = f"harvest, model in {model_dtype}"
            if skipped(report, name, longest):
                continue
            begun = time.monotonic()
            with tried(report, name):
                one_harvest(scale, report, name, Path(directory), (str(model), str(text)), model_dtype, dtype)
            release()
            longest = max(longest, time.monotonic() - begun)


def one_harvest(
    scale: Scale, report: Report, name: str, root: Path, names: tuple[str, str], model_dtype: Any, dtype: str
) -> None:
    """The rows of one type of the model."""
    from harvest import Job, ways

    sizes = {**scale.pick(TEXT, TINY_TEXT), "dtypes": [dtype], "attentions": ["sdpa"]}
    job = Job(*names, **sizes, device=scale.device, model_dtype=model_dtype)
    context, model_batch = scale.pick((CONTEXT, MODEL_BATCH), (TINY_CONTEXT, TINY_MODEL_BATCH))
    these = ways(job, root, context, model_batch)
    times: dict[str, list[float]] = {way: [] for way in these.timed}
    longest = 0.0
    for _ in range(scale.pick(HARVEST_ROUNDS, 1)):
        begun = time.monotonic()
        if report.left() < 1.2 * longest:
            break
        for way, run in these.timed.items():
            times[way].append(run())
        longest = max(longest, time.monotonic() - begun)
    for way, of in times.items():
        shares = {"of_sdpa": these.ratio(times, way, "transformers sdpa"), "of_bare": these.ratio(times, way)}
        what = name if way == dtype else f"{way}, {model_dtype}"
        report.row(what, tokens_s=round(these.computed / statistics.median(of)), **shares, rounds=len(of))
