"""Keys and values, and canvases that are written a few places at a time."""

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
    """Each row's entries at `index` along the second axis, of every leaf."""
    take = jax.vmap(lambda row, at: row[at])
    return jax.tree.map(lambda x: take(x, index), tree)


def write(
    canvas: PyTree,
    new: PyTree,
    slots: Slots,
    *,
    contiguous: bool = False,
    rows: Int[Array, "B"] | None = None,
    keep: Bool[Array, "B"] | None = None,
) -> PyTree:
    """The canvas with new values in the slots; the rest stays as it was.

    Args:
      canvas: leaves [B, S, ...], a `KV` for example.
      new: leaves [B, T, ...].
      contiguous: the slots are one range, the same in every row; they are written as a slice.
      rows: the canvas's rows that the slots belong to; None: all of them, in order.
      keep: False at rows that are not written.
    """
    index, active = slots
    if contiguous and active is None and rows is None and keep is None:
        start = index[0, 0]
        return jax.tree.map(
            lambda old, x: lax.dynamic_update_slice_in_dim(old, x, start, axis=1), canvas, new
        )
    if keep is not None:
        active = keep[:, None] if active is None else active & keep[:, None]
    if active is not None:  # out of range, each at its own place, and dropped
        beyond = jax.tree.leaves(canvas)[0].shape[1] + jnp.arange(index.shape[1])
        index = jnp.where(active, index, beyond)

    def put(old, x):
        if rows is not None:
            return old.at[rows[:, None], index].set(x, mode="drop", unique_indices=True)

        def one(old, x, at):
            return old.at[at].set(x, mode="drop", unique_indices=True)

        return jax.vmap(one)(old, x, index)  # rows stay on their own devices

    return jax.tree.map(put, canvas, new)
