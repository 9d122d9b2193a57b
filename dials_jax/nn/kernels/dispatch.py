"""The implementations of operations, the first that fits first: see `nn.kernels.implementation`."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from dials_jax.nn.eight_bits import Quantised
from dials_jax.nn.fusing import split_outputs
from dials_jax.nn.kernels.cudnn_attention import cudnn_refusal, run_cudnn
from dials_jax.nn.kernels.hopper_attention import (
    run_tiles,
    run_window,
    tiles_refusal,
    window_refusal,
)
from dials_jax.nn.kernels.hopper_matmul import run_swiglu, swiglu_refusal
from dials_jax.nn.kernels.hopper_rows import run_swiglu_rows, swiglu_rows_refusal
from dials_jax.nn.kernels.implementation import Implementation, fixed_tiles, plain_jax
from dials_jax.nn.kernels.per_device import ANY, GPU, HOPPER, TPU
from dials_jax.nn.kernels.sharded_lookup import lookup_refusal, sharded_lookup
from dials_jax.nn.kernels.tiles import tiled_attention
from dials_jax.nn.kernels.tpu_attention import run_splash, splash_refusal
from dials_jax.nn.kv import KV
from dials_jax.nn.linear import linear
from dials_jax.nn.mask import Mask


def xla_attention(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> Float[Array, "B T N H"]:
    causal, attn_mask = mask.flag_and_array(q.shape[1], kv.k.shape[1])
    return jax.nn.dot_product_attention(q, *kv, mask=attn_mask, is_causal=causal)


def xla_swiglu(
    x: Float[Array, "B T D"],
    kernels: tuple[Quantised | Array, ...],
    biases: tuple[Array | None, ...],
    parts: int,
) -> Float[Array, "B T F"]:
    """silu(x W_gate + b_gate) * (x W_up + b_up), from both kernels or from one of both."""
    halves = [linear(x, kernel, bias) for kernel, bias in zip(kernels, biases, strict=True)]
    if len(halves) == 1:
        halves = split_outputs(halves[0], (halves[0].shape[-1] // 2,) * 2, x.ndim - 1, parts)
    gate, up = halves
    return jax.nn.silu(gate) * up


def xla_lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """`table[tokens]`, looked up first and rounded after: see `nn.kernels.sharded_lookup`."""
    return table[tokens].astype(dtype)


ATTENTION = (  # (q, kv, mask) -> values
    Implementation("tpu_splash", TPU, splash_refusal, run_splash),
    Implementation("hopper_window", HOPPER, window_refusal, run_window),
    Implementation("cudnn", GPU, cudnn_refusal, run_cudnn),
    Implementation("hopper_rows", HOPPER, tiles_refusal, run_tiles, "invariant"),
    fixed_tiles(tiled_attention),
    plain_jax(xla_attention),
)
SWIGLU = (  # (x, kernels, biases, parts), two kernels or both joined in parts -> hidden units
    Implementation("hopper_swiglu", HOPPER, swiglu_refusal, run_swiglu),
    Implementation("hopper_rows", HOPPER, swiglu_rows_refusal, run_swiglu_rows, "invariant"),
    plain_jax(xla_swiglu, "both"),
)
LOOKUP = (  # (table, tokens, dtype) -> embeddings
    Implementation("sharded", ANY, lookup_refusal, sharded_lookup, "both"),
    plain_jax(xla_lookup, "both"),
)
