"""RMS normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """Root-mean-square norm: statistics in float32, the product with the scale in x's dtype.

    LLaDA rounds to the activations' dtype before it multiplies by the scale, and so does this.
    """

    def __init__(self, size: int, eps: float, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return normed * self.scale[...].astype(x.dtype)
