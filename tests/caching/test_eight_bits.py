"""The plain network in 8 bits, and caches on weights in 8 bits against none.

`tests/eight_bits` compares every policy, cache and sampler with the plain decoder in 8 bits.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import dials_jax as dj
from dials_jax.caching.plain import DualCache, PrefixCache
from dials_jax.models.model import Model
from dials_jax.reference import Decoder
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Static
from tests.conftest import in_eight_bits

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def in_8_bits(models):
    def make(model, kind):
        return Model(model.config, in_eight_bits(model.params, kind))

    return {(k, x): make(models[x], k) for k in ("int8", "fp8") for x in ("llada", "dream")}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_logits_are_those_of_the_plain_network(in_8_bits, kind):
    """But where rounding in float32 moves an input over the edge between two roundings."""
    dream = in_8_bits[kind, "dream"]
    model = Model(dataclasses.replace(dream.config, right_shift=False), dream.params)
    tokens = np.random.default_rng(0).integers(2, 60, (8, 21))
    actual, errors = np.asarray(model.apply(tokens).logits), []
    for row, logits in zip(tokens, actual, strict=True):
        decoder = Decoder(model, row[:5], Confidence(gen_length=16, block_length=8))
        decoder.tokens = row
        _, h, _ = decoder.run_layers(np.arange(21), 0, 0, None)
        errors.append(np.abs(decoder.head(h) - logits).max(axis=-1) / logits.std())
    assert np.median(errors) < 1e-5 and np.max(errors) < 0.2


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("llada_tiny", Confidence(16, block_length=8, steps=2)),
        ("dream_tiny", Dream(12, 1, alg="maskgit_plus")),
    ],
)
def test_a_cache_that_is_always_new_changes_nothing(name, sampler):
    """One step a block: nothing that was computed earlier is read."""
    model = dj.load(GOLDEN / name, weights="int8")
    prompts = np.random.default_rng(0).integers(1, 60, (2, 6))
    valid = np.arange(6) >= np.array([0, 2])[:, None]
    run = dict(valid=valid, sampler=sampler, policy=Static((1,)))
    expected = generate(model, prompts, **run).tokens
    for cache in (PrefixCache(), DualCache()):
        np.testing.assert_array_equal(generate(model, prompts, cache=cache, **run).tokens, expected)
