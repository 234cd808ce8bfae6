"""For every test: array shapes checked at run time, one torch thread, no warning that comes only once, no logs left."""

import logging
import os

import pytest
import torch
from jaxtyping import install_import_hook

# is_pep484_tower: an int is a float. Before anything imports these modules.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(["msae.sae", "msae.evaluation"], CHECKER)
torch.set_num_threads(1)
torch.set_warn_always(True)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's functions on a CPU


@pytest.fixture(autouse=True)
def no_handler_is_left():
    """What Hydra adds to the root logger writes to a stream that pytest closes after the test."""
    yield
    for handler in [h for h in logging.root.handlers if type(h) is logging.StreamHandler]:
        logging.root.removeHandler(handler)
