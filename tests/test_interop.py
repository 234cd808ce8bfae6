"""SAEs in the forms of SAELens, dictionary_learning and sparsify: files made by hand, formulas, every error."""

import copy
import json
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from msae import interop
from msae.export import FORMATS
from msae.interop import dictionary_learning, saelens
from msae.sae import MatryoshkaSAE, save_sae, truncate
from msae.sae.sparsity import SPARSITIES, TopK

D_IN, D_SAE, WIDTHS = 8, 24, [4, 10, 24]
X = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(1))
SAVE = {form: write for form, (write, _) in FORMATS.items()}
close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-5, equal_nan=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.7


def ours(
    sparsity: Any = "batch_topk", k: float = 2.5, normalised: bool = True, fourth: float | None = None, **options
) -> MatryoshkaSAE:
    """An SAE with weights of any size, none of its tensors where it starts; `fourth` is the threshold of one latent."""
    sae = MatryoshkaSAE(D_IN, D_SAE, WIDTHS, k, sparsity=sparsity, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
        if normalised:
            target = (draw(sae.d_out, seed=8), 30.0) if sae.is_transcoder else None
            sae.set_statistics(draw(D_IN, seed=9), 20.0, "centred", target)
            sae.b_dec.copy_(draw(sae.d_out, seed=10))
        if sae.sparsity.threshold_is == "calibrated":
            sae.threshold.fill_(0.3)
            sae.prefix_thresholds.copy_(torch.tensor([0.1, math.nan, 0.3]))
        elif sae.sparsity.threshold_is == "learned":
            sae.threshold.copy_(draw(D_SAE, seed=11).abs())
        if fourth is not None:
            sae.threshold[3] = fourth
    sae.metadata = {
        **{"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post", "context_size": 64},
        **{"training_architecture_details": {"topk_threshold_lr": 0.02}, "msae": {"training": {"lr": 0.1}}},
    }
    return sae.eval()


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    unlike = [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n].nan_to_num(7), b[n].nan_to_num(7))]
    assert unlike == []


