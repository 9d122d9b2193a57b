"""Times the policies of a sweep in turns, so that what slows a machine down slows all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dials_jax.evaluation.items import Items
from dials_jax.evaluation.scoring import time_task
from dials_jax.evaluation.sweep_records import SweepRecords, timing_conditions
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy

NUM_TIMED_BATCHES = 2  # of every policy and turn


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

    for repeat in range(cfg.timing_repeats):
        for turn in range(len(policies)):
            number = (repeat + turn) % len(policies)
            described, policy = policies[number]
            if repeat in records.timings(task.name, described, measured):
                continue
            if number not in warm:
                run(policy)
                warm.add(number)
            records.add_timing(task.name, described, measured, repeat, run(policy))
    if jax.process_index() == 0 and cfg.timing_repeats:
        print(f"{task.name}: {cfg.timing_repeats} times in turns", flush=True)
