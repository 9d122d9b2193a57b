"""Runs a sweep: scores every policy on every task, and stores each batch once it is scored."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dials_jax import sharding, trees
from dials_jax.caching.parse import cache_name
from dials_jax.config import to_dict
from dials_jax.data.sources import load_data_tokenizer
from dials_jax.data.tokenizer import Tokenizer, load_tokenizer
from dials_jax.errors import require, require_packages
from dials_jax.evaluation.calibration import CalibrationPrompts, load_calibration
from dials_jax.evaluation.exact_match import normalise_answer
from dials_jax.evaluation.items import Item, Items, item_names, items_digest, load_items
from dials_jax.evaluation.older_sweeps import router_id
from dials_jax.evaluation.outputs import rules_digest
from dials_jax.evaluation.scoring import count_sequences, score_task
from dials_jax.evaluation.sweep_identity import router_training, sweep_identity
from dials_jax.evaluation.sweep_records import SweepRecords, timing_conditions
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.evaluation.task_setup import check_permission, check_task, generation_facts
from dials_jax.evaluation.timing import time_policies
from dials_jax.files import write_json
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.nn.policy import Policy, policy_name
from dials_jax.reporting.environment import training_settings
from dials_jax.reporting.sweep_report import write_report
from dials_jax.reporting.sweep_table import format_table
from dials_jax.skipping.policies import Random, Static, StaticGates
from dials_jax.skipping.routed import Routed, advice_if_idle
from dials_jax.skipping.similarity import choose_static_layers, layer_similarities
from dials_jax.skipping.storage import RouterInfo, load_router, router_facts
from dials_jax.workdir import exclusive

MOST_STATIC_PROGRAMS = 3  # with unrolled layers, more static sets than these share one program


@dataclass(frozen=True)
class Candidate:
    """A policy of the sweep, its label in the report, and facts about it such as its lambda.

    Attributes:
      notes: stored with its runs, but not part of what it is: how its router was trained, or what
        its layers were chosen by.
    """

    label: str
    policy: Policy | None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return policy_name(self.policy)

    def describe(self) -> dict[str, Any]:
        """The policy as records store it."""
        return {"kind": self.kind, "label": self.label, **self.facts}


def sweep(cfg: EvalConfig, workdir: str | Path) -> dict[str, Any]:
    """Scores every policy on every task, except what `workdir` holds already, and reports.

    Every batch is stored as soon as it is scored, results.json is written after every run, and the
    report with its plots after every task. Runs of other calls in the same workdir are kept.

    Raises: InputError before the first run for tasks, routers or layers that do not fit, for a
      workdir that another process uses, and for one whose results depend on other settings.
    """
    require_packages("eval", "matplotlib", "scipy")
    require(bool(cfg.tasks), "the sweep has no tasks; add some to the configuration")
    for task in cfg.tasks:
        normalise_answer("", task.extract)
        check_permission(task)
        if task.compare == "math":
            require_packages("math", "math_verify")
    with exclusive(workdir) as workdir:
        return _sweep(cfg, workdir)


def _sweep(cfg: EvalConfig, workdir: Path) -> dict[str, Any]:
    model = load(cfg.model, cfg.dtype, sharding.make_mesh(cfg.mesh), cfg.layout)
    load_once = functools.cache(load_tokenizer)
    tokenizers = [load_data_tokenizer(task.data, model.path, load_once) for task in cfg.tasks]
    tasks = [
        (task, load_items(task, tokenizer, model.config))
        for task, tokenizer in zip(cfg.tasks, tokenizers, strict=True)
    ]
    _check_sweep(cfg, model, tasks)
    calibrations = [
        load_calibration(cfg, task, items, tokenizer, model) if cfg.num_static else None
        for (task, items), tokenizer in zip(tasks, tokenizers, strict=True)
    ]
    routed, routers = routed_candidates(cfg, model)
    full, random = Candidate("full", None), random_candidates(cfg)
    to_check = [full, *routed, *random, *_static_placeholder(cfg)]
    for task, items in tasks:
        check_task(task, items, model, {c.label: c.policy for c in to_check})
    items_of = {task.name: items for task, items in tasks}
    rules = {task.name: rules_digest(task, items) for task, items in tasks}
    identity = sweep_identity(cfg, model, tasks, routers)
    records = SweepRecords(workdir, identity, items_of, model, rules)
    facts = {
        "model": {
            "path": cfg.model,
            "num_layers": model.num_layers,
            "parameters": trees.count_parameters(model.params),
            "fingerprint": model.fingerprint,
            "trained": training_settings(cfg.model),
        },
        "routers": routers,
    }
    candidates = {}
    for (task, items), tokenizer, calibration in zip(tasks, tokenizers, calibrations, strict=True):
        static = static_candidates(cfg, model, task, calibration, records)
        candidates[task.name] = [full, *static, *routed, *random]
        for candidate in candidates[task.name]:
            if not records.is_finished(task.name, candidate.describe()):
                _score_candidate(records, cfg, model, task, items, tokenizer, candidate)
                results = records.results(cfg, facts)
                sharding.on_first_process(lambda r=results: write_json(workdir / "results.json", r))
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


def _check_sweep(
    cfg: EvalConfig, model: Model, tasks: Sequence[tuple[EvalTask, list[Item]]]
) -> None:
    """Raises: InputError for what would stop the sweep half-way, or for two runs of one label."""
    taus = cfg.skip_threshold
    repeatable = {
        "skip_threshold": taus if isinstance(taus, tuple) else (),
        "execution_ratios": cfg.execution_ratios,
        "tasks": [t.name for t, _ in tasks],
        "num_static": cfg.num_static,
        "static_layers": [tuple(sorted(set(layers))) for layers in cfg.static_layers],
        "num_random": cfg.num_random,
    }
    for name, values in repeatable.items():
        require(len(set(values)) == len(values), f"{name}: {values} names one twice; remove it")
    for k in (*cfg.num_static, *cfg.num_random):
        require(0 < k < model.num_layers, f"cannot skip {k} of {model.num_layers} layers")
    for layers in cfg.static_layers:
        require(
            bool(layers) and all(0 <= layer < model.num_layers for layer in layers),
            f"static_layers: {layers} must name layers of the model, counted from 0 to "
            f"{model.num_layers - 1}; papers count from 1: write their {{5, 7}} as (4, 6)",
        )


def _score_candidate(
    records: SweepRecords,
    cfg: EvalConfig,
    model: Model,
    task: EvalTask,
    items: Items,
    tokenizer: Tokenizer,
    candidate: Candidate,
) -> None:
    """Scores one policy on one task, continuing from its records, and adds the run."""
    from tqdm import tqdm

    total = count_sequences(task, items, candidate.policy)
    what = f"{task.name}, {candidate.label}"
    policy = candidate.describe()
    measured = timing_conditions(cfg, task, model)
    about = records.about(task.name, policy)
    earlier, names = list(records.batches(task.name, policy)), set(item_names(items))
    done = sum(
        count
        for record in earlier
        for pair, _, count, _ in record.get("scores", ())
        if pair.partition(".")[0] in names
    )
    if done and jax.process_index() == 0:
        print(f"{what}: continues after {done} of {total} sequences", flush=True)
    with tqdm(total=total, desc=what, unit="sequence", disable=not sys.stderr.isatty()) as bar:
        scores = score_task(
            model, task, items, tokenizer, candidate.policy, cfg.batch_size, cfg.seed, bar.update,
            records=earlier,
            on_record=lambda record: records.add(about | {"measured": measured} | record),
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


def _without_repeats(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    unique: list[dict[str, Any]] = []
    for value in values:
        if value not in unique[-1:] and value not in unique:
            unique.append(value)
    return unique


# ------------------------------------------------------------------------------------- policies


def routed_candidates(cfg: EvalConfig, model: Model) -> tuple[list[Candidate], dict[str, Any]]:
    """Loads every router, and makes its policies; by rising lambda.

    Also describes them, by `router_id`. Routers of one lambda and one training but for its seed
    have one label, and make one row.
    """
    found, routers = [], {}
    for path in cfg.routers:
        folder, info = router_facts(path)
        training = {"training": router_training(folder, info), "folder": Path(path).name}
        router = load_router(path, model)
        for candidate, threshold in _router_candidates(cfg, info, router, path):
            known = {"digests": info.digests, "threshold": threshold}
            if candidate.policy.votes != "hard":
                known["votes"] = candidate.policy.votes
            number = router_id(known)
            require(number not in routers, f"routers: {path} is given twice; remove one of them")
            candidate.facts.update(training, router=number)
            notes = _router_notes(candidate.policy, path)
            found.append(dataclasses.replace(candidate, notes=notes))
            routers[number] = known | {"label": candidate.label} | candidate.facts
    return sorted(found, key=lambda c: c.facts["lambda"]), routers


def _router_notes(policy: Routed, path: str) -> dict[str, Any]:
    """Where a router is, how it votes and how it was trained, for the report."""
    router = {
        "path": path,
        "threshold": np.asarray(policy.threshold).tolist(),
        "votes": policy.votes,
    }
    return {"router": router, "trained": training_settings(path)}


def _router_candidates(
    cfg: EvalConfig, info: RouterInfo, router: Routed, path: str
) -> Iterator[tuple[Candidate, Any]]:
    """The policies of one router, each with the threshold that is not the router's own."""
    label, facts = f"routed λ={info.skip_weight:g}", {"lambda": info.skip_weight}
    soft = {} if cfg.votes in (None, info.router.votes) else {"votes": cfg.votes}
    end = f" {cfg.votes}" if soft else ""
    router = dataclasses.replace(router, **soft)
    taus = cfg.skip_threshold
    for tau in taus if isinstance(taus, tuple) else (taus,):
        if tau is None:
            yield Candidate(f"{label}{end}", router, {**facts, **soft}), None
        else:
            policy = dataclasses.replace(router, threshold=tau)
            where = {**facts, "threshold": tau, **soft}
            yield Candidate(f"{label} τ={tau:g}{end}", policy, where), tau
    for ratio in cfg.execution_ratios:
        fit = info.fitted_to(ratio, path)
        policy = dataclasses.replace(router, threshold=fit.threshold, votes=fit.votes)
        where = {**facts, "execution_ratio": ratio}
        yield Candidate(f"{label} fitted to {ratio:g}", policy, where), list(fit.thresholds)


