import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.evaluation import likelihood
from dials_jax.evaluation.likelihood import (
    draw_masked,
    estimate_log_likelihood,
    log_likelihood,
    score_pairs,
)
from dials_jax.evaluation.pairs import pad_pairs
from dials_jax.loading import load
from dials_jax.models.model import Model, sequence_keys
from dials_jax.skipping.policies import Random, Static
from tests.conftest import MASK

GOLDEN = Path(__file__).parents[1] / "golden" / "llada_tiny"
PAIRS = [((3, 4, 5), (6, 7)), ((8,), (9, 10, 11, 12, 13)), ((14, 15, 16, 17), (18,))]


def keys_of(num_rows):
    return jax.random.split(jax.random.key(7), num_rows)


# -------------------------------------------------------------------------------- against LLaDA


@pytest.mark.parametrize("cfg_scale, name", [(0.0, "ll_value"), (0.5, "ll_value_cfg05")])
def test_published_code_estimates_the_same(cfg_scale, name):
    golden = np.load(GOLDEN / "golden.npz")
    tokens = np.concatenate([golden["ll_prompt"], golden["ll_answer"]])
    value = estimate_log_likelihood(
        load(GOLDEN),
        tokens,
        golden["ll_noisy"],
        golden["ll_p_mask"],
        cfg_scale,
        prompt_len=len(golden["ll_prompt"]),
    )
    assert value == pytest.approx(float(golden[name]), rel=1e-4)


def test_probabilities_are_read_where_a_token_is_masked(model):
    tokens, mask_id = np.array([[3, 4, 5, 6, 7]] * 2), model.config.mask_id
    masked = np.array([[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]], bool)
    noisy, p = np.where(masked, mask_id, tokens), np.array([[0.25], [0.5]]) * np.ones(5)
    values = [
        estimate_log_likelihood(model, tokens, noisy, given, prompt_len=2)
        for given in (p, np.where(masked, p, 0))
    ]
    assert values[0] == pytest.approx(values[1])


def test_a_shifted_models_answer_begins_with_the_prediction_of_the_prompts_last_row(model):
    shifted = Model(dataclasses.replace(model.config, right_shift=True), model.params)
    tokens = np.array([[3, 4, 5, 6, 7]])
    noisy = np.where(np.arange(5) == 3, model.config.mask_id, tokens)  # the answer's first token
    value = estimate_log_likelihood(shifted, tokens, noisy, np.ones((1, 5)), prompt_len=3)
    log_p = jax.nn.log_softmax(model.apply(noisy).logits[0])
    assert value == pytest.approx(float(log_p[2, 6]), abs=1e-5)


def test_masks_in_the_prompt_of_given_copies_stay(model):
    tokens = np.array([[3, 4, 5, 6, 7]])
    noisy = np.where(np.isin(np.arange(5), (1, 3)), model.config.mask_id, tokens)
    value = estimate_log_likelihood(model, tokens, noisy, np.ones((1, 5)), prompt_len=3)
    log_p = jax.nn.log_softmax(model.apply(noisy).logits[0])
    assert value == pytest.approx(float(log_p[3, 6]), abs=1e-5)


# masks of (key, copy) pairs for one answer and one number of copies a round
draw = jax.jit(jax.vmap(draw_masked, (0, 0, None, None)), static_argnums=3)


def keys_and_copies(num_keys, num_copies):
    """Every copy of every key, copies fastest."""
    keys = jax.random.split(jax.random.key(0), num_keys)
    return jnp.repeat(keys, num_copies), jnp.tile(jnp.arange(num_copies), num_keys)


@pytest.mark.parametrize("length, stratum", [(11, 4), (5, 8), (1, 3)])
def test_numbers_of_masks_are_those_of_the_reference(length, stratum):
    keys, copies = keys_and_copies(12, 2 * stratum)  # two rounds a key
    masked = np.asarray(draw(keys, copies, jnp.arange(20) >= 20 - length, stratum))
    assert not masked[:, : 20 - length].any()
    rounds = masked.sum(axis=1).reshape(24, stratum)
    k = rounds[:, :1]
    steps = np.round(k + np.arange(stratum) * np.float32(length / stratum))
    np.testing.assert_array_equal(rounds, (steps - 1) % length + 1)
    assert len(np.unique(k)) > 1 or length == 1


