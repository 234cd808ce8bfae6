"""The matching of latents and features: by hand, in blocks, and the sparse one against the exact one."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from msae.evaluation.matching import CANDIDATES, cosines, match, mcc, mcc_chance, mmcs, nearest, uniqueness

SHAPES = [(300, 300), (500, 200), (200, 500)]  # latents, features


def example(d_sae: int, n: int, d_in: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents as training leaves them: each near some feature, some features with several, others with none."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d_in, generator=generator)
    of = torch.randint(0, n, (d_sae,), generator=generator)
    noise = 2 * torch.rand(d_sae, 1, generator=generator) * torch.randn(d_sae, d_in, generator=generator)
    return features[of] + noise, features


def test_by_hand() -> None:
    W_dec, features = torch.tensor([[0.0, 2.0], [-3.0, 0.0], [3.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(cosines(W_dec, features), torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]]))
    found = match(W_dec, features)
    assert (found.latent.tolist(), found.feature.tolist(), found.cos.tolist()) == ([0, 1], [1, 0], [1, -1])
    assert found.latent_of(2).tolist() == [1, 0]
    assert found.feature_of(3).tolist() == [1, 0, -1]
    assert mcc(found) == 1
    near = nearest(W_dec, features)
    assert near.feature.flatten().tolist() == [1, 0, 1]
    assert uniqueness(near) == pytest.approx(2 / 3)
    assert mmcs(near) == 1
    assert mmcs(nearest(W_dec[2:], features)) == pytest.approx((0.6 + 0.8) / 2)  # over features, not over latents
    assert mcc(match(W_dec[2:], features)) == pytest.approx(0.8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 7, 250])
def test_nearest_in_blocks(shape, k) -> None:
    W_dec, features = example(*shape)
    near, cos = nearest(W_dec, features, k, block=37 * shape[1]), cosines(W_dec, features).abs()
    for value, index, of in ((near.latent_cos, near.feature, cos), (near.feature_cos, near.latent, cos.T)):
        assert value.shape == index.shape == (len(of), min(k, of.shape[1]))
        torch.testing.assert_close(value, of.topk(value.shape[1]).values)
        torch.testing.assert_close(of.gather(1, index), value)


@pytest.mark.parametrize("shape", [(1200, 1200), (2000, 600), (600, 2000)])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "random"])
def test_sparse_matching_is_nearly_the_exact_one(shape, trained) -> None:
    W_dec, features = example(*shape)
    if not trained:
        W_dec = torch.randn(shape[0], 96, generator=torch.Generator().manual_seed(1))
    exact, sparse = match(W_dec, features), match(W_dec, features, dense=0)
    for found in (exact, sparse):
        assert len(found.latent.unique()) == len(found.feature.unique()) == len(found.cos) == min(shape)
        torch.testing.assert_close(found.cos, cosines(W_dec, features)[found.latent, found.feature])
    assert mcc(exact) * (1 - 1e-4) <= mcc(sparse) <= mcc(exact) + 1e-6
    if shape[0] == shape[1]:  # where nobody has a choice, two candidates are too few
        assert mcc(match(W_dec, features, nearest(W_dec, features, 2), dense=0)) < mcc(exact) * (1 - 1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_matching_is_the_best_among_its_candidates(shape) -> None:
    W_dec, features = example(*shape)
    near, cos = nearest(W_dec, features, 2), cosines(W_dec, features).abs()
    candidate = torch.eye(*shape).bool()
    candidate.scatter_(1, near.feature, True)
    candidate.T.scatter_(1, near.latent, True)
    best = linear_sum_assignment(torch.where(candidate, cos, -99).numpy(), maximize=True)
    found = match(W_dec, features, near, dense=0)
    assert candidate[found.latent, found.feature].all()
    assert mcc(found) == pytest.approx(float(cos[best].mean()), abs=1e-6)


@pytest.mark.parametrize(("shape", "gap"), [((900, 900), 0.02), ((500, 900), 1e-3), ((900, 500), 1e-3)])
def test_sparse_matching_where_candidates_run_out(shape, gap) -> None:
    """A hundred near-twins of each feature, and rows of zeros: more of them than there are candidates."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(9, 96, generator=generator)
    W_dec, features = (
        centres[torch.randint(0, 9, (size,), generator=generator)] + 0.4 * torch.randn(size, 96, generator=generator)
        for size in shape
    )
    zeros = torch.zeros(2 * CANDIDATES, 96)
    exact = match(torch.cat([zeros, W_dec]), features)
    sparse = match(torch.cat([zeros, W_dec]), features, dense=0)
    assert len(sparse.latent.unique()) == len(sparse.feature.unique()) == len(exact.cos)
    assert mcc(exact) * (1 - gap) <= mcc(sparse) <= mcc(exact) + 1e-6


def test_perfect_dictionaries_are_found_sparsely() -> None:
    features = torch.randn(700, 64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    found = match(-features[order], features, dense=0)
    assert torch.equal(found.feature_of(700), order)
    torch.testing.assert_close(found.cos, -torch.ones(700))


def test_chance() -> None:
    """0.13–0.15 for 4096 random latents and as many features at d_in 768; the same for the same seed."""
    features = torch.randn(4096, 768, generator=torch.Generator().manual_seed(0))  # of a random stream of its own
    assert 0.13 < mcc_chance(features, 4096) < 0.15
    assert mcc_chance(features[:50], 30) == mcc_chance(features[:50], 30) != mcc_chance(features[:50], 30, seed=1)
