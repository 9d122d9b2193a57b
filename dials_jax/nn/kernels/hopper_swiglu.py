"""silu(x W_gate) * (x W_up) as one kernel, for Hopper GPUs.

XLA writes both matmuls' results to memory and reads them again to combine them. Here they stay in
registers: 3 to 7 % faster at LLaDA-8B's sizes (docs/results/decoding.md).

Every multiprocessor (SM) runs one program (CTA), which makes tile after tile of the result. Two of
its warpgroups multiply, each half of a tile's rows. A third loads their operands in advance, also
for the next tile, so that the end of one tile overlaps the loads of the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dials_jax.nn.eight_bits import is_quantised
from dials_jax.nn.kernels.per_device import sequences_per_device, splits
from dials_jax.nn.linear import Weight, array_of

TILE_M, TILE_F, TILE_K = 128, 128, 64  # rows, columns of either matmul, depth of a step
STAGES = 4  # steps that are loaded at a time: 48 KiB each, of an SM's 227
MULTIPLIERS = 2  # warpgroups; the one after them loads
MULTIPLIER_ROWS = TILE_M // MULTIPLIERS  # of a tile, for each of them
PIECE_COLUMNS = 64  # columns written at a time
SNAKE = 16  # tiles down, then one across: those made at a time share operands in the L2 cache
# Per thread. Two float32 accumulators take 128; 40 + 2 * 232 is within the 512 for all three.
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232
HOPPER_SMS = 132
FULLNESS = 0.88  # of the rounds of tiles; at 0.87 (768 tokens of LLaDA-8B) the kernel is not faster


class Program(NamedTuple):
    """References: to the arrays, then to shared memory. A slot holds what one step multiplies."""

    x: Any
    gate_up: Any
    out: Any
    x_slots: Any
    gate_up_slots: Any
    out_slots: Any  # buffers of results before `out`: two for each warpgroup
    full: Any  # barriers of the slots: all loads have arrived
    free: Any  # the same: both warpgroups have read it

    def slot(self, step: Array) -> Array:
        return lax.rem(step, jnp.int32(self.x_slots.shape[0]))


def swiglu_fits(x: Float[Array, "*B D"], gate_up: Float[Array, "D _"]) -> bool:
    """Whether the kernel takes these shapes and types, on whatever device."""
    sizes = math.prod(x.shape[:-1]), gate_up.shape[1], x.shape[-1]
    units = TILE_M, 2 * TILE_F, TILE_K
    whole_tiles = all(n > 0 and n % unit == 0 for n, unit in zip(sizes, units, strict=True))
    return whole_tiles and x.dtype == gate_up.dtype == jnp.bfloat16


def swiglu_pays(x: Float[Array, "*B D"], gate_up: Float[Array, "D _"]) -> bool:
    """Whether the kernel is faster than XLA, for shapes that fit.

    Tiles are made in rounds of one per SM. A partial round takes as long as a full one, unless it
    is the only one: then reading the weights takes most of the time.
    """
    num_rows = math.prod(x.shape[:-1])
    num_tiles, num_sms = num_rows // TILE_M * (gate_up.shape[1] // 2 // TILE_F), _num_sms()
    rounds = -(-num_tiles // num_sms)
    return rounds == 1 or num_tiles >= FULLNESS * rounds * num_sms


def swiglu_refusal(
    x: Float[Array, "B T D"], kernels: tuple[Weight, ...], biases: tuple[Weight | None, ...]
) -> str | None:
    """Why the kernel cannot take these, or does not pay; None: it does."""
    if len(kernels) != 1 or biases[0] is not None:
        return "it needs the fused kernels of gate and up, and no biases"
    if is_quantised(array_of(kernels[0])):
        return "it multiplies no weights in 8 bits"
    num_devices, _ = splits()
    if x.shape[0] % num_devices:
        return f"the mesh does not divide {x.shape[0]} sequences"
    own, kernel = x[: x.shape[0] // num_devices], array_of(kernels[0])
    if not swiglu_fits(own, kernel):
        return f"it needs bfloat16, and sizes in multiples of {TILE_M}, {TILE_F} and {TILE_K}"
    if not swiglu_pays(own, kernel):
        return "it is no faster than XLA for these sizes"
    return None


def run_swiglu(
    x: Float[Array, "B T D"], kernels: tuple[Weight, ...], biases: tuple[Weight | None, ...]
) -> Float[Array, "B T F"]:
    return sequences_per_device(swiglu, x, array_of(kernels[0]))


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
    return _of_rows(x.reshape(-1, x.shape[-1]), gate_up).reshape(*x.shape[:-1], -1)


swiglu.defvjp(
    lambda x, gate_up: (swiglu(x, gate_up), (x, gate_up)),
    lambda inputs, g: jax.vjp(plain, *inputs)[1](g),
)


@jax.jit  # lowered once for all layers, not once per layer
def _of_rows(x: Float[Array, "R D"], gate_up: Float[Array, "D _"]) -> Float[Array, "R F"]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    num_rows, num_columns = x.shape[0], gate_up.shape[1] // 2
    num_tiles = num_rows // TILE_M * (num_columns // TILE_F)
    return plgpu.kernel(
        _swiglu_kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype),
        # Never more programs than tiles: one without a tile would wait for loads that never come.
        grid=(min(_num_sms(), num_tiles),),
        grid_names=("program",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(x, gate_up)


def _num_sms() -> int:
    """From the mesh, since a program may be compiled for devices of another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or HOPPER_SMS
    return getattr(jax.local_devices()[0], "core_count", HOPPER_SMS)


