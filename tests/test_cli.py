"""The command lines as a user runs them: from nothing to sae/, killed and resumed, and what they say to mistakes."""

import re
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msae import harvest, train
from msae.cli.command import compose, config_dir
from msae.data.shards import Shards
from msae.sae import load_sae
from tests.commands import SHORT, TREE, metrics_of, only_run, same_weights, start, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def test_the_default_leaves_everything_a_user_wants(done):
    out, _ = done(train, *TREE, *SHORT)
    run = only_run()
    metrics = metrics_of(run)
    prefixes = [4, 12, 32]
    wanted = {f"val/{name}/p{w}" for name in ("mse", "fvu", "l0", "dead") for w in prefixes}
    wanted |= {f"truth/{n}" for n in ("mcc", "firing_f1", "parent_silent_given_child", "cos_child_parent")}
    assert wanted | {"train/k"} <= metrics.keys()
    assert "held-out" in out
    assert "parent_silent_given_child" in out
    assert f"{metrics['val/fvu/p32']:.4g}" in out
    assert abs(metrics["val/l0/p32"] / metrics["train/k"] - 1) < 0.3  # few rows, few distinct values

    sae = load_sae(run / "sae")
    shards = Shards(next(Path("shards").iterdir()))
    x = shards.activations("val", 0)[500:]
    error = (x - sae(x)).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert float(error) == pytest.approx(metrics["val/fvu/p32"], rel=1e-4)
    assert sae.metadata["hook_name"] == "synthetic"

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert "train/fvu/p32" in events.Tags()["scalars"]
    for key, value in metrics.items():
        assert events.Scalars(f"final/{key}")[-1].value == pytest.approx(value)
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert (run / "truth.png").stat().st_size > 10_000
    assert "truth" in events.Tags()["images"]


def test_a_run_is_reproducible_from_its_own_config(done):
    done(train, *TREE, *SHORT, "seed=3")
    first = only_run()
    done(train, "-cp", str(first.resolve()), "-cn", "config", "run_dir=again")
    same_weights(first, Path("again"))


def test_the_language_model_job_from_text_to_sae(done, lm):
    out, err = done(train, *lm)
    run = only_run()
    metrics = metrics_of(run)
    assert {f"val/ce_score/p{w}" for w in (4, 8, 16, 32, 64)} <= metrics.keys()
    assert metrics["val/ce/orig"] > 0
    assert "ce_score" in out
    assert "harvest: up to" in err
    assert metrics["val/l0/p64"] == pytest.approx(metrics["train/k"], rel=0.15)  # ~500 rows
    sae = load_sae(run / "sae")
    assert sae.metadata["hook_name"] == "blocks.1.hook_resid_pre"
    assert sae.metadata["context_size"] == 32
    assert sae.metadata["prepend_bos"] is True
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)

    _, err = done(train, *lm, "seed=1", "data.source.seed=0")
    assert "harvest" not in err  # the same identity: the shards were there
    assert len(list(Path("shards").iterdir())) == 1


def test_harvest_alone_several_hooks_and_verify(done, refused, lm):
    out, _ = done(harvest, *lm, "data.source.hook_names=[blocks.0.hook_mlp_out,blocks.1.attn.hook_z]")
    assert "blocks.0.hook_mlp_out:" in out
    directories = sorted(Path("shards").iterdir())
    assert len(directories) == 2
    out, _ = done(harvest, f"verify={directories[0]}")
    assert re.fullmatch(rf"{directories[0]}: \d+ shards, every checksum right\n", out)
    shard = directories[0] / "train-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    assert refused(harvest, f"verify={directories[0]}").startswith(f"error: {shard} differs from what was harvested")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(done, signum):
    arguments = [*TREE, *SHORT, "tokens=100_000", "trainer.val_check_interval=200"]
    done(train, *arguments, "run_dir=whole")
    with start(*arguments) as process:
        wait_for("runs/*/checkpoints/last.ckpt", process)
        process.send_signal(signum)
        error = process.stderr.read() if process.stderr else ""
    run = only_run()
    assert not (run / "sae").exists(), "the run was not killed in time"
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    if signum == signal.SIGINT:
        assert "Traceback" not in error
        assert "stopped by SIGINT after step" in error
        assert f"run_dir={run} ckpt_path=last" in error
    done(train, *arguments, "ckpt_path=last")
    same_weights(Path("whole"), only_run())


