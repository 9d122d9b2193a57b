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

from dials_jax.nn.broadcast import scaled

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

    def apply_gate(self, h: Float[Array, "B T D"], new: Float[Array, "R T D"]) -> Array:
        """The new rows of those that run, and `h` of the others."""
        return new if self.gate is None else apply_gate(self.gate, h, self.spread(new))


class Compaction:
    """The rows of a batch that run move to the front, and what is computed are those.

    Args:
      num_tokens: of a row.
      max_branches: slice sizes at most.
    """

    def __init__(self, gate: Bool[Array, "B"], num_tokens: int, max_branches: int):
        num_rows = gate.shape[0]
        unit = max(-(-num_rows // max_branches), -(-FEWEST_TOKENS // num_tokens))
        self._gate, self._unit = gate, min(unit, num_rows)
        self._sizes = [*range(self._unit, num_rows, self._unit), num_rows]
        self._size = -(-jnp.sum(gate) // self._unit)  # 0: no row runs; n: the n-th size holds them
        self._place, self._order = _rows_that_run_first(gate)

    @property
    def any(self) -> Bool[Array, ""]:
        return self._size > 0

    def __call__(self, fn: Callable[[Slice], PyTree]) -> PyTree:
        """`fn` of the smallest slice with all rows that run, of which there must be one."""
        if len(self._sizes) == 1:
            return self._of(fn, self._sizes[0])
        return lax.switch(self._size - 1, [partial(self._of, fn, n) for n in self._sizes])

    def or_else(self, fn: Callable[[Slice], PyTree], skipped: PyTree) -> PyTree:
        """The same, or `skipped` where no row runs."""
        branches = [partial(self._of, fn, n) for n in self._sizes]
        return lax.switch(self._size, [lambda: skipped, *branches])

    def _of(self, fn: Callable[[Slice], PyTree], size: int) -> PyTree:
        # Slices are cut within the branches: outside, all of them would be cut for every layer.
        if size == len(self._gate):
            return fn(Slice(None if self._unit == 1 else self._gate))
        return fn(Slice(self._gate, self._order[:size], jnp.minimum(self._place, size - 1)))


def _rows_that_run_first(gate: Bool[Array, "B"]) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Each row's place when those that run come first, and the row at each place.

    By comparing all pairs: for the few rows of a batch that is quicker than a sort.
    """
    rows = jnp.arange(gate.shape[0])
    key = jnp.where(gate, rows, rows + gate.shape[0])
    place = jnp.sum(key[:, None] > key, axis=1)
    return place, jnp.sum(jnp.where(place[:, None] == rows, rows[:, None], 0), axis=0)


def apply_gate(gate: Gate, h: Float[Array, "B T D"], new: Float[Array, "B T D"]) -> Array:
    """The new rows where the gate is open.

    A float gate adds `(gate - stop_gradient(gate)) * (new - h)`, which is zero forward. Training
    then sees bitwise the hidden states of inference, with the gradients of
    `h + gate * (new - h)`, also to the router of a layer that was skipped.
    """
    rows = gate[:, None, None] if gate.ndim else gate
    if not jnp.issubdtype(gate.dtype, jnp.floating):
        return jnp.where(rows, new, h)
    through = rows - lax.stop_gradient(rows)
    return jnp.where(rows > 0.5, new, h) + scaled(new - h, through)
