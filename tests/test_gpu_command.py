"""`python benchmarks/gpu.py`: parts that fail, hang or lack a package; what it adopts. CI runs all of it on a CPU."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from msae.sae.fast.measured import Timed

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"
MACHINE = {"device": "cuda", "card": "NVIDIA H100", "capability": "9.0", "torch": "2.11", "triton": "3.6"}
SIZE = {"precision": "bfloat16", "d_in": 768, "d_sae": 24_576, "batch": 4096}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The script as a module, with a table of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("gpu", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.MEASURED = tmp_path / "measured.json"
    module.MEASURED.write_text("[]\n")
    return module


ROW = "import json, sys, time\nout = sys.argv[sys.argv.index('--out') + 1]\n"


@pytest.mark.parametrize(
    ("script", "outcome", "rows"),
    [
        ("json.dump([{'name': 'a', 'ok': True}], open(out, 'w'))", "ok", 1),
        ("json.dump([{'name': 'a', 'ok': False}], open(out, 'w'))", "failed: what was checked does not hold", 1),
        ("raise RuntimeError('no\\nsuch kernel')", "failed: such kernel", 0),
        ("import no_such_package", "skipped: ModuleNotFoundError: No module named 'no_such_package'; see --wheels", 0),
        ("json.dump([{'name': 'a'}], open(out, 'w')), sys.stdout.flush(); time.sleep(60)", "stopped after 6 s", 1),
    ],
)
def test_a_part_that_fails_or_hangs_is_reported_with_the_rows_it_has(gpu, script, outcome, rows, tmp_path) -> None:
    part = tmp_path / "part.py"
    part.write_text(ROW + script + "\n")
    gpu.__file__ = str(part)
    result = gpu.run_apart("steps", "cpu", 6 if "sleep" in script else 60, dict(os.environ))
    assert result["outcome"] == outcome
    assert len(result["rows"]) == rows


def results(path: Path, machine: dict = MACHINE, exactness: str = "ok", **rows) -> Path:
    steps = [{"name": method, "method": method, "ms": ms, **SIZE} for method, ms in rows.items()]
    parts = {"exactness": {"outcome": exactness, "rows": []}, "steps": {"outcome": "ok", "rows": steps}}
    path.write_text(json.dumps({"machine": machine, "parts": parts}))
    return path


def test_figures_of_a_card_replace_its_older_ones(gpu, tmp_path) -> None:
    others = {**MACHINE, "card": "NVIDIA A100", "capability": "8.0"}
    gpu.adopt(results(tmp_path / "a.json", others, dense=9, triton=4, floor=1))
    gpu.adopt(results(tmp_path / "b.json", dense=9, triton=3, floor=1))
    gpu.adopt(results(tmp_path / "c.json", dense=8, triton=2, floor=1))
    entries = [Timed(**entry) for entry in json.loads(gpu.MEASURED.read_text())]
    assert [(e.card, e.precision, e.dense_ms, e.triton_ms) for e in entries] == [
        ("NVIDIA A100", "bfloat16", 9, 4),
        ("NVIDIA H100", "bfloat16", 8, 2),
    ]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"machine": {"device": "cpu, tiny"}, "dense": 9, "triton": 3}, "nothing was measured"),
        ({"exactness": "stopped after 110 s", "dense": 9, "triton": 3}, r"not shown to be exact \(stopped after 110 s"),
        ({"dense": 9}, "no step was timed both dense and with triton"),
    ],
)
def test_what_proves_nothing_is_not_adopted(gpu, how, why, tmp_path) -> None:
    with pytest.raises(SystemExit, match=why):
        gpu.adopt(results(tmp_path / "gpu.json", **how))
    assert json.loads(gpu.MEASURED.read_text()) == []


@pytest.mark.parametrize("text", [None, "{}", "no json", "[1]"])
def test_what_is_no_file_of_ours_is_one_line(gpu, text, tmp_path) -> None:
    if text is not None:
        (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(SystemExit, match=r"^--adopt [^\n]*gpu\.json: expected a file that --out wrote; [^\n]*$"):
        gpu.adopt(tmp_path / "gpu.json")


def test_every_part_says_what_it_does(gpu) -> None:
    for part in gpu.PARTS:
        assert "On a card" in gpu.what(part), part
