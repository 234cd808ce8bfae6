"""SAEs as directories in SAELens's layout: exact round trips, what is refused, and a full disk."""

import copy
import errno
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from msae.sae import MatryoshkaSAE, load_sae, save_sae
from tests.test_model import SPARSITIES, WEIGHTS, make, rows, same


def ready(**options) -> tuple[MatryoshkaSAE, Tensor]:
    options = {"k": 2.5, "dtype": torch.float32} | options
    sae, x = make(8, 32, [4, 8, 32], **options), rows(200, 8, dtype=torch.float32)
    if sae.sparsity == "batch_topk":
        sae.update_threshold(sae.select(sae.pre(x)), 0.01)
    return sae, x


def config_of(directory: Path) -> dict:
    return json.loads((directory / "cfg.json").read_text())


# --- round trips -----------------------------------------------------------------------------------------------


def test_save_and_load_give_the_same_sae(tmp_path) -> None:
    sae, x = ready(scale=0.25)  # a power of two: folding is exact, so every bit must survive
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    loaded = load_sae(save_sae(sae, tmp_path / "sae", {"model_name": "tree", "l0": 2.5}))
    for name, tensor in sae.state_dict().items():
        assert same(tensor, before[name]), f"saving changed {name}"
    assert torch.equal(loaded.encode(x), sae.encode(x) / 0.25)
    for width in sae.prefixes:
        assert torch.equal(loaded(x, width), sae(x, width))
    assert (loaded.prefixes, loaded.k, loaded.training) == ([4, 8, 32], 2.5, False)
    assert loaded.metadata["model_name"] == "tree"

    again = load_sae(save_sae(loaded, tmp_path / "again"))
    for name in (*WEIGHTS, "threshold", "scale"):
        assert torch.equal(getattr(again, name), getattr(loaded, name)), name
    assert again.metadata == loaded.metadata


KINDS = [{}, {"rescale_acts_by_decoder_norm": True}, {"apply_b_dec_to_input": False}, {"d_out": 5}]


RELU = ("standard", "transcoder")
ARCHITECTURE = {"topk": ("topk", "topk_transcoder"), "l1": RELU, "log": RELU}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_what_is_loaded_is_what_was_folded_in_every_bit(sparsity, kind, tmp_path) -> None:
    sae, x = ready(sparsity=sparsity, k=3, **kind)
    with torch.no_grad():
        sae.mean.fill_(0.3)
        for name in ("output_scale", "output_mean"):
            if sae.is_transcoder:
                sae._buffers[name].fill_(0.7)
    sae.prefix_thresholds.copy_(torch.tensor([0.3, math.nan, 0.9]))
    folded = copy.deepcopy(sae)
    folded.fold()
    loaded = load_sae(save_sae(sae, tmp_path))
    for name in (*WEIGHTS, "threshold", "prefix_thresholds", "scale", "mean"):
        assert same(getattr(loaded, name).detach(), getattr(folded, name).detach()), name
    assert torch.equal(loaded.encode(x), folded.encode(x))
    for width in sae.prefixes:
        assert torch.equal(loaded(x, width), folded(x, width))
        torch.testing.assert_close(loaded(x, width), sae(x, width), rtol=1e-4, atol=1e-4)
    assert loaded.options() == folded.options() | {"encoder_bias": True, "bandwidth": 0.001}
    assert (loaded.sparsity, loaded.k, loaded.d_out) == (sparsity, 3, kind.get("d_out", 8))
    config = config_of(tmp_path)
    assert config["metadata"]["msae"]["sparsity"] == sparsity
    assert config["metadata"]["msae"]["prefix_thresholds"][1] is None
    names = ARCHITECTURE.get(sparsity, ("jumprelu", "jumprelu_transcoder"))
    assert config["architecture"] == names[sae.is_transcoder]
    assert ("threshold" in types(tmp_path)) == (sparsity in ("batch_topk", "jumprelu"))


