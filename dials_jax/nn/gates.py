"""Gates, and a function of some sequences of a batch at the cost of those sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax.nn.linear import scaled

Gate = np.bool_ | Bool[Array, ""] | Bool[Array, "B"] | Float[Array, "B"]

# A program has one branch per slice size. Eight per device keep programs small; above eight
# sequences a slice is rounded up to a multiple of B/8, at most 1/8 of a layer's work.
MAX_BRANCHES = 8
# Smaller slices are no faster: below this many tokens a layer is bound by reading its weights.
FEWEST_TOKENS = 128


class Slice(NamedTuple):
    """The sequences that are computed; those that run are among them.

    Attributes:
      gate: True at the sequences of the batch that run; None: all do.
      order: which sequence of the batch each one of the slice is; None: the slice is the batch.
      rank: where each sequence of the batch is in the slice; anything, if it is not in it.
    """

    gate: Bool[Array, "B"] | None
    order: Int[Array, "R"] | None = None
    rank: Int[Array, "B"] | None = None

    def take(self, batch: PyTree) -> PyTree:
        """The slice of leaves that lead with the batch."""
        return batch if self.order is None else jax.tree.map(lambda x: x[self.order], batch)

    def spread(self, part: PyTree) -> PyTree:
        """A batch from leaves that lead with the slice. Sequences that do not run hold anything."""
        # Every sequence gathers its own result in one pass; a scatter needs more.
        return part if self.order is None else jax.tree.map(lambda x: x[self.rank], part)

    def apply_gate(self, h: Float[Array, "B T D"], new: Float[Array, "R T D"]) -> Array:
        """`new` of the sequences that run, and `h` of the others."""
        return new if self.gate is None else apply_gate(self.gate, h, self.spread(new))


class Compaction:
    """Sequences that run move to the front of the batch, and only a slice with them is computed.

    Args:
      num_tokens: of a sequence.
      max_branches: how many slice sizes there may be.
    """

    def __init__(self, gate: Bool[Array, "B"], num_tokens: int, max_branches: int):
        count = gate.shape[0]
        unit = max(-(-count // max_branches), -(-FEWEST_TOKENS // num_tokens))
        self._gate, self._unit = gate, min(unit, count)
        self._sizes = [*range(self._unit, count, self._unit), count]
        self._size = -(-jnp.sum(gate) // self._unit)  # 0: none runs; n: the n-th size holds them
        self._rank, self._order = _running_first(gate)

    @property
    def any(self) -> Bool[Array, ""]:
        return self._size > 0

    def __call__(self, fn: Callable[[Slice], PyTree]) -> PyTree:
        """`fn` of the smallest slice with all sequences that run; there must be one."""
        if len(self._sizes) == 1:
            return self._of(fn, self._sizes[0])
        return lax.switch(self._size - 1, [partial(self._of, fn, n) for n in self._sizes])

    def or_else(self, fn: Callable[[Slice], PyTree], skipped: PyTree) -> PyTree:
        """The same, or `skipped` if no sequence runs."""
        branches = [partial(self._of, fn, n) for n in self._sizes]
        return lax.switch(self._size, [lambda: skipped, *branches])

    def _of(self, fn: Callable[[Slice], PyTree], size: int) -> PyTree:
        # Slices are cut within the branches: outside, all of them would be cut for every layer.
        if size == len(self._gate):
            return fn(Slice(None if self._unit == 1 else self._gate))
        return fn(Slice(self._gate, self._order[:size], jnp.minimum(self._rank, size - 1)))


def _running_first(gate: Bool[Array, "B"]) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Each sequence's rank when those that run come first, and the sequence of each rank.

    By comparing all pairs: for the few sequences of a batch this is faster than a sort.
    """
    numbers = jnp.arange(gate.shape[0])
    key = jnp.where(gate, numbers, numbers + gate.shape[0])
    rank = jnp.sum(key[:, None] > key, axis=1)
    return rank, jnp.sum(jnp.where(rank[:, None] == numbers, numbers[:, None], 0), axis=0)


def apply_gate(gate: Gate, h: Float[Array, "B T D"], new: Float[Array, "B T D"]) -> Array:
    """`new` where the gate is open, else `h`: DIALS (7).

    A float gate adds `(gate - stop_gradient(gate)) * (new - h)`, which is zero forward. Training
    then sees bitwise the hidden states of inference, with the gradients of
    `h + gate * (new - h)`, also to the router of a layer that was skipped.
    """
    on = gate[:, None, None] if gate.ndim else gate
    if not jnp.issubdtype(gate.dtype, jnp.floating):
        return jnp.where(on, new, h)
    through = on - lax.stop_gradient(on)
    return jnp.where(on > 0.5, new, h) + scaled(new - h, through)
