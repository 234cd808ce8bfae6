"""Imports run one way: sae and data know nothing of what is built on them."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "msae"
MAY_IMPORT = {
    "sae": set(),
    "data": set(),
    "interop": {"sae"},
    "evaluation": {"sae", "data"},
    "training": {"sae", "data", "evaluation"},
    "hierarchy": {"sae", "data", "evaluation"},
}
COMMANDS = {
    "job.py": {"config", "interop"},
    "__main__.py": {"config", "schema"},
}  # what a command line's files may besides
ONLY_IN = {
    "lightning": {"training/", "data/datamodule.py"},
    "transformer_lens": {"data/bridge.py"},
    "triton": {"sae/kernels/triton_kernels.py"},
    "hydra": {"config.py", "schema.py", "sweep.py", "harvest.py", "training/job.py"},
    "omegaconf": {
        "config.py",
        "schema.py",
        "sweep.py",
        "train.py",
        "harvest.py",
        "export.py",
        "report.py",
        "training/job.py",
        "hierarchy/job.py",
        "hierarchy/__main__.py",
    },
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    relative = path.relative_to(PACKAGE)
    room = relative.parts[0] if len(relative.parts) > 1 else None
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "msae" and room is not None:
            other = parts[1] if len(parts) > 1 else ""
            allowed = MAY_IMPORT[room] | {room, "progress", "ranks", ""} | COMMANDS.get(path.name, set())
            assert other in allowed, f"{relative} imports {module}"
        for package, places in ONLY_IN.items():
            if parts[0] == package:
                assert any(str(relative).startswith(place) for place in places), f"{relative} imports {module}"


def test_the_sae_needs_torch_alone():
    outside = {m.split(".")[0] for path in (PACKAGE / "sae").glob("*.py") for m in imports(path)}
    assert outside - sys.stdlib_module_names <= {"torch", "jaxtyping", "safetensors", "msae"}
