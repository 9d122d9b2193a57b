"""Scores evaluation items under one policy: generated outputs, multiple choice, NELBO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from dials_jax.config import ModelConfig
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.evaluation.batched import generation_batches, likelihood_batches, request_keys
from dials_jax.evaluation.items import Item, item_names
from dials_jax.evaluation.likelihood import num_copies
from dials_jax.evaluation.outputs import execute_outputs, score_output
from dials_jax.evaluation.tally import LayerCounts, Record, Tally, make_batch_record
from dials_jax.evaluation.task import EvalTask
from dials_jax.evaluation.task_setup import check_task, task_sampler
from dials_jax.evaluation.text_end import cut_tokens
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.skipping.flops import Flops

NUM_EXAMPLES = 5


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
    tally = Tally(model.num_layers, _copies_per_pair(model.config, task, items, policy), records)
    on_progress(tally.num_done)
    measure = _generate_outputs if task.generates else _score_likelihoods
    for record in measure(tally, model, task, items, policy, batch_size, seed):
        on_record(record)
        done = tally.num_done
        tally.add(record)
        on_progress(tally.num_done - done)
    if task.metric == "code":
        by_name = dict(zip(item_names(items), items, strict=True))
        for record in execute_outputs(task, by_name, tally.outputs, tally.verdicts, tokenizer):
            on_record(record)
            tally.add(record)
    return _task_scores(task, items, tally, tokenizer)


def time_task(
    model: Model,
    task: EvalTask,
    items: Sequence[Item],
    policy: Policy | None,
    batch_size: int,
    seed: int,
    num_batches: int,
) -> float:
    """Runs the longest sequences of a task, about so many batches, for their time alone.

    The programs are those of `score_task`. Returns: seconds, without compilation.
    """
    copies = _copies_per_pair(model.config, task, items, policy)
    tally = Tally(model.num_layers, copies)
    lengths = {
        pair: len(item.prompt) + len(answer)
        for name, item in zip(item_names(items), items, strict=True)
        for pair, answer in zip(_pair_names(task, name, item), item.answers, strict=True)
    }
    chosen: list[str] = []
    for pair in sorted(lengths, key=lambda pair: -lengths[pair]):
        if sum(copies[x] for x in chosen) < num_batches * batch_size:
            chosen.append(pair)
    tally.keep_only(chosen)
    measure = _generate_outputs if task.generates else _score_likelihoods
    done = measure(tally, model, task, items, policy, batch_size, seed)
    return sum(record["flops"]["seconds"] for record in done)


def _task_scores(
    task: EvalTask, items: Sequence[Item], tally: Tally, tokenizer: Tokenizer
) -> TaskScores:
    names, other_metrics, examples = item_names(items), {}, []
    if task.generates:
        scores, examples = _score_outputs(task, items, tally, tokenizer)
    else:
        values = [
            np.array([tally.mean(pair) for pair in _pair_names(task, name, item)])
            for name, item in zip(names, items, strict=True)
        ]
        scores = {
            name: _item_score(task, item, own)
            for name, item, own in zip(names, items, values, strict=True)
        }
        if task.metric == "choice":
            other_metrics |= _length_normalised(items, values)
            other_metrics["chance"] = float(np.mean([1 / len(item.answers) for item in items]))
    if task.mean_over:
        other_metrics[f"mean_over_{task.mean_over}"] = _mean_of_groups(items, scores.values())
    return TaskScores(
        tally.layer_counts, tally.flops, scores, other_metrics, examples, tally.passes,
        tally.num_calls,
    )  # fmt: skip


def _length_normalised(
    items: Sequence[Item], likelihoods: Sequence[np.ndarray]
) -> dict[str, float]:
    """The accuracies if choices are compared per token, and per character where these are known."""
    units = {"accuracy_per_token": "tokens"}
    if all(item.characters for item in items):
        units["accuracy_per_character"] = "characters"
    pairs = list(zip(items, likelihoods, strict=True))
    return {
        name: float(np.mean([_choose(item, own, unit) == item.label for item, own in pairs]))
        for name, unit in units.items()
    }


def _mean_of_groups(items: Sequence[Item], scores: Iterable[float]) -> float:
    """The mean of the groups' mean scores, where every group counts alike."""
    groups: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        groups.setdefault(item.group, []).append(score)
    return float(np.mean([np.mean(own) for own in groups.values()]))


