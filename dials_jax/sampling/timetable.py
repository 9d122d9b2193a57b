"""The program of a block whose steps are known in advance, as nested loops of constant length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from dials_jax.caching.cache import Blocks, ForwardVariant

# A step: the number of its forward variant, or those that it may be, depending on the block.
Step = int | tuple[int, ...]
# Steps and loops: (times, body), where a body is a step or again a program.
StepProgram = list[tuple[int, Any]]


def block_steps(variants: Sequence[ForwardVariant], blocks: Blocks, num_steps: int) -> list[Step]:
    """The variant of every step of a block."""
    block, step = np.arange(blocks.count)[:, None], np.arange(num_steps)
    shape = (blocks.count, num_steps)
    due = [np.broadcast_to(variant.due(block, step, None), shape) for variant in variants]
    first_due = np.argmax(due, axis=0)
    numbers = [np.unique(of_step).tolist() for of_step in first_due.T]
    return [n[0] if len(n) == 1 else tuple(n) for n in numbers]


def run_length_encode(steps: list[Step]) -> StepProgram:
    """Runs of equal steps as loops, and then runs of equal pairs of loops.

    [5, 2, 2, 1, 2, 2, 1, 2, 2] becomes [(1, 5), (2, 2), (2, [(1, 1), (2, 2)])].
    """
    runs: StepProgram = []
    for step in steps:
        if runs and runs[-1][1] == step:
            runs[-1] = (runs[-1][0] + 1, step)
        else:
            runs.append((1, step))
    encoded: StepProgram = []
    i = 0
    while i < len(runs):
        pair, times = runs[i : i + 2], 1
        while len(pair) == 2 and runs[i + 2 * times : i + 2 * times + 2] == pair:
            times += 1
        encoded += [(times, pair)] if times > 1 else runs[i : i + 1]
        i += 2 * times if times > 1 else 1
    return encoded


def run_program(
    program: StepProgram,
    run_step: Callable[[int, Any], Any],
    run_steps_due: Callable[[tuple[int, ...], Any, int], Any],
    state: Any,
) -> Any:
    """Takes the steps.

    Args:
      run_step: `run_step(variant, state)` takes one step.
      run_steps_due: `run_steps_due(variants, state, times)` takes this many, by those of the
        variants that are due.
    """

    def run_once(body: Step | StepProgram, state: Any) -> Any:
        if isinstance(body, int):
            return run_step(body, state)
        return run_program(body, run_step, run_steps_due, state)

    for times, body in program:
        if isinstance(body, tuple):
            state = run_steps_due(body, state, times)
        elif times == 1:
            state = run_once(body, state)
        else:
            state = lax.fori_loop(0, times, lambda _, s, body=body: run_once(body, s), state)
    return state
