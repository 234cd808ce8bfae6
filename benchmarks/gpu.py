"""One command that proves the GPU path on the card that is here, and times it: within 8 minutes.

    python benchmarks/gpu.py                           # an NVIDIA card of compute capability 8.0 or more
    python benchmarks/gpu.py --device cpu              # every part at tiny sizes: proves this script, measures nothing
    python benchmarks/gpu.py --wheels .wheels          # where packages are missing: benchmarks/wheels.py collects them
    python benchmarks/gpu.py --adopt benchmarks/results/gpu.json    # lets model.kernels=auto follow these figures

Parts run in the order in which they matter, each in a process of its own with a limit of seconds: one that fails, or
lacks a package, is reported and the next goes on. What each does, and at which sizes on a card, is printed before it.
Figures go to --out row by row, with the card, its driver and the versions of torch and triton; a chrome trace of ten
steps lies beside it. A table ends the output; the exit code is 1 if anything that was checked does not hold.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MEASURED = HERE.parent / "msae" / "sae" / "fast" / "measured.json"
PARTS = {  # name → (function, limit in seconds)
    "exactness": ("gpu_steps.exactness", 170),
    "runs": ("gpu_runs.runs", 75),
    "resume": ("gpu_runs.resume", 60),
    "harvest_bytes": ("gpu_runs.harvest_bytes", 40),
    "steps": ("gpu_steps.steps", 130),
    "loop": ("gpu_data.loop", 60),
    "reader": ("gpu_data.reader", 30),
    "harvest": ("gpu_data.harvest", 65),
    "compiled": ("gpu_steps.compiled", 45),
    "profile": ("gpu_steps.profile", 25),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--budget-s", type=float, default=470, help="seconds for all parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--wheels", type=Path, help="a directory of wheels that are put on the path")
    parser.add_argument("--adopt", type=Path, help="a file that --out wrote; nothing is run")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)  # when the part is killed, in time.time()
    a = parser.parse_args()
    if a.adopt:
        adopt(a.adopt)
    elif a.part:
        run_here(a.part, a.device, a.out, a.ends)
    else:
        sys.exit(run_all(a))


# --- one part, in its own process ---------------------------------------------------------------------------------


def run_here(part: str, device: str, out: Path, ends: float) -> None:
    """Run a part; its rows go to `out`."""
    import torch
    from report import Report, Scale

    if device == "cpu":
        torch.set_num_threads(1)  # of tiny sizes
    module, _, name = PARTS[part][0].partition(".")
    getattr(importlib.import_module(module), name)(Scale(device), Report(out, ends - time.time()))


def run_apart(part: str, device: str, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part in a process of its own, killed with all that it started when its seconds are over.

    On a card it prints as it goes; the tiny ones, two of which run at a time, when they are over.
    """
    begun = time.monotonic()
    heading = f"\n== {part} ({PARTS[part][1]} s at most)\n{what(part)}"
    if device == "cuda":
        print(heading, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        rows, errors, output = (Path(directory) / name for name in ("rows.json", "errors", "output"))
        own = ["--part", part, "--device", device, "--out", str(rows), "--ends", str(time.time() + seconds)]
        with open(errors, "w") as file, open(output, "w") as printed:
            command = [sys.executable, __file__, *own]
            stdout = None if device == "cuda" else printed
            process = subprocess.Popen(command, stdout=stdout, stderr=file, env=environment, start_new_session=True)
            try:
                outcome = "ok" if process.wait(seconds) == 0 else error_of(errors)
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {seconds:.0f} s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = json.loads(rows.read_text()) if rows.exists() else []
        printed_before = "" if device == "cuda" else f"{heading}\n{output.read_text()}"
        traceback = errors.read_text()[-4000:] if outcome.startswith("failed") else ""
    if outcome == "ok" and any(row.get("ok") is False for row in found):
        outcome = "failed: what was checked does not hold"
    print(f"{printed_before}{traceback}-- {outcome}", flush=True)
    return {"outcome": outcome, "seconds": round(time.monotonic() - begun, 1), "rows": found}


def error_of(errors: Path) -> str:
    """The outcome of a part that ended with an error: its last line."""
    lines = errors.read_text().strip().splitlines() or ["no word"]
    missing = lines[-1].startswith("ModuleNotFoundError")
    return f"skipped: {lines[-1]}; see --wheels" if missing else f"failed: {lines[-1][:200]}"


# --- all of them --------------------------------------------------------------------------------------------------


def run_all(a: argparse.Namespace) -> int:
    """Run the parts, write the figures after each, and print the table."""
    ends = time.monotonic() + a.budget_s
    with tempfile.TemporaryDirectory() as site:
        path = [site, str(HERE.parent), str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
        environment["MSAE_TRACES"] = str(a.out.resolve().parent)
        environment["MSAE_TEST_DEVICE"] = a.device
        if a.device == "cpu":
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        of_steps = environment
        if a.wheels:
            install(a.wheels, site)
            if (a.wheels / "peers").is_dir():  # other versions of what the rest needs
                install(a.wheels / "peers", f"{site}/peers")
                of_steps = {**environment, "PYTHONPATH": f"{site}/peers{os.pathsep}{environment['PYTHONPATH']}"}
        machine = describe(a.device)
        machine_lines = "\n".join(f"{key:>16}  {value}" for key, value in machine.items())
        print(f"{machine_lines}\n{len(a.parts)} parts, in {a.budget_s:.0f} s at most", flush=True)
        results: dict[str, Any] = {"machine": machine, "parts": {}}
        a.out.parent.mkdir(parents=True, exist_ok=True)

        def run(part: str) -> None:
            limit = PARTS[part][1] if a.device == "cuda" else a.budget_s  # an interpreter's seconds say nothing
            seconds = min(limit, ends - time.monotonic())
            none = {"outcome": "not run: no time left", "seconds": 0.0, "rows": []}
            of_process = of_steps if part == "steps" else environment
            of_part[part] = none if seconds < 5 else run_apart(part, a.device, seconds, of_process)
            results["parts"] = {name: of_part[name] for name in a.parts if name in of_part}
            a.out.write_text(json.dumps(results, indent=1))

        of_part: dict[str, Any] = {}
        with ThreadPoolExecutor(2 if a.device == "cpu" else 1) as pool:
            list(pool.map(run, a.parts))
    print_table(results)
    print(f"\nfigures: {a.out}")
    outcomes = [part["outcome"] for part in results["parts"].values()]
    # what does not fit into a card's minutes is no failure; tiny sizes have to be done
    return int(any(o.startswith("failed") or (a.device == "cpu" and o != "ok") for o in outcomes))


def what(part: str) -> str:
    """What a part does: its docstring, read without importing it."""
    import ast

    module, _, name = PARTS[part][0].partition(".")
    tree = ast.parse((HERE / f"{module}.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return inspect.cleandoc(ast.get_docstring(function) or "")


def install(wheels: Path, site: str) -> None:
    """Put wheels on the path of the parts. Exits with one line if there are none."""
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if not files:
        sys.exit(f"--wheels {wheels}: no wheels there; python benchmarks/wheels.py collects them")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", site]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)


def describe(device: str) -> dict[str, str]:
    """The card, its driver, and the versions that matter. Exits with one line where there is no such device."""
    import torch

    sys.path.insert(0, str(HERE))
    from machine import cpu_model

    about = {"torch": torch.__version__, "python": platform.python_version(), "processor": cpu_model()}
    for package in ("triton", "lightning", "transformer_lens", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            about[package] = version(package)
    if device == "cpu":
        return {"device": "cpu, tiny sizes: nothing here is a measurement", **about}
    if not torch.cuda.is_available():
        sys.exit("--device cuda: this torch sees no GPU; give --device cpu to try the script itself")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "device": "cuda",
        "card": torch.cuda.get_device_name(),
        "capability": capability,
        "driver": driver,
        "cuda": str(torch.version.cuda),
        **about,
    }


def print_table(results: dict[str, Any]) -> None:
    """What every part came to, then the steps side by side."""
    print(f"\n{'part':<14}{'seconds':>8}  {'checks that hold':>17}  outcome")
    checks: list[bool] = []
    for name, part in results["parts"].items():
        checked = [row["ok"] for row in part["rows"] if "ok" in row]
        holds = f"{sum(checked)} of {len(checked)}" if checked else "only timed"
        print(f"{name:<14}{part['seconds']:8.1f}  {holds:>17}  {part['outcome']}")
        checks += checked
    print(f"{sum(checks)} of {len(checks)} checks hold")
    if results["machine"]["device"] != "cuda":
        print("this was a CPU at tiny sizes: no figure above or below is a measurement")
    timed = [row for row in results["parts"].get("steps", {}).get("rows", []) if "ms" in row]
    if not timed:
        return
    methods = [*dict.fromkeys(row["method"] for row in timed)]
    keys = ("precision", "d_in", "d_sae", "batch")
    sizes = [*dict.fromkeys(tuple(row[key] for key in keys) for row in timed)]
    names = "".join(f"{method:>28}" for method in methods)
    print(f"\n{'a step in ms (× the floor)':<34}{names}")
    for size in sizes:
        of = {row["method"]: row["ms"] for row in timed if tuple(row[key] for key in keys) == size}
        cells = [f"{of[m]:.3g} ({of[m] / of['floor']:.2f})" if m in of else "–" for m in methods]
        precision, d_in, d_sae, batch = size
        label = f"{d_in} × {d_sae:,}, {batch}, {precision}"
        print(f"{label:<34}{''.join(f'{cell:>28}' for cell in cells)}")


# --- what auto follows --------------------------------------------------------------------------------------------


def adopt(out: Path) -> None:
    """Add the figures of a card to the table that `model.kernels=auto` reads, in place of older ones of that card.

    Exits with one line unless the kernels were exact there and steps were timed.
    """
    try:
        results = json.loads(out.read_text())
        machine, parts = results["machine"], results["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        sys.exit(f"--adopt {out}: expected a file that --out wrote; python benchmarks/gpu.py --out {out}")
    if machine["device"] != "cuda":
        sys.exit(f"--adopt {out}: it was made with --device cpu; nothing was measured")
    if parts.get("exactness", {}).get("outcome") != "ok":
        sys.exit(f"--adopt {out}: the kernels were not shown to be exact ({parts.get('exactness', {}).get('outcome')})")
    timed: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for row in parts.get("steps", {}).get("rows", []):
        if "ms" in row:
            size = (row["precision"], row["d_in"], row["d_sae"], row["batch"])
            timed.setdefault(size, {})[row["method"]] = row["ms"]
    entries = [
        {
            **{key: machine[key] for key in ("card", "capability", "torch", "triton")},
            **dict(zip(("precision", "d_in", "d_sae", "batch"), size, strict=True)),
            "dense_ms": round(of["dense"], 4),
            "triton_ms": round(of["triton"], 4),
        }
        for size, of in sorted(timed.items())
        if {"dense", "triton"} <= of.keys()
    ]
    if not entries:
        sys.exit(f"--adopt {out}: no step was timed both dense and with triton")
    others = [entry for entry in json.loads(MEASURED.read_text()) if entry["card"] != machine["card"]]
    lines = ",\n".join(json.dumps(entry) for entry in [*others, *entries])
    MEASURED.write_text(f"[\n{lines}\n]\n")
    print(f"{MEASURED}: {len(entries)} sizes of {machine['card']}")


if __name__ == "__main__":
    main()
