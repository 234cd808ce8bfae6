"""SAEs as directories in SAELens's layout: exact round trips, what is refused, and a full disk."""

import copy
import errno
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from msae.sae import MatryoshkaSAE, fold, load_sae, save_sae
from msae.sae.files import CONFIG
from msae.sae.files import WEIGHTS as TENSORS
from msae.sae.sparsity import sparsity_as_plain
from tests.test_model import WEIGHTS, changed, every_sparsity, make, rows, same, state


def ready(**options) -> tuple[MatryoshkaSAE, Tensor]:
    options = {"k": 2.5, "dtype": torch.float32} | options
    sae, x = make(8, 32, [4, 8, 32], **options), rows(200, 8, dtype=torch.float32)
    if sae.sparsity.threshold_is == "calibrated":
        sae.update_threshold(sae.select(sae.pre(x)), 0.01)
    return sae, x


def config_of(directory: Path) -> dict:
    return json.loads((directory / CONFIG).read_text())


def types(directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {n: (tuple(t.shape), t.dtype) for n, t in load_file(directory / TENSORS).items()}


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- round trips ------------------------------------------------------------------------------------------------------


KINDS = [{}, {"rescale_acts_by_decoder_norm": True}, {"apply_b_dec_to_input": False}, {"d_out": 5}]
RELU, JUMPRELU = ("standard", "transcoder"), ("jumprelu", "jumprelu_transcoder")
ARCHITECTURE = {"topk": ("topk", "topk_transcoder"), "l1": RELU, "log": RELU}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@every_sparsity
def test_what_is_loaded_is_what_was_folded_in_every_bit(sparsity, kind, tmp_path) -> None:
    sae, x = ready(sparsity=sparsity, k=3, **kind)
    with torch.no_grad():
        sae.mean.fill_(0.3)
        if sae.is_transcoder:
            sae.target_scale.fill_(0.7), sae.target_mean.fill_(0.7)
    sae.prefix_thresholds.copy_(torch.tensor([0.3, math.nan, 0.9]))
    folded, before = copy.deepcopy(sae), state(sae)
    fold(folded)
    loaded = load_sae(save_sae(sae, tmp_path, {"model_name": "tree"}))
    assert changed(sae, before) == []
    for name in (*WEIGHTS, "threshold", "prefix_thresholds", "scale", "mean"):
        assert same(getattr(loaded, name).detach(), getattr(folded, name).detach()), name
    assert torch.equal(loaded.encode(x), folded.encode(x))
    for width in sae.prefixes:
        assert torch.equal(loaded(x, width), folded(x, width))
        assert_close(loaded(x, width), sae(x, width))
    assert loaded.options() == folded.options() | {"encoder_bias": True}
    assert (loaded.prefixes, loaded.k, loaded.d_out, loaded.training) == ([4, 8, 32], 3, kind.get("d_out", 8), False)
    assert loaded.metadata["model_name"] == "tree"
    again = load_sae(save_sae(loaded, tmp_path / "again"))
    assert changed(again, state(loaded)) == []
    assert again.metadata == loaded.metadata
    config = config_of(tmp_path)
    assert config["metadata"]["msae"]["sparsity"] == sparsity_as_plain(sae.sparsity)
    assert config["metadata"]["msae"]["prefix_thresholds"][1] is None
    assert config["architecture"] == ARCHITECTURE.get(sparsity, JUMPRELU)[sae.is_transcoder]
    assert ("threshold" in types(tmp_path)) == (sparsity not in ARCHITECTURE)
    trained_as = {"batch_topk": "matryoshka_batchtopk", "l1": "standard", "log": "standard"}.get(sparsity, sparsity)
    assert config["metadata"]["training_architecture"] == trained_as
    own = {"d_out": 5, "apply_b_dec_to_input": False} if sae.is_transcoder else {}
    own |= {"k": 3, "rescale_acts_by_decoder_norm": False} if sparsity == "topk" else {}
    assert own.items() <= config.items()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_saved_files_are_a_saelens_directory_in_single_precision(dtype, tmp_path) -> None:
    sae, _ = ready()
    save_sae(sae.to(dtype), tmp_path)
    config = config_of(tmp_path)
    assert int(config["metadata"].pop("sae_lens_version").split(".")[0]) >= 6
    assert config == {
        "architecture": "jumprelu",
        "d_in": 8,
        "d_sae": 32,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "training_architecture": "matryoshka_batchtopk",
            "training_architecture_details": {"k": 2.5, "matryoshka_widths": [4, 8, 32]},
            "msae": {"sparsity": "batch_topk", "prefix_thresholds": [None] * 3},
        },
    }
    shapes = {"W_enc": (8, 32), "W_dec": (32, 8), "b_enc": (32,), "b_dec": (8,), "threshold": (32,)}
    assert types(tmp_path) == {name: (shape, torch.float32) for name, shape in shapes.items()}
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, TENSORS}


