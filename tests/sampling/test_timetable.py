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
from dials_jax.sampling.generate import generate
from dials_jax.sampling.timetable import divide_blocks, fold, run_length_encode, run_loops
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


def expand(loops):
    """The steps of loops, one after the other."""
    steps = []
    for times, body in loops:
        steps += times * (expand(body) if isinstance(body, tuple) else [body])
    return steps


def bodies(loops):
    """How many forward passes a program of these loops holds."""
    return sum(bodies(body) if isinstance(body, tuple) else 1 for _, body in loops)


@pytest.mark.parametrize(
    "steps, folded",
    [
        ([], ()),
        ([3], ((1, 3),)),
        ([5, 2, 2, 1, 2, 2, 1], ((1, 5), (2, ((2, 2), (1, 1))))),
        ([0, 1, 0, 1, 0], ((2, ((1, 0), (1, 1))), (1, 0))),
        ([0, 1, 1, 0, 1], ((1, 0), (2, 1), (1, 0), (1, 1))),  # runs of other lengths
    ],
)
def test_folding_by_hand(steps, folded):
    assert fold(steps) == folded
    assert expand(run_length_encode(steps)) == steps


def test_unfolding_gives_the_steps_again():
    rng = np.random.default_rng(0)
    for length in [*range(12), *[30] * 30]:
        steps = rng.integers(0, rng.integers(1, 5), length).tolist()
        assert expand(fold(steps)) == expand(run_length_encode(steps)) == steps


def test_following_takes_every_step_once_and_in_order():
    steps = [5, 2, 2, 1, 2, 2, 1, 2, 2, 7, 7]

    def note(variant, state):
        seen, count = state
        return seen.at[count].set(variant), count + 1

    state = jnp.zeros(12, int), jnp.asarray(0)
    seen, count = run_loops(fold(steps), note, state)
    assert count == len(steps)
    np.testing.assert_array_equal(seen[:-1], steps)


@pytest.mark.parametrize("name", CACHES)
def test_the_parts_have_the_variant_of_every_step(name):
    cache, blocks = CACHES[name], Blocks(5, 4, 3, 1)
    cfg = small_config()
    inputs = transformer.block_inputs(cfg, None, (1, 17))
    net = CanvasModel(cfg, None, None, "auto", inputs, None, None, 5)
    variants = cache.forward_variants(net, blocks)
    parts = divide_blocks(variants, blocks, 4)
    assert len(parts) == blocks.count
    for block, of_block in enumerate(parts):
        steps = [step for part in of_block for step in expand(part)]
        assert steps == [
            next(i for i, v in enumerate(variants) if v.due(np.asarray(block), np.asarray(n), None))
            for n in range(4)
        ]


@pytest.mark.parametrize(
    "cache, programs, passes",
    [
        (NoCache(), 1, 1),
        (DualCache(), 2, 2),
        (PrefixCache(), 9, 9),  # the canvas, and eight sizes of what is left
        (EarlySkip(prompt_every=64, block_every=4), 10, 11),  # eight sizes, and two with skip steps
        (EarlySkip(prompt_every=64, block_every=16), 10, 11),
        (EarlySkip(prompt_every=32, block_every=4), 11, 12),  # also refreshed in mid-block
    ],
)
def test_a_generation_is_this_many_programs(cache, programs, passes):
    """Of LLaDA's shape; each is compiled by itself, so a pass more is a second more on a GPU."""
    sampler = Confidence(gen_length=512, block_length=64)
    cfg = small_config(num_layers=32, max_length=1024)
    for prompt_length in (0, 256):
        parts = sampler.parts(cfg, cache, prompt_length)
        assert sum(len(expand(part)) for part in parts) == 512
        assert len(set(parts)) == programs
        assert sum(map(bodies, set(parts))) == passes
        assert max(map(bodies, set(parts))) <= 2


def test_more_blocks_are_no_more_programs():
    cfg, cache = small_config(num_layers=32, max_length=4096), EarlySkip()
    for num_blocks in (9, 32):
        parts = Confidence(64 * num_blocks, block_length=64).parts(cfg, cache, 8)
        assert len(set(parts)) <= 1 + cache_module.MAX_SIZES + 2


def test_steps_that_depend_on_the_text_have_no_parts():
    cfg = small_config(max_length=256)
    for setting in ({"threshold": 0.9}, {"stop_at_eos": True}):
        assert Confidence(64, block_length=16, **setting).parts(cfg, DualCache(), 8) == []


@pytest.mark.parametrize("every", [2, 4, 8])
def test_a_block_is_refreshed_as_often_as_its_setting_says(every):
    cache, blocks = EarlySkip(**EVERYONE, prompt_every=64, block_every=every), Blocks(5, 8, 2, 1)
    cfg = small_config()
    inputs = transformer.block_inputs(cfg, None, (1, 21))
    net = CanvasModel(cfg, None, None, "auto", inputs, None, None, 5)
    variants = cache.forward_variants(net, blocks)
    refresh = len(variants) - 2  # the one before the last, which skips tokens
    for parts in divide_blocks(variants, blocks, 8):
        later = [step for part in parts for step in expand(part)][1:]
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
    keys = jax.random.split(jax.random.key(1), 2)
    rows = model.place_sequences((prompts, None, keys))
    settings = {"sampler": sampler, "cache": CACHES[name]}
    assert denoise_module.is_fixed(sampler, CACHES[name])
    monkeypatch.setattr(generating, "segment_program", generating.segment_program.traced_anew())
    parts = sampler.parts(model.config, CACHES[name], 5)
    known = generate(model, prompts, key=keys, **settings)
    assert generating.segment_program.num_programs == len(set(parts)) > 1
    tokens = known.tokens
    monkeypatch.setattr(denoise_module, "is_fixed", lambda sampler, cache: False)
    anew = generating.generate_program.traced_anew()
    (other, searched), _ = model.run(anew, *rows, None, executor="auto", **settings)
    np.testing.assert_array_equal(other, tokens)
    assert known.nfe == searched.nfe == sampler.steps
    work = sampler.work(model.config, CACHES[name], 5)
    ran = [work[variant].tokens for variant in searched.variant[: known.nfe]]
    np.testing.assert_array_equal(known.tokens_run, ran)
    np.testing.assert_allclose(known.masked_share, searched.masked_share[: known.nfe])
