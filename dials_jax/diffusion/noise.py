"""Noise of masked diffusion: the time of every sequence, and the corruption of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Folded into a step's key for what its sequences share; no sequence has this number.
STRATA = 2**32 - 1


class Noise(NamedTuple):
    """The noise level of each sequence."""

    time: Float[Array, "B"]  # t in (0, 1], which a model with time conditioning is told
    ratio: Float[Array, "B"]  # the probability with which a token is masked
    weight: Float[Array, "B"]  # of the sequence's cross-entropy


def uniform_noise(sequence_keys: jax.Array, min_mask_ratio: float) -> Noise:
    """Draws p ~ U(eps, 1), that is (1 - eps) t + eps, for each sequence alone; the weight is 1/p.

    Source: LLaDA, Algorithm 1; LLaDA, Algorithm 2. `p_mask` of DIALS (10).
    """

    def one(key):
        return jax.random.uniform(key, minval=min_mask_ratio, maxval=1.0)

    ratio = jax.vmap(one)(sequence_keys)
    return Noise(time=ratio, ratio=ratio, weight=1 / ratio)


def stratified_noise(stratum: Float[Array, "B"], eps: float) -> Noise:
    """t = (1 - eps) u + eps with u = `stratum` spread evenly over the batch; the weight is 1/t.

    The published code masks with (1 - eps) t, yet weighs by exactly 1/t, and so does this.

    Source: MDLM (Sahoo et al. 2024), section 3.4 and `diffusion.py` of its code; Sedykh (1) and
    Sedykh (2) under alpha_t = 1 - t.
    """
    time = (1 - eps) * stratum + eps
    return Noise(time=time, ratio=(1 - eps) * time, weight=1 / time)


def stratified(
    key: jax.Array, sequence: Int[Array, "B"], num_sequences: Int[Array, ""] | int
) -> Float[Array, "B"]:
    """(u + k) / n mod 1 for each of n sequences, with one u ~ U(0, 1) per step: one in every n-th.

    Each sequence's value is uniform on [0, 1). It depends on the sequence's number in the whole
    batch only, not on microbatches or devices. k is `bit_reversed_rank` of that number, so that
    devices have as much to do: the head runs at masked tokens only. In the published code k is the
    number itself; then the first of two devices gets the batch's lower half of mask ratios.
    """
    u = jax.random.uniform(jax.random.fold_in(key, STRATA))
    place = bit_reversed_rank(sequence, num_sequences)
    return (u / num_sequences + place / num_sequences) % 1.0


def bit_reversed_rank(i: Int[Array, "B"], n: Int[Array, ""] | int) -> Int[Array, "B"]:
    """Where i stands among 0 to n - 1 by their bits read backwards: 0, 4, 2, 6, 1, 5, 3, 7 of 8.

    Neighbours stand far apart, and any run of numbers is spread evenly (van der Corput 1935).
    """
    # j stands before i if at the lowest bit where they differ, i has a 1. So to every 1 in i belong
    # the j below n that are i in the lower bits, and have a 0 there.
    bit = jnp.arange(31)
    lower = i[:, None] & ((1 << bit) - 1)
    before = ((n - 1 - lower) >> (bit + 1)) + 1
    return jnp.sum(jnp.where((i[:, None] >> bit) & 1 == 1, before, 0), axis=1)


def corrupt(
    sequence_keys: jax.Array, answer: Bool[Array, "B T"], ratio: Float[Array, "B"]
) -> Bool[Array, "B T"]:
    """Chooses the masked positions: each answer position with its sequence's probability.

    Args:
      sequence_keys: one key each, so that a sequence's masks do not depend on its batch.
      answer: positions that may be masked.
    """

    def one(key, positions, probability):
        return (jax.random.uniform(key, positions.shape) < probability) & positions

    return jax.vmap(one)(sequence_keys, answer, ratio)
