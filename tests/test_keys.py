"""A sequence's random numbers are its own, whatever kind of key JAX is set to make."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dials_jax.evaluation.likelihood import score_pairs
from dials_jax.evaluation.pairs import pad_pairs
from dials_jax.keys import KIND, seed_key, threefry_key
from dials_jax.models import transformer
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.skipping.policies import Random

ROOT = Path(__file__).parents[1]
KINDS = ("threefry2x32", "rbg", "unsafe_rbg")
MADE = re.compile(r"random\.(key|PRNGKey)\(|Rngs\(\w*seed")


def words(keys):
    return np.asarray(jax.random.key_data(keys))


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_one_key_whatever_the_default(kind):
    with jax.default_prng_impl(kind):
        assert jax.random.key_impl(seed_key(5)) == KIND
        np.testing.assert_array_equal(words(seed_key(5)), [0, 5])
        np.testing.assert_array_equal(words(threefry_key(jax.random.key(5))), [0, 5])


def test_every_key_made_from_a_seed_names_its_kind():
    folders = ("dials_jax", "benchmarks")
    files = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    files += ROOT.glob("*.py")
    for path in files:
        code = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
        code = re.sub(r'""".*?"""', "", code, flags=re.S)
        found = MADE.search(code)
        assert path.name == "keys.py" or not found, f"{path} makes a key; use keys.seed_key"


@pytest.mark.parametrize("kind", [*KINDS, "philox2x32", "philox4x32"])
def test_converted_keys_differ_where_keys_do(kind):
    keys = jax.random.split(jax.random.key(0, impl=kind), 64)
    found = threefry_key(keys)
    assert found.shape == (64,) and jax.random.key_impl(found) == KIND
    assert len(np.unique(words(found), axis=0)) == 64
    np.testing.assert_array_equal(words(found[3]), words(threefry_key(keys[3])))
    np.testing.assert_array_equal(words(found), words(jax.jit(threefry_key)(keys)))
    if kind == "rbg":  # split as threefry's are
        np.testing.assert_array_equal(words(found), words(jax.random.split(seed_key(0), 64)))


def test_every_word_of_a_key_counts():
    keys = np.tile(np.arange(4, dtype=np.uint32), (5, 1)) + np.eye(5, 4, dtype=np.uint32)
    found = threefry_key(jax.random.wrap_key_data(keys, impl="unsafe_rbg"))
    assert len(np.unique(words(found), axis=0)) == 5


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_a_sequence_is_the_same_in_any_batch(kind, model):
    prompts, pairs = np.array([[3, 4], [5, 6], [7, 8]]), [((3,), (4, 5, 6, 7))] * 3
    sampler = Confidence(gen_length=4, block_length=4, steps=2, temperature=1.0)
    how = {"executor": "select", "policy": Random(2), "fill_to": 3}
    with jax.default_prng_impl(kind):
        keys = jax.random.split(jax.random.key(0), 3)
        batch = generate(model, prompts, sampler=sampler, key=keys, **how)
        alone = generate(model, prompts[1:2], sampler=sampler, key=keys[1:2], **how)
        np.testing.assert_array_equal(alone.tokens[0], batch.tokens[1])
        np.testing.assert_array_equal(alone.gates[..., 0], batch.gates[..., 1])
        samples, padded = np.arange(3), pad_pairs(pairs, model.config)
        batch, _ = score_pairs(model, padded, keys, samples, stratum=4, **how)
        last = jax.tree.map(lambda x: x[2:], (padded, keys, samples))
        alone, _ = score_pairs(model, *last, stratum=4, **how)
        np.testing.assert_array_equal(alone.masked_share[0], batch.masked_share[2])
        np.testing.assert_array_equal(alone.gates[:, 0], batch.gates[:, 2])


def test_random_parameters_do_not_follow_the_default(cfg, model):
    with jax.default_prng_impl("rbg"):
        params = transformer.init(cfg, jax.random.key(0))
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, model.params)
    assert all(jax.tree.leaves(same))
