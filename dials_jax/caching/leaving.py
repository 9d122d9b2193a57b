"""The model calls of ES-dLLM: tokens that leave on their way through the layers.

Places on the canvas are those of the rows that run. In a shifted model (Dream) the row that
predicts a token lies one to its left.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dials_jax import trees
from dials_jax.caching.cache import (
    MAX_SIZES,
    Blocks,
    Call,
    Pass,
    Progress,
    Work,
    at_work,
    block_rows,
)
from dials_jax.caching.importance import change, importance, top
from dials_jax.caching.net import Net
from dials_jax.models import transformer
from dials_jax.nn.block import Rows
from dials_jax.nn.kv import KV, Slots, write

Indicator = Literal["hidden", "query", "key", "value"]


class Plan(NamedTuple):
    """What `EarlySkip` comes to in one model and one block length."""

    alpha: float
    indicator: Indicator
    layers: tuple[int, ...]  # where tokens leave
    proportions: tuple[float, ...]  # of the window that runs from each depth on
    kept: tuple[int, ...]  # the same in tokens, as long as steps reveal few

    def spans(self, num_layers: int) -> list[tuple[int, int]]:
        """Ranges of layers that run on equally many tokens.

        Tokens leave on the output of a layer, at the end of a span. Where its queries, keys or
        values decide, they leave within the layer, which is then a span by itself.
        """
        if self.indicator == "hidden":
            cuts = [layer + 1 for layer in self.layers]
        else:
            cuts = [cut for layer in self.layers for cut in (layer, layer + 1)]
        return list(zip([0, *cuts], [*cuts, num_layers], strict=True))

    def depth(self, layer: int) -> int:
        """The number of places before `layer` where tokens have left."""
        inside = self.indicator != "hidden"
        return sum(layer >= at if inside else layer > at for at in self.layers)


class Memory(NamedTuple):
    """What ES-dLLM keeps of the canvas's places S."""

    kv: tuple[PyTree, ...]  # one a span of layers
    seen: tuple[Array, ...]  # [R, S, ...] hidden states or queries, one a layer where tokens leave
    confidence: Float[Array, "R S"]  # of the token last proposed; 0 where none can be revealed
    revealed: Bool[Array, "R S"]  # by the last step


class Going(NamedTuple):
    """The tokens of a window that are still on their way through the layers."""

    h: Float[Array, "R W D"]
    window: Rows
    masked: Bool[Array, "R W"]
    confidence: Float[Array, "R W"]
    bonus: Float[Array, "R W"]  # keeps a row's leftmost masked and last revealed tokens

    def take(self, index: Int[Array, "R w"], active: Bool[Array, "R w"] | None) -> Going:
        h, angles, places, masked, confidence, bonus = gather(
            (self.h, self.window.angles, self.window.slots.index, *self[2:]), index
        )
        window = Rows(angles, self.window.valid, Slots(places, active))
        return Going(h, window, masked, confidence, bonus)


def gather(tree: PyTree, index: Int[Array, "R w"]) -> PyTree:
    """Each row's entries at `index` along the second axis."""
    return jax.tree.map(jax.vmap(lambda x, at: x[at]), tree, _like(tree, index))


def _like(tree: PyTree, x: Array) -> PyTree:
    return jax.tree.map(lambda _: x, tree)


def start(plan: Plan, net: Net) -> Memory:
    cfg, (rows, length) = net.cfg, net.rows.angles.shape[:2]
    shape = {"hidden": (cfg.d_model,), "query": (cfg.num_heads, cfg.head_dim)}
    # Old keys and values are in the cache anyway.
    seen = jnp.zeros((rows, length, *shape.get(plan.indicator, (0,))), cfg.dtype)
    return Memory(
        tuple(net.empty(span) for span in plan.spans(cfg.num_layers)),
        (seen,) * len(plan.layers),
        jnp.zeros((rows, length)),
        jnp.zeros((rows, length), bool),
    )


# ----------------------------------------------------------------------------------- passes


