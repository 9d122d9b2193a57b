"""Random initial values of parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dials_jax.config import ModelConfig


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = 0.02, depth: int | None = None
) -> Float[Array, "..."]:
    """Truncated normal; `depth` scales writers to the residual stream by 1/sqrt(2 * depth)."""
    scale = scale if depth is None else scale / (2 * depth) ** 0.5
    return scale * jax.random.truncated_normal(rngs.params(), -3, 3, shape)


def residual_depth(cfg: ModelConfig) -> int | None:
    """The `depth` of writers to the residual stream; none where gates open from zero."""
    return None if cfg.cond_dim else cfg.num_layers


def zeros_if(present: bool, shape: tuple[int, ...]) -> nnx.Param | None:
    """A bias that starts at zero, or no bias."""
    return nnx.Param(jnp.zeros(shape)) if present else None