def one_line(call, *arguments, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


# --- files of any form ----------------------------------------------------------------------------------------------


def write_files(directory: Path, config_name: str, config: dict, weights_name: str, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / config_name).write_text(json.dumps(config))
    (torch.save if weights_name == "ae.pt" else save_file)(tensors, directory / weights_name)
    return directory


def config_file(directory: Path) -> Path:
    return next(directory.glob("c*.json"))


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads(config_file(directory).read_text())


def weights_file(directory: Path) -> Path:
    return next(file for file in directory.iterdir() if file.suffix in (".pt", ".safetensors"))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    file = weights_file(directory)
    return torch.load(file, weights_only=True) if file.name == "ae.pt" else load_file(file)


def by_formula(directory: Path) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of X as the library whose files these are computes them."""
    config, t = config_of(directory), tensors_of(directory)
    dict_class = config.get("trainer", {}).get("dict_class")
    if dict_class is not None:
        on_input, ranks, k = dict_class != "JumpReluAutoEncoder", dict_class == "AutoEncoderTopK", int(t.get("k", 0))
    elif "transcode" in config:
        on_input, ranks, k = not config["transcode"], True, config["k"]
    else:
        ranks = config["architecture"].startswith("topk")
        on_input, k = config["apply_b_dec_to_input"], config.get("k")
    W_enc = t["encoder.weight"].T if "encoder.weight" in t else t["W_enc"]
    b_enc = t["encoder.bias"] if "encoder.bias" in t else t["b_enc"]
    W_dec = t["decoder.weight"].T if "decoder.weight" in t else t["W_dec"]
    norm = W_dec.norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(D_SAE)
    pre = ((X - t["b_dec"] if on_input else X) @ W_enc + b_enc) * norm
    if ranks:
        close(norm, torch.ones(D_SAE))  # if it is rescaled, it has been folded too
        selected = pre >= pre.topk(k, dim=1).values[:, -1:]
    else:
        selected = pre > t.get("threshold", t.get("topk_threshold", torch.zeros(())))
    acts = pre.relu() * selected
    return acts, (acts / norm) @ W_dec + t["b_dec"]


# --- ours in every form ---------------------------------------------------------------------------------------------

TOPK = {"sparsity": "topk", "k": 3}
VARIANTS = {
    "plain": {},
    "rescaled": {"rescale_acts_by_decoder_norm": True},
    "rescaled in raw units": {"rescale_acts_by_decoder_norm": True, "normalised": False},
    "b_dec not on the input": {"apply_b_dec_to_input": False},
    "thresholds differ": {"fourth": 2.0},
    "thresholds differ, b_dec not on the input": {"fourth": 2.0, "apply_b_dec_to_input": False},
    "a threshold is not set": {"fourth": math.nan},
    "jumprelu": {"sparsity": {"name": "jumprelu", "bandwidth": 0.5}},
    "l1": {"sparsity": "l1"},
    "topk": TOPK,
    "topk rescaled": TOPK | {"rescale_acts_by_decoder_norm": True},
    "topk rescaled in raw units": TOPK | {"rescale_acts_by_decoder_norm": True, "normalised": False},
    "topk, b_dec not on the input": TOPK | {"apply_b_dec_to_input": False},
    "transcoder": {"d_out": 5},
    "topk transcoder": TOPK | {"d_out": D_IN},
    "topk transcoder into another width": TOPK | {"d_out": 5},
}


def refusal(variant: str, form: str) -> str | None:
    """What is said to an SAE that the form cannot hold."""
    if form == "saelens_training":
        if "transcoder" in variant:
            return "is a transcoder; use to=saelens"
        if "threshold" in variant:
            return "one threshold, those of this SAE differ; use to=saelens"
        name = variant.split()[0].strip(",")
        return f"sparsity={name}; use to=saelens" if name in ("jumprelu", "l1", "topk") else None
    if form == "dictionary_learning" and "transcoder" in variant:
        return "has no transcoders; use to=saelens"
    if form == "sparsify":
        if not variant.startswith("topk"):
            return "keeps k latents of each token.*train with model.sparsity=topk"
        return "have d_out = d_in, this one has 5 and 8" if "another width" in variant else None
    return "no threshold yet; train it or calibrate it" if "not set" in variant else None


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_sae_comes_back_the_same_or_is_refused(variant, form, tmp_path):
    sae = ours(**VARIANTS[variant])
    before, metadata = copy.deepcopy(sae.state_dict()), copy.deepcopy(sae.metadata)
    if message := refusal(variant, form):
        one_line(SAVE[form], sae, tmp_path / "refused", match=message)
        return
    directory = SAVE[form](sae, tmp_path / "ours")
    same_bits(sae.state_dict(), before)
    assert sae.metadata == metadata
    again = interop.load(directory)
    acts = sae.encode(X) / float(sae.target_scale)
    assert bool((acts > 0).any())
    close(again.encode(X), acts)
    for width in WIDTHS:
        close(again(X, width), sae(X, width))
    close(by_formula(directory), (acts, sae(X)))
    assert (again.prefixes, again.k, again.is_transcoder) == (WIDTHS, sae.k, sae.is_transcoder)
    assert again.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert again.metadata["msae"]["training"] == {"lr": 0.1}
    close(again.prefix_thresholds, sae.prefix_thresholds / sae.target_scale)
    if form == "saelens":
        assert again.sparsity == sae.sparsity
    else:
        in_jumprelu = config_of(directory).get("trainer", {}).get("dict_class") == "JumpReluAutoEncoder"
        assert again.sparsity.name == ("jumprelu" if in_jumprelu else sae.sparsity.name)
    metadata = copy.deepcopy(again.metadata)
    third = interop.load(SAVE[form](again, tmp_path / "again"))
    assert again.metadata == metadata == third.metadata
    same_bits(again.state_dict(), third.state_dict())


def test_what_inference_does_decides_whether_a_form_holds_a_mechanism(monkeypatch, tmp_path):
    monkeypatch.setitem(SPARSITIES, "own", TopK)  # unknown again after this test

    class Own(TopK):
        name = "own"

    sae = ours("own", 3)
    for form in ("saelens", "dictionary_learning", "sparsify"):
        close(interop.load(SAVE[form](sae, tmp_path / form))(X), sae(X))
    Own.architecture = "gated"
    for form in ("saelens_training", "dictionary_learning", "sparsify"):
        one_line(SAVE[form], sae, tmp_path / "refused", match="(sparsity=own|no own SAEs).*use to=saelens")


def test_a_truncated_sae_is_written_with_its_own_sizes(tmp_path):
    whole = interop.load(saelens.save_training(ours(), tmp_path / "whole"))
    small = truncate(whole, 10)
    for form in ("saelens", "saelens_training", "dictionary_learning"):
        again = interop.load(SAVE[form](small, tmp_path / form))
        assert (again.prefixes, again.d_sae) == ([4, 10], 10)
        close(again(X), whole(X, 10))
    config = config_of(tmp_path / "saelens_training")
    assert (config["d_sae"], config["matryoshka_widths"]) == (10, [4, 10])
    trainer = config_of(tmp_path / "dictionary_learning")["trainer"]
    assert (trainer["group_sizes"], trainer["group_fractions"]) == ([4, 6], [0.4, 0.6])


# --- theirs ---------------------------------------------------------------------------------------------------------

EXACT = 0.123456789012345678  # not a float32
SAELENS = {
    **{"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True},
    **{"normalize_activations": "none", "reshape_activations": "none"},
}
PYTHIA = "EleutherAI/pythia-70m-deduped"
METADATA = {
    "saelens_training": {"model_name": "gpt2", "hook_name": "blocks.0.attn.hook_z"},
    "saelens": {"hook_name": "blocks.0.hook_resid_pre"},
    "dictionary_learning": {"model_name": PYTHIA, "hook_name": "blocks.3.hook_resid_post", "context_size": 128},
    "sparsify": {"hook_name": "blocks.5.hook_resid_post"},  # as its directory is called
}


def training_files(
    directory: Path, architecture: str = "matryoshka_batchtopk", rescaled: bool = True, threshold: float = EXACT
) -> Path:
    """What SAELens 6.54's TrainingSAE.save_model writes."""
    details = {"k": 2.5, "rescale_acts_by_decoder_norm": rescaled, "topk_threshold_lr": 0.01, "decoder_init_norm": 0.1}
    if architecture == "matryoshka_batchtopk":
        details |= {"matryoshka_widths": WIDTHS, "use_matryoshka_aux_loss": True}
    metadata = METADATA["saelens_training"] | {"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12"}
    metadata |= {"training_architecture": architecture, "training_architecture_details": details}
    config = SAELENS | {"device": "cuda", "reshape_activations": "hook_z", "a_key_of_tomorrow": [1, 2], **details}
    config |= {"architecture": architecture, "metadata": metadata}
    tensors = weights() | {"topk_threshold": torch.tensor(threshold, dtype=torch.float64)}
    return write_files(directory, "cfg.json", config, "sae_weights.safetensors", tensors)


def weights(d_out: int = D_IN) -> dict[str, Tensor]:
    """Under our names."""
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, d_out), "b_dec": (d_out,)}
    return {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def inference_files(directory: Path, architecture: str, **keys) -> Path:
    """What SAELens 6.54's SAE.save_model writes."""
    metadata = METADATA["saelens"] | {"sae_lens_version": "6.54.12", "msae": None}
    config = SAELENS | {"architecture": architecture, "metadata": metadata, **keys}
    tensors = weights(keys.get("d_out", D_IN))
    if keys.get("rescale_acts_by_decoder_norm"):
        tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
    if architecture.startswith("jumprelu"):
        tensors["threshold"] = draw(D_SAE, seed=2).abs()
    return write_files(directory, "cfg.json", config, "sae_weights.safetensors", tensors)


def dictionary_files(directory: Path, dict_class: str, threshold: float = 0.25) -> Path:
    """What the trainers of dictionary_learning 0.1.0 write."""
    trainer = {
        **{"trainer_class": "SomeTrainer", "dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE},
        **{"lm_name": PYTHIA, "layer": 3, "submodule_name": "resid_post_layer_3", "lr": 1e-4, "device": "cuda:0"},
    }
    tensors = weights()
    if dict_class in ("BatchTopKSAE", "AutoEncoderTopK"):
        named = zip(dictionary_learning.LINEAR_NAMES, tensors.values(), strict=True)
        tensors = {name: t.T.contiguous() if t.ndim == 2 else t for name, t in named}
    if dict_class == "JumpReluAutoEncoder":
        tensors["threshold"] = draw(D_SAE, seed=2).abs()
        trainer |= {"target_l0": 5.0}
    else:
        tensors |= {"k": torch.tensor(3, dtype=torch.int), "threshold": torch.tensor(threshold)}
        trainer |= {"k": 3}
    if dict_class == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor([4, 6, 14])
        trainer |= {"group_sizes": [4, 6, 14], "group_fractions": [0.2, 0.25, 0.55], "group_weights": [0.2, 0.3, 0.5]}
    config = {"trainer": trainer, "buffer": {"ctx_len": 128, "d_submodule": D_IN}}
    return write_files(directory, "config.json", config, "ae.pt", tensors)


def sparsify_files(directory: Path, **changes) -> Path:
    """What sparsify 1.3's SparseCoder.save_to_disk writes."""
    config = {
        **{"d_in": D_IN, "num_latents": 0, "expansion_factor": 3, "k": 4, "activation": "topk", "multi_topk": True},
        **{"skip_connection": False, "transcode": False, "normalize_decoder": False},
    }
    W_enc, b_enc, W_dec, b_dec = weights().values()
    tensors = {"encoder.weight": W_enc.T.contiguous(), "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    return write_files(directory, "cfg.json", config | changes, "sae.safetensors", tensors)


matryoshka_dictionary = partial(dictionary_files, dict_class="MatryoshkaBatchTopKSAE")
NESTED, FLAT = {"k": 2.5, "prefixes": WIDTHS}, {"k": 2.5, "prefixes": [D_SAE]}
DICTIONARY, SPARSIFY = {"k": 3, "prefixes": [D_SAE]}, {"k": 4, "prefixes": [D_SAE]}
# Each form: files of it, and what the SAE has that is read from them.
THEIRS: list[tuple[str, Callable[..., Path], dict[str, Any]]] = [
    ("saelens_training", training_files, NESTED),
    ("saelens_training", partial(training_files, rescaled=False), NESTED),
    ("saelens_training", partial(training_files, architecture="batchtopk"), FLAT),
    ("saelens_training", partial(training_files, architecture="batchtopk", rescaled=False), FLAT),
    ("saelens", partial(inference_files, architecture="jumprelu"), {}),
    ("saelens", partial(inference_files, architecture="jumprelu", apply_b_dec_to_input=False), {}),
    ("saelens", partial(inference_files, architecture="topk", k=3, rescale_acts_by_decoder_norm=False), {"k": 3}),
    # SAELens's default for what it trained
    ("saelens", partial(inference_files, architecture="topk", k=3, rescale_acts_by_decoder_norm=True), {"k": 3}),
    ("saelens", partial(inference_files, architecture="standard"), {}),
    ("saelens", partial(inference_files, architecture="transcoder", d_out=5, apply_b_dec_to_input=False), {}),
    ("saelens", partial(inference_files, architecture="jumprelu_transcoder", d_out=5, apply_b_dec_to_input=False), {}),
    ("dictionary_learning", matryoshka_dictionary, {"k": 3, "prefixes": WIDTHS}),
    ("dictionary_learning", partial(dictionary_files, dict_class="BatchTopKSAE"), DICTIONARY),
    ("dictionary_learning", partial(dictionary_files, dict_class="AutoEncoderTopK"), DICTIONARY),
    ("dictionary_learning", partial(dictionary_files, dict_class="JumpReluAutoEncoder"), DICTIONARY | {"k": 5}),
    ("sparsify", sparsify_files, SPARSIFY | {"is_transcoder": False}),
    ("sparsify", partial(sparsify_files, transcode=True), SPARSIFY | {"is_transcoder": True}),
]


@pytest.mark.parametrize(("form", "files", "expected"), THEIRS)
def test_their_sae_computes_what_it_did_and_comes_out_as_it_went_in(form, files, expected, tmp_path):
    theirs = files(tmp_path / "layers.5")
    sae = interop.load(theirs)
    close((sae.encode(X), sae(X)), by_formula(theirs))
    assert {name: getattr(sae, name) for name in expected} == expected
    assert sae.metadata.items() >= METADATA[form].items()
    assert not sae.training

    ours = SAVE[form](sae, tmp_path / "ours")
    same_bits(tensors_of(theirs), tensors_of(ours))
    before, after = config_of(theirs), config_of(ours)
    if form == "saelens":  # prefixes, k and thresholds are added to the metadata
        del before["metadata"]["msae"]
        assert after.pop("metadata").items() >= before.pop("metadata").items()
    elif form != "saelens_training":
        after.pop("msae")
    if form == "sparsify":
        before["num_latents"] = D_SAE
    assert after == before


def test_the_float64_threshold_comes_out_by_way_of_inference_too_unless_it_is_moved(tmp_path):
    sae = interop.load(training_files(tmp_path / "theirs"))
    by_inference = interop.load(save_sae(sae, tmp_path / "inference"))
    assert float(tensors_of(saelens.save_training(by_inference, tmp_path / "ours"))["topk_threshold"]) == EXACT
    sae.threshold.fill_(0.5)
    assert float(tensors_of(saelens.save_training(sae, tmp_path / "moved"))["topk_threshold"]) == 0.5


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("saelens_training", partial(training_files, threshold=0.0)),
        ("dictionary_learning", partial(matryoshka_dictionary, threshold=-1.0)),
        ("dictionary_learning", partial(dictionary_files, dict_class="BatchTopKSAE", threshold=-1.0)),
    ],
)
def test_a_threshold_where_their_trainer_starts_is_not_set(form, files, tmp_path):
    sae = interop.load(files(tmp_path / "theirs"))
    one_line(sae.encode, X, match="no threshold yet")
    same_bits(tensors_of(tmp_path / "theirs"), tensors_of(SAVE[form](sae, tmp_path / "ours")))


def test_a_threshold_calibrated_to_zero_is_set(tmp_path):
    sae = ours()  # k is more than there is
    sae.threshold.zero_(), sae.prefix_thresholds.zero_()
    assert float(interop.load(saelens.save_training(sae, tmp_path)).threshold[0]) == 0.0


def test_our_sae_as_a_matryoshka_dictionary(tmp_path):
    directory = dictionary_learning.save(ours(k=2.5), tmp_path)
    config = config_of(directory)
    expected = {"dict_class": "MatryoshkaBatchTopKSAE", "k": 2, "layer": 3, "lm_name": "gpt2"}
    expected |= {"activation_dim": D_IN, "dict_size": D_SAE, "group_sizes": [4, 6, 14]}
    assert config["trainer"].items() >= expected.items()
    assert config["buffer"] == {"ctx_len": 64}
    assert config["msae"]["k"] == 2.5
    assert tensors_of(directory)["group_sizes"].tolist() == [4, 6, 14]
    edit(directory, msae={**config["msae"], "k": 9.5})  # not what ae.pt rounds
    assert interop.load(directory).k == 2


def test_a_dictionary_of_another_class_keeps_no_settings_of_the_old_one(tmp_path):
    sae = interop.load(matryoshka_dictionary(tmp_path / "theirs"))
    sae.threshold[3] = 2.0
    trainer = config_of(dictionary_learning.save(sae, tmp_path / "ours"))["trainer"]
    assert trainer["trainer_class"] == "JumpReluTrainer"
    assert not {"k", "group_sizes", "lr"} & trainer.keys()
    assert (trainer["layer"], trainer["lm_name"]) == (3, PYTHIA)


# --- what cannot be read --------------------------------------------------------------------------------------------


def edit(directory: Path, **changes) -> None:
    """Set keys of the configuration; None removes one."""
    config = config_of(directory) | changes
    config_file(directory).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def config(**changes):
    return lambda directory: edit(directory, **changes)


def trainer(**changes):
    return lambda directory: edit(directory, trainer=config_of(directory)["trainer"] | changes)


def tensors(**changes: Tensor | None):
    def change(directory: Path) -> None:
        changed = {name: tensor.clone() for name, tensor in tensors_of(directory).items()} | changes
        changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
        file = weights_file(directory)
        (torch.save if file.name == "ae.pt" else save_file)(changed, file)

    return change


def without(name: str):
    return lambda directory: (directory / name).unlink()


def content(name: str, data: bytes):
    return lambda directory: (directory / name).write_bytes(data)


def pickled(content: Any):
    return lambda directory: torch.save(content, directory / "ae.pt")


DAMAGE = [
    (training_files, config(normalize_activations="expected_average_only_in"), "expected 'none'; call fold_activation"),
    (training_files, config(k=None), "not the configuration of a BatchTopK SAE in training: 'k'"),
    (training_files, config(matryoshka_widths=[8, 4]), "strictly increasing"),
    (training_files, config(metadata=[1]), "not the configuration of a BatchTopK SAE in training"),
    (training_files, content("cfg.json", b"[]"), "holds a list, expected a JSON object"),
    (training_files, content("cfg.json", b"{"), "is not JSON"),
    (training_files, content("cfg.json", b"[" * 200_000), "is not JSON"),
    (training_files, content("cfg.json", b"\xff"), "is not JSON"),
    (training_files, without("cfg.json"), "has no cfg.json; give the directory that holds it"),
    (training_files, without("sae_weights.safetensors"), "no SAE in .*sae_weights.safetensors .*ae.pt .*sae.safetens"),
    (training_files, tensors(topk_threshold=None), "expected.*topk_threshold"),
    (training_files, tensors(threshold=torch.zeros(D_SAE)), r"'threshold': \(24,\).*expected"),
    (training_files, config(architecture="gated"), "architecture is 'gated'"),
    (matryoshka_dictionary, trainer(dict_class="GatedAutoEncoder"), "is 'GatedAutoEncoder', expected one of Matr"),
    (matryoshka_dictionary, config(trainer=None), "not an SAE of dictionary_learning: 'trainer'"),
    (matryoshka_dictionary, config(msae={"metadata": [1]}), "not an SAE of dictionary_learning"),
    (matryoshka_dictionary, without("config.json"), "has no config.json"),
    (matryoshka_dictionary, content("ae.pt", b"PK\3\4nonsense"), "ae.pt is not a plain file of tensors"),
    (matryoshka_dictionary, content("ae.pt", b""), "ae.pt is not a plain file of tensors"),
    (matryoshka_dictionary, pickled([torch.zeros(1)]), "does not hold a state dict of tensors"),
    (matryoshka_dictionary, pickled({"k": "3"}), "does not hold a state dict of tensors"),
    (matryoshka_dictionary, tensors(b_dec=torch.zeros(D_IN + 1)), r"b_dec is \[9\], expected \[8\]"),
    (matryoshka_dictionary, tensors(W_dec=torch.zeros(D_IN, D_SAE)), r"W_dec is \[8, 24\], expected \[24, 8\]"),
    (matryoshka_dictionary, tensors(b_enc=None), "'b_enc'"),
    (matryoshka_dictionary, tensors(skip=torch.zeros(3)), "holds skip too, which no MatryoshkaBatchTopKSAE has"),
    (matryoshka_dictionary, tensors(threshold=torch.zeros(D_SAE)), r"threshold is \[24\], expected \[\]"),
    (matryoshka_dictionary, tensors(k=torch.tensor(99)), "k=99 must be positive and at most d_sae=24"),
    (matryoshka_dictionary, tensors(k=torch.tensor(math.inf)), "not an SAE of dictionary_learning"),
    (matryoshka_dictionary, tensors(group_sizes=torch.tensor([4, 4])), "must end at d_sae=24"),
    (matryoshka_dictionary, tensors(W_enc=torch.zeros(3)), "not an SAE of dictionary_learning"),
    (sparsify_files, config(skip_connection=True), "skip_connection is True, expected False"),
    (sparsify_files, config(activation="groupmax"), "activation is 'groupmax', expected 'topk'"),
    (sparsify_files, config(signed=True), "signed is True, expected False"),
    (sparsify_files, config(d_in=None), "not the configuration of a TopK SAE of sparsify: 'd_in'"),
    (sparsify_files, config(k="3"), "not the configuration of a TopK SAE of sparsify"),
    (sparsify_files, config(msae={"metadata": [1]}), "not the configuration of a TopK SAE of sparsify"),
    (sparsify_files, tensors(W_dec=None), "has no W_dec: it was saved without"),
    (sparsify_files, tensors(W_skip=torch.zeros(2)), "'W_skip'.*expected"),
    (sparsify_files, content("sae.safetensors", b"half"), "sae.safetensors cannot be read"),
]


@pytest.mark.parametrize(("files", "damage", "message"), DAMAGE, ids=[message for *_, message in DAMAGE])
def test_what_cannot_be_read_is_one_line(files, damage, message, tmp_path):
    damage(files(tmp_path))
    one_line(interop.load, tmp_path, match=message)


def test_only_batchtopk_is_read_in_saelens_training_form(tmp_path):
    directory = training_files(tmp_path, architecture="gated")
    one_line(saelens.load_training, directory, match="expected one of matryoshka_batchtopk, batchtopk")


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("dump", [torch.save, lambda hostile, file: file.write_bytes(pickle.dumps(hostile, 2))])
def test_a_hostile_pickle_is_refused_before_it_runs(dump, tmp_path):
    directory = dictionary_files(tmp_path / "theirs", "BatchTopKSAE")
    dump(tensors_of(directory) | {"b_dec": Payload(tmp_path / "owned")}, directory / "ae.pt")
    one_line(interop.load, directory, match=r"ae.pt is not a plain file of tensors \(UnpicklingError\).*could run code")
    assert not (tmp_path / "owned").exists()