def test_masked_places_are_uniform():
    keys, copies = keys_and_copies(3000, 1)
    masked = np.asarray(draw(keys, copies, jnp.arange(10) >= 2, 4))
    rate = masked.mean(axis=0)[2:]
    assert np.abs(rate - rate.mean()).max() < 5 * 0.5 / 3000**0.5
    assert abs(rate.mean() - 4.5 / 8) < 0.03  # k is uniform on 1..8


def test_padding_changes_no_mask():
    keys, copies = keys_and_copies(5, 4)
    alone = np.asarray(draw(keys, copies, jnp.ones(7, bool), 4))
    padded = np.asarray(draw(keys, copies, jnp.arange(12) >= 5, 4))
    np.testing.assert_array_equal(padded[:, 5:], alone)


def test_copies_of_a_round_draw_their_own_places():
    masked = np.asarray(draw(*keys_and_copies(1, 60), jnp.ones(30, bool), 15))
    assert len({row.tobytes() for row in masked}) > 50


# --------------------------------------------------------------------------------- scoring pairs


def scores_of(model, pairs, samples=None, keys=None, **kwargs):
    samples = np.zeros(len(pairs), int) if samples is None else samples
    keys = keys_of(len(pairs)) if keys is None else keys
    padding = {k: kwargs.pop(k) for k in ("length", "answer_length") if k in kwargs}
    padded = pad_pairs(pairs, model.config, **padding)
    return score_pairs(model, padded, keys, samples, **({"stratum": 4} | kwargs))


def test_pairs_end_together(cfg):
    """Only the sum of prompt and answer counts: a long answer stands beside a long prompt."""
    padded = pad_pairs(PAIRS[:2], cfg)
    np.testing.assert_array_equal(padded.tokens, [[0, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13]])
    np.testing.assert_array_equal(padded.valid, [[0, 1, 1, 1, 1, 1], [1] * 6])
    np.testing.assert_array_equal(padded.in_answer, [[0, 0, 0, 1, 1], [1] * 5])


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_a_score_by_hand(model, cfg, cfg_scale):
    """Sum of log p over the masked tokens, divided by their share of the answer."""
    prompt, answer = PAIRS[1]
    key = keys_of(1)
    masked = draw_masked(jax.random.split(key[0])[0], jnp.array(2), jnp.ones(5, bool), 4)
    tokens = np.array([[*prompt, *np.where(masked, cfg.mask_id, answer)]])
    logits = np.asarray(model.apply(tokens).logits[0, 1:])
    if cfg_scale:
        tokens[0, 0] = cfg.mask_id
        blind = np.asarray(model.apply(tokens).logits[0, 1:])
        logits = blind + (cfg_scale + 1) * (logits - blind)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = log_p[np.arange(5), answer][np.asarray(masked)].sum() / (masked.sum() / 5)
    scores, _ = scores_of(model, PAIRS[1:2], np.array([2]), key, cfg_scale=cfg_scale)
    np.testing.assert_allclose(scores.log_likelihood, [expected], rtol=1e-5)
    np.testing.assert_allclose(scores.masked_share, [masked.sum() / 5], rtol=1e-6)


@pytest.mark.parametrize("cfg_scale, policy", [(0.0, None), (0.5, Random(2))])
def test_a_pair_does_not_depend_on_the_rest_of_its_batch(model, cfg_scale, policy):
    settings = {"cfg_scale": cfg_scale, "policy": policy, "executor": "select"}
    batch, _ = scores_of(model, PAIRS, np.array([0, 1, 2]), **settings)
    longer = {"length": 11, "answer_length": 7, "fill_to": 4}
    filled, _ = scores_of(model, PAIRS, np.array([0, 1, 2]), **settings, **longer)
    np.testing.assert_allclose(filled.log_likelihood, batch.log_likelihood, rtol=1e-4)
    alone, _ = scores_of(model, PAIRS[1:2], np.array([1]), keys_of(3)[1:2], **settings, **longer)
    np.testing.assert_allclose(alone.log_likelihood[0], batch.log_likelihood[1], rtol=1e-4)
    np.testing.assert_array_equal(alone.gates[:, 0], batch.gates[:, 1])
    copies = 2 if cfg_scale else 1
    assert filled.gates.shape == batch.gates.shape == (4, 3 * copies)
    if cfg_scale:  # the guiding rows decide by themselves
        assert (batch.gates[:, :3] != batch.gates[:, 3:]).any()


