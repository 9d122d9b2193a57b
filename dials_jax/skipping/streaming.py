"""Means, deviations and histograms of many values on the device, call by call.

Summed up in parts they are what they are all at once: the profiles of studies are made of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BINS = 80  # of the histograms of cosines: 0.025 each, so that 0.95 is an edge


class Sums(NamedTuple):
    """Mean and squared deviations of many values, on the device.

    The count has an axis of length 1 where all entries have seen as many.
    """

    count: Float[Array, "..."]
    mean: Float[Array, "..."]
    m2: Float[Array, "..."]

    def merge(self, other: Sums) -> Sums:
        """Source: Chan, Golub and LeVeque (1979)."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)
        apart = other.mean - self.mean
        return Sums(
            count,
            self.mean + apart * share,
            self.m2 + other.m2 + apart**2 * self.count * share,
        )


def masked_mean(values: Float[Array, "B n T"], where: Bool[Array, "B T"]) -> Float[Array, "B n"]:
    """The mean over the positions that count; 0 without any."""
    total = jnp.sum(jnp.where(where[:, None], values, 0.0), axis=-1)
    return total / jnp.maximum(jnp.sum(where, axis=-1), 1)[:, None]


def grouped_sums(
    values: Float[Array, "B n T"], where: Bool[Array, "B T"], group: Float[Array, "B S"]
) -> Sums:
    """Those of one call over the sequences of each group."""

    def over(x: Array) -> Array:  # exact products: TF32 would round the values
        x = jnp.where(where[:, None], x, 0.0)
        return jnp.einsum("BS,BnT->SnT", group, x, precision="highest")

    count = over(jnp.ones((len(values), 1, values.shape[-1])))
    mean = over(values) / jnp.maximum(count, 1)
    own = jnp.einsum("BS,SnT->BnT", group, mean, precision="highest")
    return Sums(count, mean, over((values - own) ** 2))


def binned_sums(values: Float[Array, "K B G"], bins: Float[Array, "B G D"]) -> Sums:
    """Those of the values in each bin."""

    def over(x: Array) -> Array:
        return jnp.einsum("BGD,KBG->KD", bins, x, precision="highest")

    count = jnp.sum(bins, axis=(0, 1))[None]
    mean = over(values) / jnp.maximum(count, 1)
    own = jnp.einsum("BGD,KD->KBG", bins, mean, precision="highest")
    return Sums(count, mean, over((values - own) ** 2))


def histogram(values: Float[Array, "B n T"], where: Bool[Array, "B T"]) -> Int[Array, "n bins"]:
    """How many values lie in each of `BINS` equal parts of [-1, 1]; an edge is of its right one."""
    edges = jnp.linspace(-1, 1, BINS + 1)[:-1]
    above = (values[..., None] >= edges) & where[:, None, :, None]
    at_least = jnp.sum(above, axis=(0, 2), dtype=jnp.int32)
    return at_least - jnp.pad(at_least[:, 1:], ((0, 0), (0, 1)))
