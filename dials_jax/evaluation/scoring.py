"""Scores of evaluation items under one policy: exact match, multiple choice, NELBO."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.early_skip.settings import EarlySkip
from dials_jax.caching.plain import DualCache, PrefixCache
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.errors import InputError, require
from dials_jax.evaluation.answers import is_right
from dials_jax.evaluation.batched import (
    check_num_samples,
    generation_batches,
    likelihood_batches,
    request_keys,
)
from dials_jax.evaluation.earned import Earned, Record, batch_record
from dials_jax.evaluation.execution import Execution
from dials_jax.evaluation.items import Item, item_names
from dials_jax.evaluation.likelihood import num_copies
from dials_jax.evaluation.task import CacheConfig, EvalTask, SamplerConfig
from dials_jax.keys import seed_key
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.models.padding import pad_prompts
from dials_jax.nn.policy import Policy
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.loop import blocks_of
from dials_jax.skipping.flops import Flops

NUM_EXAMPLES = 5
# Raised where a metric's scores change their meaning: kept ones are then not continued.
METRIC_RULES = {"exact_match": 2, "choice": 1, "nelbo": 1}


@dataclass(frozen=True)
class TaskScores:
    """What one policy does on one task; `items` maps an item's key to its score."""

    execution: Execution
    flops: Flops
    items: dict[str, float]
    also: dict[str, float]
    examples: list[dict[str, Any]]  # of the first items


def score_task(
    model: Model,
    task: EvalTask,
    items: Sequence[Item],
    tokenizer: Tokenizer,
    policy: Policy | None,
    batch_size: int,
    seed: int,
    progress: Callable[[int], Any] = lambda n: None,
    records: Sequence[Record] = (),
    keep: Callable[[dict[str, Any]], Any] = lambda record: None,
) -> TaskScores:
    """Scores every item. Keys come from seed and item, whatever the order and the batches.

    Args:
      progress: told how many sequences are done.
      records: of batches that an earlier call scored; what they hold is not scored again.
      keep: told the record of every batch as soon as it is earned.
    """
    check_task(task, items, model)
    earned = Earned(model.num_layers, _pairs(task, items, policy), records)
    progress(earned.num_done)
    score = _exact_match if task.metric == "exact_match" else _likelihoods
    for record in score(earned, model, task, items, tokenizer, policy, batch_size, seed):
        keep(record)
        done = earned.num_done
        earned.add(record)
        progress(earned.num_done - done)
    return _task_scores(task, items, earned)


def _task_scores(task: EvalTask, items: Sequence[Item], earned: Earned) -> TaskScores:
    names = item_names(items)
    values = [
        np.array([earned.mean(pair) for pair in _pair_names(task, name, item)])
        for name, item in zip(names, items, strict=True)
    ]
    found = {
        name: _item_score(task, item, own)
        for name, item, own in zip(names, items, values, strict=True)
    }
    also = {}
    if task.metric == "choice":
        also["accuracy_per_token"] = _accuracy_per_token(items, values)
    examples = [earned.examples[name] for name in names[:NUM_EXAMPLES] if name in earned.examples]
    return TaskScores(earned.execution, earned.flops, found, also, examples)


def _item_score(task: EvalTask, item: Item, values: Float[np.ndarray, "answers"]) -> float:
    """By the values of its answers: whether text was right, or log-likelihoods in nats."""
    if task.metric == "exact_match":
        return float(values[0])
    if task.metric == "nelbo":
        return float(-values[0] / len(item.answers[0]))
    return float(np.argmax(values) == item.label)


def _pair_names(task: EvalTask, name: str, item: Item) -> list[str]:
    """Names of an item's pairs of prompt and answer; a generated answer is one."""
    if task.metric == "exact_match":
        return [name]
    return [f"{name}.{number}" for number in range(len(item.answers))]


