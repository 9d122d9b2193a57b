"""Completes the settings of a task, and checks them before anything is scored."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dials_jax.caching.canvas import CanvasModel
from dials_jax.caching.parse import cache_name
from dials_jax.config import ModelConfig, to_dict
from dials_jax.errors import InputError, require
from dials_jax.evaluation.batched import check_num_samples
from dials_jax.evaluation.items import Item
from dials_jax.evaluation.own_code import code_facts
from dials_jax.evaluation.run_code import check_platform
from dials_jax.evaluation.task import PADDING_FIELDS, CacheConfig, EvalTask, SamplerConfig
from dials_jax.keys import seed_key
from dials_jax.models import transformer
from dials_jax.models.model import Model
from dials_jax.models.padding import pad_prompts
from dials_jax.nn.policy import Policy
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.sampler import Sampler


def task_sampler(task: EvalTask, items: Sequence[Item]) -> SamplerConfig:
    """The task's sampler; by default LLaDA's, as long as `answer_length` or the longest answer."""
    if task.sampler is not None:
        return task.sampler
    length = getattr(task.data, "answer_length", None)
    return Confidence(length or max(len(item.answers[0]) for item in items))


def generation_facts(task: EvalTask, items: Sequence[Item]) -> dict[str, Any]:
    """Describes how a task's texts are generated and where they end; {} if none are generated.

    The description has all settings of the sampler and of the cache, and a digest of their code
    where a user wrote it. Scores depend on it.
    """
    if not task.generates:
        return {}
    sampler = task_sampler(task, items)
    facts = {"sampler": type(sampler).__name__.lower(), "temperature": None, "steps": None}
    facts |= to_dict(sampler) | {"cache": cache_name(task.cache), "until": list(task.until)}
    return facts | code_facts(sampler=sampler, cache=task.cache)


def score_settings(task: EvalTask) -> dict[str, Any]:
    """The settings of a task that scores depend on, except those in `generation_facts`."""
    left_out = ("name", "sampler", "cache", "allow_code_execution", *PADDING_FIELDS)
    return {name: x for name, x in to_dict(task).items() if name not in left_out}


def check_permission(task: EvalTask) -> None:
    """Raises: InputError for a task that executes code unless its settings allow that."""
    if task.metric == "code":
        require(
            task.allow_code_execution,
            f"task {task.name!r} executes what the model writes; read 'Code' in "
            "docs/evaluation.md, then set allow_code_execution=True",
        )
        check_platform()


def check_task(
    task: EvalTask,
    items: Sequence[Item],
    model: Model,
    policies: Mapping[str, Policy | None] | None = None,
) -> None:
    """Checks everything that could stop `score_task` half-way.

    Args:
      policies: by label, for messages; None: the full model alone.
    Raises: InputError for settings that do not fit each other, the model, a policy or the items.
    """
    check_permission(task)
    prompt_length = max(len(item.prompt) for item in items)
    if task.generates:
        sampler = task_sampler(task, items)
        length = sampler.gen_length
        for label, policy in (policies or {"full": None}).items():
            try:
                check_generation(sampler, task.cache, policy, items, model)
            except InputError as error:
                raise InputError(f"task {task.name!r}, {label}: {error}") from error
        warn_of_sampler(f"task {task.name!r}", model, sampler)
    else:
        length = max(len(answer) for item in items for answer in item.answers)
        check_num_samples(task.num_samples)
        _check_causal(task, items, model.config)
    total, limit = prompt_length + length, model.config.max_length
    require(
        total <= limit,
        f"task {task.name!r}: prompt and answer may take {total} tokens, but the model has "
        f"{limit} positions; shorten them",
    )


def _check_causal(task: EvalTask, items: Sequence[Item], cfg: ModelConfig) -> None:
    """Raises: InputError for likelihoods that a causal model does not have."""
    require(
        not cfg.causal or all(item.prompt for item in items),
        f"task {task.name!r} has empty prompts, and nothing predicts a causal model's first "
        "token; give prompts, of rows of text by prompt_length=",
    )
    require(
        not (cfg.causal and task.cfg_scale),
        f"task {task.name!r}: cfg_scale={task.cfg_scale} hides the prompt behind [MASK], and a "
        "causal model has none; leave it out",
    )


def warn_of_sampler(where: str, model: Model, sampler: Sampler) -> None:
    """Warns of a Dream model that is sampled by LLaDA's rules."""
    if model.config.model_type == "dream" and isinstance(sampler, Confidence):
        warnings.warn(
            f"{where}: this Dream model is sampled by LLaDA's rules, at temperature "
            f"{sampler.temperature:g}; its published numbers are of sampler=Dream(...), with alg, "
            "temperature and top_p",
            stacklevel=1,  # one line of code, so that Python shows the warning once
        )


def check_generation(
    sampler: SamplerConfig,
    cache: CacheConfig | None,
    policy: Policy | None,
    items: Sequence[Item],
    model: Model,
) -> None:
    """Checks by tracing, without running the model, that a sampler composes with the rest.

    Raises: InputError for a sampler that does not fit the cache, the policy or the model.
    """
    cfg, prompt_length = model.config, max(len(item.prompt) for item in items)
    _, present = pad_prompts([item.prompt for item in items], prompt_length, cfg.pad_id)
    sampler.check(cfg, present, policy, cache)
    if cache is None:
        return
    shape = (1, prompt_length + sampler.gen_length)
    block_inputs = jax.eval_shape(lambda: transformer.block_inputs(cfg, None, shape))
    guided = jnp.ones(shape, bool) if sampler.cfg_scale > 0 else None
    net = CanvasModel(cfg, model.params, policy, "auto", block_inputs, None, guided, prompt_length)
    blocks = sampler.blocks(prompt_length)
    jax.eval_shape(lambda: cache.init_state(net, blocks))
    sampler.make_steps(net, prompt_length, seed_key(0)[None], cache)
