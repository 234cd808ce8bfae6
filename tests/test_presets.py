"""The published recipes as presets: each composes with every experiment, trains, exports, resumes bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from msae import train
from msae.config import compose, config_dir
from msae.sae import load_sae

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
PRESETS = sorted(path.stem for path in (config_dir("conf") / "preset").glob("*.yaml"))
SHORT = [
    *("data.source.rows=4000", "data.source.val_rows=1000", "data.source.chunk_rows=2000", "data.batch_tokens=128"),
    *("tokens=5000", "checkpoint_every_steps=15", "trainer.log_every_n_steps=5", "trainer.val_check_interval=10"),
]


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Path:
    """One run of the command in this process; its run directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["msae.train", *SHORT, *arguments])
    train.main()
    return tmp_path / "run"


def flat(node, path: str = ""):
    if not isinstance(node, dict):
        return {path[1:]: node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{path}.{key}").items()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("experiment", [[], ["+experiment=gpt2_l8"]])
def test_a_preset_beats_model_and_experiment_and_loses_to_the_command_line(preset, experiment):
    wanted = flat(OmegaConf.to_container(OmegaConf.load(config_dir("conf") / "preset" / f"{preset}.yaml")))
    for order in (["preset=" + preset, *experiment], [*experiment, "preset=" + preset]):
        found = flat(OmegaConf.to_container(compose("train", order)))
        assert {key: found[key] for key in wanted} == wanted
    assert compose("train", [*experiment, f"preset={preset}", "model.lr=0.5"]).model.lr == 0.5
    if experiment:
        assert found["model.d_sae"] == 24576
        assert found["model.k"] == 32


def test_the_experiment_alone_is_the_papers_recipe():
    model = compose("train", ["+experiment=gpt2_l8"]).model
    assert (model.lr, model.warmup_steps, model.decay_start) == (3e-4, 1000, 0.8)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_exports_and_resumes_bit_for_bit(preset, tmp_path, monkeypatch):
    directory = run(tmp_path, monkeypatch, f"preset={preset}", "run_dir=run")
    metrics = json.loads((directory / "metrics.json").read_text())
    width = max(int(key.split("/p")[1]) for key in metrics if key.startswith("val/fvu/p"))
    assert 0 < metrics[f"val/l0/p{width}"] < 32
    first, state = load_sae(directory / "sae"), torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    assert first.metadata["msae"]["training"]["lr"] == compose("train", [f"preset={preset}"]).model.lr
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(32), rtol=1e-5, atol=0)

    earlier = sorted((directory / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime)[0]
    assert torch.load(earlier, weights_only=True)["global_step"] < state["global_step"]
    run(tmp_path, monkeypatch, f"preset={preset}", "run_dir=run", f"ckpt_path={earlier}")
    again, state_again = (
        load_sae(directory / "sae"),
        torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True),
    )
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
    for name, tensor in state["state_dict"].items():
        torch.testing.assert_close(state_again["state_dict"][name], tensor, rtol=0, atol=0, equal_nan=True)
    for index, moments in state["optimizer_states"][0]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(state_again["optimizer_states"][0]["state"][index][name], tensor)


def test_a_mistyped_preset_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="did you mean preset=bussmann"):
        run(tmp_path, monkeypatch, "preset=busmann")


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        (
            "model.aux.coeficient=1",
            r"^error: unknown key model\.aux\.coeficient; did you mean model\.aux\.coefficient\?$",
        ),
        ("model.aux.k=0", r"^error: model\.aux\.k=0 must be at least 1$"),
        ("model.sparsity=batchtopk", r"^error: model\.sparsity is 'batchtopk', expected [^\n]*'batch_topk'[^\n]*$"),
        ("model.reduction=[1,2]", r"^error: model\.reduction has 2 weights for 3 levels; [^\n]*$"),
        ("model.sparsity_weight=-1", r"^error: model\.sparsity_weight=-1 must not be negative$"),
        ("model.orthogonality=-0.1", r"^error: model\.orthogonality=-0\.1 must not be negative$"),
        ("model.balance=-1", r"^error: model\.balance=-1 must not be negative[^\n]*$"),
        ("model.sparsity=topk", r"^error: model\.k=1\.25 must be whole with model\.sparsity=topk[^\n]*$"),
        ("model.decoder_init_norm=0.1", r"^error: model\.decoder_init_norm=0\.1 needs model\.decoder=[^\n]*$"),
        ("model.d_out=7", r"^error: model\.d_out=7 is of a transcoder; [^\n]*target_hook_name[^\n]*$"),
        ("model.n_prefixes=0 model.prefix_sampling=random", r"^error: model\.n_prefixes=0 must lie between [^\n]*$"),
        ("model.prefix_sampling=every model.stop_gradient=true", r"^error: model\.prefix_sampling=every [^\n]*$"),
    ],
)
def test_a_mistake_in_the_objective_is_one_line(mistake, line, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=line):
        run(tmp_path, monkeypatch, *mistake.split())


TWO_RANKS = """
import os, sys, warnings
import lightning as L, torch
from hydra.utils import instantiate
from torch.utils.data import DataLoader
from msae.config import compose

warnings.simplefilter("ignore")

class Save(L.Callback):
    def on_train_end(self, trainer, module):
        torch.save(module.state_dict(), os.path.join(sys.argv[1], f"rank{trainer.global_rank}.pt"))

module = instantiate(compose("train", [f"preset={sys.argv[2]}"]).model, d_in=8, d_sae=24, prefixes=[4, 24], k=3)
rank = int(os.environ.get("LOCAL_RANK", 0))
data = list(torch.randn(12, 32, 8, generator=torch.Generator().manual_seed(rank)) * (1 + rank))
module.start_from((torch.zeros(8), 20.0), first_batch=torch.randn(64, 8, generator=torch.Generator().manual_seed(9)))
L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=12, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[Save()],
).fit(module, DataLoader(data, batch_size=None))
"""


@pytest.mark.parametrize("preset", ["nabeshima", "bussmann"])
def test_two_ranks_with_other_batches_keep_one_sae(preset, tmp_path):
    (tmp_path / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), preset]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    own = {"sae.threshold", "sae.threshold_ema"} if preset == "bussmann" else set()  # BatchTopK selects on each device
    assert a.keys() == b.keys()
    for name in a.keys() - own:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=name)