def _pairs(task: EvalTask, items: Sequence[Item], policy: Policy | None) -> dict[str, int]:
    """The names of all pairs, and how many copies of each are scored."""
    generated = task.metric == "exact_match"
    return {
        pair: 1 if generated else num_copies(len(answer), task.num_samples, policy)
        for name, item in zip(item_names(items), items, strict=True)
        for pair, answer in zip(_pair_names(task, name, item), item.answers, strict=True)
    }


def check_task(
    task: EvalTask,
    items: Sequence[Item],
    model: Model,
    policies: Mapping[str, Policy | None] | None = None,
) -> None:
    """Checks what would stop `score_task` half-way.

    Args:
      policies: by what messages call them; None: the full model alone.
    Raises: InputError for settings that do not fit each other, the model, a policy or the items.
    """
    prompt_length = max(len(item.prompt) for item in items)
    if task.metric == "exact_match":
        sampler = sampler_for(task, items)
        length = sampler.gen_length
        for label, policy in (policies or {"full": None}).items():
            try:
                check_generation(sampler, task.cache, policy, items, model)
            except InputError as error:
                raise InputError(f"task {task.name!r}, {label}: {error}") from error
        if model.config.model_type == "dream" and isinstance(sampler, Confidence):
            warnings.warn(
                f"task {task.name!r}: this Dream model is sampled by LLaDA's rules, at temperature "
                f"{sampler.temperature:g}; its published numbers are of sampler=Dream(...), with "
                "alg, temperature and top_p",
                stacklevel=1,  # one place, so that it is said once
            )
    else:
        length = max(len(answer) for item in items for answer in item.answers)
        check_num_samples(task.num_samples)
    total, limit = prompt_length + length, model.config.max_length
    require(
        total <= limit,
        f"task {task.name!r}: prompt and answer may take {total} tokens, but the model has "
        f"{limit} positions; shorten them",
    )


def check_generation(
    sampler: SamplerConfig,
    cache: CacheConfig | None,
    policy: Policy | None,
    items: Sequence[Item],
    model: Model,
) -> None:
    """Raises: InputError for a sampler that does not fit the cache, the policy or the model."""
    cfg, prompt_length = model.config, max(len(item.prompt) for item in items)
    _, present = pad_prompts([item.prompt for item in items], prompt_length, cfg.pad_id)
    sampler.check(cfg, present, policy, cache)
    if cache is None:
        return
    shape = (1, prompt_length + sampler.gen_length)
    block_inputs = jax.eval_shape(lambda: transformer.block_inputs(cfg, None, shape))
    guided = jnp.ones(shape, bool) if sampler.cfg_scale > 0 else None
    net = CanvasModel(cfg, model.params, policy, "auto", block_inputs, None, guided, prompt_length)
    blocks = blocks_of(sampler, prompt_length)
    jax.eval_shape(lambda: cache.init_state(net, blocks))
    sampler.make_steps(net, prompt_length, seed_key(0)[None], cache)


def num_rows(task: EvalTask, items: Sequence[Item], policy: Policy | None) -> int:
    """Rows that `score_task` runs, for its progress."""
    return sum(_pairs(task, items, policy).values())


def item_keys(seed: int, items: Sequence[Item]) -> jax.Array:
    return request_keys(seed, [item.key for item in items])


# ----------------------------------------------------------------------------------- generation


def generation_facts(task: EvalTask, items: Sequence[Item]) -> dict[str, Any]:
    """How a task's texts are made and where they end, for results and reports; {} if none are.

    It holds all settings of the sampler and of the cache, so scores depend on it.
    """
    if task.metric != "exact_match":
        return {}
    sampler = sampler_for(task, items)
    facts = {"sampler": type(sampler).__name__.lower(), "temperature": None, "steps": None}
    return facts | asdict(sampler) | {"cache": cache_name(task.cache), "until": list(task.until)}


