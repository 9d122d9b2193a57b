"""Scores evaluation items under one policy: exact match, multiple choice, NELBO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from dials_jax.data.tokenizer import Tokenizer
from dials_jax.evaluation.batched import generation_batches, likelihood_batches, request_keys
from dials_jax.evaluation.exact_match import decode_to_end, is_correct
from dials_jax.evaluation.items import Item, item_names
from dials_jax.evaluation.likelihood import num_copies
from dials_jax.evaluation.tally import LayerCounts, Record, Tally, make_batch_record
from dials_jax.evaluation.task import EvalTask
from dials_jax.evaluation.task_setup import check_task, task_sampler
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.skipping.flops import Flops

NUM_EXAMPLES = 5
# Raise a metric's number when its scores change their meaning: stored ones are then refused.
METRIC_RULES = {"exact_match": 2, "choice": 1, "nelbo": 1}


@dataclass(frozen=True)
class TaskScores:
    """The scores of one policy on one task, and what they cost."""

    layer_counts: LayerCounts
    flops: Flops
    items: dict[str, float]  # score by name of the item
    other_metrics: dict[str, float]
    examples: list[dict[str, Any]]  # generations of the first items
    passes: dict[str, list[int]]  # of generations: own model calls and tokens, by name of the item
    num_calls: int  # model calls of all batches


def score_task(
    model: Model,
    task: EvalTask,
    items: Sequence[Item],
    tokenizer: Tokenizer,
    policy: Policy | None,
    batch_size: int,
    seed: int,
    on_progress: Callable[[int], Any] = lambda num_sequences: None,
    records: Sequence[Record] = (),
    on_record: Callable[[dict[str, Any]], Any] = lambda record: None,
) -> TaskScores:
    """Scores every item. Keys come from seed and item, whatever the order and the batches.

    Args:
      on_progress: called with the number of sequences that were scored since the last call.
      records: of batches that an earlier call scored; their sequences are not scored again.
      on_record: called with the record of every batch as soon as it is scored.
    """
    check_task(task, items, model)
    tally = Tally(model.num_layers, _copies_per_pair(task, items, policy), records)
    on_progress(tally.num_done)
    score = _score_exact_match if task.metric == "exact_match" else _score_likelihoods
    for record in score(tally, model, task, items, tokenizer, policy, batch_size, seed):
        on_record(record)
        done = tally.num_done
        tally.add(record)
        on_progress(tally.num_done - done)
    return _task_scores(task, items, tally)


def _task_scores(task: EvalTask, items: Sequence[Item], tally: Tally) -> TaskScores:
    names = item_names(items)
    values = [
        np.array([tally.mean(pair) for pair in _pair_names(task, name, item)])
        for name, item in zip(names, items, strict=True)
    ]
    scores = {
        name: _item_score(task, item, own)
        for name, item, own in zip(names, items, values, strict=True)
    }
    other_metrics = {}
    if task.metric == "choice":
        other_metrics["accuracy_per_token"] = _accuracy_per_token(items, values)
    examples = [tally.examples[name] for name in names[:NUM_EXAMPLES] if name in tally.examples]
    return TaskScores(
        tally.layer_counts, tally.flops, scores, other_metrics, examples, tally.passes,
        tally.num_calls,
    )  # fmt: skip


def _item_score(task: EvalTask, item: Item, values: Float[np.ndarray, "answers"]) -> float:
    """The score of an item.

    Args:
      values: one per answer: 1 or 0 for a generated one, or a log-likelihood in nats.
    """
    if task.metric == "exact_match":
        return float(values[0])
    if task.metric == "nelbo":
        return float(-values[0] / len(item.answers[0]))
    return float(np.argmax(values) == item.label)


def _pair_names(task: EvalTask, name: str, item: Item) -> list[str]:
    """The names of an item's pairs of prompt and answer; an item to generate for has one pair."""
    if task.metric == "exact_match":
        return [name]
    return [f"{name}.{number}" for number in range(len(item.answers))]


