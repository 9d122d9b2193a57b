"""What the runs of a sweep will take, from the lengths of the items and the shape of the model."""

from __future__ import annotations

from collections.abc import Sequence

from dials_jax.estimates import RunEstimate
from dials_jax.evaluation.candidates import Candidate
from dials_jax.evaluation.items import Item
from dials_jax.evaluation.likelihood import num_copies
from dials_jax.evaluation.request_cost import generation_cost, likelihood_cost
from dials_jax.evaluation.sweep_records import SweepRecords
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.evaluation.task_setup import task_sampler
from dials_jax.models.model import Model


def sweep_cost(
    cfg: EvalConfig,
    model: Model,
    tasks: Sequence[tuple[EvalTask, Sequence[Item]]],
    known: Sequence[Candidate],
    num_static: int,
    records: SweepRecords,
) -> RunEstimate | None:
    """The cost of the runs that are not finished, if every layer runs; None if all are.

    Args:
      known: policies of every task, but for static ones.
      num_static: of these, whose layers may not be chosen yet.
    """
    tokens, flops, memory = 0, 0.0, {}
    for task, items in tasks:
        left = max(0, num_static - records.num_finished(task.name, "static"))
        left += sum(not records.is_finished(task.name, one.describe()) for one in known)
        if not (left and len(items)):
            continue
        own = task_cost(task, items, model, cfg.batch_size)
        tokens, flops = tokens + left * own.tokens, flops + left * own.flops
        for name, size in own.memory.items():
            memory[name] = max(memory.get(name, 0.0), size)
    return RunEstimate(tokens, flops, memory) if tokens else None


def task_cost(task: EvalTask, items: Sequence[Item], model: Model, batch_size: int) -> RunEstimate:
    """Of one policy."""
    if task.generates:
        lengths = [len(item.prompt) for item in items]
        return generation_cost(model, lengths, task_sampler(task, items), task.cache, batch_size)
    pairs = [
        (len(item.prompt), n, num_copies(model.config, n, task.num_samples, None))
        for item in items
        for n in map(len, item.answers)
    ]
    return likelihood_cost(model, pairs, task.cfg_scale, batch_size)
