"""A sweep: every policy on every task, written to disk as each run ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import jax

from dials_jax import sharding, trees
from dials_jax.analysis.similarity import layer_similarities
from dials_jax.config import (
    EvalConfig,
    EvalTask,
    InputError,
    read_json,
    require,
    require_packages,
    require_writable,
    to_dict,
    write_json,
)
from dials_jax.data.items import Item, Items, items_digest, load_items
from dials_jax.data.tokenizer import Tokenizer, load_tokenizer
from dials_jax.evaluation.report import format_table, write_report
from dials_jax.evaluation.results import differing, environment
from dials_jax.evaluation.scoring import (
    RULES,
    check_settings,
    check_task,
    generation_facts,
    num_rows,
    score_task,
)
from dials_jax.loading import load
from dials_jax.models.model import Model
from dials_jax.nn.stack import Policy
from dials_jax.skipping.policies import Random, Static
from dials_jax.skipping.similarity import choose_static_layers
from dials_jax.skipping.storage import load_router, router_facts


@dataclass(frozen=True)
class Candidate:
    """A policy of the sweep and how the report calls it."""

    kind: str
    label: str
    policy: Policy | None
    facts: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "label": self.label, **self.facts}


def sweep(cfg: EvalConfig, workdir: str | Path) -> dict[str, Any]:
    """Runs what is not in `workdir/results.json` yet.

    Results are written after every run, the report with its plots after every task.

    Raises: InputError before the first run for tasks, routers or layers that do not fit.
    """
    workdir = Path(workdir).absolute()
    require_writable(workdir)
    require_packages("eval", "matplotlib", "scipy")
    require(bool(cfg.tasks), "the sweep has no tasks; add some to the configuration")
    for task in cfg.tasks:
        check_settings(task)
    model = load(cfg.model, cfg.dtype, sharding.make_mesh(cfg.mesh), cfg.layout)
    tokenizer = load_tokenizer(model.path)
    tasks = [(task, load_items(task, tokenizer, model.config)) for task in cfg.tasks]
    _check(cfg, model, tasks)
    shared = [Candidate("full", "full", None), *_routed(cfg, model), *_random(cfg)]
    results = _start(cfg, model, tasks, workdir)
    for task, items in tasks:
        static = _static(cfg, model, task, items)
        for candidate in [*shared[:1], *static, *shared[1:]]:
            _run_once(results, cfg, model, task, items, tokenizer, candidate, workdir)
        if jax.process_index() == 0:
            rows = write_report(results, workdir)
    if jax.process_index() == 0:
        print(format_table(rows))
        print(f"report: {workdir / 'report.html'}")
    return results


def _check(cfg: EvalConfig, model: Model, tasks: Sequence[tuple[EvalTask, list[Item]]]) -> None:
    """Raises: InputError for what would stop the sweep half-way, or run twice under one label."""
    for task, items in tasks:
        check_task(task, items, model)
        require(
            not cfg.static or any(item.prompt for item in items[: cfg.num_calibration]),
            f"task {task.name!r} has empty prompts, but Algorithm 1 chooses static layers by "
            "prompts; set static=()",
        )
    repeatable = {"tasks": [t.name for t, _ in tasks], "static": cfg.static, "random": cfg.random}
    for name, values in repeatable.items():
        require(len(set(values)) == len(values), f"{name}: {values} names one twice; remove it")
    for k in (*cfg.static, *cfg.random):
        require(0 < k < model.num_layers, f"cannot skip {k} of {model.num_layers} layers")


def _run_once(
    results: dict[str, Any],
    cfg: EvalConfig,
    model: Model,
    task: EvalTask,
    items: Items,
    tokenizer: Tokenizer,
    candidate: Candidate,
    workdir: Path,
) -> None:
    """Scores one policy on one task unless an earlier sweep did."""
    done = {(run["task"], run["policy"]["label"]) for run in results["runs"]}
    if (task.name, candidate.label) in done:
        return
    from tqdm import tqdm

    total = num_rows(task, items, candidate.policy)
    what = f"{task.name}, {candidate.label}"
    with tqdm(total=total, desc=what, unit="row", disable=not sys.stderr.isatty()) as bar:
        scores = score_task(
            model, task, items, tokenizer, candidate.policy, cfg.batch_size, cfg.seed, bar.update
        )
    run = {
        "task": task.name,
        "metric": task.metric,
        "cache": task.cache,
        "generation": generation_facts(task, items),
        "num_dropped": items.num_dropped,
        "policy": candidate.describe(),
        "items": scores.items,
        "also": scores.also,
        "flops": scores.flops._asdict(),
        "execution": scores.execution.to_dict(),
        "examples": scores.examples,
    }
    results["runs"].append(run)
    if jax.process_index() == 0:
        write_json(workdir / "results.json", results)
        mean = sum(scores.items.values()) / len(scores.items)
        print(f"{what}: {mean:.4f}, {scores.flops.layers_run:.1%} of layers", flush=True)


# ------------------------------------------------------------------------------------- policies


def _routed(cfg: EvalConfig, model: Model) -> list[Candidate]:
    """One policy a router, by rising lambda."""
    found = []
    for path in cfg.routers:
        _, facts = router_facts(path)
        weight = facts["skip_weight"]
        policy = load_router(path, model, cfg.threshold)
        found.append(Candidate("routed", f"routed λ={weight:g}", policy, {"lambda": weight}))
    labels = [c.label for c in found]
    require(
        len(set(labels)) == len(labels),
        f"two routers have the same lambda ({', '.join(labels)}); evaluate them in two sweeps",
    )
    return sorted(found, key=lambda c: c.facts["lambda"])


def _random(cfg: EvalConfig) -> list[Candidate]:
    return [Candidate("random", f"random k={k}", Random(k), {"num_skipped": k}) for k in cfg.random]


def _static(
    cfg: EvalConfig, model: Model, task: EvalTask, items: Sequence[Item]
) -> list[Candidate]:
    """The layers that Algorithm 1 chooses from the task's prompts, for every k it can reach."""
    if not cfg.static:
        return []
    chosen = items[: cfg.num_calibration]
    gen_length = max(len(answer) for item in chosen for answer in item.answers)
    similarities = layer_similarities(
        model, [item.prompt for item in chosen], gen_length, cfg.batch_size
    )
    found = []
    for k in cfg.static:
        layers = choose_static_layers(similarities, k, cfg.similarity_threshold)
        if len(layers) < k:
            print(f"{task.name}: Algorithm 1 finds only {len(layers)} layers; no static k={k}")
            continue
        facts = {"layers": list(layers), "num_skipped": k}
        found.append(Candidate("static", f"static k={k}", Static(layers), facts))
    return found


