"""What a cache is to a sampler: the forward variants of a generation, and which is due when.

A cache changes what a step computes, never which tokens a step may reveal. `sampling/loop.py` draws
how blocks, steps, forward calls and variants relate; `plain.py` has the simple caches,
`early_skip/` has ES-dLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax.caching.canvas import CanvasModel

# A window whose length depends on the block is rounded up to one of this many sizes, all compiled.
MAX_SIZES = 8

Number = Int[Array, "..."] | Int[np.ndarray, "..."]
Due = Callable[[Number, Number, PyTree], Bool[Array, "..."] | Bool[np.ndarray, "..."] | bool]


class Blocks(NamedTuple):
    """How a canvas is filled: `count` blocks of `length` tokens, from left to right.

    Attributes:
      start: position where the first block begins.
      max_quota: tokens a step may reveal per sequence at most; None: any number.
      appended: a block is no part of the sequence before its first step: no call computes it.
      causal: nothing sees a block to its right, so that a finished block never changes.
      part: tokens of a sub-block; the parts of a block are filled from left to right.
    """

    start: int
    length: int
    count: int
    max_quota: int | None
    appended: bool = False
    causal: bool = False
    part: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.length * self.count

    def existing(self, block: Int[Array, ""]) -> Int[Array, ""] | None:
        """While this block is filled, the canvas ends here; None: all of it is there."""
        return self.start + (block + 1) * self.length if self.appended else None

    def lead(self, logit_shift: int) -> int:
        """How far to the left of a block its predictions begin.

        A shifted model predicts a block's first token at the position before it. If that belongs to
        a block which never changes, it has done so when that block was finished: what then comes
        out of the block itself are its other tokens, and the first of the next one.
        """
        return 0 if self.causal else logit_shift


class ForwardInputs(NamedTuple):
    """What a forward call is given beside the cache state.

    Attributes:
      step: counted through all blocks, the same in any batch; one number, or one per sequence.
      unfinished: sequences that still reveal or edit tokens of the block.
    """

    tokens: Int[Array, "B T"]
    step: Int[Array, "..."]
    block: Int[Array, ""]
    step_in_block: Int[Array, ""]
    unfinished: Bool[Array, "B"]


class ForwardOutputs(NamedTuple):
    """What a forward call yields: `h[:, i]` predicts the token at position `index[:, i]`."""

    h: Float[Array, "R W D"]
    index: Int[Array, "B W"]
    active: Bool[Array, "B W"] | None  # False: too stale to be revealed; None: all fresh
    gates: Bool[Array, "L R"]
    cache_state: PyTree
    seen: PyTree = None  # of the hidden states, by the observer of the canvas
    depth: Int[Array, "R T"] | None = None  # see `CanvasModel.depth`


class Revealed(NamedTuple):
    """What the sampler made of a forward call's outputs."""

    index: Int[Array, "B W"]
    active: Bool[Array, "B W"] | None
    confidence: Float[Array, "B W"]  # of the token proposed; 0 where none could be revealed
    commit: Bool[Array, "B W"]  # written now: revealed, or revised by a sampler that edits
    unfinished: Bool[Array, "B"]
    log_probs: Float[Array, "B W"] | None = None  # of the tokens proposed, if they are kept


class Work(NamedTuple):
    """What a forward variant computes per sequence, for counting FLOPs.

    All tokens count in every layer, although the last one computes only those of the block.

    Attributes:
      tokens: per layer.
      head: tokens whose logits are computed.
      prompt: tokens at the window's front that no router looks at.
      keys: that a token attends to; None: as many as the canvas is long.
      projected: per layer, tokens that get queries, keys and values; None: `tokens`.
    """

    tokens: tuple[int, ...]
    head: int
    prompt: int = 0
    keys: int | None = None
    projected: tuple[int, ...] | None = None


class ForwardVariant(NamedTuple):
    """One of the forward calls that a cache makes, compiled once.

    Attributes:
      due: `due(block, step_in_block, cache_state)`: whether it may run at a step. Elementwise, and
        without the cache state where all steps are known beforehand (`is_fixed` in the loop).
    """

    due: Due
    forward: Callable[[ForwardInputs, PyTree], ForwardOutputs]
    work: Work


def always(block: Number, step_in_block: Number, cache_state: PyTree) -> bool:
    return True


def at_block_start(block: Number, step_in_block: Number, cache_state: PyTree) -> Any:
    return step_in_block == 0


@runtime_checkable
class Cache(Protocol):
    """A strategy of what a step computes. Settings only: hashable, static in compiled programs.

    Attributes:
      drops_tokens: a call may leave out masked tokens of the block.
    """

    drops_tokens: bool

    def init_state(self, net: CanvasModel, blocks: Blocks) -> PyTree:
        """The cache state before the first call."""

    def forward_variants(self, net: CanvasModel, blocks: Blocks) -> list[ForwardVariant]:
        """All variants, in order: at each step the first that is due runs. The last always is."""

    def after_reveal(self, cache_state: PyTree, revealed: Revealed, net: CanvasModel) -> PyTree:
        """The cache state after the sampler has revealed tokens."""


# ----------------------------------------------------------------------- what caches have in common


def block_positions(
    net: CanvasModel, blocks: Blocks, inputs: ForwardInputs, first: Int[Array, ""] | int
) -> tuple[Int[Array, "R W"], Int[Array, "B W"]]:
    """Where the block is predicted, in a window that begins at position `first`.

    Returns: the indices in the window, and the canvas positions of the predicted tokens.
    """
    start = blocks.start + inputs.block * blocks.length - blocks.lead(net.logit_shift)
    index = net.positions(start, blocks.length)
    # In a shifted model nothing predicts the canvas's first token; prompts are never empty there.
    in_window = jnp.maximum(index - first, 0)
    return in_window, index[: inputs.tokens.shape[0]] + net.logit_shift


def unfinished_sequences(net: CanvasModel, inputs: ForwardInputs) -> Bool[Array, "R 1"]:
    """Sequences that have not finished the block.

    Finished sequences must not write to the cache while they wait for the others; otherwise their
    result would depend on the batch.
    """
    copies = net.num_sequences // inputs.unfinished.shape[0]  # 2 under guidance
    return jnp.tile(inputs.unfinished, copies)[:, None]


def window_sizes(num_blocks: int) -> list[int]:
    """The sizes, in blocks, that windows of 1 to `num_blocks` blocks are rounded up to."""
    unit = -(-num_blocks // MAX_SIZES)
    return [*range(unit, num_blocks, unit), num_blocks]


def is_rounded_up(num_blocks: int) -> bool:
    """Whether a window may be larger than what it was chosen for."""
    return num_blocks > MAX_SIZES