def sampler_for(task: EvalTask, items: Sequence[Item]) -> SamplerConfig:
    """The task's sampler, or LLaDA's for as many tokens as its answers may have."""
    if task.sampler is not None:
        return task.sampler
    length = getattr(task.data, "answer_length", None)
    return Confidence(length or max(len(item.answers[0]) for item in items))


def cache_name(cache: CacheConfig | None) -> str:
    """`none`, `prefix`, `dual`, or `es-PROMPT-BLOCK` and what else is not by default."""
    if cache is None:
        return "none"
    if not isinstance(cache, EarlySkip):
        return {PrefixCache: "prefix", DualCache: "dual"}[type(cache)]
    named = {"prompt_every": cache.prompt_every, "block_every": cache.block_every}
    settings, default = asdict(cache), asdict(EarlySkip(**named))
    others = [f"{name} {x}" for name, x in settings.items() if x != default[name]]
    return ", ".join([f"es-{cache.prompt_every}-{cache.block_every}", *others])


def _exact_match(
    earned: Earned, model, task, items, tokenizer, policy, batch_size, seed
) -> Iterator[dict[str, Any]]:
    """Generates what is not scored yet; yields the record of every batch."""
    sampler, names = sampler_for(task, items), item_names(items)
    left, _ = earned.left(names)
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
        left=left,
    ):
        execution, scores, examples = Execution(model.num_layers), [], {}
        waits, shares = sampler.reveals_every_call, out.masked_share
        execution.add(out.gates, waiting_as_zero(shares) if waits else shares)
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
        where = [names[i] for i in requests], [0] * len(requests)
        yield batch_record(*where, scores, out.flops, execution, examples)


def waiting_as_zero(masked_share: Float[np.ndarray, "S R"]) -> Float[np.ndarray, "S R"]:
    """The shares, 0 where a call revealed nothing: the sequence waited for others of its batch."""
    after = np.append(masked_share[1:], np.zeros_like(masked_share[:1]), axis=0)
    return np.where(after < masked_share, masked_share, 0.0)


def _score_output(task, item: Item, row: list[int], tokenizer, cfg) -> tuple[str, bool]:
    """The text before its first end, and whether it is right.

    Texts end at end of text, and at a stop string that is one token: it may not be decoded.
    """
    stops = {cfg.eos_id, cfg.eot_id, *map(tokenizer.token_to_id, task.until)}
    ends = [i for i, token in enumerate(row) if token in stops]
    text = tokenizer.decode(row[: ends[0]] if ends else row)
    return text, is_right(task, text, item.reference)


# ----------------------------------------------------------------------------------- likelihood


def _likelihoods(
    earned: Earned, model, task, items, tokenizer, policy, batch_size, seed
) -> Iterator[dict[str, Any]]:
    """Log-likelihoods, in nats, of copies that are not scored yet; yields every batch's record."""
    names = list(_pairs(task, items, policy))
    owners = [i for i, item in enumerate(items) for _ in item.answers]
    for requests, copies, scores, flops in likelihood_batches(
        model,
        [(item.prompt, answer) for item in items for answer in item.answers],
        num_samples=task.num_samples,
        cfg_scale=task.cfg_scale,
        policy=policy,
        keys=item_keys(seed, items)[np.asarray(owners)],  # an item's choices share their masks
        batch_size=batch_size,
        bucket=task.bucket,
        max_programs=task.max_programs,
        left=earned.left(names),
    ):
        execution = Execution(model.num_layers)
        execution.add(scores.gates, scores.masked_share)
        where = [names[i] for i in requests], copies.tolist()
        yield batch_record(*where, scores.log_likelihood.tolist(), flops, execution)


def _accuracy_per_token(items: Sequence[Item], likelihoods: Sequence[np.ndarray]) -> float:
    """Accuracy when choices are compared by log-likelihood a token, not in all."""
    correct = [
        np.argmax(values / [len(a) for a in item.answers]) == item.label
        for item, values in zip(items, likelihoods, strict=True)
    ]
    return float(np.mean(correct))
