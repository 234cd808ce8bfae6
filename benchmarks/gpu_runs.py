"""What benchmarks/gpu.py does with whole commands: a run and a harvest on the device and on the CPU; a run resumed."""

import ctypes
import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from gpu_data import begin, skipped, tried
from report import Report, Scale
from torch import Tensor

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}  # Lightning's names
PR_SET_PDEATHSIG = 1  # sys/prctl.h

# python -m msae.train; tiny: rows, batches and steps that only prove the script
RUN = ["tokens=1_280_000"]
TINY_RUN = ["tokens=20_000", "data.source.rows=4096", "data.source.val_rows=1024", "data.batch_tokens=128"]
RUN_KERNELS, TINY_RUN_KERNELS = ("dense", "triton"), ("plain",)
RELATIVE = 0.01  # of FVU and MSE
ABSOLUTE = 0.01  # of every other figure
LATENTS = 2  # that may count as dead or dense in one run alone
COUNTED = ("dead", "dense_1pct", "dense_10pct")

# a forest of 320 features in 256 dimensions: several blocks of every kernel
WIDE = ["data.source.trees=64", "data.source.independent=64", "data.source.d_in=256", "data.source.directions=random"]
WIDE += ["data.source.rows=65_536", "data.source.val_rows=8192", "data.batch_tokens=2048"]
WIDE += [
    "model.d_sae=2048",
    "model.k=16",
    "model.dead.after_tokens=4096",
    "tokens=1_228_800",
    "checkpoint_every_steps=100",
]
TINY_RESUMED = [*TINY_RUN[1:], "tokens=20_000", "checkpoint_every_steps=20", "trainer.val_check_interval=100"]
RESUMED, TINY_RESUMED_WITH = (("dense", "32-true"), ("triton", "bf16-mixed")), (("dense", "32-true"),)

MODEL = {"layers": 6, "width": 256, "heads": 8, "words": 100_000}
TINY_MODEL = {"layers": 2, "width": 64, "heads": 4, "vocabulary": 1000, "words": 10_000, "document": 20}
TEXT = {"layer": 4, "tokens": 50_000, "chunk_tokens": 16_384}
TINY_TEXT = {"layer": 1, "tokens": 2000, "chunk_tokens": 1024}
STORED = ("float32", "bfloat16", "float16", "int8")
FORWARD = 1e-5  # of a row's largest value, by which float32 forward passes may differ


# --- commands -----------------------------------------------------------------------------------------------------


