"""Rotary position embedding, half-split (the first half of a head turns with the second)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dials_jax.nn.kernels.implementation import (
    alike_on_hopper,
    dispatch,
    fixed_tiles,
    plain_jax,
)
from dials_jax.nn.kernels.row_tiles import in_row_tiles


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
    return dispatch(ROPE, x, sin_cos)


def xla_rope(
    x: Float[Array, "B T N H"], sin_cos: Float[Array, "B T 2 _"]
) -> Float[Array, "B T N H"]:
    sin, cos = sin_cos[..., 0, None, :], sin_cos[..., 1, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def tiled_rope(
    x: Float[Array, "B T N H"], sin_cos: Float[Array, "B T 2 _"]
) -> Float[Array, "B T N H"]:
    """The same in tiles of constant shape.

    Of a sum of two products a CPU's compiler rounds both, or one of them: with jax 0.12 that
    depends on what else is in the loop, and so on the number of tokens.
    """
    *tokens, num_heads, size = x.shape
    split = num_heads * size

    def turn(tile: Float[Array, "R F"]) -> Float[Array, "R X"]:
        heads = tile[None, :, :split].reshape(1, -1, num_heads, size)
        angles = tile[None, :, split:].reshape(1, -1, 2, size // 2)
        return xla_rope(heads, angles).reshape(-1, split)

    sin_cos = jnp.broadcast_to(sin_cos, (*tokens, 2, size // 2))
    parts = [y.reshape(-1, n) for y, n in ((x.astype(jnp.float32), split), (sin_cos, size))]
    turned = in_row_tiles(turn, jnp.concatenate(parts, axis=1), least=2)
    return turned.reshape(*tokens, num_heads, size).astype(x.dtype)


ROPE = (  # (x, sin_cos) -> x, turned
    alike_on_hopper(xla_rope),
    fixed_tiles(tiled_rope),
    plain_jax(xla_rope),
)
