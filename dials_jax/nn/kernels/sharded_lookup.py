"""Rows of a table that is split over devices, for tokens that are split over them too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dials_jax.sharding import AXES, BATCH_AXES, num_batch_shards, partition_spec


def lookup_refusal(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: str) -> str | None:
    """Why the exchange between devices cannot run here; None: it can."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return "no mesh splits the table along fsdp or tensor"
    if tokens.shape[0] % num_batch_shards(mesh):
        return f"the mesh does not divide {tokens.shape[0]} sequences"
    return None


def sharded_lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """`table[tokens]`, rounded to `dtype`, for a table that the mesh splits.

    XLA would all-gather either the hidden states of the batch or the table. Here the devices of an
    `fsdp` group all-gather their token ids, which are small. Each looks up its slice of the hidden
    units; an all-to-all then exchanges hidden units against sequences, and a psum runs over
    `tensor`, where exactly one device holds each id. Nothing grows with the number of devices.

    Rows are rounded after the lookup: half of all training tokens are [MASK], and their gradients
    are summed into one row. In bfloat16 that sum is inexact, and slow by contended atomics.
    """
    mesh = jax.sharding.get_abstract_mesh()
    vocabulary, hidden = spec = partition_spec("embed/table", table.shape, mesh)

    def local(table, tokens):
        if hidden:
            tokens = lax.all_gather(tokens, hidden, tiled=True)
        h = _rows(table, tokens, vocabulary).astype(dtype)
        if vocabulary:  # exact in any dtype: all terms but one are 0
            h = lax.psum(h, vocabulary)
        return lax.all_to_all(h, hidden, split_axis=0, concat_axis=2, tiled=True) if hidden else h

    rows = P(BATCH_AXES)
    return jax.shard_map(local, in_specs=(spec, rows), out_specs=rows, axis_names=set(AXES))(
        table, tokens
    )


def _rows(table: Array, tokens: Array, vocabulary: str | None) -> Array:
    """The rows that this device holds, and zeros for others."""
    if not vocabulary:
        return table[tokens]
    here = tokens - lax.axis_index(vocabulary) * table.shape[0]
    known = (here >= 0) & (here < table.shape[0])
    return jnp.where(known[..., None], table[jnp.where(known, here, 0)], 0)
