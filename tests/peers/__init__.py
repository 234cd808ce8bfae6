"""Parity with the published packages: importing this skips the tests where the packages are not installed."""

import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest

HOW = (
    "needs an environment of its own: python -m venv ../peers && . ../peers/bin/activate && "
    "pip install -c constraints.txt -r tests/peers/requirements.txt && pip uninstall -y torchvision && "
    "pip install --no-deps -e . && pytest tests/peers"
)
PACKAGES = ("sae_lens", "dictionary_learning")
if not all(map(find_spec, PACKAGES)):
    pytest.skip(HOW, allow_module_level=True)
with warnings.catch_warnings():  # theirs are not ours to mend
    warnings.simplefilter("ignore")
    for package in PACKAGES:
        import_module(package)