def up_to(plan: Plan, net: Net, blocks: Blocks, num_blocks: int | None) -> Pass:
    """Brings everything up to the block's end up to date; None: the whole canvas.

    Args:
      num_blocks: the window's size, which may reach beyond the block's end.
    """
    size = net.length
    if num_blocks is not None:
        size = blocks.start + num_blocks * blocks.length - net.offset

    def call(progress: Progress, memory: Memory) -> Call:
        index, active = net.range(0, size), None
        if num_blocks is not None:
            active = _awake(net, blocks, progress)
            if blocks.count > MAX_SIZES:
                end = blocks.start + (progress.block + 1) * blocks.length - net.offset
                active = index < end if active is None else active & (index < end)
        return _refresh(plan, net, blocks, progress, memory, index, active)

    work = Work((size,) * net.cfg.num_layers, blocks.length, net.prompt_length)
    return Pass(call, work)


def two_blocks(plan: Plan, net: Net, blocks: Blocks) -> Pass:
    """A block's first step without a refresh: from the token on that was revealed last."""
    size = 2 * blocks.length

    def call(progress: Progress, memory: Memory) -> Call:
        first = blocks.start + (progress.block - 1) * blocks.length - net.offset
        index = net.range(first, size)
        active = index >= leftmost(memory.revealed)
        return _refresh(plan, net, blocks, progress, memory, index, active)

    return Pass(call, Work((size,) * net.cfg.num_layers, blocks.length))


def leftmost(revealed: Bool[Array, "R S"]) -> Int[Array, "R 1"]:
    """The first token that the last step revealed, in each row by itself.

    The published code takes the first of all rows, so that a row depends on its batch.
    """
    return jnp.argmax(revealed, axis=1, keepdims=True)


def block(plan: Plan, net: Net, blocks: Blocks) -> Pass:
    """Brings the block up to date."""

    def call(progress: Progress, memory: Memory) -> Call:
        index, active = _block_range(net, blocks, progress), _awake(net, blocks, progress)
        return _refresh(plan, net, blocks, progress, memory, index, active)

    return Pass(call, Work((blocks.length,) * net.cfg.num_layers, blocks.length))


def skip(plan: Plan, net: Net, blocks: Blocks, *, few: bool) -> Pass:
    """Runs the block and drops tokens on the way.

    Args:
      few: some row was revealed so many tokens that it keeps more than `plan.kept`. The window
        then stays whole, and tokens that have left are only barred from what they could change.
    """

    def leave(depth: int, going: Going, delta: Float[Array, "R W"], memory: Memory):
        active = going.window.slots.active
        score = importance(going.confidence, delta, plan.alpha, active) + going.bonus
        score = score if active is None else jnp.where(active, score, -jnp.inf)
        if not few:
            rows = top(score, plan.kept[depth])
            return rows, None if active is None else gather(active, rows)
        rows = top(score, blocks.length)
        last = jnp.sum(memory.revealed, axis=1, keepdims=True) + 2
        share = int(plan.proportions[depth] * blocks.length)
        count = jnp.maximum(share, jnp.minimum(last, blocks.length))
        return rows, gather(active, rows) & (jnp.arange(blocks.length) < count)

    def call(progress: Progress, memory: Memory) -> Call:
        index, active = _block_range(net, blocks, progress), _awake(net, blocks, progress)
        going, gates, memory = _travel(plan, net, progress, memory, index, active, leave)
        slots = going.window.slots
        return Call(going.h, slots.index + net.offset, slots.active, gates, memory)

    num_layers = net.cfg.num_layers
    tokens = tuple(
        blocks.length if few else plan.kept[plan.depth(layer)] for layer in range(num_layers)
    )
    return Pass(call, Work(tokens, tokens[-1]))


def _block_range(net: Net, blocks: Blocks, progress: Progress) -> Int[Array, "R W"]:
    first = blocks.start + progress.block * blocks.length - net.offset
    return net.range(first, blocks.length)


def _awake(net: Net, blocks: Blocks, progress: Progress) -> Bool[Array, "R 1"] | None:
    """Rows that write; None: all.

    With one token a step all rows finish together. With more, a row may find fewer masked tokens
    among those that have not left than another does.
    """
    return None if blocks.max_quota == 1 else at_work(net, progress)


def _refresh(
    plan: Plan,
    net: Net,
    blocks: Blocks,
    progress: Progress,
    memory: Memory,
    index: Int[Array, "R W"],
    active: Bool[Array, "R _"] | None,
) -> Call:
    """Runs a range of the canvas through all layers."""
    rows, predicted = block_rows(net, blocks, progress, index[0, 0])
    going, gates, memory = _travel(plan, net, progress, memory, index, active, None, rows)
    return Call(going.h, predicted, None, gates, memory)


