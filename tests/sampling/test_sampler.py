"""A sampler of one's own: any class with the members of `Sampler`."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dials_jax.caching.cache import Work
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.plain import DualCache, NoCache
from dials_jax.errors import InputError, require
from dials_jax.models import transformer
from dials_jax.sampling.ancestral import Ancestral
from dials_jax.sampling.autoregressive import Autoregressive
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.sampling.generate import generate
from dials_jax.sampling.loop import BlockSampler
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sampling.sampler import CallRecord, Sampler, append_call, start_record

P, G = 5, 6


@dataclass(frozen=True)
class LeftToRight:
    """Reveals the leftmost masked token with every call of the whole canvas."""

    cfg_scale = 0.0
    takes_schedule = True
    one_program = True

    gen_length: int

    def check(self, cfg, present, policy, cache):
        cfg.require_mask()
        require(cache is None, "LeftToRight runs the whole canvas; leave out `cache`")

    def with_length(self, gen_length):
        return LeftToRight(gen_length)

    def blank_id(self, cfg):
        return cfg.mask_id

    def count_steps(self, cache):
        return self.gen_length

    def make_steps(self, net, prompt_length, keys, cache):
        return LeftToRightSteps(net, prompt_length, self.gen_length)

    def work(self, cfg, cache, prompt_length):
        return [Work((prompt_length + self.gen_length,) * cfg.num_layers, 1, prompt_length)]


class State(NamedTuple):
    tokens: jax.Array
    step: jax.Array
    record: CallRecord


@dataclass
class LeftToRightSteps:
    net: CanvasModel
    prompt_length: int
    num_steps: int

    def start(self, canvas, num_layers):
        record = start_record(self.num_steps, num_layers, len(canvas))
        return State(canvas, jnp.asarray(0, jnp.int32), record)

    def run(self, state, stop=None):
        stop = self.num_steps if stop is None else stop
        return lax.while_loop(lambda state: state.step < stop, self.run_step, state)

    def run_step(self, state):
        net, at = self.net, self.prompt_length + state.step
        out = net.run_range(
            state.tokens, 0, net.length, state.step, output_positions=net.positions(at, 1)
        )
        logits = transformer.head_logits(net.cfg, net.params, out.h)
        token = jnp.argmax(transformer.apply_subs(net.cfg, logits), axis=-1)
        tokens = lax.dynamic_update_slice_in_dim(
            state.tokens, token.astype(state.tokens.dtype), at, axis=1
        )
        share = jnp.full(len(tokens), 1 - state.step / self.num_steps)
        record = append_call(state.record, out.gates, share, 0, state.step)
        return State(tokens, state.step + 1, record)


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(2, 60, (3, P))


def test_it_runs_through_generate(lively, prompts):
    out = generate(lively, prompts, sampler=LeftToRight(G))
    # Blocks of one token are filled from left to right, too.
    expected = generate(lively, prompts, sampler=Confidence(gen_length=G, block_length=1))
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_allclose(out.masked_share, expected.masked_share, rtol=1e-6)
    np.testing.assert_array_equal(out.gates, expected.gates)
    assert out.nfe == G and out.flops.model_total == expected.flops.model_total


def test_it_takes_a_schedule(lively, prompts):
    models = {"A": lively, "B": lively}
    out = generate(models, prompts, sampler=LeftToRight(G), schedule=Schedule.parse("A2,B3,A1"))
    np.testing.assert_array_equal(
        out.tokens, generate(lively, prompts, sampler=LeftToRight(G)).tokens
    )
    assert out.steps.tolist() == list(range(G))


def test_its_own_refusals_are_heard(lively, prompts):
    with pytest.raises(InputError, match="LeftToRight runs the whole canvas"):
        generate(lively, prompts, sampler=LeftToRight(G), cache=DualCache())


SAMPLERS = {
    "confidence": Confidence(gen_length=8),
    "dream": Dream(max_new_tokens=8),
    "ancestral": Ancestral(length=8, steps=8),
    "published": Ancestral(length=8, steps=8, precision="float32"),
    "autoregressive": Autoregressive(max_new_tokens=8),
    "own": LeftToRight(8),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_settings_that_were_as_many_as_tokens_follow_the_length(name):
    sampler = SAMPLERS[name]
    assert isinstance(sampler, Sampler) and sampler.gen_length == 8
    longer = sampler.with_length(12)
    assert type(longer) is type(sampler) and longer.gen_length == 12
    assert longer.count_steps(NoCache()) == 12
    assert longer.with_length(8) == sampler


def test_other_steps_and_blocks_stay():
    assert Confidence(8, 4, 4).with_length(16) == Confidence(16, 4, 4)
    assert Dream(8, 5).with_length(16) == Dream(16, 5)
    assert Ancestral(8, 100).with_length(16) == Ancestral(16, 100)


@dataclass(frozen=True)
class Rightmost(BlockSampler):
    """Reveals the rightmost masked token of a block, by the two methods that a class must have."""

    gen_length: int = G
    block_length: int = 3
    steps_per_block = 3
    max_quota = 1
    is_probability = True

    def propose(self, cfg, logits, keys):
        logits = logits.at[..., cfg.mask_id].set(-jnp.inf)
        return jnp.argmax(logits, axis=-1), jnp.max(jax.nn.softmax(logits), axis=-1)

    def choose(self, confidence, info, keys):
        masked = confidence > -jnp.inf
        after = jnp.cumsum(masked[:, ::-1], axis=1)[:, ::-1]
        return masked & (after == 1)


@pytest.mark.parametrize("cache", [None, DualCache()])
def test_a_block_sampler_needs_two_methods(lively, cache):
    prompts = np.arange(2, 2 + 2 * P).reshape(2, P)
    out = generate(lively, prompts, sampler=Rightmost(), cache=cache, trajectory=True)
    masked = (out.trajectory.tokens == lively.config.mask_id)[:, 0, P:]
    np.testing.assert_array_equal(masked.sum(axis=1), [5, 4, 3, 2, 1, 0])
    np.testing.assert_array_equal(masked[0], [True, True, False, True, True, True])
    np.testing.assert_array_equal(masked[3], [False] * 3 + [True, True, False])
    assert Rightmost().with_length(9) == Rightmost(9)


def test_what_a_sampler_or_a_cache_has_not_is_named(lively, untyped):
    class Half:
        gen_length, cfg_scale, takes_schedule, one_program = 4, 0.0, True, True

        def check(self, cfg, present, policy, cache):
            pass

    class NoSteps(DualCache):
        forward_variants = property()

    missing = "it has no with_length, blank_id, count_steps, make_steps, work"
    with pytest.raises(InputError, match=rf"is no sampler \({missing}\); give one, as"):
        generate(lively, [[5, 9]], sampler=Half())
    with pytest.raises(InputError, match=r"is no cache \(it has no forward_variants\); give one"):
        generate(lively, [[5, 9]], sampler=Confidence(4), cache=NoSteps())