class Commands:
    """`python -m msae.train` in processes of their own, which share the cores and shards."""

    def __init__(self, scale: Scale, directory: Path, at_once: int) -> None:
        self.directory, self.threads = directory, max(1, len(os.sched_getaffinity(0)) // at_once)
        self.context: Any = multiprocessing.get_context(scale.pick("spawn", "forkserver"))
        if scale.is_tiny:  # imports take longer than tiny runs
            self.context.set_forkserver_preload(["msae.train", "msae.training.job"])
        self.processes: list[BaseProcess] = []

    def run(self, name: str) -> Path:
        """The run directory of a command."""
        return self.directory / name

    def log(self, name: str) -> Path:
        """What its command printed."""
        return self.directory / f"{name}.log"

    def start(self, name: str, *overrides: str) -> BaseProcess:
        """Begin a run of this name, or go on with it."""
        arguments = [*overrides, f"run_dir={self.run(name)}", f"data.root={self.directory / 'shards'}"]
        process: BaseProcess = self.context.Process(target=train, args=(arguments, str(self.log(name)), self.threads))
        process.start()
        self.processes.append(process)
        return process

    def finish(self, name: str, process: BaseProcess, seconds: float) -> None:
        """Wait for its end. Raises RuntimeError if it fails or takes longer."""
        process.join(None if math.isinf(seconds) else max(0.0, seconds))
        if process.exitcode != 0:
            lines = self.log(name).read_text().strip().splitlines() if self.log(name).exists() else []
            outcome = "has not ended in time" if process.exitcode is None else f"ended with {process.exitcode}"
            raise RuntimeError(f"{name} {outcome}: {lines[-1] if lines else 'no word'}")

    def kernels(self, name: str) -> str:
        """The kernels that it said it took."""
        found = re.findall(r"kernels: (\w+)", self.log(name).read_text())
        return found[-1] if found else "none"


@contextmanager
def commands(scale: Scale, at_once: int) -> Iterator[Commands]:
    """Commands in a temporary directory, none of which outlives it."""
    with tempfile.TemporaryDirectory() as directory:
        these = Commands(scale, Path(directory), at_once)
        try:
            yield these
        finally:
            for process in these.processes:
                process.kill()
                process.join()


def train(arguments: list[str], log: str, threads: int) -> None:
    """`python -m msae.train` in this process, which ends with the one that began it; its output goes to a file."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(threads)
    sys.argv = ["msae.train", *arguments]
    runpy.run_module("msae.train", run_name="__main__", alter_sys=True)


# --- the same run on both -----------------------------------------------------------------------------------------


def runs(scale: Scale, report: Report) -> None:
    """`python -m msae.train` on the device with each of the kernels, beside the same run on the CPU.

    On a card 1,280,000 tokens of the default tree; dense and Triton. Data, first weights and batches are the same to
    the bit and every sum is in float32, so figures differ by its rounding alone, and by what training makes of that:
    on a CPU, other kernels or first weights 10⁻⁶ off moved FVU by 1.2·10⁻⁴ of itself at most, every other figure by
    4·10⁻⁴ at most, and one latent of 32 between dead and alive. 25 times that and more is allowed for: 1 % of FVU and
    MSE, 0.01 of every other figure, two latents where latents are counted.
    """
    kernels = scale.pick(RUN_KERNELS, TINY_RUN_KERNELS)
    overrides = scale.pick(RUN, TINY_RUN)
    with commands(scale, at_once=1 + len(kernels)) as these:
        cpu = these.start("cpu", *overrides, "trainer.accelerator=cpu")
        accelerator = f"trainer.accelerator={ACCELERATORS[scale.device]}"
        of_device = {name: these.start(name, *overrides, accelerator, f"model.kernels={name}") for name in kernels}
        these.finish("cpu", cpu, report.left() - 2)
        reference = metrics(these.run("cpu"))
        report.row("run on the CPU", kernels=these.kernels("cpu"), fvu=widest_fvu(reference), **of_time(reference))
        for name, process in of_device.items():
            what = scale.pick(f"run on the device, {name}", f"run on the CPU again, {name}")
            with tried(report, what):
                these.finish(name, process, report.left() - 2)
                own = metrics(these.run(name))
                is_same, figures = compared(own, reference)
                taken = these.kernels(name)
                report.row(
                    what, ok=is_same and taken == name, kernels=taken, fvu=widest_fvu(own), **figures, **of_time(own)
                )


def metrics(run: Path) -> dict[str, float]:
    """The figures that a run left."""
    found: dict[str, float] = json.loads((run / "metrics.json").read_text())
    return found


def widest_fvu(figures: dict[str, float]) -> float:
    """FVU of the last prefix."""
    return [value for key, value in figures.items() if key.startswith("val/fvu/")][-1]


def of_time(figures: dict[str, float]) -> dict[str, float]:
    """The seconds of a run, several of which may have shared the machine."""
    return {"seconds": round(figures["seconds"], 1)}


def compared(own: dict[str, float], other: dict[str, float]) -> tuple[bool, dict[str, Any]]:
    """Whether all figures are the same within what is allowed, and the largest differences."""
    largest: dict[str, tuple[float, str]] = {"relative": (0.0, ""), "absolute": (0.0, ""), "latents": (0.0, "")}
    keys = {key for key in own.keys() | other.keys() if key.startswith(("val/", "truth/"))}
    missing = {key for key in keys if not (key in own and key in other)}  # not finite in one of them
    for key in keys - missing:
        name, difference = key.split("/")[1], abs(own[key] - other[key])
        if name in ("fvu", "mse"):
            kind, value = "relative", difference / max(abs(other[key]), 1e-12)
        elif name in COUNTED:
            kind, value = "latents", difference * int(key.rsplit("/p", 1)[1])
        else:
            kind, value = "absolute", difference
        largest[kind] = max(largest[kind], (value, key))
    is_same = not missing and all(
        largest[kind][0] <= most + 1e-9
        for kind, most in (("relative", RELATIVE), ("absolute", ABSOLUTE), ("latents", LATENTS))
    )
    figures: dict[str, Any] = {"compared": len(keys - missing)}
    for kind, (value, key) in largest.items():
        figures |= {f"largest_{kind}": value} | ({f"largest_{kind}_at": key} if value else {})
    return is_same, figures | ({"not_in_both": sorted(missing)} if missing else {})


# --- resumed ------------------------------------------------------------------------------------------------------


def resume(scale: Scale, report: Report) -> None:
    """A run beside the same one killed (SIGKILL) after its first checkpoint and resumed: the exported bits are equal.

    On a card 600 steps of 2,048 rows of a forest, 256 × 2048, with dead latents; dense in float32 and Triton in
    bf16-mixed. Each is run twice without a stop too, to tell what resuming changes from what differs by itself.
    """
    shared = [*scale.pick(WIDE, TINY_RESUMED), f"trainer.accelerator={ACCELERATORS[scale.device]}"]
    kinds = scale.pick(("stopped", "whole", "again"), ("stopped", "whole"))
    cases = {
        f"{kernels}-{precision}": (kernels, [*shared, f"model.kernels={kernels}", f"trainer.precision={precision}"])
        for kernels, precision in scale.pick(RESUMED, TINY_RESUMED_WITH)
    }
    with commands(scale, at_once=len(kinds) * len(cases)) as these:
        running = {
            f"{case}-{kind}": these.start(f"{case}-{kind}", *overrides)
            for kind in kinds
            for case, (_, overrides) in cases.items()
        }
        killed = killed_after_checkpoint(
            these, {f"{case}-stopped": running[f"{case}-stopped"] for case in cases}, report
        )
        for case, (_, overrides) in cases.items():
            if f"{case}-stopped" in killed:
                running[f"{case}-stopped"] = these.start(f"{case}-stopped", *overrides, "ckpt_path=last")
        for case, (kernels, _) in cases.items():
            whole, stopped, again = (f"{case}-{kind}" for kind in ("whole", "stopped", "again"))
            with tried(report, f"resumed, {case}"):
                for name in (whole, stopped):
                    these.finish(name, running[name], report.left() - 2)
                if stopped not in killed:
                    raise RuntimeError("it ended before it was killed")
                same, taken = bits(these, whole, stopped), these.kernels(stopped)
                is_same, step = same["differing"] == 0 and taken == kernels, killed[stopped]
                report.row(f"resumed, {case}", ok=is_same, kernels=taken, killed_after_step=step, **same)
            if again in running:
                with tried(report, f"run twice, {case}"):
                    these.finish(again, running[again], report.left() - 2)
                    same = bits(these, whole, again)
                    report.row(f"run twice, {case}", ok=same["differing"] == 0, **same)


def killed_after_checkpoint(these: Commands, processes: dict[str, BaseProcess], report: Report) -> dict[str, int]:
    """Kill each of these runs once it has a checkpoint; the step of that, of those that were killed in time."""
    waited, killed = dict(processes), list[str]()
    while waited and report.left() > 5:
        for name, process in list(waited.items()):
            if (these.run(name) / "checkpoints" / "last.ckpt").exists():
                process.kill()
                process.join()
                killed += [name] if process.exitcode == -signal.SIGKILL else []
            if process.exitcode is not None:
                del waited[name]  # one that has ended by itself fails where its end is waited for
        time.sleep(0.005)
    return {name: step_of(these.run(name) / "checkpoints" / "last.ckpt") for name in killed}


def step_of(checkpoint: Path) -> int:
    """The step after which it was made."""
    step: int = torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"]
    return step


def exported(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's sae/."""
    from safetensors.torch import load_file

    return {
        key: tensor for file in sorted((run / "sae").glob("*.safetensors")) for key, tensor in load_file(file).items()
    }


def bits(these: Commands, whole: str, other: str) -> dict[str, Any]:
    """How many of the exported tensors of two runs differ in any bit, and by how much at most."""
    one, two = (exported(these.run(name)) for name in (whole, other))
    assert one, f"{whole} exported nothing"
    assert one.keys() == two.keys(), f"{sorted(one.keys() ^ two.keys())} are in one of two exports"
    differing = [key for key, tensor in one.items() if not same_bits(tensor, two[key])]
    figures: dict[str, Any] = {"tensors": len(one), "differing": len(differing)}
    if differing:
        by = {key: float((one[key].double() - two[key].double()).abs().max()) for key in differing}
        worst = max(by, key=lambda key: by[key])
        figures |= {"largest_difference": by[worst], "of": worst, "beside": float(one[worst].double().abs().max())}
    return figures


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same shape, type and bits; NaN equals itself."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two))
    return torch.equal(a, b)


# --- the same harvest ---------------------------------------------------------------------------------------------


def harvest_bytes(scale: Scale, report: Report) -> None:
    """The same harvest on the CPU and on the device, in every storage type: the same tokens, and rows that agree.

    On a card 50,000 tokens of a random GPT-2 of 6 layers and width 256, run in float32, at blocks.4.hook_resid_pre.
    Two forward passes in float32 may differ by 10⁻⁵ of a row's largest value (in float32 and float64 on a CPU they
    differ by a tenth of that), and each stored value by a unit in the last place of its type more: where the two lie on
    either side of the middle between two values, they are rounded away from each other. `of_allowed`: the largest
    difference as a share of that; `of_row`: as a share of the row's largest value; `differing`: share of values.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from harvest import Job, random_model

    begin(scale)
    context, model_batch = scale.pick((128, 16), (32, 8))
    longest = 0.0
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model, text = map(str, random_model(root, **scale.pick(MODEL, TINY_MODEL)))
        job = Job(model, text, **scale.pick(TEXT, TINY_TEXT))
        for dtype in STORED:
            if skipped(report, dtype, longest):
                continue
            begun = time.monotonic()
            with tried(report, dtype):
                jobs = {"cpu": job, "device": replace(job, device=scale.device)}
                harvests = [rows_of(of, dtype, context, model_batch, root / name) for name, of in jobs.items()]
                report.row(dtype, **same_rows(*harvests))
            longest = max(longest, time.monotonic() - begun)


def rows_of(job: Any, dtype: str, context: int, model_batch: int, root: Path) -> Any:
    """The shards of one harvest."""
    from msae.data.harvest import harvest
    from msae.sources.language_model import LanguageModelSource

    return harvest(LanguageModelSource(**job.source(dtype, context, model_batch)), root, show=False)[job.hook]


def same_rows(one: Any, two: Any) -> dict[str, Any]:
    """Whether the shards of two harvests hold the same rows within rounding, and how far they are apart."""
    pieces = [(split, piece) for split in ("train", "val") for piece in range(len(one.rows(split)))]
    counts = [{split: of.rows(split) for split in ("train", "val")} for of in (one, two)]
    if counts[0] != counts[1]:
        return {"ok": False, "rows": counts[0], "on_the_device": counts[1]}
    same_tokens, values, differing, of_allowed, of_row = True, 0, 0, 0.0, 0.0
    for split, piece in pieces:
        indices = [of.index(split, piece) for of in (one, two)]
        same_tokens &= indices[0].keys() == indices[1].keys()
        same_tokens &= all(torch.equal(tensor, indices[1][name]) for name, tensor in indices[0].items())
        a, b = (of.activations(split, piece).double() for of in (one, two))
        largest = torch.maximum(a.abs(), b.abs())
        of_rows = largest.amax(1, keepdim=True)
        difference = (a - b).abs()
        allowed = FORWARD * of_rows + unit(one.stored_dtype, largest, of_rows)
        values, differing = values + a.numel(), differing + int((difference > 0).sum())
        of_allowed = max(of_allowed, float((difference / allowed).max()))
        of_row = max(of_row, float((difference / of_rows).max()))
    return {
        "ok": same_tokens and of_allowed <= 1,
        "rows": sum(map(sum, counts[0].values())),
        "same_tokens": same_tokens,
        "of_allowed": of_allowed,
        "of_row": of_row,
        "differing": differing / values,
    }


def unit(dtype: torch.dtype, values: Tensor, of_rows: Tensor) -> Tensor:
    """A unit in the last place of each value as it is stored; of int8 the scale of its row."""
    if dtype == torch.int8:
        return of_rows / 127
    limits = torch.finfo(dtype)
    return limits.eps * values.clamp_min(limits.tiny)
