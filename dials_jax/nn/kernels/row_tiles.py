"""Functions of rows, computed in tiles of constant shape, for the batch-invariant mode on CPUs.

XLA compiles a loop by its length: which of two products it rounds, how it computes `exp`. A tile
has one shape whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

ROWS_OF_TILE = 32


def in_row_tiles(fn: Any, x: Float[Array, "R D"], least: int = 1) -> Float[Array, "R F"]:
    """`fn` of tiles of rows; the last one is filled with zeros.

    Args:
      least: so many tiles are computed at least, some of zeros. XLA makes no loop of a single one,
        and fuses what is in it with what is around.
    """
    num_rows = x.shape[0]
    extra = max(-num_rows % ROWS_OF_TILE, least * ROWS_OF_TILE - num_rows)
    tiles = jnp.pad(x, ((0, extra), (0, 0))).reshape(-1, ROWS_OF_TILE, x.shape[1])
    y = lax.map(fn, tiles)
    return y.reshape(-1, y.shape[-1])[:num_rows]


def in_tiles(fn: Callable[..., Array]) -> Callable[..., Array]:
    """`fn` of rows and of other arguments, which all rows share, in tiles of rows."""

    def run(x: Float[Array, "*B D"], *args: Any) -> Float[Array, "*B F"]:
        rows = in_row_tiles(lambda tile: fn(tile, *args), x.reshape(-1, x.shape[-1]), least=2)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    return run
