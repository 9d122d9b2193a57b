"""What the runs of a sweep will take, from the lengths of the items and the shape of the model."""

from __future__ import annotations

from collections.abc import Sequence

from dials_jax.caching.plain import NoCache
from dials_jax.config import ModelConfig
from dials_jax.estimates import (
    RunEstimate,
    activation_bytes,
    cache_bytes,
    device_bytes,
    forward_flops,
    generation_flops,
)
from dials_jax.evaluation.candidates import Candidate
from dials_jax.evaluation.items import Item
from dials_jax.evaluation.likelihood import ANSWER_CHUNK, num_copies
from dials_jax.evaluation.sweep_records import SweepRecords
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.evaluation.task_setup import task_sampler
from dials_jax.models.model import Model
from dials_jax.sharding import num_batch_shards


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
    tokens, flops, working = 0, 0.0, {"activations": 0.0, "cache": 0.0}
    batch = -(-cfg.batch_size // num_batch_shards(model.mesh))
    for task, items in tasks:
        left = max(0, num_static - records.num_finished(task.name, "static"))
        left += sum(not records.is_finished(task.name, one.describe()) for one in known)
        if not (left and len(items)):
            continue
        own_tokens, own_flops = task_work(task, items, model.config)
        tokens, flops = tokens + left * own_tokens, flops + left * own_flops
        for name, size in task_memory(task, items, model.config, batch).items():
            working[name] = max(working[name], size)
    if not tokens:
        return None
    return RunEstimate(tokens, flops, {"weights": device_bytes(model.params), **working})


def task_work(task: EvalTask, items: Sequence[Item], cfg: ModelConfig) -> tuple[int, int | float]:
    """Tokens that one policy generates or scores on a task, and its FLOPs, without padding."""
    if task.generates:
        sampler = task_sampler(task, items)
        of_length = {len(item.prompt): 0.0 for item in items}
        for length in of_length:
            of_length[length] = generation_flops(cfg, sampler, task.cache, length)
        return len(items) * sampler.gen_length, sum(of_length[len(x.prompt)] for x in items)
    tokens, flops = 0, 0.0
    for item in items:
        for answer in item.answers:
            copies = num_copies(cfg, len(answer), task.num_samples, None)
            tokens += copies * len(answer)
            copies *= 1 + (task.cfg_scale > 0)
            flops += copies * forward_flops(cfg, len(item.prompt) + len(answer), len(answer))
    return tokens, flops


def task_memory(
    task: EvalTask, items: Sequence[Item], cfg: ModelConfig, batch: int
) -> dict[str, int | float]:
    """Bytes beside the weights. Args: batch: sequences per device."""
    prompt = max(len(item.prompt) for item in items)
    if task.generates:
        sampler = task_sampler(task, items)
        length, batch = prompt + sampler.gen_length, batch * (1 + (sampler.cfg_scale > 0))
        head = max(work.head for work in sampler.work(cfg, task.cache or NoCache(), prompt))
        kept = cache_bytes(cfg, task.cache, batch, length)
    else:
        answer = max(len(answer) for item in items for answer in item.answers)
        length, batch, kept = prompt + answer, batch * (1 + (task.cfg_scale > 0)), 0.0
        head = min(answer, ANSWER_CHUNK)
    return {"activations": activation_bytes(cfg, batch, length, head), "cache": kept}
