"""The steps of blocks that are known in advance, as loops of constant length, and in programs.

    block 0 of ES-dLLM   | canvas | 15 times: skip skip skip block | skip skip skip |
    block 1              | refresh of 2 blocks | the same          | the same       |
    block 2              | refresh of 3 blocks | the same          | the same       |

Every field is a program of its own, compiled once and at the same time as the others. What follows
what is known on the host, so the device waits for nothing between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from jax import lax

from dials_jax.caching.cache import Blocks, ForwardVariant

# Steps as loops: (times, body), where a body is the number of a forward variant, or loops again.
# Hashable: a static argument of compiled programs.
Loops = tuple[tuple[int, Any], ...]


def divide_blocks(
    variants: Sequence[ForwardVariant], blocks: Blocks, num_steps: int
) -> list[list[Loops]]:
    """The parts of every block, in order.

    A range of steps that is the same in all blocks becomes a part for each of its loops. Steps that
    depend on the block become one for each run of a variant, so that other blocks find it, too.
    """
    block, step = np.arange(blocks.count)[:, None], np.arange(num_steps)
    shape = (blocks.count, num_steps)
    due = [np.broadcast_to(variant.due(block, step, None), shape) for variant in variants]
    first_due = np.argmax(due, axis=0)
    alike = (first_due == first_due[0]).all(axis=0)
    parts: list[list[Loops]] = [[] for _ in range(blocks.count)]
    for same, steps in groupby(range(num_steps), key=lambda n: alike[n]):
        encode = fold if same else run_length_encode
        for of_block, numbers in zip(parts, first_due[:, list(steps)].tolist(), strict=True):
            of_block += [(loop,) for loop in encode(numbers)]
    return parts


def run_length_encode(steps: Sequence[int]) -> Loops:
    """Runs of equal steps as loops: [1, 2, 2] becomes (1, 1), (2, 2)."""
    return tuple((len(list(run)), step) for step, run in groupby(steps))


def fold(steps: Sequence[int]) -> Loops:
    """Runs of equal steps as loops, and then runs of equal pairs of loops.

    [5, 2, 2, 1, 2, 2, 1, 2, 2] becomes (1, 5), (2, ((2, 2), (1, 1))), (2, 2).
    """
    runs, folded, i = run_length_encode(steps), [], 0
    while i < len(runs):
        pair, times = runs[i : i + 2], 1
        while len(pair) == 2 and runs[i + 2 * times : i + 2 * times + 2] == pair:
            times += 1
        folded += [(times, pair)] if times > 1 else runs[i : i + 1]
        i += 2 * times if times > 1 else 1
    return tuple(folded)


def run_loops(loops: Loops, run_step: Callable[[int, Any], Any], state: Any) -> Any:
    """Takes the steps.

    Args:
      run_step: `run_step(variant, state)` takes one step.
    """

    def run_once(body: int | Loops, state: Any) -> Any:
        return run_step(body, state) if isinstance(body, int) else run_loops(body, run_step, state)

    for times, body in loops:
        if times == 1:
            state = run_once(body, state)
        else:
            state = lax.fori_loop(0, times, lambda _, s, body=body: run_once(body, s), state)
    return state
