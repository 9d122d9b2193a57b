"""Which keys each query of attention sees, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import and_

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("valid", "positions", "written"),
    meta_fields=("causal", "block_length"),
)
@dataclass(frozen=True)
class Mask:
    """A query sees the keys that all members allow; without any it sees every key.

    Attributes:
      valid: False at keys that are padding; None: no padding.
      causal: a query sees no key to its right.
      block_length: block-causal: a query sees the keys of its own block of this many positions and
        of the blocks before it; None: no blocks. Blocks count from each sequence's first valid key.
      positions: of the queries among the keys, which `causal` and `block_length` compare; None:
        query i stands at key i.
      written: keys at this position and beyond are not written yet; None: all are.
    """

    valid: Bool[Array, "B S"] | None = None
    causal: bool = False
    block_length: int | None = None
    positions: Int[Array, "B T"] | None = None
    written: Int[Array, "B"] | None = None

    @property
    def ordered(self) -> bool:
        """Whether it matters where a query stands."""
        return self.causal or self.block_length is not None

    def at(self, positions: Int[Array, "B T"]) -> Mask:
        """The same for queries at these positions."""
        return replace(self, positions=positions)

    def of_first(self, num_keys: int) -> Mask:
        """The same where only this many first keys are given."""
        return self if self.valid is None else replace(self, valid=self.valid[:, :num_keys])

    def refusal(self, *known: str) -> str | None:
        """Why code that knows these members only cannot use the mask; None: it can."""
        given = [name for name, x in vars(self).items() if x is not None and x is not False]
        beyond = [name for name in given if name not in known]
        return f"it takes no mask with {', '.join(beyond)}" if beyond else None

    def flag_and_array(
        self, num_queries: int, num_keys: int
    ) -> tuple[bool, Bool[Array, "_ 1 _ _"] | None]:
        """JAX's flag `is_causal`, where it says all about the order, and the rest as an array."""
        flag = self.causal and self.positions is None
        rest = replace(self, causal=False, block_length=None) if flag else self
        return flag, rest.array(num_queries, num_keys)

    def array(self, num_queries: int, num_keys: int) -> Bool[Array, "_ 1 _ _"] | None:
        """True where query t of sequence b sees key s; axes [B or 1, 1, T or 1, S]; None: all."""
        parts = []
        if self.ordered:
            keys = jnp.arange(num_keys)
            own = jnp.arange(num_queries)[None] if self.positions is None else self.positions
            queries = own[:, None, :, None]
            if self.causal:
                parts.append(queries >= keys)
            else:
                first = self._first_keys()
                own_block = (queries - first) // self.block_length
                parts.append(own_block >= (keys - first) // self.block_length)
        if self.written is not None:
            parts.append(jnp.arange(num_keys) < self.written[:, None, None, None])
        if self.valid is not None:
            parts.append(self.valid[:, None, None, :])
        return reduce(and_, parts) if parts else None

    def _first_keys(self) -> Int[Array, "B 1 1 1"] | int:
        """Where each sequence begins."""
        return 0 if self.valid is None else jnp.argmax(self.valid, axis=1)[:, None, None, None]
