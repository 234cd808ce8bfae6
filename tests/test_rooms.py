"""Imports run one way: every file of the package, at any depth, under TYPE_CHECKING and in functions too."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "msae"
BOTTOM = {"devices", "files", "progress", "seeds", "settings"}  # files of the top level that every room may use
MAY_IMPORT = {  # room → rooms below it
    "sae": set(),
    "sources": set(),
    "data": {"sources"},
    "interop": {"sae"},
    "hierarchy": {"sae", "data"},
    "runs": {"sae", "data", "interop"},
    "evaluation": {"sae", "sources", "data", "hierarchy", "runs"},
    "training": {"sae", "sources", "data", "evaluation", "runs"},
    "explorer": {"sae", "sources", "data", "evaluation", "runs", "hierarchy"},
    "cli": {"sae", "data", "evaluation", "runs", "training"},
}
COMMANDS = {"notebook", "train", "harvest", "export", "evaluate", "explore", "runs.__main__"}  # may import every room
ONLY_IN = {  # package → where it may be imported
    "lightning": ("training", "data.datamodule"),
    "transformer_lens": ("sources.bridge",),
    "triton": ("sae.fast.triton_kernels",),
    "hydra": ("cli",),
    "omegaconf": ("cli", *COMMANDS),
    "pydantic": ("settings", "sae", "sources", "data", "training"),
}
NEEDS_OF_SAE = {"torch", "jaxtyping", "safetensors", "pydantic", "msae"}


def name_of(path: Path) -> str:
    """sae/model.py → sae.model; a folder's __init__ has the folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            inside = {name for name in names if name.removeprefix("msae.") in FILES}
            found |= inside | ({module} if names - inside else set())
    return found


def own(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    return {module.removeprefix("msae").removeprefix(".") for module in imports(path) if module.split(".")[0] == "msae"}


def room(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    inside = room(name)
    assert name == "" or inside in BOTTOM or inside in MAY_IMPORT or name in COMMANDS, f"{name} is in no room"
    for other in own(FILES[name]):
        allowed = MAY_IMPORT.get(inside, set()) | BOTTOM | {inside, ""}
        assert name in COMMANDS or room(other) in allowed, f"{name} imports {other}"
        assert other not in COMMANDS, f"{name} imports a command line"
    for module in imports(FILES[name]):
        places = ONLY_IN.get(module.split(".")[0])
        assert places is None or any(f"{name}.".startswith(f"{place}.") for place in places), f"{name}: {module}"


def test_no_file_imports_itself_by_way_of_others():
    """A folder's __init__ counts as one of its files: what it imports, importing any of them imports."""
    needs = {}
    for name, path in FILES.items():
        parents = {".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)} - {""}
        needs[name] = own(path) - parents - {"", name}
    try:
        list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_check_sees_what_it_should(tmp_path):
    """At the top, in a function, and under TYPE_CHECKING."""
    file = tmp_path / "file.py"
    lines = ["import os", "from msae.sae import model, MatryoshkaSAE", "if TYPE_CHECKING:", "    import msae.runs"]
    file.write_text("\n".join([*lines, "def f():", "    from msae.data.shards import Shards"]))
    assert imports(file) == {"os", "msae.sae", "msae.sae.model", "msae.runs", "msae.data.shards"}


def test_the_sae_needs_little_beside_torch():
    outside = {m.split(".")[0] for name, path in FILES.items() if room(name) == "sae" for m in imports(path)}
    assert outside - {"triton"} - sys.stdlib_module_names <= NEEDS_OF_SAE