def _static_placeholder(cfg: EvalConfig) -> list[Candidate]:
    """Stands for the static policies in checks, before their layers are chosen."""
    labels = [f"static k={k}" for k in cfg.num_static] + list(map(_set_label, cfg.static_layers))
    return [Candidate(label, Static(())) for label in labels[:1]]


def random_candidates(cfg: EvalConfig) -> list[Candidate]:
    return [Candidate(f"random k={k}", Random(k), {"num_skipped": k}) for k in cfg.num_random]


def static_candidates(
    cfg: EvalConfig,
    model: Model,
    task: EvalTask,
    calibration: CalibrationPrompts | None,
    records: SweepRecords,
) -> list[Candidate]:
    """The static policies: with layers chosen by Goel, Algorithm 1, then with those of the sweep.

    The algorithm may not reach every number of layers. The similarities on the calibration prompts
    are stored: measured again in other batches, they could lead to other layers.
    """
    sets, notes = {}, {}
    if calibration is not None:
        similarities = _similarities(cfg, model, task, calibration, records)
        notes = {"calibration": calibration.source}
    for k in cfg.num_static:
        layers = choose_static_layers(similarities, k, cfg.similarity_threshold)
        if len(layers) == k:
            sets[f"static k={k}"] = layers
        else:
            print(
                f"{task.name}: Goel, Algorithm 1 finds only {len(layers)} layers; no static k={k}"
            )
    given = {_set_label(layers): tuple(sorted(set(layers))) for layers in cfg.static_layers}
    return [
        Candidate(
            label,
            _static_policy(model, layers, len(sets) + len(given)),
            {"layers": list(layers), "num_skipped": len(layers)},
            {} if label in given else notes,
        )
        for label, layers in {**sets, **given}.items()
    ]


