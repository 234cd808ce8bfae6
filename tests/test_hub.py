"""Pushing to and pulling from a Hub that is a folder here."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from msae.interop import hub
from msae.sae import MatryoshkaSAE
from tests.test_interop import one_line

REPO, FILES = "someone/saes", {"cfg.json", "sae_weights.safetensors"}
METRICS = {
    **{"val/fvu/p4": 0.5, "val/fvu/p16": 0.25, "val/l0/p4": 1.0, "val/l0/p16": 2.0125, "val/dead/p4": 0.0},
    **{"val/dead/p16": 3.0, "val/ce_score/p4": 0.625, "val/ce_score/p16": 0.875, "val/ce/orig": 3.5, "seconds": 9.0},
}


class FolderApi:
    """What is used of HfApi, with a folder for a Hub; `log` says what was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        (self.root / "log").write_text(f"private={private}")

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return (self.root / repo_id / filename).exists()

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        snapshot = self.root / "cache" / repo_id / (revision or "main")
        for pattern in allow_patterns:
            for file in (self.root / repo_id).glob(pattern):
                target = snapshot / file.relative_to(self.root / repo_id)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        return str(snapshot)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(hub, "HfApi", partial(FolderApi, tmp_path))
    return tmp_path


@pytest.fixture
def sae() -> MatryoshkaSAE:
    sae = MatryoshkaSAE(8, 16, [4, 16], 2.5)
    sae.threshold.fill_(0.1)
    training = {"lr": 3e-4, "objective": {"aux": {"k": None}, "terms": {}}, "strange": "a|b\n<c>"}
    sae.metadata = {
        **{"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre", "dataset_path": "HuggingFaceFW/fineweb"},
        **{"training_architecture_details": {"topk_threshold_lr": 0.01}, "msae": {"training": training}},
    }
    return sae.eval()


def test_what_is_pushed_is_what_is_pulled(root, sae):
    runner = {"name": "tree", "tokens": 5}
    address = hub.push(sae, REPO, "layer_8/width_16", runner, METRICS, private=True)
    assert address == f"https://huggingface.co/{REPO}/tree/main/layer_8/width_16"
    folder = root / REPO / "layer_8/width_16"
    assert {p.name for p in folder.iterdir()} == {*FILES, "runner_cfg.json", "README.md"}
    assert json.loads((folder / "runner_cfg.json").read_text()) == runner
    assert (root / "log").read_text() == "private=True"

    pulled = hub.pull(REPO, "layer_8/width_16", revision="v1")
    x = torch.randn(5, 8)
    assert torch.equal(pulled(x, 4), sae(x, 4))
    assert pulled.prefixes == [4, 16]
    snapshot = root / "cache" / REPO / "v1/layer_8/width_16"
    assert {p.name for p in snapshot.iterdir()} == FILES  # and nothing else


def test_the_card_tells_what_users_ask_for(root, sae):
    hub.push(sae, REPO, "blocks.8.hook_resid_pre", metrics=METRICS)
    text = (root / REPO / "blocks.8.hook_resid_pre/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert front.splitlines()[:2] == ["library_name: saelens", "tags:"]
    rows = """
        | model | gpt2 |
        | hook | blocks.8.hook_resid_pre |
        | dataset | HuggingFaceFW/fineweb |
        | d_in | 8 |
        | d_sae | 16 |
        | prefixes | [4, 16] |
        | sparsity | batch_topk |
        | k | 2.5 |
        | L0 | 2.013 |
        | prefix | fvu | l0 | dead | ce_score |
        | 4 | 0.5 | 1 | 0 | 0.625 |
        | 16 | 0.25 | 2.013 | 3 | 0.875 |
        | lr | 0.0003 |
        | topk_threshold_lr | 0.01 |
        | objective.aux.k |  |
        | objective.terms | {} |
        | strange | a\\|b &lt;c> |"""
    for row in rows.split("\n")[1:]:
        assert row.strip() in body.splitlines()
    assert "d_out" not in body
    assert f'SAE.from_pretrained("{REPO}", "blocks.8.hook_resid_pre")' in body
    assert f'pull("{REPO}", "blocks.8.hook_resid_pre")' in body
    hub.push(sae, REPO, "bare")
    assert "Figures" not in (root / REPO / "bare/README.md").read_text()


def test_the_readme_of_a_repo_is_left_alone(root, sae):
    hub.push(sae, REPO, "a")
    assert (root / REPO / "README.md").read_text() == (root / REPO / "a/README.md").read_text()
    (root / REPO / "README.md").write_text("mine")
    hub.push(sae, REPO, "b")
    assert (root / REPO / "README.md").read_text() == "mine"
    assert (root / REPO / "b/README.md").exists()


@pytest.mark.parametrize(
    "sae_id", ["", ".", "..", "../a", "a/../../b", "/etc", "a//b", "a/", "a\\b", "*", "a b", "a\n"]
)
def test_an_sae_id_stays_inside_the_repo(sae_id, root, sae):
    for call in (partial(hub.push, sae), hub.pull):
        one_line(call, REPO, sae_id, match="^sae_id=.* is not a folder inside the repo; use letters")
    assert not (root / REPO).exists()


def test_references():
    assert hub.split_reference("user/repo/a/b") == ("user/repo", "a/b")
    assert hub.split_reference("user/repo") == ("user/repo", "")
    for wrong in ("", "user", "/repo/a", "user/"):
        one_line(hub.split_reference, wrong, match="expected user/repo/sae_id")


def test_what_is_not_there_is_one_line(root):
    one_line(hub.pull, REPO, "a", "v1", match=f"^{REPO} at revision v1 has no SAE a; see the folders at https://")


def test_a_hub_that_cannot_be_reached_is_one_line(sae, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9"))
    for call in (partial(hub.push, sae), hub.pull):
        one_line(call, REPO, "a", match="^cannot (push|pull).*the Hub cannot be reached from here")
        one_line(call, "no such repo", "a", match="^cannot (push|pull).*[Rr]epo id must")


class Refusal(OSError):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status} Client Error.\n\nmany\nlines")
        self.response = type("Response", (), {"status_code": status})


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "hf auth login"), (403, "hf auth login"), (404, "check the name and the revision")]
)
def test_a_hub_that_refuses_is_one_line(status, hint, sae, root, monkeypatch):
    def refuse(*_, **__) -> None:
        raise Refusal(status)

    monkeypatch.setattr(FolderApi, "create_repo", refuse)
    monkeypatch.setattr(FolderApi, "snapshot_download", refuse)
    for call in (partial(hub.push, sae), hub.pull):
        one_line(call, REPO, "a", match=f"^cannot .*{status} Client Error; .*{hint}")
