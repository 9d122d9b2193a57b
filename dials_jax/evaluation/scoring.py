"""Scores of evaluation items under one policy: exact match, multiple choice, NELBO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dials_jax.config import EvalTask, ModelConfig, require
from dials_jax.data.items import Item, buckets, group_by_length, normalise_answer, pad_prompts
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.evaluation.execution import Execution
from dials_jax.evaluation.likelihood import pad_pairs, score_pairs
from dials_jax.models.model import Model
from dials_jax.nn.stack import Policy
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.generate import generate
from dials_jax.skipping.flops import Flops

NUM_EXAMPLES = 5
STRATUM = 16  # masked copies a round, over which their numbers of masks are spread

Progress = Callable[[int], Any]  # told how many rows are done


@dataclass
class TaskScores:
    """What one policy does on one task; `items` maps an item's key to its score."""

    execution: Execution
    items: dict[str, float] = field(default_factory=dict)
    also: dict[str, float] = field(default_factory=dict)
    costs: list[Flops] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def flops(self) -> Flops:
        return Flops.sum(self.costs)


def score_task(
    model: Model,
    task: EvalTask,
    items: Sequence[Item],
    tokenizer: Tokenizer,
    policy: Policy | None,
    batch_size: int,
    seed: int,
    progress: Progress = lambda n: None,
) -> TaskScores:
    """Scores every item. Keys come from seed and item: order and batches do not matter."""
    check_task(task, items, model.config)
    scores = TaskScores(Execution(model.num_layers))
    if task.metric == "exact_match":
        _exact_match(scores, model, task, items, tokenizer, policy, batch_size, seed, progress)
        return scores
    likelihoods = _likelihoods(scores, model, task, items, policy, batch_size, seed, progress)
    for item, values in zip(items, likelihoods, strict=True):
        lengths = [len(answer) for answer in item.answers]
        if task.metric == "nelbo":
            scores.items[str(item.key)] = -values[0] / lengths[0]
        else:
            scores.items[str(item.key)] = float(np.argmax(values) == item.label)
    if task.metric == "choice":
        scores.also["accuracy_per_token"] = _accuracy_per_token(items, likelihoods)
    return scores


def check_task(task: EvalTask, items: Sequence[Item], cfg: ModelConfig) -> None:
    """Raises: InputError for settings under which `score_task` would fail half-way."""
    if task.metric == "exact_match":
        length = sampler_for(task, items).gen_length
    else:
        length = max(len(answer) for item in items for answer in item.answers)
        require(
            task.num_samples % min(STRATUM, task.num_samples) == 0,
            f"task {task.name!r}: num_samples={task.num_samples} must be a multiple of {STRATUM}",
        )
    total = max(len(item.prompt) for item in items) + length
    require(
        total <= cfg.max_length,
        f"task {task.name!r}: prompt and answer may take {total} tokens, but the model has "
        f"{cfg.max_length} positions; shorten them",
    )


def num_rows(task: EvalTask, items: Sequence[Item]) -> int:
    """Rows that `score_task` runs, for its progress."""
    if task.metric == "exact_match":
        return len(items)
    return task.num_samples * sum(len(item.answers) for item in items)


def item_keys(seed: int, items: Sequence[Item]) -> jax.Array:
    numbers = jnp.asarray([item.key for item in items], jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)


# ----------------------------------------------------------------------------------- generation


def sampler_for(task: EvalTask, items: Sequence[Item]) -> Confidence:
    """The task's sampler: as many tokens as its answers may have, one block, one token a step."""
    length = getattr(task.data, "answer_length", None)
    length = length or max(len(item.answers[0]) for item in items)
    return Confidence(
        gen_length=length,
        block_length=task.block_length or length,
        steps=task.steps or length,
        cfg_scale=task.cfg_scale,
    )


def _exact_match(
    scores: TaskScores, model, task, items, tokenizer, policy, batch_size, seed, progress
) -> None:
    cfg, sampler = model.config, sampler_for(task, items)
    lengths = buckets([len(item.prompt) for item in items], task.bucket)
    for group in group_by_length(items, lambda item: len(item.prompt), batch_size, task.bucket):
        members = [items[i] for i in group]
        tokens, valid = pad_prompts([m.prompt for m in members], lengths[group[0]], cfg.pad_id)
        out = generate(
            model,
            tokens,
            None if valid.all() else valid,
            sampler=sampler,
            policy=policy,
            key=item_keys(seed, members),
            fill_to=batch_size,
        )
        scores.execution.add(out.gates, out.masked_share)
        scores.costs.append(out.flops)
        for item, row in zip(members, out.tokens[:, tokens.shape[1] :], strict=True):
            _score_output(scores, task, item, row.tolist(), tokenizer, cfg)
        progress(len(members))


def _score_output(scores: TaskScores, task, item: Item, row: list[int], tokenizer, cfg) -> None:
    """Compares the text before the first end of text."""
    ends = [i for i, token in enumerate(row) if token in (cfg.eos_id, cfg.eot_id)]
    text = tokenizer.decode(row[: ends[0]] if ends else row)
    expected = normalise_answer(item.reference, task.extract)
    correct = normalise_answer(text, task.extract) == expected
    scores.items[str(item.key)] = float(correct)
    if len(scores.examples) < NUM_EXAMPLES:
        prompt = tokenizer.decode(list(item.prompt))
        example = {"prompt": prompt, "output": text, "reference": item.reference}
        scores.examples.append(example | {"correct": correct})


# ----------------------------------------------------------------------------------- likelihood


def _likelihoods(
    scores: TaskScores, model, task, items, policy, batch_size, seed, progress
) -> list[np.ndarray]:
    """Log-likelihood of every answer of every item, in nats."""
    pairs = [(item.prompt, answer) for item in items for answer in item.answers]
    owners = [i for i, item in enumerate(items) for _ in item.answers]
    keys = item_keys(seed, items)[np.asarray(owners)]  # choices of an item share their masks
    stratum = min(STRATUM, task.num_samples)
    totals = np.zeros(len(pairs))
    prompt_sizes = buckets([len(p) for p, _ in pairs], task.bucket)
    answer_sizes = buckets([len(a) for _, a in pairs], task.bucket)
    shapes = list(zip(prompt_sizes, answer_sizes, strict=True))
    for shape in sorted(set(shapes), reverse=True):
        members = [i for i, s in enumerate(shapes) if s == shape]
        rows = np.repeat(members, task.num_samples)
        samples = np.tile(np.arange(task.num_samples), len(members))
        for first in range(0, len(rows), batch_size):
            chosen = rows[first : first + batch_size]
            out, cost = score_pairs(
                model,
                pad_pairs([pairs[i] for i in chosen], model.config, *shape),
                keys[chosen],
                samples[first : first + batch_size],
                stratum=stratum,
                cfg_scale=task.cfg_scale,
                policy=policy,
                fill_to=batch_size,
            )
            np.add.at(totals, chosen, out.log_likelihood / task.num_samples)
            scores.execution.add(out.gates, out.masked_share)
            scores.costs.append(cost)
            progress(len(chosen))
    ends = np.cumsum([len(item.answers) for item in items])
    return np.split(totals, ends[:-1])


def _accuracy_per_token(items: Sequence[Item], likelihoods: Sequence[np.ndarray]) -> float:
    """Accuracy when choices are compared by log-likelihood a token, not in all."""
    correct = [
        np.argmax(values / [len(a) for a in item.answers]) == item.label
        for item, values in zip(items, likelihoods, strict=True)
    ]
    return float(np.mean(correct))
