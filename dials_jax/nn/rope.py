"""Rotary position embedding, half-split (the first half of a head turns with the second)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def positions_of(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that count from each sequence's first real token, so padding shifts nothing."""
    return jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0)


def rope_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> Float[Array, "B T 2 {head_dim//2}"]:
    """Sines and cosines in float32; bfloat16 angles are wrong beyond a few hundred tokens."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-2)


def apply_rope(
    x: Float[Array, "B T N H"], sin_cos: Float[Array, "B T 2 _"]
) -> Float[Array, "B T N H"]:
    """Turns each pair (i, i + H/2) by its angle, in float32."""
    sin, cos = sin_cos[..., 0, None, :], sin_cos[..., 1, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
