"""A function of some rows of a batch, at the cost of those rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

Gate = np.bool_ | Bool[Array, ""] | Bool[Array, "B"] | Float[Array, "B"]

# `compact` compiles one branch a slice size. Eight a device keep programs small; above eight rows
# a slice is rounded up to a multiple of B/8, at most 1/8 of a layer's work.
MAX_BRANCHES = 8


def compaction(gate: Bool[Array, "B"], max_branches: int) -> Callable[..., PyTree]:
    """`compact(fn, *rows, skipped=None)` is `fn(*rows)` where the gate is open.

    Elsewhere it is `skipped`, a whole batch of what `fn` returns; None: anything.
    """
    num_rows = gate.shape[0]
    unit = -(-num_rows // max_branches)
    sizes = [*range(unit, num_rows, unit), num_rows]
    place, order = _rows_that_run_first(gate)

    def compact(fn, *rows, skipped=None):
        # The choice of rows is inside the branches, where XLA joins it to the layer's last sum.
        def of_first(size):
            if size == num_rows:
                out = fn(*rows)
                return out if skipped is None or unit == 1 else choose(gate, skipped, out)
            out = fn(*jax.tree.map(lambda x: x[order[:size]], rows))
            # Every row fetches its own: one pass, which a scatter is not.
            out = jax.tree.map(lambda x: x[jnp.minimum(place, size - 1)], out)
            return out if skipped is None else choose(gate, skipped, out)

        def of_none():
            if skipped is not None:
                return skipped
            shapes = jax.eval_shape(lambda: fn(*rows))
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        branches = [of_none, *(partial(of_first, size) for size in sizes)]
        return lax.switch(-(-jnp.sum(gate) // unit), branches)

    return compact


def _rows_that_run_first(gate: Bool[Array, "B"]) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Each row's place when those that run come first, and the row at each place.

    By comparing all pairs: for the few rows of a batch that is quicker than a sort.
    """
    rows = jnp.arange(gate.shape[0])
    key = jnp.where(gate, rows, rows + gate.shape[0])
    place = jnp.sum(key[:, None] > key, axis=1)
    return place, jnp.sum(jnp.where(place[:, None] == rows, rows[:, None], 0), axis=0)


def choose(gate: Gate, h: Float[Array, "B T D"], new: Float[Array, "B T D"]) -> Array:
    """The new rows where the gate is open.

    A float gate adds `(gate - stop_gradient(gate)) * (new - h)`, which is zero forward. Training
    then sees bitwise the hidden states of inference, with the gradients of
    `h + gate * (new - h)`, also to the router of a layer that was skipped.
    """
    rows = gate[:, None, None] if gate.ndim else gate
    if not jnp.issubdtype(gate.dtype, jnp.floating):
        return jnp.where(rows, new, h)
    through = (rows - lax.stop_gradient(rows)).astype(h.dtype)
    return jnp.where(rows > 0.5, new, h) + through * (new - h)
