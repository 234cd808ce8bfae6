"""The published recipes as presets: each composes with every experiment, trains, exports, resumes bit for bit."""

import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from msae import train
from msae.cli.command import compose, config_dir
from msae.runs import Run, flat
from tests.commands import ENVIRONMENT, SHORT, TREE, metrics_of
from tests.training import adam_state, differing

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
FILES = {path.stem: path for path in sorted((config_dir("conf") / "preset").glob("*.yaml"))}
presets = pytest.mark.parametrize("preset", FILES)


@presets
@pytest.mark.parametrize("experiment", [[], ["+experiment=gpt2_l8"]])
def test_a_preset_beats_model_and_experiment_and_loses_to_the_command_line(preset, experiment):
    of_preset = flat(OmegaConf.to_container(OmegaConf.load(FILES[preset])))
    for order in ([f"preset={preset}", *experiment], [*experiment, f"preset={preset}"]):
        composed = flat(OmegaConf.to_container(compose("train", order)))
        assert {key: composed[key] for key in of_preset} == of_preset
    assert compose("train", [*experiment, f"preset={preset}", "model.lr=0.5"]).model.lr == 0.5
    if experiment:
        assert (composed["model.d_sae"], composed["model.k"]) == (24576, 32)


def test_the_experiment_alone_is_the_papers_recipe():
    model = compose("train", ["+experiment=gpt2_l8"]).model
    assert (model.lr, model.schedule.warmup_steps, model.schedule.decay_start) == (3e-4, 1000, 0.8)


@presets
def test_a_preset_trains_exports_and_resumes_bit_for_bit(preset, done):
    command = [*TREE, *SHORT, "checkpoint_every_steps=15", f"preset={preset}", "run_dir=run"]
    done(train, *command)
    run, metrics = Run("run"), metrics_of("run")
    width = max(int(key.split("/p")[1]) for key in metrics if key.startswith("val/fvu/p"))
    assert 0 < metrics[f"val/l0/p{width}"] < 32
    sae, state = run.load_sae(), torch.load(run.last_checkpoint, weights_only=True)
    assert sae.metadata["msae"]["training"]["lr"] == compose("train", [f"preset={preset}"]).model.lr
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32), rtol=1e-5, atol=0)

    earlier = min(run.checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert torch.load(earlier, weights_only=True)["global_step"] < state["global_step"]
    done(train, *command, f"ckpt_path={earlier}")
    assert differing(dict(run.load_sae().state_dict()), dict(sae.state_dict())) == []
    resumed = torch.load(run.last_checkpoint, weights_only=True)
    assert differing(resumed["state_dict"], state["state_dict"]) == []
    assert differing(*(adam_state(saved["optimizer_states"][0]) for saved in (resumed, state))) == []


TWO_RANKS = """
import os, sys, warnings
import torch
from torch.utils.data import DataLoader
from msae.cli.command import compose, plain
from tests.training import module_of, trainer_of

warnings.simplefilter("ignore")
recipe = plain(compose("train", [f"preset={sys.argv[2]}"]).model)
module = module_of(**recipe | {"d_in": 8, "d_sae": 24, "prefixes": [4, 24], "k": 3})
rank = int(os.environ.get("LOCAL_RANK", 0))
data = list(torch.randn(12, 32, 8, generator=torch.Generator().manual_seed(rank)) * (1 + rank))
first_batch = torch.randn(64, 8, generator=torch.Generator().manual_seed(9))
module.step().start_from((torch.zeros(8), 20.0), first_batch=first_batch)
trainer_of(12, devices=2, strategy="ddp").fit(module, DataLoader(data, batch_size=None))
torch.save(module.state_dict(), os.path.join(sys.argv[1], f"rank{rank}.pt"))
"""


@pytest.mark.parametrize("preset", ["nabeshima", "bussmann"])
def test_two_ranks_with_other_batches_keep_one_sae(preset, tmp_path):
    (tmp_path / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), preset]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    of_each = ["steps.0.sae.threshold", "steps.0.sae.threshold_ema"]  # BatchTopK selects on each device
    assert differing(a, b) == (of_each if preset == "bussmann" else [])
