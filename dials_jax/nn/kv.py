"""Keys and values, and canvases that are written a few positions at a time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree


class KV(NamedTuple):
    """Rotated keys, and values, of one layer: those of some tokens, or of a whole canvas."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


class Slots(NamedTuple):
    """Where the tokens of a model call lie on the canvas."""

    index: Int[Array, "B T"]
    active: Bool[Array, "B T"] | None = None  # only these are written; None: all


def gather(tree: PyTree, index: Int[Array, "B T"]) -> PyTree:
    """Each sequence's entries at `index` along the second axis, of every leaf."""
    take = jax.vmap(lambda sequence, at: sequence[at])
    return jax.tree.map(lambda x: take(x, index), tree)


def write_slots(
    canvas: PyTree,
    new: PyTree,
    slots: Slots,
    *,
    contiguous: bool = False,
    keep: Bool[Array, "B"] | None = None,
) -> PyTree:
    """The canvas with new values in the slots; the rest stays as it was.

    Args:
      canvas: leaves [B, S, ...], a `KV` for example.
      new: leaves [B, T, ...].
      contiguous: the slots are one range, the same in every sequence; they are written as a slice.
      keep: False at sequences that are not written.
    """
    index, active = slots
    if keep is not None:
        active = keep[:, None] if active is None else active & keep[:, None]
    if contiguous:
        return jax.tree.map(lambda old, x: _write_range(old, x, index[0, 0], active), canvas, new)
    if active is not None:  # moved out of range, to distinct slots, and dropped
        beyond = jax.tree.leaves(canvas)[0].shape[1] + jnp.arange(index.shape[1])
        index = jnp.where(active, index, beyond)

    def one(old, x, at):
        return old.at[at].set(x, mode="drop", unique_indices=True)

    each = jax.vmap(one)  # sequences stay on their own devices
    return jax.tree.map(lambda old, x: each(old, x, index), canvas, new)


def _write_range(
    old: Array, new: Array, start: Int[Array, ""], active: Bool[Array, "B _"] | None
) -> Array:
    """Writes a slice; entries that must stay are read back first, since a scatter may copy."""
    if active is not None:
        before = lax.dynamic_slice_in_dim(old, start, new.shape[1], axis=1)
        new = jnp.where(active.reshape(active.shape + (1,) * (new.ndim - 2)), new, before)
    return lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
