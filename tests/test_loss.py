"""The loss and its gradients against plain loops: levels and their weights, penalties, AuxK, orthogonality."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from msae.sae import AuxK, DenseCode, MatryoshkaSAE, Objective, auxk_loss, matryoshka_loss
from msae.sae.loss import orthogonality_penalty
from tests.test_model import SPARSITIES, WEIGHTS, make, rows


def naive_loss(sae: MatryoshkaSAE, x: Tensor) -> Tensor:
    """Per prefix: one row, one latent at a time; BatchTopK by sorting Python floats."""
    s, n = float(sae.scale), len(x)
    pre = [
        [
            sae.b_enc[j] + sum((s * x[i, c] - sae.b_dec[c]) * sae.W_enc[c, j] for c in range(sae.d_in))
            for j in range(sae.d_sae)
        ]
        for i in range(n)
    ]
    order = sorted(((float(pre[i][j].detach()), i, j) for i in range(n) for j in range(sae.d_sae)), reverse=True)
    kept = {(i, j) for value, i, j in order[: round(sae.k * n)] if value > 0}
    losses = []
    for width in sae.prefixes:
        error = torch.zeros((), dtype=x.dtype)
        for i in range(n):
            for c in range(sae.d_in):
                recon = sae.b_dec[c] + sum(pre[i][j] * sae.W_dec[j, c] for j in range(width) if (i, j) in kept)
                error = error + (s * x[i, c] - recon) ** 2
        losses.append(error / n)
    return torch.stack(losses)


def gradients(total: Tensor, sae: MatryoshkaSAE, names: tuple[str, ...] = WEIGHTS) -> dict[str, Tensor]:
    found = torch.autograd.grad(total, [getattr(sae, n) for n in names], retain_graph=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_close(a, b, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-12)


# --- loss and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefixes", "k", "seed"), [([2, 3, 6], 2, 0), ([1, 6], 1.5, 1), ([6], 3, 2), ([1, 2, 3, 4, 5, 6], 6, 3)]
)
def test_loss_and_gradients_equal_a_plain_loop(prefixes, k, seed) -> None:
    sae, x = make(prefixes=prefixes, k=k, seed=seed), rows(5, 4)
    loss = matryoshka_loss(sae, x)
    naive = naive_loss(sae, x)
    torch.testing.assert_close(loss.levels, naive.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.total, naive.sum(), rtol=1e-12, atol=0)
    assert_close(gradients(loss.total, sae), gradients(naive.sum(), sae))


def test_gradients_equal_finite_differences() -> None:
    sae, x, step = make(), rows(5, 4), 1e-6
    reference = matryoshka_loss(sae, x)
    found = torch.autograd.grad(reference.total, list(sae.parameters()))
    for parameter, gradient in zip(sae.parameters(), found, strict=True):
        flat, gradient = (parameter.data.T, gradient.T) if parameter is sae.W_enc else (parameter.data, gradient)
        flat = flat.view(-1)
        for i, analytic in enumerate(gradient.flatten().tolist()):
            ends, value = [], float(flat[i])
            for sign in (1, -1):
                flat[i] = value + sign * step
                moved = matryoshka_loss(sae, x)
                assert torch.equal(moved.acts > 0, reference.acts > 0), "the active set changed"
                ends.append(float(moved.total.detach()))
            flat[i] = value
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(analytic, rel=1e-6, abs=1e-6)


def test_every_prefix_gives_gradient_to_its_own_latents_only() -> None:
    sae, x = make(k=6), rows(20, 4)
    pre = sae.pre(x)
    for width, recon in zip(sae.prefixes, sae.decode_prefixes(sae.select(pre)), strict=True):
        sae.zero_grad()
        (x * sae.scale - recon).square().sum().backward(retain_graph=True)
        for per_latent in (sae.W_enc.grad.T, sae.b_enc.grad[:, None], sae.W_dec.grad):
            assert (per_latent[:width] != 0).all()
            assert (per_latent[width:] == 0).all()
        assert (sae.b_dec.grad != 0).all()


def test_one_prefix_is_a_vanilla_sae() -> None:
    sae, x = make(prefixes=[6]), rows(9, 4)
    pre = (1.7 * x - sae.b_dec) @ sae.W_enc + sae.b_enc
    bar = pre.flatten().sort(descending=True).values[2 * 9 - 1]
    acts = torch.where((pre >= bar) & (pre > 0), pre, 0.0)
    recon = acts @ sae.W_dec + sae.b_dec
    loss = ((1.7 * x - recon) ** 2).sum() / 9
    ours = matryoshka_loss(sae, x)
    torch.testing.assert_close(ours.total, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.acts, acts.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("k", "acts", "levels"),
    [
        (1, [[2.0, 0.0, 1.2], [0.0, 0.0, 0.0]], [0.5, (1.44 + 1) / 2]),  # both places go to the first row
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
    torch.testing.assert_close(loss.acts, torch.tensor(acts, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss.levels, torch.tensor(levels, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(loss.total.detach()) == pytest.approx(sum(levels), rel=1e-6)


def test_a_transcoder_reconstructs_its_target() -> None:
    sae, x, y = make(d_out=3), rows(7, 4), rows(7, 3, 2)
    with torch.no_grad():
        sae._buffers["output_scale"].fill_(0.4), sae._buffers["output_mean"].fill_(-2), sae.mean.fill_(0.3)
    loss = matryoshka_loss(sae, x, target=y)
    acts = sae.select((x - 0.3) * 1.7 @ sae.W_enc + sae.b_enc)  # b_dec is not of its input's space
    levels = [((y + 2) * 0.4 - acts[:, :w] @ sae.W_dec[:w] - sae.b_dec).square().sum(1).mean() for w in sae.prefixes]
    torch.testing.assert_close(loss.levels, torch.stack(levels).detach(), rtol=1e-12, atol=0)
    assert_close(gradients(loss.total, sae), gradients(sum(levels), sae))


# --- levels and their weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Objective(), [1, 1, 1]),
        (Objective(reduction="mean"), [1 / 3] * 3),
        (Objective(reduction="mean_twice"), [1 / 9] * 3),
        (Objective(reduction=[3, 0.5, 2]), [3, 0.5, 2]),
        (Objective(balance=0.5), [0.25, 0.5, 1]),
        (Objective(balance=0), [0, 0, 1]),
        (Objective(reduction="mean", balance=2), [4 / 3, 2 / 3, 1 / 3]),
    ],
    ids=str,
)
def test_weights_of_the_levels(objective, expected) -> None:
    assert objective.weights(3).tolist() == pytest.approx(expected, rel=1e-15)
    sae, x = make(), rows(7, 4)
    loss = matryoshka_loss(sae, x, objective)
    naive = (naive_loss(sae, x) * torch.tensor(expected, dtype=torch.float64)).sum()
    assert_close(loss.total, naive)
    assert_close(gradients(loss.total, sae), gradients(naive, sae))


def test_impossible_weights_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^model\.balance=-1 must not be negative[^\n]*$"):
        Objective(balance=-1)
    with pytest.raises(ValueError, match=r"^model\.reduction=\[1, -2\] has a negative weight$"):
        Objective(reduction=[1, -2])
    with pytest.raises(ValueError, match=r"^model\.reduction has 2 weights for 3 levels; give one for each prefix$"):
        Objective(reduction=[1, 2]).weights(3)
    with pytest.raises(ValueError, match=r"each prefix, the first for b_dec alone$"):
        Objective(reduction=[1, 2], bias_level=True).weights(3)
    with pytest.raises(ValueError, match=r"^model\.aux\.coefficient=-1 must not be negative$"):
        AuxK(coefficient=-1)
    with pytest.raises(ValueError, match=r"^model\.aux\.k=0 must be at least 1$"):
        AuxK(k=0)


def test_the_bias_level_is_b_dec_alone() -> None:
    sae, x = make(), rows(7, 4)
    loss = matryoshka_loss(sae, x, Objective(bias_level=True, reduction=[5, 1, 1, 2]))
    alone = (1.7 * x - sae.b_dec).square().sum(1).mean()
    naive = torch.cat([alone[None], naive_loss(sae, x)])
    torch.testing.assert_close(loss.levels, naive.detach(), rtol=1e-12, atol=0)
    assert_close(gradients(loss.total, sae), gradients(naive @ torch.tensor([5, 1, 1, 2.0]).double(), sae))


def test_the_mean_error_is_the_sum_over_the_width() -> None:
    sae, x = make(), rows(7, 4)
    summed, mean = (matryoshka_loss(sae, x, Objective(error=error)) for error in ("sum", "mean"))
    assert_close(mean.levels, summed.levels / 4)
    assert_close(mean.total, summed.total / 4)


def test_with_stop_gradient_each_level_moves_its_own_group_alone() -> None:
    sae, x = make(k=6), rows(20, 4)
    loss = matryoshka_loss(sae, x, Objective(stop_gradient=True))
    assert_close(loss.levels, matryoshka_loss(sae, x).levels)
    acts, groups = sae.select(sae.pre(x)), list(pairwise([0, *sae.prefixes]))
    total, recon = torch.zeros((), dtype=x.dtype), sae.b_dec
    for start, stop in groups:
        recon = recon + acts[:, start:stop] @ sae.W_dec[start:stop]
        total = total + (1.7 * x - recon).square().sum(1).mean()
        recon = recon.detach()
    assert_close(loss.total, total)
    assert_close(gradients(loss.total, sae), gradients(total, sae))


def test_with_stop_gradient_b_dec_belongs_to_the_first_level() -> None:
    sae, x = make(k=6, apply_b_dec_to_input=False), rows(20, 4)
    loss = matryoshka_loss(sae, x, Objective(stop_gradient=True))
    first = sae.decode_prefixes(sae.select(sae.pre(x)))[0]
    assert_close(gradients(loss.total, sae)["b_dec"], gradients((1.7 * x - first).square().sum(1).mean(), sae)["b_dec"])


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("bias_level", [False, True])
@pytest.mark.parametrize("rescaled", [False, True])
def test_every_width_at_once_is_the_sum_of_all_widths(sparsity, bias_level, rescaled) -> None:
    sae, x = make(sparsity=sparsity, rescale_acts_by_decoder_norm=rescaled), rows(300, 4)  # more than one part of rows
    dead = torch.tensor([False, True, False, False, True, False])
    objective = Objective("mean", balance=0.9, bias_level=bias_level, error="mean", orthogonality=0.1)
    loss, each = (matryoshka_loss(sae, x, objective, dead, None, w, 0.3) for w in ("every", [1, 2, 3, 4, 5, 6]))
    assert_close(loss.total, each.total)
    assert_close(loss.levels, (objective.weights(6 + bias_level) @ each.levels)[None])
    assert_close(loss.sparsity, each.sparsity)
    assert_close(gradients(loss.total, sae), gradients(each.total, sae))


def test_every_width_at_once_where_nothing_is_active() -> None:
    sae, x = make(), rows(5, 4)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    loss = matryoshka_loss(sae, x, prefixes="every")
    assert_close(loss.total, 6 * (1.7 * x - sae.b_dec).square().sum(1).mean())
    loss.total.backward()
    assert not sae.W_enc.grad.any()


@pytest.mark.parametrize("objective", [Objective(stop_gradient=True), Objective(aux=AuxK(per_level=True))])
def test_every_width_at_once_refuses_what_it_does_not_know(objective) -> None:
    with pytest.raises(ValueError, match=r"^every prefix at once knows neither[^\n]*$"):
        matryoshka_loss(make(), rows(5, 4), objective, prefixes="every")


def test_a_draw_of_prefixes_takes_the_place_of_the_saes_own() -> None:
    sae, x = make(), rows(7, 4)
    drawn = make(prefixes=[1, 5, 6])
    assert torch.equal(matryoshka_loss(sae, x, prefixes=[1, 5, 6]).levels, matryoshka_loss(drawn, x).levels)


def test_a_code_that_is_known_is_not_computed_again() -> None:
    sae, x = make(), rows(7, 4)
    pre, acts = sae.pre(x), sae.select(sae.pre(x)) * 0.5
    loss = matryoshka_loss(sae, x, code=DenseCode(pre, acts))
    assert torch.equal(loss.acts, acts.detach())
    assert_close(loss.levels[-1], (1.7 * x - acts @ sae.W_dec - sae.b_dec).square().sum(1).mean().detach())


# --- penalties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("sparsity", ["l1", "log"])
def test_a_latent_pays_once_for_every_level_that_it_serves(sparsity, rescaled) -> None:
    sae, x = make(sparsity=sparsity, rescale_acts_by_decoder_norm=rescaled), rows(7, 4)
    objective = Objective([0.5, 2, 3, 1], bias_level=True)
    loss = matryoshka_loss(sae, x, objective, sparsity_weight=0.3)
    norm = sae.W_dec.norm(dim=1)
    paid = ((1.7 * x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu() * norm  # rescaled or not: a ‖row‖
    phi = paid if sparsity == "l1" else torch.log((paid + 0.1) / 0.1)
    penalty = sum(w * phi[:, :m].sum(1).mean() for m, w in zip((2, 3, 6), (2, 3, 1), strict=True))
    without = matryoshka_loss(sae, x, objective)
    assert_close(loss.sparsity, penalty.detach())
    assert_close(loss.total, without.total + 0.3 * penalty)
    assert_close(gradients(loss.total, sae), gradients(without.total + 0.3 * penalty, sae))


@pytest.mark.parametrize("objective", [Objective(), Objective(bias_level=True, balance=0.3)])
def test_jumprelu_pays_for_l0_once(objective) -> None:
    sae, x = make(sparsity="jumprelu", bandwidth=0.5), rows(20, 4)
    loss, without = (matryoshka_loss(sae, x, objective, sparsity_weight=w) for w in (0.3, 0.0))
    l0 = (sae.pre(x) > sae.threshold).sum(1).double()
    assert_close(loss.sparsity, (2 / 2 * (l0 - 2).square()).mean())
    assert_close(loss.total, without.total + 0.3 * loss.sparsity)
    ours, other = (gradients(part.total, sae, ("threshold", "W_enc")) for part in (loss, without))
    assert (ours["threshold"] != other["threshold"]).any()
    assert torch.equal(ours["W_enc"], other["W_enc"])


@pytest.mark.parametrize("sparsity", ["batch_topk", "topk"])
def test_what_counts_its_latents_pays_nothing(sparsity) -> None:
    sae, x = make(sparsity=sparsity), rows(7, 4)
    loss = matryoshka_loss(sae, x, sparsity_weight=9.0)
    assert float(loss.sparsity) == 0
    assert torch.equal(loss.total, matryoshka_loss(sae, x).total)


def test_orthogonality_is_the_mean_of_the_largest_squared_cosines() -> None:
    rows_ = rows(9, 4).requires_grad_()
    cosine = torch.nn.functional.cosine_similarity(rows_[:, None], rows_[None], dim=2)
    expected = sum(max(cosine[i, j] ** 2 for j in range(9) if j != i) for i in range(9)) / 9
    found = orthogonality_penalty(rows_, 100)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, rows_)[0], torch.autograd.grad(expected, rows_)[0])
    assert float(orthogonality_penalty(torch.eye(4), 100)) == 0
    sae, x = make(), rows(7, 4)
    having, without = (matryoshka_loss(sae, x, Objective(orthogonality=g)) for g in (0.25, 0.0))
    assert_close(having.total, without.total + 0.25 * orthogonality_penalty(sae.W_dec, 100))
    assert float(without.orthogonality) == 0


def test_orthogonality_in_chunks_compares_within_them_alone() -> None:
    pairs = torch.eye(4).repeat_interleave(2, 0)  # every row has one twin
    assert float(orthogonality_penalty(pairs, 8)) == 1
    assert float(orthogonality_penalty(pairs, 1)) == 0
    torch.manual_seed(0)
    found = [float(orthogonality_penalty(pairs, 4)) for _ in range(400)]
    assert sum(found) / 400 == pytest.approx(3 / 7, abs=0.05)  # the twin is among 3 of 7 others
    assert len(set(found)) > 2  # dealt anew


# --- AuxK ------------------------------------------------------------------------------------------------------


def flags(*latents: int) -> Tensor:
    dead = torch.zeros(6, dtype=torch.bool)
    dead[list(latents)] = True
    return dead


def naive_aux(
    sae: MatryoshkaSAE, pre: Tensor, residual: Tensor, dead: Tensor, k_aux: int, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """Row by row, the k_aux largest dead latents, no b_dec in what they make: Σ‖e − ê‖² and Σ‖e‖²."""
    error, energy = torch.zeros((), dtype=pre.dtype), torch.zeros((), dtype=pre.dtype)
    for i in range(len(pre)):
        chosen = sorted(dead.nonzero().flatten().tolist(), key=lambda j: -float(pre[i, j].detach()))[:k_aux]
        values = [pre[i, j].relu() if relu else pre[i, j] for j in chosen]
        made = sum((v * sae.W_dec[j] for v, j in zip(values, chosen, strict=True)), torch.zeros(sae.d_in).double())
        error, energy = error + (residual[i] - made).square().sum(), energy + residual[i].square().sum()
    return error, energy


@pytest.mark.parametrize("k_aux", [1, 2, 100])
@pytest.mark.parametrize(
    "dead", [flags(1), flags(0, 3, 5), ~flags()], ids=lambda d: str(d.nonzero().flatten().tolist())
)
def test_auxk_equals_a_plain_loop(dead, k_aux) -> None:
    sae, x = make(), rows(5, 4)
    aux = AuxK(0.25, k_aux)
    loss = matryoshka_loss(sae, x, Objective(aux=aux), dead)
    pre = sae.pre(x)
    residual = (x * sae.scale - sae.decode_prefixes(sae.select(pre))[-1]).detach()
    error, energy = naive_aux(sae, pre, residual, dead, k_aux)
    naive = error / energy
    torch.testing.assert_close(loss.aux, naive.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.total, loss.levels.sum() + 0.25 * naive, rtol=1e-12, atol=0)

    found = gradients(auxk_loss(sae, pre, [residual], [6], dead, aux), sae, ("W_enc", "b_enc", "W_dec"))
    assert_close(found, gradients(naive, sae, ("W_enc", "b_enc", "W_dec")))
    for per_latent in (found["W_enc"].T, found["b_enc"][:, None], found["W_dec"]):
        assert (per_latent[~dead] == 0).all()
        assert (per_latent[dead].abs().sum() > 0).all()


@pytest.mark.parametrize(
    "aux",
    [
        AuxK(1.0, 2, normalise="none"),
        AuxK(1.0, 2, normalise="variance"),
        AuxK(1.0, 2, relu=False),
        AuxK(1.0, 4, scale_by_dead=True),
        AuxK(1.0, 2, scale_by_dead=True),
        AuxK(1.0, 2, detach=False),
        AuxK(1.0, None),
    ],
    ids=str,
)
def test_options_of_auxk_equal_a_plain_loop(aux) -> None:
    sae, x, dead = make(), rows(5, 4) - 1, flags(0, 3, 5)
    pre = sae.pre(x)
    e = x * sae.scale - sae.decode_prefixes(sae.select(pre))[-1]
    residual = e.detach() if aux.detach else e
    error, energy = naive_aux(sae, pre, residual, dead, aux.k or 2, aux.relu)  # d_in / 2 unless given
    centred = (e - e.mean(0)).square().sum()
    naive = error / {"energy": energy, "variance": centred, "none": torch.tensor(5)}[aux.normalise].detach()
    naive = naive * (3 / 4 if aux.scale_by_dead and aux.k == 4 else 1)
    loss, without = matryoshka_loss(sae, x, Objective(aux=aux), dead), matryoshka_loss(sae, x)
    assert_close(loss.aux, naive.detach())
    assert_close(gradients(loss.total, sae), gradients(without.total + naive, sae))
    assert (pre[:, dead].topk(2).values < 0).any()


def test_the_dead_of_each_group_reconstruct_what_their_level_leaves() -> None:
    sae, x, dead, aux = make(), rows(5, 4), flags(1, 2, 5), AuxK(0.25, 1, per_level=True)
    pre = sae.pre(x)
    recons = sae.decode_prefixes(sae.select(pre))
    expected = torch.zeros((), dtype=x.dtype)
    for (start, stop), recon in zip(pairwise([0, *sae.prefixes]), recons, strict=True):
        own = dead & (torch.arange(6) >= start) & (torch.arange(6) < stop)
        error, energy = naive_aux(sae, pre, (x * sae.scale - recon).detach(), own, 1)
        expected = expected + error / energy
    loss = matryoshka_loss(sae, x, Objective(aux=aux), dead)
    assert_close(loss.aux, expected.detach())
    with_bias = matryoshka_loss(sae, x, Objective(aux=aux, bias_level=True), dead)
    assert_close(with_bias.aux, expected.detach())  # b_dec alone has no latents
    one = matryoshka_loss(sae, x, Objective(aux=aux), flags(4))
    assert_close(one.aux, matryoshka_loss(sae, x, Objective(aux=AuxK(0.25, 1)), flags(4)).aux)


def test_an_unnormalised_auxk_is_averaged_as_the_error_is() -> None:
    sae, x, dead = make(), rows(5, 4), flags(1, 2)
    for normalise, share in (("none", 1 / 4), ("energy", 1.0), ("variance", 1.0)):
        summed, mean = (
            matryoshka_loss(sae, x, Objective(aux=AuxK(1.0, normalise=normalise), error=error), dead).aux
            for error in ("sum", "mean")
        )
        assert_close(mean, summed * share)


def test_aux_gradient_is_detached_from_the_living() -> None:
    """The auxiliary loss moves dead latents alone: its residual is a constant."""
    sae, x, dead = make(k=1), rows(5, 4), flags(1, 4)
    without = gradients(matryoshka_loss(sae, x).total, sae)
    having = gradients(matryoshka_loss(sae, x, Objective(aux=AuxK(10.0)), dead).total, sae)
    moved = [having[name] - without[name] for name in ("W_enc", "b_enc", "W_dec")]
    for per_latent in (moved[0].T, moved[1][:, None], moved[2]):
        assert per_latent[~dead].abs().max() < 1e-12
        assert per_latent[dead].abs().max() > 1e-3


def test_auxk_does_not_count_b_dec_twice() -> None:
    """Dead latents that make exactly what is left beside b_dec leave nothing; b_dec added again would leave 1."""
    sae = MatryoshkaSAE(2, 2, [1, 2], 1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(2))
        sae.W_enc.copy_(torch.eye(2))
        sae.b_dec.copy_(torch.tensor([5.0, -7.0]))
    x = torch.tensor([[9.0, -4.0]])  # pre = (4, 3): BatchTopK takes the first, (0, 3) is left for the second
    loss = matryoshka_loss(sae, x, dead=torch.tensor([False, True]))
    assert torch.equal(loss.acts, torch.tensor([[4.0, 0.0]]))
    assert float(loss.aux) == 0.0


@pytest.mark.parametrize("aux", [AuxK(), AuxK(detach=False), AuxK(per_level=True), AuxK(0.0)], ids=str)
@pytest.mark.parametrize("dead", [None, flags()], ids=["not counted", "none dead"])
def test_auxk_is_zero_when_none_is_dead(dead, aux) -> None:
    sae, x = make(), rows(5, 4)
    loss = matryoshka_loss(sae, x, Objective(aux=aux), dead)
    assert float(loss.aux) == 0.0
    torch.testing.assert_close(loss.total, loss.levels.sum())
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())


def test_auxk_without_a_coefficient_is_nothing() -> None:
    sae, x = make(), rows(5, 4)
    loss = matryoshka_loss(sae, x, Objective(aux=AuxK(0.0)), ~flags())
    assert float(loss.aux) == 0
    assert torch.equal(loss.total, matryoshka_loss(sae, x).total)


@pytest.mark.parametrize("aux", [AuxK(), AuxK(normalise="variance"), AuxK(per_level=True)], ids=str)
def test_auxk_is_zero_when_nothing_is_left(aux) -> None:
    sae = make()
    x = (sae.b_dec / sae.scale).detach().expand(5, -1)
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)  # no latent fires on b_dec: the reconstruction is perfect
    loss = matryoshka_loss(sae, x, Objective(aux=aux), ~flags())
    assert float(loss.aux) == 0.0
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())


def test_dead_latents_of_a_rescaled_sae_make_what_unit_rows_make() -> None:
    sae, x, dead = make(rescale_acts_by_decoder_norm=True), rows(5, 4), flags(0, 3, 5)
    pre = sae.pre(x)
    residual = rows(5, 4, 3)
    found = auxk_loss(sae, pre, [residual], [6], dead, AuxK(k=2))
    folded = make(rescale_acts_by_decoder_norm=True)
    folded.fold_decoder_norm()
    assert_close(found, auxk_loss(folded, folded.pre(x), [residual], [6], dead, AuxK(k=2)))


@pytest.mark.parametrize("sparsity", ["l1", "log", "jumprelu"])
def test_the_weight_of_the_penalty_does_not_change_the_type_of_the_loss(sparsity) -> None:
    sae, x = make(dtype=torch.float32, sparsity=sparsity), rows(5, 4, dtype=torch.float32)
    total = matryoshka_loss(sae, x, sparsity_weight=torch.tensor(0.5, dtype=torch.float64)).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, matryoshka_loss(sae, x, sparsity_weight=0.5).total, rtol=0, atol=0)
