"""Caches, policies and samplers on weights in 8 bits, against the plain decoder in 8 bits."""

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
from tests.caching.cases import CACHES, keys_of, policies_of
from tests.caching.test_compositions import SAMPLERS, assert_equal_to_the_decoder
from tests.conftest import in_eight_bits

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    ("int8", "llada", "none", "routed", "threshold", "compact"),
    ("int8", "dream", "none", "full", "entropy", "auto"),
    ("fp8", "dream", "prefix", "random", "threshold", "select"),
    ("int8", "dream", "dual", "routed", "threshold", "select"),
    ("fp8", "llada", "dual", "soft", "quota", "compact"),
    ("int8", "llada", "hidden", "static", "quota 4", "auto"),
    ("fp8", "llada", "skip", "routed", "quota", "select"),
]


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


@pytest.mark.parametrize("kind, family, cache, policy, rule, executor", CASES)
def test_every_sequence_is_what_the_plain_decoder_gives(
    in_8_bits, prompts, kind, family, cache, policy, rule, executor
):
    model = in_8_bits[kind, family]
    settings = {
        "sampler": SAMPLERS[rule], "cache": CACHES[cache], "key": keys_of(3),
        "policy": policies_of(model.config)[policy],
    }  # fmt: skip
    out = generate(model, *prompts, **settings, executor=executor)
    assert_equal_to_the_decoder(out, model, prompts, **settings)


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
