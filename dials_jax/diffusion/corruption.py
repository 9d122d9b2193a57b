"""Masking of training rows."""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float


def corrupt(
    row_keys: jax.Array, answer: Bool[Array, "B T"], ratio: Float[Array, "B"]
) -> Bool[Array, "B T"]:
    """Where tokens are masked: each answer position with its row's probability.

    Args:
      row_keys: one key a row, so that a row's masks do not depend on its batch.
      answer: positions that may be masked.
    """

    def row(key, positions, probability):
        return (jax.random.uniform(key, positions.shape) < probability) & positions

    return jax.vmap(row)(row_keys, answer, ratio)
