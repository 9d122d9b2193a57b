"""What the kernels compute, in plain JAX: on every backend, for all shapes, types and masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dials_jax.nn.kv import KV
from dials_jax.nn.linear import Weight, linear
from dials_jax.nn.mask import Mask


def xla_attention(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> Float[Array, "B T N H"]:
    causal, attn_mask = mask.flag_and_array(q.shape[1], kv.k.shape[1])
    return jax.nn.dot_product_attention(q, *kv, mask=attn_mask, is_causal=causal)


def xla_swiglu(
    x: Float[Array, "B T D"], kernels: tuple[Weight, ...], biases: tuple[Weight | None, ...]
) -> Float[Array, "B T F"]:
    """silu(x W_gate + b_gate) * (x W_up + b_up), from both kernels or from one of both."""
    halves = [linear(x, kernel, bias) for kernel, bias in zip(kernels, biases, strict=True)]
    gate, up = halves if len(halves) == 2 else jnp.split(halves[0], 2, axis=-1)
    return jax.nn.silu(gate) * up


def xla_lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """`table[tokens]`, looked up first and rounded after: see `nn.kernels.sharded_lookup`."""
    return table[tokens].astype(dtype)
