"""`auto` on a GPU: what was timed there decides, and its reason is said."""

import json
from unittest.mock import Mock

import pytest
import torch

from msae.sae import MatryoshkaSAE, automatic, choose_kernels, fast
from msae.sae.fast import measured, triton

H100 = {"card": "NVIDIA H100", "capability": "9.0", "torch": "2.11", "triton": "3.6", "precision": "bfloat16"}


def timed(d_in: int, d_sae: int, dense_ms: float, triton_ms: float, **others) -> dict:
    sizes = {"d_in": d_in, "d_sae": d_sae, "batch": 4096, "dense_ms": dense_ms, "triton_ms": triton_ms}
    return {**H100, **sizes, **others}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Gives the table these entries."""

    def write(*entries: dict) -> None:
        measured.choose.cache_clear()
        monkeypatch.setattr(measured, "TABLE", tmp_path / "measured.json")
        measured.TABLE.write_text(json.dumps(entries))

    yield write
    measured.choose.cache_clear()


def test_the_table_of_the_package_can_be_read() -> None:
    for entry in json.loads(measured.TABLE.read_text()):
        assert measured.Timed(**entry).gain > 0


def test_without_figures_of_a_card_it_is_dense(table) -> None:
    table(timed(768, 24_576, 9.0, 3.0))
    kernels, why = measured.choose("NVIDIA A100", "8.0", 768, 24_576)
    assert kernels == "dense"
    assert why.startswith("triton was not timed on NVIDIA A100: python benchmarks/gpu.py, or model.kernels=triton")


@pytest.mark.parametrize("card", ["NVIDIA H100", "NVIDIA H200"])  # of one capability
def test_the_nearest_size_decides_by_its_least_gain(table, card) -> None:
    table(
        timed(768, 24_576, 9.0, 3.0),
        timed(768, 24_576, 9.0, 4.5, batch=16_384),
        timed(2304, 65_536, 9.0, 3.0),
        timed(2304, 65_536, 9.0, 10.0, precision="float32"),
    )
    assert measured.choose(card, "9.0", 1024, 24_576) == (
        "triton",
        "2.00 × as fast as dense at 768 × 24,576 on NVIDIA H100",
    )
    kernels, why = measured.choose(card, "9.0", 2304, 100_000)
    assert kernels == "dense"
    assert why == "triton took 1.11 × as long at 2304 × 65,536 on NVIDIA H100"
    assert measured.choose(card, "9.0", 64, 24_576).kernels == "dense"  # a twelfth of the smallest that was timed


def test_figures_of_the_card_itself_come_before_those_of_its_kind(table) -> None:
    table(timed(768, 24_576, 9.0, 3.0), timed(768, 24_576, 3.0, 9.0, card="NVIDIA H200"))
    assert measured.choose("NVIDIA H100", "9.0", 768, 24_576).kernels == "triton"
    assert measured.choose("NVIDIA H200", "9.0", 768, 24_576).kernels == "dense"


@pytest.mark.parametrize("has_triton", [True, False])
def test_an_sae_on_a_gpu_asks_the_table_and_says_why(table, has_triton, monkeypatch) -> None:
    table(timed(768, 24_576, 9.0, 3.0))
    monkeypatch.setattr(triton, "library", lambda: Mock(INTERPRETED=False) if has_triton else None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    weight = Mock(device=torch.device("cuda"), dtype=torch.float32, shape=(768, 24_576), numel=lambda: 768 * 24_576)
    fast.on_gpu.cache_clear()
    sae = Mock(spec=MatryoshkaSAE)
    sae.W_enc, sae.kernels = weight, "auto"
    kernels, why = automatic(sae)
    assert kernels == choose_kernels(sae) == ("triton" if has_triton else "dense")
    assert ("as fast as dense" if has_triton else "needs the package triton") in why
    weight.dtype = torch.bfloat16
    assert choose_kernels(sae) == "dense"
    fast.on_gpu.cache_clear()


def test_on_a_cpu_it_gives_no_reason() -> None:
    assert automatic(MatryoshkaSAE(64, 512, [512], 4)).why == ""
