"""Cross-entropy recovered, against a plain loop over positions."""

import math

import pytest
import torch

from msae.data.bridge import load_bridge
from msae.evaluation.language_model import cross_entropy_recovered
from tests.tiny_lm import tiny_model

HOOKS = [
    "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_z",
    "blocks.0.hook_mlp_out",
    "blocks.1.hook_resid_post",
]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    return load_bridge(str(tiny_model(tmp_path_factory.mktemp("lm"), scale=20.0)), device="cpu")


@pytest.fixture(scope="module")
def tokens():
    found = torch.randint(1, 320, (7, 12), generator=torch.Generator().manual_seed(0))
    found[:, 0] = 0
    found[1, 5] = 0  # BOS in mid-sequence
    found[2, 9:] = 0  # right padding
    found[3, :4] = 0  # left padding
    return found


def half(rows):
    assert rows.dtype == torch.float32
    assert rows.ndim == 2
    return 0.5 * rows


def measure(bridge, hook, tokens, reconstruct, **settings):
    return cross_entropy_recovered(bridge, hook, reconstruct, tokens, [0], show_progress=False, **settings)


@pytest.mark.parametrize("hook", HOOKS)
def test_identity_recovers_all_and_zero_nothing(bridge, tokens, hook):
    found = measure(bridge, hook, tokens, {"same": lambda x: x.clone(), "nothing": torch.zeros_like, "half": half})
    ce, score = found["ce"], found["ce_score"]
    assert ce["zero"] - ce["orig"] != 0
    assert ce["same"] == pytest.approx(ce["orig"], rel=1e-6)
    assert ce["nothing"] == pytest.approx(ce["zero"], rel=1e-6)
    assert score["same"] == pytest.approx(1, abs=1e-4)
    assert score["nothing"] == pytest.approx(0, abs=1e-6)
    assert found["kl"]["same"] == pytest.approx(0, abs=1e-5)
    assert found["kl_score"]["same"] == pytest.approx(1, abs=1e-4)
    assert found["kl_score"]["nothing"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["kl"]["half"] < found["kl"]["zero"]


def naive(bridge, tokens, factor):
    """Sums over positions one by one, the hook replaced at kept positions one by one."""

    def replace(value, hook):
        value = value.clone()
        for s in range(len(tokens)):
            for t in range(tokens.shape[1]):
                if tokens[s, t] != 0:
                    value[s, t] *= factor
        return value

    original = bridge(tokens).double().softmax(-1)
    changed = bridge.run_with_hooks(tokens, fwd_hooks=[(HOOKS[0], replace)]).double().softmax(-1)
    loss = kl = count = 0
    for s in range(len(tokens)):
        for t in range(tokens.shape[1] - 1):
            if tokens[s, t] != 0 and tokens[s, t + 1] != 0:
                loss -= math.log(changed[s, t, tokens[s, t + 1]])
                kl += float((original[s, t] * (original[s, t].log() - changed[s, t].log())).sum())
                count += 1
    return loss / count, kl / count, count


def test_agrees_with_a_naive_loop(bridge, tokens):
    found = measure(bridge, HOOKS[0], tokens, {"half": half}, batch=3)
    expected = {name: naive(bridge, tokens, factor) for name, factor in (("orig", 1.0), ("zero", 0.0), ("half", 0.5))}
    for name, (loss, kl, count) in expected.items():
        assert found["ce"][name] == pytest.approx(loss, rel=1e-5)
        assert found["tokens"] == count
        if name != "orig":
            assert found["kl"][name] == pytest.approx(kl, rel=1e-4)
    orig, zero, sae = (expected[name] for name in ("orig", "zero", "half"))
    assert found["ce_score"]["half"] == pytest.approx((zero[0] - sae[0]) / (zero[0] - orig[0]), rel=1e-4)
    assert found["kl_score"]["half"] == pytest.approx(1 - sae[1] / zero[1], rel=1e-4)


def test_does_not_depend_on_the_batch(bridge, tokens):
    one, three, all_ = (measure(bridge, HOOKS[1], tokens, {"half": half}, batch=b) for b in (1, 3, 100))
    for other in (three, all_):
        for key in ("ce", "kl", "ce_score", "kl_score"):
            assert other[key] == pytest.approx(one[key], rel=1e-4)
        assert other["tokens"] == one["tokens"]


def test_sequences_without_a_pair_are_passed_over(bridge, tokens):
    padded = torch.cat([tokens, torch.zeros(9, 12, dtype=torch.long)])
    one, other = (measure(bridge, HOOKS[0], t, {"half": half}) for t in (tokens, padded))
    assert one["ce"] == pytest.approx(other["ce"])
    with pytest.raises(ValueError, match="none of 24 tokens is kept"):
        measure(bridge, HOOKS[0], torch.zeros(2, 12, dtype=torch.int32), {})


def test_refuses(bridge, tokens):
    with pytest.raises(ValueError, match=r"no hook blocks\.1\.hook_resid_pree"):
        measure(bridge, "blocks.1.hook_resid_pree", tokens, {})
    with pytest.raises(ValueError, match="can be read but not replaced"):
        measure(bridge, "blocks.1.hook_resid_mid", tokens, {})
    with pytest.raises(ValueError, match=r"\['zero'\] are taken"):
        measure(bridge, HOOKS[0], tokens, {"zero": half})