def _set_label(layers: Sequence[int]) -> str:
    return f"static {{{', '.join(map(str, sorted(set(layers))))}}}"


def _static_policy(model: Model, layers: Sequence[int], num_sets: int) -> Static | StaticGates:
    """Many sets share a program, and so do all where `Static` has a branch per layer anyway."""
    if trees.is_unrolled(model.params["layers"]) and num_sets <= MOST_STATIC_PROGRAMS:
        return Static(layers)
    return StaticGates.of(layers, model.num_layers)


def _similarities(
    cfg: EvalConfig,
    model: Model,
    task: EvalTask,
    calibration: CalibrationPrompts,
    records: SweepRecords,
) -> list[float]:
    """The similarities of all layers on the calibration prompts, from the records or measured."""
    where = records.names[task.name], items_digest(calibration.items)
    if where not in records.similarities:
        if calibration.of_test:
            print(f"{task.name}: static layers are chosen on {calibration.source}")
        # A causal model's states of a prompt do not depend on what follows.
        lengths = [len(answer) for item in calibration.items for answer in item.answers]
        gen_length = 0 if model.config.causal else max(lengths)
        prompts = [item.prompt for item in calibration.items]
        found = layer_similarities(model, prompts, gen_length, cfg.batch_size).tolist()
        records.add({"task": where[0], "prompts": where[1], "similarities": found})
    return records.similarities[where]
