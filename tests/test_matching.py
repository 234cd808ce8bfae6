"""The matching of latents and features: by hand, in blocks, and the sparse one against the exact one."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from msae.evaluation.matching import CANDIDATES, cosines, match, mcc, mcc_chance, mmcs, nearest, uniqueness

SHAPES = [(300, 300), (500, 200), (200, 500)]  # latents, features


def trained(d_sae: int, n: int) -> tuple[Tensor, Tensor]:
    """Latents as training leaves them: each near some feature, some features with several, others with none."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, 96, generator=generator)
    of = torch.randint(0, n, (d_sae,), generator=generator)
    noise = 2 * torch.rand(d_sae, 1, generator=generator) * torch.randn(d_sae, 96, generator=generator)
    return features[of] + noise, features


def unrelated(d_sae: int, n: int) -> tuple[Tensor, Tensor]:
    """Random latents."""
    return torch.randn(d_sae, 96, generator=torch.Generator().manual_seed(1)), trained(d_sae, n)[1]


def near_twins(d_sae: int, n: int) -> tuple[Tensor, Tensor]:
    """A hundred near-twins of each feature, and latents of zeros: more of them than there are candidates."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(9, 96, generator=generator)
    W_dec, features = (
        centres[torch.randint(0, 9, (size,), generator=generator)] + 0.4 * torch.randn(size, 96, generator=generator)
        for size in (d_sae, n)
    )
    return torch.cat([torch.zeros(2 * CANDIDATES, 96), W_dec]), features


def test_a_matching_by_hand() -> None:
    W_dec, features = torch.tensor([[0.0, 2.0], [-3.0, 0.0], [3.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(cosines(W_dec, features), torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]]))
    matching = match(W_dec, features)
    assert [pairs.tolist() for pairs in matching] == [[0, 1], [1, 0], [1, -1]]
    assert matching.latent_of(2).tolist() == [1, 0]
    assert matching.feature_of(3).tolist() == [1, 0, -1]
    assert mcc(matching) == 1
    near = nearest(W_dec, features)
    assert near.feature.flatten().tolist() == [1, 0, 1]
    assert uniqueness(near) == pytest.approx(2 / 3)
    assert mmcs(near) == 1
    assert mmcs(nearest(W_dec[2:], features)) == pytest.approx((0.6 + 0.8) / 2)  # over features, not over latents
    assert mcc(match(W_dec[2:], features)) == pytest.approx(0.8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 7, 250])
def test_the_nearest_are_found_in_blocks(shape, k) -> None:
    W_dec, features = trained(*shape)
    near, cos = nearest(W_dec, features, k, block=37 * shape[1]), cosines(W_dec, features).abs()
    for value, index, of in ((near.latent_cos, near.feature, cos), (near.feature_cos, near.latent, cos.T)):
        assert value.shape == index.shape == (len(of), min(k, of.shape[1]))
        torch.testing.assert_close(value, of.topk(value.shape[1]).values)
        torch.testing.assert_close(of.gather(1, index), value)


@pytest.mark.parametrize(
    ("build", "shape", "gap"),
    [(build, shape, 1e-4) for build in (trained, unrelated) for shape in ((1200, 1200), (2000, 600), (600, 2000))]
    + [(near_twins, (900, 900), 0.02), (near_twins, (500, 900), 1e-3), (near_twins, (900, 500), 1e-3)],
)
def test_the_sparse_matching_is_nearly_the_exact_one(build, shape, gap) -> None:
    W_dec, features = build(*shape)
    exact, sparse = match(W_dec, features), match(W_dec, features, dense=0)
    for latent, feature, cos in (exact, sparse):
        assert len(latent.unique()) == len(feature.unique()) == len(cos) == min(len(W_dec), len(features))
        torch.testing.assert_close(cos, cosines(W_dec, features)[latent, feature])
    assert mcc(exact) * (1 - gap) <= mcc(sparse) <= mcc(exact) + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sparse_matching_is_the_best_among_its_candidates(shape) -> None:
    W_dec, features = trained(*shape)
    near, cos = nearest(W_dec, features, 2), cosines(W_dec, features).abs()
    candidate = torch.eye(*shape).bool()
    candidate.scatter_(1, near.feature, True)
    candidate.T.scatter_(1, near.latent, True)
    best = linear_sum_assignment(torch.where(candidate, cos, -99).numpy(), maximize=True)
    matching = match(W_dec, features, near, dense=0)
    assert candidate[matching.latent, matching.feature].all()
    assert mcc(matching) == pytest.approx(float(cos[best].mean()), abs=1e-6)
    if shape[0] == shape[1]:  # where nobody has a choice, two candidates are too few
        assert mcc(matching) < mcc(match(W_dec, features)) * (1 - 1e-3)


def test_the_sparse_matching_undoes_a_permutation() -> None:
    features = torch.randn(700, 64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    matching = match(-features[order], features, dense=0)
    assert torch.equal(matching.feature_of(700), order)
    torch.testing.assert_close(matching.cos, -torch.ones(700))


def test_chance_is_that_of_random_directions() -> None:
    """0.13–0.15 for 4096 random latents and as many features at d_in 768; the same for the same seed."""
    features = torch.randn(4096, 768, generator=torch.Generator().manual_seed(0))  # of a random stream of its own
    assert 0.13 < mcc_chance(features, 4096) < 0.15
    assert mcc_chance(features[:50], 30) == mcc_chance(features[:50], 30) != mcc_chance(features[:50], 30, seed=1)
