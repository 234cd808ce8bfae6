"""What is exported here, the published packages read, and the other way round."""

import copy
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch
from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from msae.interop import dictionary_learning, saelens
from msae.sae import MatryoshkaSAE, fold_decoder_norm, load_sae, matryoshka_loss, quantile_thresholds, save_sae
from msae.training.module import MatryoshkaTraining
from msae.training.settings import FOLDED_AFTER_TRAINING
from tests.published import D_IN, D_SAE, PREFIXES, K, assert_close, batches, randomise, rows, statistics, train
from tests.test_interop import config_of, same_bits, tensors_of, write_files
from tests.training import module_of

pytestmark = pytest.mark.filterwarnings("ignore")
NORMALISE = ("none", "unit_mean_square", "unit_rms", "unit_variance", "centred")
BOTH = (True, False)
SPARSITIES = ("batch_topk", "topk", "jumprelu", "l1")
DECODERS = ("unit_norm", "unit_norm_before_step", "free", "rescaled")
D_OUT = 12
X, X_TRAIN = (rows(n, seed, torch.float32) for n, seed in ((400, 7), (64, 8)))
TRAINING = {
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
}


def trained(sparsity: str, normalise: str, decoder: str, apply_b_dec: bool, transcoder: bool) -> MatryoshkaTraining:
    """A few steps of ours, as `msae.train` would do them."""
    module = module_of(
        D_IN,
        D_SAE,
        PREFIXES,
        K,
        d_out=D_OUT if transcoder else None,
        sparsity={"name": sparsity, **({"threshold_init": 0.1} if sparsity == "jumprelu" else {})},
        decoder=decoder,
        normalise=normalise,
        apply_b_dec_to_input=apply_b_dec,
        init={"decoder_norm": 1.0 if decoder.startswith("unit_norm") else 0.4},
        penalty={"weight": 0.003},
        dead={"after_steps": 2},
        lr=0.02,
        schedule={"warmup_steps": 0},
    )
    x = batches(4, torch.float32)
    y = [batch[:, :D_OUT].flip(1) * 3 + 1 for batch in x]
    module.step().start_from(statistics(x), statistics(y) if transcoder else None)
    train(module, list(zip(x, y, strict=True)) if transcoder else x)
    return module


@torch.no_grad()
def calibrate(sae: MatryoshkaSAE) -> None:
    """One threshold at which k latents are active, where training selected by another rule."""
    if sae.sparsity.threshold_is == "calibrated":
        x = rows(512, seed=5, dtype=torch.float32)
        thresholds = quantile_thresholds([sae.pre(x)], sae.k, 512, sae.prefixes)
        sae.prefix_thresholds.copy_(torch.tensor(thresholds))
        sae.threshold.fill_(thresholds[-1])


@torch.no_grad()
def codes(sae, unit: Tensor | float = 1.0) -> dict[str, Tensor]:
    """Latents, which `unit` divides, and reconstruction of X."""
    acts = sae.encode(X)
    assert 0 < (acts > 0).sum() < acts.numel()
    return {"acts": acts / unit, "recon": sae(X)}


def combinations():
    """Every one that the module allows for BatchTopK autoencoders, the extremes for others."""
    for transcoder, sparsity, decoder, normalise, apply_b_dec in product(BOTH, SPARSITIES, DECODERS, NORMALISE, BOTH):
        if transcoder and (apply_b_dec or sparsity == "topk"):  # b_dec is in other units; SAELens has none with topk
            continue
        if sparsity == "topk" and decoder in FOLDED_AFTER_TRAINING:
            continue
        if (transcoder or sparsity != "batch_topk") and normalise in NORMALISE[1:-1]:  # another number, nothing else
            continue
        yield sparsity, normalise, decoder, apply_b_dec, transcoder


