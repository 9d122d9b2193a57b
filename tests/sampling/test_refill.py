"""A prompt's generation does not depend on when it entered the batch, and places do not wait."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dials_jax as dj
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, PrefixCache
from dials_jax.errors import InputError
from dials_jax.models.model import Model, sequence_keys
from dials_jax.models.padding import pad_prompts
from dials_jax.sampling import refill
from dials_jax.sampling.refill import generate_refilled
from dials_jax.skipping.policies import Random
from dials_jax.skipping.routed import Routed
from tests.conftest import EOS, MASK, amplify, init_params, random_routers, silence, small_config

LENGTHS = 3, 5, 2, 8, 4, 6, 1  # of prompts; three sequences at a time


class Ending(dj.Confidence):
    """Says end of text in place of every eighth token of the vocabulary."""

    def propose(self, cfg, logits, keys):
        guess, confidence = super().propose(cfg, logits, keys)
        return jnp.where(guess % 8 == 0, EOS, guess), confidence


class OwnLoop(dj.Confidence):
    def make_steps(self, net, prompt_length, keys, cache):
        return super().make_steps(net, prompt_length, keys, cache)


def ending_model(cfg):
    return Model(cfg, silence(amplify(init_params(cfg), 8), MASK))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 60, n) for n in LENGTHS]


@pytest.fixture(scope="module")
def keys(prompts):
    return sequence_keys(jax.random.key(7), len(prompts))


def run(model, prompts, keys, **settings):
    """Every result by its prompt's number, and the numbers in the order in which they ended."""
    settings = {"batch_size": 3, "length": 8} | settings
    found = list(generate_refilled(model, prompts, keys=keys, **settings))
    return {one.request: one.out for one in found}, [one.request for one in found]


@pytest.mark.parametrize(
    "shift, policy, cache, sampler",
    [
        (False, "routed", DualCache(), Ending(16, 4, threshold=0.9, stop_at_eos=True)),
        (True, "random", None, Ending(16, 4, 8, temperature=1.0, stop_at_eos=True)),
        (True, "routed", DualCache(), Ending(16, 4, factor=1.0, stop_at_eos=True)),
        (False, "random", None, Ending(16, 4, threshold=0.5, edit_threshold=0.6, stop_at_eos=True)),
    ],
    ids=["llada", "dream", "dream-dual", "editing"],
)
def test_a_sequence_is_what_it_is_alone(shift, policy, cache, sampler, prompts, keys):
    cfg = small_config(right_shift=shift)
    model = ending_model(cfg)
    policy = {"routed": Routed(random_routers(cfg), 0.3), "random": Random(1)}[policy]
    settings = {"sampler": sampler, "policy": policy, "cache": cache}
    found, order = run(model, prompts, keys, **settings)
    assert sorted(order) == list(range(len(prompts)))
    tokens, valid = pad_prompts(prompts, 8, cfg.pad_id)
    lengths = set()
    for i, prompt in enumerate(prompts):
        one = slice(i, i + 1)
        alone = dj.generate(model, tokens[one], valid[one], key=keys[one], **settings)
        out = found[i]
        np.testing.assert_array_equal(out.tokens[0, -16:], alone.tokens[0, -16:])
        np.testing.assert_array_equal(out.tokens[0, 8 - len(prompt) : 8], prompt)
        own = out.own[:, 0]  # in the others it waited for the batch
        np.testing.assert_array_equal(out.steps[own], alone.steps)
        np.testing.assert_array_equal(out.gates[own], alone.gates)
        np.testing.assert_allclose(out.masked_share[own], alone.masked_share)
        assert out.num_tokens == alone.num_tokens and out.passes == alone.passes
        lengths.add(alone.steps[-1] // (4 if sampler.max_quota is None else 2))
    assert len(lengths) > 1  # they end in different blocks


def test_places_are_taken_as_soon_as_they_are_free(prompts, keys, monkeypatch):
    """With three places the batch fills fewer blocks than batches that wait for their slowest."""
    model = ending_model(small_config())
    sampler = Ending(16, 4, threshold=0.9, stop_at_eos=True)
    blocks, plain = [], Model.run

    def counted(self, program, *args, **kwargs):
        if program is refill.block_program:
            blocks.append(np.asarray(args[0].enters).sum())
        return plain(self, program, *args, **kwargs)

    monkeypatch.setattr(Model, "run", counted)
    found, order = run(model, prompts, keys, sampler=sampler)
    assert order != sorted(order)  # some end before others that began earlier
    own = [-(-(out.steps.max() + 1) // 4) for out in found.values()]
    waiting = sum(max(own[first : first + 3]) for first in range(0, len(own), 3))
    assert sum(blocks) == len(prompts) and len(blocks) < waiting
    assert len(blocks) >= -(-sum(own) // 3)


def test_one_program_serves_any_number_of_prompts(prompts, keys):
    model = ending_model(small_config())
    sampler = Ending(16, 4, threshold=0.9, stop_at_eos=True)
    run(model, prompts, keys, sampler=sampler)
    before = refill.block_program.num_programs
    found, _ = run(model, prompts[:2], keys[:2], sampler=sampler)
    assert len(found) == 2 and refill.block_program.num_programs == before


def test_a_caller_may_end_a_sequence(prompts, keys):
    model = ending_model(small_config())
    sampler = dj.Confidence(16, 4, threshold=0.9)
    whole, _ = run(model, prompts, keys, sampler=sampler)

    def is_done(request, answer):
        return request == 1 and (answer[:4] != MASK).all()

    cut, order = run(model, prompts, keys, sampler=sampler, is_done=is_done)
    assert order[0] == 1
    np.testing.assert_array_equal(cut[1].tokens[0, 8:12], whole[1].tokens[0, 8:12])
    assert (cut[1].tokens[0, 12:] == MASK).all() and cut[1].nfe < whole[1].nfe
    assert cut[1].num_tokens == 4  # masks are none
    for i in (0, *range(2, len(prompts))):
        np.testing.assert_array_equal(cut[i].tokens, whole[i].tokens)


@pytest.mark.parametrize(
    "sampler, cache, why",
    [
        (dj.Confidence(8, 4), PrefixCache(), "PrefixCache counts"),
        (dj.Confidence(8, 4), EarlySkip(), "EarlySkip counts"),
        (dj.Confidence(8, 4, cfg_scale=1.0), None, "guidance and delay_eos"),
        (dj.Ancestral(8, 8), None, "Ancestral does not fill blocks"),
        (OwnLoop(8, 4), None, "OwnLoop has a loop of its own"),
    ],
)
def test_what_cannot_be_refilled_is_refused(sampler, cache, why, model, prompts, keys):
    with pytest.raises(InputError, match=why):
        run(model, prompts, keys, sampler=sampler, cache=cache)
