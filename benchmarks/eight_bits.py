"""What 8 bits change, against the same model without: `python -m benchmarks.eight_bits --help`.

    python -m benchmarks.eight_bits --config configs/demo/sweep.py --workdir runs/eight_bits

Everything is paired, by item and with the same masks: exact match and the other scores of the
configuration's tasks, the NELBO of their answers, the share of greedy tokens that are the same, and
the share of routers' decisions that are others on the same inputs. Intervals are of 95 %, over
items. Layers that static policies leave out are those named in `static_layers`: choices by
similarity may differ between the models.

What is done is kept in the workdir: the same command goes on where it was stopped. Options that are
not known are fields of the configuration, as --batch-size 50.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from benchmarks.command import add_out, make_main
from benchmarks.report import LiveTable
from dials_jax.commands import override
from dials_jax.config_files import load_config
from dials_jax.data.sources import load_data_tokenizer
from dials_jax.errors import require
from dials_jax.evaluation.batched import generate_all
from dials_jax.evaluation.candidates import Candidate, routed_candidates
from dials_jax.evaluation.items import Item, load_items
from dials_jax.evaluation.scoring import item_keys
from dials_jax.evaluation.sweep import sweep
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.evaluation.task_setup import task_sampler
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.models.padding import pad_prompts
from dials_jax.reporting.results import SweepResults
from dials_jax.sharding import make_mesh
from dials_jax.skipping.policies import Static
from dials_jax.statistics import mean_interval, paired_test

KINDS = ("fp8", "int8")
COLUMNS = {
    "weights": "<7", "task": "<20", "policy": "<22", "measure": "<14", "plain": ">8.4f",
    "in_8_bits": ">9.4f", "difference": ">10.5f", "low": ">9.5f", "high": ">9.5f", "p": ">7.3f",
    "items": ">6d",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="of a sweep: model, routers and tasks")
    parser.add_argument("--workdir", required=True, help="keeps the sweeps, one folder for each")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument(
        "--compared", type=int, default=200, help="first items whose tokens and gates are compared"
    )
    parser.add_argument("--samples", type=int, default=32, help="masks per answer of the NELBO")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    cfg = with_nelbo(
        override(load_config(options.config, EvalConfig), options.fields), options.samples
    )
    require(cfg.weights is None, "weights is what the benchmark changes; leave it out")
    settings = {"config": options.config, "fields": options.fields, "compared": options.compared}
    table = LiveTable(COLUMNS, options.out, settings)
    folder = Path(options.workdir)
    plain = sweep(cfg, folder / "plain")
    for kind in options.kinds:
        quantised = sweep(dataclasses.replace(cfg, weights=kind), folder / kind)
        for row in [*score_rows(plain, quantised), *decision_rows(cfg, kind, options.compared)]:
            table.add_row(weights=kind, **row)


def with_nelbo(cfg: EvalConfig, num_samples: int) -> EvalConfig:
    """Adds the NELBO of the answers that a task generates."""
    tasks = list(cfg.tasks)
    for task in cfg.tasks:
        if task.metric == "exact_match":
            shared = {"data": task.data, "limit": task.limit, "num_samples": num_samples}
            tasks.append(EvalTask(name=f"{task.name}, NELBO", metric="nelbo", **shared))
    return dataclasses.replace(cfg, tasks=tuple(tasks))


# ------------------------------------------------------------------------------------- scores


def score_rows(plain: SweepResults, quantised: SweepResults) -> Iterator[dict[str, Any]]:
    """Every task and policy: the scores of both models, and their paired difference."""
    ours = {(one["task"], one["policy"]["label"]): one for one in quantised["runs"]}
    for base in plain["runs"]:
        one = ours.get((base["task"], base["policy"]["label"]))
        if one is not None and _layers(one) == _layers(base):
            found = paired_test(one["items"], base["items"])
            deltas = [one["items"][name] - x for name, x in base["items"].items()]
            low, high = mean_interval(deltas)
            yield {
                "task": base["task"], "policy": base["policy"]["label"], "measure": base["metric"],
                "plain": float(np.mean(list(base["items"].values()))),
                "in_8_bits": float(np.mean(list(one["items"].values()))),
                "difference": found.difference, "low": low, "high": high, "p": found.p_value,
                "items": found.num_items,
            }  # fmt: skip


def _layers(one: dict[str, Any]) -> Any:
    return one["policy"].get("layers")


# ---------------------------------------------------------------------------- tokens and gates


def decision_rows(cfg: EvalConfig, kind: str, compared: int) -> Iterator[dict[str, Any]]:
    """Agreement of greedy tokens under every policy that can be repeated, and flips of gates."""
    mesh = make_mesh(cfg.mesh)
    plain, quantised = (load(cfg.model, cfg.dtype, mesh, cfg.layout, x) for x in (None, kind))
    policies = [dict(policies_of(cfg, model)) for model in (plain, quantised)]
    for task in cfg.tasks:
        if not task.generates:
            continue
        tokenizer = load_data_tokenizer(task.data, plain.path)
        items = load_items(task, tokenizer, plain.config)[:compared]
        for name, policy in policies[0].items():
            both = (plain, policy), (quantised, policies[1][name])
            answers = [generate_greedily(cfg, task, items, *one) for one in both]
            same = (answers[0] == answers[1]).mean(axis=1)
            yield _share(task, name, "same tokens", same)
            if name.startswith("routed"):
                gates = [gates_of(*one, items, answers[0], cfg.seed) for one in both]
                yield _share(task, name, "other gates", (gates[0] != gates[1]).mean(axis=0))


def policies_of(cfg: EvalConfig, model: Model) -> Iterator[tuple[str, Any]]:
    routed = routed_candidates(cfg, model)[0]
    for one in (Candidate("full", None), *routed):
        yield one.label, one.policy
    for layers in cfg.static_layers:
        yield f"static {layers}", Static(layers)


def generate_greedily(
    cfg: EvalConfig, task: EvalTask, items: list[Item], model: Model, policy: Any
) -> Int[np.ndarray, "N G"]:
    """The task's tokens, without noise."""
    sampler = dataclasses.replace(task_sampler(task, items), temperature=0.0)
    return generate_all(
        model, [item.prompt for item in items], sampler=sampler, policy=policy, cache=task.cache,
        keys=item_keys(cfg.seed, items), batch_size=cfg.batch_size, bucket=task.bucket,
        max_programs=task.max_programs,
    )  # fmt: skip


def gates_of(
    model: Model, policy: Any, items: list[Item], answers: Int[np.ndarray, "N G"], seed: int
) -> Bool[np.ndarray, "L N"]:
    """The decisions of one pass, where a random part of every answer is masked."""
    longest = max(len(item.prompt) for item in items)
    prompts, valid = pad_prompts([x.prompt for x in items], longest, model.config.pad_id)
    rng = np.random.default_rng(seed)
    masked = rng.random(answers.shape) < rng.random((len(items), 1))
    answers = np.where(masked, model.config.mask_id, answers)
    tokens = np.concatenate([prompts, answers], axis=1).astype(np.int32)
    valid = np.concatenate([valid, np.ones_like(masked)], axis=1)
    return np.asarray(model.apply(tokens, valid, policy).gates)


def _share(task: EvalTask, policy: str, measure: str, shares: np.ndarray) -> dict[str, Any]:
    low, high = mean_interval(shares)
    return {
        "task": task.name, "policy": policy, "measure": measure, "in_8_bits": float(shares.mean()),
        "low": low, "high": high, "items": len(shares),
    }  # fmt: skip


main = make_main("eight_bits", __doc__, add_options, run, takes_fields=True)

if __name__ == "__main__":
    sys.exit(main())
