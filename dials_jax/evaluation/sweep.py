"""Runs a sweep: scores every policy on every task, and stores each batch once it is scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from dials_jax import sharding
from dials_jax.caching.parse import cache_name
from dials_jax.config import to_dict
from dials_jax.config_files import open_config
from dials_jax.data.sources import load_data_tokenizer
from dials_jax.data.tokenizer import Tokenizer, load_tokenizer
from dials_jax.errors import require, require_packages
from dials_jax.estimates import print_cost
from dials_jax.evaluation.batched import check_num_samples
from dials_jax.evaluation.calibration import load_calibration
from dials_jax.evaluation.candidates import (
    Candidate,
    own_candidates,
    random_candidates,
    routed_candidates,
)
from dials_jax.evaluation.exact_match import normalise_answer
from dials_jax.evaluation.full_depth import measure_kl
from dials_jax.evaluation.items import Items, item_names, load_items
from dials_jax.evaluation.outputs import rules_digest
from dials_jax.evaluation.request_cost import LOWER_BATCH_SIZE
from dials_jax.evaluation.scoring import count_sequences, score_task
from dials_jax.evaluation.static_choice import (
    check_static,
    describe_choice,
    num_static_policies,
    static_candidates,
    static_labels,
    static_placeholder,
)
from dials_jax.evaluation.sweep_cost import sweep_cost
from dials_jax.evaluation.sweep_identity import sweep_identity
from dials_jax.evaluation.sweep_records import SweepRecords, timing_conditions
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.evaluation.task_setup import check_permission, check_task, generation_facts
from dials_jax.evaluation.timing import time_policies
from dials_jax.files import write_json
from dials_jax.loading import find_model, load, read_config
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy
from dials_jax.progress import Pace, progress_bar
from dials_jax.reporting.environment import training_settings
from dials_jax.reporting.results import SweepResults
from dials_jax.reporting.sweep_report import write_report
from dials_jax.reporting.sweep_table import format_table
from dials_jax.skipping.routed import Routed, advice_if_idle
from dials_jax.skipping.similarity import require_enough_layers
from dials_jax.stopping import ending_together
from dials_jax.workdir import exclusive


def sweep(
    config: EvalConfig | str | Path,
    workdir: str | Path,
    overrides: Mapping[str, Any] | None = None,
    policies: Mapping[str, Policy] | None = None,
) -> SweepResults:
    """Scores every policy on every task, except what `workdir` holds already, and reports.

    Every batch is stored as soon as it is scored, results.json is written after every run, and the
    report with its plots after every task. Runs of other calls in the same workdir are kept.

    Args:
      config: settings, or a file with `get_config()`, or the name of a shipped one.
      overrides: other values of its fields, as {"tasks.0.limit": 100}.
      policies: more of them, by their labels in the report; also those of classes of one's own.
        A policy with other settings, weights or code is another one.

    Returns: what results.json holds, as `load_results` reads it.
    Raises: InputError before the first run for tasks, routers or layers that do not fit, for a
      workdir that another process uses, and for one whose results depend on other settings.
    """
    cfg = open_config(config, EvalConfig, overrides or {})
    require_packages("eval", "matplotlib", "scipy")
    require(bool(cfg.tasks), "the sweep has no tasks; add some to the configuration")
    for task in cfg.tasks:
        normalise_answer("", task.extract)
        check_permission(task)
        check_num_samples(task.num_samples)
        if task.compare == "math":
            require_packages("math", "math_verify")
    with exclusive(workdir) as workdir, ending_together():
        return SweepResults(_sweep(cfg, workdir, policies or {}), workdir)


def _sweep(cfg: EvalConfig, workdir: Path, policies: Mapping[str, Policy]) -> dict[str, Any]:
    mesh = sharding.make_mesh(cfg.mesh)
    tasks, tokenizers = load_tasks(cfg)
    model = load(cfg.model, cfg.dtype, mesh, cfg.layout, cfg.weights, cfg.batch_invariant)
    calibrations = [
        load_calibration(cfg, task, items, tokenizer, model) if cfg.num_static else None
        for (task, items), tokenizer in zip(tasks, tokenizers, strict=True)
    ]
    routed, routers = routed_candidates(cfg, model)
    full, random = Candidate("full", None), random_candidates(cfg)
    others = [full, *routed, *random]
    own = own_candidates(policies, {*static_labels(cfg), *(one.label for one in others)})
    sharding.require_same_everywhere({"policies": [one.describe() for one in own]})
    known = [*others, *own]
    to_check = [*known, *static_placeholder(cfg)]
    for task, items in tasks:
        check_task(task, items, model, {c.label: c.policy for c in to_check})
    items_of = {task.name: items for task, items in tasks}
    rules = {task.name: rules_digest(task, items) for task, items in tasks}
    identity = sweep_identity(cfg, model, tasks, routers)
    records = SweepRecords(workdir, identity, items_of, model, rules)
    facts = {"model": _model_facts(cfg, model), "routers": routers, "static_choice": {}}
    cost = sweep_cost(cfg, model, tasks, known, num_static_policies(cfg), records)
    if cost is not None:
        print_cost("what is left to score", cost, LOWER_BATCH_SIZE)
    pace = Pace(cost.flops if cost else 0.0, "the sweep")
    candidates = {}
    for (task, items), tokenizer, calibration in zip(tasks, tokenizers, calibrations, strict=True):
        static = static_candidates(cfg, model, task, calibration, records)
        if calibration is not None:
            found = describe_choice(cfg, task, calibration, records)
            facts["static_choice"][records.names[task.name]] = found
        candidates[task.name] = [full, *static, *routed, *random, *own]
        for candidate in candidates[task.name]:
            if not records.is_finished(task.name, candidate.describe()):
                _score_candidate(records, cfg, model, task, items, tokenizer, candidate, pace)
                results = records.results(cfg, facts)
                path = workdir / "results.json"
                sharding.on_first_process(partial(write_json, path, results, digest=True))
        if cfg.kl_items:
            policies = [(one.describe(), one.policy) for one in candidates[task.name]]
            measure_kl(records, cfg, model, task, items, policies)
        results = records.results(cfg, facts)
        if jax.process_index() == 0:
            rows = write_report(results, workdir)
    if cfg.timing_repeats:
        for task, items in tasks:
            policies = [(one.describe(), one.policy) for one in candidates[task.name]]
            time_policies(records, cfg, model, task, items, policies)
        results = records.results(cfg, facts)
        if jax.process_index() == 0:
            rows = write_report(results, workdir)
    if jax.process_index() == 0:
        print(format_table(rows))
        print(f"report: {workdir / 'report.html'}")
    return results


def load_tasks(cfg: EvalConfig) -> tuple[list[tuple[EvalTask, Items]], list[Tokenizer]]:
    """The tasks with their items, and their tokenizers; no weight is read.

    Weights take minutes, and what is wrong with settings and data takes a moment to see.
    """
    folder, model_config = str(find_model(cfg.model)[0]), read_config(cfg.model, cfg.dtype)
    _check_sweep(cfg, model_config.num_layers)
    load_once = functools.cache(load_tokenizer)
    tokenizers = [load_data_tokenizer(task.data, folder, load_once) for task in cfg.tasks]
    tasks = [
        (task, load_items(task, tokenizer, model_config))
        for task, tokenizer in zip(cfg.tasks, tokenizers, strict=True)
    ]
    return tasks, tokenizers


def _model_facts(cfg: EvalConfig, model: Model) -> dict[str, Any]:
    """What results.json says of the model."""
    return {
        "path": cfg.model,
        "num_layers": model.num_layers,
        "parameters": model.num_parameters,
        "fingerprint": model.fingerprint,
        "trained": training_settings(cfg.model),
    }


def _check_sweep(cfg: EvalConfig, num_layers: int) -> None:
    """Raises: InputError for what would stop the sweep half-way, or for two runs of one label."""
    taus = cfg.skip_threshold
    repeatable = {
        "skip_threshold": taus if isinstance(taus, tuple) else (),
        "execution_ratios": cfg.execution_ratios,
        "tasks": [task.name for task in cfg.tasks],
        "num_static": cfg.num_static,
        "allow_adjacent": cfg.allow_adjacent,
        "static_layers": [tuple(sorted(set(layers))) for layers in cfg.static_layers],
        "num_random": cfg.num_random,
    }
    for name, values in repeatable.items():
        require(len(set(values)) == len(values), f"{name}: {values} names one twice; remove it")
    for k in cfg.num_random:
        require_enough_layers(k, num_layers, allow_adjacent=True)
    check_static(cfg, num_layers)


def _score_candidate(
    records: SweepRecords,
    cfg: EvalConfig,
    model: Model,
    task: EvalTask,
    items: Items,
    tokenizer: Tokenizer,
    candidate: Candidate,
    pace: Pace,
) -> None:
    """Scores one policy on one task, continuing from its records, and adds the run."""
    total = count_sequences(model.config, task, items, candidate.policy)
    what = f"{task.name}, {candidate.label}"
    policy = candidate.describe()
    about = records.about(task.name, policy)
    earlier = list(records.batches(task.name, policy))
    given, cfg = cfg.batch_size, _with_batches_of(earlier, cfg, model)
    measured = timing_conditions(cfg, task, model)
    done = _count_done(earlier, items)
    if done and jax.process_index() == 0:
        kept = "" if cfg.batch_size == given else f", in batches of {cfg.batch_size} as it began"
        print(f"{what}: continues after {done} of {total} sequences{kept}", flush=True)

    def keep(record: dict[str, Any]) -> None:
        records.add(about | {"measured": measured} | record)
        if "flops" in record:
            pace.measured(record["flops"]["model_total"], record["flops"]["seconds"])

    with progress_bar(total, 0, what, "sequence") as bar:
        scores = score_task(
            model, task, items, tokenizer, candidate.policy, cfg.batch_size, cfg.seed, bar.update,
            records=earlier, on_record=keep,
        )  # fmt: skip
    run = {
        "metric": task.metric,
        "cache": cache_name(task.cache),
        "generation": generation_facts(task, items),
        "settings": to_dict(task),
        "num_dropped": items.num_dropped,
        "items": scores.items,
        "also": scores.other_metrics,
        "flops": scores.flops.to_dict(),
        "execution": scores.layer_counts.to_dict(),
        **({"num_calls": scores.num_calls, "passes": scores.passes} if scores.passes else {}),
        "examples": scores.examples,
        "measured": _without_repeats(x["measured"] for x in records.batches(task.name, policy)),
        **candidate.notes,
    }
    records.add_run(task.name, policy, run)
    if jax.process_index() == 0:
        mean = sum(scores.items.values()) / len(scores.items)
        print(f"{what}: {mean:.4f}, {scores.flops.layers_run:.1%} of layers", flush=True)
        if isinstance(candidate.policy, Routed) and (
            advice := advice_if_idle(scores.flops.layers_run)
        ):
            print(f"{what}: {advice}", flush=True)


def _count_done(earlier: Iterable[Mapping[str, Any]], items: Items) -> int:
    """The sequences of these items that are in records of batches."""
    names = set(item_names(items))
    return sum(
        count
        for record in earlier
        for pair, _, count, _ in record.get("scores", ())
        if pair.partition(".")[0] in names
    )


def _with_batches_of(
    earlier: Iterable[Mapping[str, Any]], cfg: EvalConfig, model: Model
) -> EvalConfig:
    """The settings with the batch size that a run began with.

    In bfloat16 on a GPU answers depend on it, so all of a run are made alike; not of a
    batch-invariant model.
    """
    sizes = [record.get("measured", {}).get("batch_size") for record in earlier]
    if model.batch_invariant or not any(sizes):
        return cfg
    return dataclasses.replace(cfg, batch_size=next(size for size in sizes if size))


def _without_repeats(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    unique: list[dict[str, Any]] = []
    for value in values:
        if value not in unique[-1:] and value not in unique:
            unique.append(value)
    return unique
