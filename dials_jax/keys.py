"""Random keys, all of one kind: a sequence's random numbers are its own in whatever batch.

`vmap` over threefry keys gives what each key gives by itself. Over keys of "rbg" and "unsafe_rbg",
which are usual on TPUs, it reads the first of the batch and no other (as `jax.random` says). So
every key made from a seed names its kind, and keys of another kind are converted where they come
in.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dials_jax.config import Seed, as_type

KIND = "threefry2x32"


def seed_key(seed: int) -> jax.Array:
    """The key of a seed, whatever kind JAX is set to make.

    Raises: InputError for a seed beyond 32 bits, of which JAX would leave out the rest.
    """
    return jax.random.key(as_type(Seed, seed, "seed"), impl=KIND)


def threefry_key(key: jax.Array) -> jax.Array:
    """The key, or array of keys, as threefry keys: equal ones from equal ones.

    A key of "rbg" is a threefry key written twice, and JAX seeds and splits both alike: it becomes
    that key, so a seed gives the same result under either kind. Of other keys every word counts.
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
