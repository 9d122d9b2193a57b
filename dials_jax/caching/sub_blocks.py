"""What `DualCache` keeps inside a block: the keys and values of its other sub-blocks.

    block        | known . . | . . . . | . . . . |      . is masked
    whole block  |<------------------------------->|    the first call, and as long as the first
                                                        token of the sub-block is masked
    sub-block    |<--------->|                          otherwise: the rest of the block is read
                                                        as the last whole call left it
    whole block  |<------------------------------->|    the last call, which stores the block

Only in block-causal models. Which of both calls is due is decided for each sequence by itself. If
one needs its whole block the call computes the whole block of all, and writes of the others only
what they asked for: each gets the tokens that it gets alone.

Source: Wu et al. 2025, "Fast-dLLM v2: Efficient Block-Diffusion LLM" (arXiv 2509.26328);
`generation_functions.py` of NVlabs/Fast-dLLM, whose `use_block_cache` this follows. There a batch
computes whole blocks for all of its sequences if one asks for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from dials_jax.caching.cache import (
    Blocks,
    ForwardInputs,
    ForwardOutputs,
    ForwardVariant,
    Number,
    Revealed,
    Work,
    always,
)
from dials_jax.caching.canvas import CanvasModel
from dials_jax.models import transformer
from dials_jax.nn.kv import Slots, gather


class SubBlocks(NamedTuple):
    """The cache state, with what decides which call is due.

    Attributes:
      kv: of the canvas.
      masked: of the block.
      needs_whole: sequences whose next call computes the whole block.
      start: of the block.
      part: see `Blocks`.
    """

    kv: PyTree
    masked: Bool[Array, "B W"]
    needs_whole: Bool[Array, "B"]
    start: Int[Array, ""]
    part: Int[Array, ""]


def init_state(net: CanvasModel, blocks: Blocks, kv: PyTree) -> SubBlocks:
    masked = jnp.zeros((net.num_sequences, blocks.length), bool)
    zero = jnp.asarray(0, jnp.int32)
    return SubBlocks(kv, masked, masked[:, 0], zero, zero + blocks.part)


def over_kv(variant: ForwardVariant) -> ForwardVariant:
    """A variant that knows keys and values only."""

    def forward(inputs: ForwardInputs, state: SubBlocks) -> ForwardOutputs:
        out = variant.forward(inputs, state.kv)
        return out._replace(cache_state=state._replace(kv=out.cache_state))

    return variant._replace(forward=forward)


def after_reveal(state: SubBlocks, revealed: Revealed) -> SubBlocks:
    """Which sequences need their whole block next: those that finished it now, to store it, and
    those whose next masked token is the first of its sub-block."""
    places = revealed.index - state.start
    rows = jnp.arange(len(places))[:, None]
    kept = jnp.take_along_axis(state.masked, places, axis=1, mode="clip") & ~revealed.commit
    masked = state.masked.at[rows, places].set(kept, mode="drop")
    had, has = jnp.any(state.masked, axis=1), jnp.any(masked, axis=1)
    at_its_start = jnp.argmax(masked, axis=1) % state.part == 0
    needs_whole = revealed.unfinished & had & (~has | at_its_start)
    return state._replace(masked=masked, needs_whole=needs_whole)


def forward_variants(net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
    return [whole_block(net, blocks), sub_block(net, blocks)]


def whole_block(net: CanvasModel, blocks: Blocks) -> ForwardVariant:
    """Runs the block of all sequences; a sequence that needs a sub-block only writes that."""

    def due(block: Number, step_in_block: Number, state: SubBlocks) -> Any:
        return (step_in_block == 0) | jnp.any(state.needs_whole)

    def forward(inputs: ForwardInputs, state: SubBlocks) -> ForwardOutputs:
        start = blocks.start + inputs.block * blocks.length
        index = net.positions(start, blocks.length)
        masked = transformer.is_masked(net.cfg, gather(inputs.tokens, index))
        whole = (inputs.step_in_block == 0) | state.needs_whole
        in_part = jnp.arange(blocks.length) // blocks.part == current_part(masked, blocks)[:, None]
        active = (whole[:, None] | in_part) & inputs.unfinished[:, None]
        # Sub-blocks read what this call writes, so no layer may leave out what it writes first.
        fills = (inputs.step_in_block == 0) | ~jnp.any(masked, axis=1)
        out = net.run_range(
            inputs.tokens, start, blocks.length, inputs.step, state.kv, active, fills_cache=fills
        )
        state = state._replace(kv=out.cache_state, masked=masked, start=start)
        depth, predicted = net.depth(Slots(index, active)), index + net.logit_shift
        return ForwardOutputs(out.h, predicted, None, out.gates, state, depth=depth)

    return ForwardVariant(due, forward, Work((blocks.length,) * net.cfg.num_layers, blocks.length))


def sub_block(net: CanvasModel, blocks: Blocks) -> ForwardVariant:
    """Runs each sequence's first sub-block with masked tokens."""

    def forward(inputs: ForwardInputs, state: SubBlocks) -> ForwardOutputs:
        start = blocks.start + inputs.block * blocks.length
        masked = transformer.is_masked(
            net.cfg, gather(inputs.tokens, net.positions(start, blocks.length))
        )
        first = start + current_part(masked, blocks) * blocks.part
        index = first[:, None] + jnp.arange(blocks.part)
        active = jnp.broadcast_to(
            (inputs.unfinished & jnp.any(masked, axis=1))[:, None], index.shape
        )
        tokens, window = gather(inputs.tokens, index), net.window(index, active)
        out = net.run_layers(
            net.embed(tokens, window),
            window,
            net.is_masked(tokens, index),
            inputs.step,
            state.kv,
            fills_cache=jnp.asarray(False),
        )
        state = state._replace(kv=out.cache_state)
        depth, predicted = net.depth(window.slots), index + net.logit_shift
        return ForwardOutputs(out.h, predicted, None, out.gates, state, depth=depth)

    return ForwardVariant(always, forward, Work((blocks.part,) * net.cfg.num_layers, blocks.part))


def current_part(masked: Bool[Array, "B W"], blocks: Blocks) -> Int[Array, "B"]:
    """The number of each sequence's first sub-block with masked tokens; 0 without any."""
    return jnp.argmax(masked, axis=1) // blocks.part
