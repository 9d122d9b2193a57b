"""How many answers of a trained model change with the batch size: a part of
`benchmarks.invariance`.

The model is one that was trained on the digits of `configs/demo`, so that no data is needed. With
`--text` it is any other: it continues texts, and a score is the share of tokens that are the text's
own. Every item is answered in batches of each size; the largest is what the others are paired with.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dials_jax.config import ArithmeticData, TextData
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.data.sources import load_data_tokenizer
from dials_jax.evaluation.batched import generate_all
from dials_jax.evaluation.items import Item, item_names, load_items
from dials_jax.evaluation.outputs import score_output
from dials_jax.evaluation.task import EvalTask
from dials_jax.models.model import Model
from dials_jax.sampling.confidence import Confidence
from dials_jax.skipping.storage import load_router
from dials_jax.statistics import paired_test

TASK = EvalTask(name="arithmetic", metric="exact_match", data=ArithmeticData())


class Questions(NamedTuple):
    """What a model is asked, and how its answers are made and scored."""

    items: list[Item]
    sampler: Confidence
    score: Callable[[Item, list[int]], float]  # an item and the ids of its answer


def arithmetic(model: Model) -> Questions:
    items, tokenizer = load_items(TASK, None, model.config), ArithmeticTask(TASK.data).tokenizer
    longest = max(len(answer) for item in items for answer in item.answers)

    def score(item: Item, ids: list[int]) -> float:
        return float(score_output(TASK, item, ids, tokenizer).score)

    return Questions(items, Confidence(gen_length=longest), score)


def texts(model: Model, options: argparse.Namespace) -> Questions:
    """--gen tokens after --prompt of them, at most --items times."""
    length = options.prompt + options.gen
    data = TextData(paths=(options.text,), length=length, prompt_length=options.prompt)
    task = EvalTask(name="text", metric="nelbo", data=data, limit=options.items)
    items = load_items(task, load_data_tokenizer(data, options.model), model.config)

    def score(item: Item, ids: list[int]) -> float:
        return float(np.mean(np.equal(ids, item.answers[0])))

    return Questions(items, Confidence(options.gen, options.block, options.gen), score)


def answer_rows(model: Model, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each batch size under full depth, and under the router if one is given."""
    items, sampler, score = texts(model, options) if options.text else arithmetic(model)
    names, prompts = item_names(items), [item.prompt for item in items]
    policies = {"full": None}
    if options.router:
        policies["routed"] = load_router(options.router, model)
    for case, policy in policies.items():
        found: dict[int, tuple[np.ndarray, dict[str, float]]] = {}
        for size in sorted(options.sizes, reverse=True):
            start = time.perf_counter()
            how = {"sampler": sampler, "policy": policy, "batch_size": size, "refill": False}
            answers = generate_all(model, prompts, **how)
            right = {
                name: score(item, ids)
                for name, item, ids in zip(names, items, answers.tolist(), strict=True)
            }
            found[size] = answers, right
            yield {
                "case": f"{case}, {model.config.dtype}", "batch": str(size),
                "took": time.perf_counter() - start, **_against(found, size, max(options.sizes)),
            }  # fmt: skip


def _against(
    found: dict[int, tuple[np.ndarray, dict[str, float]]], size: int, largest: int
) -> dict[str, Any]:
    answers, right = found[size]
    others, baseline = found[largest]
    differs = answers != others
    paired = paired_test(right, baseline)
    return {
        "sequences": f"{differs.any(axis=1).sum()}/{len(answers)}",
        "tokens": f"{differs.sum()}/{differs.size}", "differ": int(differs.any(axis=1).sum()),
        "numbers": f"{np.mean(list(right.values())):.4f} right",
        "accuracy": float(np.mean(list(right.values()))),
        "better": sum(right[key] > baseline[key] for key in right),
        "worse": sum(right[key] < baseline[key] for key in right),
        "paired": dataclasses.asdict(paired),
    }  # fmt: skip
