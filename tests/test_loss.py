"""The loss at its edges: what is impossible, zero, given, or of another type; `test_variants.py` writes it out."""

import pytest
import torch

from msae.sae import AuxK, DenseCode, MatryoshkaSAE, Objective, matryoshka_loss
from msae.sae.objective import orthogonality_penalty
from msae.settings import decode
from tests.test_model import every_sparsity, make, rows


@pytest.mark.parametrize(
    ("k", "acts", "levels"),
    [
        (1, [[2.0, 0.0, 1.2], [0.0, 0.0, 0.0]], [0.5, (1.44 + 1) / 2]),  # the first row has both
        (1.5, [[2.0, 0.0, 1.2], [0.0, 1.0, 0.0]], [0.5, 1.44 / 2]),
        (3, [[2.0, 0.0, 1.2], [0.0, 1.0, 0.8]], [0.5, (1.44 + 0.64) / 2]),  # zeros are never active
    ],
)
def test_two_by_three_by_hand(k, acts, levels) -> None:
    """x = (2, 0), (0, 1); latents (1, 0), (0, 1), (.6, .8): pre = (2, 0, 1.2), (0, 1, .8)."""
    sae = MatryoshkaSAE(2, 3, [1, 3], k).double()
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        sae.W_enc.copy_(sae.W_dec.T)
    loss = matryoshka_loss(sae, torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(loss.code.dense(), torch.tensor(acts, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss.levels, torch.tensor(levels, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(loss.total.detach()) == pytest.approx(sum(levels), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": -1}, r"o\.balance=-1: expected number ≥ 0"),
        ({"reduction": [1, -2]}, r"o\.reduction=[^\n]*-2\]?: expected [^\n]*list of number ≥ 0"),
        ({"reduction": [1, 2]}, r"model\.objective\.reduction has 2 weights for 3 levels; give one for each prefix"),
        ({"reduction": [1, 2], "bias_level": True}, r"model\.[^\n]* for 4 levels; [^\n]*, the first for b_dec alone"),
        ({"aux": {"coefficient": -1}}, r"o\.aux\.coefficient=-1: expected number ≥ 0"),
        ({"aux": {"k": 0}}, r"o\.aux\.k=0: expected int ≥ 1 \| null"),
        ({"terms": {"orthogonal": 1}}, r"model\.objective\.terms has orthogonal; there is orthogonality"),
        ({"stop_gradient": True}, r"every prefix at once knows neither [^\n]*"),
        ({"aux": {"per_level": True}}, r"every prefix at once knows neither [^\n]*"),
    ],
    ids=str,
)
def test_impossible_objectives_are_one_line(settings, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        [decode(Objective, settings, "o").levels(make(), prefixes) for prefixes in (None, "every")]


def test_every_width_at_once_where_nothing_is_active() -> None:
    sae, x = make(), rows(5, 4)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    loss = matryoshka_loss(sae, x, prefixes="every")
    torch.testing.assert_close(loss.total, 6 * (1.7 * x - sae.b_dec).square().sum(1).mean())
    loss.total.backward()
    assert not sae.W_enc.grad.any()


def test_a_code_that_is_known_is_not_computed_again() -> None:
    sae, x = make(), rows(7, 4)
    pre, acts = sae.pre(x), sae.select(sae.pre(x)) * 0.5
    loss = matryoshka_loss(sae, x, code=DenseCode(pre, acts))
    assert torch.equal(loss.code.dense(), acts.detach())
    error = (1.7 * x - acts @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    torch.testing.assert_close(loss.levels[-1], error.detach())


@every_sparsity
def test_the_weight_of_the_penalty_may_be_a_tensor_of_another_type(sparsity) -> None:
    sae, x = make(dtype=torch.float32, sparsity=sparsity), rows(5, 4, dtype=torch.float32)
    loss = matryoshka_loss(sae, x, sparsity_weight=torch.tensor(0.5, dtype=torch.float64))
    assert loss.total.dtype == torch.float32
    assert torch.equal(loss.total, matryoshka_loss(sae, x, sparsity_weight=0.5).total)
    is_free = sparsity in ("batch_topk", "topk")  # what counts its latents pays nothing
    assert is_free == (float(loss.sparsity) == 0) == torch.equal(loss.total, matryoshka_loss(sae, x).total)


def test_orthogonality_in_chunks_compares_within_them_alone() -> None:
    pairs = torch.eye(4).repeat_interleave(2, 0)  # every row has one twin
    assert float(orthogonality_penalty(pairs, 8)) == 1
    assert float(orthogonality_penalty(pairs, 1)) == 0
    torch.manual_seed(0)
    penalties = [float(orthogonality_penalty(pairs, 4)) for _ in range(400)]
    assert sum(penalties) / 400 == pytest.approx(3 / 7, abs=0.05)  # the twin is among 3 of 7 others
    assert len(set(penalties)) > 2  # dealt anew
    assert matryoshka_loss(make(), rows(7, 4), Objective(terms={"orthogonality": 0.0})).terms == {}


NONE, ALL = torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
ZERO = [(aux, dead, False) for aux in (AuxK(), AuxK(detach=False), AuxK(per_level=True)) for dead in (None, NONE)]
ZERO += [(AuxK(0.0), ALL, False)]
ZERO += [(aux, ALL, True) for aux in (AuxK(), AuxK(normalise="variance"), AuxK(per_level=True))]


@pytest.mark.parametrize(("aux", "dead", "is_perfect"), ZERO, ids=str)
def test_auxk_is_zero_where_none_is_dead_it_has_no_weight_or_nothing_is_left(aux, dead, is_perfect) -> None:
    sae, x = make(), rows(5, 4)
    if is_perfect:
        x = (sae.b_dec / sae.scale).detach().expand(5, -1)
        sae.b_enc.data.fill_(-1.0)  # no latent fires on b_dec
    loss = matryoshka_loss(sae, x, Objective(aux=aux), dead)
    assert float(loss.aux) == 0.0
    assert torch.equal(loss.total, matryoshka_loss(sae, x).total)
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())
