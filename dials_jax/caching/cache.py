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


class Progress(NamedTuple):
    """Where the loop stands before a model call."""

    tokens: Int[Array, "B T"]
    step: Int[Array, ""]  # names the call: the same in any batch
    block: Int[Array, ""]
    step_in_block: Int[Array, ""]
    unfinished: Bool[Array, "B"]  # rows with masked tokens in the block


class Call(NamedTuple):
    """What a model call yields: `h[:, i]` predicts the token at `index[:, i]`."""

    h: Float[Array, "R W D"]
    index: Int[Array, "B W"]
    active: Bool[Array, "B W"] | None  # False: too stale to be revealed; None: all fresh
    gates: Bool[Array, "L R"]
    memory: PyTree


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


class Pass(NamedTuple):
    call: Callable[[Progress, PyTree], Call]
    work: Work


@runtime_checkable
class Cache(Protocol):
    """A strategy of what to run at a step. Settings only: hashable, static in compiled programs.

    Attributes:
      partial: a call may leave out masked tokens of the block.
    """

    partial: bool

    def start(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        """The memory before the first call."""

    def passes(self, net: CanvasModel, blocks: Blocks) -> list[Pass]:
        """Every kind of model call."""

    def kind(
        self, block: Number, step_in_block: Number, memory: PyTree, net: CanvasModel, blocks: Blocks
    ) -> Number:
        """Which of them is due. Elementwise, and without the memory where steps are fixed."""

    def learn(self, memory: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        """The memory after the sampler has revealed tokens."""


def whole_canvas(net: CanvasModel, blocks: Blocks) -> Pass:
    """Runs everything and writes all of the memory, where there is one."""

    def call(progress: Progress, memory: PyTree) -> Call:
        rows, index = block_rows(net, blocks, progress, 0)
        out = net.run_range(
            progress.tokens, 0, net.length, progress.step, memory, output_positions=rows
        )
        return Call(out.h, index, None, out.gates, out.cache_state)

    work = Work((net.length,) * net.cfg.num_layers, blocks.length, net.prompt_length)
    return Pass(call, work)


def block_rows(
    net: CanvasModel, blocks: Blocks, progress: Progress, first: Int[Array, ""] | int
) -> tuple[Int[Array, "R W"], Int[Array, "B W"]]:
    """The places that predict the block, in a window that begins at `first`; what they predict."""
    index = net.range(blocks.start + progress.block * blocks.length, blocks.length)
    rows = jnp.maximum(index - net.offset - first, 0)  # nothing predicts the canvas's first token
    return rows, index[: progress.tokens.shape[0]]


def at_work(net: CanvasModel, progress: Progress) -> Bool[Array, "R 1"]:
    """Rows that have not finished the block.

    The others must not write while they wait, wherever that could be read later: what a row keeps
    would depend on its batch.
    """
    copies = net.num_rows // progress.unfinished.shape[0]  # 2 under guidance
    return jnp.tile(progress.unfinished, copies)[:, None]


def writing(
    net: CanvasModel, blocks: Blocks, progress: Progress, index: Int[Array, "R W"]
) -> Bool[Array, "R W"] | None:
    """The slots that a window of a prefix or dual cache writes; None: all.

    With fixed quotas all rows finish together. Without a policy the next block's first call writes
    everything anew; a layer that is skipped there would keep what a waiting row wrote.
    """
    if net.policy is None or blocks.max_quota is not None:
        return None
    return jnp.broadcast_to(at_work(net, progress), index.shape)


@dataclass(frozen=True)
class NoCache:
    """Every call runs the whole canvas."""

    partial = False

    def start(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        return None

    def passes(self, net: CanvasModel, blocks: Blocks) -> list[Pass]:
        return [whole_canvas(net, blocks)]

    def kind(
        self, block: Number, step_in_block: Number, memory: PyTree, net: CanvasModel, blocks: Blocks
    ) -> Number:
        return jnp.zeros_like(step_in_block)

    def learn(self, memory: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        return memory


@dataclass(frozen=True)
class DualCache:
    """Keys and values of everything outside the block are kept until the next block (Fast-dLLM).

    The first call of a block runs the whole canvas; the others run the block alone.
    """

    partial = False

    def start(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        return net.empty()

    def passes(self, net: CanvasModel, blocks: Blocks) -> list[Pass]:
        return [whole_canvas(net, blocks), block_only(net, blocks)]

    def kind(
        self, block: Number, step_in_block: Number, memory: PyTree, net: CanvasModel, blocks: Blocks
    ) -> Number:
        return jnp.where(step_in_block > 0, 1, 0)

    def learn(self, memory: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        return memory


def block_only(net: CanvasModel, blocks: Blocks) -> Pass:
    """Runs the tokens that predict the block."""

    def call(progress: Progress, memory: PyTree) -> Call:
        start = blocks.start + progress.block * blocks.length - net.offset
        active = writing(net, blocks, progress, net.range(start, blocks.length))
        out = net.run_range(progress.tokens, start, blocks.length, progress.step, memory, active)
        index = net.range(start + net.offset, blocks.length)[: progress.tokens.shape[0]]
        return Call(out.h, index, None, out.gates, out.cache_state)

    return Pass(call, Work((blocks.length,) * net.cfg.num_layers, blocks.length))


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of everything before the block are kept until the next (Fast-dLLM).

    The first call of a block runs the whole canvas; the others run the block and all after it.
    """

    partial = False

    def start(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        return net.empty()

    def passes(self, net: CanvasModel, blocks: Blocks) -> list[Pass]:
        sizes = window_sizes(blocks.count)
        return [whole_canvas(net, blocks), *(self._suffix(net, blocks, n) for n in sizes)]

    def _suffix(self, net: CanvasModel, blocks: Blocks, num_blocks: int) -> Pass:
        """Runs the last `num_blocks` blocks, and writes the one in work and those after it."""
        size = num_blocks * blocks.length + net.offset

        def call(progress: Progress, memory: PyTree) -> Call:
            start = blocks.start + progress.block * blocks.length - net.offset
            first = blocks.end - size
            index = net.range(first, size)
            active = writing(net, blocks, progress, index)
            if blocks.count > MAX_SIZES:
                active = index >= start if active is None else active & (index >= start)
            rows, predicted = block_rows(net, blocks, progress, first)
            out = net.run_range(
                progress.tokens, first, size, progress.step, memory, active, output_positions=rows
            )
            return Call(out.h, predicted, None, out.gates, out.cache_state)

        return Pass(call, Work((size,) * net.cfg.num_layers, blocks.length))

    def kind(
        self, block: Number, step_in_block: Number, memory: PyTree, net: CanvasModel, blocks: Blocks
    ) -> Number:
        return jnp.where(
            step_in_block == 0,
            0,
            1 + which_size(blocks.count - block, blocks.count),
        )

    def learn(self, memory: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        return memory


def window_sizes(num_blocks: int) -> list[int]:
    """The sizes, in blocks, that windows of 1 to `num_blocks` blocks are rounded up to."""
    unit = -(-num_blocks // MAX_SIZES)
    return [*range(unit, num_blocks, unit), num_blocks]


def which_size(wanted: Number, num_blocks: int) -> Number:
    """The number of the smallest size that holds `wanted` blocks."""
    return jnp.searchsorted(jnp.asarray(window_sizes(num_blocks)), wanted)
