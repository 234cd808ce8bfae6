"""SAEs in the forms of SAELens, dictionary_learning and sparsify: files made by hand, formulas, every error."""

import copy
import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from msae import interop
from msae.interop import dictionary_learning, saelens, sparsify
from msae.sae import MatryoshkaSAE, load_sae, save_sae
from msae.sae.model import Sparsity

D_IN, D_SAE, WIDTHS = 8, 24, [4, 10, 24]
X = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.7


def ours(sparsity: Sparsity = "batch_topk", k: float = 2.5, normalised: bool = True, **options) -> MatryoshkaSAE:
    """An SAE with weights of any size, in every room of it something else than where it starts."""
    sae = MatryoshkaSAE(D_IN, D_SAE, WIDTHS, int(k) if sparsity == "topk" else k, sparsity=sparsity, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
        if normalised:
            target = (draw(sae.d_out, seed=8), 30.0) if sae.is_transcoder else None
            sae.set_statistics(draw(D_IN, seed=9), 20.0, "centred", target)
            sae.b_dec.copy_(draw(sae.d_out, seed=10))
        if sparsity == "batch_topk":
            sae.threshold.fill_(0.3)
            sae.prefix_thresholds.copy_(torch.tensor([0.1, math.nan, 0.3]))
        elif sparsity == "jumprelu":
            sae.threshold.copy_(draw(D_SAE, seed=11).abs())
    sae.metadata = {
        "model_name": "gpt2",
        "hook_name": "blocks.3.hook_resid_post",
        "context_size": 64,
        "training_architecture_details": {"topk_threshold_lr": 0.02},
        "msae": {"training": {"lr": 0.1}},
    }
    return sae.eval()


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


def one_line(call, *arguments, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


def edit(file: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def retensor(file: Path, **changes: Tensor | None) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


# --- what every form has in common ----------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "rescaled": {"rescale_acts_by_decoder_norm": True},
    "rescaled in raw units": {"rescale_acts_by_decoder_norm": True, "normalised": False},
    "b_dec not on the input": {"apply_b_dec_to_input": False},
    "jumprelu": {"sparsity": "jumprelu"},
    "l1": {"sparsity": "l1"},
    "topk": {"sparsity": "topk", "k": 3},
    "topk rescaled": {"sparsity": "topk", "k": 3, "rescale_acts_by_decoder_norm": True},
    "topk, b_dec not on the input": {"sparsity": "topk", "k": 3, "apply_b_dec_to_input": False},
    "transcoder": {"d_out": 5},
    "topk transcoder": {"sparsity": "topk", "k": 3, "d_out": D_IN},
}
REFUSED = {
    ("jumprelu", "saelens_training"): "sparsity=jumprelu; use to=saelens",
    ("l1", "saelens_training"): "sparsity=l1; use to=saelens",
    ("topk", "saelens_training"): "sparsity=topk; use to=saelens",
    ("topk rescaled", "saelens_training"): "sparsity=topk; use to=saelens",
    ("topk, b_dec not on the input", "saelens_training"): "sparsity=topk; use to=saelens",
    ("transcoder", "saelens_training"): "is a transcoder; use to=saelens",
    ("topk transcoder", "saelens_training"): "is a transcoder; use to=saelens",
    ("transcoder", "dictionary_learning"): "has no transcoders; use to=saelens",
    ("topk transcoder", "dictionary_learning"): "has no transcoders; use to=saelens",
    **{
        (name, "sparsify"): "keeps k latents of each token.*train with model.sparsity=topk"
        for name in VARIANTS
        if not name.startswith("topk")
    },
}
SAVE = {
    "saelens": save_sae,
    "saelens_training": saelens.save_training,
    "dictionary_learning": dictionary_learning.save,
    "sparsify": sparsify.save,
}


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_sae_comes_back_the_same_or_is_refused(variant, form, tmp_path):
    sae = ours(**VARIANTS[variant])
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    metadata = copy.deepcopy(sae.metadata)
    if message := REFUSED.get((variant, form)):
        one_line(SAVE[form], sae, tmp_path, match=message)
        return
    again = interop.load(SAVE[form](sae, tmp_path))
    for name, tensor in before.items():
        assert torch.equal(tensor.nan_to_num(7), sae.state_dict()[name].nan_to_num(7)), f"saving changed {name}"
    assert sae.metadata == metadata
    acts = sae.encode(X) / float(sae.target_scale)
    assert bool((acts > 0).any())
    torch.testing.assert_close(again.encode(X), acts, **CLOSE)
    for width in WIDTHS:
        torch.testing.assert_close(again(X, width), sae(X, width), **CLOSE)
    assert (again.prefixes, again.is_transcoder) == (WIDTHS, sae.is_transcoder)
    assert again.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert again.metadata["msae"]["training"] == {"lr": 0.1}
    if (form, variant) != ("dictionary_learning", "l1"):  # there a ReLU is a JumpReLU with thresholds 0
        assert again.sparsity == sae.sparsity
    assert again.k == sae.k
    scaled = sae.prefix_thresholds / sae.target_scale
    torch.testing.assert_close(again.prefix_thresholds, scaled, equal_nan=True)
    metadata = copy.deepcopy(again.metadata)
    third = interop.load(SAVE[form](again, tmp_path / "again"))
    assert again.metadata == metadata == third.metadata
    same_bits(
        {name: tensor.nan_to_num(7) for name, tensor in again.state_dict().items()},
        {name: tensor.nan_to_num(7) for name, tensor in third.state_dict().items()},
    )


def test_a_truncated_sae_is_written_with_its_own_sizes(tmp_path):
    whole = interop.load(saelens.save_training(ours(), tmp_path / "whole"))
    small = whole.truncate(10)
    for form in ("saelens", "saelens_training", "dictionary_learning"):
        again = interop.load(SAVE[form](small, tmp_path / form))
        assert (again.prefixes, again.d_sae) == ([4, 10], 10)
        torch.testing.assert_close(again(X), whole(X, 10), **CLOSE)
    config = json.loads((tmp_path / "saelens_training/cfg.json").read_text())
    assert (config["d_sae"], config["matryoshka_widths"]) == (10, [4, 10])
    trainer = json.loads((tmp_path / "dictionary_learning/config.json").read_text())["trainer"]
    assert (trainer["group_sizes"], trainer["group_fractions"]) == ([4, 6], [0.4, 0.6])


def test_load_finds_the_sae_of_a_run(tmp_path):
    sae = ours(normalised=False)
    save_sae(sae, tmp_path / "run/sae")
    assert torch.equal(interop.load(tmp_path / "run").W_enc, sae.W_enc)
    assert torch.equal(interop.load(str(tmp_path / "run/sae")).W_enc, sae.W_enc)
    one_line(
        interop.load,
        tmp_path,
        match="no SAE in .*sae_weights.safetensors .*ae.pt .*sae.safetensors",
    )


# --- SAELens --------------------------------------------------------------------------------------------------------

EXACT = 0.123456789012345678  # not a float32


def training_files(directory: Path, architecture: str = "matryoshka_batchtopk", rescaled: bool = True) -> Path:
    """What SAELens 6.54's TrainingSAE.save_model writes."""
    details = {
        "decoder_init_norm": 0.1,
        "k": 2.5,
        "use_sparse_activations": False,
        "aux_loss_coefficient": 1.0,
        "rescale_acts_by_decoder_norm": rescaled,
        "topk_threshold_lr": 0.01,
    }
    if architecture == "matryoshka_batchtopk":
        details |= {"matryoshka_widths": WIDTHS, "use_matryoshka_aux_loss": True}
    config = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z",
        "a_key_of_tomorrow": [1, 2],
        **details,
        "metadata": {
            "sae_lens_version": "6.54.12",
            "sae_lens_training_version": "6.54.12",
            "model_name": "gpt2",
            "hook_name": "blocks.0.attn.hook_z",
            "training_architecture": architecture,
            "training_architecture_details": details,
        },
        "architecture": architecture,
    }
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    tensors = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors["topk_threshold"] = torch.tensor(EXACT, dtype=torch.float64)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "sae_weights.safetensors")
    (directory / "cfg.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["matryoshka_batchtopk", "batchtopk"])
def test_a_training_sae_of_saelens_comes_out_as_it_went_in(architecture, rescaled, tmp_path):
    there = training_files(tmp_path / "there", architecture, rescaled)
    sae = interop.load(there)
    t = load_file(there / "sae_weights.safetensors")
    pre = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    norm = t["W_dec"].norm(dim=1)
    if rescaled:
        pre = pre * norm
    acts = pre.relu() * (pre > EXACT)
    torch.testing.assert_close(sae.encode(X), acts, **CLOSE)
    torch.testing.assert_close(sae(X), (acts / norm if rescaled else acts) @ t["W_dec"] + t["b_dec"], **CLOSE)
    assert sae.prefixes == (WIDTHS if architecture == "matryoshka_batchtopk" else [D_SAE])
    assert (sae.k, sae.sparsity, sae.training) == (2.5, "batch_topk", False)

    here = saelens.save_training(sae, tmp_path / "here")
    same_bits(t, load_file(here / "sae_weights.safetensors"))
    assert json.loads((here / "cfg.json").read_text()) == json.loads((there / "cfg.json").read_text())
    by_inference = saelens.save_training(interop.load(save_sae(sae, tmp_path / "inference")), tmp_path / "third")
    assert float(load_file(by_inference / "sae_weights.safetensors")["topk_threshold"]) == EXACT


def test_a_threshold_that_was_moved_is_what_is_written(tmp_path):
    sae = interop.load(training_files(tmp_path / "there"))
    sae.threshold.fill_(0.5)
    here = saelens.save_training(sae, tmp_path / "here")
    assert float(load_file(here / "sae_weights.safetensors")["topk_threshold"]) == 0.5


def test_the_threshold_that_saelens_starts_with_is_not_set(tmp_path):
    there = training_files(tmp_path / "there")
    retensor(there / "sae_weights.safetensors", topk_threshold=torch.zeros((), dtype=torch.float64))
    sae = interop.load(there)
    one_line(sae.encode, X, match="no threshold yet")
    here = saelens.save_training(sae, tmp_path / "here")
    same_bits(load_file(there / "sae_weights.safetensors"), load_file(here / "sae_weights.safetensors"))
    calibrated = ours()  # to 0: k is more than there is
    calibrated.threshold.zero_(), calibrated.prefix_thresholds.zero_()
    again = interop.load(saelens.save_training(calibrated, tmp_path / "calibrated"))
    assert float(again.threshold[0]) == 0.0


def test_one_prefix_is_written_as_batchtopk(tmp_path):
    sae = MatryoshkaSAE(D_IN, D_SAE, [D_SAE], 2)
    sae.threshold.fill_(0.1)
    config = json.loads((saelens.save_training(sae, tmp_path) / "cfg.json").read_text())
    assert config["architecture"] == "batchtopk"
    assert "matryoshka_widths" not in config


def test_saelens_training_form_needs_one_threshold(tmp_path):
    sae = ours()
    sae.threshold[3] = 0.7
    one_line(saelens.save_training, sae, tmp_path, match="one threshold, those of this SAE differ; use to=saelens")


TRAINING_DAMAGE = {
    "not folded": (
        lambda d: edit(d / "cfg.json", normalize_activations="expected_average_only_in"),
        "normalize_activations is 'expected_average_only_in', expected 'none'; call fold_activation_norm",
    ),
    "no k": (lambda d: edit(d / "cfg.json", k=None), "not the configuration of a BatchTopK SAE in training: 'k'"),
    "widths": (lambda d: edit(d / "cfg.json", matryoshka_widths=[8, 4]), "strictly increasing"),
    "cfg a list": (lambda d: (d / "cfg.json").write_text("[]"), "holds a list, expected a JSON object"),
    "cfg no JSON": (lambda d: (d / "cfg.json").write_text("{"), "is not JSON"),
    "no cfg": (lambda d: (d / "cfg.json").unlink(), "has no cfg.json"),
    "no threshold": (
        lambda d: retensor(d / "sae_weights.safetensors", topk_threshold=None),
        "expected.*topk_threshold",
    ),
    "inference weights": (
        lambda d: retensor(d / "sae_weights.safetensors", threshold=torch.zeros(D_SAE)),
        r"'threshold': \(24,\).*expected",
    ),
    "other architecture": (lambda d: edit(d / "cfg.json", architecture="gated"), "architecture is 'gated'"),
}


@pytest.mark.parametrize("damage", TRAINING_DAMAGE)
def test_saelens_errors_are_one_line(damage, tmp_path):
    there = training_files(tmp_path)
    change, message = TRAINING_DAMAGE[damage]
    change(there)
    one_line(interop.load, there, match=message)
    if damage == "other architecture":
        one_line(saelens.load_training, there, match="expected one of matryoshka_batchtopk, batchtopk")


INFERENCE = {
    "jumprelu": {},
    "jumprelu ": {"apply_b_dec_to_input": False},
    "topk": {"k": 3, "rescale_acts_by_decoder_norm": False},
    "topk ": {"k": 3, "rescale_acts_by_decoder_norm": True},  # SAELens's default for what it trained
    "standard": {},
    "transcoder": {"d_out": 5, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": 5, "apply_b_dec_to_input": False},
}


@pytest.mark.parametrize("name", INFERENCE)
def test_saelens_inference_forms_come_out_as_they_went_in(name, tmp_path):
    architecture, keys = name.strip(), INFERENCE[name]
    config = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **keys,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_pre", "msae": None},
    }
    d_out = keys.get("d_out", D_IN)
    t = {"W_enc": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "W_dec": draw(D_SAE, d_out, seed=1), "b_dec": draw(d_out)}
    if keys.get("rescale_acts_by_decoder_norm"):
        t["W_dec"] /= t["W_dec"].norm(dim=1, keepdim=True)
    if architecture.startswith("jumprelu"):
        t["threshold"] = draw(D_SAE, seed=2).abs()
    save_file(t, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))

    sae = interop.load(tmp_path)
    pre = (X - t["b_dec"] if config["apply_b_dec_to_input"] else X) @ t["W_enc"] + t["b_enc"]
    acts = pre.relu() * (pre > t["threshold"]) if "threshold" in t else pre.relu()
    if architecture == "topk":
        acts = acts * (pre >= pre.topk(3, dim=1).values[:, -1:])
    torch.testing.assert_close(sae.encode(X), acts, **CLOSE)
    torch.testing.assert_close(sae(X), acts @ t["W_dec"] + t["b_dec"], **CLOSE)
    again = save_sae(sae, tmp_path / "again")
    same_bits(t, load_file(again / "sae_weights.safetensors"))
    written = json.loads((again / "cfg.json").read_text())
    assert {**written, "metadata": None} == {**config, "metadata": None}
    config["metadata"].pop("msae")
    assert written["metadata"].items() >= config["metadata"].items()


