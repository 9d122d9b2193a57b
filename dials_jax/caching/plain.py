"""The caches that keep ranges of keys and values: none, prefix and dual (Fast-dLLM).

In a block-causal model a finished block never changes, so what is kept of it is exact: the first
call of a generation stores the prompt, and the last one of each block stores the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from dials_jax.caching import sub_blocks
from dials_jax.caching.cache import (
    Blocks,
    Due,
    ForwardInputs,
    ForwardOutputs,
    ForwardVariant,
    Number,
    Revealed,
    Work,
    always,
    at_block_start,
    block_positions,
    is_rounded_up,
    unfinished_sequences,
    window_sizes,
)
from dials_jax.caching.canvas import CanvasModel
from dials_jax.config import Typed
from dials_jax.models import transformer
from dials_jax.nn.kv import Slots, gather


class KeysAndValues(Typed):
    """A cache whose state is the keys and values of the whole canvas, written by the layers."""

    drops_tokens = False

    def init_state(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        return net.init_cache()

    def after_reveal(self, cache_state: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        return cache_state


@dataclass(frozen=True)
class NoCache(KeysAndValues):
    """Every step runs the whole canvas, or what there is of it; nothing is cached."""

    def init_state(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        return None

    def forward_variants(self, net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
        prompt = prompt_first(net, blocks) if net.logit_shift else []
        variants = [*prompt, *canvas_so_far(net, blocks, always)]
        # Keys are those of the window, which has one length in all layers.
        return [v._replace(work=v.work._replace(keys=v.work.tokens[0])) for v in variants]


@dataclass(frozen=True)
class DualCache(KeysAndValues):
    """Caches keys and values outside the block until the next block (Fast-dLLM).

    The first step of a block runs the whole canvas; the others run the block alone. In a
    block-causal model all run the block, or one of its sub-blocks (Fast-dLLM v2; see `sub_blocks`).
    """

    def init_state(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        kv = super().init_state(net, blocks)
        return kv if blocks.part is None else sub_blocks.init_state(net, blocks, kv)

    def after_reveal(self, cache_state: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        if isinstance(cache_state, sub_blocks.SubBlocks):
            return sub_blocks.after_reveal(cache_state, revealed)
        return cache_state

    def forward_variants(self, net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
        if blocks.part is not None:
            prompt = map(sub_blocks.over_kv, prompt_first(net, blocks))
            return [*prompt, *sub_blocks.forward_variants(net, blocks)]
        if blocks.causal:
            return PrefixCache().forward_variants(net, blocks)
        return [*canvas_so_far(net, blocks, at_block_start), block_only(net, blocks)]


@dataclass(frozen=True)
class PrefixCache(KeysAndValues):
    """Caches keys and values before the block until the next block (Fast-dLLM).

    The first step of a block runs the whole canvas; the others run the block and all after it.
    Where blocks are appended there is nothing after it. In a block-causal model every step runs
    the block alone, and what is cached of the blocks before it is exact (SDAR, Fast-dLLM v2).
    """

    def forward_variants(self, net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
        if blocks.causal:
            return [*prompt_first(net, blocks), block_only(net, blocks)]
        if blocks.appended:
            return DualCache().forward_variants(net, blocks)
        suffixes = [suffix(net, blocks, n) for n in window_sizes(blocks.count)]
        return [*canvas_so_far(net, blocks, at_block_start), *suffixes]


def prompt_first(net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
    """Runs the whole blocks of prompts, in the call before the first step of a block-causal model.

    A shifted model predicts the first token of the answer there.
    """
    if not blocks.causal or blocks.start == 0:
        return []

    def due(block: Number, step_in_block: Number, cache_state: PyTree) -> Any:
        return step_in_block < 0

    def forward(inputs: ForwardInputs, cache_state: PyTree) -> ForwardOutputs:
        last = net.positions(blocks.start - 1, 1)
        out = net.run_range(
            inputs.tokens,
            0,
            blocks.start,
            inputs.step,
            cache_state,
            output_positions=last,
            fills_cache=jnp.asarray(True),
        )
        depth, predicted = net.depth_of_range(0, blocks.start), last + net.logit_shift
        return ForwardOutputs(out.h, predicted, None, out.gates, out.cache_state, depth=depth)

    work = Work((blocks.start,) * net.cfg.num_layers, 1, net.prompt_length)
    return [ForwardVariant(due, forward, work)]


def canvas_so_far(net: CanvasModel, blocks: Blocks, due: Due) -> list[ForwardVariant]:
    """Runs everything there is: one variant, or one for each size where blocks are appended."""
    sizes = window_sizes(blocks.count) if blocks.appended else [blocks.count]
    return [first_blocks(net, blocks, n, due) for n in sizes]


def first_blocks(net: CanvasModel, blocks: Blocks, num_blocks: int, due: Due) -> ForwardVariant:
    """Runs the canvas up to the end of so many blocks, and writes the cache where there is one."""
    size = net.length - (blocks.count - num_blocks) * blocks.length

    def due_and_enough(block: Number, step_in_block: Number, cache_state: PyTree) -> Any:
        enough = True if num_blocks == blocks.count else block < num_blocks
        return enough & due(block, step_in_block, cache_state)

    def forward(inputs: ForwardInputs, cache_state: PyTree) -> ForwardOutputs:
        in_window, index = block_positions(net, blocks, inputs, 0)
        exact = cache_state is None and not is_rounded_up(blocks.count)
        end = None if exact else blocks.existing(inputs.block)
        out = net.run_range(
            inputs.tokens,
            0,
            size,
            inputs.step,
            cache_state,
            output_positions=in_window,
            end=end,
            fills_cache=inputs.step_in_block == 0 if blocks.appended else None,
        )
        depth = net.depth_of_range(0, size, end)
        return ForwardOutputs(out.h, index, None, out.gates, out.cache_state, out.observed, depth)

    work = Work((size,) * net.cfg.num_layers, blocks.length, net.prompt_length)
    return ForwardVariant(due_and_enough, forward, work)


def block_only(net: CanvasModel, blocks: Blocks) -> ForwardVariant:
    """Runs the positions that predict the block."""

    def forward(inputs: ForwardInputs, cache_state: PyTree) -> ForwardOutputs:
        lead = blocks.lead(net.logit_shift)
        start = blocks.start + inputs.block * blocks.length - lead
        window = net.positions(start, blocks.length)
        active = written_positions(net, blocks, inputs, window)
        out = net.run_range(
            inputs.tokens,
            start,
            blocks.length,
            inputs.step,
            cache_state,
            active,
            end=blocks.existing(inputs.block),
            fills_cache=is_full(net, inputs, window) if blocks.causal else None,
        )
        index = net.positions(start + net.logit_shift, blocks.length)[: inputs.tokens.shape[0]]
        depth = net.depth(Slots(window, active))
        return ForwardOutputs(out.h, index, None, out.gates, out.cache_state, depth=depth)

    return ForwardVariant(
        always, forward, Work((blocks.length,) * net.cfg.num_layers, blocks.length)
    )


def suffix(net: CanvasModel, blocks: Blocks, num_blocks: int) -> ForwardVariant:
    """Runs the last `num_blocks` blocks, and writes the present one and those after it."""
    size = num_blocks * blocks.length + net.logit_shift

    def due(block: Number, step_in_block: Number, cache_state: PyTree) -> Any:
        return blocks.count - block <= num_blocks

    def forward(inputs: ForwardInputs, cache_state: PyTree) -> ForwardOutputs:
        start = blocks.start + inputs.block * blocks.length - net.logit_shift
        first = blocks.end - size
        index = net.positions(first, size)
        active = written_positions(net, blocks, inputs, index)
        if is_rounded_up(blocks.count):
            active = index >= start if active is None else active & (index >= start)
        in_window, predicted = block_positions(net, blocks, inputs, first)
        out = net.run_range(
            inputs.tokens, first, size, inputs.step, cache_state, active, output_positions=in_window
        )
        depth = net.depth(Slots(index, active))
        return ForwardOutputs(out.h, predicted, None, out.gates, out.cache_state, depth=depth)

    return ForwardVariant(due, forward, Work((size,) * net.cfg.num_layers, blocks.length))


def is_full(net: CanvasModel, inputs: ForwardInputs, block: Int[Array, "R W"]) -> Bool[Array, "R"]:
    """Sequences of whose block no token is masked: the call stores its keys and values."""
    return ~jnp.any(transformer.is_masked(net.cfg, gather(inputs.tokens, block)), axis=1)


def written_positions(
    net: CanvasModel, blocks: Blocks, inputs: ForwardInputs, index: Int[Array, "R W"]
) -> Bool[Array, "R W"] | None:
    """Which positions of a window are written; None: all.

    With fixed quotas all sequences finish together. Without a policy the next block's first call
    writes everything again; but a layer that is skipped there would keep what a waiting sequence
    wrote.
    """
    if net.policy is None or blocks.max_quota is not None:
        return None
    return jnp.broadcast_to(unfinished_sequences(net, inputs), index.shape)