def _copies_per_pair(
    task: EvalTask, items: Sequence[Item], policy: Policy | None
) -> dict[str, int]:
    """The number of copies to score of each pair of prompt and answer, by its name."""
    generated = task.metric == "exact_match"
    return {
        pair: 1 if generated else num_copies(len(answer), task.num_samples, policy)
        for name, item in zip(item_names(items), items, strict=True)
        for pair, answer in zip(_pair_names(task, name, item), item.answers, strict=True)
    }


def count_sequences(task: EvalTask, items: Sequence[Item], policy: Policy | None) -> int:
    """The number of sequences that `score_task` scores, all copies counted."""
    return sum(_copies_per_pair(task, items, policy).values())


def item_keys(seed: int, items: Sequence[Item]) -> jax.Array:
    """One random key per item, from the seed and the item's content."""
    return request_keys(seed, [item.key for item in items])


# ----------------------------------------------------------------------------------- generation


def _score_exact_match(
    tally: Tally, model, task, items, tokenizer, policy, batch_size, seed
) -> Iterator[dict[str, Any]]:
    """Generates for the items without a score, and yields the record of every batch."""
    sampler, names = task_sampler(task, items), item_names(items)
    unscored, _ = tally.unscored(names)
    for requests, answers, out in generation_batches(
        model,
        [item.prompt for item in items],
        sampler=sampler,
        policy=policy,
        cache=task.cache,
        keys=item_keys(seed, items),
        batch_size=batch_size,
        bucket=task.bucket,
        max_programs=task.max_programs,
        remaining=unscored,
    ):
        layer_counts, scores, examples = LayerCounts(model.num_layers), [], {}
        # A share of 0 is left out: the call was made for other sequences of the batch.
        share = np.where(out.own, out.masked_share[:, : len(requests)], 0.0)
        layer_counts.add(out.gates, share)
        for i, answer in zip(requests, answers, strict=True):
            text, correct = _score_output(task, items[i], answer.tolist(), tokenizer, model.config)
            scores.append(float(correct))
            if i < NUM_EXAMPLES:
                examples[names[i]] = {
                    "prompt": tokenizer.decode(list(items[i].prompt)),
                    "output": text,
                    "reference": items[i].reference,
                    "correct": correct,
                }
        yield make_batch_record(
            [names[i] for i in requests],
            [0] * len(requests),
            scores,
            out.flops,
            layer_counts,
            examples,
            out,
        )


def _score_output(task, item: Item, tokens: list[int], tokenizer, cfg) -> tuple[str, bool]:
    """Decodes the tokens before the first end of text, and compares them with the reference."""
    text = decode_to_end(tokens, tokenizer, cfg, task.until)
    return text, is_correct(task, text, item.reference)


# ----------------------------------------------------------------------------------- likelihood


def _score_likelihoods(
    tally: Tally, model, task, items, tokenizer, policy, batch_size, seed
) -> Iterator[dict[str, Any]]:
    """Estimates log p (nats) of the copies without a score; yields the record of every batch."""
    names = list(_copies_per_pair(task, items, policy))
    item_of_pair = [i for i, item in enumerate(items) for _ in item.answers]
    for requests, copies, scores, flops in likelihood_batches(
        model,
        [(item.prompt, answer) for item in items for answer in item.answers],
        num_samples=task.num_samples,
        cfg_scale=task.cfg_scale,
        policy=policy,
        keys=item_keys(seed, items)[np.asarray(item_of_pair)],  # choices share their masks
        batch_size=batch_size,
        bucket=task.bucket,
        max_programs=task.max_programs,
        remaining=tally.unscored(names),
    ):
        layer_counts = LayerCounts(model.num_layers)
        layer_counts.add(scores.gates, scores.masked_share)
        yield make_batch_record(
            [names[i] for i in requests],
            copies.tolist(),
            scores.log_likelihood.tolist(),
            flops,
            layer_counts,
        )


def _accuracy_per_token(items: Sequence[Item], likelihoods: Sequence[np.ndarray]) -> float:
    """The accuracy if choices are compared by log-likelihood per token instead of in total."""
    correct = [
        np.argmax(values / [len(a) for a in item.answers]) == item.label
        for item, values in zip(items, likelihoods, strict=True)
    ]
    return float(np.mean(correct))
