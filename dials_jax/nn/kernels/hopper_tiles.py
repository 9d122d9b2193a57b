"""The kernel of `hopper_matmul`: matmuls in tiles, and what follows them before a tile is written.

Every multiprocessor (SM) runs one program (CTA), which makes tile after tile of the result. Two of
its warpgroups multiply, each half of a tile's rows. A third loads their operands in advance, also
for the next tile, so that the end of one tile overlaps the loads of the next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

TILE_M = 128  # rows of a tile
TILE_BYTES = 128  # depth of a step: 64 numbers of bfloat16, 128 of e4m3
SLOT_BYTES = 196608  # of the steps that are loaded at a time, of an SM's 227 KiB
MOST_SLOTS = 6
MULTIPLIERS = 2  # warpgroups; the one after them loads
MULTIPLIER_ROWS = TILE_M // MULTIPLIERS  # of a tile, for each of them
PIECE_BYTES = 128  # of a row, written at a time
SNAKE = 16  # tiles down, then one across: those made at a time share operands in the L2 cache
# Per thread. Two float32 accumulators take 128; 40 + 2 * 232 is within the 512 for all three.
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232
HOPPER_SMS = 132


class Operands(NamedTuple):
    """What is multiplied: rows, and one weight or two side by side.

    Attributes:
      x: [rows, depth].
      weight: [depth, columns], in e4m3 [columns, depth]; the columns of gate, then those of up.
      x_scale, scale: float32, per row and per column; None: bfloat16.
      halves: 2 for gate and up, else 1.
    """

    x: Any
    weight: Any
    x_scale: Any | None = None
    scale: Any | None = None
    halves: int = 1

    @property
    def depth_last(self) -> bool:
        """Tensor cores read e4m3 of either side only so."""
        return self.scale is not None

    @property
    def num_columns(self) -> int:
        """Of the result."""
        return self.weight.shape[0 if self.depth_last else 1] // self.halves

    @property
    def tile_k(self) -> int:
        return TILE_BYTES // self.x.dtype.itemsize


class Program(NamedTuple):
    """References: to the arrays, then to shared memory. A slot holds what one step multiplies."""

    operands: Operands
    out: Any
    x_slots: Any  # [slots, rows, depth]
    weight_slots: Any  # [slots, halves, ...]
    out_slots: Any  # buffers of results before `out`: two for each warpgroup
    full: Any  # barriers of the slots: all loads have arrived
    free: Any  # the same: both warpgroups have read it
    tile_f: int  # columns of a tile, of either half

    def slot(self, step: Array) -> Array:
        return lax.rem(step, jnp.int32(self.x_slots.shape[0]))


def multiply_tiles(
    operands: Operands, tile_f: int, dtype: Any = jnp.bfloat16
) -> Float[Array, "R F"]:
    """The result in bfloat16 (or float32), by tiles of `tile_f` columns.

    The number of rows is a multiple of 8; columns and depth fill whole tiles.
    """
    x, weight, x_scale, scale, halves = operands
    if x_scale is not None:  # the last tile reads as many scales as the others
        x_scale = jnp.pad(x_scale, (0, -x_scale.shape[0] % TILE_M))
    return _lowered(x, weight, x_scale, scale, halves=halves, tile_f=tile_f, dtype=jnp.dtype(dtype))


@partial(jax.jit, static_argnames=("halves", "tile_f", "dtype"))  # lowered once for all layers
def _lowered(
    x, weight, x_scale, scale, *, halves: int, tile_f: int, dtype: Any
) -> Float[Array, "R F"]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    operands = Operands(x, weight, x_scale, scale, halves)
    shape = x.shape[0], operands.num_columns
    num_tiles = -(-shape[0] // TILE_M) * (shape[1] // tile_f)
    arrays = [array for array in (x, weight, x_scale, scale) if array is not None]

    def hopper_matmul(*refs):  # the name in profiles
        *inputs, out = refs
        _make_all_tiles(Operands(*inputs[:2], *(inputs[2:] or (None, None)), halves), out, tile_f)

    return plgpu.kernel(
        hopper_matmul,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        # Never more programs than tiles: one without a tile would wait for loads that never come.
        grid=(min(num_sms(), num_tiles),),
        grid_names=("program",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(*arrays)


def num_sms() -> int:
    """From the mesh, since a program may be compiled for devices of another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or HOPPER_SMS
    return getattr(jax.local_devices()[0], "core_count", HOPPER_SMS)


