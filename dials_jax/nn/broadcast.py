"""Multiplies by, or adds, a parameter that many positions share: a norm's scale, a bias, a gate.

The gradient of such a parameter is a sum over all those positions. In bfloat16 every term would be
rounded, and on some devices every partial sum: 1 to 5 % off for a norm's scale. Here terms are
computed and summed in float32. Values are those of the plain operation in x's dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def scaled(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * scale in x's dtype; scale broadcasts to the shape of x."""
    return x * scale.astype(x.dtype)


def _scaled_backward(inputs, g):
    x, scale = inputs
    terms = g.astype(jnp.float32) * x.astype(jnp.float32)
    return g * scale.astype(g.dtype), _summed(terms, scale)


scaled.defvjp(lambda x, scale: (scaled(x, scale), (x, scale)), _scaled_backward)


@jax.custom_vjp
def shifted(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + bias in x's dtype; bias broadcasts to the shape of x."""
    return x + bias.astype(x.dtype)


# The bias is passed for its shape and dtype; its values are not read, so they need no memory.
shifted.defvjp(
    lambda x, bias: (shifted(x, bias), bias),
    lambda bias, g: (g, _summed(g.astype(jnp.float32), bias)),
)


def _summed(terms: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """Summed over the axes along which an array of the shape of `like` is repeated."""
    shape = (1,) * (terms.ndim - like.ndim) + like.shape
    axes = [i for i, (n, m) in enumerate(zip(terms.shape, shape, strict=True)) if m == 1 != n]
    return jnp.sum(terms, axis=axes).reshape(like.shape).astype(like.dtype)
