"""The record of every call is what `generate` does and reports, under any sampler and cache."""

import dataclasses

import jax
import numpy as np
import pytest

import dials_jax as dj
from dials_jax.errors import InputError
from dials_jax.models.model import Model
from dials_jax.sampling import generate as generating
from dials_jax.skipping.routed import Routed
from tests.caching.cases import CACHES
from tests.conftest import MASK, amplify, init_params, silence, small_config
from tests.sampling.test_refill import ending_model

PROMPTS = [[5, 9, 11], [7], [20, 21, 22, 23]]
CASES = {
    "quota": (dj.Confidence(16, 8, 8), None),
    "guided": (dj.Confidence(8, temperature=1.0, cfg_scale=1.0), dj.DualCache()),
    "editing": (dj.Confidence(16, 8, threshold=0.5, edit_threshold=0.4), dj.PrefixCache()),
    "early skip, some": (dj.Confidence(8, threshold=0.5), CACHES["hidden"]),
    "early skip inside": (dj.Confidence(8), CACHES["query"]),
    "ancestral": (dj.Ancestral(12, 8), None),
    "published": (dj.Ancestral(8, 8, precision="float32"), None),
}


@pytest.fixture(scope="module")
def shifted():
    cfg = small_config(right_shift=True)
    return Model(cfg, silence(amplify(init_params(cfg), 8), MASK))


def generate(model, **settings):
    key = jax.random.key(5)
    return dj.generate(model, PROMPTS, key=key, trajectory=True, **settings)


def check_canvases(out, prompt_length):
    """The last canvas is the result, log-probabilities come with the tokens, and nothing moves in
    a call that was made for other sequences."""
    kept = out.trajectory
    assert kept.tokens.shape == kept.log_probs.shape == kept.depth.shape
    np.testing.assert_array_equal(kept.tokens[-1], out.tokens)
    np.testing.assert_array_equal(kept.log_probs[-1][:, prompt_length:], out.log_probs)
    first = np.full_like(out.tokens, MASK)
    first[:, :prompt_length] = out.tokens[:, :prompt_length]
    before = np.concatenate([first[None], kept.tokens[:-1]])
    changed = kept.tokens != before
    assert changed.any() and not changed[~out.own].any()
    assert np.isfinite(kept.log_probs[changed]).all() and (kept.log_probs[changed] <= 0).all()
    return changed


def check_costs(out):
    total, share = out.flops.model_total, out.flops.flops_share
    np.testing.assert_allclose(out.trajectory.flops.sum(), total, rtol=1e-6)
    assert (out.trajectory.flops[~out.own] == 0).all()  # made for other sequences
    full = out.trajectory.full_flops * out.own.sum()
    assert total / full == pytest.approx(share)


@pytest.mark.parametrize("case", CASES)
def test_canvases_and_costs_are_those_of_the_generation(case, lively, shifted, routers):
    sampler, cache = CASES[case]
    model = lively if isinstance(sampler, dj.Ancestral) else shifted
    policy = None if "inside" in case else Routed(routers, 0.3)
    settings = {"sampler": sampler, "policy": policy, "cache": cache}
    out = generate(model, **settings)
    changed = check_canvases(out, 4)
    check_costs(out)
    depth = out.trajectory.depth
    computed = (depth[..., None] > np.arange(model.num_layers)).sum(axis=2)  # [S, B, L]
    run = np.repeat(out.tokens_run[:, None], 3, axis=1)
    assert (computed <= run).all()
    if case != "early skip, some":  # where each keeps two more tokens than it has revealed
        np.testing.assert_array_equal(computed, run)
    predictors = np.roll(changed, -1, axis=2) if model is shifted else changed
    assert (depth[predictors] == model.num_layers).all()  # what is revealed went through all layers
    assert (depth.max(axis=2) == model.num_layers)[out.own].all()


def test_asking_for_it_changes_no_token(shifted):
    sampler = CASES["quota"][0]
    out = generate(shifted, sampler=sampler)
    plain = dj.generate(shifted, PROMPTS, sampler=sampler, key=jax.random.key(5))
    np.testing.assert_array_equal(plain.tokens, out.tokens)
    assert plain.trajectory is None and plain.log_probs is None


def test_one_program_serves_one_shape(shifted, traced_once):
    traced_once(generating, "generate_program")
    for _ in range(2):
        generate(shifted, sampler=dj.Confidence(4), fill_to=4)


def test_models_that_take_turns(lively):
    cfg = dataclasses.replace(lively.config, num_layers=2)
    models = {"L": Model(cfg, amplify(init_params(cfg, 9), 8)), "H": lively}
    sampler, schedule = dj.Confidence(8), dj.Schedule.parse("L2,H4,L2")
    out = generate(models, sampler=sampler, schedule=schedule)
    check_canvases(out, 4)
    check_costs(out)
    light = np.isin(out.steps, (0, 1, 6, 7))
    assert (out.trajectory.depth[light] == 2).all() and (out.trajectory.depth[~light] == 4).all()


def test_a_causal_model_computes_its_prompt_and_then_one_token_per_call():
    model = ending_model(small_config(causal=True))
    out = generate(model, sampler=dj.Autoregressive(6))
    np.testing.assert_array_equal(out.trajectory.tokens[-1], out.tokens)
    computed = (out.trajectory.depth == model.num_layers).sum(axis=2)
    np.testing.assert_array_equal(computed, np.repeat(out.tokens_run[:, :1], 3, 1))
    check_costs(out)


def test_masks_inside_a_text(lively):
    out = dj.infill(lively, [[5, MASK, 9, MASK], [7, MASK]], trajectory=True)
    np.testing.assert_array_equal(out.trajectory.tokens[-1], out.tokens)
    counts = (out.trajectory.tokens == MASK).sum(axis=2)
    np.testing.assert_array_equal(counts, [[1, 0], [0, 0]])
    check_costs(out)


@pytest.mark.parametrize("precision", ["exact", "float32"])
def test_ancestral_log_probabilities_are_those_of_the_step(precision, lively):
    """Each is that of the model on the canvas before the call."""
    out = generate(lively, sampler=dj.Ancestral(6, 4, precision), policy=None)
    kept, one = out.trajectory, 2  # the longest prompt: without padding
    before = np.array([[*PROMPTS[one], *[MASK] * 6]])
    for tokens, log_probs in zip(kept.tokens[:, one], kept.log_probs[:, one], strict=True):
        log_p = np.array(jax.nn.log_softmax(lively.apply(before).logits[0]))
        new = tokens != before[0]
        np.testing.assert_allclose(log_probs[new], log_p[new, tokens[new]], atol=2e-4)
        before = tokens[None]


def test_a_sampler_that_keeps_none_says_so(lively):
    class Other(dj.Confidence):
        gives_trajectory = False

    with pytest.raises(InputError, match="Other keeps no trajectory; leave out trajectory"):
        generate(lively, sampler=Other(4))
