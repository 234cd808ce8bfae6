"""SAEs in the forms of others: SAELens, dictionary_learning, sparsify, the Hugging Face Hub."""

from pathlib import Path

from msae.interop import dictionary_learning, saelens, sparsify
from msae.interop.convert import read_json
from msae.sae import MatryoshkaSAE, load_sae
from msae.sae.files import CONFIG, WEIGHTS

__all__ = ["load"]


def load(directory: str | Path) -> MatryoshkaSAE:
    """Read an SAE in any form that is known here. Raises ValueError in one line if it cannot be read."""
    directory = Path(directory)
    if (directory / WEIGHTS).exists():
        is_training = read_json(directory / CONFIG).get("architecture") in saelens.ARCHITECTURES
        return saelens.load_training(directory) if is_training else load_sae(directory)
    if (directory / dictionary_learning.WEIGHTS).exists():
        return dictionary_learning.load(directory)
    if (directory / sparsify.WEIGHTS).exists():
        return sparsify.load(directory)
    raise ValueError(
        f"no SAE in {directory}: looked for {WEIGHTS} (SAELens, msae), {dictionary_learning.WEIGHTS} "
        f"(dictionary_learning) and {sparsify.WEIGHTS} (sparsify)"
    )