def test_a_relu_sae_with_a_threshold_keeps_it(tmp_path) -> None:
    sae, x = ready(sparsity="l1")
    sae.threshold.fill_(0.5)
    loaded = load_sae(save_sae(sae, tmp_path))
    assert config_of(tmp_path)["architecture"] == "jumprelu"
    assert loaded.sparsity.name == "l1"
    assert_close(loaded(x), sae(x))


TOPK = {"sparsity": "topk", "k": 3}


@pytest.mark.parametrize(
    ("options", "norm", "is_kept"),
    [({}, 1 + 5e-6, False), (TOPK, 1 + 5e-6, True), (TOPK, 2.0, False), (TOPK | {"d_out": 5}, 1 + 5e-6, False)],
    ids=str,
)
def test_rescaling_by_norms_is_folded_unless_they_are_1_and_the_file_can_say_so(
    options, norm, is_kept, tmp_path
) -> None:
    """SAELens's topk can be rescaled, its transcoder cannot: there the norms, nearly 1, must be in the weights."""
    sae, x = ready(rescale_acts_by_decoder_norm=True, scale=1.0, **options)
    sae.normalise_decoder()
    with torch.no_grad():
        sae.W_dec.mul_(norm)
    loaded = load_sae(save_sae(sae, tmp_path))
    assert loaded.rescale_acts_by_decoder_norm == is_kept
    assert config_of(tmp_path).get("rescale_acts_by_decoder_norm", False) == is_kept
    assert is_kept == all(torch.equal(getattr(loaded, name), getattr(sae, name)) for name in WEIGHTS)
    if not is_kept:
        torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(32), rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hook", "reshape"),
    [("blocks.1.attn.hook_z", "hook_z"), ("blocks.1.hook_resid_pre", "none"), (None, "none")],
)
def test_the_heads_of_hook_z_are_flattened(hook, reshape, tmp_path) -> None:
    sae, _ = ready()
    loaded = load_sae(save_sae(sae, tmp_path, {"hook_name": hook}))
    for directory in (tmp_path, save_sae(loaded, tmp_path / "again")):
        assert config_of(directory)["reshape_activations"] == reshape


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


# --- what others wrote ------------------------------------------------------------------------------------------------


