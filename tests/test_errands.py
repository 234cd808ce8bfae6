"""A newcomer's errands, as docs/inside.md tells them: find the equation; add a mechanism, term, metric or source."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import msae.evaluation.evaluate
import msae.sae.objective
import msae.sae.sparsity
import msae.sources.forest
from msae import train
from msae.cli.command import config_dir
from msae.data.shards import Shards
from msae.runs import Run
from msae.sae.objective import TERMS
from msae.sae.sparsity import SPARSITIES
from msae.settings import settings
from msae.sources.source import Chunk
from tests.commands import TREE, metrics_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
REPOSITORY = Path(__file__).parents[1]
INSIDE = (REPOSITORY / "docs" / "inside.md").read_text()
SHORT = ["tokens=2000", "run_dir=run"]


def follow(title: str, module: Any, **more: Any) -> tuple[dict[str, Any], str]:
    """Run the code under a heading as if it stood in that module; what it defines, and the command's argument."""
    section = INSIDE.split(f"## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    command = re.search(r"`python -m msae.train ([^`]+)`", section)
    defined: dict[str, Any] = {**vars(module), **more}
    exec(compile(code, title, "exec"), defined)
    return defined, command[1].strip("'") if command else ""


def test_the_equation_is_one_click_from_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    (path,) = set(re.findall(r"\[`msae/sae/objective.py`\]\((.*?)\)", readme))
    docstring = (REPOSITORY / path).read_text().split('"""')[1]
    (equation,) = re.findall(r"^    L = .*$", docstring, re.MULTILINE)
    assert equation in (REPOSITORY / "docs" / "objectives.md").read_text()
    assert equation.strip().startswith("L = Σ_m w_m")


def test_every_link_of_the_walk_leads_somewhere() -> None:
    links = re.findall(r"\]\((\.\./[^)#]+)", INSIDE)
    assert len(links) > 15
    assert [link for link in links if not (REPOSITORY / "docs" / link).is_file()] == []


def test_a_mechanism_is_one_class(done, monkeypatch) -> None:
    monkeypatch.setitem(SPARSITIES, "halves", None)  # unknown again after this test
    _, argument = follow("Add a sparsity mechanism", msae.sae.sparsity)
    done(train, *TREE, *SHORT, argument)
    assert metrics_of("run")["val/l0/p32"] == pytest.approx(1.25, rel=0.3)
    assert json.loads((Run("run").sae_directory / "cfg.json").read_text())["architecture"] == "jumprelu"


def test_a_term_is_one_function(done, monkeypatch) -> None:
    _, err = done(train, *TREE, "tokens=2000", "run_dir=without", "model.kernels=plain")
    assert "kernels: plain\n" in err
    monkeypatch.setattr(msae.sae.objective, "TERMS", dict(TERMS))
    _, argument = follow("Add a term to the objective", msae.sae.objective)
    _, err = done(train, *TREE, *SHORT, "model.kernels=plain", argument.replace("0.1", "3"))
    assert "kernels: dense, which model.objective.terms={'square_l2': 3.0} needs\n" in err
    x = Shards(next(Path("shards").iterdir())).activations("val", 0)
    without, with_term = (Run(name).load_sae().encode(x).square().sum() for name in ("without", "run"))
    assert with_term < 0.9 * without


def test_a_metric_is_one_function(done, monkeypatch) -> None:
    monkeypatch.setattr(msae.evaluation.evaluate, "METRICS", [*msae.evaluation.evaluate.METRICS])
    follow("Add a metric", msae.evaluation.evaluate)
    out, _ = done(train, *TREE, *SHORT)
    assert metrics_of("run")["val/largest"] > 0
    assert "val/largest" in out


def test_a_source_is_one_class_and_a_file(done, monkeypatch) -> None:
    more = {"settings": settings, "Chunk": Chunk}
    defined, argument = follow("Bring a source", msae.sources.forest, **more)
    monkeypatch.setattr(msae.sources.forest, "NoiseSource", defined["NoiseSource"], raising=False)
    (text,) = re.findall(r"```yaml\n(.*?)```", INSIDE, re.DOTALL)
    Path("conf/data").mkdir(parents=True)
    Path("conf/data/noise.yaml").write_text(
        text.replace("msae.sources.noise.NoiseSource", "msae.sources.forest.NoiseSource")
    )
    assert not (config_dir("conf") / "data" / "noise.yaml").exists()
    done(train, "-cd", str(Path("conf").absolute()), *SHORT, argument)
    assert Run("run").load_sae().d_in == 64
    assert metrics_of("run")["train/tokens"] == 2048
