"""What a cache is to a sampler, and the three plain ones: none, prefix and dual.

A denoising step is one model call, a *pass*. A cache says which kind of pass is due and what each
kind runs. All kinds are compiled into one program, which returns to the host at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax.caching.canvas import CanvasModel

# Windows whose length depends on the block are rounded up to one of so many sizes, all compiled.
MAX_SIZES = 8


Number = Int[Array, "..."] | Int[np.ndarray, "..."]


class Blocks(NamedTuple):
    """How a canvas is filled: `count` blocks of `length` tokens, from left to right.

    Attributes:
      start: where the first block begins.
      max_quota: tokens a step may reveal in a row at most; None: any number.
    """

    start: int
    length: int
    count: int
    max_quota: int | None

    @property
    def end(self) -> int:
        return self.start + self.length * self.count


class ForwardInputs(NamedTuple):
    """Where the loop stands before a model call."""

    tokens: Int[Array, "B T"]
    step: Int[Array, ""]  # names the call: the same in any batch
    block: Int[Array, ""]
    step_in_block: Int[Array, ""]
    unfinished: Bool[Array, "B"]  # rows with masked tokens in the block


class ForwardOutputs(NamedTuple):
    """What a model call yields: `h[:, i]` predicts the token at `index[:, i]`."""

    h: Float[Array, "R W D"]
    index: Int[Array, "B W"]
    active: Bool[Array, "B W"] | None  # False: too stale to be revealed; None: all fresh
    gates: Bool[Array, "L R"]
    cache_state: PyTree


class Revealed(NamedTuple):
    """What the sampler made of a model call."""

    index: Int[Array, "B W"]
    active: Bool[Array, "B W"] | None
    confidence: Float[Array, "B W"]  # of the token proposed; 0 where none could be revealed
    commit: Bool[Array, "B W"]  # revealed now
    unfinished: Bool[Array, "B"]


class Work(NamedTuple):
    """What a pass computes in each row, for counting FLOPs.

    Counted in full: that the last layer's queries are only those of the block is left out.
    """

    tokens: tuple[int, ...]  # tokens a layer
    head: int  # tokens whose logits are computed
    prompt: int = 0  # tokens at the window's front that no router looks at


class ForwardVariant(NamedTuple):
    forward: Callable[[ForwardInputs, PyTree], ForwardOutputs]
    work: Work


@runtime_checkable
class Cache(Protocol):
    """A strategy of what to run at a step. Settings only: hashable, static in compiled programs.

    Attributes:
      drops_tokens: a call may leave out masked tokens of the block.
    """

    drops_tokens: bool

    def init_state(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        """The cache state before the first call."""

    def forward_variants(self, net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
        """Every kind of model call."""

    def variant_due(
        self,
        block: Number,
        step_in_block: Number,
        cache_state: PyTree,
        net: CanvasModel,
        blocks: Blocks,
    ) -> Number:
        """Which of them is due. Elementwise, and without the cache state where steps are fixed."""

    def after_reveal(self, cache_state: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        """The cache state after the sampler has revealed tokens."""


def whole_canvas(net: CanvasModel, blocks: Blocks) -> ForwardVariant:
    """Runs everything and writes all of the cache state, where there is one."""

    def forward(inputs: ForwardInputs, cache_state: PyTree) -> ForwardOutputs:
        rows, index = block_positions(net, blocks, inputs, 0)
        out = net.run_range(
            inputs.tokens, 0, net.length, inputs.step, cache_state, output_positions=rows
        )
        return ForwardOutputs(out.h, index, None, out.gates, out.cache_state)

    work = Work((net.length,) * net.cfg.num_layers, blocks.length, net.prompt_length)
    return ForwardVariant(forward, work)


def block_positions(
    net: CanvasModel, blocks: Blocks, inputs: ForwardInputs, first: Int[Array, ""] | int
) -> tuple[Int[Array, "R W"], Int[Array, "B W"]]:
    """The places that predict the block, in a window that begins at `first`; what they predict."""
    index = net.positions(blocks.start + inputs.block * blocks.length, blocks.length)
    rows = jnp.maximum(
        index - net.logit_shift - first, 0
    )  # nothing predicts the canvas's first token
    return rows, index[: inputs.tokens.shape[0]]


def unfinished_sequences(net: CanvasModel, inputs: ForwardInputs) -> Bool[Array, "R 1"]:
    """Rows that have not finished the block.

    The others must not write while they wait, wherever that could be read later: what a row keeps
    would depend on its batch.
    """
    copies = net.num_sequences // inputs.unfinished.shape[0]  # 2 under guidance
    return jnp.tile(inputs.unfinished, copies)[:, None]


def writing(
    net: CanvasModel, blocks: Blocks, inputs: ForwardInputs, index: Int[Array, "R W"]
) -> Bool[Array, "R W"] | None:
    """The slots that a window of a prefix or dual cache writes; None: all.

    With fixed quotas all rows finish together. Without a policy the next block's first call writes
    everything anew; a layer that is skipped there would keep what a waiting row wrote.
    """
    if net.policy is None or blocks.max_quota is not None:
        return None
    return jnp.broadcast_to(unfinished_sequences(net, inputs), index.shape)


@dataclass(frozen=True)
class NoCache:
    """Every call runs the whole canvas."""

    drops_tokens = False

    def init_state(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        return None

    def forward_variants(self, net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
        return [whole_canvas(net, blocks)]

    def variant_due(
        self,
        block: Number,
        step_in_block: Number,
        cache_state: PyTree,
        net: CanvasModel,
        blocks: Blocks,
    ) -> Number:
        return jnp.zeros_like(step_in_block)

    def after_reveal(self, cache_state: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        return cache_state


@dataclass(frozen=True)
class DualCache:
    """Keys and values of everything outside the block are kept until the next block (Fast-dLLM).

    The first call of a block runs the whole canvas; the others run the block alone.
    """

    drops_tokens = False

    def init_state(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        return net.init_cache()

    def forward_variants(self, net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
        return [whole_canvas(net, blocks), block_only(net, blocks)]

    def variant_due(
        self,
        block: Number,
        step_in_block: Number,
        cache_state: PyTree,
        net: CanvasModel,
        blocks: Blocks,
    ) -> Number:
        return jnp.where(step_in_block > 0, 1, 0)

    def after_reveal(self, cache_state: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        return cache_state


def block_only(net: CanvasModel, blocks: Blocks) -> ForwardVariant:
    """Runs the tokens that predict the block."""

    def forward(inputs: ForwardInputs, cache_state: PyTree) -> ForwardOutputs:
        start = blocks.start + inputs.block * blocks.length - net.logit_shift
        active = writing(net, blocks, inputs, net.positions(start, blocks.length))
        out = net.run_range(inputs.tokens, start, blocks.length, inputs.step, cache_state, active)
        index = net.positions(start + net.logit_shift, blocks.length)[: inputs.tokens.shape[0]]
        return ForwardOutputs(out.h, index, None, out.gates, out.cache_state)

    return ForwardVariant(forward, Work((blocks.length,) * net.cfg.num_layers, blocks.length))


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of everything before the block are kept until the next (Fast-dLLM).

    The first call of a block runs the whole canvas; the others run the block and all after it.
    """

    drops_tokens = False

    def init_state(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        return net.init_cache()

    def forward_variants(self, net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
        sizes = window_sizes(blocks.count)
        return [whole_canvas(net, blocks), *(self._suffix(net, blocks, n) for n in sizes)]

    def _suffix(self, net: CanvasModel, blocks: Blocks, num_blocks: int) -> ForwardVariant:
        """Runs the last `num_blocks` blocks, and writes the one in work and those after it."""
        size = num_blocks * blocks.length + net.logit_shift

        def forward(inputs: ForwardInputs, cache_state: PyTree) -> ForwardOutputs:
            start = blocks.start + inputs.block * blocks.length - net.logit_shift
            first = blocks.end - size
            index = net.positions(first, size)
            active = writing(net, blocks, inputs, index)
            if blocks.count > MAX_SIZES:
                active = index >= start if active is None else active & (index >= start)
            rows, predicted = block_positions(net, blocks, inputs, first)
            out = net.run_range(
                inputs.tokens, first, size, inputs.step, cache_state, active, output_positions=rows
            )
            return ForwardOutputs(out.h, predicted, None, out.gates, out.cache_state)

        return ForwardVariant(forward, Work((size,) * net.cfg.num_layers, blocks.length))

    def variant_due(
        self,
        block: Number,
        step_in_block: Number,
        cache_state: PyTree,
        net: CanvasModel,
        blocks: Blocks,
    ) -> Number:
        return jnp.where(
            step_in_block == 0,
            0,
            1 + which_size(blocks.count - block, blocks.count),
        )

    def after_reveal(self, cache_state: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        return cache_state


def window_sizes(num_blocks: int) -> list[int]:
    """The sizes, in blocks, that windows of 1 to `num_blocks` blocks are rounded up to."""
    unit = -(-num_blocks // MAX_SIZES)
    return [*range(unit, num_blocks, unit), num_blocks]


def which_size(wanted: Number, num_blocks: int) -> Number:
    """The number of the smallest size that holds `wanted` blocks."""
    return jnp.searchsorted(jnp.asarray(window_sizes(num_blocks)), wanted)
