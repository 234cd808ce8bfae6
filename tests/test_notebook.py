"""Training on a tensor from Python: the README's lines as printed, figures against plain computations, mistakes."""

import json
import re
from pathlib import Path

import pytest
import torch

from msae.data.stream import enough_gb, open_stream
from msae.notebook import train
from msae.runs import open_run
from msae.sources.tensor import TensorSource
from tests.sources import made

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
SMALL = {"d_sae": 32, "prefixes": [8, 32], "k": 2, "tokens": 8192, "batch_tokens": 256, "lr": 3e-3}


@pytest.fixture
def x(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 12, generator=generator)
    return (torch.rand(3000, 20, generator=generator) < 0.1).float() @ features + 1


def test_the_readme_s_lines_run_as_printed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = re.search(r"<!-- python:begin -->\n```python\n(.*?)```\n<!-- python:end -->", readme, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 10
    names: dict = {}
    exec(code, names)
    fvu, page = capsys.readouterr().out.split()[-2:]
    assert 0 < float(fvu) < 0.5
    assert Path(page).read_text().startswith("<!doctype html>")
    assert names["acts"].shape == (10, 128)
    assert Path(page).parent == names["trained"].run.path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_are_shuffled_split_and_all_there(x, dtype) -> None:
    source = TensorSource(x.to(dtype), val_fraction=0.2, seed=1, chunk_rows=1000)
    chunks = made(source.chunks(None))
    splits = {
        s: torch.cat([c.splits[s].activations["tensor"] for c in chunks if s in c.splits]) for s in ("train", "val")
    }
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2400, "val": 600}
    together = torch.cat(list(splits.values())).float()
    assert torch.equal(together.sort(0).values, x.to(dtype).float().sort(0).values)
    assert not torch.equal(together[:100], x[:100].to(dtype).float())
    assert [c.state for c in made(source.chunks(chunks[0].state))] == [c.state for c in chunks[1:]]
    rows, stream = open_stream(source, ["tensor"], Path(), enough_gb(source), show=False)
    assert stream.is_whole
    assert rows["tensor"].rows("train") == [1000, 1000, 400]


def test_the_identity_is_of_the_values_and_the_split(x) -> None:
    identity = TensorSource(x).identity("tensor")
    assert identity == TensorSource(x.clone().t().contiguous().t()).identity("tensor")
    changed = x.clone()
    changed[7, 3] += 1
    others = [TensorSource(changed), TensorSource(x, 0.1), TensorSource(x, seed=1), TensorSource(x[:-1])]
    assert len({json.dumps(source.identity("tensor")) for source in others} | {json.dumps(identity)}) == 5


def test_figures_are_those_of_a_plain_computation(x) -> None:
    trained = train(x[:2000], run_dir="run", **SMALL)
    sae, rest = trained.sae, x[2000:]
    fvu = float((rest - sae(rest)).square().sum() / (rest - rest.mean(0)).square().sum())
    figures = trained.evaluate(rest)
    assert figures["val/fvu/p32"] == pytest.approx(fvu, rel=1e-4)
    assert figures["val/l0/p32"] == pytest.approx(float((sae.encode(rest) > 0).sum(1).float().mean()), rel=1e-6)
    assert json.loads(Path("run/metrics.json").read_text()) == pytest.approx(trained.metrics)
    assert trained.metrics["train/tokens"] == 8192
    assert open_run("run").setting("model.d_sae") == 32
    page = trained.explore(tokens=500, keep_firings=False, out="page")
    assert page == Path("page/report.html")
    assert page.is_file()
    assert not Path("shards").exists()


def test_a_preset_and_nested_keys_and_the_trainer_reach_the_run(x) -> None:
    settings = {**SMALL, "tokens": 1024, "objective": {"aux": {"coefficient": 0.5}}}
    trained = train(x, preset="fading", trainer={"log_every_n_steps": 1}, seed=3, run_dir="run", **settings)
    assert trained.run.setting("model.resort_rate") is not None
    assert trained.run.setting("model.objective.aux.coefficient") == 0.5
    assert trained.run.setting("trainer.log_every_n_steps") == 1
    again = train(x, preset="fading", seed=3, run_dir="again", **settings)
    assert torch.equal(trained.sae.W_dec, again.sae.W_dec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9)}, r"x is torch\.float32 \[9\], expected floating-point rows \[rows, d_in\]"),
        ({"x": torch.zeros(9, 2, dtype=torch.int)}, r"x is torch\.int32 \[9, 2\], expected floating-point rows"),
        ({"x": torch.full((900, 3), float("nan"))}, r"tensor has rows with NaN or Inf"),
        ({"batch_tokens": 5000}, r"tensor-tensor-\w+ \(in memory\) has 2850 training rows, fewer than a batch of 5000"),
        ({"val_fraction": 2.0}, r"val_fraction=2, expected a share"),
        ({"val_fraction": 0.0}, r"tensor-tensor-\w+ \(in memory\) has 0 held-out rows, expected at least 2"),
        ({"prefxes": [3]}, r"unknown key model\.prefxes; did you mean model\.prefixes"),
        ({"preset": "fadin"}, r"train\.preset=fadin is none of "),
    ],
)
def test_a_mistake_is_one_line(x, change, message) -> None:
    given = {"x": x, **SMALL, **change}
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        train(given.pop("x"), **given)
    assert not Path("runs").exists()
