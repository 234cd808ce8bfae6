"""Cross-entropy recovered, against a plain loop over positions."""

import math

import pytest
import torch

from msae.data.bridge import capture, load_bridge
from msae.evaluation.language_model import cross_entropy_recovered
from tests.tiny_lm import tiny_model

HOOKS = [
    "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_z",
    "blocks.0.hook_mlp_out",
    "blocks.1.hook_resid_post",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("lm"), scale=20.0))


@pytest.fixture(scope="module")
def bridge(directory):
    return load_bridge(directory, device="cpu")


@pytest.fixture(scope="module")
def layers(directory):
    """The model's own layers, for rows [n, d_in]."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).requires_grad_(False).transformer.h


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


# ---- transcoders: read at one hook, replaced at another

TRANSCODERS = {  # input, target, what the model itself computes from the one to the other
    "mlp": ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out", lambda h, x: h[0].mlp(x)),
    "wider input": ("blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out", lambda h, x: h[0].mlp.c_proj(x)),
    "wider target": ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post", lambda h, x: h[1].mlp.act(h[1].mlp.c_fc(x))),
    "heads in": ("blocks.1.attn.hook_z", "blocks.1.hook_attn_out", lambda h, x: h[1].attn.c_proj(x)),
    "heads out": ("blocks.1.attn.hook_in", "blocks.1.attn.hook_v", lambda h, x: h[1].attn.c_attn(x)[:, 64:]),
    "resid_mid": ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", lambda h, x: h[1].mlp(h[1].ln_2(x))),
}


@pytest.mark.parametrize(("hook", "target", "layer"), TRANSCODERS.values(), ids=TRANSCODERS)
def test_a_perfect_transcoder_recovers_all_and_zero_nothing(bridge, layers, tokens, hook, target, layer):
    functions = {"same": lambda x: layer(layers, x), "half": lambda x: 0.5 * layer(layers, x)}
    functions |= {"nothing": lambda x: 0 * layer(layers, x)}
    found = measure(bridge, hook, tokens, functions, target_hook_name=target)
    there = measure(bridge, target, tokens, {"half": half})
    assert abs(there["ce"]["zero"] - there["ce"]["orig"]) > 1e-3
    for key in ("ce", "kl"):
        for name in there[key]:  # orig, zero, half: as an SAE of the target would
            assert found[key][name] == pytest.approx(there[key][name], rel=1e-4)
    assert found["ce"]["same"] == pytest.approx(found["ce"]["orig"], rel=1e-6)
    assert found["ce"]["nothing"] == pytest.approx(found["ce"]["zero"], rel=1e-6)
    assert found["ce_score"]["same"] == pytest.approx(1, abs=1e-2)
    assert found["kl"]["same"] == pytest.approx(0, abs=1e-5)
    assert found["kl_score"]["nothing"] == pytest.approx(0, abs=1e-6)
    assert found["tokens"] == there["tokens"]


def test_a_target_that_is_the_input_is_as_without_one(bridge, tokens):
    for hook in HOOKS:
        alone = measure(bridge, hook, tokens, {"half": half})
        assert measure(bridge, hook, tokens, {"half": half}, target_hook_name=hook) == alone


def test_a_transcoder_in_a_bfloat16_model(directory, tokens):
    """Rows are read as float32 and what is given is cast back: the true targets change nothing."""
    bridge = load_bridge(directory, device="cpu", dtype="bfloat16")
    hook, target, _ = TRANSCODERS["heads out"]
    true = capture(bridge, tokens, [target])[target]
    assert true.dtype == torch.bfloat16
    assert true.shape == (7, 12, 4, 8)

    def look_up(rows):
        assert (rows.dtype, rows.shape) == (torch.float32, (int((tokens != 0).sum()), 32))
        return true[tokens != 0].flatten(1).float()

    found = measure(bridge, hook, tokens, {"true": look_up}, target_hook_name=target)
    assert found["ce"]["true"] == found["ce"]["orig"] != found["ce"]["zero"]
    assert found["kl"]["true"] == 0 < found["kl"]["zero"]


@pytest.mark.parametrize("with_function", [True, False])
def test_refuses_targets(bridge, tokens, with_function):
    before = measure(bridge, HOOKS[0], tokens, {"half": half})
    functions = {"half": half} if with_function else {}
    for hook, target in (
        ("blocks.0.hook_mlp_out", "blocks.0.mlp.hook_in"),
        ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"^{target} is computed before {hook} and [^\n]*; set data\.target_hook_name to [^\n]*$",
        ):
            measure(bridge, hook, tokens, functions, target_hook_name=target)
    for target, message in (
        ("blocks.1.hook_resid_mid", "^blocks.1.hook_resid_mid can be read but not replaced"),
        ("blocks.1.hook_mlp_outt", "no hook blocks.1.hook_mlp_outt"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(bridge, HOOKS[0], tokens, functions, target_hook_name=target)
    assert measure(bridge, HOOKS[0], tokens, {"half": half}) == before  # no hook is left behind
