"""What is written in 8 bits and without, greedily: a part of `benchmarks.eight_bits`.

Under every policy that can be repeated, with the task's cache, and where a light model is given
under a schedule, whose models are both in 8 bits or both without. After one token that is another,
the texts go apart: so the share of equal tokens says how often they change, and the NELBO of the
texts under the whole model without 8 bits whether they get worse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax.caching.plain import NoCache
from dials_jax.config import EightBits
from dials_jax.data.sources import load_data_tokenizer
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.evaluation.batched import generate_all, log_likelihoods
from dials_jax.evaluation.candidates import Candidate, routed_candidates
from dials_jax.evaluation.items import Item, item_names, load_items
from dials_jax.evaluation.outputs import score_output
from dials_jax.evaluation.scoring import item_keys
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.evaluation.task_setup import check_task, task_sampler
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.models.padding import pad_prompts
from dials_jax.nn.policy import Policy
from dials_jax.sampling.generate import generate
from dials_jax.sampling.model_schedule import Schedule
from dials_jax.sharding import make_mesh
from dials_jax.skipping.policies import Static
from dials_jax.statistics import mean_interval, paired_test

SCHEDULE = "schedule"


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """All that writes, in one number format.

    Attributes:
      light: takes the first and the last steps of a schedule; None: there is none.
      policies: of the heavy model, by label.
    """

    heavy: Model
    light: Model | None
    policies: dict[str, Policy | None]

    @classmethod
    def load(cls, cfg: EvalConfig, weights: EightBits | None, light: str | None) -> Models:
        mesh = make_mesh(cfg.mesh)
        paths = [cfg.model, light] if light else [cfg.model]
        models = [load(path, cfg.dtype, mesh, cfg.layout, weights) for path in paths]
        return cls(models[0], models[1] if light else None, dict(policies_of(cfg, models[0])))

    def ways(self, task: EvalTask) -> list[str]:
        """The labels under which a task is written: of policies, and a schedule without caches."""
        scheduled = self.light is not None and task.cache is None
        return [*self.policies, *([SCHEDULE] if scheduled else [])]


def policies_of(cfg: EvalConfig, model: Model) -> Iterator[tuple[str, Policy | None]]:
    routed = routed_candidates(cfg, model)[0]
    for one in (Candidate("full", None), *routed):
        yield one.label, one.policy
    for layers in cfg.static_layers:
        yield f"static {layers}", Static(layers)


def answer_rows(
    cfg: EvalConfig,
    kind: EightBits,
    compared: int,
    num_samples: int,
    light: str | None = None,
    light_share: float = 0.5,
) -> Iterator[dict[str, Any]]:
    """The rows of every task that generates.

    Args:
      compared: the first items only.
      num_samples: masks of an answer's NELBO.
      light: the light model of a schedule.
      light_share: of the steps.

    Raises: InputError, before anything is written, for tasks that do not fit.
    """
    base, ours = (Models.load(cfg, weights, light) for weights in (None, kind))
    tasks = []
    for task in cfg.tasks:
        if task.generates:
            tokenizer = load_data_tokenizer(task.data, base.heavy.path)
            items = load_items(task, tokenizer, base.heavy.config)[:compared]
            check_task(task, items, base.heavy, base.policies)
            tasks.append((task, tokenizer, items))
    for task, tokenizer, items in tasks:
        for way in base.ways(task):
            texts = [write(cfg, task, items, x, way, light_share) for x in (base, ours)]
            name = task.name, way
            yield share_row(*name, "same tokens", (texts[0] == texts[1]).mean(axis=1))
            nelbos = nelbos_of(cfg, task, items, base.heavy, texts, num_samples)
            yield paired_row(*name, "own NELBO", *nelbos)
            if task.metric == "exact_match":
                yield paired_row(
                    *name, task.metric, *(matches(task, items, x, tokenizer) for x in texts)
                )
            if way.startswith("routed") and task.cache is None:
                gates = [
                    gates_of(x.heavy, x.policies[way], items, texts[0], cfg.seed)
                    for x in (base, ours)
                ]
                yield share_row(*name, "other gates", (gates[0] != gates[1]).mean(axis=0))


# ------------------------------------------------------------------------------------- texts


def write(
    cfg: EvalConfig, task: EvalTask, items: list[Item], models: Models, way: str, light_share: float
) -> Int[np.ndarray, "N G"]:
    """The task's tokens, without noise."""
    sampler = dataclasses.replace(task_sampler(task, items), temperature=0.0)
    prompts, keys = [item.prompt for item in items], item_keys(cfg.seed, items)
    if way != SCHEDULE:
        return generate_all(
            models.heavy, prompts, sampler=sampler, policy=models.policies[way], cache=task.cache,
            keys=keys, batch_size=cfg.batch_size, bucket=task.bucket,
            max_programs=task.max_programs,
        )  # fmt: skip
    schedule = Schedule.sandwich(sampler.count_steps(NoCache()), light_share)
    longest = max(map(len, prompts))
    tokens, valid = pad_prompts(prompts, longest, models.heavy.config.pad_id)
    written = []
    for first in range(0, len(items), cfg.batch_size):
        part = slice(first, first + cfg.batch_size)
        out = generate(
            {"L": models.light, "H": models.heavy}, tokens[part], valid[part], sampler=sampler,
            schedule=schedule, key=keys[part], fill_to=cfg.batch_size,
        )  # fmt: skip
        written.append(out.tokens[:, longest:])
    return np.concatenate(written)


