"""Dropout of what a block adds to the stream, drawn from the keys of sequences.

Source: `bias_dropout_add_scale` of MDLM's `models/dit.py`: the outputs of attention and of the MLP,
each with its bias and before its gate.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dials_jax import trees

AFTER_ATTENTION, AFTER_MLP = 0, 1  # the sites in a block


class Dropout(NamedTuple):
    """Zeros depend only on the sequence's key, the layer and the site."""

    keys: jax.Array  # [B]
    rate: float  # share that is zeroed; the rest is divided by 1 - rate

    def of_layer(self, number: Int[Array, ""] | int) -> Dropout:
        return self._replace(keys=_fold(self.keys, number))

    def __call__(self, update: Float[Array, "B T D"], site: int) -> Float[Array, "B T D"]:
        draw = jax.vmap(lambda key: jax.random.uniform(key, update.shape[1:]))
        is_kept = draw(_fold(self.keys, site)) >= self.rate
        return jnp.where(is_kept, update / (1 - self.rate), 0)


def dropped(
    update: Float[Array, "B T D"], dropout: Dropout | None, site: int
) -> Float[Array, "B T D"]:
    return update if dropout is None else dropout(update, site)


def numbered(layers: trees.Params) -> trees.Params:
    """Every layer with its number, in the layout that the layers have."""
    if trees.is_unrolled(layers):
        return tuple({"layer": x, "number": i} for i, x in enumerate(layers))
    return {"layer": layers, "number": jnp.arange(trees.num_layers(layers))}


def _fold(keys: jax.Array, number: Int[Array, ""] | int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
