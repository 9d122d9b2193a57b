"""Computes few positions at a time, where the logits of all positions would not fit in memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def over_positions(fn: Callable[..., PyTree], size: int, *arrays: PyTree) -> PyTree:
    """`fn` of slices [B, at most size, ...] of the arrays [B, T, ...], one after another, joined.

    The batch is not cut, so its sharding stays. Slices have equal size; the last one is padded by
    fewer positions than there are slices.
    """
    num_positions = jax.tree.leaves(arrays)[0].shape[1]
    count = -(-num_positions // size)
    if count == 1:
        return fn(*arrays)
    size = -(-num_positions // count)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, count * size - num_positions), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * size, *x.shape[3:])[:, :num_positions]

    out = jax.lax.map(lambda slices: fn(*slices), jax.tree.map(split, arrays))
    return jax.tree.map(join, out)
