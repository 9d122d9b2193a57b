"""Matmuls with what follows them in one kernel, for Hopper GPUs.

    bfloat16, gate and up side by side    silu(x W_gate) * (x W_up)
    e4m3                                  (X W) * x_scale * w_scale, and the same of gate and up

XLA writes a matmul's result to memory, that of e4m3 in float32, and reads it again to scale or
combine it. Here it stays in registers (`hopper_tiles`): see docs/results/decoding.md and
eight_bits.md.

A row's sum has one order, whatever the number of rows. Tensor cores keep some 14 bits of a sum of
e4m3 products, where cuBLAS adds up parts of it in float32. That changes results by 0.1 to 0.3 % of
their size (root mean square, 4,096 and 12,288 terms), 1 / 20 of what the rounding to e4m3 does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dials_jax.nn.eight_bits import NUMBERS, Quantised, is_quantised
from dials_jax.nn.kernels import hopper_tiles
from dials_jax.nn.kernels.hopper_quantise import depth_fits, quantise_rows
from dials_jax.nn.kernels.hopper_tiles import TILE_BYTES, TILE_M, Operands, multiply_tiles
from dials_jax.nn.kernels.per_device import mesh_refusal, sequences_per_device, splits

WIDE = 4  # rounds of wide tiles, and more, of which the last may be partial
FULLNESS = 0.88  # of the rounds of tiles; at 0.87 (768 tokens of LLaDA-8B) SwiGLU is not faster
SWIGLU_TILE_F = 128  # columns of a tile, of gate and of up

# ------------------------------------------------------------------------ bfloat16, gate and up


def swiglu_fits(x: Float[Array, "*B D"], gate_up: Float[Array, "D _"]) -> bool:
    """Whether the kernel takes these shapes and types, on whatever device."""
    sizes = math.prod(x.shape[:-1]), gate_up.shape[1], x.shape[-1]
    units = TILE_M, 2 * SWIGLU_TILE_F, TILE_BYTES // 2
    whole_tiles = all(n > 0 and n % unit == 0 for n, unit in zip(sizes, units, strict=True))
    return whole_tiles and x.dtype == gate_up.dtype == jnp.bfloat16


def swiglu_pays(x: Float[Array, "*B D"], gate_up: Float[Array, "D _"]) -> bool:
    """Whether the kernel is faster than XLA, for shapes that fit.

    Tiles are made in rounds of one per SM. A partial round takes as long as a full one, unless it
    is the only one: then reading the weights takes most of the time.
    """
    num_rows, num_sms = math.prod(x.shape[:-1]), hopper_tiles.num_sms()
    num_tiles = num_rows // TILE_M * (gate_up.shape[1] // 2 // SWIGLU_TILE_F)
    rounds = -(-num_tiles // num_sms)
    return rounds == 1 or num_tiles >= FULLNESS * rounds * num_sms


def swiglu_refusal(
    x: Float[Array, "B T D"],
    kernels: tuple[Quantised | Array, ...],
    biases: tuple[Array | None, ...],
    parts: int,
) -> str | None:
    """Why the kernel cannot take these, or does not pay; None: it does."""
    return joined_refusal(x, kernels, biases, parts, _swiglu_refusal)


def joined_refusal(
    x: Float[Array, "B T D"],
    kernels: tuple[Quantised | Array, ...],
    biases: tuple[Array | None, ...],
    parts: int,
    refusal: Callable[[Array, Array], str | None],
) -> str | None:
    """Why no kernel can take gate and up; None: it does.

    Args:
      refusal: of x and the weight, if it is in bfloat16.
    """
    if len(kernels) != 1 or biases[0] is not None:
        return "it needs the fused kernels of gate and up, and no biases"
    if parts != 1:
        return "the mesh splits the weight"
    if is_quantised(kernels[0]):
        return matmul_refusal(x, kernels[0], halves=2)
    return refusal(x, kernels[0])


def _swiglu_refusal(x: Float[Array, "B T D"], kernel: Float[Array, "D _"]) -> str | None:
    num_devices, _ = splits()
    if x.shape[0] % num_devices:
        return f"the mesh does not divide {x.shape[0]} sequences"
    own = x[: x.shape[0] // num_devices]
    if not swiglu_fits(own, kernel):
        sizes = f"{TILE_M}, {SWIGLU_TILE_F} and {TILE_BYTES // 2}"
        return f"it needs bfloat16, and sizes in multiples of {sizes}"
    if not swiglu_pays(own, kernel):
        return "it is no faster than XLA for these sizes"
    return None


def run_swiglu(
    x: Float[Array, "B T D"],
    kernels: tuple[Quantised | Array, ...],
    biases: tuple[Array | None, ...],
    parts: int,
) -> Float[Array, "B T F"]:
    fn = partial(matmul_e4m3, halves=2) if is_quantised(kernels[0]) else swiglu
    return sequences_per_device(fn, x, kernels[0])


def plain(x: Float[Array, "*B D"], gate_up: Float[Array, "D _"]) -> Float[Array, "*B F"]:
    """The same by XLA, with every intermediate result rounded."""
    gate, up = jnp.split(x @ gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def swiglu(x: Float[Array, "*B D"], gate_up: Float[Array, "D _"]) -> Float[Array, "*B F"]:
    """silu(x @ gate) * (x @ up) for the two side by side: in float32, rounded once.

    The gradient is that of `plain`. The compiler cannot split a kernel over devices: the caller
    splits the tokens, in a `shard_map` with `check_vma=False`.

    Raises: ValueError unless `swiglu_fits`.
    """
    if not swiglu_fits(x, gate_up):
        raise ValueError(f"no kernel for {x.dtype} {x.shape}, {gate_up.dtype} {gate_up.shape}")
    operands = Operands(x.reshape(-1, x.shape[-1]), gate_up, halves=2)
    return multiply_tiles(operands, SWIGLU_TILE_F).reshape(*x.shape[:-1], -1)


swiglu.defvjp(
    lambda x, gate_up: (swiglu(x, gate_up), (x, gate_up)),
    lambda inputs, g: jax.vjp(plain, *inputs)[1](g),
)


# ----------------------------------------------------------------------------------------- e4m3


def matmul_refusal(
    x: Float[Array, "B ..."],
    weight: Quantised | Array,
    dtype: Any = jnp.bfloat16,
    halves: int = 1,
) -> str | None:
    """Why the kernel cannot multiply x, quantised as it arrives, by this weight; None: it does."""
    if not is_quantised(weight) or weight.values.dtype != NUMBERS["fp8"]:
        return "it multiplies weights in e4m3"
    why = mesh_refusal(x)
    if why is not None:
        return why
    columns = math.prod(weight.scales.shape) // halves
    depth = math.prod(weight.values.shape[weight.scales.ndim :])
    if x.dtype != jnp.bfloat16 or not x.size or columns % 64 or not depth_fits(depth):
        return f"it needs inputs in bfloat16, columns in multiples of 64, depth of {TILE_BYTES}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return "its results are bfloat16 or float32"
    return None


def run_matmul(
    x: Float[Array, "B ..."], weight: Quantised, dtype: Any = jnp.bfloat16
) -> Float[Array, "B ..."]:
    return sequences_per_device(partial(matmul_e4m3, dtype=dtype), x, weight)


def matmul_e4m3(
    x: Float[Array, "..."], weight: Quantised, halves: int = 1, dtype: Any = jnp.bfloat16
) -> Float[Array, "..."]:
    """x, quantised per token, times the weight, in float32 and rounded once to `dtype`.

    Args:
      halves: 2: the weight is that of gate and up, and the result is SwiGLU's.
    """
    leading = x.shape[: x.ndim - weight.num_summed]
    depth = math.prod(weight.values.shape[weight.scales.ndim :])
    x = x.reshape(-1, depth)
    num_rows = x.shape[0]
    rows = quantise_rows(jnp.pad(x, ((0, -num_rows % 8), (0, 0))))  # copies are of 8 rows together
    operands = Operands(
        rows.values,
        weight.values.reshape(-1, depth),
        rows.scales,
        weight.scales.reshape(-1),
        halves,
    )
    y = multiply_tiles(operands, tile_columns(operands), dtype)
    columns = weight.scales.shape if halves == 1 else (-1,)
    return y[:num_rows].reshape(*leading, *columns)


def tile_columns(operands: Operands) -> int:
    """Narrow where whole tiles would leave half of the SMs without work, wide for many rows."""
    columns, num_sms = operands.num_columns, hopper_tiles.num_sms()
    down = -(-operands.x.shape[0] // TILE_M)
    if operands.halves == 1 and columns % 256 == 0 and down * (columns // 256) > WIDE * num_sms:
        return 256
    whole = columns % 128 == 0 and 2 * down * (columns // 128) > num_sms
    return 128 if whole else 64