def test_costs_count_the_padded_length(model):
    _, full = scores_of(model, PAIRS)
    _, skipping = scores_of(model, PAIRS, policy=Static((0, 2)))
    assert full.layers_run == full.model == 1
    assert skipping.layers_run == 0.5 < skipping.model < 1


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_logits_are_held_of_a_few_positions_at_a_time(model, cfg_scale, monkeypatch):
    pairs, samples = PAIRS[:2], np.array([0, 1])
    expected, _ = scores_of(model, pairs, samples, cfg_scale=cfg_scale)
    monkeypatch.setattr(likelihood, "ANSWER_CHUNK", 2)  # of an answer of 5
    # Traced again, for the number of positions is read while tracing.
    program = likelihood.score_pairs_program.traced_anew()
    monkeypatch.setattr(likelihood, "score_pairs_program", program)
    scores, _ = scores_of(model, pairs, samples, cfg_scale=cfg_scale)
    np.testing.assert_allclose(scores.log_likelihood, expected.log_likelihood, rtol=1e-5)
    rows = model.place_sequences((pad_pairs(pairs, model.config), keys_of(2), jnp.asarray(samples)))
    how = {"cfg": model.config, "stratum": 4, "cfg_scale": cfg_scale, "executor": "auto"}
    with jax.set_mesh(model.mesh):
        text = program.lower(model.inference_params, *rows, None, **how).as_text()
    widths = {int(n) for n in re.findall(r"tensor<\d+x(\d+)x64xf32>", text)}
    assert widths == {2}  # the vocabulary is of 64 tokens


# ---------------------------------------------------------------------------------- causal models


@pytest.fixture(scope="module")
def causal(model):
    return Model(dataclasses.replace(model.config, causal=True), model.params)


@pytest.mark.parametrize("policy, layers", [(None, ()), (Static((1,)), (1,))])
def test_a_causal_models_log_likelihood_is_exact(causal, policy, layers):
    (prompt, answer), tokens = PAIRS[1], np.array([[*PAIRS[1][0], *PAIRS[1][1]]])
    logits = causal.apply(tokens, policy=policy).logits[0]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = log_p[np.arange(len(prompt) - 1, tokens.size - 1), answer].sum()
    assert log_likelihood(causal, prompt, answer, 16, 4, policy=policy) == pytest.approx(
        float(expected), rel=1e-5
    )
    batch, cost = scores_of(causal, PAIRS, policy=policy, length=9, answer_length=6, fill_to=4)
    assert batch.log_likelihood[1] == pytest.approx(float(expected), rel=1e-4)
    assert cost.layers_run == 1 - len(layers) / 4 and (batch.masked_share == 1).all()


def test_a_causal_model_has_no_first_token_and_no_guidance(causal):
    with pytest.raises(InputError, match="pair 0: nothing predicts a causal model's first token"):
        log_likelihood(causal, (), (4, 5), 4, 4)
    with pytest.raises(InputError, match=r"hides the prompt behind .MASK., and a causal model has"):
        log_likelihood(causal, (3,), (4, 5), 4, 4, cfg_scale=1.0)


# ------------------------------------------------------------------------------- log-likelihoods


@pytest.fixture(scope="module")
def uniform(model):
    """Every token equally likely, whatever the input."""
    head = jax.tree.map(jnp.zeros_like, model.params["head"])
    return Model(model.config, {**model.params, "head": head})


@pytest.mark.parametrize("length, cfg_scale", [(1, 0.0), (7, 0.0), (7, 2.0)])
def test_a_uniform_model_scores_exactly(uniform, length, cfg_scale):
    """-L log V under any masks: dividing by the nominal share instead would not give it."""
    answer = tuple(range(5, 5 + length))
    value = log_likelihood(uniform, (3, 4), answer, 8, 4, cfg_scale, key=jax.random.key(1))
    assert value == pytest.approx(-length * np.log(64), rel=1e-5)


def test_answers_of_one_token_need_no_chance(model):
    values = {log_likelihood(model, *PAIRS[2], 4, 4, key=jax.random.key(i)) for i in range(3)}
    logits = model.apply(np.array([[14, 15, 16, 17, model.config.mask_id]])).logits[0, -1]
    expected = float(jax.nn.log_softmax(logits)[18])
    assert len(values) == 1 and values.pop() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("policy, num_copies", [(None, 1), (Static((1,)), 1), (Random(2), 8)])
