"""Rounding rows to e4m3 in one pass, for Hopper GPUs.

XLA reads the rows twice, once for their largest magnitudes. Here a warpgroup holds a row in its
registers. The numbers are those of `nn.eight_bits.quantise`, bit by bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dials_jax.nn.eight_bits import LARGEST, NUMBERS, SMALLEST, Quantised

THREADS = 128  # of a warpgroup
MOST_PER_THREAD = 192  # numbers of a row, of 255 registers


def depth_fits(depth: int) -> bool:
    return depth % THREADS == 0 and depth // THREADS <= MOST_PER_THREAD


@jax.jit  # lowered once for all layers
def quantise_rows(x: Float[Array, "R D"]) -> Quantised:
    """Each row with a scale of its own; its depth must fit."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    num_rows, depth = x.shape
    e4m3 = NUMBERS["fp8"]
    largest = np.float32(LARGEST[e4m3])
    each = depth // THREADS
    together = next(n for n in (8, 4, 2, 1) if each % n == 0)  # read by a thread at a time
    layout = plgpu.Layout.WG_STRIDED((depth,), vec_size=together)

    def hopper_quantise(x, values, scales):
        row = lax.axis_index("row")
        numbers = plgpu.load(x.at[row], layout=layout).astype(jnp.float32)
        magnitude = jnp.maximum(jnp.max(jnp.abs(numbers)), np.float32(SMALLEST))
        values[row] = (numbers * (largest / magnitude)).astype(e4m3)
        scales[row] = magnitude * (1 / largest)

    values, scales = plgpu.kernel(
        hopper_quantise,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, e4m3),
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        ),
        grid=(num_rows,),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x)
    return Quantised(values, scales)
