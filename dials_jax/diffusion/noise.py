"""Noise of masked diffusion: the time of every sequence, and the corruption of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

STRATA = 2**32 - 1  # folded into a step's key for what its rows share; no row has this number


class Noise(NamedTuple):
    """The noise level of each row."""

    time: Float[Array, "B"]  # t in (0, 1], which a model with time conditioning is told
    ratio: Float[Array, "B"]  # the probability with which a token is masked
    weight: Float[Array, "B"]  # of the row's cross-entropy


def uniform_noise(sequence_keys: jax.Array, min_ratio: float) -> Noise:
    """Each row by itself, p ~ U(eps, 1), that is (1 - eps) t + eps; the loss weighs 1/p.

    Source: LLaDA (Nie et al. 2025), algorithms 1 and 2.
    """

    def one(key):
        return jax.random.uniform(key, minval=min_ratio, maxval=1.0)

    ratio = jax.vmap(one)(sequence_keys)
    return Noise(time=ratio, ratio=ratio, weight=1 / ratio)


def stratified_noise(place: Float[Array, "B"], eps: float) -> Noise:
    """t = (1 - eps) u + eps with u spread evenly over the batch; the loss weighs 1/t.

    The published code masks with (1 - eps) t, yet weighs by exactly 1/t, and so does this.

    Source: MDLM (Sahoo et al. 2024), section 3.4 and `diffusion.py` of its code.
    """
    time = (1 - eps) * place + eps
    return Noise(time=time, ratio=(1 - eps) * time, weight=1 / time)


def stratified(key: jax.Array, row: Int[Array, "B"], num_rows: int) -> Float[Array, "B"]:
    """(u + i) / n mod 1 for row i of n, with one u ~ U(0, 1) a step: one value in every n-th.

    Each row's value is uniform on [0, 1). It depends on the row's number in the whole batch only,
    not on microbatches or devices.
    """
    u = jax.random.uniform(jax.random.fold_in(key, STRATA))
    return (u / num_rows + row / num_rows) % 1.0


def corrupt(
    sequence_keys: jax.Array, answer: Bool[Array, "B T"], ratio: Float[Array, "B"]
) -> Bool[Array, "B T"]:
    """Where tokens are masked: each answer position with its row's probability.

    Args:
      sequence_keys: one key a row, so that a row's masks do not depend on its batch.
      answer: positions that may be masked.
    """

    def row(key, positions, probability):
        return (jax.random.uniform(key, positions.shape) < probability) & positions

    return jax.vmap(row)(sequence_keys, answer, ratio)