MISTAKES = {
    "no run to resume": (["ckpt_path=last"], "ckpt_path=last: no run of tree under runs/"),
    "not a run": (["ckpt_path=nowhere"], "ckpt_path: nowhere is not a run directory"),
    "d_in": (["model.d_in=768"], "has d_in=20, the model expects 768"),
    "a batch too large": (["data.batch_tokens=8192"], "has 4000 training rows, fewer than a batch of 8192"),
    "disk cap": (["data.max_disk_gb=0.0001", "data.root=other"], "data.max_disk_gb allows 0.0001"),
    "root is a file": (["data.root=file"], "cannot write to file"),
    "no tokens": (["tokens=0"], "tokens=0"),
    "no transcoder": (["model.d_out=7"], "is of a transcoder; name what it reconstructs with data.target_hook_name=…"),
    "one held-out row": (["data.source.val_rows=1"], "has 1 held-out rows, expected at least 2"),
    "hub model while offline": (["+experiment=gpt2_l8", "data.source.text=file.txt"], "data.source.model="),
    "kernels that cannot run": (["model.kernels=triton", "data.root=unmade"], "needs the package triton"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_run(refused, mistake, monkeypatch):
    arguments, expected = MISTAKES[mistake]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("msae.sae.fast.triton.library", lambda: None)
    Path("file").write_text("text")
    Path("file.txt").write_text("text")
    assert expected in refused(train, *([] if "+experiment=gpt2_l8" in arguments else TREE), *arguments)
    assert not Path("runs").exists()
    assert not Path("unmade").exists()


def test_resuming_with_other_settings_is_refused(done, refused):
    done(train, *TREE, *SHORT)
    done(train, *TREE, *SHORT, "name=tree-other")  # newer, but of another name
    run = next(Path("runs").glob("tree-2*"))
    for change in ("model.d_sae=64", "model=vanilla", "tokens=20_000", "trainer.accumulate_grad_batches=2"):
        assert f"{run} was started with " in refused(train, *TREE, *SHORT, change, "ckpt_path=last")
    _, err = done(train, *TREE, *SHORT, "ckpt_path=last", "evaluation.calibration_tokens=300")
    assert f"run: {run}" in err  # a finished run is evaluated again


def test_a_checkpoint_that_is_named_is_the_one_resumed(done, refused):
    done(train, *TREE, *SHORT)
    best, last = (only_run() / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    last.write_bytes(b"not needed")
    _, err = done(train, *TREE, *SHORT, f"ckpt_path={best}")
    assert "cannot be read" not in err
    last.write_bytes(b"not readable")
    assert f"ckpt_path: {last} cannot be read" in refused(train, *TREE, *SHORT, f"ckpt_path={last}")


def test_a_run_shorter_than_the_checkpoint_interval_leaves_one(done):
    arguments = [*TREE, "tokens=2000", "checkpoint_every_steps=1000"]
    done(train, *arguments)
    first = metrics_of(only_run())
    (only_run() / "metrics.json").unlink()
    done(train, *arguments, "ckpt_path=last")
    assert metrics_of(only_run()).keys() == first.keys()


def test_diverging_is_said_and_keeps_the_last_good_checkpoint(refused):
    assert "training diverged by step" in refused(train, *TREE, *SHORT, "model.lr=1e30", "trainer.log_every_n_steps=1")
    assert not (only_run() / "sae").exists()


def test_a_hook_that_can_only_be_read_is_evaluated_without_cross_entropy(done, lm):
    done(train, *lm, "data.source.hook_names=[blocks.1.hook_resid_mid]")
    metrics = metrics_of(only_run())
    assert "val/fvu/p64" in metrics
    assert "val/ce/orig" not in metrics


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_accelerator_that_is_not_there_is_one_line(refused):
    assert "gpu" in refused(train, *TREE, *SHORT, "trainer.accelerator=gpu")


def test_an_unreadable_shard_is_named_before_training(done, refused):
    done(train, *TREE, *SHORT)
    shard = next(Path("shards").glob("*/train-00001.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    done(train, *TREE, *SHORT)  # its chunk is made again, as harvesting goes on where something is missing
    extra = shard.with_name("train-00009.safetensors")
    extra.write_bytes(shard.read_bytes())
    assert f"{extra} is not in the manifest" in refused(train, *TREE, *SHORT).replace(str(Path.cwd()) + "/", "")


def test_stopping_when_the_data_is_exhausted(done):
    done(train, *TREE, *SHORT, "tokens=1_000_000", "data.exhausted=stop")
    assert metrics_of(only_run())["train/tokens"] == 31 * 128  # 4000 rows


def test_two_processes_share_one_run(call):
    arguments = [*TREE, "tokens=4096", "trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    with start(*arguments) as process:
        error = process.stderr.read() if process.stderr else ""
    assert process.returncode == 0, error
    metrics = metrics_of(only_run())
    assert metrics["train/tokens"] == 4096  # 16 steps of 2 × 128


ALL = [[f"model={path.stem}"] for path in sorted(config_dir("conf").glob("model/*.yaml"))]
ALL += [[f"+experiment={path.stem}"] for path in sorted(config_dir("conf").glob("experiment/*.yaml"))]
ALL += [[f"+sweeps={path.stem}"] for path in sorted(config_dir("sweeps").glob("*.yaml"))]


@pytest.mark.parametrize("overrides", ALL, ids=lambda o: o[0])
def test_every_real_config_composes_and_trains_two_steps(done, lm, overrides):
    compose("train", overrides)
    small = lm[1:] if overrides[0].startswith("+experiment=gpt2") else TREE
    if overrides[0] == "+experiment=forest_16k":  # 700 features: evaluating 16,384 takes a minute
        small = [*TREE, "model.d_sae=64", "model.prefixes=[16,64]", "data.source.trees=8", "data.source.independent=20"]
    if overrides[0].startswith("+sweeps"):
        sweep = OmegaConf.load(config_dir("sweeps") / f"{overrides[0].partition('=')[2]}.yaml")
        first = {key: str(value).split(",")[0] for key, value in sweep.hydra.sweeper.params.items()}
        overrides = [f"{key}={value}" for key, value in first.items()]
    done(train, *overrides, *small, "tokens=256")
    assert metrics_of(only_run())["train/tokens"] == 256
