"""The steps of a block where they are known beforehand, as nested loops of constant length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dials_jax.caching.cache import Blocks, Cache
from dials_jax.caching.canvas import CanvasModel

# A step: the kind of its model call, or the kinds that it may be, depending on the block.
Step = int | tuple[int, ...]
# Steps and loops: (times, body), where a body is a step or again a timetable.
Timetable = list[tuple[int, Any]]


def block_timetable(cache: Cache, net: CanvasModel, blocks: Blocks, num_steps: int) -> list[Step]:
    """The model calls of every block."""

    def due(block, step):
        return cache.variant_due(block, step, None, net, blocks)

    every_step = jax.vmap(due, (None, 0))
    with jax.ensure_compile_time_eval():
        kinds = jax.vmap(every_step, (0, None))(jnp.arange(blocks.count), jnp.arange(num_steps))
        kinds = np.asarray(kinds)
    return [int(k[0]) if len(k) == 1 else tuple(k.tolist()) for k in map(np.unique, kinds.T)]


def run_length_encode(steps: list[Step]) -> Timetable:
    """Runs of equal steps as loops, and then runs of equal pairs of loops.

    [5, 2, 2, 1, 2, 2, 1, 2, 2] becomes [(1, 5), (2, 2), (2, [(1, 1), (2, 2)])].
    """
    runs: Timetable = []
    for step in steps:
        if runs and runs[-1][1] == step:
            runs[-1] = (runs[-1][0] + 1, step)
        else:
            runs.append((1, step))
    folded: Timetable = []
    i = 0
    while i < len(runs):
        pair, times = runs[i : i + 2], 1
        while len(pair) == 2 and runs[i + 2 * times : i + 2 * times + 2] == pair:
            times += 1
        folded += [(times, pair)] if times > 1 else runs[i : i + 1]
        i += 2 * times if times > 1 else 1
    return folded


def follow(
    timetable: Timetable,
    advance: Callable[[int, Any], Any],
    dispatch: Callable[[tuple[int, ...], Any, int], Any],
    state: Any,
) -> Any:
    """Takes the steps.

    Args:
      advance: `advance(kind, state)` makes one model call.
      dispatch: `dispatch(kinds, state, times)` makes so many, of these kinds as they are due.
    """

    def once(body: Step | Timetable, state: Any) -> Any:
        if isinstance(body, int):
            return advance(body, state)
        return follow(body, advance, dispatch, state)

    for times, body in timetable:
        if isinstance(body, tuple):
            state = dispatch(body, state, times)
        elif times == 1:
            state = once(body, state)
        else:
            state = lax.fori_loop(0, times, lambda _, s, body=body: once(body, s), state)
    return state
