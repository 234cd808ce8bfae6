"""How an SAE starts: directions, norms and distributions of its weights, and the geometric median."""

import math

import pytest
import torch
from torch import Tensor

from msae.sae import MatryoshkaSAE, geometric_median
from msae.sae.initial import initial_weights
from tests.test_model import rows

every_init = pytest.mark.parametrize("init", ["tied", "tied_uniform", "uniform", "normal"])


@pytest.mark.parametrize("norm", [1.0, 0.1])
@every_init
def test_initial_weights_have_the_norms_and_the_distribution_of_their_name(init, norm) -> None:
    d_in, d_sae = 40, 2000
    W_enc, W_dec = initial_weights(d_in, d_sae, None, init, norm, seed=3)
    assert (W_enc.shape, W_dec.shape) == ((d_in, d_sae), (d_sae, d_in))
    torch.testing.assert_close(W_dec.norm(dim=1), torch.full((d_sae,), norm))
    torch.testing.assert_close(torch.nn.functional.normalize(W_enc.T, dim=1), W_dec / norm)  # the same directions
    assert torch.equal(W_enc, W_dec.T) == init.startswith("tied")
    kurtosis = float((W_enc / W_enc.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3 if init in ("tied", "normal") else 1.8, abs=0.2)  # normal, uniform
    if init == "normal":
        assert float(W_enc.std()) == pytest.approx(1 / math.sqrt(d_in), rel=0.01)
    if init == "uniform":
        bound = math.sqrt(6 / d_sae)
        assert 0.999 * bound < float(W_enc.abs().max()) <= bound
        assert float(W_enc.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)


@every_init
def test_a_transcoders_decoder_has_random_directions_of_its_own(init) -> None:
    W_enc, W_dec = initial_weights(30, 500, 30, init, 0.5, seed=3)
    assert torch.equal(W_enc, initial_weights(30, 500, None, init, 0.5, seed=3)[0])
    torch.testing.assert_close(W_dec.norm(dim=1), torch.full((500,), 0.5))
    cosine = torch.nn.functional.cosine_similarity(W_enc.T, W_dec)
    assert float(cosine.abs().max()) < 0.8
    assert float(cosine.mean()) == pytest.approx(0, abs=4 / math.sqrt(30 * 500))
    assert initial_weights(30, 500, 7, init, 0.5, seed=3)[1].shape == (500, 7)


def test_seed_decides_the_weights() -> None:
    first, again, other = (MatryoshkaSAE(4, 8, [8], 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)
    assert torch.equal(first.W_enc, first.W_dec.T)  # tied, rows of norm 1 unless asked for otherwise
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("seed", range(3))
def test_geometric_median_minimises_the_sum_of_distances(seed) -> None:
    points = rows(100, 3, seed).exp()  # skewed: far from the mean
    median = geometric_median(points, tolerance=1e-9)
    minimiser = points.mean(0).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([minimiser], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def distances() -> Tensor:
        optimizer.zero_grad()
        total = (points - minimiser).norm(dim=1).sum()
        total.backward()
        return total

    optimizer.step(distances)
    torch.testing.assert_close(median, minimiser.detach(), rtol=0, atol=1e-5)
    assert (median - points.mean(0)).norm() > 0.1


@pytest.mark.parametrize(("points", "median"), [([-3, 0, 1, 1, 1], 1), ([0, 0, 0, 2, 2, -4], 0), ([2, 2, 2], 2)])
def test_geometric_median_is_not_held_by_a_point_that_the_mean_lies_on(points, median) -> None:
    assert float(geometric_median(torch.tensor(points).float()[:, None])) == pytest.approx(median, abs=1e-3)
