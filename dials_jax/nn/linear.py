"""Where activations meet parameters: matmuls, and scales, biases and gates of all positions.

The gradient of a parameter that many positions share is a sum over all of them. In bfloat16 every
term would be rounded, and on some devices every partial sum: 1 to 5 % off for a norm's scale. In
`scaled` and `shifted` terms are computed and summed in float32. Values are those of the plain
operation in x's dtype.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dials_jax.nn.eight_bits import Quantised, is_quantised, xla_matmul
from dials_jax.nn.kernels.hopper_matmul import matmul_refusal, run_matmul
from dials_jax.nn.kernels.hopper_peers import run_split, split_refusal
from dials_jax.nn.kernels.hopper_rows import product_refusal, run_product
from dials_jax.nn.kernels.implementation import Implementation, dispatch, fixed_tiles, plain_jax
from dials_jax.nn.kernels.per_device import HOPPER
from dials_jax.nn.kernels.tiles import tiled_matmul_8, tiled_product

# A module's parameter, or what it holds: an array, or a weight in 8 bits for `linear` only.
Weight = nnx.Param | Quantised | Float[Array, "..."]


def xla_product(
    x: Float[Array, "..."], kernel: Float[Array, "..."], axes: str, dtype: Any
) -> Float[Array, "..."]:
    return jnp.einsum(axes, x, kernel, preferred_element_type=dtype)


PRODUCT = (  # (x, kernel, axes, dtype), as `linear` takes them -> x times the kernel
    Implementation("hopper_rows", HOPPER, product_refusal, run_product, "invariant"),
    fixed_tiles(tiled_product),
    plain_jax(xla_product),
)


def plain_split_product(added_to: Float[Array, "..."] | None, *product: Any) -> Float[Array, "..."]:
    """The compiler adds the devices' parts. Args: product: those of `PRODUCT`."""
    y = dispatch(PRODUCT, *product)
    return y if added_to is None else added_to + y


# Row-parallel, so the mesh's tensor axis splits what is summed: (what it is added to or None, x,
# kernel, axes, dtype) -> the sum.
SPLIT_PRODUCT = (
    Implementation("hopper_peers", HOPPER, split_refusal, partial(run_split, xla_product)),
    plain_jax(plain_split_product, "both"),
)
MATMUL_8 = (  # (x, weight in 8 bits, dtype) -> x, quantised per token, times the weight
    Implementation("hopper_matmul", HOPPER, matmul_refusal, run_matmul, "both"),
    fixed_tiles(tiled_matmul_8),
    plain_jax(xla_matmul),
)


def linear(
    x: Float[Array, "..."],
    kernel: Weight,
    bias: Weight | None = None,
    *,
    axes: str = "...D,DF->...F",
    dtype: Any = None,
    split: bool = False,
    added_to: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """x times the kernel, rounded to x's dtype, plus the bias, whose gradient is summed in float32.

    Args:
      kernel: in 8 bits it knows the axes to sum over, which are the last ones of x.
      axes: of x, the kernel and the result, as `jnp.einsum` takes them.
      dtype: of the result; None: that of x.
      split: row-parallel: the mesh's tensor axis splits what is summed (heads, hidden units), not
        what results.
      added_to: what all of it is added to, of the result's shape: the residual stream.
    """
    kernel = array_of(kernel)
    if is_quantised(kernel):
        y = matmul_8(x, kernel, dtype or x.dtype)
    elif not split:
        y = dispatch(PRODUCT, x, kernel.astype(x.dtype), axes, dtype)
    elif bias is None:
        return dispatch(SPLIT_PRODUCT, added_to, x, kernel.astype(x.dtype), axes, dtype)
    else:
        y = dispatch(SPLIT_PRODUCT, None, x, kernel.astype(x.dtype), axes, dtype)
    y = y if bias is None else shifted(y, array_of(bias))
    return y if added_to is None else added_to + y


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def matmul_8(x: Float[Array, "..."], weight: Quantised, dtype: Any) -> Float[Array, "..."]:
    return dispatch(MATMUL_8, x, weight, dtype)


@matmul_8.defjvp
def _has_no_gradient(dtype, primals, tangents):
    raise NotImplementedError("weights in 8 bits have no gradient; load the model without weights=")


def array_of(weight: Weight) -> Quantised | Float[Array, "..."]:
    return weight.get_value() if isinstance(weight, nnx.Variable) else weight


@jax.custom_vjp
def scaled(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * scale in x's dtype; scale broadcasts to the shape of x."""
    return x * scale.astype(x.dtype)


def _scaled_backward(inputs, g):
    x, scale = inputs
    terms = g.astype(jnp.float32) * x.astype(jnp.float32)
    return g * scale.astype(g.dtype), _summed(terms, scale)


scaled.defvjp(lambda x, scale: (scaled(x, scale), (x, scale)), _scaled_backward)


@jax.custom_vjp
def shifted(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + bias in x's dtype; bias broadcasts to the shape of x."""
    return x + bias.astype(x.dtype)


# The bias is passed for its shape and dtype; its values are not read, so they need no memory.
shifted.defvjp(
    lambda x, bias: (shifted(x, bias), bias),
    lambda bias, g: (g, _summed(g.astype(jnp.float32), bias)),
)


def _summed(terms: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """Summed over the axes along which an array of the shape of `like` is repeated."""
    shape = (1,) * (terms.ndim - like.ndim) + like.shape
    axes = [i for i, (n, m) in enumerate(zip(terms.shape, shape, strict=True)) if m == 1 != n]
    return jnp.sum(terms, axis=axes).reshape(like.shape).astype(like.dtype)
