"""What is computed for each row alike, in any batch, for Hopper GPUs: products and RMS norms.

cuBLAS and XLA choose kernels, and with them the order of sums, by the number of rows. Here a row's
sum has one order: that of the depth, in the steps of `hopper_tiles`, whatever the number of rows,
the row's place and the width of a tile. So these kernels are the batch-invariant mode's.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dials_jax.nn.eight_bits import Quantised, is_quantised
from dials_jax.nn.kernels.hopper_matmul import joined_refusal, run_swiglu, tile_columns
from dials_jax.nn.kernels.hopper_quantise import THREADS, depth_fits
from dials_jax.nn.kernels.hopper_tiles import TILE_BYTES, Operands, multiply_tiles
from dials_jax.nn.kernels.per_device import mesh_refusal, sequences_per_device

STEP = TILE_BYTES // 2  # numbers of bfloat16 in a step
LEAST_COLUMNS = 64  # of the narrowest tile
ROWS_TOGETHER = 8  # that are copied together


class Rows(NamedTuple):
    """An einsum of inputs and a weight as the product of a matrix of rows and one of columns."""

    num_summed: int  # axes, the last ones of x and the first ones of the weight


def as_rows(axes: str, weight_ndim: int) -> Rows | None:
    """How an einsum is a product of rows; None: it is none.

    Args:
      axes: as `nn.linear.linear` takes them.
    """
    inputs, out = axes.replace(" ", "").split("->")
    x, weight = inputs.split(",")
    if weight.startswith("...") and len(weight) - 3 == weight_ndim:
        weight = weight[3:]
    summed = [letter for letter in weight if letter in x]
    n = len(summed)
    if not n or "..." in weight or x[-n:] != weight[:n] or x[:-n] + weight[n:] != out:
        return None
    return Rows(n)


# ------------------------------------------------------------------------------------- products


def product_refusal(
    x: Float[Array, "..."], weight: Float[Array, "..."], axes: str, dtype: Any
) -> str | None:
    """Why the kernel cannot multiply these; None: it does."""
    rows = as_rows(axes, weight.ndim)
    if rows is None or x.ndim < 2:
        return "it multiplies rows by a weight"
    depth = math.prod(weight.shape[: rows.num_summed])
    columns = math.prod(weight.shape[rows.num_summed :])
    if not (
        x.dtype == weight.dtype == jnp.bfloat16
        and dtype in (None, jnp.bfloat16, jnp.float32)
        and depth % STEP == columns % LEAST_COLUMNS == 0 < min(x.size, depth, columns)
    ):
        return f"it needs bfloat16, and depth and columns in multiples of {STEP}"
    return mesh_refusal(x)


def run_product(
    x: Float[Array, "..."], weight: Float[Array, "..."], axes: str, dtype: Any
) -> Float[Array, "..."]:
    fn = partial(multiply_rows, num_summed=as_rows(axes, weight.ndim).num_summed, dtype=dtype)
    return sequences_per_device(fn, x, weight)


def multiply_rows(
    x: Float[Array, "..."], weight: Float[Array, "..."], num_summed: int = 1, dtype: Any = None
) -> Float[Array, "..."]:
    """x times the weight, summed in float32 in one order for every row.

    Args:
      num_summed: the last axes of x, and the first ones of the weight.
      dtype: of the result; None: bfloat16.
    """
    depth = math.prod(weight.shape[:num_summed])
    rows = x.reshape(-1, depth)
    operands = Operands(whole_pieces(rows), weight.reshape(depth, -1))
    y = multiply_tiles(operands, tile_columns(operands), dtype or jnp.bfloat16)
    return y[: len(rows)].reshape(*x.shape[: x.ndim - num_summed], *weight.shape[num_summed:])


def whole_pieces(rows: Float[Array, "R D"]) -> Float[Array, "_ D"]:
    return jnp.pad(rows, ((0, -rows.shape[0] % ROWS_TOGETHER), (0, 0)))


# --------------------------------------------------------------------------------------- SwiGLU


def swiglu_rows_refusal(
    x: Float[Array, "B T D"],
    kernels: tuple[Quantised | Array, ...],
    biases: tuple[Array | None, ...],
    parts: int,
) -> str | None:
    """Why the kernel cannot take these, for any number of rows; None: it does."""
    return joined_refusal(x, kernels, biases, parts, _swiglu_rows_refusal)


def _swiglu_rows_refusal(x: Float[Array, "B T D"], gate_up: Float[Array, "D _"]) -> str | None:
    depth, columns = gate_up.shape
    in_half = x.dtype == gate_up.dtype == jnp.bfloat16
    if not in_half or depth % STEP or columns % (2 * LEAST_COLUMNS) or not x.size:
        return f"it needs bfloat16, and depth and columns in multiples of {STEP}"
    return mesh_refusal(x)


def run_swiglu_rows(
    x: Float[Array, "B T D"],
    kernels: tuple[Quantised | Array, ...],
    biases: tuple[Array | None, ...],
    parts: int,
) -> Float[Array, "B T F"]:
    if is_quantised(kernels[0]):
        return run_swiglu(x, kernels, biases, parts)
    return sequences_per_device(swiglu_rows, x, kernels[0])


def swiglu_rows(x: Float[Array, "*B D"], gate_up: Float[Array, "D _"]) -> Float[Array, "*B F"]:
    """silu(x @ gate) * (x @ up) for the two side by side: in float32, rounded once."""
    rows = x.reshape(-1, x.shape[-1])
    operands = Operands(whole_pieces(rows), gate_up, halves=2)
    y = multiply_tiles(operands, tile_columns(operands))
    return y[: len(rows)].reshape(*x.shape[:-1], -1)


# ------------------------------------------------------------------------------------ RMS norms


def norm_refusal(x: Float[Array, "..."], scale: Float[Array, "D"], eps: float) -> str | None:
    """Why the kernel cannot norm these; None: it does."""
    if x.dtype != jnp.bfloat16 or not x.size or x.ndim < 2 or not depth_fits(x.shape[-1]):
        return f"it needs bfloat16, and rows in multiples of {THREADS}"
    return mesh_refusal(x)


def run_norm(x: Float[Array, "..."], scale: Float[Array, "D"], eps: float) -> Float[Array, "..."]:
    def local(x, scale):
        return norm_rows(x.reshape(-1, x.shape[-1]), scale, eps=eps).reshape(x.shape)

    return sequences_per_device(local, x, scale)


@partial(jax.jit, static_argnames="eps")  # lowered once for all layers
def norm_rows(
    x: Float[Array, "R D"], scale: Float[Array, "D"], *, eps: float
) -> Float[Array, "R D"]:
    """RMS norms of rows, as `nn.norm.RMSNorm` computes them; a warpgroup has a row each."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    num_rows, depth = x.shape
    each = depth // THREADS
    together = next(n for n in (8, 4, 2, 1) if each % n == 0)  # read by a thread at a time
    layout = plgpu.Layout.WG_STRIDED((depth,), vec_size=together)

    def hopper_norm(x, scale, out):
        row = lax.axis_index("row")
        numbers = plgpu.load(x.at[row], layout=layout).astype(jnp.float32)
        variance = jnp.sum(numbers * numbers) * (1 / depth)
        normed = (numbers * lax.rsqrt(variance + eps)).astype(out.dtype)
        out[row] = normed * plgpu.load(scale, layout=layout)

    return plgpu.kernel(
        hopper_norm,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(num_rows,),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x, scale.astype(x.dtype))