def nelbos_of(
    cfg: EvalConfig,
    task: EvalTask,
    items: list[Item],
    model: Model,
    texts: Sequence[Int[np.ndarray, "N G"]],
    num_samples: int,
) -> list[dict[str, float]]:
    """NELBOs in nats a token by name of the item; those of all texts with the same masks."""
    keys, names, known = item_keys(cfg.seed, items), item_names(items), {}
    for one in texts:
        new = [i for i, text in enumerate(one) if (i, text.tobytes()) not in known]
        found = log_likelihoods(
            model, [(items[i].prompt, tuple(one[i].tolist())) for i in new],
            num_samples=num_samples, keys=keys[np.array(new, int)], batch_size=cfg.batch_size,
            bucket=task.bucket, max_programs=task.max_programs,
        )  # fmt: skip
        known |= {
            (i, one[i].tobytes()): float(-x / one.shape[1]) for i, x in zip(new, found, strict=True)
        }
    return [{names[i]: known[i, x.tobytes()] for i, x in enumerate(one)} for one in texts]


def matches(
    task: EvalTask, items: list[Item], texts: Int[np.ndarray, "N G"], tokenizer: Tokenizer
) -> dict[str, float]:
    """The exact match of every item, by its name."""
    named = zip(item_names(items), items, texts, strict=True)
    return {
        name: score_output(task, item, text.tolist(), tokenizer).score for name, item, text in named
    }


def gates_of(
    model: Model, policy: Any, items: list[Item], answers: Int[np.ndarray, "N G"], seed: int
) -> Bool[np.ndarray, "L N"]:
    """The decisions of one pass, where a random part of every answer is masked."""
    tokens, valid = masked_canvas(model, items, answers, seed)
    return np.asarray(model.apply(tokens, valid, policy).gates)


def masked_canvas(
    model: Model, items: list[Item], answers: Int[np.ndarray, "N G"], seed: int
) -> tuple[Int[np.ndarray, "N T"], Bool[np.ndarray, "N T"]]:
    """Prompts and answers, of each a random part masked; and where there is no padding."""
    longest = max(len(item.prompt) for item in items)
    prompts, valid = pad_prompts([x.prompt for x in items], longest, model.config.pad_id)
    rng = np.random.default_rng(seed)
    masked = rng.random(answers.shape) < rng.random((len(items), 1))
    answers = np.where(masked, model.config.mask_id, answers)
    tokens = np.concatenate([prompts, answers], axis=1).astype(np.int32)
    return tokens, np.concatenate([valid, np.ones_like(masked)], axis=1)


# -------------------------------------------------------------------------------------- rows


def paired_row(
    task: str,
    policy: str,
    measure: str,
    plain: Mapping[str, float],
    other: Mapping[str, float],
) -> dict[str, Any]:
    """Scores of the same items, and their difference with its interval."""
    found = paired_test(other, plain)
    low, high = mean_interval([other[name] - x for name, x in plain.items()])
    return {
        "task": task, "policy": policy, "measure": measure,
        "plain": float(np.mean(list(plain.values()))),
        "in_8_bits": float(np.mean(list(other.values()))),
        "difference": found.difference, "low": low, "high": high, "p": found.p_value,
        "items": found.num_items,
    }  # fmt: skip


def share_row(
    task: str, policy: str, measure: str, shares: Float[np.ndarray, "N"]
) -> dict[str, Any]:
    low, high = mean_interval(shares)
    return {
        "task": task, "policy": policy, "measure": measure, "in_8_bits": float(shares.mean()),
        "low": low, "high": high, "items": len(shares),
    }  # fmt: skip