def test_saved_files_are_a_saelens_directory(tmp_path) -> None:
    sae, _ = ready()
    save_sae(sae.to(torch.bfloat16), tmp_path)
    config = config_of(tmp_path)
    assert set(config) == {
        "architecture",
        "d_in",
        "d_sae",
        "dtype",
        "device",
        "apply_b_dec_to_input",
        "normalize_activations",
        "reshape_activations",
        "metadata",
    }
    assert (config["architecture"], config["dtype"], config["normalize_activations"]) == ("jumprelu", "float32", "none")
    assert (config["d_in"], config["d_sae"], config["apply_b_dec_to_input"]) == (8, 32, True)
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert config["metadata"]["training_architecture"] == "matryoshka_batchtopk"
    assert config["metadata"]["training_architecture_details"] == {"k": 2.5, "matryoshka_widths": [4, 8, 32]}
    assert config["metadata"]["msae"] == {"sparsity": "batch_topk", "prefix_thresholds": [None] * 3}
    assert types(tmp_path) == {
        "W_enc": ((8, 32), torch.float32),
        "W_dec": ((32, 8), torch.float32),
        "b_enc": ((32,), torch.float32),
        "b_dec": ((8,), torch.float32),
        "threshold": ((32,), torch.float32),
    }
    assert {p.name for p in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}


def types(directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {n: (tuple(t.shape), t.dtype) for n, t in load_file(directory / "sae_weights.safetensors").items()}


def test_an_sae_in_double_precision_is_saved_in_single(tmp_path) -> None:
    save_sae(ready(dtype=torch.float64)[0], tmp_path)
    assert {dtype for _, dtype in types(tmp_path).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"sparsity": "topk", "k": 3}, {"k": 3, "rescale_acts_by_decoder_norm": False}),
        ({"sparsity": "jumprelu", "d_out": 5}, {"d_out": 5, "apply_b_dec_to_input": False}),
    ],
    ids=["topk", "transcoder"],
)
def test_other_architectures_have_the_keys_of_their_own(options, extra, tmp_path) -> None:
    save_sae(ready(**options)[0], tmp_path)
    config = config_of(tmp_path)
    assert {key: config[key] for key in extra} == extra
    assert config["metadata"]["training_architecture"] == options["sparsity"]


def test_a_relu_sae_with_a_threshold_keeps_it(tmp_path) -> None:
    sae, x = ready(sparsity="l1")
    sae.threshold.fill_(0.5)
    loaded = load_sae(save_sae(sae, tmp_path))
    assert config_of(tmp_path)["architecture"] == "jumprelu"
    assert loaded.sparsity == "l1"
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-5)


def test_rescaling_by_decoder_norms_is_folded_where_nothing_else_is(tmp_path) -> None:
    sae, x = ready(rescale_acts_by_decoder_norm=True, scale=1.0)
    loaded = load_sae(save_sae(sae, tmp_path))
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-4)


def test_a_topk_sae_of_unit_rows_stays_rescaled_where_nothing_is_folded(tmp_path) -> None:
    sae, x = ready(sparsity="topk", k=3, rescale_acts_by_decoder_norm=True, scale=1.0)
    sae.normalise_decoder()
    loaded = load_sae(save_sae(sae, tmp_path))
    assert config_of(tmp_path)["rescale_acts_by_decoder_norm"] is True
    assert all(torch.equal(getattr(loaded, name), getattr(sae, name)) for name in WEIGHTS)
    assert torch.equal(loaded(x), sae(x))


@pytest.mark.parametrize(
    ("hook", "reshape"),
    [("blocks.1.attn.hook_z", "hook_z"), ("blocks.1.hook_resid_pre", "none"), (None, "none")],
)
def test_the_heads_of_hook_z_are_flattened(hook, reshape, tmp_path) -> None:
    sae, _ = ready()
    loaded = load_sae(save_sae(sae, tmp_path, {"hook_name": hook}))
    assert config_of(tmp_path)["reshape_activations"] == reshape
    save_sae(loaded, tmp_path / "again")
    assert config_of(tmp_path / "again")["reshape_activations"] == reshape


