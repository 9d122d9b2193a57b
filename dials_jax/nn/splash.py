"""Attention on TPU by JAX's splash kernel: long rows never hold all scores at once."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from dials_jax.nn.kv import KV
from dials_jax.sharding import AXES, BATCH_AXES

BLOCKS = 512, 256, 128  # queries and keys at a time: the most that divide the length
SHORTEST = 1024  # keys; the scores of fewer are small


def splash_fits(q: Float[Array, "B T N H"], kv: KV) -> bool:
    """Whether the kernel is for these shapes, and the mesh in context is of TPUs.

    float32 goes another way, for the kernel multiplies in bfloat16.
    """
    num_queries, num_keys = q.shape[1], kv.k.shape[1]
    whole_blocks = num_queries % BLOCKS[-1] == num_keys % BLOCKS[-1] == 0
    if not _on_tpu() or q.dtype != jnp.bfloat16 or num_keys < SHORTEST or not whole_blocks:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    rows, heads = _axes()
    splits = math.prod(mesh.shape[a] for a in rows), math.prod(mesh.shape[a] for a in heads)
    return q.shape[0] % splits[0] == kv.k.shape[2] % splits[1] == 0


def _on_tpu() -> bool:
    """Read off the mesh, for a program may be compiled for devices that are not here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "tpu"


def _axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that split rows, and heads: those that no `shard_map` around has split already."""
    mesh = jax.sharding.get_abstract_mesh()
    free = [a for a in AXES if not mesh.empty and a not in mesh.manual_axes]
    return tuple(a for a in free if a in BATCH_AXES), tuple(a for a in free if a not in BATCH_AXES)


def splash_attention(
    q: Float[Array, "B T N H"],
    kv: KV,
    valid: Bool[Array, "B S"] | None,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """As `attend`, for shapes that `splash_fits`.

    Args:
      interpret: run the kernel step by step, where there is no TPU.

    The compiler cannot split a kernel over devices, so each takes its rows and heads by itself. A
    query that sees no key gets a mean of some values.
    """

    def local(q, kv, valid):
        return _local(q, kv, valid, causal, interpret)

    rows, heads = _axes()
    if not rows + heads:
        return local(q, kv, valid)
    spec = P(rows, None, heads)
    return jax.shard_map(
        local,
        in_specs=(spec, spec, P(rows)),
        out_specs=spec,
        axis_names={*rows, *heads},
        check_vma=False,
    )(q, kv, valid)


def _local(
    q: Float[Array, "B T N H"],
    kv: KV,
    valid: Bool[Array, "B S"] | None,
    causal: bool,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    seen = kernels.CausalMask if causal else kernels.FullMask
    (_, num_queries, num_heads, _), num_keys = q.shape, kv.k.shape[1]
    bq, bk = (next(n for n in BLOCKS if length % n == 0) for length in (num_queries, num_keys))
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([seen((num_queries, num_keys))] * num_heads),
        block_sizes=kernels.BlockSizes(
            block_q=bq, block_kv=bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    if valid is not None:  # a query sees the keys of its own segment
        ones = jnp.ones((q.shape[0], num_queries), jnp.int32)
        segments = kernels.SegmentIds(ones, valid.astype(jnp.int32))
    by_head = [jnp.swapaxes(x, 1, 2) for x in (q / math.sqrt(q.shape[-1]), kv.k, kv.v)]
    return jnp.swapaxes(jax.vmap(kernel)(*by_head, segments), 1, 2)
