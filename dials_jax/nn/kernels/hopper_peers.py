"""Row-parallel products, with an all-reduce of our own, on two Hopper GPUs of one process.

`tensor` splits their weight along what is summed (Shoeybi et al., 2019, section 3). Each GPU
multiplies its part, and then reads the other's part from its memory, over NVLink, and adds both to
the residual stream. The sum of a block's 2 MB is short, so what counts is how soon it starts and
whether the next kernel waits for the host: this one is a node of a CUDA graph, and XLA's own sum
ends the graph. A program pays up to 34 microseconds for each such sum when it starts, so one that
passes once through few tokens loses some (docs/results/scaling.md).

Before a sum the GPUs wait for each other, block by block, on flags in each other's memory, which
are 0 again after it. XLA would clear memory for flags before every sum, and let the GPUs meet once
more in a kernel of its own. So the sums of a stack of layers share flags, which are cleared before
its first layer (`with_flags`), or once a program: XLA takes that out of loops.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.mesh import get_concrete_mesh  # within `jax.jit` the public one is abstract
from jaxtyping import Array, Float, Int32

from dials_jax.compiling import batch_invariant
from dials_jax.nn.kernels.hopper_rows import as_rows
from dials_jax.nn.kernels.implementation import forced_by_environment, left_out_by_environment
from dials_jax.nn.kernels.per_device import HOPPER, on_each_device, split_over_tensor

TILE_NUMBERS = 2048  # that a block adds at a time
MOST_BLOCKS = 132  # one for each multiprocessor; each loops over tiles
NUM_FLAGS = -(-2 * MOST_BLOCKS // 128) * 128  # two for each block; 128 threads clear as many each
ALLOCATOR = "XLA_PYTHON_CLIENT_ALLOCATOR"
READABLE = ("", "default", "bfc")  # allocators whose memory the other GPUs of the process may read
NO_PEERS = (
    "it needs GPUs that reach each other's memory by NVLink, JAX 0.11.2 or later, and memory of "
    f"the default allocator ({ALLOCATOR})"
)
PEER_ACCESS, PEER_ATOMICS = 2, 3  # attributes of a pair of GPUs, by their numbers in CUDA's driver

Product = Callable[[Array, Array, str, Any], Array]  # of x, weight, axes and the result's dtype
# A GPU's. [b]: for block b the other one's part is there; [MOST_BLOCKS + b]: it has read mine.
Flags = Int32[Array, "N"]
P = ParamSpec("P")
R = TypeVar("R")

_flags: ContextVar[Flags | None] = ContextVar("flags", default=None)  # of the layers being traced


def with_flags(run: Callable[P, R]) -> Callable[P, R]:
    """`run` with flags for the sums in it.

    Each sum needs the result of the one before: two at a time would take each other's signals.
    Nothing that keeps its traces from one call of `run` to the next, such as a `jax.jit` of a
    module, may hold such a sum: the flags belong to one trace.
    """

    @wraps(run)
    def run_with_flags(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _flags.set(on_each_device(make_flags) if _may_run() else None)
        try:
            return run(*args, **kwargs)
        finally:
            _flags.reset(token)

    return run_with_flags


def _may_run() -> bool:
    if not HOPPER.is_here() or batch_invariant.value or left_out_by_environment("hopper_peers"):
        return False
    return forced_by_environment(("hopper_peers", "xla")) != "xla" and gpus_refusal() is None


def split_refusal(
    added_to: Float[Array, "..."] | None,
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    axes: str,
    dtype: Any,
) -> str | None:
    """Why the GPUs cannot add their parts of this product so; None: they can."""
    rows, why = as_rows(axes, weight.ndim), gpus_refusal()
    if rows is None or why:
        return why or "it adds products of rows by a weight"
    if weight.shape[0] % 2:
        return f"the mesh does not split {weight.shape[0]}"
    shape = x.shape[: x.ndim - rows.num_summed] + weight.shape[rows.num_summed :]
    size, of = math.prod(shape), jnp.dtype(dtype or x.dtype)
    in_floats = of in (jnp.bfloat16, jnp.float32)
    if not in_floats or size % TILE_NUMBERS or not 0 < size < 2**31:  # places are of 32 bits
        return f"it adds multiples of {TILE_NUMBERS} numbers, in bfloat16 or float32"
    if added_to is not None and (added_to.shape, added_to.dtype) != (shape, of):
        return f"it adds to {of} of the product's shape"
    return None if _flags.get() is not None else "it is for the sums of a stack of layers"


def gpus_refusal() -> str | None:
    """Why no GPUs can add their parts of a product so; None: they can."""
    mesh = jax.sharding.get_abstract_mesh()
    # Kernels that reach other devices wait for all of them, also for other batch shards, which may
    # take other branches. More than two GPUs were not measured.
    all_of_two = not mesh.empty and mesh.size == jax.local_device_count() == 2
    if not all_of_two or mesh.shape["tensor"] != 2 or jax.process_count() > 1 or mesh.manual_axes:
        return "it is for two GPUs, all of one process, both on `tensor`"
    devices = get_concrete_mesh()
    numbers = [] if devices.empty else [device.id for device in devices.devices.flat]
    if numbers != sorted(numbers):
        return "the mesh must have the GPUs in the order of their numbers"
    return None if reads_peers() else NO_PEERS


@lru_cache
def reads_peers() -> bool:
    """Whether a kernel on any GPU of this process reaches the memory of all others: it may read
    it, and add to a number there while that GPU does."""
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
    pairs = itertools.product((PEER_ACCESS, PEER_ATOMICS), itertools.permutations(numbers, 2))
    yes = ctypes.c_int()
    return all(
        driver.cuDeviceGetP2PAttribute(ctypes.byref(yes), attribute, *pair) == 0 and yes.value
        for attribute, pair in pairs
    )


def run_split(
    product: Product,
    added_to: Float[Array, "..."] | None,
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    axes: str,
    dtype: Any,
) -> Float[Array, "..."]:
    """x times the weight, added to what is given.

    Args:
      product: computes a GPU's part, or with gradients all of it.
    """
    return _run_split(product, axes, dtype, _flags.get(), added_to, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run_split(product, axes, dtype, flags, added_to, x, weight):
    """What gradients pass through, XLA adds; there is no forward mode."""

    def own_part(x: Array, weight: Array, flags: Flags, added_to: Array | None) -> Array:
        return sum_over_peers(product(x, weight, axes, dtype), flags, added_to, "tensor")

    summed_axis = x.ndim - as_rows(axes, weight.ndim).num_summed
    return split_over_tensor(own_part, x, weight, summed_axis, flags, added_to)


def _run_forward(product, axes, dtype, flags, added_to, x, weight):
    def all_of_it(added_to, x, weight):
        y = product(x, weight, axes, dtype)
        return y if added_to is None else added_to + y

    return jax.vjp(all_of_it, added_to, x, weight)


def _run_backward(product, axes, dtype, pull, g):
    return None, *pull(g)


_run_split.defvjp(_run_forward, _run_backward)


def make_flags() -> Flags:
    """This GPU's flags, all 0, once those of all GPUs are; inside `shard_map`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def clear_flags_kernel(flags):
        layout = plgpu.Layout.WG_STRIDED((NUM_FLAGS,), vec_size=1)
        flags[...] = plgpu.layout_cast(jnp.zeros(NUM_FLAGS, jnp.int32), layout)
        # XLA clears this semaphore, and the GPUs meet, before the kernel starts; but the flags are
        # cleared within it, so the GPUs meet again.
        cleared = pl.get_global(plgpu.SemaphoreType.REGULAR)
        others = _others("tensor")
        for other in others:
            pl.semaphore_signal(cleared, 1, device_id={"tensor": other})
        pl.semaphore_wait(cleared, len(others))

    flags = jax.ShapeDtypeStruct((NUM_FLAGS,), jnp.int32)
    return plgpu.kernel(clear_flags_kernel, out_type=flags, grid=(1,), grid_names=("block",))()


