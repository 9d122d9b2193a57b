import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.sampling.dream import Dream, most_probable, revealed_shares
from dials_jax.sampling.generate import generate
from dials_jax.sampling.reveal import StepInfo

GOLDEN = Path(__file__).parents[1] / "golden" / "dream_tiny"
P, G = 6, 8
WARM = {"temperature": 0.7, "alg_temp": 0.2, "top_p": 0.9, "top_k": 20}
# Of four tokens with these probabilities; exact to a rounding.
LOGITS = jnp.log(jnp.array([[[0.5, 0.3, 0.15, 0.05]]]))


@pytest.fixture(scope="module")
def shifted(lively):
    return Model(dataclasses.replace(lively.config, right_shift=True), lively.params)


@pytest.fixture(scope="module")
def prompts():
    """Three rows, padded on the left by 0, 1 and 2."""
    tokens = np.random.default_rng(0).integers(2, 60, (3, P))
    return tokens, np.arange(P) >= np.arange(3)[:, None]


def keys_of(num_sequences, seed=7):
    return jax.random.split(jax.random.key(seed), num_sequences)


def keys_like(x):
    """One key a position."""
    return jax.random.split(jax.random.key(7), x.shape[:2])


def test_published_code_generates_the_same_tokens():
    golden, model = np.load(GOLDEN / "golden.npz"), load(GOLDEN)
    for i in range(5):
        settings = json.loads(str(golden[f"generate_{i}_args"]))
        out = generate(model, golden["prompt"], sampler=Dream(**settings))
        np.testing.assert_array_equal(out.tokens, golden[f"generate_{i}"])
        assert out.nfe == settings["steps"]


@pytest.mark.parametrize("settings", [{"alg": "origin"}, WARM, {"alg": "topk_margin"}])
def test_a_row_alone_equals_the_row_in_a_padded_batch(shifted, prompts, settings):
    tokens, valid = prompts
    sampler = Dream(G, 4, **settings)
    batch = generate(shifted, tokens, valid, sampler=sampler, key=keys_of(3))
    alone = generate(shifted, tokens[2:, 2:], sampler=sampler, key=keys_of(3)[2:])
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[2, 2:])
    np.testing.assert_array_equal(batch.tokens[:, :P], tokens)
    assert not (batch.tokens == shifted.config.mask_id).any()
    other = generate(shifted, tokens, valid, sampler=sampler, key=keys_of(3, seed=8))
    drawn = settings.get("alg") == "origin" or settings.get("temperature", 0) > 0
    assert (other.tokens != batch.tokens).any() == drawn


def test_one_token_a_step_begins_with_none_and_ends_with_two(shifted, prompts):
    out = generate(shifted, *prompts, sampler=Dream(G, G))
    left = np.round(out.masked_share[:, 0] * G)
    np.testing.assert_array_equal(left, [8, 8, 7, 6, 5, 4, 3, 2])


# --------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("steps", [1, 3, 8, 30])
def test_the_schedule_by_hand(steps):
    t = [1 - (1 - 0.1) * i / steps for i in range(steps + 1)]
    expected = [1 - after / before for before, after in pairwise(t)]
    np.testing.assert_allclose(revealed_shares(steps, 0.1)[:-1], expected[:-1], rtol=1e-4)
    assert revealed_shares(steps, 0.1)[-1] == 1


def test_the_largest_quota():
    # 256 tokens: 128 steps begin with one and end with three, 256 steps end with two.
    assert Dream(256, 128).max_quota == 3 and Dream(256, 256).max_quota == 2
    assert Dream(16, 1).max_quota == 16
    assert Dream(16, 4, alg="origin").max_quota is None


def test_rows_count_their_own_masks():
    """At t = 1 and s = 0.5: half of 6 and half of 3, rounded down."""
    shown = jnp.where(jnp.arange(6) < jnp.array([[6], [3]]), -jnp.arange(6.0), -jnp.inf)
    info = StepInfo(jnp.asarray(0), jnp.array([6, 3]), jnp.array([6, 3]))
    sampler = Dream(6, 2, eps=1e-6)
    revealed = sampler.choose(shown, info, keys_like(shown))
    np.testing.assert_array_equal(revealed.sum(axis=1), [2, 1])  # 0.4999995 of them
    assert revealed[0, :2].all() and revealed[1, 0]


def test_after_the_last_step_all_is_revealed():
    """A cache may have left tokens out of the last step; the block then goes on."""
    for alg in ("origin", "entropy"):
        info = StepInfo(jnp.asarray(9), jnp.array([6]), jnp.array([6]))
        assert (
            Dream(6, 2, alg=alg).choose(jnp.zeros((1, 6)), info, keys_like(jnp.zeros((1, 6)))).all()
        )


