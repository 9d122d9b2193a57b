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

    The compiler by itself gathers on every device either the hidden states of the whole batch, with
    gradients in float32, or the whole table, whatever is smaller. Here nothing grows with the
    number of devices: the tokens of an `fsdp` group, which are small, come together on each of its
    devices. Each looks up its share of the hidden units, and the devices then exchange rows for
    hidden units. Along `tensor`, each device knows a part of the vocabulary, and one has the row.

    Looked up first and rounded after: half of all training tokens are [MASK], and their gradients
    are summed into one row. In bfloat16 that sum is both wrong and, by contended atomics, slow.
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
    """The rows that are here, and zeros for others."""
    if not vocabulary:
        return table[tokens]
    here = tokens - lax.axis_index(vocabulary) * table.shape[0]
    known = (here >= 0) & (here < table.shape[0])
    return jnp.where(known[..., None], table[jnp.where(known, here, 0)], 0)
