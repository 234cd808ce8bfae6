"""For every test: array shapes checked at run time, one torch thread, no warning that comes only once, no logs left.

And what the tests of commands share: an empty directory, running a command in this process, a tiny language model.
"""

import logging
import os
import sys

import pytest
import torch
from jaxtyping import install_import_hook

from tests.device import DEVICE

# is_pep484_tower: an int is a float. Before anything imports these modules.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(["msae.sae", "msae.evaluation"], CHECKER)
torch.set_num_threads(1)
torch.set_warn_always(True)
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's functions on a CPU


@pytest.fixture(autouse=True)
def no_handler_is_left():
    """What Hydra adds to the root logger writes to a stream that pytest closes after the test."""
    yield
    for handler in [h for h in logging.root.handlers if type(h) is logging.StreamHandler]:
        logging.root.removeHandler(handler)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The test runs in an empty directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(elsewhere, monkeypatch, capsys):
    """Runs a command in this process; returns exit code, standard output, standard error."""

    def run(command, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [command.__name__, *arguments])
        code = 0
        try:
            command.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return run


@pytest.fixture
def done(call):
    """Runs a command that must succeed; returns standard output, standard error."""

    def run(command, *arguments: str) -> tuple[str, str]:
        code, out, err = call(command, *arguments)
        assert code == 0, err
        return out, err

    return run


@pytest.fixture
def refused(call):
    """Runs a command that must exit with 1; returns its only error line."""
    from tests.commands import one_line

    def run(command, *arguments: str) -> str:
        code, _, err = call(command, *arguments)
        assert code == 1
        return one_line(err)

    return run


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> list[str]:
    """Overrides for the language-model experiment on a tiny model and text made here."""
    from tests.commands import SHORT
    from tests.tiny_lm import sentences, tiny_model

    root = tmp_path_factory.mktemp("lm")
    text = root / "text.txt"
    text.write_text("\n".join(sentences(300)))
    return [
        "+experiment=gpt2_l8",
        f"data.source.model={tiny_model(root / 'model')}",
        f"data.source.text={text}",
        "data.source.hook_names=[blocks.1.hook_resid_pre]",
        "data.source.context=32",
        "data.source.tokens=4000",
        "data.source.chunk_tokens=1024",
        "data.source.val_fraction=0.2",
        "data.batch_tokens=128",
        "model.d_sae=64",
        "model.k=4",
        "model.schedule.warmup_steps=5",
        "evaluation.ce_sequences=4",
        *SHORT,
    ]
