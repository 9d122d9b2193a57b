"""Products and attention in tiles of constant shape, in plain JAX, for the batch-invariant mode.

How XLA sums a product depends on its shape. A tile has one shape whatever the batch, so a row has
one order of sums: on a CPU wherever it stands in its tile, and in whichever tile. Tiles run one
after the other; this is for what has no kernel.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from dials_jax.nn.eight_bits import Quantised, xla_matmul
from dials_jax.nn.kernels.hopper_rows import as_rows
from dials_jax.nn.kernels.row_sums import ordered_sum
from dials_jax.nn.kernels.row_tiles import in_row_tiles
from dials_jax.nn.kv import KV
from dials_jax.nn.mask import Mask

SIDE = 32  # queries of a tile, and keys
UNSEEN = -1e30  # finite: a query that sees no key gets a mean of some values and not NaN


def tiled_product(
    x: Float[Array, "..."], weight: Float[Array, "..."], axes: str, dtype: Any
) -> Float[Array, "..."]:
    """`jnp.einsum(axes, x, weight)`, summed alike for every row of x."""
    rows = as_rows(axes, weight.ndim)
    if rows is None:  # one row for many weights
        return jnp.einsum(axes, x, weight, preferred_element_type=dtype)
    n = rows.num_summed
    depth = math.prod(weight.shape[:n])
    matrix = weight.reshape(depth, -1)
    product = partial(jnp.matmul, b=matrix, preferred_element_type=dtype)
    y = in_row_tiles(product, x.reshape(-1, depth))
    return y.reshape(*x.shape[: x.ndim - n], *weight.shape[n:])


def tiled_matmul_8(
    x: Float[Array, "..."], weight: Quantised, dtype: Any = jnp.float32
) -> Float[Array, "..."]:
    """`xla_matmul`, summed alike for every row of x."""
    leading, depth = x.shape[: x.ndim - weight.num_summed], math.prod(x.shape[-weight.num_summed :])
    columns = weight.scales.shape
    matrix = Quantised(weight.values.reshape(-1, depth), weight.scales.reshape(-1))
    product = partial(xla_matmul, weight=matrix, dtype=dtype)
    y = in_row_tiles(product, x.reshape(-1, depth))
    return y.reshape(*leading, *columns)


def tiled_attention(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> Float[Array, "B T N H"]:
    """Attention by the online softmax, a tile of queries and keys at a time.

    Keys that a query does not see change nothing, in whole tiles too.
    """
    (num_sequences, num_queries, num_heads, head_dim), num_keys = q.shape, kv.k.shape[1]
    seen = mask.array(num_queries, num_keys)
    shape = num_sequences, 1, num_queries, num_keys
    seen = jnp.ones(shape, bool) if seen is None else jnp.broadcast_to(seen, shape)
    seen = _tiles(_tiles(seen[:, 0], 1), 3)  # [B, tiles, SIDE, tiles, SIDE]
    queries = _tiles(q.astype(jnp.float32) / math.sqrt(head_dim), 1)
    group = num_heads // kv.k.shape[2]
    k, v = (_tiles(jnp.repeat(x.astype(jnp.float32), group, axis=2), 1) for x in kv)

    def of_sequence(args):
        queries, seen, k, v = args
        return lax.map(lambda tile: _attend_tile(*tile, k, v), (queries, seen))

    out = lax.map(of_sequence, (queries, seen, k, v))  # [B, tiles, SIDE, N, H]
    return out.reshape(num_sequences, -1, num_heads, head_dim)[:, :num_queries].astype(q.dtype)


def _tiles(x: Array, axis: int) -> Array:
    """An axis cut into tiles; the last one is filled with zeros (False)."""
    extra = -x.shape[axis] % SIDE
    x = jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, SIDE, *x.shape[axis + 1 :])


def _attend_tile(
    q: Float[Array, "T N H"],
    seen: Bool[Array, "T tiles S"],
    k: Float[Array, "tiles S N H"],
    v: Float[Array, "tiles S N H"],
) -> Float[Array, "T N H"]:
    def step(state, tile):
        acc, top, total = state
        seen, k, v = tile
        scores = jnp.einsum("TNH,SNH->TNS", q, k, precision="highest")
        scores = jnp.where(seen[:, None], scores, UNSEEN)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights, fading = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        new = jnp.einsum("TNS,SNH->TNH", weights, v, precision="highest")
        return (acc * fading[..., None] + new, new_top, total * fading + ordered_sum(weights)), None

    rows = q.shape[:2]
    start = jnp.zeros_like(q), jnp.full(rows, -jnp.inf), jnp.zeros(rows)
    (acc, _, total), _ = lax.scan(step, start, (jnp.moveaxis(seen, 1, 0), k, v))
    return acc / total[..., None]
