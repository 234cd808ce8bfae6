"""The loss and its gradients against plain loops: levels and their weights, penalties, AuxK, orthogonality."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from msae.sae import AuxK, DenseCode, MatryoshkaSAE, Objective, auxk_loss, fold_decoder_norm, matryoshka_loss
from msae.sae.objective import orthogonality_penalty
from msae.settings import decode
from tests.test_model import WEIGHTS, every_sparsity, make, rows


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
    grads = torch.autograd.grad(total, [getattr(sae, n) for n in names], retain_graph=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def assert_close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def assert_same_total(sae: MatryoshkaSAE, total: Tensor, expected: Tensor) -> None:
    """The same loss with the same gradients."""
    assert_close(total, expected)
    assert_close(gradients(total, sae), gradients(expected, sae))


# --- levels and their weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefixes", "k", "seed"), [([2, 3, 6], 2, 0), ([1, 6], 1.5, 1), ([6], 3, 2), ([1, 2, 3, 4, 5, 6], 6, 3)]
)
def test_loss_and_gradients_equal_a_plain_loop(prefixes, k, seed) -> None:
    sae, x = make(prefixes=prefixes, k=k, seed=seed), rows(5, 4)
    loss, naive = matryoshka_loss(sae, x), naive_loss(sae, x)
    torch.testing.assert_close(loss.levels, naive.detach(), rtol=1e-12, atol=0)
    assert_same_total(sae, loss.total, naive.sum())


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
    torch.testing.assert_close(loss.acts, torch.tensor(acts, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss.levels, torch.tensor(levels, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(loss.total.detach()) == pytest.approx(sum(levels), rel=1e-6)


def test_a_transcoder_reconstructs_its_target() -> None:
    sae, x, y = make(d_out=3), rows(7, 4), rows(7, 3, 2)
    with torch.no_grad():
        sae.target_scale.fill_(0.4), sae.target_mean.fill_(-2), sae.mean.fill_(0.3)
    loss = matryoshka_loss(sae, x, target=y)
    acts = sae.select((x - 0.3) * 1.7 @ sae.W_enc + sae.b_enc)  # b_dec is not of its input's space
    levels = [((y + 2) * 0.4 - acts[:, :w] @ sae.W_dec[:w] - sae.b_dec).square().sum(1).mean() for w in sae.prefixes]
    assert_close(loss.levels, torch.stack(levels).detach())
    assert_same_total(sae, loss.total, sum(levels))


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
    naive = (naive_loss(sae, x) * torch.tensor(expected, dtype=torch.float64)).sum()
    assert_same_total(sae, matryoshka_loss(sae, x, objective).total, naive)


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


def test_the_bias_level_is_b_dec_alone() -> None:
    sae, x = make(), rows(7, 4)
    loss = matryoshka_loss(sae, x, Objective(bias_level=True, reduction=[5, 1, 1, 2]))
    alone = (1.7 * x - sae.b_dec).square().sum(1).mean()
    naive = torch.cat([alone[None], naive_loss(sae, x)])
    assert_close(loss.levels, naive.detach())
    assert_same_total(sae, loss.total, naive @ torch.tensor([5, 1, 1, 2.0]).double())


@pytest.mark.parametrize("applied", [True, False])
def test_with_stop_gradient_each_level_moves_its_own_group_alone(applied) -> None:
    """And b_dec, through the reconstruction, belongs to the first level."""
    sae, x = make(k=6, apply_b_dec_to_input=applied), rows(20, 4)
    loss = matryoshka_loss(sae, x, Objective(stop_gradient=True))
    assert_close(loss.levels, matryoshka_loss(sae, x).levels)
    acts, total, recon = sae.select(sae.pre(x)), torch.zeros((), dtype=x.dtype), sae.b_dec
    for start, stop in pairwise([0, *sae.prefixes]):
        recon = recon + acts[:, start:stop] @ sae.W_dec[start:stop]
        total = total + (1.7 * x - recon).square().sum(1).mean()
        recon = recon.detach()
    assert_same_total(sae, loss.total, total)


@every_sparsity
@pytest.mark.parametrize("bias_level", [False, True])
@pytest.mark.parametrize("rescaled", [False, True])
def test_every_width_at_once_is_the_sum_of_all_widths(sparsity, bias_level, rescaled) -> None:
    sae, x = make(sparsity=sparsity, rescale_acts_by_decoder_norm=rescaled), rows(300, 4)  # more than one part of rows
    terms = {"orthogonality": 0.1}
    objective = Objective("mean", balance=0.9, bias_level=bias_level, error="mean", terms=terms)
    loss, each = (matryoshka_loss(sae, x, objective, flags(1, 4), None, w, 0.3) for w in ("every", [1, 2, 3, 4, 5, 6]))
    assert_close(loss.levels, (objective.weights(6 + bias_level) @ each.levels)[None])
    assert_close(loss.sparsity, each.sparsity)
    assert_same_total(sae, loss.total, each.total)


def test_every_width_at_once_where_nothing_is_active() -> None:
    sae, x = make(), rows(5, 4)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    loss = matryoshka_loss(sae, x, prefixes="every")
    assert_close(loss.total, 6 * (1.7 * x - sae.b_dec).square().sum(1).mean())
    loss.total.backward()
    assert not sae.W_enc.grad.any()


def test_a_draw_of_prefixes_takes_the_place_of_the_saes_own() -> None:
    x, drawn = rows(7, 4), [1, 5, 6]
    assert torch.equal(
        matryoshka_loss(make(), x, prefixes=drawn).levels, matryoshka_loss(make(prefixes=drawn), x).levels
    )


def test_a_code_that_is_known_is_not_computed_again() -> None:
    sae, x = make(), rows(7, 4)
    pre, acts = sae.pre(x), sae.select(sae.pre(x)) * 0.5
    loss = matryoshka_loss(sae, x, code=DenseCode(pre, acts))
    assert torch.equal(loss.acts, acts.detach())
    assert_close(loss.levels[-1], (1.7 * x - acts @ sae.W_dec - sae.b_dec).square().sum(1).mean().detach())


# --- penalties and terms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("sparsity", ["l1", "log"])
def test_a_latent_pays_once_for_every_level_that_it_serves(sparsity, rescaled) -> None:
    sae, x = make(sparsity=sparsity, rescale_acts_by_decoder_norm=rescaled), rows(7, 4)
    objective = Objective([0.5, 2, 3, 1], bias_level=True)
    loss, without = (matryoshka_loss(sae, x, objective, sparsity_weight=weight) for weight in (0.3, 0.0))
    lengths = ((1.7 * x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu() * sae.W_dec.norm(dim=1)  # rescaled or not
    phi = lengths if sparsity == "l1" else torch.log((lengths + 0.1) / 0.1)
    penalty = sum(w * phi[:, :m].sum(1).mean() for m, w in zip((2, 3, 6), (2, 3, 1), strict=True))
    assert_close(loss.sparsity, penalty.detach())
    assert_same_total(sae, loss.total, without.total + 0.3 * penalty)


@pytest.mark.parametrize("objective", [Objective(), Objective(bias_level=True, balance=0.3)])
def test_jumprelu_pays_for_l0_once(objective) -> None:
    sae, x = make(sparsity={"name": "jumprelu", "bandwidth": 0.5}), rows(20, 4)
    loss, without = (matryoshka_loss(sae, x, objective, sparsity_weight=w) for w in (0.3, 0.0))
    l0 = (sae.pre(x) > sae.threshold).sum(1).double()
    assert_close(loss.sparsity, (2 / 2 * (l0 - 2).square()).mean())
    assert_close(loss.total, without.total + 0.3 * loss.sparsity)
    ours, other = (gradients(part.total, sae, ("threshold", "W_enc")) for part in (loss, without))
    assert (ours["threshold"] != other["threshold"]).any()
    assert torch.equal(ours["W_enc"], other["W_enc"])


@every_sparsity
def test_the_weight_of_the_penalty_may_be_a_tensor_of_another_type(sparsity) -> None:
    sae, x = make(dtype=torch.float32, sparsity=sparsity), rows(5, 4, dtype=torch.float32)
    loss = matryoshka_loss(sae, x, sparsity_weight=torch.tensor(0.5, dtype=torch.float64))
    assert loss.total.dtype == torch.float32
    assert torch.equal(loss.total, matryoshka_loss(sae, x, sparsity_weight=0.5).total)
    is_free = sparsity in ("batch_topk", "topk")  # what counts its latents pays nothing
    assert is_free == (float(loss.sparsity) == 0) == torch.equal(loss.total, matryoshka_loss(sae, x).total)


def test_orthogonality_is_the_mean_of_the_largest_squared_cosines() -> None:
    directions = rows(9, 4).requires_grad_()
    cosine = torch.nn.functional.cosine_similarity(directions[:, None], directions[None], dim=2)
    expected = sum(max(cosine[i, j] ** 2 for j in range(9) if j != i) for i in range(9)) / 9
    penalty = orthogonality_penalty(directions, 100)
    assert_close(penalty, expected)
    assert_close(torch.autograd.grad(penalty, directions)[0], torch.autograd.grad(expected, directions)[0])
    assert float(orthogonality_penalty(torch.eye(4), 100)) == 0
    sae, x = make(), rows(7, 4)
    loss = matryoshka_loss(sae, x, Objective(terms={"orthogonality": 0.25}))
    assert_close(loss.terms["orthogonality"], orthogonality_penalty(sae.W_dec, 100).detach())
    assert_same_total(sae, loss.total, matryoshka_loss(sae, x).total + 0.25 * orthogonality_penalty(sae.W_dec, 100))
    assert matryoshka_loss(sae, x, Objective(terms={"orthogonality": 0.0})).terms == {}


def test_orthogonality_in_chunks_compares_within_them_alone() -> None:
    pairs = torch.eye(4).repeat_interleave(2, 0)  # every row has one twin
    assert float(orthogonality_penalty(pairs, 8)) == 1
    assert float(orthogonality_penalty(pairs, 1)) == 0
    torch.manual_seed(0)
    penalties = [float(orthogonality_penalty(pairs, 4)) for _ in range(400)]
    assert sum(penalties) / 400 == pytest.approx(3 / 7, abs=0.05)  # the twin is among 3 of 7 others
    assert len(set(penalties)) > 2  # dealt anew


# --- AuxK -------------------------------------------------------------------------------------------------------------


def flags(*latents: int) -> Tensor:
    dead = torch.zeros(6, dtype=torch.bool)
    dead[list(latents)] = True
    return dead


def naive_aux(sae: MatryoshkaSAE, pre: Tensor, e: Tensor, dead: Tensor, aux: AuxK) -> Tensor:
    """Row by row, the k largest dead latents, no b_dec in what they make: Σ‖e − ê‖² over what divides it."""
    error = torch.zeros((), dtype=pre.dtype)
    k, residual = aux.k or sae.d_out // 2, e.detach() if aux.detach else e
    for i in range(len(pre)):
        chosen = sorted(dead.nonzero().flatten().tolist(), key=lambda j: -float(pre[i, j].detach()))[:k]
        values = [pre[i, j].relu() if aux.relu else pre[i, j] for j in chosen]
        recon = sum((v * sae.W_dec[j] for v, j in zip(values, chosen, strict=True)), torch.zeros(sae.d_in).double())
        error = error + (residual[i] - recon).square().sum()
    energies = {"energy": e, "variance": e - e.mean(0)}
    scale = energies[aux.normalise].square().sum().detach() if aux.normalise in energies else len(pre)
    return error / scale * (min(int(dead.sum()) / k, 1) if aux.scale_by_dead else 1)


@pytest.mark.parametrize("dead", [flags(1), flags(0, 3, 5), ~flags()], ids=["one", "three", "all"])
@pytest.mark.parametrize(
    "aux",
    [
        *(AuxK(0.25, k) for k in (1, 2, 100, None)),
        *(AuxK(1.0, 2, normalise=normalise) for normalise in ("none", "variance")),
        *(AuxK(1.0, k, scale_by_dead=True) for k in (2, 4)),
        AuxK(1.0, 2, relu=False),
        AuxK(1.0, 2, detach=False),
    ],
    ids=str,
)
def test_auxk_equals_a_plain_loop(aux, dead) -> None:
    sae, x = make(), rows(9, 4)
    pre = sae.pre(x)
    e = x * sae.scale - sae.decode_prefixes(sae.select(pre))[-1]
    naive = naive_aux(sae, pre, e, dead, aux)
    loss, without = matryoshka_loss(sae, x, Objective(aux=aux), dead), matryoshka_loss(sae, x)
    assert_close(loss.aux, naive.detach())
    assert_same_total(sae, loss.total, without.total + aux.coefficient * naive)
    chosen = pre[:, dead].topk(min(aux.k or 2, int(dead.sum()))).values
    assert (chosen < 0).any() or dead.all()  # relu matters
    alone = gradients(auxk_loss(sae, pre, [e.detach()], [6], dead, aux), sae)
    for per_latent in (alone["W_enc"].T, alone["b_enc"], alone["W_dec"]):
        assert per_latent[dead].any()
        assert not per_latent[~dead].any()


def test_the_dead_of_each_group_reconstruct_what_their_level_leaves() -> None:
    sae, x, dead, aux = make(), rows(5, 4), flags(1, 2, 5), AuxK(0.25, 1, per_level=True)
    pre = sae.pre(x)
    groups = zip(pairwise([0, *sae.prefixes]), sae.decode_prefixes(sae.select(pre)), strict=True)
    latents = torch.arange(6)
    expected = sum(
        naive_aux(sae, pre, x * sae.scale - recon, dead & (latents >= start) & (latents < stop), aux)
        for (start, stop), recon in groups
    )
    for bias_level in (False, True):  # b_dec alone has no latents
        loss = matryoshka_loss(sae, x, Objective(aux=aux, bias_level=bias_level), dead)
        assert_close(loss.aux, expected.detach())
    one, of_all = (matryoshka_loss(sae, x, Objective(aux=a), flags(4)).aux for a in (aux, AuxK(0.25, 1)))
    assert_close(one, of_all)


@pytest.mark.parametrize(("normalise", "share"), [("none", 1 / 4), ("energy", 1.0), ("variance", 1.0)])
def test_a_mean_error_is_the_sum_over_the_width_and_so_is_auxk_if_unnormalised(normalise, share) -> None:
    sae, x, aux = make(), rows(5, 4), AuxK(1.0, normalise=normalise)
    summed, mean = (matryoshka_loss(sae, x, Objective(aux=aux, error=e), flags(1, 2)) for e in ("sum", "mean"))
    assert_close(mean.levels, summed.levels / 4)
    assert_close(mean.aux, summed.aux * share)
    assert_close(mean.total, mean.levels.sum() + mean.aux)


NOBODY = [(aux, dead) for aux in (AuxK(), AuxK(detach=False), AuxK(per_level=True)) for dead in (None, flags())]


@pytest.mark.parametrize(("aux", "dead"), [*NOBODY, (AuxK(0.0), ~flags())], ids=str)
def test_auxk_is_zero_where_none_is_dead_or_it_has_no_weight(aux, dead) -> None:
    sae, x = make(), rows(5, 4)
    loss = matryoshka_loss(sae, x, Objective(aux=aux), dead)
    assert float(loss.aux) == 0.0
    assert torch.equal(loss.total, matryoshka_loss(sae, x).total)
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("aux", [AuxK(), AuxK(normalise="variance"), AuxK(per_level=True)], ids=str)
def test_auxk_is_zero_where_the_reconstruction_is_perfect(aux) -> None:
    sae = make()
    x = (sae.b_dec / sae.scale).detach().expand(5, -1)
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)  # no latent fires on b_dec
    loss = matryoshka_loss(sae, x, Objective(aux=aux), ~flags())
    assert float(loss.aux) == 0.0
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())


def test_dead_latents_of_a_rescaled_sae_make_what_unit_rows_make() -> None:
    sae, folded = (make(rescale_acts_by_decoder_norm=True) for _ in range(2))
    fold_decoder_norm(folded)
    x, residual = rows(5, 4), rows(5, 4, 3)
    ours, of_folded = (auxk_loss(s, s.pre(x), [residual], [6], flags(0, 3, 5), AuxK(k=2)) for s in (sae, folded))
    assert_close(ours, of_folded)
