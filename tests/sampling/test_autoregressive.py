import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax import trees
from dials_jax.caching.plain import DualCache
from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.sampling import generate as generating
from dials_jax.sampling.autoregressive import Autoregressive, choose_tokens
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Random, Static

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen2_tiny"
P, G = 6, 8
GREEDY, WARM = Autoregressive(G), Autoregressive(G, temperature=0.7)


@pytest.fixture(scope="module")
def causal(lively):
    """Knows no end of text, so that every row is as long as may be."""
    cfg = dataclasses.replace(lively.config, causal=True, mask_id=None, eos_id=None)
    return Model(cfg, lively.params)


@pytest.fixture(scope="module")
def prompts():
    """Three rows, padded on the left by 0, 1 and 2."""
    tokens = np.random.default_rng(0).integers(2, 60, (3, P))
    return tokens, np.arange(P) >= np.arange(3)[:, None]


def keys_of(num_sequences):
    return jax.random.split(jax.random.key(7), num_sequences)


def ending_with(model, token):
    return Model(dataclasses.replace(model.config, eos_id=int(token)), model.params)


def test_published_code_generates_the_same_tokens():
    golden = np.load(GOLDEN / "golden.npz")["greedy"]
    out = generate(load(GOLDEN), golden[:, :8], sampler=Autoregressive(12))
    np.testing.assert_array_equal(out.tokens, golden)
    assert out.nfe == 12


@pytest.mark.parametrize("policy", [None, Static((1, 2))])
@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_decoding_equals_running_the_whole_sequence_every_time(causal, prompts, policy, layout):
    params = causal.params
    if layout == "unrolled":
        params = {**params, "layers": trees.unstack(params["layers"])}
    model = Model(causal.config, params)
    out = generate(model, *prompts, sampler=GREEDY, policy=policy)
    present = np.concatenate([prompts[1], np.ones((3, G), bool)], axis=1)
    logits = causal.apply(out.tokens, present, policy).logits  # causal: one pass shows them all
    np.testing.assert_array_equal(out.tokens[:, P:], jnp.argmax(logits, -1)[:, P - 1 : -1])
    np.testing.assert_array_equal(out.tokens[:, :P], prompts[0])
    assert len(np.unique(out.tokens[:, P:])) > 4


@pytest.mark.parametrize("sampler", [GREEDY, WARM])
def test_a_row_alone_equals_the_row_in_a_padded_batch(causal, prompts, sampler):
    tokens, valid = prompts
    batch = generate(causal, tokens, valid, sampler=sampler, key=keys_of(3))
    alone = generate(causal, tokens[2:, 2:], sampler=sampler, key=keys_of(3)[2:])
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[2, 2:])
    other = generate(causal, tokens, valid, sampler=sampler, key=jax.random.key(8))
    assert (other.tokens != batch.tokens).any() == (sampler is WARM)


def test_tokens_are_drawn_at_the_temperature():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.6, 0.3, 0.1])), (4000, 3))
    share = np.bincount(choose_tokens(logits, 0.5, keys_of(4000)), minlength=3) / 4000
    np.testing.assert_allclose(share, np.array([0.36, 0.09, 0.01]) / 0.46, atol=0.03)


def test_every_token_has_noise_of_its_own(causal, prompts):
    """So hot that the noise alone decides."""
    out = generate(causal, *prompts, sampler=Autoregressive(G, temperature=1e6))
    assert len(np.unique(out.tokens[:, P:])) > 2 * G


def test_a_row_ends_at_its_end_of_text(causal, prompts):
    full = generate(causal, *prompts, sampler=GREEDY).tokens[:, P:]
    eos = next(t for t in full[0, 1:] if (full[1] != t).any())
    out = generate(ending_with(causal, eos), *prompts, sampler=GREEDY)
    for row, long in zip(out.tokens[:, P:], full, strict=True):
        end = np.flatnonzero(long == eos)[0] if (long == eos).any() else G
        np.testing.assert_array_equal(row[:end], long[:end])
        assert (row[end:] == eos).all()
    assert (out.tokens[0, P:] != full[0]).any()
    assert (out.tokens_per_pass == 1).all() and len(set(out.passes)) > 1


def test_it_stops_when_every_row_has_ended(causal, prompts):
    tokens, valid = prompts[0][:1], prompts[1][:1]
    full = generate(causal, tokens, valid, sampler=GREEDY).tokens[0, P:]
    for eos in (full[0], full[3]):
        calls = int(np.flatnonzero(full == eos)[0]) + 1
        out = generate(ending_with(causal, eos), tokens, valid, sampler=GREEDY)
        assert out.nfe == calls < G
        assert (out.tokens[0, P + calls - 1 :] == eos).all()
        assert out.gates.shape == (calls, 4, 1) and out.masked_share.shape == (calls, 1)


def test_gates_and_costs(causal, prompts):
    full = generate(causal, *prompts, sampler=GREEDY)
    out = generate(causal, *prompts, sampler=GREEDY, policy=Static((1,)))
    assert full.nfe == out.nfe == G and not out.masked_share.any()
    assert full.gates.all() and out.gates.shape == (G, 4, 3)
    assert not out.gates[:, 1].any() and out.gates[:, [0, 2, 3]].all()
    np.testing.assert_array_equal(out.tokens_run, [[P] * 4] + [[1] * 4] * (G - 1))
    assert out.flops.layers_run == 0.75 and full.flops.layers_run == 1
    assert 0 < out.flops.model_total < full.flops.model_total


def test_one_program_serves_one_shape_and_every_end(causal, prompts):
    tokens, valid = prompts
    generate(causal, tokens, valid, sampler=WARM)
    before = generating.generate_program.num_programs
    generate(causal, tokens[::-1].copy(), valid[::-1].copy(), sampler=WARM, key=jax.random.key(3))
    part = generate(causal, tokens[:2], valid[:2], sampler=WARM, fill_to=3)
    assert generating.generate_program.num_programs == before
    assert part.tokens.shape == (2, P + G) and part.gates.shape == (G, 4, 2)


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"policy": Random(1)}, "skips the same layers for every token; give Static"),
        ({"cache": DualCache()}, "leave out `cache`"),
        ({"sampler": Confidence(8, 8, 8)}, "causal model"),
        ({"valid": np.arange(3)[:, None] * np.ones(P) > 0}, "a prompt is empty"),
    ],
)
def test_settings_that_do_not_compose_are_refused(causal, prompts, settings, message):
    with pytest.raises(InputError, match=message):
        generate(causal, prompts[0], **({"sampler": GREEDY} | settings))


def test_bidirectional_models_are_refused(lively, prompts):
    with pytest.raises(InputError, match=r"give this one .* Confidence or Dream"):
        generate(lively, *prompts, sampler=GREEDY)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -0.5}])
def test_settings_without_sense_are_refused(settings):
    with pytest.raises(InputError, match="must"):
        Autoregressive(**({"max_new_tokens": 4} | settings))
