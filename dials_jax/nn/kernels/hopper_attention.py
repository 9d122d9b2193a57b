"""Attention to many keys by a kernel for Hopper: of a short window's queries, or of any number.

With few queries the time is that of reading keys and values, so the kernel mainly keeps reads in
flight. For 16 to 64 queries it takes 0.85 of the time of cuDNN's kernel, and 0.57 with padding
among the keys (docs/results/decoding.md).

A query's sums have one order: keys come in tiles of 64, counted from the first one. So in the
batch-invariant mode it computes the attention of any number of queries, a tile of them at a time.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dials_jax.nn.kernels.per_device import attention_per_device, divides
from dials_jax.nn.kv import KV
from dials_jax.nn.mask import Mask

HEAD_DIM = 128
TILE_QUERIES = 64  # queries of a tile: as many as a tensor-core instruction takes
TILE = 64  # keys of a tile
SLOTS = 2  # tiles of keys, and as many of values, in use or being loaded
PIECE_TOKENS = 8  # reads and writes are cut into pieces of this many tokens
SCALE = math.log2(math.e) / math.sqrt(HEAD_DIM)  # of scores; weights are powers of two
MASKED = -1e30  # finite: a sequence without a valid key gets a mean of some values and not NaN

# The weighted values so far, the maximum of the scores, and the sum of the weights.
State = tuple[Float[Array, "R H"], Float[Array, "R"], Float[Array, "R"]]


def window_fits(q: Float[Array, "B T N H"], kv: KV) -> bool:
    """Whether the kernel takes these shapes and types, on whatever device."""
    (_, num_queries, num_heads, head_dim), (_, num_keys, num_kv_heads, _) = q.shape, kv.k.shape
    return (
        all(x.dtype == jnp.bfloat16 for x in (q, *kv))
        and head_dim == HEAD_DIM
        and num_queries <= TILE_QUERIES
        and num_keys >= TILE
        and num_queries < num_keys
        and num_queries % PIECE_TOKENS == num_keys % PIECE_TOKENS == num_heads % num_kv_heads == 0
    )


def window_refusal(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> str | None:
    """Why the kernel cannot take these; None: it can."""
    if unknown := mask.refusal("valid"):
        return unknown
    if not (divides(q, kv) and window_fits(q, kv)):
        return (
            f"it needs bfloat16, heads of {HEAD_DIM}, at most {TILE_QUERIES} queries and more "
            f"keys, both in multiples of {PIECE_TOKENS}, and sequences and heads that the mesh "
            "divides"
        )
    return None


def run_window(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> Float[Array, "B T N H"]:
    return attention_per_device(window_attention, q, kv, mask.valid)


def tiles_refusal(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> str | None:
    """Why the kernel cannot take any number of queries to these keys; None: it can."""
    if unknown := mask.refusal("valid"):
        return unknown
    in_half = all(x.dtype == jnp.bfloat16 for x in (q, *kv))
    if not (divides(q, kv) and in_half and q.shape[-1] == HEAD_DIM):
        return (
            f"it needs bfloat16, heads of {HEAD_DIM}, and sequences and heads that the mesh divides"
        )
    return None


def run_tiles(q: Float[Array, "B T N H"], kv: KV, mask: Mask) -> Float[Array, "B T N H"]:
    """Attention whose sums have the same order with and without padding, in any batch."""
    sizes = q.shape[1], kv.k.shape[1]
    valid = jnp.ones(kv.k.shape[:2], bool) if mask.valid is None else mask.valid
    q, k, v, valid = (_whole_pieces(x) for x in (q, *kv, valid))
    return attention_per_device(window_attention, q, KV(k, v), valid)[:, : sizes[0]]


def _whole_pieces(x: Array) -> Array:
    """With zeros (False) after the last token."""
    extra = -x.shape[1] % PIECE_TOKENS
    return jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2))) if extra else x


@partial(jax.jit, static_argnames="interpret")  # lowered once for all layers, not once per layer
def window_attention(
    q: Float[Array, "B T N H"], kv: KV, valid: Bool[Array, "B S"] | None, interpret: bool = False
) -> Float[Array, "B T N H"]:
    """Attention to all valid keys; None means that all are. Of any number of queries, if they and
    the keys come in multiples of 8; for the rest see `window_fits`.

    Args:
      interpret: run the kernel step by step, where there is no Hopper.

    It takes the sequences and heads of one device and has no gradient. A sequence without a valid
    key gets a mean of some values.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (num_sequences, num_queries, num_heads, _), (_, num_keys, num_kv_heads, _) = q.shape, kv.k.shape
    pack, num_parts = _packing(num_queries, num_heads // num_kv_heads)
    query_tiles = -(-num_queries // TILE_QUERIES)
    transforms = plgpu.TilingTransform((PIECE_TOKENS, 64)), plgpu.SwizzleTransform(128)
    queries = plgpu.SMEM((TILE_QUERIES, HEAD_DIM), q.dtype, transforms=transforms)
    slots = plgpu.SMEM((SLOTS, TILE, HEAD_DIM), q.dtype, transforms=transforms)
    full = plgpu.Barrier(num_barriers=SLOTS)

    def window_attention_kernel(*refs):  # the name in profiles
        _kernel(*refs, interpret=interpret)

    kernel = plgpu.kernel(
        window_attention_kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[queries, plgpu.Barrier(num_arrivals=pack), slots, full, slots, full],
        # A block is 128 threads, which issue their own reads. So two blocks share a multiprocessor,
        # and one computes while the other waits. With 128 more threads for the reads they would not
        # fit: each thread may take 255 of the 65,536 registers.
        # The last varies fastest: neighbours read adjacent memory, or the same keys.
        grid=(num_sequences, num_kv_heads * num_parts, *[query_tiles] * (query_tiles > 1)),
        grid_names=("sequence", "heads", *["queries"] * (query_tiles > 1)),
        # No sum crosses warps, so no shared memory is set aside for that.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    if valid is None and num_keys % TILE:
        valid = jnp.ones((num_sequences, num_keys), bool)
    return kernel(q, *kv, *([] if valid is None else [_bias(valid)]))


def _bias(valid: Bool[Array, "B S"]) -> Float[Array, "B _"]:
    """The bias that is added to scores. It also masks the rest of the last tile of keys."""
    bias = jnp.where(valid, jnp.float32(0), jnp.float32(MASKED))
    return jnp.pad(bias, ((0, 0), (0, -valid.shape[1] % TILE)), constant_values=MASKED)


def _packing(num_queries: int, group: int) -> tuple[int, int]:
    """Of a group of heads, how many share a tile of queries, and how many tiles that makes.

    The heads of a group share their keys, so sharing a tile avoids reading them again.
    """
    pack = max(1, min(group, TILE_QUERIES // num_queries))
    return pack, -(-group // pack)


class _Stream(NamedTuple):
    """References to the keys or values of one head. Tile i goes to slot i % SLOTS."""

    source: Any  # [S, H]
    slots: Any  # [SLOTS, TILE, H], in shared memory
    full: Any  # barriers, [SLOTS]: the tile has arrived

    @property
    def num_tiles(self) -> int:
        return -(-self.source.shape[0] // TILE)

    def fetch(self, tile: int | Int[Array, ""]) -> None:
        """Starts to read a tile, if there is one. Beyond the last key it holds zeros."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        @pl.when(tile < self.num_tiles)
        def _():
            slot = lax.rem(jnp.int32(tile), jnp.int32(SLOTS))
            source = self.source.at[pl.ds(jnp.int32(tile) * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, self.slots.at[slot], self.full.at[slot])

    def wait(self, tile: Int[Array, ""]) -> Any:
        """The slot of a tile, once the tile has arrived."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        slot = lax.rem(tile, jnp.int32(SLOTS))
        plgpu.barrier_wait(self.full.at[slot])
        return self.slots.at[slot]


def _kernel(q, k, v, *rest, interpret: bool) -> None:
    """The work of one block: the heads of a sequence that share a tile of queries."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *bias, out, queries, queries_full, k_slots, k_full, v_slots, v_full = rest
    sequence, kv_head, heads = _place_of_block(q, k)
    bias = bias[0].at[sequence] if bias else None
    keys = _Stream(k.at[sequence, :, kv_head], k_slots, k_full)
    values = _Stream(v.at[sequence, :, kv_head], v_slots, v_full)
    first, count = _queries_of_block(q)
    pieces = [queries.at[i * count : (i + 1) * count] for i in range(len(heads))]

    keys.fetch(0)  # needed first, together with the queries
    for head, piece in zip(heads, pieces, strict=True):
        plgpu.copy_gmem_to_smem(q.at[sequence, pl.ds(first, count), head], piece, queries_full)
    values.fetch(0)
    for tile in range(1, SLOTS):
        keys.fetch(tile)
        values.fetch(tile)
    plgpu.barrier_wait(queries_full)

    step = partial(_step, queries, keys, values, bias, interpret)
    acc, _, total = lax.fori_loop(0, keys.num_tiles, step, _start())
    queries[...] = (acc * _across(1 / total, acc)).astype(queries.dtype)  # the tile is free by now
    plgpu.commit_smem()
    for head, piece in zip(heads, pieces, strict=True):
        plgpu.copy_smem_to_gmem(piece, out.at[sequence, pl.ds(first, count), head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _place_of_block(q, k) -> tuple[Int[Array, ""], Int[Array, ""], list[Int[Array, ""]]]:
    """The block's sequence, its head of keys, and its heads of queries."""
    group = q.shape[2] // k.shape[2]
    pack, num_parts = _packing(q.shape[1], group)
    block = lax.axis_index("heads")
    kv_head, part = lax.div(block, jnp.int32(num_parts)), lax.rem(block, jnp.int32(num_parts))
    # A group's last tile starts early, to be full: two blocks may write the same values of a head.
    head = kv_head * group + jnp.minimum(part * pack, group - pack)
    return lax.axis_index("sequence"), kv_head, [head + i for i in range(pack)]


def _queries_of_block(q) -> tuple[int | Int[Array, ""], int]:
    """The first query of a head in the block, and how many there are. Of more than a tile, the last
    tile may reach beyond the last query: reads there give zeros, and nothing is written."""
    if q.shape[1] <= TILE_QUERIES:
        return 0, q.shape[1]
    return lax.axis_index("queries") * TILE_QUERIES, TILE_QUERIES


def _start() -> State:
    from jax.experimental.pallas.mosaic_gpu import Layout, layout_cast

    acc = layout_cast(jnp.zeros((TILE_QUERIES, HEAD_DIM), jnp.float32), Layout.WGMMA)
    top = layout_cast(jnp.full((TILE_QUERIES,), -jnp.inf, jnp.float32), Layout.WGMMA.reduce(1))
    total = layout_cast(jnp.zeros((TILE_QUERIES,), jnp.float32), Layout.WGMMA.reduce(1))
    return acc, top, total


def _step(
    queries, keys, values, bias, interpret: bool, tile: Int[Array, ""], state: State
) -> State:
    """One more tile of keys, by the online softmax."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    acc, top, total = state
    if bias is not None:  # into registers, while the keys are loaded
        layout = plgpu.Layout.WGMMA.reduce(0)
        bias = plgpu.load(bias.at[pl.ds(tile * TILE, TILE)], layout=layout, optimized=False)
    scores = _matmul(queries, keys.wait(tile).transpose((1, 0)))
    keys.fetch(tile + SLOTS)  # as soon as the slot is free, so that memory never idles
    weights, fading, top, total = _softmax(scores, bias, top, total)
    slot = values.wait(tile)
    if interpret:  # there a matmul takes no operand from registers
        new = jnp.dot(weights, slot[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # else the next read looks like a race
    else:
        new = _matmul(weights, slot)
    values.fetch(tile + SLOTS)
    # Not into `acc`, because the matmul would then wait until that is rescaled. To rescale and to
    # add is one instruction, so the sum is free.
    return acc * _across(fading, acc) + new, top, total


def _matmul(a, b) -> Float[Array, "R C"]:
    """A matmul on the tensor cores, with its own accumulator."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _softmax(
    scores: Float[Array, "R S"], bias: Float[Array, "S"] | None, top: Array, total: Array
) -> tuple[Float[Array, "R S"], Float[Array, "R"], Float[Array, "R"], Float[Array, "R"]]:
    """The weights of a tile's keys, the factor for earlier ones, and the new maximum and sum."""
    if bias is None:
        new_top = jnp.maximum(top, scores.max(axis=1) * SCALE)
        weights = jnp.exp2(scores * SCALE - _across(new_top, scores))
    else:
        scores = scores * SCALE + lax.broadcast_in_dim(bias, scores.shape, [1])
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2(scores - _across(new_top, scores))
    fading = jnp.exp2(top - new_top)
    total = total * fading + weights.sum(axis=1)
    # Keeps the compiler from moving all this behind the wait for the values.
    total, new_top, half = lax.optimization_barrier((total, new_top, weights.astype(jnp.bfloat16)))
    return half, fading, new_top, total


def _across(x: Float[Array, "R"], like: Float[Array, "R C"]) -> Float[Array, "R C"]:
    return lax.broadcast_in_dim(x, like.shape, [0])