@pytest.mark.parametrize(("sparsity", "normalise", "decoder", "apply_b_dec", "transcoder"), list(combinations()))
def test_saelens_reads_what_is_exported(sparsity, normalise, decoder, apply_b_dec, transcoder, tmp_path):
    module = trained(sparsity, normalise, decoder, apply_b_dec, transcoder)
    sae, before = module.sae, copy.deepcopy(module.sae)
    if decoder == "unit_norm_before_step":  # as msae.training.job.finish does
        fold_decoder_norm(sae)
    calibrate(sae)
    if decoder == "free":
        before.load_state_dict(sae.state_dict())  # calibrated: its codes are what must be exported
        fold_decoder_norm(sae)
    save_sae(sae, tmp_path, {"model_name": "none", "hook_name": "blocks.0.hook_resid_post"})
    ours, theirs = load_sae(tmp_path), SAE.load_from_disk(tmp_path)

    expected = codes(theirs)
    assert_close(codes(ours), expected, 1e-5)
    assert_close(codes(sae, sae.target_scale), expected, 1e-5)
    # before the decoder's norms were folded; BatchTopK's threshold is calibrated after that, but for free decoders
    with torch.no_grad():
        norm = 1.0 if decoder in ("unit_norm", "rescaled") else before.W_dec.norm(dim=1)
        is_set = sparsity != "batch_topk" or decoder == "free"
        acts = before.encode(X) if is_set else before.pre(X) * (expected["acts"] > 0)
        recon = before.decode(expected["acts"] * before.target_scale / norm)
    assert_close({"acts": acts * norm / before.target_scale, "recon": recon}, expected, 1e-5)

    details = theirs.cfg.metadata.training_architecture_details
    assert (details["matryoshka_widths"], details["k"]) == (PREFIXES, K)
    assert (ours.prefixes, ours.k, ours.sparsity.name) == (PREFIXES, K, sparsity)
    assert theirs.cfg.metadata.hook_name == ours.metadata["hook_name"] == "blocks.0.hook_resid_post"


# --- SAELens's own directories ------------------------------------------------------------------------------------


def of_saelens(kind: str, **options) -> TrainingSAE:
    """Theirs with weights of no special form, after a forward pass that moved its threshold."""
    cls, config = TRAINING[kind]
    sizes = {"k": K} if "topk" in config.architecture() else {}
    sizes |= {"matryoshka_widths": list(PREFIXES)} if kind == "matryoshka" else {}
    sae = cls(config(D_IN, D_SAE, **sizes, **options))
    randomise(sae)
    if kind == "jumprelu":
        sae.threshold.data = torch.rand(D_SAE, generator=torch.Generator().manual_seed(5))
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_pre"
    sae.training_forward_pass(TrainStepInput(rows(dtype=torch.float32), {"l1": 1.0, "l0": 1.0}, None, 0, False))
    return sae


KINDS = [
    *(("matryoshka", {"rescale_acts_by_decoder_norm": r, "apply_b_dec_to_input": b}) for r, b in product(*[BOTH] * 2)),
    *(("topk", {"rescale_acts_by_decoder_norm": r}) for r in BOTH),
    *((kind, {"apply_b_dec_to_input": b}) for kind in ("batchtopk", "jumprelu", "standard") for b in BOTH),
]