def test_origin_reveals_each_token_by_chance():
    info = StepInfo(jnp.asarray(1), jnp.array([4000]), jnp.array([4000]))
    sampler = Dream(4000, 4, alg="origin", eps=0.2)
    share = float(revealed_shares(4, 0.2)[1])
    shown = jnp.zeros((1, 4000))
    revealed = sampler.choose(shown, info, keys_like(shown))
    assert abs(float(revealed.mean()) - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_places_are_drawn_from_the_softmax_of_confidence():
    """One of three places, with odds 1 : e : e^2 at alg_temp 0.5 and confidences 0, 0.5 and 1."""
    num_sequences = 4000
    shown = jnp.broadcast_to(jnp.array([0, 0.5, 1.0, -jnp.inf]), (num_sequences, 4))
    info = StepInfo(jnp.asarray(0), *[jnp.full(num_sequences, 3)] * 2)
    sampler = Dream(4, 2, alg="maskgit_plus", alg_temp=0.5)
    revealed = sampler.choose(shown, info, keys_like(shown))
    np.testing.assert_array_equal(revealed.sum(axis=1), 1)  # int(3 * 0.4995)
    np.testing.assert_allclose(
        revealed.mean(axis=0), [*jax.nn.softmax(jnp.arange(3.0)), 0], atol=0.03
    )


# --------------------------------------------------------------------------- tokens and confidence


@pytest.mark.parametrize(
    "top_p, top_k, kept",
    [
        (None, None, 4), (None, 2, 2), (None, 9, 4), (1.0, None, 4),
        (0.4, None, 1),  # the first token always stays
        (0.7, None, 2), (0.9, None, 3),  # the one that passes the bound stays, too
        (0.9, 2, 2), (0.4, 3, 1),
    ],
)  # fmt: skip
def test_filters_by_hand(top_p, top_k, kept):
    filtered = most_probable(LOGITS[..., ::-1], top_p, top_k)[0, 0, ::-1]
    np.testing.assert_array_equal(filtered[:kept], LOGITS[0, 0, :kept])
    assert (filtered[kept:] == -jnp.inf).all()


@pytest.mark.parametrize(
    "alg, plain, filtered",
    [
        ("maskgit_plus", 0.5, 0.5 / 0.8),
        ("topk_margin", 0.2, 0.2 / 0.8),
        ("entropy", -1.1421, 0.625 * np.log(0.625) + 0.375 * np.log(0.375)),
    ],
)
def test_confidence_by_hand(cfg, alg, plain, filtered):
    """Filters act at temperature 0, too: two tokens share the probability of four."""
    for settings, expected in (({}, plain), ({"top_k": 2}, filtered)):
        guess, confidence = Dream(1, 1, alg=alg, **settings).propose(cfg, LOGITS, keys_like(LOGITS))
        assert guess[0, 0] == 0
        np.testing.assert_allclose(confidence[0, 0], expected, rtol=1e-4)


def test_tokens_are_drawn_from_the_filtered_distribution_at_a_temperature(cfg):
    logits = jnp.broadcast_to(LOGITS, (1, 4000, 4))
    sampler = Dream(4000, 1, alg="maskgit_plus", temperature=0.5, top_k=3)
    guess, confidence = sampler.propose(cfg, logits, keys_like(logits))
    p = np.array([0.25, 0.09, 0.0225]) / 0.3625  # squares, at temperature 0.5
    share = np.bincount(guess[0], minlength=4) / 4000
    np.testing.assert_allclose(share, [*p, 0], atol=0.03)
    np.testing.assert_allclose(confidence[0], p[guess[0]], rtol=1e-4)  # of the token drawn


@pytest.mark.parametrize(
    "change",
    [
        {"alg": "topk_margin"}, {"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 2},
        {"alg_temp": 1.0}, {"eps": 0.5}, {"steps": 2},
    ],
)  # fmt: skip
def test_every_setting_changes_a_step(cfg, change):
    logits = 3 * jax.random.normal(jax.random.key(0), (1, 16, cfg.vocab_size))
    info = StepInfo(jnp.asarray(0), jnp.array([16]), jnp.array([16]))

    def step(**settings):
        sampler = Dream(**({"max_new_tokens": 16, "steps": 4} | settings))
        guess, confidence = sampler.propose(cfg, logits, keys_like(logits))
        return jnp.stack([guess, confidence, sampler.choose(confidence, info, keys_like(logits))])

    assert (step() != step(**change)).any()


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps=0 must be positive"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_k": 0}, "top_k=0 must be positive"),
        ({"alg_temp": -0.1}, "alg_temp=-0.1 must not be negative"),
        ({"eps": 1.0}, r"eps=1.0 must lie in \(0, 1\)"),
        ({"alg": "origin", "alg_temp": 0.5}, "knows no alg_temp"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Dream(**({"max_new_tokens": 4, "steps": 4} | settings))


def test_causal_models_are_refused(lively, prompts):
    causal = Model(dataclasses.replace(lively.config, causal=True), lively.params)
    with pytest.raises(InputError, match="causal model"):
        generate(causal, *prompts, sampler=Dream(G, 4))