def test_metadata_survive_and_ours_is_added(tmp_path) -> None:
    sae, _ = ready()
    sae.metadata = {"hook_name": "a", "msae": {"training": {"lr": 1}}, "training_architecture_details": {"x": 1}}
    save_sae(sae, tmp_path, {"hook_name": "b"})
    metadata = config_of(tmp_path)["metadata"]
    assert metadata["hook_name"] == "b"
    assert metadata["msae"]["training"] == {"lr": 1}
    assert metadata["msae"]["sparsity"] == "batch_topk"
    assert metadata["training_architecture_details"] == {"x": 1, "k": 2.5, "matryoshka_widths": [4, 8, 32]}
    assert sae.metadata["hook_name"] == "a"


def test_a_truncated_sae_can_be_saved(tmp_path) -> None:
    sae, x = ready()
    small = load_sae(save_sae(load_sae(save_sae(sae, tmp_path / "whole")).truncate(8), tmp_path / "small"))
    assert (small.d_sae, small.prefixes) == (8, [4, 8])
    torch.testing.assert_close(small(x), sae(x, 8), rtol=1e-4, atol=1e-5)


# --- what others wrote -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sparsity", "k"),
    [
        (lambda m: m.clear(), "jumprelu", 1),
        (lambda m: (m.clear(), m.update(l0=4.5)), "jumprelu", 4.5),
        (lambda m: m.pop("msae"), "batch_topk", 2.5),
        (lambda m: m["msae"].pop("prefix_thresholds"), "batch_topk", 2.5),
    ],
    ids=["no metadata", "l0", "SAELens's batch_topk", "no thresholds of prefixes"],
)
def test_an_sae_of_others_is_read(change, sparsity, k, tmp_path) -> None:
    sae, x = ready()
    save_sae(sae, tmp_path)
    change_config(lambda c: change(c["metadata"]))(tmp_path)
    loaded = load_sae(tmp_path)
    assert (loaded.sparsity, loaded.k) == (sparsity, k)
    assert loaded.prefixes == ([32] if sparsity == "jumprelu" else [4, 8, 32])  # no widths: one prefix
    assert loaded.prefix_thresholds.isnan().all()
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"d_out": 5}], ids=["standard", "transcoder"])
def test_a_relu_sae_of_others_is_read(options, tmp_path) -> None:
    sae, x = ready(sparsity="l1", **options)
    save_sae(sae, tmp_path)
    change_config(lambda c: c["metadata"].clear())(tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.sparsity == "l1"
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-5)


def test_b_dec_is_subtracted_from_the_input_only_where_it_says_so(tmp_path) -> None:
    sae, x = ready(scale=1.0)
    save_sae(sae, tmp_path)
    change_config(lambda c: c.update(apply_b_dec_to_input=False))(tmp_path)
    torch.testing.assert_close(load_sae(tmp_path).pre(x), x @ sae.W_enc + sae.b_enc)


# --- what is refused -------------------------------------------------------------------------------------------


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        tensors = {k: t.clone() for k, t in load_file(directory / "sae_weights.safetensors").items()}
        change(tensors)
        save_file(tensors, directory / "sae_weights.safetensors")

    return apply


