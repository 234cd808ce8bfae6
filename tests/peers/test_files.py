"""What is exported here, the published packages read, and the other way round."""

import copy
import json
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
from safetensors.torch import load_file
from torch import Tensor

from msae.interop import dictionary_learning, saelens
from msae.sae import MatryoshkaSAE, load_sae, matryoshka_loss, quantile_thresholds, save_sae
from msae.training.module import FOLDED_AFTER_TRAINING, MatryoshkaTraining
from tests.peers.common import D_IN, D_SAE, PREFIXES, K, assert_close, batches, randomise, rows, train_ours

pytestmark = pytest.mark.filterwarnings("ignore")
NORMALISE = ("none", "unit_mean_square", "unit_rms", "unit_variance", "centred")
BOTH = (True, False)
DECODERS = ("unit_norm", "unit_norm_before_step", "free", "rescaled")
D_OUT = 12
TRAINING = {
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
}


def trained(sparsity: str, normalise: str, decoder: str, apply_b_dec: bool, transcoder: bool) -> MatryoshkaTraining:
    """A few steps of ours, as `msae.train` would do them."""
    module = MatryoshkaTraining(
        D_IN,
        D_SAE,
        PREFIXES,
        K,
        d_out=D_OUT if transcoder else None,
        sparsity=sparsity,
        decoder=decoder,
        normalise=normalise,
        apply_b_dec_to_input=apply_b_dec,
        decoder_init_norm=1.0 if decoder.startswith("unit_norm") else 0.4,
        threshold_init=0.1,
        sparsity_weight=0.003,
        dead_after_steps=2,
        lr=0.02,
        warmup_steps=0,
    )
    data = batches(4)
    pairs = [(x, x[:, :D_OUT].flip(1) * 3 + 1) for x in data]
    x, y = (torch.cat(part).double() for part in zip(*pairs, strict=True))
    statistics = [(part.mean(0), float(part.square().sum(1).mean())) for part in (x, y)]
    module.start_from(statistics[0], statistics[1] if transcoder else None)
    train_ours(module, pairs if transcoder else data)
    return module


@torch.no_grad()
def calibrate(sae: MatryoshkaSAE) -> None:
    """One threshold at which k latents are active, where training selected by another rule."""
    if sae.sparsity == "batch_topk":
        thresholds = quantile_thresholds([sae.pre(rows(512, seed=5))], sae.k, 512, sae.prefixes)
        sae.prefix_thresholds.copy_(torch.tensor(thresholds))
        sae.threshold.fill_(thresholds[-1])


def combinations():
    """Every one that the module allows for BatchTopK autoencoders, the extremes for others."""
    for transcoder, sparsity, decoder, normalise, apply_b_dec in product(
        (False, True), ("batch_topk", "topk", "jumprelu", "l1"), DECODERS, NORMALISE, (True, False)
    ):
        if transcoder and (apply_b_dec or sparsity == "topk"):  # b_dec is in other units; SAELens has none with topk
            continue
        if sparsity == "topk" and decoder in FOLDED_AFTER_TRAINING:
            continue
        if (transcoder or sparsity != "batch_topk") and normalise in NORMALISE[1:-1]:  # another number, nothing else
            continue
        yield pytest.param(
            sparsity,
            normalise,
            decoder,
            apply_b_dec,
            transcoder,
            id="-".join((sparsity, normalise, decoder, "b_dec" * apply_b_dec, "transcoder" * transcoder)),
        )


