"""What the scores of a sweep depend on, so that a sweep can grow without mixing them up.

A workdir is for one model: its weights and dtype. Everything else may differ from call to call.
Records name their task, policy, seed and items. `sweep.json` says what each name of a task stands
for: a task that comes back with other settings gets another name, such as "gsm8k, steps 64", and
the scores under the first name stay. Mesh and layout change no score, but for rounding. Nor does
the batch size; yet in bfloat16 on a GPU rounding decides close choices, so a run keeps its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dials_jax.config import TrainConfig, from_dict, shown, to_dict
from dials_jax.digests import content_id
from dials_jax.errors import require
from dials_jax.evaluation.items import Item
from dials_jax.evaluation.older_sweeps import complete_task
from dials_jax.evaluation.task import METRIC_RULES, RULE_FIELDS, EvalConfig, EvalTask
from dials_jax.evaluation.task_setup import generation_facts, score_settings
from dials_jax.files import read_json
from dials_jax.models.model import Model
from dials_jax.skipping.storage import RouterInfo
from dials_jax.training.run import EXPERIMENT, FREE_FIELDS
from dials_jax.workdir import differences, require_same

SWEEP_FILE = "sweep.json"
# What all calls in a workdir have in common.
ONE_MODEL = ("kind", "dtype", "weights", "batch_invariant")
# Settings of a task that decide which items there are; runs name their items themselves.
ITEM_SETTINGS = ("limit", "data.paths", "data.folder", "data.cache", "data.reader")
# Rules that may change where all outputs are stored; runs name the rules by which they score.
OUTPUT_RULES = (*RULE_FIELDS, "rules", "generation.until")
LONGEST_TASK_NAME = 60  # characters of a task's name that says how its settings differ


def sweep_identity(
    cfg: EvalConfig,
    model: Model,
    tasks: Sequence[tuple[EvalTask, Sequence[Item]]],
    routers: Mapping[str, Any],
) -> dict[str, Any]:
    """What the scores of this call depend on.

    Args:
      tasks: with their items.
      routers: as `candidates.routed_candidates` describes them.
    """
    identity = {
        "kind": type(cfg).__name__,
        "seed": cfg.seed,
        "dtype": model.config.dtype,
        "weights": model.fingerprint,
        "tasks": {
            task.name: {
                "name": task.name,
                **score_settings(task),
                "rules": METRIC_RULES[task.metric],
                "generation": generation_facts(task, items),
                "outputs": task.metric != "nelbo",  # stored, also log-likelihoods of choices
            }
            for task, items in tasks
        },
        "routers": routers,
    }
    if model.batch_invariant:  # sweeps of earlier versions have no such entry
        identity["batch_invariant"] = True
    return json.loads(json.dumps(identity))  # as it is read back


def grow_identity(
    old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path
) -> Mapping[str, Any]:
    """Adds the tasks and routers of a call to what a workdir's records depend on.

    The seed stays: it is that of records by versions that named none. Where all outputs of a task
    are stored, its rules for outputs are now those of the call.

    Raises: InputError naming what differs if the workdir is for another model.
    """
    require(
        old.get("kind") == new["kind"]
        and all(type(old.get(x)) is dict for x in ("tasks", "routers")),
        f"{workdir / SWEEP_FILE} is of no sweep, or damaged; put it back, or choose another "
        "--workdir",
    )
    model, now = ({name: one.get(name) for name in ONE_MODEL} for one in (old, new))
    require_same(model, now, workdir, "sweep")
    tasks = dict(old["tasks"])
    for task in new["tasks"].values():
        name = stored_name(tasks, task)
        tasks[name] = _with_new_rules(tasks[name], task) if name in tasks else task
    routers = {**old["routers"], **new["routers"]}
    return {**new, "seed": old.get("seed"), "tasks": tasks, "routers": routers}


def stored_name(stored: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """The name in the records for a task with these settings: a stored one, or a new one.

    Args:
      stored: the tasks of `sweep.json`, of any version.
      task: one of `sweep_identity`.
    """
    name, first = task["name"], None
    for known, settings in stored.items():
        if settings.get("name", known) == name:
            differing = _differences(complete_task(known, settings), task)
            if not differing:
                return known
            first = differing if first is None else first
    if first is None and name not in stored:
        return name
    values = {path.rpartition(".")[2]: shown(x).strip("'") for path, x in (first or {}).items()}
    changes = ", ".join(f"{setting} {value}" for setting, value in values.items())
    names = [f"{name}, {changes}"] if changes and len(name + changes) <= LONGEST_TASK_NAME else []
    names += [f"{name} ({number})" for number in range(2, len(stored) + 3)]
    return next(x for x in names if x not in stored)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new values of the settings that differ and that answers to the same items depend on."""
    found = {name: now for name, (_, now) in differences(old, new).items()}
    left_out = ("name", "outputs", *ITEM_SETTINGS, *(OUTPUT_RULES if old.get("outputs") else ()))
    return {name: x for name, x in found.items() if name not in left_out}


def _with_new_rules(old: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored task with the rules of a call, if its outputs can be scored again."""
    if not old.get("outputs"):
        return old
    until = {"until": new["until"]} if old["generation"] else {}
    rules = {name: new[name] for name in (*RULE_FIELDS, "rules")}
    return {**old, **rules, "generation": {**old["generation"], **until}}


def router_training(folder: Path, info: RouterInfo) -> str:
    """A digest of how a router was trained, but for the seed: equal for seeds of one training.

    Args:
      folder: of the router. If it lies in a workdir of training, that has the settings.
    """
    path, settings = folder.parent / EXPERIMENT, {}
    if path.exists():
        found = read_json(path)
        train = to_dict(from_dict(TrainConfig, found.get("train", {}), str(path)))
        settings = _without(found | {"train": train}, ("train.seed", *FREE_FIELDS))
    return content_id([to_dict(info.router), info.skip_weight, settings])


def _without(values: Mapping[str, Any], left_out: tuple[str, ...], at: str = "") -> dict[str, Any]:
    """The settings but for some, which are dotted names or the beginnings of such."""
    kept = {name: x for name, x in values.items() if not f"{at}{name}".startswith(left_out)}
    return {
        name: _without(x, left_out, f"{at}{name}.") if isinstance(x, dict) else x
        for name, x in kept.items()
    }