def test_rescaled_topk_is_folded_unless_its_rows_are_unit(tmp_path):
    sae = ours("topk", 3, normalised=False, rescale_acts_by_decoder_norm=True)
    again = load_sae(save_sae(sae, tmp_path))
    assert not again.rescale_acts_by_decoder_norm
    torch.testing.assert_close(again.W_dec.norm(dim=1), torch.ones(D_SAE))


# --- dictionary_learning --------------------------------------------------------------------------------------------


def dictionary_files(directory: Path, dict_class: str, threshold: float = 0.25) -> Path:
    """What the trainers of dictionary_learning 0.1.0 write."""
    W_enc, b_enc, W_dec, b_dec = draw(D_IN, D_SAE), draw(D_SAE), draw(D_SAE, D_IN, seed=1), draw(D_IN)
    trainer = {
        "trainer_class": "SomeTrainer",
        "dict_class": dict_class,
        "lr": 1e-4,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "layer": 3,
        "submodule_name": "resid_post_layer_3",
        "device": "cuda:0",
    }
    tensors: dict[str, Tensor] = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    if dict_class in ("BatchTopKSAE", "AutoEncoderTopK"):
        tensors = {"encoder.weight": W_enc.T, "encoder.bias": b_enc, "decoder.weight": W_dec.T, "b_dec": b_dec}
    if dict_class == "JumpReluAutoEncoder":
        tensors["threshold"] = draw(D_SAE, seed=2).abs()
        trainer |= {"target_l0": 5.0}
    else:
        tensors |= {"k": torch.tensor(3, dtype=torch.int), "threshold": torch.tensor(threshold)}
        trainer |= {"k": 3}
    if dict_class == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor([4, 6, 14])
        trainer |= {"group_sizes": [4, 6, 14], "group_fractions": [0.2, 0.25, 0.55], "group_weights": [0.2, 0.3, 0.5]}
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, directory / "ae.pt")
    config = {"trainer": trainer, "buffer": {"ctx_len": 128, "d_submodule": D_IN}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def read(directory: Path) -> dict[str, Tensor]:
    return torch.load(directory / "ae.pt", weights_only=True)


def encode_as_there(tensors: dict[str, Tensor], dict_class: str) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of X by dictionary_learning's formulas."""
    linear = "encoder.weight" in tensors
    W_enc = tensors["encoder.weight"].T if linear else tensors["W_enc"]
    b_enc = tensors["encoder.bias"] if linear else tensors["b_enc"]
    W_dec = tensors["decoder.weight"].T if linear else tensors["W_dec"]
    x = X if dict_class == "JumpReluAutoEncoder" else X - tensors["b_dec"]
    acts = (x @ W_enc + b_enc).relu()
    if dict_class == "AutoEncoderTopK":
        top = acts.topk(int(tensors["k"]), dim=1)
        acts = torch.zeros_like(acts).scatter(1, top.indices, top.values)
    else:
        acts = acts * (acts > tensors["threshold"])
    return acts, acts @ W_dec + tensors["b_dec"]


@pytest.mark.parametrize("dict_class", dictionary_learning.FORMS)
def test_a_dictionary_comes_out_as_it_went_in(dict_class, tmp_path):
    there = dictionary_files(tmp_path / "there", dict_class)
    sae = interop.load(there)
    acts, recon = encode_as_there(read(there), dict_class)
    torch.testing.assert_close(sae.encode(X), acts, **CLOSE)
    torch.testing.assert_close(sae(X), recon, **CLOSE)
    assert sae.prefixes == (WIDTHS if dict_class == "MatryoshkaBatchTopKSAE" else [D_SAE])
    assert sae.k == (5 if dict_class == "JumpReluAutoEncoder" else 3)
    assert sae.metadata["model_name"] == "EleutherAI/pythia-70m-deduped"
    assert sae.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert sae.metadata["context_size"] == 128

    here = dictionary_learning.save(sae, tmp_path / "here")
    same_bits(read(there), read(here))
    config = json.loads((here / "config.json").read_text())
    assert config.pop("msae")["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert config == json.loads((there / "config.json").read_text())


@pytest.mark.parametrize("dict_class", ["MatryoshkaBatchTopKSAE", "BatchTopKSAE"])
def test_a_dictionary_that_was_not_trained_far_enough_has_no_threshold(dict_class, tmp_path):
    there = dictionary_files(tmp_path / "there", dict_class, threshold=-1.0)
    sae = interop.load(there)
    one_line(sae.encode, X, match="no threshold yet")
    same_bits(read(there), read(dictionary_learning.save(sae, tmp_path / "here")))


def test_ours_as_a_matryoshka_dictionary(tmp_path):
    sae = ours(k=2.5)
    here = dictionary_learning.save(sae, tmp_path)
    config, tensors = json.loads((here / "config.json").read_text()), read(here)
    trainer = config["trainer"]
    assert trainer["dict_class"] == "MatryoshkaBatchTopKSAE"
    assert (trainer["k"], trainer["layer"], trainer["lm_name"]) == (2, 3, "gpt2")
    assert (trainer["activation_dim"], trainer["dict_size"], trainer["group_sizes"]) == (D_IN, D_SAE, [4, 6, 14])
    assert config["buffer"] == {"ctx_len": 64}
    assert config["msae"]["k"] == 2.5
    assert tensors["k"].dtype == torch.int32
    assert tensors["threshold"].shape == ()
    assert tensors["group_sizes"].tolist() == [4, 6, 14]
    torch.testing.assert_close(encode_as_there(tensors, "MatryoshkaBatchTopKSAE")[1], sae(X), **CLOSE)
    edit(here / "config.json", msae={**config["msae"], "k": 9.5})  # not what ae.pt rounds
    assert interop.load(here).k == 2


@pytest.mark.parametrize("applied", [True, False])
def test_thresholds_that_differ_make_a_jumprelu_dictionary_without_b_dec_on_its_input(applied, tmp_path):
    sae = ours(apply_b_dec_to_input=applied)
    sae.threshold[3] = 2.0
    here = dictionary_learning.save(sae, tmp_path)
    assert json.loads((here / "config.json").read_text())["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    acts, recon = encode_as_there(read(here), "JumpReluAutoEncoder")
    torch.testing.assert_close(acts, sae.encode(X) / float(sae.scale), **CLOSE)
    torch.testing.assert_close(recon, sae(X), **CLOSE)
    sae.threshold[3] = math.nan
    one_line(dictionary_learning.save, sae, tmp_path / "unset", match="no threshold yet; train it or calibrate it")


def test_a_dictionary_of_another_class_keeps_no_settings_of_the_old_one(tmp_path):
    sae = interop.load(dictionary_files(tmp_path / "there", "MatryoshkaBatchTopKSAE"))
    sae.threshold[3] = 2.0
    here = dictionary_learning.save(sae, tmp_path / "here")
    trainer = json.loads((here / "config.json").read_text())["trainer"]
    assert trainer["trainer_class"] == "JumpReluTrainer"
    assert not {"k", "group_sizes", "lr"} & trainer.keys()
    assert (trainer["layer"], trainer["lm_name"]) == (3, "EleutherAI/pythia-70m-deduped")


def test_a_topk_dictionary_subtracts_b_dec_from_its_input(tmp_path):
    sae = ours("topk", 3, apply_b_dec_to_input=False)
    here = dictionary_learning.save(sae, tmp_path)
    torch.testing.assert_close(encode_as_there(read(here), "AutoEncoderTopK")[1], sae(X), **CLOSE)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_hostile_pickle_is_refused_before_it_runs(how, tmp_path):
    there = dictionary_files(tmp_path / "there", "BatchTopKSAE")
    content = {**read(there), "b_dec": Payload(tmp_path / "owned")}
    if how == "torch":
        torch.save(content, there / "ae.pt")
    else:
        (there / "ae.pt").write_bytes(pickle.dumps(content, protocol=2))
    one_line(interop.load, there, match=r"ae.pt is not a plain file of tensors \(UnpicklingError\).*could run code")
    assert not (tmp_path / "owned").exists()


def rewrite(**changes: Tensor | None):
    def change(directory: Path) -> None:
        tensors = read(directory) | changes
        torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / "ae.pt")

    return change


def retrain(**changes):
    def change(directory: Path) -> None:
        trainer = json.loads((directory / "config.json").read_text())["trainer"]
        edit(directory / "config.json", trainer=trainer | changes)

    return change


DICTIONARY_DAMAGE = {
    "another class": (retrain(dict_class="GatedAutoEncoder"), "dict_class is 'GatedAutoEncoder', expected one of Matr"),
    "no trainer": (lambda d: edit(d / "config.json", trainer=None), "not an SAE of dictionary_learning: 'trainer'"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "corrupt": (lambda d: (d / "ae.pt").write_bytes(b"PK\3\4nonsense"), "ae.pt is not a plain file of tensors"),
    "empty": (lambda d: (d / "ae.pt").write_bytes(b""), "ae.pt is not a plain file of tensors"),
    "a list": (lambda d: torch.save([torch.zeros(1)], d / "ae.pt"), "does not hold a state dict of tensors"),
    "not tensors": (lambda d: torch.save({"k": "3"}, d / "ae.pt"), "does not hold a state dict of tensors"),
    "shape": (rewrite(b_dec=torch.zeros(D_IN + 1)), r"b_dec is \[9\], expected \[8\]"),
    "decoder": (rewrite(W_dec=torch.zeros(D_IN, D_SAE)), r"W_dec is \[8, 24\], expected \[24, 8\]"),
    "missing": (rewrite(b_enc=None), "'b_enc'"),
    "extra": (rewrite(skip=torch.zeros(3)), "holds skip too, which no MatryoshkaBatchTopKSAE has"),
    "thresholds": (rewrite(threshold=torch.zeros(D_SAE)), r"threshold is \[24\], expected \[\]"),
    "k": (rewrite(k=torch.tensor(99)), "k=99 must be positive and at most d_sae=24"),
    "groups": (rewrite(group_sizes=torch.tensor([4, 4])), "must end at d_sae=24"),
    "encoder": (rewrite(W_enc=torch.zeros(3)), "not an SAE of dictionary_learning"),
}


@pytest.mark.parametrize("damage", DICTIONARY_DAMAGE)
def test_dictionary_errors_are_one_line(damage, tmp_path):
    there = dictionary_files(tmp_path, "MatryoshkaBatchTopKSAE")
    change, message = DICTIONARY_DAMAGE[damage]
    change(there)
    one_line(interop.load, there, match=message)


# --- sparsify -------------------------------------------------------------------------------------------------------


def sparsify_files(directory: Path, **changes) -> Path:
    """What sparsify 1.3's SparseCoder.save_to_disk writes."""
    config = {
        "activation": "topk",
        "expansion_factor": 3,
        "normalize_decoder": False,
        "num_latents": 0,
        "k": 4,
        "multi_topk": True,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_IN,
    }
    tensors = {
        "encoder.weight": draw(D_SAE, D_IN),
        "encoder.bias": draw(D_SAE),
        "W_dec": draw(D_SAE, D_IN, seed=1),
        "b_dec": draw(D_IN),
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "sae.safetensors")
    (directory / "cfg.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.parametrize("transcode", [False, True])
def test_a_sparsify_sae_comes_out_as_it_went_in(transcode, tmp_path):
    there = sparsify_files(tmp_path / "layers.5", transcode=transcode)
    sae = interop.load(there)
    t = load_file(there / "sae.safetensors")
    pre = ((X if transcode else X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    top = pre.topk(4, dim=1)
    acts = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    torch.testing.assert_close(sae.encode(X), acts, **CLOSE)
    torch.testing.assert_close(sae(X), acts @ t["W_dec"] + t["b_dec"], **CLOSE)
    assert (sae.k, sae.prefixes, sae.is_transcoder) == (4, [D_SAE], transcode)
    assert sae.metadata["hook_name"] == "blocks.5.hook_resid_post"

    here = sparsify.save(sae, tmp_path / "here")
    same_bits(t, load_file(here / "sae.safetensors"))
    config = json.loads((here / "cfg.json").read_text())
    config.pop("msae")
    assert config == json.loads((there / "cfg.json").read_text()) | {"num_latents": D_SAE}


SPARSIFY_DAMAGE = {
    "skip": (lambda d: edit(d / "cfg.json", skip_connection=True), "skip_connection is True, expected False"),
    "groupmax": (lambda d: edit(d / "cfg.json", activation="groupmax"), "activation is 'groupmax', expected 'topk'"),
    "signed": (lambda d: edit(d / "cfg.json", signed=True), "signed is True, expected False"),
    "no d_in": (lambda d: edit(d / "cfg.json", d_in=None), "not the configuration of a TopK SAE of sparsify: 'd_in'"),
    "no decoder": (lambda d: retensor(d / "sae.safetensors", W_dec=None), "has no W_dec: it was saved without"),
    "extra": (lambda d: retensor(d / "sae.safetensors", W_skip=torch.zeros(2)), "'W_skip'.*expected"),
    "truncated": (lambda d: (d / "sae.safetensors").write_bytes(b"half"), "sae.safetensors cannot be read"),
}


@pytest.mark.parametrize("damage", SPARSIFY_DAMAGE)
def test_sparsify_errors_are_one_line(damage, tmp_path):
    there = sparsify_files(tmp_path)
    change, message = SPARSIFY_DAMAGE[damage]
    change(there)
    one_line(interop.load, there, match=message)


def test_sparsify_transcoders_keep_their_width(tmp_path):
    sae = ours("topk", 3, d_out=5)
    one_line(sparsify.save, sae, tmp_path, match=re.escape("have d_out = d_in, this one has 5 and 8"))
