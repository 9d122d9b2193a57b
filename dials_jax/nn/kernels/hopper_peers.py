"""Row-parallel products, with an all-reduce of our own, on two Hopper GPUs of one process.

`tensor` splits their weight along what is summed (Shoeybi et al., 2019, section 3). Each GPU
multiplies its part, and then reads the other's part from its memory, over NVLink. The sum of a
block's 2 MB is short, so what counts is how soon it starts and whether the next kernel waits for
the host: this one is a node of a CUDA graph, and XLA's own sum ends the graph. It takes 11 of 86
microseconds off an MLP of LLaDA-8B's width. A program pays up to 24 for each such sum when it
starts, so one that passes once through few tokens loses some (docs/results/scaling.md).
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.mesh import get_concrete_mesh  # within `jax.jit` the public one is abstract
from jaxtyping import Array, Float

from dials_jax.nn.kernels.hopper_rows import as_rows
from dials_jax.nn.kernels.per_device import split_over_tensor

TILE_NUMBERS = 2048  # that a block adds at a time
MOST_BLOCKS = 132  # one for each multiprocessor; each loops over tiles
ALLOCATOR = "XLA_PYTHON_CLIENT_ALLOCATOR"
READABLE = ("", "default", "bfc")  # allocators whose memory the other GPUs of the process may read
NO_PEERS = (
    "it needs GPUs that may read each other's memory, JAX 0.11.2 or later, and memory of the "
    f"default allocator ({ALLOCATOR})"
)

Product = Callable[[Array, Array, str, Any], Array]  # of x, weight, axes and the result's dtype


def split_refusal(
    x: Float[Array, "..."], weight: Float[Array, "..."], axes: str, dtype: Any
) -> str | None:
    """Why the GPUs cannot add their parts of this product so; None: they can."""
    mesh, rows = jax.sharding.get_abstract_mesh(), as_rows(axes, weight.ndim)
    if rows is None:
        return "it adds products of rows by a weight"
    # Kernels that reach other devices wait for all of them, also for other batch shards, which may
    # take other branches. More than two GPUs were not measured.
    all_of_two = not mesh.empty and mesh.size == jax.local_device_count() == 2
    if not all_of_two or mesh.shape["tensor"] != 2 or jax.process_count() > 1 or mesh.manual_axes:
        return "it is for two GPUs, all of one process, both on `tensor`"
    devices = get_concrete_mesh()
    numbers = [] if devices.empty else [device.id for device in devices.devices.flat]
    if numbers != sorted(numbers):
        return "the mesh must have the GPUs in the order of their numbers"
    if weight.shape[0] % mesh.size:
        return f"the mesh does not split {weight.shape[0]}"
    size = math.prod(x.shape[: x.ndim - rows.num_summed] + weight.shape[rows.num_summed :])
    in_floats = jnp.dtype(dtype or x.dtype) in (jnp.bfloat16, jnp.float32)
    if not in_floats or size % TILE_NUMBERS or not 0 < size < 2**31:  # places are of 32 bits
        return f"it adds multiples of {TILE_NUMBERS} numbers, in bfloat16 or float32"
    return None if reads_peers() else NO_PEERS


@lru_cache
def reads_peers() -> bool:
    """Whether a kernel on any GPU of this process may read the memory of all others."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # Where kernels that reach other devices have no such option, they do not wait for them either.
    if "skip_device_barrier" not in plgpu.CompilerParams.__dataclass_fields__:
        return False
    if os.environ.get(ALLOCATOR, "") not in READABLE:
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    numbers = [device.local_hardware_id for device in jax.local_devices()]
    yes = ctypes.c_int()
    return all(
        driver.cuDeviceCanAccessPeer(ctypes.byref(yes), *pair) == 0 and yes.value
        for pair in itertools.permutations(numbers, 2)
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def run_split(
    product: Product, x: Float[Array, "..."], weight: Float[Array, "..."], axes: str, dtype: Any
) -> Float[Array, "..."]:
    """x times the weight. What gradients pass through, XLA adds; there is no forward mode.

    Args:
      product: computes a GPU's part, or with gradients all of it.
    """

    def own_part(x: Array, weight: Array) -> Array:
        return sum_over_peers(product(x, weight, axes, dtype), "tensor")

    summed_axis = x.ndim - as_rows(axes, weight.ndim).num_summed
    return split_over_tensor(own_part, x, weight, summed_axis)


def _run_forward(product, x, weight, axes, dtype):
    return jax.vjp(lambda x, weight: product(x, weight, axes, dtype), x, weight)


def _run_backward(product, axes, dtype, pull, g):
    return pull(g)


run_split.defvjp(_run_forward, _run_backward)


@partial(jax.jit, static_argnames="axis")  # lowered once for all layers, not once per layer
def sum_over_peers(x: Float[Array, "..."], axis: str) -> Float[Array, "..."]:
    """The all-reduce over the GPUs of a mesh's axis, in float32, rounded once; inside `shard_map`.

    All GPUs add in the order of their numbers, so all get the same bits. For sizes see
    `split_refusal`. A GPU that does not call it lets the others wait for ever, as with any sum.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    num_gpus, num_tiles = lax.axis_size(axis), x.size // TILE_NUMBERS
    num_blocks = min(num_tiles, MOST_BLOCKS)
    numbers_per_read = 16 // x.dtype.itemsize  # the widest read has 16 bytes
    layout = plgpu.Layout.WG_STRIDED((TILE_NUMBERS,), vec_size=numbers_per_read)

    def sum_over_peers_kernel(x, y):  # the name in profiles
        # Kernels that reach other devices begin at the same time everywhere, so all parts are here.
        read, me = pl.get_global(plgpu.SemaphoreType.REGULAR), lax.axis_index(axis)

        @plgpu.nd_loop((num_tiles,), collective_axes="block")
        def _(loop):
            tile = pl.ds(loop.index[0] * TILE_NUMBERS, TILE_NUMBERS)
            parts = [
                plgpu.layout_cast(
                    plgpu.remote_ref(x, {axis: jnp.int32(gpu)}).at[tile][...], layout
                ).astype(jnp.float32)
                for gpu in range(num_gpus)
            ]
            y[tile] = sum(parts[1:], parts[0]).astype(y.dtype)

        # x may be overwritten once this kernel ends, so one block waits until all others have read.
        for distance in range(1, num_gpus):
            other = lax.rem(me + distance, jnp.int32(num_gpus))
            pl.semaphore_signal(read, 1, device_id={axis: other})

        @pl.when(lax.axis_index("block") == 0)
        def _():
            pl.semaphore_wait(read, num_blocks * (num_gpus - 1))

    kernel = plgpu.kernel(
        sum_over_peers_kernel,
        out_type=jax.ShapeDtypeStruct((x.size,), x.dtype),
        grid=(num_blocks,),
        grid_names=("block",),
    )
    return kernel(x.reshape(-1)).reshape(x.shape)
