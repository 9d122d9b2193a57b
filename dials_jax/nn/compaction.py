"""A function of some rows of a batch, at the cost of those rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

Gate = np.bool_ | Bool[Array, ""] | Bool[Array, "B"] | Float[Array, "B"]

# A program has one branch a slice size. Eight a device keep programs small; above eight rows a
# slice is rounded up to a multiple of B/8, at most 1/8 of a layer's work.
MAX_BRANCHES = 8
# A slice of fewer tokens takes as long as one of so many, which waits for the weights.
FEWEST_TOKENS = 128


class Slice(NamedTuple):
    """As many rows as are computed; those that run are among them.

    Attributes:
      gate: True at the rows of the batch that run; None: all do.
      order: the batch's row at each place of the slice; None: the slice is the batch.
      place: each row's place in the slice; any, for a row that is not in it.
    """

    gate: Bool[Array, "B"] | None
    order: Int[Array, "R"] | None = None
    place: Int[Array, "B"] | None = None

    def take(self, batch: PyTree) -> PyTree:
        """The slice of leaves that lead with the batch."""
        return batch if self.order is None else jax.tree.map(lambda x: x[self.order], batch)

    def spread(self, rows: PyTree) -> PyTree:
        """A batch from leaves that lead with the slice. Rows that do not run hold anything."""
        # Every row fetches its own: one pass, which a scatter is not.
        return rows if self.order is None else jax.tree.map(lambda x: x[self.place], rows)

    def choose(self, h: Float[Array, "B T D"], new: Float[Array, "R T D"]) -> Array:
        """The new rows of those that run, and `h` of the others."""
        return new if self.gate is None else choose(self.gate, h, self.spread(new))


class Compaction:
    """The rows of a batch that run move to the front, and what is computed are those.

    Args:
      num_tokens: of a row.
      max_branches: slice sizes at most.
    """

    def __init__(self, gate: Bool[Array, "B"], num_tokens: int, max_branches: int):
        num_rows = gate.shape[0]
        unit = max(-(-num_rows // max_branches), -(-FEWEST_TOKENS // num_tokens))
        unit = min(unit, num_rows)
        place, order = _rows_that_run_first(gate)
        sizes = range(unit, num_rows, unit)
        self._slices = [Slice(gate, order[:n], jnp.minimum(place, n - 1)) for n in sizes]
        self._slices.append(Slice(None if unit == 1 else gate))
        self._size = -(-jnp.sum(gate) // unit)  # 0: no row runs; n: those of the n-th slice

    @property
    def any(self) -> Bool[Array, ""]:
        return self._size > 0

    def __call__(self, fn: Callable[[Slice], PyTree]) -> PyTree:
        """`fn` of the smallest slice with all rows that run, of which there must be one."""
        if len(self._slices) == 1:
            return fn(self._slices[0])
        return lax.switch(self._size - 1, self._branches(fn))

    def or_else(self, fn: Callable[[Slice], PyTree], skipped: PyTree) -> PyTree:
        """The same, or `skipped` where no row runs."""
        return lax.switch(self._size, [lambda: skipped, *self._branches(fn)])

    def _branches(self, fn: Callable[[Slice], PyTree]) -> list[Callable[[], PyTree]]:
        return [partial(fn, part) for part in self._slices]


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
