"""Masking of training rows."""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float


def corrupt(
    row_keys: jax.Array, answer: Bool[Array, "B T"], min_ratio: float
) -> tuple[Bool[Array, "B T"], Float[Array, "B"]]:
    """Masks each answer position with its row's probability.

    Args:
      row_keys: one key a row, so that a row's masks do not depend on its batch.
      answer: positions that may be masked.
      min_ratio: the probability is uniform between this and 1. That is (1 - eps) t + eps with
        t ~ U(0, 1), the linear schedule of LLaDA (Nie et al. 2025, algorithms 1 and 2).

    Returns: (masked, ratio), the ratio being the probability and not the realised share.
    """

    def row(key, positions):
        ratio_key, mask_key = jax.random.split(key)
        ratio = jax.random.uniform(ratio_key, minval=min_ratio, maxval=1.0)
        return (jax.random.uniform(mask_key, positions.shape) < ratio) & positions, ratio

    return jax.vmap(row)(row_keys, answer)