@pytest.mark.parametrize(("sparsity", "normalise", "decoder", "apply_b_dec", "transcoder"), list(combinations()))
def test_saelens_reads_what_is_exported(sparsity, normalise, decoder, apply_b_dec, transcoder, tmp_path):
    module = trained(sparsity, normalise, decoder, apply_b_dec, transcoder)
    sae, before = module.sae, copy.deepcopy(module.sae)
    if decoder == "unit_norm_before_step":  # as msae.training.job.finish does
        sae.fold_decoder_norm()
    calibrate(sae)
    if decoder == "free":
        before.load_state_dict(sae.state_dict())  # calibrated: its codes are what must be exported
        sae.fold_decoder_norm()
    save_sae(sae, tmp_path, {"model_name": "none", "hook_name": "blocks.0.hook_resid_post"})
    ours, theirs = load_sae(tmp_path), SAE.load_from_disk(tmp_path)

    x = rows(400, seed=7)
    with torch.no_grad():
        acts, their_acts = ours.encode(x), theirs.encode(x)
        recon, their_recon = ours.decode(acts), theirs.decode(their_acts)
        assert 0 < (their_acts > 0).sum() < their_acts.numel()
        assert_close({"acts": acts, "recon": recon}, {"acts": their_acts, "recon": their_recon}, 1e-5)
        unfolded = {"acts": sae.encode(x) / sae.target_scale, "recon": sae(x)}
        assert_close(unfolded, {"acts": their_acts, "recon": their_recon}, 1e-5)
        # before the decoder's norms were folded; BatchTopK's threshold is calibrated after that, but for free decoders
        norm = 1.0 if decoder in ("unit_norm", "rescaled") else before.W_dec.norm(dim=1)
        is_set = sparsity != "batch_topk" or decoder == "free"
        acts_before = before.encode(x) if is_set else before.pre(x) * (their_acts > 0)
        assert_close({"acts": acts_before * norm / before.target_scale}, {"acts": their_acts}, 1e-5)
        of_before = before.decode(their_acts * before.target_scale / norm)
        assert_close({"recon": of_before}, {"recon": their_recon}, 1e-5)

    details = theirs.cfg.metadata.training_architecture_details
    assert (details["matryoshka_widths"], details["k"]) == (PREFIXES, K)
    assert (ours.prefixes, ours.k, ours.sparsity) == (PREFIXES, K, sparsity)
    assert theirs.cfg.metadata.hook_name == ours.metadata["hook_name"] == "blocks.0.hook_resid_post"


# --- SAELens's own directories ------------------------------------------------------------------------------------


def of_saelens(kind: str, **options) -> TrainingSAE:
    """Theirs with weights of no special form, after a forward pass that moved its threshold."""
    cls, config = TRAINING[kind]
    given = {"k": K} if "topk" in config.architecture() else {}
    given |= {"matryoshka_widths": list(PREFIXES)} if kind == "matryoshka" else {}
    sae = cls(config(D_IN, D_SAE, **given, **options))
    randomise(sae)
    if kind == "jumprelu":
        sae.threshold.data = torch.rand(D_SAE, generator=torch.Generator().manual_seed(5))
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_pre"
    sae.training_forward_pass(TrainStepInput(rows(), {"l1": 1.0, "l0": 1.0}, None, 0, False))
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
    tensors, again = (load_file(path / "sae_weights.safetensors") for path in (first, second))
    assert tensors.keys() == again.keys()
    assert ours_first or all(t.dtype == again[n].dtype for n, t in tensors.items())
    assert all(torch.equal(t.double(), again[n].double()) for n, t in tensors.items())
    config, found = (json.loads((path / "cfg.json").read_text()) for path in (first, second))
    metadata, found_metadata = config.pop("metadata"), found.pop("metadata")
    assert config.items() <= found.items() if ours_first else config == found
    assert found_metadata["training_architecture_details"].items() >= metadata["training_architecture_details"].items()
    assert {key: found_metadata[key] for key in metadata if key != "training_architecture_details"} == {
        key: value for key, value in metadata.items() if key != "training_architecture_details"
    }


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_saelens_inference_form_there_and_back(kind, options, tmp_path):
    of_saelens(kind, **options).save_inference_model(tmp_path / "theirs")
    save_sae(load_sae(tmp_path / "theirs"), tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    first, again = (SAE.load_from_disk(tmp_path / name) for name in ("theirs", "ours"))
    ours = load_sae(tmp_path / "ours")
    x = rows(300, seed=7)
    with torch.no_grad():
        acts = first.encode(x)
        assert (acts > 0).any()
        assert torch.equal(again.encode(x), acts)
        assert torch.equal(again(x), first(x))
        assert_close({"acts": ours.encode(x), "recon": ours(x)}, {"acts": acts, "recon": first(x)}, 1e-5)


@pytest.mark.parametrize(("kind", "options"), [case for case in KINDS if case[0] in ("matryoshka", "batchtopk")])
def test_saelens_training_form_there_and_back(kind, options, tmp_path):
    theirs = of_saelens(kind, **options)
    theirs.save_model(tmp_path / "theirs")
    sae = saelens.load_training(tmp_path / "theirs")
    saelens.save_training(sae, tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = TrainingSAE.load_from_disk(tmp_path / "ours")
    assert asdict(again.cfg).keys() == asdict(theirs.cfg).keys()
    x = rows(seed=8)
    with torch.no_grad():
        losses = [s.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).loss for s in (again, theirs)]
    assert torch.equal(*losses)
    assert torch.equal(again.topk_threshold, theirs.topk_threshold.float())  # loading, they cast it
    assert_close({"loss": matryoshka_loss(sae, x).total}, {"loss": losses[0]}, 1e-5)


@pytest.mark.parametrize("decoder", ["unit_norm", "rescaled"])
def test_our_sae_goes_on_training_in_saelens(decoder, tmp_path):
    module = trained("batch_topk", "none", decoder, True, False)
    saelens.save_training(module.sae, tmp_path / "ours")
    theirs = TrainingSAE.load_from_disk(tmp_path / "ours")
    theirs.save_model(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs", ours_first=True)
    saelens.save_training(saelens.load_training(tmp_path / "theirs"), tmp_path / "again")
    assert_same_files(tmp_path / "ours", tmp_path / "again", ours_first=True)
    x = rows(seed=8)
    loss = theirs.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).loss
    assert_close({"loss": matryoshka_loss(module.sae, x).total}, {"loss": loss}, 1e-5)


# --- dictionary_learning's ----------------------------------------------------------------------------------------


def dictionary(kind: str):
    """One of theirs, and the trainer's part of its config.json."""
    fractions = [width / D_SAE for width in (8, 12, 28)]
    trainer = MatryoshkaBatchTopKTrainer(
        20, D_IN, D_SAE, K, 3, "none", fractions, warmup_steps=0, threshold_start_step=0, device="cpu",
        submodule_name="resid_post_layer_3",
    )  # fmt: skip
    sae = {
        "MatryoshkaBatchTopKSAE": lambda: trainer.ae,
        "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, D_SAE, K),
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
        "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D_IN, D_SAE),
    }[kind]()
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


def write(sae: torch.nn.Module, config: dict, directory: Path) -> None:
    """As their training loop does."""
    directory.mkdir()
    torch.save(sae.state_dict(), directory / "ae.pt")
    (directory / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"ctx_len": 128}}, indent=4))


