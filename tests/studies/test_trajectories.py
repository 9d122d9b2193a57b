"""Profiles measured along trajectories are those of plain NumPy on all hidden states at once."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching.plain import NoCache
from dials_jax.compiling import timed_jit
from dials_jax.errors import InputError
from dials_jax.evaluation.batched import request_keys
from dials_jax.loading import load
from dials_jax.models import transformer
from dials_jax.models.padding import pad_prompts
from dials_jax.sampling import generate as generating
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.sampling.generate import generate
from dials_jax.sharding import placement_of
from dials_jax.skipping.observing import Observer
from dials_jax.studies.trajectories import observe_texts, profile_model, prompt_keys
from tests.studies.plain_profile import NESTED, Call, Watched, plain_profile

GOLDEN = Path(__file__).parents[1] / "golden"
G = 6
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [3]]
DIFFUSION = Observer(num_step_bins=3, change_layers=(1, 3), sink_factor=1.1)
SEQUENCES = ("sequence_layer", "sequence_token", "end_token", "prompt_layer")
CAUSAL = Observer(sink_factor=1.1)


def assert_profile(found, expected, tolerance=1e-5):
    for name in NESTED:
        moments = getattr(found, name)
        np.testing.assert_array_equal(moments.count, expected[name][0], err_msg=name)
        for part, other in zip((moments.mean, moments.m2), expected[name][1:], strict=True):
            np.testing.assert_allclose(part, other, rtol=1e-4, atol=tolerance, err_msg=name)
    for name in (*SEQUENCES, "largest_norm"):
        np.testing.assert_allclose(
            getattr(found, name), expected[name], rtol=1e-5, atol=tolerance, err_msg=name
        )
    for name in ("layer_histogram", "token_histogram", "sinks"):
        np.testing.assert_array_equal(getattr(found, name), expected[name], err_msg=name)


def profile_of(model, prompts, sampler, observer=DIFFUSION, batch_size=2):
    return profile_model(model, prompts, sampler, observer=observer, batch_size=batch_size)


def states_of(model, tokens, valid):
    """[L+1, B, T, D]: the embedding, and what leaves every layer."""
    states, _ = model.run(all_states, jnp.asarray(tokens), jnp.asarray(valid))
    return np.asarray(states, float)


@timed_jit("cfg")
def all_states(params, tokens, valid, *, cfg):
    embedding = transformer.embed(
        cfg, params, tokens, transformer.block_inputs(cfg, valid, tokens.shape)
    )
    out = transformer.run_layers(cfg, params, tokens, valid, observe=lambda h, new: new)
    return jnp.concatenate([embedding[None], out.observed])


def replay(model, prompts, sampler):
    """The calls of each sequence, from its canvas before every step: a call reveals something."""
    tokens, valid = pad_prompts(prompts, max(map(len, prompts)), 0)
    rows = model.place_sequences((tokens, valid, request_keys(0, prompt_keys(prompts))))
    settings = {"sampler": sampler, "cache": NoCache(), "executor": "auto"}
    state, _ = model.run(generating.start_program, *rows, **settings, num_layers=model.num_layers)
    present = np.pad(valid, ((0, 0), (0, G)), constant_values=True)
    settings["placement"] = placement_of(state)
    calls = [[] for _ in prompts]
    for step in range(sampler.steps):
        before = np.asarray(state.tokens)
        states = states_of(model, before, present)
        args = state, np.int32(step + 1), *rows, None
        state, _ = model.run(generating.segment_program, *args, **settings)
        for i in np.flatnonzero((before != np.asarray(state.tokens)).any(axis=1)):
            calls[i].append(Call(step, before[i, present[i]], states[:, i, present[i]]))
    return calls


@pytest.fixture(scope="module")
def llada():
    """The golden LLaDA, its sampler and its profile in batches of two, the last one padded."""
    model, sampler = load(GOLDEN / "llada_tiny", "float32"), Confidence(G, steps=5)
    return model, sampler, profile_of(model, PROMPTS, sampler)


def test_llada_has_the_profile_of_plain_numpy(llada):
    model, sampler, profile = llada
    calls = [Watched(model, prompt, sampler).calls() for prompt in PROMPTS]
    assert [len(x) for x in calls] == [5] * 3
    assert_profile(profile, plain_profile(calls, 5, G, DIFFUSION, 5, model.config.mask_id))
    assert profile.change.count.sum() > 0 and profile.sinks.sum() > 0


def test_a_bad_prompt_is_named_before_the_first_batch(llada):
    model, sampler, _ = llada
    prompts = [[5, 6]] * 4 + [[5, model.config.mask_id]]
    with pytest.raises(InputError, match=r"prompt 4 contains \[MASK\]"):
        profile_model(model, prompts, sampler, batch_size=2)


def test_without_an_observer_the_record_holds_nothing_more(llada):
    model, sampler, _ = llada
    rows = model.place_sequences((np.ones((2, 3), np.int32), None, request_keys(0, [1, 2])))
    settings = {"cfg": model.config, "sampler": sampler, "cache": NoCache(), "executor": "auto"}
    program = partial(generating.generate_program.__wrapped__, **settings)
    _, record = jax.eval_shape(program, model.params, *rows, None)
    assert record.observed is None and len(jax.tree.leaves(record)) == 6


def test_batches_and_order_do_not_matter(llada):
    model, sampler, profile = llada
    turned = profile_of(model, PROMPTS[::-1], sampler, batch_size=4)
    as_numbers = {name: list(vars(getattr(turned, name)).values()) for name in NESTED}
    for name in SEQUENCES:
        as_numbers[name] = getattr(turned, name)[::-1]
    for name in ("layer_histogram", "token_histogram", "sinks", "largest_norm"):
        as_numbers[name] = getattr(turned, name)
    assert_profile(profile, as_numbers, 1e-6)


def test_dream_has_the_profile_of_all_states_at_once():
    model, sampler = load(GOLDEN / "dream_tiny", "float32"), Dream(G, 4)
    profile, calls = profile_of(model, PROMPTS, sampler), replay(model, PROMPTS, sampler)
    assert_profile(profile, plain_profile(calls, 5, G, DIFFUSION, 4, model.config.mask_id))


def test_ancestral_sampling_counts_each_sequence_at_its_own_steps():
    """MDLM: sequences of one call may be at different steps, and steps without tokens make none."""
    model, sampler = load(GOLDEN / "mdlm_tiny", "float32"), Ancestral(G, 9)
    prompts = [[1, 2], [3, 4], [1, 2]]  # the equal ones are drawn independently
    profile, calls = profile_of(model, prompts, sampler), replay(model, prompts, sampler)
    assert len({len(x) for x in calls}) > 1  # so that some wait for others
    assert_profile(profile, plain_profile(calls, 2, G, DIFFUSION, 9, model.config.mask_id))
    assert profile.num_bins == 3
    assert not np.array_equal(profile.sequence_layer[0], profile.sequence_layer[2])


def test_a_causal_model_has_the_profile_of_one_forward_pass():
    model, sampler = load(GOLDEN / "qwen2_tiny", "float32"), Autoregressive(G)
    profile = profile_of(model, PROMPTS, sampler, CAUSAL)
    tokens, valid = pad_prompts(PROMPTS, 5, 0)
    tokens = generate(model, tokens, valid, sampler=sampler).tokens
    present = np.pad(valid, ((0, 0), (0, G)), constant_values=True)
    states = states_of(model, tokens, present)
    calls = [[Call(0, tokens[i, here], states[:, i, here])] for i, here in enumerate(present)]
    assert_profile(profile, plain_profile(calls, 5, G, CAUSAL, 1))
    assert profile.facts.family == "causal" and profile.change.mean.shape[0] == 0


def test_an_answer_of_one_token_has_no_neighbours():
    """Its cosine is unknown, not 0, which would count as the largest recency bias."""
    model = load(GOLDEN / "qwen2_tiny", "float32")
    tokens, present = np.tile(np.arange(5 + G), (2, 1)), np.ones((2, 5 + G), bool)
    present[1, 6:] = False
    seen, _ = observe_texts(model, tokens, present, 5, CAUSAL, 2)
    for found in (seen.sequence_token, seen.end_token):
        assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()
    np.testing.assert_array_equal(seen.end_token[0], seen.sequence_token[0])
    assert np.isfinite(seen.sequence_layer).all()


def test_neighbours_of_one_token_say_nothing_at_the_end():
    """They are alike in any model."""
    model = load(GOLDEN / "qwen2_tiny", "float32")
    tokens, present = np.full((2, 5 + G), 7), np.ones((2, 5 + G), bool)
    tokens[0, -1] = 8
    seen, _ = observe_texts(model, tokens, present, 5, CAUSAL, 2)
    assert np.isfinite(seen.sequence_token).all()
    assert np.isfinite(seen.end_token[0]).all() and np.isnan(seen.end_token[1]).all()
