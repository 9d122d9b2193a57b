"""Matmuls with what follows them in one kernel, for Hopper GPUs.

    bfloat16, gate and up side by side    silu(x W_gate) * (x W_up)
    e4m3                                  (X W) * x_scale * w_scale, and the same of gate and up

XLA writes a matmul's result to memory, that of e4m3 in float32, and reads it again to scale or
combine it. Here it stays in registers: see docs/results/decoding.md and eight_bits.md.

Every multiprocessor (SM) runs one program (CTA), which makes tile after tile of the result. Two of
its warpgroups multiply, each half of a tile's rows. A third loads their operands in advance, also
for the next tile, so that the end of one tile overlaps the loads of the next.

A row's sum has one order, whatever the number of rows. Tensor cores keep some 14 bits of a sum of
e4m3 products, where cuBLAS adds up parts of it in float32. That changes results by 0.1 to 0.3 % of
their size (root mean square, 4,096 and 12,288 terms), 1 / 20 of what the rounding to e4m3 does.
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

from dials_jax.nn.eight_bits import NUMBERS, Quantised, is_quantised
from dials_jax.nn.kernels.hopper_quantise import depth_fits, quantise_rows
from dials_jax.nn.kernels.per_device import sequences_per_device, splits

TILE_M = 128  # rows of a tile
TILE_BYTES = 128  # depth of a step: 64 numbers of bfloat16, 128 of e4m3
SLOT_BYTES = 196608  # of the steps that are loaded at a time, of an SM's 227 KiB
MOST_SLOTS = 6
MULTIPLIERS = 2  # warpgroups; the one after them loads
MULTIPLIER_ROWS = TILE_M // MULTIPLIERS  # of a tile, for each of them
SNAKE = 16  # tiles down, then one across: those made at a time share operands in the L2 cache
# Per thread. Two float32 accumulators take 128; 40 + 2 * 232 is within the 512 for all three.
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232
HOPPER_SMS = 132
WIDE = 4  # rounds of wide tiles, and more, of which the last may be partial
FULLNESS = 0.88  # of the rounds of tiles; at 0.87 (768 tokens of LLaDA-8B) SwiGLU is not faster


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

    @property
    def piece_columns(self) -> int:
        """Columns written at a time."""
        return self.out_slots.shape[-1]


# ------------------------------------------------------------------------ bfloat16, gate and up

SWIGLU_TILE_F = 128


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
    num_rows, num_sms = math.prod(x.shape[:-1]), _num_sms()
    num_tiles = num_rows // TILE_M * (gate_up.shape[1] // 2 // SWIGLU_TILE_F)
    rounds = -(-num_tiles // num_sms)
    return rounds == 1 or num_tiles >= FULLNESS * rounds * num_sms


def swiglu_refusal(
    x: Float[Array, "B T D"],
    kernels: tuple[Quantised | Array, ...],
    biases: tuple[Array | None, ...],
) -> str | None:
    """Why the kernel cannot take these, or does not pay; None: it does."""
    if len(kernels) != 1 or biases[0] is not None:
        return "it needs the fused kernels of gate and up, and no biases"
    if is_quantised(kernels[0]):
        return matmul_refusal(x, kernels[0], halves=2)
    num_devices, _ = splits()
    if x.shape[0] % num_devices:
        return f"the mesh does not divide {x.shape[0]} sequences"
    own, kernel = x[: x.shape[0] // num_devices], kernels[0]
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
    return _matmul(operands, SWIGLU_TILE_F).reshape(*x.shape[:-1], -1)


swiglu.defvjp(
    lambda x, gate_up: (swiglu(x, gate_up), (x, gate_up)),
    lambda inputs, g: jax.vjp(plain, *inputs)[1](g),
)


# ----------------------------------------------------------------------------------------- e4m3


def matmul_refusal(
    x: Float[Array, "B ..."], weight: Quantised | Array, halves: int = 1
) -> str | None:
    """Why the kernel cannot multiply x, quantised as it arrives, by this weight; None: it does."""
    if not is_quantised(weight) or weight.values.dtype != NUMBERS["fp8"]:
        return "it multiplies weights in e4m3"
    sequences, others = splits()
    if others > 1:
        return "the mesh splits the weight"
    if x.shape[0] % sequences:
        return f"the mesh does not divide {x.shape[0]} sequences"
    columns = math.prod(weight.scales.shape) // halves
    depth = math.prod(weight.values.shape[weight.scales.ndim :])
    if x.dtype != jnp.bfloat16 or not x.size or columns % 64 or not depth_fits(depth):
        return f"it needs inputs in bfloat16, columns in multiples of 64, depth of {TILE_BYTES}"
    return None


def run_matmul(x: Float[Array, "B ..."], weight: Quantised) -> Float[Array, "B ..."]:
    return sequences_per_device(matmul_e4m3, x, weight)


def matmul_e4m3(x: Float[Array, "..."], weight: Quantised, halves: int = 1) -> Float[Array, "..."]:
    """x, quantised per token, times the weight, in float32 and rounded once to bfloat16.

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
    y = _matmul(operands, tile_columns(operands))
    columns = weight.scales.shape if halves == 1 else (-1,)
    return y[:num_rows].reshape(*leading, *columns)


def tile_columns(operands: Operands) -> int:
    """Narrow where whole tiles would leave half of the SMs without work, wide for many rows."""
    columns, num_sms = operands.num_columns, _num_sms()
    down = -(-operands.x.shape[0] // TILE_M)
    if operands.halves == 1 and columns % 256 == 0 and down * (columns // 256) > WIDE * num_sms:
        return 256
    whole = columns % 128 == 0 and 2 * down * (columns // 128) > num_sms
    return 128 if whole else 64


# ------------------------------------------------------------------------------------ the kernel


@partial(jax.jit, static_argnames=("halves", "tile_f"))  # lowered once for all layers
def _lowered(x, weight, x_scale, scale, *, halves: int, tile_f: int) -> Float[Array, "R F"]:
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
        out_type=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        # Never more programs than tiles: one without a tile would wait for loads that never come.
        grid=(min(_num_sms(), num_tiles),),
        grid_names=("program",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(*arrays)


def _matmul(operands: Operands, tile_f: int) -> Float[Array, "R F"]:
    x, weight, x_scale, scale, halves = operands
    if x_scale is not None:  # the last tile reads as many scales as the others
        x_scale = jnp.pad(x_scale, (0, -x_scale.shape[0] % TILE_M))
    return _lowered(x, weight, x_scale, scale, halves=halves, tile_f=tile_f)


def _num_sms() -> int:
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
        memory(MULTIPLIERS, 2, MULTIPLIER_ROWS, 64, dtype=out.dtype),
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

    operands, width = program.operands, program.piece_columns
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
