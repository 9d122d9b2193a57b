"""Every matmul with weights: cast, multiply, add the bias."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dials_jax.nn.broadcast import shifted

# A module's parameter or its array. Weights of another kind, say quantised ones, are to be
# multiplied in `linear` and nowhere else.
Weight = nnx.Param | Float[Array, "..."]


def linear(
    x: Float[Array, "..."],
    kernel: Weight,
    bias: Weight | None = None,
    *,
    axes: str = "...D,DF->...F",
    dtype: Any = None,
) -> Float[Array, "..."]:
    """x times the kernel, rounded to x's dtype, plus the bias, whose gradient is summed in float32.

    Args:
      axes: of x, the kernel and the result, as `jnp.einsum` takes them.
      dtype: of the result; None: that of x.
    """
    kernel = array_of(kernel).astype(x.dtype)
    y = jnp.einsum(axes, x, kernel, preferred_element_type=dtype)
    return y if bias is None else shifted(y, array_of(bias))


def array_of(weight: Weight) -> Float[Array, "..."]:
    return weight[...] if isinstance(weight, nnx.Variable) else weight