def read(directory: Path) -> tuple[dict[str, Tensor], dict]:
    tensors = torch.load(directory / "ae.pt", weights_only=True)
    return tensors, json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("threshold", [-1.0, 0.8])
@pytest.mark.parametrize(
    "kind", ["MatryoshkaBatchTopKSAE", "BatchTopKSAE", "AutoEncoderTopK", "JumpReluAutoEncoder"]
)  # fmt: skip
def test_dictionary_learning_there_and_back(kind, threshold, tmp_path):
    theirs, config = dictionary(kind)
    if kind != "JumpReluAutoEncoder":
        theirs.threshold.fill_(threshold)
    write(theirs, config, tmp_path / "theirs")
    sae = dictionary_learning.load(tmp_path / "theirs")
    dictionary_learning.save(sae, tmp_path / "ours")
    (first, before), (again, after) = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert first.keys() == again.keys()
    assert all(t.dtype == again[n].dtype and torch.equal(t, again[n]) for n, t in first.items())
    assert {key: after[key] for key in before} == before
    reread, _ = load_dictionary(str(tmp_path / "ours"), "cpu")
    x = rows(300, seed=7)
    with torch.no_grad():
        acts = theirs.encode(x)
        assert (acts > 0).any()
        assert torch.equal(reread.encode(x), acts)
        assert torch.equal(reread(x), theirs(x))
        if threshold > 0 or kind in ("AutoEncoderTopK", "JumpReluAutoEncoder"):  # else not set yet here
            assert_close({"acts": sae.encode(x), "recon": sae(x)}, {"acts": acts, "recon": theirs(x)}, 1e-5)
    if kind == "MatryoshkaBatchTopKSAE":
        assert (sae.prefixes, sae.k) == (PREFIXES, K)


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("sparsity", ["batch_topk", "topk", "jumprelu", "l1"])
def test_dictionary_learning_reads_what_is_exported(sparsity, apply_b_dec, tmp_path):
    sae = trained(sparsity, "centred", "unit_norm", apply_b_dec, False).sae
    calibrate(sae)
    dictionary_learning.save(sae, tmp_path / "ours")
    theirs, config = load_dictionary(str(tmp_path / "ours"), "cpu")
    x = rows(400, seed=7)
    with torch.no_grad():
        ours = {"acts": sae.encode(x) / sae.target_scale, "recon": sae(x)}
        assert_close(ours, {"acts": theirs.encode(x), "recon": theirs(x)}, 1e-5)
    write(theirs, config["trainer"], tmp_path / "theirs")
    dictionary_learning.save(dictionary_learning.load(tmp_path / "theirs"), tmp_path / "again")
    (first, _), (again, _) = read(tmp_path / "ours"), read(tmp_path / "again")
    assert all(torch.equal(t, again[n]) for n, t in first.items())
