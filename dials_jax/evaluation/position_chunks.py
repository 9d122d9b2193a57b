"""Applies a function to chunks of positions, where the logits of all would not fit in memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def map_position_chunks(fn: Callable[..., PyTree], max_size: int, *arrays: PyTree) -> PyTree:
    """Applies `fn` to one chunk of positions after another, and joins the results.

    The batch is not split, so its sharding stays. All chunks have the same size; padding of the
    last one is cut off the result.

    Args:
      fn: takes chunks [B, at most max_size, ...] of the arrays, and gives trees of such arrays.
      arrays: trees of arrays [B, T, ...].
    """
    num_positions = jax.tree.leaves(arrays)[0].shape[1]
    num_chunks = -(-num_positions // max_size)
    if num_chunks == 1:
        return fn(*arrays)
    size = -(-num_positions // num_chunks)

    def split_chunks(x):
        x = jnp.pad(x, [(0, 0), (0, num_chunks * size - num_positions), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, size, *x.shape[2:]), 1, 0)

    def join_chunks(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], num_chunks * size, *x.shape[3:])[:, :num_positions]

    out = jax.lax.map(lambda chunks: fn(*chunks), jax.tree.map(split_chunks, arrays))
    return jax.tree.map(join_chunks, out)
