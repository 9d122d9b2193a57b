"""Weights in 8 bits: a scale per output channel of a weight, and one per token of its input.

    y[t, f] = sum_d X[t, d] W[f, d] * x_scale[t] * w_scale[f]

X and W are whole numbers to 127 (int8) or numbers with three bits behind the leading one, to 448
(e4m3, "fp8"); their products are summed in int32 or float32. Weights are quantised once, from their
values in bfloat16; a token's scale is computed when it arrives, from its own values alone, so that
its result depends on no other token of the batch. The matmuls of the layers and the head are
quantised; the embedding, norms, modulations and routers stay as they are.

Source: Dettmers et al. 2022 (LLM.int8(), section 2.1: a scale per row and per column); Micikevicius
et al. 2022 (FP8 Formats for Deep Learning).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dials_jax import trees
from dials_jax.config import EightBits
from dials_jax.nn.kernels.per_device import multiplies_fp8
from dials_jax.trees import Params

NUMBERS = {"fp8": jnp.dtype(jnp.float8_e4m3fn), "int8": jnp.dtype(jnp.int8)}
LARGEST = {NUMBERS["fp8"]: 448.0, NUMBERS["int8"]: 127.0}
SMALLEST = 1e-30  # least largest magnitude: what is all zero is divided by no zero
# The weights that are quantised, and how many of their axes, the first ones, a product sums over.
SUMMED_AXES = {
    "attention": {"q": 1, "k": 1, "v": 1, "o": 2},
    "mlp": {"gate": 1, "up": 1, "down": 1},
    "head": {"kernel": 1},
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """An array as `values * scales`: a weight of layers or of the head, or the input of one.

    The axes that a product sums over come last, in weights and inputs alike: a GPU's products of 8
    bits read both so, and XLA would transpose weights in every call.

    Attributes:
      values: int8 or e4m3. A tree of shapes or of shardings has those here, and in scales.
      scales: float32, of the shape of the leading axes.
    """

    values: Any
    scales: Any

    @property
    def name(self) -> EightBits:
        return next(x for x, dtype in NUMBERS.items() if dtype == self.values.dtype)

    @property
    def num_summed(self) -> int:
        return self.values.ndim - self.scales.ndim


def quantise(x: Float[Array, "..."], name: EightBits, num_summed: int) -> Quantised:
    """Rounds to 8 bits, with one scale for the last `num_summed` axes together.

    A split axis is whole again in the largest magnitude: the compiler inserts that reduction.
    """
    dtype = NUMBERS[name]
    largest = np.float32(LARGEST[dtype])
    axes = tuple(range(x.ndim - num_summed, x.ndim))
    x = x.astype(jnp.float32)
    magnitude = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), np.float32(SMALLEST))
    values = x * (largest / magnitude)
    values = jnp.round(values) if name == "int8" else values
    return Quantised(values.astype(dtype), jnp.squeeze(magnitude, axes) * (1 / largest))


def dequantise(x: Quantised, dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """The numbers that are stood for, rounded to `dtype`."""
    scales = jnp.expand_dims(x.scales, tuple(range(x.scales.ndim, x.values.ndim)))
    return (x.values.astype(jnp.float32) * scales).astype(dtype)


def xla_matmul(
    x: Float[Array, "..."], weight: Quantised, dtype: Any = jnp.float32
) -> Float[Array, "..."]:
    """x, quantised per token, times the weight: in float32, and rounded once to `dtype`."""
    x = quantise(x, weight.name, weight.num_summed)
    last = (tuple(range(a.ndim - weight.num_summed, a.ndim)) for a in (x.values, weight.values))
    sums = _dot(x.values, weight.values, (tuple(last), ((), ())))
    scales = jnp.expand_dims(x.scales, tuple(range(x.scales.ndim, sums.ndim)))
    return (sums * scales * weight.scales).astype(dtype)


def _dot(x: Array, weight: Array, dimensions: Any) -> Float[Array, "..."]:
    """Exact products, summed in int32 or float32."""
    if x.dtype == jnp.int8:
        sums = lax.dot_general(x, weight, dimensions, preferred_element_type=jnp.int32)
        return sums.astype(jnp.float32)
    precision = None
    if multiplies_fp8():  # at the highest precision sums are float32, by default something less
        precision = lax.Precision.HIGHEST
    else:  # the same numbers; bfloat16 holds every e4m3
        x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    return lax.dot_general(
        x, weight, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


# ------------------------------------------------------------------------- parts of a model


def quantise_modules(modules: Params, name: EightBits) -> Params:
    """Modules by name, as they are initialised or read, with their weights in 8 bits: one layer, or
    {"head": ...}."""

    def one(x: Any, count: int) -> Quantised:
        x = x.astype(jnp.bfloat16)
        return quantise(jnp.transpose(x, (*range(count, x.ndim), *range(count))), name, count)

    return _on_weights(one, modules)


def dequantise_modules(modules: Params, dtype: Any) -> Params:
    """The modules in the plain form with the rounded weights; others keep their dtype."""

    def one(x: Any, count: int) -> Any:
        if not is_quantised(x):
            return x
        x = dequantise(x, dtype)
        return jnp.transpose(x, (*range(x.ndim - count, x.ndim), *range(x.ndim - count)))

    return _on_weights(one, modules)


def _on_weights(fn: Callable[[Any, int], Any], modules: Params) -> Params:
    """`fn` of every weight that 8 bits are for, and of the number of axes it is summed over."""

    def one(module: str, name: str, x: Any) -> Any:
        count = SUMMED_AXES.get(module, {}).get(name)
        return x if count is None else fn(x, count)

    return {
        module: {name: one(module, name, x) for name, x in arrays.items()}
        for module, arrays in modules.items()
    }


def is_quantised(x: Any) -> bool:
    return isinstance(x, Quantised)


def cast_others(params: Params, dtype: Any) -> Params:
    """Casts floating-point leaves outside weights in 8 bits; None leaves all as they are."""
    return jax.tree.map(
        lambda x: x if is_quantised(x) else trees.cast(x, dtype), params, is_leaf=is_quantised
    )


def without_scales(params: Params) -> Params:
    """The numbers of weights in 8 bits alone, beside all other arrays: what a model counts."""
    return jax.tree.map(lambda x: x.values if is_quantised(x) else x, params, is_leaf=is_quantised)


def weights_kind(params: Params) -> EightBits | None:
    """In which 8 bits the weights of a model or a part of it are; None: they are not quantised."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantised)
    return next((x.name for x in leaves if is_quantised(x)), None)
