"""Sums along the last axis, and what is made of them: means, softmax and its normaliser.

XLA chooses the order of such a sum by the shape of the whole array. In the batch-invariant mode it
is written into the program: 64 neighbours are added up, and of these sums 64 neighbours, counted
from the right, so that zeros to the left of a row change nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dials_jax.nn.kernels.implementation import (
    alike_on_hopper,
    dispatch,
    fixed_tiles,
    plain_jax,
)
from dials_jax.nn.kernels.row_tiles import in_tiles

ADDED_UP = 64  # numbers that are added up at a time


def ordered_sum(x: Float[Array, "*B D"], keepdims: bool = False) -> Float[Array, "..."]:
    """The sum in an order that depends on nothing but D."""
    while x.shape[-1] > 1:
        group = min(ADDED_UP, x.shape[-1])
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(-x.shape[-1] % group, 0)])
        x = x.reshape(*x.shape[:-1], -1, group)
        # Sums of pairs, then of these: what XLA fuses or splits changes no order.
        parts = [x[..., i] for i in range(group)]
        while len(parts) > 1:
            pairs = zip(parts[-2::-2], parts[::-2], strict=False)
            parts = parts[: len(parts) % 2] + [a + b for a, b in pairs][::-1]
        x = lax.optimization_barrier(parts[0])  # else every thread would add up a whole row
    return x if keepdims else x[..., 0]


def xla_sum(x: Float[Array, "*B D"], keepdims: bool = False) -> Float[Array, "..."]:
    return jnp.sum(x, axis=-1, keepdims=keepdims)


def ordered_logsumexp(x: Float[Array, "*B D"], keepdims: bool = False) -> Float[Array, "..."]:
    top = jnp.max(x, axis=-1, keepdims=True)
    top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    out = jnp.log(ordered_sum(jnp.exp(x - top), keepdims=True)) + top
    return out if keepdims else out[..., 0]


def xla_logsumexp(x: Float[Array, "*B D"], keepdims: bool = False) -> Float[Array, "..."]:
    return jax.nn.logsumexp(x, axis=-1, keepdims=keepdims)


def ordered_log_softmax(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return x - ordered_logsumexp(x, keepdims=True)


def ordered_softmax(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return jnp.exp(ordered_log_softmax(x))


def tiled_logsumexp(x: Float[Array, "*B D"], keepdims: bool = False) -> Float[Array, "..."]:
    out = in_tiles(lambda rows: ordered_logsumexp(rows, keepdims=True))(x)
    return out if keepdims else out[..., 0]


SUM = (fixed_tiles(ordered_sum), plain_jax(xla_sum))
LOGSUMEXP = (
    alike_on_hopper(ordered_logsumexp),
    fixed_tiles(tiled_logsumexp),
    plain_jax(xla_logsumexp),
)
LOG_SOFTMAX = (
    alike_on_hopper(ordered_log_softmax),
    fixed_tiles(in_tiles(ordered_log_softmax)),
    plain_jax(jax.nn.log_softmax),
)
SOFTMAX = (
    alike_on_hopper(ordered_softmax),
    fixed_tiles(in_tiles(ordered_softmax)),
    plain_jax(jax.nn.softmax),
)


def row_sum(x: Float[Array, "*B D"], keepdims: bool = False) -> Float[Array, "..."]:
    return dispatch(SUM, x, keepdims)


def row_mean(x: Float[Array, "*B D"], keepdims: bool = False) -> Float[Array, "..."]:
    return row_sum(x, keepdims) / x.shape[-1]


def logsumexp(x: Float[Array, "*B D"], keepdims: bool = False) -> Float[Array, "..."]:
    return dispatch(LOGSUMEXP, x, keepdims)


def row_log_softmax(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return dispatch(LOG_SOFTMAX, x)


def row_softmax(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return dispatch(SOFTMAX, x)
