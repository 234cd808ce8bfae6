"""SAEs in the forms of others: SAELens, dictionary_learning, sparsify, the Hugging Face Hub."""

from pathlib import Path

from msae.interop import dictionary_learning, saelens, sparsify
from msae.interop.convert import read_json
from msae.sae import MatryoshkaSAE, load_sae
from msae.sae.files import CONFIG, WEIGHTS

__all__ = ["load"]


def load(path: str | Path) -> MatryoshkaSAE:
    """Read an SAE in any form that is known here; `path` is its directory, or a run directory with `sae/` in it.

    Raises ValueError in one line if none is there or it cannot be read.
    """
    for directory in (Path(path), Path(path) / "sae"):
        if (directory / WEIGHTS).exists():
            is_training = read_json(directory / CONFIG).get("architecture") in saelens.ARCHITECTURES
            return saelens.load_training(directory) if is_training else load_sae(directory)
        if (directory / dictionary_learning.WEIGHTS).exists():
            return dictionary_learning.load(directory)
        if (directory / sparsify.WEIGHTS).exists():
            return sparsify.load(directory)
    raise ValueError(
        f"no SAE in {path}: looked there and in its sae/ for {WEIGHTS} (SAELens, msae), "
        f"{dictionary_learning.WEIGHTS} (dictionary_learning) and {sparsify.WEIGHTS} (sparsify)"
    )
