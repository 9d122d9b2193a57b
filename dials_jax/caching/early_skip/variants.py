"""The forward variants of ES-dLLM, and when each is due."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dials_jax.caching.cache import (
    Blocks,
    Due,
    ForwardInputs,
    ForwardOutputs,
    ForwardVariant,
    Number,
    Work,
    always,
    at_block_start,
    block_positions,
    is_rounded_up,
    unfinished_sequences,
    window_sizes,
)
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.early_skip.importance import importance, keep_top_tokens, num_kept
from dials_jax.caching.early_skip.layers import (
    ActiveTokens,
    EarlySkipState,
    SkipPlan,
    enter_window,
    run_spans,
)


def leftmost(revealed: Bool[Array, "R S"]) -> Int[Array, "R 1"]:
    """The first token that the last step revealed, per sequence.

    The published code takes the first of all sequences, so that a result depends on the batch.
    """
    return jnp.argmax(revealed, axis=1, keepdims=True)


class EarlySkipVariants:
    """The forward variants for one plan.

    Steps are counted in tokens, as the published code does: `token` below is the number of the
    step if every step revealed one token and every block took as many steps as it has tokens.
    """

    def __init__(self, plan: SkipPlan, net: CanvasModel, blocks: Blocks):
        self.plan, self.net, self.blocks = plan, net, blocks

    def needed(self, prompt_every: int, block_every: int) -> list[ForwardVariant]:
        """All that a generation needs, in order: the first that is due runs."""
        blocks, sizes = self.blocks, window_sizes(self.blocks.count)

        def every(count: int) -> Due:
            return lambda block, step, state: (block * blocks.length + step) % count == 0

        num_tokens = blocks.length * blocks.count
        refreshed = range(prompt_every, num_tokens, prompt_every)
        reached = {next(n for n in sizes if n > token // blocks.length) for token in refreshed}
        variants = [self.canvas()]
        variants += [self.up_to(n, every(prompt_every)) for n in sorted(reached)]
        if any(start % prompt_every for start in range(blocks.length, num_tokens, blocks.length)):
            variants.append(self.two_blocks())
        return [*variants, self.block(every(block_every)), *self.skips()]

    # ----------------------------------------------------------------------------- the variants

    def canvas(self) -> ForwardVariant:
        """Runs the whole canvas, at the first step of all."""

        def due(block: Number, step_in_block: Number, state: EarlySkipState | None) -> Any:
            return (block == 0) & (step_in_block == 0)

        def forward(inputs: ForwardInputs, state: EarlySkipState) -> ForwardOutputs:
            index = self.net.positions(0, self.net.length)
            return self.refresh(inputs, state, index, None, self.net.prompt_length)

        return ForwardVariant(due, forward, self.work(self.net.length, self.net.prompt_length))

    def up_to(self, num_blocks: int, refresh_due: Due) -> ForwardVariant:
        """Refreshes everything up to the block's end.

        Args:
          num_blocks: the window's size, which may reach beyond the block's end.
        """
        net, blocks = self.net, self.blocks
        size = blocks.start + num_blocks * blocks.length - net.logit_shift

        def due(block: Number, step_in_block: Number, state: EarlySkipState | None) -> Any:
            return refresh_due(block, step_in_block, state) & (block < num_blocks)

        def forward(inputs: ForwardInputs, state: EarlySkipState) -> ForwardOutputs:
            index, active = net.positions(0, size), self.writing_sequences(inputs)
            if is_rounded_up(blocks.count):
                inside = index < self.first(inputs.block + 1)
                active = inside if active is None else active & inside
            return self.refresh(inputs, state, index, active, net.prompt_length)

        return ForwardVariant(due, forward, self.work(size, net.prompt_length))

    def two_blocks(self) -> ForwardVariant:
        """A block's first step without a refresh: runs from the token revealed last on."""
        size = 2 * self.blocks.length

        def forward(inputs: ForwardInputs, state: EarlySkipState) -> ForwardOutputs:
            index = self.net.positions(self.first(inputs.block - 1), size)
            return self.refresh(inputs, state, index, index >= leftmost(state.revealed))

        return ForwardVariant(at_block_start, forward, self.work(size))

    def block(self, due: Due) -> ForwardVariant:
        """Refreshes the block."""

        def forward(inputs: ForwardInputs, state: EarlySkipState) -> ForwardOutputs:
            index = self.net.positions(self.first(inputs.block), self.blocks.length)
            return self.refresh(inputs, state, index, self.writing_sequences(inputs))

        return ForwardVariant(due, forward, self.work(self.blocks.length))

    def skips(self) -> list[ForwardVariant]:
        """Runs the block and skips tokens; if any number may be revealed there are two variants.

        The first runs smaller windows, of `plan.kept` tokens. The second is due when a sequence
        revealed more tokens than that leaves room for.
        """
        if self.blocks.max_quota is not None:
            return [self.skip(always)]

        def due(block: Number, step_in_block: Number, state: EarlySkipState) -> Bool[Array, ""]:
            most = jnp.max(jnp.sum(state.revealed, axis=1))
            proportion, length = self.plan.proportions[-1], self.blocks.length
            return num_kept(proportion, length, most) <= self.plan.kept[-1]

        return [self.skip(due), self.skip(always, whole_window=True)]

    def skip(self, due: Due, whole_window: bool = False) -> ForwardVariant:
        """Runs the block and skips tokens.

        Args:
          whole_window: all tokens stay in the window, and the skipped ones are masked out.
        """
        length, num_layers = self.blocks.length, self.net.cfg.num_layers

        def forward(inputs: ForwardInputs, state: EarlySkipState) -> ForwardOutputs:
            index = self.net.positions(self.first(inputs.block), length)
            active = self.writing_sequences(inputs)
            tokens = enter_window(self.plan, self.net, inputs, state, index, active)
            revealed = state.revealed if whole_window else None
            keep = partial(self.keep, revealed)
            tokens, gates, state, depth = run_spans(
                self.plan, self.net, inputs, state, tokens, keep
            )
            slots = tokens.window.slots
            index = slots.index + self.net.logit_shift
            return ForwardOutputs(tokens.h, index, slots.active, gates, state, depth=depth)

        run, projected = zip(*map(self.plan.tokens, range(num_layers)), strict=True)
        if whole_window:
            run = projected = (length,) * num_layers
        return ForwardVariant(due, forward, Work(run, run[-1], projected=projected))

    # ------------------------------------------------------------------------------ their parts

    def keep(
        self,
        revealed: Bool[Array, "R S"] | None,
        depth: int,
        tokens: ActiveTokens,
        change: Float[Array, "R W"],
    ) -> tuple[Int[Array, "R w"], Bool[Array, "R w"] | None]:
        """The most important tokens of the window, most important first, and which are active.

        Args:
          revealed: tokens that the last step revealed, if their number decides how many tokens
            are kept; None: the plan decides.
        """
        plan, length, active = self.plan, self.blocks.length, tokens.window.slots.active
        score = importance(tokens.confidence, change, tokens.bonus, plan.alpha, active)
        if revealed is None:
            return keep_top_tokens(score, active, plan.kept[depth])
        num_revealed = jnp.sum(revealed, axis=1, keepdims=True)
        count = num_kept(plan.proportions[depth], length, num_revealed)
        return keep_top_tokens(score, active, length, count)

    def refresh(
        self,
        inputs: ForwardInputs,
        state: EarlySkipState,
        index: Int[Array, "R W"],
        active: Bool[Array, "R _"] | None,
        prompt_length: int = 0,
    ) -> ForwardOutputs:
        """Runs a range of the canvas, which begins with `prompt_length` tokens of the prompt."""
        tokens = enter_window(self.plan, self.net, inputs, state, index, active)
        in_window, predicted = block_positions(self.net, self.blocks, inputs, index[0, 0])
        tokens, gates, state, depth = run_spans(
            self.plan, self.net, inputs, state, tokens, None,
            output_positions=in_window, prompt_length=prompt_length,
        )  # fmt: skip
        return ForwardOutputs(tokens.h, predicted, None, gates, state, depth=depth)

    def writing_sequences(self, inputs: ForwardInputs) -> Bool[Array, "R 1"] | None:
        """Sequences that write to the cache; None: all.

        With one token per step all sequences finish together. With more, a sequence may find fewer
        masked tokens among those that were not skipped than another does.
        """
        return None if self.blocks.max_quota == 1 else unfinished_sequences(self.net, inputs)

    def first(self, block: Int[Array, ""]) -> Int[Array, ""]:
        """The position that predicts a block's first token."""
        return self.blocks.start + block * self.blocks.length - self.net.logit_shift

    def work(self, size: int, prompt_length: int = 0) -> Work:
        return Work((size,) * self.net.cfg.num_layers, self.blocks.length, prompt_length)