# ------------------------------------------------------------------------------------- results


def _start(
    cfg: EvalConfig, model: Model, tasks: Sequence[tuple[EvalTask, list[Item]]], workdir: Path
) -> dict[str, Any]:
    """The results so far, or new ones.

    Raises: InputError if the workdir holds the results of another sweep, or of routers or items
      that are others by now.
    """
    path = workdir / "results.json"
    fresh = {
        "config": to_dict(cfg),
        "model": {
            "path": cfg.model,
            "num_layers": model.num_layers,
            "parameters": trees.count_parameters(model.params),
            "fingerprint": model.fingerprint,
        },
        "items": {task.name: items_digest(items) for task, items in tasks},
        "rules": {task.name: RULES[task.metric] for task in cfg.tasks},
        "routers": {path: router_facts(path)[1]["digests"] for path in cfg.routers},
        "environment": environment(model, cfg.seed),
        "runs": [],
    }
    if not path.exists():
        return fresh
    try:
        old = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; remove it to start the sweep again") from error
    require("runs" in old, f"{path} is not of a sweep; choose another --workdir")
    old = _completed(old, cfg)
    before, now = (
        {"config": x["config"], "weights": x["model"]["fingerprint"]} for x in (old, fresh)
    )
    others = differing(before, now)
    require(
        not others,
        f"{workdir} holds another sweep ({', '.join(others)} differ); choose another --workdir",
    )
    for name, rules in fresh["rules"].items():
        require(
            old["rules"].get(name) == rules,
            f"{workdir} holds scores of {name} by another version's rules for answers; choose "
            "another --workdir",
        )
    for kind in ("items", "routers"):
        known = old.get(kind, fresh[kind]).values()  # by path; one may be named in two ways
        for (name, digest), kept in zip(fresh[kind].items(), known, strict=True):
            require(
                kept == digest,
                f"{workdir} holds results of other {kind} than {name} has now; "
                "choose another --workdir",
            )
    return old


def _completed(old: dict[str, Any], cfg: EvalConfig) -> dict[str, Any]:
    """With the defaults of a task's settings that are newer than the results, and first rules."""
    defaults = {f.name: f.default for f in fields(EvalTask) if f.default is not MISSING}
    defaults = json.loads(json.dumps(defaults))
    tasks = [defaults | task for task in old["config"].get("tasks", ())]
    rules = dict.fromkeys([task.name for task in cfg.tasks], 1)
    return {"rules": rules} | old | {"config": old["config"] | {"tasks": tasks}}