def _item_score(task: EvalTask, item: Item, values: Float[np.ndarray, "answers"]) -> float:
    """The score of an item, from the log-likelihoods of its answers in nats."""
    if task.metric == "nelbo":
        return float(-values[0] / len(item.answers[0]))
    return float(_choose(item, values, task.normalise) == item.label)


def _choose(item: Item, values: Float[np.ndarray, "answers"], unit: str) -> int:
    """The choice of the highest log-likelihood, in total or per unit of its length."""
    lengths = {
        "none": [1] * len(item.answers),
        "tokens": [len(answer) for answer in item.answers],
        "characters": item.characters,
    }[unit]
    return int(np.argmax(values / np.asarray(lengths)))


def _pair_names(task: EvalTask, name: str, item: Item) -> list[str]:
    """The names of an item's pairs of prompt and answer; an item to generate for has one pair."""
    if task.generates:
        return [name]
    return [f"{name}.{number}" for number in range(len(item.answers))]


def _copies_per_pair(
    cfg: ModelConfig, task: EvalTask, items: Sequence[Item], policy: Policy | None
) -> dict[str, int]:
    """The number of copies to score of each pair of prompt and answer, by its name."""
    return {
        pair: 1 if task.generates else num_copies(cfg, len(answer), task.num_samples, policy)
        for name, item in zip(item_names(items), items, strict=True)
        for pair, answer in zip(_pair_names(task, name, item), item.answers, strict=True)
    }


def count_sequences(
    cfg: ModelConfig, task: EvalTask, items: Sequence[Item], policy: Policy | None
) -> int:
    """The number of sequences that `score_task` scores, all copies counted."""
    return sum(_copies_per_pair(cfg, task, items, policy).values())


def item_keys(seed: int, items: Sequence[Item]) -> jax.Array:
    """One random key per item, from the seed and the item's content."""
    return request_keys(seed, [item.key for item in items])


# ----------------------------------------------------------------------------------- generation


def _generate_outputs(
    tally: Tally, model, task, items, policy, batch_size, seed
) -> Iterator[dict[str, Any]]:
    """Generates for the items without an output, and yields the record of every batch."""
    sampler, names, cfg = task_sampler(task, items), item_names(items), model.config
    missing, _ = tally.unscored(names)
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
        remaining=missing,
    ):
        layer_counts, chosen = LayerCounts(model.num_layers), [names[i] for i in requests]
        # A share of 0 is left out: the call was made for other sequences of the batch.
        share = np.where(out.own, out.masked_share[:, : len(requests)], 0.0)
        layer_counts.add(out.gates, share)
        outputs = [cut_tokens(answer, (cfg.eos_id, cfg.eot_id)) for answer in answers.tolist()]
        yield make_batch_record(
            chosen,
            [0] * len(chosen),
            [0.0] * len(chosen),
            out.flops,
            layer_counts,
            generation=out,
            outputs=dict(zip(chosen, outputs, strict=True)),
        )


def _score_outputs(
    task: EvalTask, items: Sequence[Item], tally: Tally, tokenizer: Tokenizer
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Scores by name, and the first outputs as text."""
    scores, examples = {}, []
    for number, (name, item) in enumerate(zip(item_names(items), items, strict=True)):
        example = tally.examples.get(name)
        if name not in tally.outputs:  # scored by an earlier version
            scores[name] = tally.mean(name)
        else:
            _, verdict = tally.verdicts.get(name, ("", ""))
            scored = score_output(task, item, tally.outputs[name], tokenizer, verdict)
            scores[name] = scored.score
            example = {
                "prompt": tokenizer.decode(list(item.prompt)),
                "output": scored.text,
                "reference": item.reference,
                "correct": scored.score == 1,
            } | ({"verdict": verdict} if verdict else {})
        if example and number < NUM_EXAMPLES:
            examples.append(example)
    return scores, examples


# ----------------------------------------------------------------------------------- likelihood


def _score_likelihoods(
    tally: Tally, model, task, items, policy, batch_size, seed
) -> Iterator[dict[str, Any]]:
    """Estimates log p (nats) of the copies without a score; yields the record of every batch."""
    names = list(_copies_per_pair(model.config, task, items, policy))
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
