"""The README's picture: python docs/picture.py runs/<vanilla run> runs/<matryoshka run>, of the same tree."""

import sys
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

from msae.evaluation.pictures import decoder_against_truth
from msae.sae import load_sae

runs = [Path(argument) for argument in sys.argv[1:]]
truth = instantiate(OmegaConf.load(runs[0] / "config.yaml").data).shards.truth
arms = {}
for run in runs:
    sae = load_sae(run / "sae")
    arms["vanilla" if len(sae.prefixes) == 1 else f"Matryoshka, prefixes {sae.prefixes}"] = sae.W_dec
decoder_against_truth(arms, truth["features"], truth["parent"]).savefig(Path(__file__).with_name("tree.png"), dpi=110)