def assert_same_files(first: Path, second: Path, ours_first: bool = False) -> None:
    """Every bit of every tensor, every key of the configuration; more may be under metadata.

    After ours, theirs has keys of its own too, and a threshold that loading it cast to float32.
    """
    tensors, again = tensors_of(first), tensors_of(second)
    if ours_first:
        tensors, again = ({n: t.double() for n, t in of_file.items()} for of_file in (tensors, again))
    same_bits(tensors, again)
    config, config_again = config_of(first), config_of(second)
    metadata, metadata_again = config.pop("metadata"), config_again.pop("metadata")
    assert config.items() <= config_again.items() if ours_first else config == config_again
    details = metadata.pop("training_architecture_details")
    assert metadata_again["training_architecture_details"].items() >= details.items()
    assert metadata_again.items() >= metadata.items()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_saelens_inference_form_there_and_back(kind, options, tmp_path):
    of_saelens(kind, **options).save_inference_model(tmp_path / "theirs")
    save_sae(load_sae(tmp_path / "theirs"), tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    first, again = (codes(SAE.load_from_disk(tmp_path / name)) for name in ("theirs", "ours"))
    assert_close(again, first, 0)
    assert_close(codes(load_sae(tmp_path / "ours")), first, 1e-5)


@pytest.mark.parametrize(("kind", "options"), [case for case in KINDS if case[0] in ("matryoshka", "batchtopk")])
def test_saelens_training_form_there_and_back(kind, options, tmp_path):
    theirs = of_saelens(kind, **options)
    theirs.save_model(tmp_path / "theirs")
    sae = saelens.load_training(tmp_path / "theirs")
    saelens.save_training(sae, tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = TrainingSAE.load_from_disk(tmp_path / "ours")
    assert asdict(again.cfg).keys() == asdict(theirs.cfg).keys()
    with torch.no_grad():
        losses = [s.training_forward_pass(TrainStepInput(X_TRAIN, {}, None, 0, False)).loss for s in (again, theirs)]
    assert torch.equal(*losses)
    assert torch.equal(again.topk_threshold, theirs.topk_threshold.float())  # loading, they cast it
    assert_close({"loss": matryoshka_loss(sae, X_TRAIN).total}, {"loss": losses[0]}, 1e-5)


@pytest.mark.parametrize("decoder", ["unit_norm", "rescaled"])
def test_our_sae_goes_on_training_in_saelens(decoder, tmp_path):
    module = trained("batch_topk", "none", decoder, True, False)
    saelens.save_training(module.sae, tmp_path / "ours")
    theirs = TrainingSAE.load_from_disk(tmp_path / "ours")
    theirs.save_model(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs", ours_first=True)
    saelens.save_training(saelens.load_training(tmp_path / "theirs"), tmp_path / "again")
    assert_same_files(tmp_path / "ours", tmp_path / "again", ours_first=True)
    loss = theirs.training_forward_pass(TrainStepInput(X_TRAIN, {}, None, 0, False)).loss
    assert_close({"loss": matryoshka_loss(module.sae, X_TRAIN).total}, {"loss": loss}, 1e-5)


# --- dictionary_learning's ----------------------------------------------------------------------------------------


def dictionary(kind: str):
    """One of theirs, and the trainer's part of its config.json."""
    settings = {"warmup_steps": 0, "threshold_start_step": 0, "device": "cpu", "submodule_name": "resid_post_layer_3"}
    fractions = [width / D_SAE for width in (8, 12, 28)]
    trainer = MatryoshkaBatchTopKTrainer(20, D_IN, D_SAE, K, 3, "none", fractions, **settings)
    sae = {
        "MatryoshkaBatchTopKSAE": trainer.ae,
        "BatchTopKSAE": BatchTopKSAE(D_IN, D_SAE, K),
        "AutoEncoderTopK": AutoEncoderTopK(D_IN, D_SAE, K),
        "JumpReluAutoEncoder": JumpReluAutoEncoder(D_IN, D_SAE),
    }[kind]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    config = {**trainer.config, "dict_class": kind}
    if kind == "JumpReluAutoEncoder":
        sae.threshold.data.abs_()
        config |= {"target_l0": K}
    if kind != "MatryoshkaBatchTopKSAE":
        config = {key: value for key, value in config.items() if not key.startswith("group_")}
    return sae, config


def write(sae: torch.nn.Module, trainer: dict, directory: Path) -> Path:
    """As their training loop does."""
    config = {"trainer": trainer, "buffer": {"ctx_len": 128}}
    return write_files(directory, "config.json", config, "ae.pt", sae.state_dict())


@pytest.mark.parametrize("threshold", [-1.0, 0.8])
@pytest.mark.parametrize("kind", dictionary_learning.FORMS)
def test_dictionary_learning_there_and_back(kind, threshold, tmp_path):
    theirs, config = dictionary(kind)
    if kind != "JumpReluAutoEncoder":
        theirs.threshold.fill_(threshold)
    sae = dictionary_learning.load(write(theirs, config, tmp_path / "theirs"))
    ours = dictionary_learning.save(sae, tmp_path / "ours")
    same_bits(tensors_of(tmp_path / "theirs"), tensors_of(ours))
    assert config_of(ours).items() >= config_of(tmp_path / "theirs").items()
    reread, _ = load_dictionary(str(ours), "cpu")
    expected = codes(theirs)
    assert_close(codes(reread), expected, 0)
    if threshold > 0 or kind in ("AutoEncoderTopK", "JumpReluAutoEncoder"):  # else not set yet here
        assert_close(codes(sae), expected, 1e-5)
    if kind == "MatryoshkaBatchTopKSAE":
        assert (sae.prefixes, sae.k) == (PREFIXES, K)


@pytest.mark.parametrize("apply_b_dec", BOTH)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_dictionary_learning_reads_what_is_exported(sparsity, apply_b_dec, tmp_path):
    sae = trained(sparsity, "centred", "unit_norm", apply_b_dec, False).sae
    calibrate(sae)
    ours = dictionary_learning.save(sae, tmp_path / "ours")
    theirs, config = load_dictionary(str(ours), "cpu")
    assert_close(codes(sae, sae.target_scale), codes(theirs), 1e-5)
    again = dictionary_learning.load(write(theirs, config["trainer"], tmp_path / "theirs"))
    same_bits(tensors_of(ours), tensors_of(dictionary_learning.save(again, tmp_path / "again")))
