"""Steps known beforehand are the steps that the loop would take, folded without a loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.caching import cache as cache_module
from dials_jax.caching.cache import Blocks
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, NoCache, PrefixCache
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.sampling import generate as generating
from dials_jax.sampling import loop as denoise_module
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.timetable import block_steps, run_length_encode, run_program
from tests.conftest import MASK, init_params, silence, small_config

EVERYONE = {"proportions": (1.0,), "depths": (0.0,)}  # no token is skipped: little to compile
# A refresh within a block, at every block's start, within and at a start, and beyond the blocks.
CACHES = {
    "none": NoCache(),
    "dual": DualCache(),
    "prefix": PrefixCache(),
    **{f"skip {n}": EarlySkip(**EVERYONE, prompt_every=n, block_every=2) for n in (2, 4, 6, 8, 16)},
    "skip 5": EarlySkip(**EVERYONE, prompt_every=5, block_every=4),
}


def expand(timetable):
    """The steps of a timetable, one after the other."""
    steps = []
    for times, body in timetable:
        steps += times * (expand(body) if isinstance(body, list) else [body])
    return steps


@pytest.mark.parametrize(
    "steps, folded",
    [
        ([], []),
        ([3], [(1, 3)]),
        ([5, 2, 2, 1, 2, 2, 1], [(1, 5), (2, [(2, 2), (1, 1)])]),
        ([0, 1, 0, 1, 0], [(2, [(1, 0), (1, 1)]), (1, 0)]),
        ([0, 1, 1, 0, 1], [(1, 0), (2, 1), (1, 0), (1, 1)]),  # runs of other lengths
        ([(0, 2), 1, 1], [(1, (0, 2)), (2, 1)]),
    ],
)
def test_folding_by_hand(steps, folded):
    assert run_length_encode(steps) == folded


def test_unfolding_gives_the_steps_again():
    rng = np.random.default_rng(0)
    choices = [0, 1, 2, (0, 1)]
    for length in [*range(12), *[30] * 30]:
        steps = [choices[i] for i in rng.integers(0, rng.integers(1, 5), length)]
        assert expand(run_length_encode(steps)) == steps


def test_following_takes_every_step_once_and_in_order():
    steps = [5, 2, 2, 1, 2, 2, 1, 2, 2, (7, 8), (7, 8)]

    def note(variant, state):
        seen, count = state
        return seen.at[count].set(variant), count + 1

    def run_due(variants, state, times):
        for _ in range(times):
            state = note(10 * variants[0] + variants[1], state)
        return state

    state = jnp.zeros(12, int), jnp.asarray(0)
    seen, count = run_program(run_length_encode(steps), note, run_due, state)
    assert count == len(steps)
    np.testing.assert_array_equal(seen[:-1], [*steps[:-2], 78, 78])


@pytest.mark.parametrize("name", CACHES)
def test_the_program_has_the_variant_of_every_step(name):
    cache, blocks = CACHES[name], Blocks(5, 4, 3, 1)
    cfg = small_config()
    inputs = transformer.block_inputs(cfg, None, (1, 17))
    net = CanvasModel(cfg, None, None, "auto", inputs, None, None, 5)
    variants = cache.forward_variants(net, blocks)
    steps = block_steps(variants, blocks, 4)
    assert len(steps) == 4
    for step, numbers in enumerate(steps):
        due = {
            next(
                i
                for i, v in enumerate(variants)
                if v.due(jnp.asarray(block), jnp.asarray(step), None)
            )
            for block in range(blocks.count)
        }
        assert due == ({numbers} if isinstance(numbers, int) else set(numbers))


@pytest.mark.parametrize("every", [2, 4, 8])
def test_a_block_is_refreshed_as_often_as_its_setting_says(every):
    cache, blocks = EarlySkip(**EVERYONE, prompt_every=64, block_every=every), Blocks(5, 8, 2, 1)
    cfg = small_config()
    inputs = transformer.block_inputs(cfg, None, (1, 21))
    net = CanvasModel(cfg, None, None, "auto", inputs, None, None, 5)
    variants = cache.forward_variants(net, blocks)
    refresh = len(variants) - 2  # the one before the last, which skips tokens
    later = block_steps(variants, blocks, 8)[1:]
    assert [number == refresh for number in later] == [s % every == 0 for s in range(1, 8)]


@pytest.fixture(scope="module")
def model():
    """Of two layers, and lively enough that tokens differ."""
    cfg = small_config(num_layers=2)
    params = jax.tree.map(lambda x: 8 * x, init_params(cfg, 3))
    return Model(cfg, silence(params, MASK))


@pytest.mark.parametrize("name", ["dual", "prefix", "skip 2", "skip 4", "skip 6", "skip 5"])
def test_known_steps_are_those_that_a_search_takes(model, monkeypatch, name):
    """The loop that asks before every call, whether it needs to or not, gives the same."""
    sampler = Confidence(gen_length=12, block_length=4, steps=12)
    if name == "skip 5":  # steps 1 and 2 may be a skip or a refresh of one size, in any order
        monkeypatch.setattr(cache_module, "MAX_SIZES", 1)
    if name in ("dual", "prefix"):
        sampler = dataclasses.replace(sampler, steps=6)  # two tokens a step
    prompts = jax.random.randint(jax.random.key(0), (2, 5), 2, 60)
    rows = model.place_sequences((prompts, None, jax.random.split(jax.random.key(1), 2)))
    settings = {"sampler": sampler, "cache": CACHES[name], "executor": "auto"}
    assert denoise_module.is_fixed(sampler, CACHES[name])

    def run():
        return model.run(generating.generate_program.traced_anew(), *rows, None, **settings)[0]

    tokens, known = run()
    monkeypatch.setattr(denoise_module, "is_fixed", lambda sampler, cache: False)
    other, searched = run()
    np.testing.assert_array_equal(other, tokens)
    assert known.nfe == searched.nfe == sampler.steps
    np.testing.assert_array_equal(known.variant, searched.variant[: known.nfe])
    np.testing.assert_allclose(known.masked_share, searched.masked_share[: known.nfe])