def _swiglu_kernel(x, gate_up, out):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(*shared):
        program, warpgroup = Program(x, gate_up, out, *shared), lax.axis_index("warpgroup")
        pl.when(warpgroup == MULTIPLIERS)(partial(_load, program))
        pl.when(warpgroup != MULTIPLIERS)(partial(_multiply, program, warpgroup))

    # The layout that tensor cores read: 8 x 64 values together, swizzled over 128 bytes.
    layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    memory = partial(plgpu.SMEM, dtype=x.dtype, transforms=layout)
    num_slots = min(STAGES, x.shape[1] // TILE_K)
    pl.run_scoped(
        run,
        memory((num_slots, TILE_M, TILE_K)),
        memory((num_slots, 2, TILE_K, TILE_F)),
        memory((MULTIPLIERS, 2, MULTIPLIER_ROWS, PIECE_COLUMNS)),
        plgpu.Barrier(num_arrivals=3, num_barriers=num_slots),  # of x, gate and up
        plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=num_slots),
        collective_axes="warpgroup",
    )


def _for_each_tile(program: Program, body: Callable[[Array, Array, Array, int], None]):
    """Calls `body` with each tile's first step, row and column, and its number of steps.

    Steps are numbered across the program's tiles: slots are used in turn without a break, and the
    loader may be a tile ahead of the others.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    down, across = program.out.shape[0] // TILE_M, program.out.shape[1] // TILE_F
    num_steps = program.x.shape[1] // TILE_K

    @plgpu.nd_loop((down * across,), collective_axes="program")
    def _(loop):
        i, j = plgpu.planar_snake(loop.index[0], (down, across), 0, min(SNAKE, down))
        body(loop.local_index * num_steps, i * TILE_M, j * TILE_F, num_steps)


def _load(program: Program):
    """The loading warpgroup: fills slots as they become free."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    num_slots, num_columns = program.x_slots.shape[0], program.out.shape[1]

    def tile(first, row, column, num_steps):
        def load(k, _):
            slot = program.slot(first + k)
            pl.when(first + k >= num_slots)(lambda: plgpu.barrier_wait(program.free.at[slot]))
            inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            copy = partial(plgpu.copy_gmem_to_smem, barrier=program.full.at[slot], oob_mode=inside)
            depth = pl.ds(k * TILE_K, TILE_K)
            copy(program.x.at[pl.ds(row, TILE_M), depth], program.x_slots.at[slot])
            for half in range(2):
                columns = pl.ds(half * num_columns + column, TILE_F)
                copy(program.gate_up.at[depth, columns], program.gate_up_slots.at[slot, half])

        lax.fori_loop(0, num_steps, load, None)

    _for_each_tile(program, tile)
    # Nothing has waited for the last loads: no barrier may end with an arrival not awaited.
    pl.loop(0, num_slots)(lambda slot: plgpu.barrier_wait(program.free.at[slot]))


def _multiply(program: Program, warpgroup: Array):
    """A multiplying warpgroup: makes its rows of each tile."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")

    def tile(first, row, column, num_steps):
        def make(gate, up):
            _accumulate(
                program,
                gate,
                up,
                pl.ds(warpgroup * MULTIPLIER_ROWS, MULTIPLIER_ROWS),
                first,
                num_steps,
            )
            rows, columns = (
                pl.ds(row + warpgroup * MULTIPLIER_ROWS, MULTIPLIER_ROWS),
                pl.ds(column, TILE_F),
            )
            _write(program, gate[...], up[...], program.out.at[rows, columns], warpgroup)

        pl.run_scoped(make, *[plgpu.ACC((MULTIPLIER_ROWS, TILE_F), jnp.float32)] * 2)

    _for_each_tile(program, tile)
    plgpu.wait_smem_to_gmem(0)  # shared memory must outlive the copies that read it


def _accumulate(program: Program, gate, up, rows, first: Array, num_steps: int):
    """Adds up all steps of a tile. A step's matmuls run while the next ones are issued."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def multiply(step):
        slot = program.slot(step)
        plgpu.barrier_wait(program.full.at[slot])
        for half, acc in enumerate((gate, up)):
            plgpu.wgmma(acc, program.x_slots.at[slot, rows], program.gate_up_slots.at[slot, half])

    def release(step, in_flight):
        plgpu.wgmma_wait(in_flight)
        plgpu.barrier_arrive(program.free.at[program.slot(step)])

    def body(k, _):
        multiply(first + k)
        release(first + k - 1, in_flight=2)  # the two just issued

    multiply(first)
    lax.fori_loop(1, num_steps, body, None)
    release(first + num_steps - 1, in_flight=0)


def _write(program: Program, gate: Array, up: Array, target, warpgroup: Array):
    """Combines both matmuls and copies the result to memory, through two buffers in turn."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    for i in range(TILE_F // PIECE_COLUMNS):
        columns, out_slot = (
            slice(i * PIECE_COLUMNS, (i + 1) * PIECE_COLUMNS),
            program.out_slots.at[warpgroup, i % 2],
        )
        g = gate[:, columns]
        y = (g * lax.logistic(g) * up[:, columns]).astype(target.dtype)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # only the other buffer may be in use
        out_slot[...] = y
        plgpu.commit_smem()  # makes it visible to the copy
        plgpu.copy_smem_to_gmem(out_slot, target.at[:, columns])
