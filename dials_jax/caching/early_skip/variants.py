"""The model calls of ES-dLLM: tokens that leave on their way through the layers.

Places on the canvas are those of the rows that run. In a shifted model (Dream) the row that
predicts a token lies one to its left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.caching.cache import (
    MAX_SIZES,
    Blocks,
    ForwardInputs,
    ForwardOutputs,
    ForwardVariant,
    Work,
    block_positions,
    unfinished_sequences,
)
from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.early_skip.importance import change, importance, top
from dials_jax.caching.early_skip.plan import EarlySkipState, SkipPlan
from dials_jax.models import transformer
from dials_jax.nn.block import BlockInputs
from dials_jax.nn.kv import KV, Slots, gather, write


class ActiveTokens(NamedTuple):
    """The tokens of a window that are still on their way through the layers."""

    h: Float[Array, "R W D"]
    window: BlockInputs
    masked: Bool[Array, "R W"]
    confidence: Float[Array, "R W"]
    bonus: Float[Array, "R W"]  # keeps a row's leftmost masked and last revealed tokens

    def take(self, index: Int[Array, "R w"], active: Bool[Array, "R w"] | None) -> ActiveTokens:
        h, angles, places, masked, confidence, bonus = gather(
            (self.h, self.window.angles, self.window.slots.index, *self[2:]), index
        )
        window = BlockInputs(angles, self.window.valid, Slots(places, active))
        return ActiveTokens(h, window, masked, confidence, bonus)


def leftmost(revealed: Bool[Array, "R S"]) -> Int[Array, "R 1"]:
    """The first token that the last step revealed, in each row by itself.

    The published code takes the first of all rows, so that a row depends on its batch.
    """
    return jnp.argmax(revealed, axis=1, keepdims=True)


# leave(depth, going, change, state) -> who goes on, as places in the window, and who is active
Leave = Callable[["int", ActiveTokens, Array, EarlySkipState], tuple[Array, "Array | None"]]


class EarlySkipVariants:
    """The kinds of model calls, and the way of the tokens through the layers."""

    def __init__(self, plan: SkipPlan, net: CanvasModel, blocks: Blocks):
        self.plan, self.net, self.blocks = plan, net, blocks

    def init_state(self) -> EarlySkipState:
        cfg, (rows, length) = self.net.cfg, (self.net.num_sequences, self.net.length)
        shape = {"hidden": (cfg.d_model,), "query": (cfg.num_heads, cfg.head_dim)}
        # Old keys and values are in the cache anyway.
        seen = jnp.zeros((rows, length, *shape.get(self.plan.indicator, (0,))), cfg.dtype)
        return EarlySkipState(
            tuple(self.net.init_cache(span) for span in self.plan.spans(cfg.num_layers)),
            (seen,) * len(self.plan.layers),
            jnp.zeros((rows, length)),
            jnp.zeros((rows, length), bool),
        )

    # ------------------------------------------------------------------------------- variants

    def canvas(self) -> ForwardVariant:
        """Runs the whole canvas."""

        def forward(inputs: ForwardInputs, cache_state: EarlySkipState) -> ForwardOutputs:
            index = self.net.positions(0, self.net.length)
            return self.refresh(inputs, cache_state, index, None, prompt=self.net.prompt_length)

        return ForwardVariant(forward, self.work(self.net.length, prompt=self.net.prompt_length))

    def up_to(self, num_blocks: int) -> ForwardVariant:
        """Brings everything up to the block's end up to date.

        Args:
          num_blocks: the window's size, which may reach beyond the block's end.
        """
        net, blocks = self.net, self.blocks
        size = blocks.start + num_blocks * blocks.length - net.logit_shift

        def forward(inputs: ForwardInputs, cache_state: EarlySkipState) -> ForwardOutputs:
            index, active = net.positions(0, size), self.awake(inputs)
            if blocks.count > MAX_SIZES:
                inside = index < self.first(inputs.block + 1)
                active = inside if active is None else active & inside
            return self.refresh(inputs, cache_state, index, active, prompt=net.prompt_length)

        return ForwardVariant(forward, self.work(size, prompt=net.prompt_length))

    def two_blocks(self) -> ForwardVariant:
        """A block's first step without a refresh: from the token on that was revealed last."""
        size = 2 * self.blocks.length

        def forward(inputs: ForwardInputs, cache_state: EarlySkipState) -> ForwardOutputs:
            index = self.net.positions(self.first(inputs.block - 1), size)
            return self.refresh(inputs, cache_state, index, index >= leftmost(cache_state.revealed))

        return ForwardVariant(forward, self.work(size))

    def block(self) -> ForwardVariant:
        """Brings the block up to date."""

        def forward(inputs: ForwardInputs, cache_state: EarlySkipState) -> ForwardOutputs:
            index = self.net.positions(self.first(inputs.block), self.blocks.length)
            return self.refresh(inputs, cache_state, index, self.awake(inputs))

        return ForwardVariant(forward, self.work(self.blocks.length))

    def skip(self, few: bool = False) -> ForwardVariant:
        """Runs the block and drops tokens on the way.

        Args:
          few: some row was revealed so many tokens that it keeps more than `plan.kept`. The window
            then stays whole, and tokens that have left are only barred from what they could change.
        """
        plan, length = self.plan, self.blocks.length

        def leave(
            depth: int, going: ActiveTokens, delta: Float[Array, "R W"], cache_state: EarlySkipState
        ):
            active = going.window.slots.active
            score = importance(going.confidence, delta, plan.alpha, active) + going.bonus
            score = score if active is None else jnp.where(active, score, -jnp.inf)
            if not few:
                rows = top(score, plan.kept[depth])
                return rows, None if active is None else gather(active, rows)
            rows = top(score, length)
            last = jnp.sum(cache_state.revealed, axis=1, keepdims=True) + 2
            count = jnp.maximum(int(plan.proportions[depth] * length), jnp.minimum(last, length))
            return rows, gather(active, rows) & (jnp.arange(length) < count)

        def forward(inputs: ForwardInputs, cache_state: EarlySkipState) -> ForwardOutputs:
            index = self.net.positions(self.first(inputs.block), length)
            active = self.awake(inputs)
            going, gates, cache_state = self.travel(inputs, cache_state, index, active, leave)
            slots = going.window.slots
            return ForwardOutputs(
                going.h, slots.index + self.net.logit_shift, slots.active, gates, cache_state
            )

        layers = range(self.net.cfg.num_layers)
        tokens = tuple(length if few else plan.kept[plan.depth(layer)] for layer in layers)
        return ForwardVariant(forward, Work(tokens, tokens[-1]))

    def first(self, block: Int[Array, ""]) -> Int[Array, ""]:
        """The row that predicts a block's first token."""
        return self.blocks.start + block * self.blocks.length - self.net.logit_shift

    def work(self, size: int, prompt: int = 0) -> Work:
        return Work((size,) * self.net.cfg.num_layers, self.blocks.length, prompt)

    def awake(self, inputs: ForwardInputs) -> Bool[Array, "R 1"] | None:
        """Rows that write; None: all.

        With one token a step all rows finish together. With more, a row may find fewer masked
        tokens among those that have not left than another does.
        """
        return None if self.blocks.max_quota == 1 else unfinished_sequences(self.net, inputs)

    def refresh(
        self,
        inputs: ForwardInputs,
        cache_state: EarlySkipState,
        index: Int[Array, "R W"],
        active: Bool[Array, "R _"] | None,
        prompt: int = 0,
    ) -> ForwardOutputs:
        """Runs a range of the canvas through all layers; `prompt` of its tokens are the prompt."""
        positions, predicted = block_positions(self.net, self.blocks, inputs, index[0, 0])
        going, gates, cache_state = self.travel(
            inputs, cache_state, index, active, None, positions, prompt
        )
        return ForwardOutputs(going.h, predicted, None, gates, cache_state)

    # ------------------------------------------------------------------------------- the way

    def travel(
        self,
        inputs: ForwardInputs,
        cache_state: EarlySkipState,
        index: Int[Array, "R W"],
        active: Bool[Array, "R _"] | None,
        leave: Leave | None,
        output_positions: Int[Array, "R _"] | None = None,
        prompt_length: int = 0,
    ) -> tuple[ActiveTokens, Array, EarlySkipState]:
        """Runs the tokens at `index`; at each layer of the plan `leave` says who goes on.

        Args:
          leave: None: all go on.
          output_positions: in the window, of the tokens whose states are asked for; None: of all
            that go on.
          prompt_length: no token of the window before this one is masked, and none leaves.
        """
        plan, going = self.plan, self.enter(inputs, cache_state, index, active)
        kv, seen, gates = list(cache_state.kv), list(cache_state.seen), []
        contiguous = True  # until the first token leaves
        policy_state = None
        for i, span in enumerate(plan.spans(self.net.cfg.num_layers)):
            depth = plan.depth(span[0])
            if plan.indicator != "hidden" and span[0] in plan.layers:
                going, kv[i], seen[depth - 1] = self.within(
                    going, span[0], kv[i], seen[depth - 1], cache_state, leave
                )
                gates.append(jnp.ones((1, index.shape[0]), bool))
                contiguous = leave is None
                continue
            out = self.net.run_layers(
                going.h, going.window, going.masked, inputs.step, kv[i],
                span=span, contiguous=contiguous, prompt_length=prompt_length,
                output_positions=output_positions, policy_state=policy_state,
            )  # fmt: skip
            going, kv[i] = going._replace(h=out.h), out.cache_state
            policy_state = out.policy_state
            gates.append(out.gates)
            if plan.indicator == "hidden" and depth < len(plan.layers):
                if leave is not None:
                    slots = going.window.slots
                    delta = change(out.h, gather(seen[depth], slots.index), slots.active)
                    going = going.take(*leave(depth + 1, going, delta, cache_state))
                    contiguous = False
                slots = going.window.slots
                seen[depth] = write(seen[depth], going.h, slots, contiguous=contiguous)
        cache_state = cache_state._replace(kv=tuple(kv), seen=tuple(seen))
        return going, jnp.concatenate(gates), cache_state

    def enter(
        self,
        inputs: ForwardInputs,
        cache_state: EarlySkipState,
        index: Int[Array, "R W"],
        active: Bool[Array, "R _"] | None,
    ) -> ActiveTokens:
        net, tokens = self.net, gather(inputs.tokens, index)
        active = None if active is None else jnp.broadcast_to(active, index.shape)
        predicted = jnp.minimum(index + net.logit_shift, net.length - 1)
        masked = transformer.is_masked(net.cfg, gather(inputs.tokens, predicted))
        first = (jnp.arange(index.shape[1]) == jnp.argmax(masked, axis=1)[:, None]) & masked
        bonus = jnp.where(first, 5.0, 0.0)
        if self.plan.alpha < 1:
            bonus = jnp.where(gather(cache_state.revealed, index), 3.0, bonus)
        window, confidence = net.window(index, active), gather(cache_state.confidence, index)
        return ActiveTokens(
            net.embed(tokens, window), window, net.is_masked(tokens, index), confidence, bonus
        )

    def within(
        self,
        going: ActiveTokens,
        layer: int,
        kv: PyTree,
        seen: Array,
        cache_state: EarlySkipState,
        leave: Leave | None,
    ) -> tuple[ActiveTokens, PyTree, Array]:
        """One layer in which tokens leave once their queries, keys and values are known."""
        plan, layers = self.plan, self.net.params["layers"]
        unrolled = trees.is_unrolled(layers)
        params = trees.layer_slice(layers, layer)
        block = transformer.block_of(self.net.cfg, params)
        old = trees.layer_slice(kv, 0)
        q, new = block(params, going.h, going.window, method="project")
        if leave is not None:
            now, before = {"query": (q, seen), "key": (new.k, old.k), "value": (new.v, old.v)}[
                plan.indicator
            ]
            slots = going.window.slots
            delta = change(now, gather(before, slots.index), slots.active)
            rows, active = leave(plan.depth(layer), going, delta, cache_state)
            going, (q, new) = going.take(rows, active), gather((q, new), rows)
        slots = going.window.slots
        if plan.indicator == "query":
            seen = write(seen, q, slots)
        kept: KV = write(old, new, slots)
        h = block(params, going.h, q, kept, going.window, method="mix")
        kv = (kept,) if unrolled else jax.tree.map(lambda x: x[None], kept)
        return going._replace(h=h), kv, seen
