"""Random keys, all of one kind, so that a sequence's random numbers do not depend on its batch.

`vmap` over threefry keys gives the same numbers as each key alone. Over keys of "rbg" and
"unsafe_rbg", which are usual on TPUs, it reads only the first key of the batch (see `jax.random`).
So every key made from a seed names its kind, and keys of another kind are converted on entry.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dials_jax.config import Seed, as_type

KIND = "threefry2x32"


def seed_key(seed: int) -> jax.Array:
    """The key of a seed, independent of the kind of key that JAX is set to make.

    Raises: InputError for a seed beyond 32 bits, since JAX would ignore the other bits.
    """
    return jax.random.key(as_type(Seed, seed, "seed"), impl=KIND)


@jax.jit
def fold_in_each(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """One key per number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def threefry_key(key: jax.Array) -> jax.Array:
    """The key, or array of keys, as threefry keys; equal keys stay equal.

    A key of "rbg" is a threefry key written twice, and JAX seeds and splits both alike. It becomes
    that key, so a seed gives the same result under either kind. In other keys every word counts.
    """
    if jax.random.key_impl(key) == KIND:
        return key
    words = jax.random.key_data(key)
    keys = jax.vmap(_of_words)(words.reshape(-1, words.shape[-1]))
    return keys.reshape(words.shape[:-1])


def _of_words(words: jax.Array) -> jax.Array:
    words = jnp.pad(words, (words.size % 2, 0))  # "philox2x32" has one
    key = folded = jax.random.wrap_key_data(words[:2], impl=KIND)
    for word in words[2:]:
        folded = jax.random.fold_in(folded, word)
    return jnp.where(jnp.all(words.reshape(-1, 2) == words[:2]), key, folded)