def change_config(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        config = json.loads((directory / "cfg.json").read_text())
        change(config)
        (directory / "cfg.json").write_text(json.dumps(config))

    return apply


DAMAGE = {
    "no cfg": (lambda d: (d / "cfg.json").unlink(), "has no cfg.json; give the sae/ directory"),
    "corrupt cfg": (
        lambda d: (d / "cfg.json").write_text("{"),
        "cfg.json is not the configuration of a Matryoshka SAE",
    ),
    "cfg a list": (
        lambda d: (d / "cfg.json").write_text("[]"),
        "cfg.json is not the configuration of a Matryoshka SAE",
    ),
    "cfg of another SAE": (
        change_config(lambda c: c.pop("metadata")),
        "cfg.json is not the configuration of a Matryoshka SAE",
    ),
    "no weights": (lambda d: (d / "sae_weights.safetensors").unlink(), "sae_weights.safetensors cannot be read"),
    "truncated": (
        lambda d: (d / "sae_weights.safetensors").write_bytes((d / "sae_weights.safetensors").read_bytes()[:-9]),
        "sae_weights.safetensors cannot be read",
    ),
    "empty": (lambda d: (d / "sae_weights.safetensors").write_bytes(b""), "sae_weights.safetensors cannot be read"),
    "wrong shape": (change_tensors(lambda t: t.update(b_dec=torch.zeros(9))), r"'b_dec': \(9,\).*expected.*\(8,\)"),
    "scalar threshold": (change_tensors(lambda t: t.update(threshold=torch.zeros(()))), r"'threshold': \(\)"),
    "extra tensor": (change_tensors(lambda t: t.update(extra=torch.zeros(1))), "'extra'.*expected"),
    "missing tensor": (change_tensors(lambda t: t.pop("b_enc")), "holds.*expected.*'b_enc'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_load_errors_are_one_line(damage, tmp_path) -> None:
    sae, _ = ready()
    save_sae(sae, tmp_path)
    apply, message = DAMAGE[damage]
    apply(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_sae(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


UNCLEAR = {
    "binary cfg": lambda d: (d / "cfg.json").write_bytes(b"\xff\xfe\x00"),
    "impossible k": change_config(lambda c: c["metadata"]["training_architecture_details"].update(k=99)),
    "impossible prefixes": change_config(
        lambda c: c["metadata"]["training_architecture_details"].update(matryoshka_widths=[8, 4])
    ),
    "other architecture": change_config(lambda c: c.update(architecture="gated")),
    "other sparsity": change_config(lambda c: c["metadata"]["msae"].update(sparsity="gated")),
    "a transcoder without a width": change_config(lambda c: c.update(architecture="jumprelu_transcoder")),
    "no inputs": change_config(lambda c: c.pop("apply_b_dec_to_input")),
    "other scale": change_config(lambda c: c.update(normalize_activations="expected_average_only_in")),
}


@pytest.mark.parametrize("damage", UNCLEAR)
def test_load_errors_name_the_file(damage, tmp_path) -> None:
    sae, _ = ready()
    save_sae(sae, tmp_path)
    UNCLEAR[damage](tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "cfg.json"))):
        load_sae(tmp_path)


def test_save_refuses_an_unset_threshold(tmp_path) -> None:
    with pytest.raises(ValueError, match="no threshold"):
        save_sae(make(dtype=torch.float32), tmp_path)


def test_save_on_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch) -> None:
    sae, x = ready()
    expected = load_sae(save_sae(sae, tmp_path))(x)

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("msae.sae.files.save_file", full)
    with pytest.raises(ValueError, match=r"^[^\n]*No space left[^\n]*$"):
        save_sae(sae, tmp_path)
    assert torch.equal(load_sae(tmp_path)(x), expected)


def test_a_topk_transcoder_of_rescaled_activations_comes_back_with_its_codes(tmp_path) -> None:
    """SAELens has no such form that could say `rescaled`: the norms must be in the weights."""
    sae, x = ready(sparsity="topk", k=3, d_out=5, rescale_acts_by_decoder_norm=True, scale=1.0)
    with torch.no_grad():
        sae.normalise_decoder()
        sae.W_dec.mul_(1 + 5e-6)
    sae.scale.fill_(1), sae.target_scale.fill_(1), sae.mean.zero_(), sae.target_mean.zero_()
    loaded = load_sae(save_sae(sae, tmp_path))
    assert not loaded.rescale_acts_by_decoder_norm
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=1e-6, atol=0)
    assert (
        "rescale_acts_by_decoder_norm" not in config_of(tmp_path)
        or not config_of(tmp_path)["rescale_acts_by_decoder_norm"]
    )