@partial(jax.jit, static_argnames="axis")  # lowered once for all layers, not once per layer
def sum_over_peers(
    x: Float[Array, "..."], flags: Flags, added_to: Float[Array, "..."] | None, axis: str
) -> Float[Array, "..."]:
    """The all-reduce over the GPUs of a mesh's axis, plus what is given; inside `shard_map`.

    The sum is made in float32 and rounded once, before it is added. All GPUs add in the order of
    their numbers, so all get the same bits. For sizes see `split_refusal`. A GPU that does not call
    it lets the others wait for ever, as with any sum.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    num_gpus, tile_numbers = lax.axis_size(axis), _tile_numbers(x.size)
    num_tiles = x.size // tile_numbers
    num_blocks = min(num_tiles, MOST_BLOCKS)
    numbers_per_read = 16 // x.dtype.itemsize  # the widest read has 16 bytes
    layout = plgpu.Layout.WG_STRIDED((tile_numbers,), vec_size=numbers_per_read)

    def sum_over_peers_kernel(x, flags, *rest):  # the name in profiles
        *added_to, y = rest
        block, others = lax.axis_index("block"), _others(axis)
        here, read = (flags.at[pl.ds(i * MOST_BLOCKS + block, 1)] for i in range(2))

        def meet(flag):
            for other in others:
                _signal(plgpu.remote_ref(flag, {axis: other}))
            _wait(flag, len(others))

        meet(here)  # the other's part is there

        @plgpu.nd_loop((num_tiles,), collective_axes="block")
        def _(loop):
            tile = pl.ds(loop.index[0] * tile_numbers, tile_numbers)

            def numbers_of(ref):
                return plgpu.layout_cast(ref.at[tile][...], layout).astype(jnp.float32)

            parts = [
                numbers_of(plgpu.remote_ref(x, {axis: jnp.int32(gpu)})) for gpu in range(num_gpus)
            ]
            total = sum(parts[1:], parts[0])
            for ref in added_to:
                total = numbers_of(ref) + total.astype(y.dtype).astype(jnp.float32)
            y[tile] = total.astype(y.dtype)

        meet(read)  # x may be overwritten once this kernel ends

    kernel = plgpu.kernel(
        sum_over_peers_kernel,
        out_type=jax.ShapeDtypeStruct((x.size,), x.dtype),
        grid=(num_blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(skip_device_barrier=True),
    )
    given = () if added_to is None else (added_to.reshape(-1),)
    return kernel(x.reshape(-1), flags, *given).reshape(x.shape)


def _tile_numbers(size: int) -> int:
    """Twice as many at a time where all blocks have work: then more reads are on their way."""
    twice = 2 * TILE_NUMBERS
    return twice if size % twice == 0 and size >= twice * MOST_BLOCKS else TILE_NUMBERS


def _others(axis: str) -> list[Int32[Array, ""]]:
    num_gpus = lax.axis_size(axis)
    distances = range(1, num_gpus)
    return [lax.rem(lax.axis_index(axis) + d, jnp.int32(num_gpus)) for d in distances]


def _signal(flag: Any) -> None:
    """Adds 1 to a flag once all threads of the block are done with what comes before."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(_, flag):
        mgpu.utils.warpgroup_barrier()
        mgpu.SemaphoreRef(mgpu.utils.memref_ptr(flag)).signal(1)

    signal(flag)


def _wait(flag: Any, value: int) -> None:
    """Waits until a flag has the value, which is then taken off."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(_, flag):
        mgpu.SemaphoreRef(mgpu.utils.memref_ptr(flag)).wait(value)

    wait(flag)
