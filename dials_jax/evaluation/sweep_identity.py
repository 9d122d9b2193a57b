"""What the scores of a sweep depend on: stored as sweep.json, and compared when a sweep continues.

Scores do not depend on batch size, mesh and layout, so those may change. Policies and tasks may be
added or left out, and a task may get more items.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dials_jax.errors import require
from dials_jax.evaluation.items import Item, items_digest
from dials_jax.evaluation.older_sweeps import complete_task
from dials_jax.evaluation.task import METRIC_RULES, RULE_FIELDS, STATIC_FIELDS, EvalConfig, EvalTask
from dials_jax.evaluation.task_setup import generation_facts, score_settings
from dials_jax.models.model import Model
from dials_jax.workdir import require_same

SWEEP_FILE = "sweep.json"
GROWING_GROUPS = ("tasks", "static", "routers")  # parts of the identity that may grow


def sweep_identity(
    cfg: EvalConfig,
    model: Model,
    tasks: Sequence[tuple[EvalTask, Sequence[Item]]],
    routers: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that scores depend on.

    Args:
      tasks: with their items.
      routers: digests of the arrays and thresholds, by label of the policy.
    """
    static = {name: getattr(cfg, name) for name in STATIC_FIELDS}
    identity = {
        "kind": type(cfg).__name__,
        "seed": cfg.seed,
        "dtype": model.config.dtype,
        "weights": model.fingerprint,
        "tasks": {
            task.name: {
                **score_settings(task),
                "rules": METRIC_RULES[task.metric],
                "items": [items_digest(items), len(items)],
                "generation": generation_facts(task, items),
                "outputs": task.metric != "nelbo",  # stored, also log-likelihoods of choices
            }
            for task, items in tasks
        },
        "static": static if cfg.num_static else {},
        "routers": routers,
    }
    return json.loads(json.dumps(identity))  # as it is read back


def continue_identity(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    workdir: Path,
    items: Mapping[str, Sequence[Item]],
) -> Mapping[str, Any]:
    """The identity with which a sweep continues, from that of its workdir and the new one.

    Tasks, static skips and routers that only one of the two has are no contradiction. Neither are
    more items at the end of a task, because of a higher limit or in its files, nor other rules for
    outputs where all of these are stored.

    Args:
      items: of the tasks of this call, by name.
    Raises: InputError naming the settings that differ and would change scores.
    """
    require(
        old.get("kind") == new["kind"] and all(type(old.get(x)) is dict for x in GROWING_GROUPS),
        f"{workdir / SWEEP_FILE} is of no sweep, or damaged; put it back, or choose another "
        "--workdir",
    )
    tasks = {name: complete_task(name, task) for name, task in old["tasks"].items()}
    for name in tasks.keys() & items.keys():
        digest, count = tasks[name].get("items") or (None, 0)
        if items_digest(items[name][:count]) == digest:
            tasks[name] |= {kind: new["tasks"][name][kind] for kind in ("limit", "items")}
    old, new = {**old, "tasks": tasks}, {**new, "tasks": _stored_outputs(tasks, new["tasks"])}
    before, now = (
        {**one, **{group: {n: x for n, x in one[group].items() if n in other[group]}
                   for group in GROWING_GROUPS}}
        for one, other in ((old, new), (new, old))
    )  # fmt: skip
    for name, task in now["tasks"].items():
        require(
            before["tasks"][name].get("rules") == task["rules"],
            f"{workdir} holds scores of {name} by another version's rules for answers; choose "
            "another --workdir",
        )
    require_same(before, now, workdir, "sweep")
    return {**new, **{group: {**old[group], **new[group]} for group in GROWING_GROUPS}}


def _stored_outputs(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Says of the new tasks whether all their outputs are stored; if so, updates the old rules."""
    found = {}
    for name, task in new.items():
        before = old.get(name, {})
        found[name] = task = task | {"outputs": before.get("outputs", task["outputs"])}
        if before.get("outputs"):
            before |= {field: task[field] for field in (*RULE_FIELDS, "rules")}
            if before["generation"]:
                before["generation"] = before["generation"] | {"until": task["until"]}
    return found