# ----------------------------------------------------------------------------------- the way


def _travel(
    plan: Plan,
    net: Net,
    progress: Progress,
    memory: Memory,
    index: Int[Array, "R W"],
    active: Bool[Array, "R _"] | None,
    leave,
    wanted: Int[Array, "R W"] | None = None,
) -> tuple[Going, Array, Memory]:
    """Runs the tokens at `index`; at each layer of the plan `leave` says who goes on.

    Args:
      wanted: of the window, the tokens whose states are asked for; None: all that go on.
      leave: `leave(depth, going, delta, memory) -> (rows, active)`; None: all go on.
    """
    going = _enter(plan, net, progress, memory, index, active)
    kv, seen, gates = list(memory.kv), list(memory.seen), []
    contiguous = True
    for i, span in enumerate(plan.spans(net.cfg.num_layers)):
        depth = plan.depth(span[0])
        if plan.indicator != "hidden" and span[0] in plan.layers:
            inner = None if leave is None else leave
            going, kv[i], seen[depth - 1] = _within(
                plan, net, going, span[0], kv[i], seen[depth - 1], memory, inner
            )
            gates.append(jnp.ones((1, index.shape[0]), bool))
            contiguous = leave is None
            continue
        out = net.run(
            going.h, going.window, going.masked, progress.step, kv[i],
            span=span, contiguous=contiguous, wanted=wanted,
        )  # fmt: skip
        going, kv[i] = going._replace(h=out.h), out.memory
        gates.append(out.gates)
        if plan.indicator == "hidden" and depth < len(plan.layers):
            slots = going.window.slots
            if leave is not None:
                delta = change(out.h, gather(seen[depth], slots.index), slots.active)
                going = going.take(*leave(depth + 1, going, delta, memory))
            seen[depth] = write(
                seen[depth], going.h, going.window.slots, contiguous=contiguous and leave is None
            )
            contiguous = contiguous and leave is None
    memory = memory._replace(kv=tuple(kv), seen=tuple(seen))
    return going, jnp.concatenate(gates), memory


def _enter(
    plan: Plan,
    net: Net,
    progress: Progress,
    memory: Memory,
    index: Int[Array, "R W"],
    active: Bool[Array, "R _"] | None,
) -> Going:
    tokens = gather(progress.tokens, index)
    active = None if active is None else jnp.broadcast_to(active, index.shape)
    predicted = jnp.minimum(index + net.offset, net.length - 1)
    masked = transformer.is_masked(net.cfg, gather(progress.tokens, predicted))
    leftmost = (jnp.arange(index.shape[1]) == jnp.argmax(masked, axis=1)[:, None]) & masked
    bonus = jnp.where(leftmost, 5.0, 0.0)
    if plan.alpha < 1:
        bonus = jnp.where(gather(memory.revealed, index), 3.0, bonus)
    window = net.window(index, active)
    confidence = gather(memory.confidence, index)
    return Going(net.embed(tokens), window, net.masked(tokens, index), confidence, bonus)


def _within(
    plan: Plan,
    net: Net,
    going: Going,
    layer: int,
    kv: PyTree,
    seen: Array,
    memory: Memory,
    leave,
) -> tuple[Going, PyTree, Array]:
    """One layer in which tokens leave once their queries, keys and values are known."""
    layers = net.params["layers"]
    unrolled = trees.is_unrolled(layers)
    params = layers[layer] if unrolled else trees.layer_slice(layers, layer)
    module = transformer.block_of(net.cfg, params)
    old = kv[0] if unrolled else trees.layer_slice(kv, 0)
    q, new = module(params, going.h, going.window.angles, method="qkv")
    if leave is not None:
        now, before = {"query": (q, seen), "key": (new.k, old.k), "value": (new.v, old.v)}[
            plan.indicator
        ]
        slots = going.window.slots
        delta = change(now, gather(before, slots.index), slots.active)
        rows, active = leave(plan.depth(layer), going, delta, memory)
        going, (q, new) = going.take(rows, active), gather((q, new), rows)
    if plan.indicator == "query":
        seen = write(seen, q, going.window.slots)
    slots = going.window.slots
    h = module(params, going.h, q, new, going.window, old, slots.index, method="mix")
    kept: KV = write(old, new, slots)
    kv = (kept,) if unrolled else jax.tree.map(lambda x: x[None], kept)
    return going._replace(h=h), kv, seen
