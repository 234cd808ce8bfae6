"""Cross-entropy recovered, against a plain loop over positions."""

import math

import pytest
import torch

from msae.evaluation.language_model import cross_entropy_recovered
from msae.sources.bridge import capture, load_bridge
from tests.tiny_lm import tiny_model

HOOKS = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]
TRANSCODERS = {  # input, target, what the model itself computes from the one to the other
    "mlp": ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out", lambda h, x: h[0].mlp(x)),
    "wider input": ("blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out", lambda h, x: h[0].mlp.c_proj(x)),
    "wider target": ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post", lambda h, x: h[1].mlp.act(h[1].mlp.c_fc(x))),
    "heads in": ("blocks.1.attn.hook_z", "blocks.1.hook_attn_out", lambda h, x: h[1].attn.c_proj(x)),
    "heads out": ("blocks.1.attn.hook_in", "blocks.1.attn.hook_v", lambda h, x: h[1].attn.c_attn(x)[:, 64:]),
    "resid_mid": ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", lambda h, x: h[1].mlp(h[1].ln_2(x))),
}
CASES = {hook: (hook, hook, lambda h, x: x.clone()) for hook in HOOKS} | TRANSCODERS


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
    tokens = torch.randint(1, 320, (7, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    tokens[1, 5] = 0  # BOS in mid-sequence
    tokens[2, 9:] = 0  # right padding
    tokens[3, :4] = 0  # left padding
    return tokens


def half(rows):
    assert rows.dtype == torch.float32
    assert rows.ndim == 2
    return 0.5 * rows


def measure(bridge, hook, tokens, reconstruct, **settings):
    return cross_entropy_recovered(bridge, hook, reconstruct, tokens, [0], **settings)


@pytest.mark.parametrize(("hook", "target", "layer"), CASES.values(), ids=CASES)
def test_the_true_target_recovers_all_and_zeros_nothing(bridge, layers, tokens, hook, target, layer):
    functions = {"same": lambda x: layer(layers, x), "half": lambda x: half(layer(layers, x))}
    functions |= {"nothing": lambda x: 0 * layer(layers, x)}
    scores = measure(bridge, hook, tokens, functions, target_hook_name=target)
    ce, kl = scores["ce"], scores["kl"]
    assert abs(ce["zero"] - ce["orig"]) > 1e-3
    assert ce["same"] == pytest.approx(ce["orig"], rel=1e-6)
    assert ce["nothing"] == pytest.approx(ce["zero"], rel=1e-6)
    tolerance = 1e-4 if hook == target else 1e-2
    assert scores["ce_score"]["same"] == pytest.approx(1, abs=tolerance)
    assert scores["ce_score"]["nothing"] == pytest.approx(0, abs=tolerance)
    assert kl["same"] == pytest.approx(0, abs=1e-5)
    assert scores["kl_score"]["same"] == pytest.approx(1, abs=1e-4)
    assert scores["kl_score"]["nothing"] == pytest.approx(0, abs=1e-6)
    assert 0 < kl["half"] < kl["zero"]
    of_target = measure(bridge, target, tokens, {"half": half})  # as an SAE of the target
    assert scores["tokens"] == of_target["tokens"]
    for key in ("ce", "kl"):
        assert of_target[key] == pytest.approx({name: scores[key][name] for name in of_target[key]}, rel=1e-4)


def naive(bridge, tokens, factor):
    """(cross-entropy, KL, predictions), position by position, with kept activations at HOOKS[0] times the factor."""

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
    scores = measure(bridge, HOOKS[0], tokens, {"half": half}, batch=3)
    orig, zero, sae = (naive(bridge, tokens, factor) for factor in (1.0, 0.0, 0.5))
    expected_ce = {"orig": orig[0], "zero": zero[0], "half": sae[0]}
    assert scores["ce"] == pytest.approx(expected_ce, rel=1e-5)
    assert scores["kl"] == pytest.approx({"zero": zero[1], "half": sae[1]}, rel=1e-4)
    assert scores["tokens"] == orig[2]
    assert scores["ce_score"]["half"] == pytest.approx((zero[0] - sae[0]) / (zero[0] - orig[0]), rel=1e-4)
    assert scores["kl_score"]["half"] == pytest.approx(1 - sae[1] / zero[1], rel=1e-4)


def test_neither_the_batch_nor_sequences_without_a_pair_matter(bridge, tokens):
    expected = measure(bridge, HOOKS[1], tokens, {"half": half}, batch=1)
    padded = torch.cat([tokens, torch.zeros(9, 12, dtype=torch.long)])
    for some, batch in ((tokens, 3), (tokens, 100), (padded, 8)):
        scores = measure(bridge, HOOKS[1], some, {"half": half}, batch=batch)
        assert scores.pop("tokens") == expected["tokens"]
        for key in scores:
            assert scores[key] == pytest.approx(expected[key], rel=1e-4)


def test_a_transcoder_in_a_bfloat16_model(directory, tokens):
    """Rows are read as float32 and results are cast back: the true targets change nothing."""
    bridge = load_bridge(directory, device="cpu", dtype="bfloat16")
    hook, target, _ = TRANSCODERS["heads out"]
    true = capture(bridge, tokens, [target])[target]
    assert true.dtype == torch.bfloat16
    assert true.shape == (7, 12, 4, 8)

    def look_up(rows):
        assert (rows.dtype, rows.shape) == (torch.float32, (int((tokens != 0).sum()), 32))
        return true[tokens != 0].flatten(1).float()

    scores = measure(bridge, hook, tokens, {"true": look_up}, target_hook_name=target)
    assert scores["ce"]["true"] == scores["ce"]["orig"] != scores["ce"]["zero"]
    assert scores["kl"]["true"] == 0 < scores["kl"]["zero"]


NO_HOOK, NO_REPLACING = r"no hook blocks\.1\.hook_mlp_outt", r"^blocks\.1\.hook_resid_mid can be read but not replaced"
BACKWARDS = {
    "blocks.0.hook_mlp_out": "blocks.0.mlp.hook_in",
    "blocks.1.hook_resid_pre": "blocks.0.hook_resid_pre",
    "blocks.1.hook_mlp_out": "blocks.1.hook_attn_out",
}
REFUSED = [
    ("blocks.1.hook_mlp_outt", None, NO_HOOK),
    (HOOKS[0], "blocks.1.hook_mlp_outt", NO_HOOK),
    ("blocks.1.hook_resid_mid", None, NO_REPLACING),
    (HOOKS[0], "blocks.1.hook_resid_mid", NO_REPLACING),
    *(
        (hook, target, rf"^{target} is computed before {hook} and [^\n]*; set data\.target_hook_name to [^\n]*$")
        for hook, target in BACKWARDS.items()
    ),
]


@pytest.mark.parametrize("functions", [{"half": half}, {}], ids=["with a function", "without"])
def test_refuses_hooks_and_leaves_none_behind(bridge, tokens, functions):
    before = measure(bridge, HOOKS[0], tokens, {"half": half})
    for hook, target, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            measure(bridge, hook, tokens, functions, target_hook_name=target)
    assert measure(bridge, HOOKS[0], tokens, {"half": half}) == before


def test_refuses_names_that_are_taken_and_tokens_without_a_pair(bridge, tokens):
    with pytest.raises(ValueError, match=r"\['zero'\] are taken"):
        measure(bridge, HOOKS[0], tokens, {"zero": half})
    with pytest.raises(ValueError, match="none of 24 tokens is kept"):
        measure(bridge, HOOKS[0], torch.zeros(2, 12, dtype=torch.int32), {})
