"""Attention with grouped key/value heads: bidirectional, or causal."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dials_jax.config import ModelConfig
from dials_jax.nn.broadcast import shifted
from dials_jax.nn.initializers import normal, residual_depth, zeros_if
from dials_jax.nn.kernels.hopper_attention import window_attention, window_fits
from dials_jax.nn.kernels.per_device import (
    attention_per_device,
    divides,
    on_hopper,
    splits_itself,
)
from dials_jax.nn.kernels.tpu_attention import splash_attention, splash_fits
from dials_jax.nn.kv import KV
from dials_jax.nn.rope import apply_rope


class Attention(nnx.Module):
    """Self-attention in which every token sees every valid token, or those to its left (causal).

    `fused`: see `dials_jax.nn.fusing`.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, fused: bool = False):
        d, n, k, h = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.fused, self.num_heads, self.num_kv_heads = fused, n, k
        for name, heads in ({"qkv": n + 2 * k} if fused else {"q": n, "k": k, "v": k}).items():
            setattr(self, name, nnx.Param(normal(rngs, (d, heads, h))))
            setattr(self, f"{name}_bias", zeros_if(cfg.qkv_bias, (heads, h)))
        self.o = nnx.Param(normal(rngs, (n, h, d), depth=residual_depth(cfg)))
        self.o_bias = zeros_if(cfg.bias if cfg.o_bias is None else cfg.o_bias, (d,))

    def rotated(
        self, x: Float[Array, "B T D"], sin_cos: Float[Array, "B T 2 _"] | None
    ) -> tuple[Float[Array, "B T N H"], KV]:
        """Rotated queries, and the tokens' rotated keys and values; None: nothing turns."""
        if self.fused:
            cuts = (self.num_heads, self.num_heads + self.num_kv_heads)
            q, k, v = jnp.split(project(x, self.qkv, self.qkv_bias), cuts, axis=2)
        else:
            q = project(x, self.q, self.q_bias)
            k = project(x, self.k, self.k_bias)
            v = project(x, self.v, self.v_bias)
        if sin_cos is None:
            return q, KV(k, v)
        return apply_rope(q, sin_cos), KV(apply_rope(k, sin_cos), v)

    def out(self, y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        out = jnp.einsum("BTNH,NHD->BTD", y, self.o[...].astype(y.dtype))
        return out if self.o_bias is None else shifted(out, self.o_bias[...])


def project(
    x: Float[Array, "B T D"], kernel: nnx.Param, bias: nnx.Param | None
) -> Float[Array, "B T N H"]:
    y = jnp.einsum("BTD,DNH->BTNH", x, kernel[...].astype(x.dtype))
    return y if bias is None else shifted(y, bias[...])


@jax.named_scope("attention")
def attend(
    q: Float[Array, "B T N H"],
    kv: KV,
    valid: Bool[Array, "B S"] | None,
    index: Int[Array, "B T"] | None = None,
    causal: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention over valid keys; None means that all are.

    Args:
      index: the queries' places among the keys; a query then sees none to its right.
      causal: the same for queries and keys of the same tokens. It needs no array of who sees whom.

    cuDNN's fused kernel takes half precision and heads of up to 128 only; on one H200 it is 1.5
    times as fast as XLA's. For TPU see `nn/kernels/tpu_attention.py`, for a few queries on
    Hopper GPUs `nn/kernels/hopper_attention.py`.
    """
    if index is None and splash_fits(q, kv):
        return splash_attention(q, kv, valid, causal)
    if index is None and not causal and on_hopper() and divides(q, kv) and window_fits(q, kv):
        return attention_per_device(window_attention, q, kv, valid)
    attn_mask = None if valid is None else valid[:, None, None, :]
    if index is not None:
        to_the_left = index[:, None, :, None] >= jnp.arange(kv.k.shape[1])
        attn_mask = to_the_left if attn_mask is None else to_the_left & attn_mask
    if not cudnn_fits(q):
        return jax.nn.dot_product_attention(q, *kv, mask=attn_mask, is_causal=causal)
    if attn_mask is not None:  # cuDNN wants the query axis spelled out
        attn_mask = jnp.broadcast_to(attn_mask, (q.shape[0], 1, q.shape[1], kv.k.shape[1]))
    attention = partial(cudnn_attention, causal=causal)
    if splits_itself(q, kv):
        return attention(q, kv, attn_mask)
    return attention_per_device(attention, q, kv, attn_mask)


def cudnn_fits(q: Float[Array, "B T N H"]) -> bool:
    """Whether cuDNN's fused kernel is there, and for these queries."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def cudnn_attention(
    q: Float[Array, "B T N H"], kv: KV, attn_mask: Bool[Array, "B 1 T S"] | None, causal: bool
) -> Float[Array, "B T N H"]:
    """cuDNN's kernel, where it `splits_itself` or is given what one device has."""
    return jax.nn.dot_product_attention(
        q, *kv, mask=attn_mask, is_causal=causal, implementation="cudnn"
    )