def change_config(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        config = config_of(directory)
        change(config)
        (directory / CONFIG).write_text(json.dumps(config))

    return apply


@pytest.mark.parametrize(
    ("options", "change", "sparsity", "k"),
    [
        ({}, lambda m: m.clear(), "jumprelu", 1),
        ({}, lambda m: (m.clear(), m.update(l0=4.5)), "jumprelu", 4.5),
        ({}, lambda m: m.pop("msae"), "batch_topk", 2.5),
        ({}, lambda m: m["msae"].pop("prefix_thresholds"), "batch_topk", 2.5),
        ({"sparsity": "l1"}, lambda m: m.clear(), "l1", 1),
        ({"sparsity": "l1", "d_out": 5}, lambda m: m.clear(), "l1", 1),
    ],
    ids=["no metadata", "l0", "SAELens's batch_topk", "no thresholds of prefixes", "standard", "transcoder"],
)
def test_an_sae_of_others_is_read(options, change, sparsity, k, tmp_path) -> None:
    sae, x = ready(**options)
    save_sae(sae, tmp_path)
    change_config(lambda c: change(c["metadata"]))(tmp_path)
    loaded = load_sae(tmp_path)
    assert (loaded.sparsity.name, loaded.k) == (sparsity, k)
    assert loaded.prefixes == ([4, 8, 32] if sparsity == "batch_topk" else [32])  # no widths: one prefix
    assert loaded.prefix_thresholds.isnan().all()
    assert_close(loaded(x), sae(x))


# --- what is refused --------------------------------------------------------------------------------------------------


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        tensors = {k: t.clone() for k, t in load_file(directory / TENSORS).items()}
        change(tensors)
        save_file(tensors, directory / TENSORS)

    return apply


def change_details(**details) -> Callable[[Path], object]:
    return change_config(lambda c: c["metadata"]["training_architecture_details"].update(details))


NOT_OURS = r"cfg\.json is not the configuration of a Matryoshka SAE"
UNREADABLE = r"sae_weights\.safetensors cannot be read"
DAMAGE = {
    "no cfg": (lambda d: (d / CONFIG).unlink(), r"has no cfg\.json; give the sae/ directory"),
    "corrupt cfg": (lambda d: (d / CONFIG).write_text("{"), NOT_OURS),
    "cfg a list": (lambda d: (d / CONFIG).write_text("[]"), NOT_OURS),
    "binary cfg": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\x00"), NOT_OURS),
    "cfg of another SAE": (change_config(lambda c: c.pop("metadata")), NOT_OURS),
    "impossible k": (change_details(k=99), f"{NOT_OURS}: model.k=99"),
    "impossible prefixes": (change_details(matryoshka_widths=[8, 4]), f"{NOT_OURS}: model.prefixes"),
    "other architecture": (change_config(lambda c: c.update(architecture="gated")), f"{NOT_OURS}: .*gated.*expected"),
    "other sparsity": (change_config(lambda c: c["metadata"]["msae"].update(sparsity="gated")), f"{NOT_OURS}: .*gated"),
    "a transcoder without a width": (change_config(lambda c: c.update(architecture="jumprelu_transcoder")), NOT_OURS),
    "no inputs": (change_config(lambda c: c.pop("apply_b_dec_to_input")), f"{NOT_OURS}: 'apply_b_dec_to_input'"),
    "other scale": (change_config(lambda c: c.update(normalize_activations="expected_x")), f"{NOT_OURS}: .*expected_x"),
    "no weights": (lambda d: (d / TENSORS).unlink(), UNREADABLE),
    "truncated": (lambda d: (d / TENSORS).write_bytes((d / TENSORS).read_bytes()[:-9]), UNREADABLE),
    "empty": (lambda d: (d / TENSORS).write_bytes(b""), UNREADABLE),
    "wrong shape": (change_tensors(lambda t: t.update(b_dec=torch.zeros(9))), r"'b_dec': \(9,\).*expected.*\(8,\)"),
    "scalar threshold": (change_tensors(lambda t: t.update(threshold=torch.zeros(()))), r"'threshold': \(\)"),
    "extra tensor": (change_tensors(lambda t: t.update(extra=torch.zeros(1))), "'extra'.*expected"),
    "missing tensor": (change_tensors(lambda t: t.pop("b_enc")), "holds.*expected.*'b_enc'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_load_errors_are_one_line_that_names_the_file(damage, tmp_path) -> None:
    sae, _ = ready()
    save_sae(sae, tmp_path)
    apply, message = DAMAGE[damage]
    apply(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_sae(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


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
