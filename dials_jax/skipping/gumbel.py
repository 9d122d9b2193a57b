"""Hard votes and hard gates that gradients pass through."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def gumbel_votes(
    gumbel: Float[Array, "*B 2"], logits: Float[Array, "*B 2"], temperature: float
) -> Float[Array, "*B 2"]:
    """One-hot votes with the gradient of the Gumbel-softmax (Jang et al. 2016).

    Args:
      gumbel: standard Gumbel noise.
      temperature: of the relaxation; it does not change the votes, only their gradient.
    """
    soft = jax.nn.softmax((logits + gumbel) / temperature, axis=-1)
    hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), 2, dtype=soft.dtype)
    return soft + lax.stop_gradient(hard - soft)


def straight_through_threshold(share: Float[Array, "*B"], tau: float) -> Float[Array, "*B"]:
    """1[share > tau] with the gradient of `share` (Bengio et al. 2013; DIALS, equation 6)."""
    hard = (share > tau).astype(share.dtype)
    return share + lax.stop_gradient(hard - share)
