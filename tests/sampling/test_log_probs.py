"""Each token's log-probability at the step that revealed it, in any batch."""

import jax
import numpy as np
import pytest

import dials_jax as dj
from dials_jax.errors import InputError
from dials_jax.models.model import sequence_keys
from dials_jax.models.padding import pad_prompts
from dials_jax.sampling.refill import generate_refilled
from tests.conftest import MASK, small_config
from tests.sampling.test_refill import Ending, ending_model

PROMPTS = [[5, 9, 11], [7], [20, 21, 22, 23], [3, 4]]


def replayed(model, prompt, sampler):
    """Log-probabilities of one sequence, greedy with a threshold, from plain forward passes."""
    canvas = np.array([*prompt, *[MASK] * sampler.gen_length])
    found = np.full(sampler.gen_length, np.nan)
    for first in range(len(prompt), len(canvas), sampler.block_length):
        block = slice(first, first + sampler.block_length)
        while (canvas[block] == MASK).any():
            logits = np.array(model.apply(canvas[None]).logits[0], np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            masked = np.zeros(len(canvas), bool)
            masked[block] = canvas[block] == MASK
            best = np.where(masked, log_p.max(-1), -np.inf)
            commit = masked & ((best >= np.log(sampler.threshold)) | (best == best.max()))
            canvas[commit] = logits.argmax(-1)[commit]
            found[commit[len(prompt) :]] = best[commit]
    return found


def test_they_are_those_of_the_step_that_revealed_the_token(lively):
    sampler = dj.Confidence(8, 4, threshold=0.5)
    out = dj.generate(lively, PROMPTS, sampler=sampler, log_probs=True)
    assert out.log_probs.shape == (4, 8) and out.log_probs.std() > 0.1
    for prompt, found in zip(PROMPTS, out.log_probs, strict=True):
        np.testing.assert_allclose(found, replayed(lively, prompt, sampler), atol=2e-4)
    plain = dj.generate(lively, PROMPTS, sampler=sampler)
    assert plain.log_probs is None
    np.testing.assert_array_equal(plain.tokens, out.tokens)


def test_the_temperature_of_the_draw_does_not_change_what_they_are_of(lively):
    out = dj.generate(lively, PROMPTS[:1], sampler=dj.Dream(1, temperature=5.0), log_probs=True)
    canvas = np.array([[*PROMPTS[0], MASK]])
    log_p = jax.nn.log_softmax(lively.apply(canvas).logits[0, -1])
    np.testing.assert_allclose(out.log_probs[0, 0], log_p[out.tokens[0, -1]], atol=2e-4)


def test_refilled_sequences_have_those_that_they_have_alone():
    model, keys = ending_model(small_config(right_shift=True)), sequence_keys(None, len(PROMPTS))
    tokens, valid = pad_prompts(PROMPTS, 4, model.config.pad_id)
    sampler = Ending(16, 4, threshold=0.9, stop_at_eos=True)
    settings = {"sampler": sampler, "log_probs": True}
    found = generate_refilled(model, PROMPTS, keys=keys, batch_size=2, length=4, **settings)
    outs = {one.request: one.out for one in found}
    filled = False
    for i in range(len(PROMPTS)):
        one = slice(i, i + 1)
        alone = dj.generate(model, tokens[one], valid[one], key=keys[one], **settings)
        np.testing.assert_allclose(outs[i].log_probs, alone.log_probs, atol=2e-4)
        after = np.arange(16) >= alone.num_tokens[0]
        assert np.isfinite(alone.log_probs[0, ~after]).all()
        filled |= np.isnan(alone.log_probs[0, after]).any()
    assert filled  # what follows an end of text, and no step has revealed


def test_those_of_a_causal_model_are_of_one_forward_pass():
    model = ending_model(small_config(causal=True))
    sampler = dj.Autoregressive(6)
    out = dj.generate(model, PROMPTS[:1], sampler=sampler, log_probs=True)
    log_p = np.array(jax.nn.log_softmax(model.apply(out.tokens).logits[0]))
    expected = log_p[np.arange(2, 8), out.tokens[0, 3:]]  # position i predicts token i + 1
    expected[out.num_tokens[0] :] = np.nan
    np.testing.assert_allclose(out.log_probs[0], expected, atol=2e-4)


def test_a_sampler_that_keeps_none_says_so(lively):
    class Other(dj.Confidence):
        gives_log_probs = False

    with pytest.raises(InputError, match="Other keeps no log-probabilities"):
        dj.generate(lively, PROMPTS, sampler=Other(4), log_probs=True)


def test_a_boost_for_the_end_of_thinking_does_not_change_what_they_are_of(lively):
    sampler = dj.Confidence(1, end_think_ids=(7, 8), end_think_boost=300.0)
    out = dj.generate(lively, PROMPTS[:1], sampler=sampler, log_probs=True)
    log_p = jax.nn.log_softmax(lively.apply(np.array([[*PROMPTS[0], MASK]])).logits[0, -1])
    assert out.tokens[0, -1] == 7 and log_p[7] < -0.1
    np.testing.assert_allclose(out.log_probs[0, 0], log_p[7], atol=2e-4)
