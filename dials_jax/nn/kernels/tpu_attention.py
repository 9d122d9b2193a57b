"""Attention on TPU by JAX's splash kernel, which never holds all scores of a long sequence."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dials_jax.nn.kernels.per_device import attention_per_device, divides
from dials_jax.nn.kv import KV
from dials_jax.nn.mask import Mask

BLOCKS = 512, 256, 128  # queries and keys at a time: the most that divide the length
SHORTEST = 1024  # keys; fewer have few scores


def splash_refusal(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> str | None:
    """Why the kernel cannot take these; None: it can.

    float32 is refused, because the kernel multiplies in bfloat16.
    """
    if unknown := mask.refusal("valid", "causal"):
        return unknown
    num_queries, num_keys = q.shape[1], kv.k.shape[1]
    whole_blocks = num_queries % BLOCKS[-1] == num_keys % BLOCKS[-1] == 0
    if q.dtype != jnp.bfloat16 or num_keys < SHORTEST or not whole_blocks or not divides(q, kv):
        return (
            "it needs a mesh that divides sequences and heads, bfloat16, at least "
            f"{SHORTEST} keys, and queries and keys in multiples of {BLOCKS[-1]}"
        )
    return None


def run_splash(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> Float[Array, "B T N H"]:
    return splash_attention(q, kv, mask.valid, mask.causal)


def splash_attention(
    q: Float[Array, "B T N H"],
    kv: KV,
    valid: Bool[Array, "B S"] | None,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """As `attend`, for what `splash_refusal` lets pass.

    Args:
      interpret: run the kernel step by step, without a TPU.

    A query that sees no key gets a mean of some values.
    """

    def local(q, kv, valid):
        return _local(q, kv, valid, causal, interpret)

    return attention_per_device(local, q, kv, valid)


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
    if valid is not None:  # a query attends to the keys of its segment
        ones = jnp.ones((q.shape[0], num_queries), jnp.int32)
        segments = kernels.SegmentIds(ones, valid.astype(jnp.int32))
    by_head = [jnp.swapaxes(x, 1, 2) for x in (q / math.sqrt(q.shape[-1]), kv.k, kv.v)]
    return jnp.swapaxes(jax.vmap(kernel)(*by_head, segments), 1, 2)
