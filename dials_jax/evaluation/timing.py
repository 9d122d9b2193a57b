"""Times several things in turns, so that what slows a machine down slows all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from dials_jax.compiling import program_bytes, programs_used, total_compile_seconds
from dials_jax.evaluation.items import Items
from dials_jax.evaluation.scoring import time_task
from dials_jax.evaluation.sweep_records import SweepRecords, timing_conditions
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.sampling.generation import Generation

NUM_TIMED_BATCHES = 2  # of every policy and turn


def turns(repeats: int, count: int) -> Iterator[tuple[int, int]]:
    """(repeat, number) of everything that is timed; each repeat begins with another number."""
    for repeat in range(repeats):
        for turn in range(count):
            yield repeat, (repeat + turn) % count


@dataclass
class Timings:
    """The times of one way to generate.

    Attributes:
      outs: of the first run, which is not timed.
      compile_seconds: that its programs took.
      program_bytes: on a device, of the largest of its programs.
      seconds: of every timed run, without compilation.
    """

    outs: Sequence[Generation]
    compile_seconds: float
    program_bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the timed runs; without one the first run's."""
        return float(np.median(self.seconds or [total_seconds(self.outs)]))

    @property
    def spread(self) -> float:
        """Half the range."""
        return (max(self.seconds) - min(self.seconds)) / 2 if self.seconds else 0.0


def time_in_turns(
    runs: Sequence[Callable[[], Sequence[Generation]]],
    repeats: int,
    on_progress: Callable[[], Any] = lambda: None,
) -> list[Timings]:
    """Generates once under everything, which compiles it, and then `repeats` times in turns."""
    found = []
    for run in runs:
        before = total_compile_seconds()
        with programs_used() as programs:
            outs = run()
        largest = max(map(program_bytes, programs), default=0)
        found.append(Timings(outs, total_compile_seconds() - before, largest))
        on_progress()
    for _, number in turns(repeats, len(runs)):
        found[number].seconds.append(total_seconds(runs[number]()))
        on_progress()
    return found


def total_seconds(outs: Sequence[Generation]) -> float:
    return sum(out.flops.seconds for out in outs)


def time_policies(
    records: SweepRecords,
    cfg: EvalConfig,
    model: Model,
    task: EvalTask,
    items: Items,
    policies: Sequence[tuple[Mapping[str, Any], Policy | None]],
) -> None:
    """Times every policy `cfg.timing_repeats` times; every turn begins with another one.

    Each time is stored once it is measured. Before its first one in this process a policy runs
    once untimed.

    Args:
      policies: as `Candidate.describe` describes them, and themselves.
    """
    measured = timing_conditions(cfg, task, model) | {"num_batches": NUM_TIMED_BATCHES}
    warm: set[int] = set()

    def run(policy: Policy | None) -> float:
        args = model, task, items, policy, cfg.batch_size, cfg.seed
        return time_task(*args, NUM_TIMED_BATCHES)

    for repeat, number in turns(cfg.timing_repeats, len(policies)):
        described, policy = policies[number]
        if repeat in records.timings(task.name, described, measured):
            continue
        if number not in warm:
            run(policy)
            warm.add(number)
        records.add_timing(task.name, described, measured, repeat, run(policy))
    if jax.process_index() == 0 and cfg.timing_repeats:
        print(f"{task.name}: {cfg.timing_repeats} times in turns", flush=True)