def _make_all_tiles(operands: Operands, out: Any, tile_f: int):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(*shared):
        program, warpgroup = Program(operands, out, *shared, tile_f), lax.axis_index("warpgroup")
        pl.when(warpgroup == MULTIPLIERS)(partial(_load, program))
        pl.when(warpgroup != MULTIPLIERS)(partial(_multiply, program, warpgroup))

    def memory(*shape: int, dtype: Any):
        # The layout that tensor cores read: 8 rows of up to 128 bytes together, swizzled.
        row_bytes = min(TILE_BYTES, shape[-1] * dtype.itemsize)
        tiling = plgpu.TilingTransform((8, row_bytes // dtype.itemsize))
        transforms = (tiling, plgpu.SwizzleTransform(row_bytes))
        return plgpu.SMEM(shape, dtype=dtype, transforms=transforms)

    dtype, tile_k, halves = operands.x.dtype, operands.tile_k, operands.halves
    step_bytes = TILE_BYTES * (TILE_M + halves * tile_f)
    num_slots = min(MOST_SLOTS, SLOT_BYTES // step_bytes, operands.x.shape[1] // tile_k)
    weight_tile = (tile_f, tile_k) if operands.depth_last else (tile_k, tile_f)
    pl.run_scoped(
        run,
        memory(num_slots, TILE_M, tile_k, dtype=dtype),
        memory(num_slots, halves, *weight_tile, dtype=dtype),
        memory(MULTIPLIERS, 2, MULTIPLIER_ROWS, PIECE_BYTES // out.dtype.itemsize, dtype=out.dtype),
        plgpu.Barrier(num_arrivals=1 + halves, num_barriers=num_slots),
        plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=num_slots),
        collective_axes="warpgroup",
    )


def _for_each_tile(program: Program, body: Callable[[Array, Array, Array, int], None]):
    """Calls `body` with each tile's first step, row and column, and its number of steps.

    Steps are numbered across the program's tiles: slots are used in turn without a break, and the
    loader may be a tile ahead of the others.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    num_rows, num_columns = program.out.shape
    down, across = -(-num_rows // TILE_M), num_columns // program.tile_f
    num_steps = program.operands.x.shape[1] // program.operands.tile_k

    @plgpu.nd_loop((down * across,), collective_axes="program")
    def _(loop):
        i, j = plgpu.planar_snake(loop.index[0], (down, across), 0, min(SNAKE, down))
        body(loop.local_index * num_steps, i * TILE_M, j * program.tile_f, num_steps)


def _load(program: Program):
    """The loading warpgroup: fills slots as they become free. Rows that are not there are zeros."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    operands, num_slots = program.operands, program.x_slots.shape[0]

    def tile(first, row, column, num_steps):
        def load(k, _):
            slot = program.slot(first + k)
            pl.when(first + k >= num_slots)(lambda: plgpu.barrier_wait(program.free.at[slot]))
            copy = partial(plgpu.copy_gmem_to_smem, barrier=program.full.at[slot])
            depth = pl.ds(k * operands.tile_k, operands.tile_k)
            copy(operands.x.at[pl.ds(row, TILE_M), depth], program.x_slots.at[slot])
            for half in range(operands.halves):
                columns = pl.ds(half * operands.num_columns + column, program.tile_f)
                block = (columns, depth) if operands.depth_last else (depth, columns)
                copy(operands.weight.at[block], program.weight_slots.at[slot, half])

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
        def make(*sums):
            own = pl.ds(warpgroup * MULTIPLIER_ROWS, MULTIPLIER_ROWS)
            _accumulate(program, sums, own, first, num_steps)
            row_of_own = row + warpgroup * MULTIPLIER_ROWS
            _write(program, [acc[...] for acc in sums], row_of_own, column, warpgroup)

        acc = plgpu.ACC((MULTIPLIER_ROWS, program.tile_f), jnp.float32)
        pl.run_scoped(make, *[acc] * program.operands.halves)

    _for_each_tile(program, tile)
    plgpu.wait_smem_to_gmem(0)  # shared memory must outlive the copies that read it


def _accumulate(program: Program, sums: tuple[Any, ...], own: Any, first: Array, num_steps: int):
    """Adds up all steps of a tile. A step's matmuls run while the next ones are issued."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def multiply(step):
        slot = program.slot(step)
        plgpu.barrier_wait(program.full.at[slot])
        for half, acc in enumerate(sums):
            weight = program.weight_slots.at[slot, half]
            if program.operands.depth_last:
                weight = weight.transpose((1, 0))
            plgpu.wgmma(acc, program.x_slots.at[slot, own], weight)

    def release(step, in_flight):
        plgpu.wgmma_wait(in_flight)
        plgpu.barrier_arrive(program.free.at[program.slot(step)])

    def body(k, _):
        multiply(first + k)
        release(first + k - 1, in_flight=len(sums))  # those just issued

    multiply(first)
    lax.fori_loop(1, num_steps, body, None)
    release(first + num_steps - 1, in_flight=0)


def _write(program: Program, sums: list[Array], row: Array, column: Array, warpgroup: Array):
    """Scales and combines the matmuls and copies them to memory, through two buffers in turn."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    operands, width = program.operands, PIECE_BYTES // program.out.dtype.itemsize
    rows = pl.ds(row, MULTIPLIER_ROWS)

    def scaled(y: Array, half: int, first_column: Array) -> Array:
        if operands.scale is None:
            return y
        layout = plgpu.Layout.WGMMA
        columns = pl.ds(half * operands.num_columns + first_column, width)
        load = partial(plgpu.load, optimized=False)
        per_row = load(operands.x_scale.at[rows], layout=layout.reduce(1))
        per_column = load(operands.scale.at[columns], layout=layout.reduce(0))
        y = y * lax.broadcast_in_dim(per_row, y.shape, (0,))
        return y * lax.broadcast_in_dim(per_column, y.shape, (1,))

    for i in range(program.tile_f // width):
        piece, out_slot = slice(i * width, (i + 1) * width), program.out_slots.at[warpgroup, i % 2]
        first_column = column + i * width
        ys = [scaled(y[:, piece], half, first_column) for half, y in enumerate(sums)]
        y = ys[0] if len(ys) == 1 else ys[0] * lax.logistic(ys[0]) * ys[1]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # only the other buffer may be in use
        out_slot[...] = y.astype(program.out.dtype)
        plgpu.commit_smem()  # makes it visible to the copy
        plgpu.copy_smem_to_gmem(out_slot, program.out.at[rows, pl.ds(first_column, width)])