def test_only_copies_that_differ_are_run(model, policy, num_copies, monkeypatch):
    asked = []

    def spy(model, pairs, keys, samples, **kwargs):
        asked.extend(samples)
        return score_pairs(model, pairs, keys, samples, **kwargs)

    monkeypatch.setattr(likelihood, "score_pairs", spy)
    value = log_likelihood(model, *PAIRS[2], 8, 4, policy=policy)
    assert asked == [*range(num_copies)]
    keys = jnp.broadcast_to(sequence_keys(None, 1), (8,))
    every, _ = scores_of(model, [PAIRS[2]] * 8, np.arange(8), keys, policy=policy)
    assert value == pytest.approx(float(np.mean(every.log_likelihood)), rel=1e-6)
    assert (np.ptp(every.log_likelihood) < 1e-5) == (num_copies == 1)
    asked.clear()
    log_likelihood(model, *PAIRS[0], 8, 4, policy=policy)  # two tokens: masks differ
    assert asked == [*range(8)]


def test_estimates_follow_the_key(model):
    def value(seed):
        return log_likelihood(model, *PAIRS[1], 4, 4, key=jax.random.key(seed))

    assert value(0) == value(0) == log_likelihood(model, *PAIRS[1], 4, 4)
    assert value(0) != value(1)


def test_rounds_are_averaged(model):
    key, rows = jax.random.key(0), [PAIRS[1]] * 4
    keys = jnp.broadcast_to(jax.random.fold_in(key, 0), (4,))
    rounds = [
        scores_of(model, rows, np.arange(first, first + 4), keys)[0].log_likelihood
        for first in (0, 4)
    ]
    value = log_likelihood(model, *PAIRS[1], 8, 4, key=key)
    assert value == pytest.approx(float(np.mean(rounds)), rel=1e-5)


def test_wrong_requests_are_refused(model, cfg):
    with pytest.raises(InputError, match="num_samples=6 must be a multiple of batch_size=4"):
        log_likelihood(model, *PAIRS[0], 6, 4)
    for pair in (([3], [64]), ([-1], [3])):
        with pytest.raises(InputError, match=r"pair 0 has token -?\d+, outside the vocab"):
            pad_pairs([pair], model.config)
    for sizes in ((0, 16), (16, 0)):
        with pytest.raises(InputError, match="=0 must be"):
            log_likelihood(model, [3], [4], *sizes)
    with pytest.raises(InputError, match="pair 0: the answer is empty"):
        log_likelihood(model, (3,), (), 4, 4)
    with pytest.raises(InputError, match=r"pair 1 contains \[MASK\]"):
        pad_pairs([PAIRS[0], ((3,), (cfg.mask_id,))], cfg)
    with pytest.raises(InputError, match="pair 0: 65 tokens for 64 positions"):
        pad_pairs([((3,) * 60, (4,) * 5)], cfg)
    with pytest.raises(InputError, match=r"cfg_scale=-1\.0 must not be negative"):
        log_likelihood(model, *PAIRS[0], 4, 4, cfg_scale=-1.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt_len": 3}, "prompt_len=3 leaves no answer in 3 tokens"),
        ({"prompt_len": -1}, "prompt_len=-1 leaves no answer"),
        ({"tokens": np.array([3, 64, 5])}, "sequence 0 has token 64, outside the vocabulary"),
        ({"noisy": np.array([[3, MASK, 6]])}, "noisy differs from tokens"),
        ({"p_mask": np.array([[0.5]])}, r"p_mask has shape \(1, 1\) and noisy \(1, 3\)"),
        ({"p_mask": np.full((1, 3), 50.0)}, r"p_mask must lie in \(0, 1\]"),
        ({"p_mask": np.zeros((1, 3))}, r"p_mask must lie in \(0, 1\]"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0 must not be negative"),
    ],
)
def test_copies_that_are_none_of_the_tokens_are_refused(model, changes, message, untyped):
    arguments = {
        "tokens": np.array([3, 4, 5]),
        "noisy": np.array([[3, MASK, 5]]),
        "p_mask": np.full((1, 3), 0.5),
        "prompt_len": 1,
    }
    estimate_log_likelihood(model, **arguments)
    with pytest.raises(InputError, match=message):
        estimate_log_likelihood(model, **(arguments | changes))
