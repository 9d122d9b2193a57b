"""Reads the sweeps that earlier versions stored.

Their tasks had the settings of sampler and cache as fields of their own, and their records named
neither seed nor router. The earliest of them kept results.json alone, without records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_args

from dials_jax.caching.parse import cache_name, parse_cache
from dials_jax.config import from_dict
from dials_jax.digests import content_id
from dials_jax.evaluation.items import Item, items_digest
from dials_jax.evaluation.task import EvalConfig, EvalTask, SamplerConfig
from dials_jax.evaluation.task_setup import generation_facts, score_settings
from dials_jax.records import Check
from dials_jax.sampling.confidence import Confidence
from dials_jax.sampling.dream import Dream

# What `sweep.json` says of a router beside what scores depend on.
ROUTER_FACTS = ("label", "lambda", "router", "training", "folder", "execution_ratio")
_LENGTH_FIELD = {"confidence": "gen_length", "dream": "max_new_tokens"}  # by sampler


def router_id(router: Mapping[str, Any]) -> str:
    """Identifies a router with its thresholds, as `sweep.json` describes it."""
    return content_id({name: x for name, x in router.items() if name not in ROUTER_FACTS})


def read_task(stored: Mapping[str, Any], answer_length: int | None, where: str = "") -> EvalTask:
    """Reads a task that this or an earlier version stored.

    Args:
      answer_length: tokens to generate if the stored sampler has no `gen_length`.
      where: the beginning of error messages.

    Raises: InputError for settings that no version stored.
    """
    old = {name: x for name, x in stored.items() if name in EvalTask.RENAMED}
    kind, cache = stored.get("sampler"), stored.get("cache")
    if not old and not isinstance(kind, str) and not isinstance(cache, str):
        return from_dict(EvalTask, dict(stored), where)
    values = {name: x for name, x in stored.items() if name not in old} | {"sampler": None}
    values["cache"] = parse_cache(cache) if cache is not None else None
    if stored.get("metric") == "exact_match":
        guidance = values.pop("cfg_scale", 0.0)
        length = old.pop("gen_length", None) or answer_length
        if length is None:
            pass  # the items are not known, so no texts will be generated
        elif kind == "dream":
            given = {name: x for name, x in old.items() if x is not None}
            values["sampler"] = Dream(length, **_fields_of(Dream, given))
        else:
            fields = _fields_of(Confidence, old)
            values["sampler"] = Confidence(length, cfg_scale=guidance, **fields)
    return from_dict(EvalTask, values, where)


def _fields_of(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a sampler has, of those that all shared; the rest had default values."""
    return {name: x for name, x in settings.items() if name in cls.__dataclass_fields__}


def generated_length(generation: Mapping[str, Any]) -> int | None:
    """The number of tokens that a sampler generates, from stored `generation_facts`."""
    return generation.get(_LENGTH_FIELD.get(generation.get("sampler"), ""))


def stored_answer_length(stored: Mapping[str, Any], items: Sequence[Item]) -> int | None:
    """The number of tokens that a stored task generates by default.

    Args:
      items: of the task; empty if they are not known.
    """
    longest = max((len(item.answers[0]) for item in items), default=None)
    return stored.get("data", {}).get("answer_length") or longest


def complete_task(name: str, old: Any) -> Any:
    """Adds the defaults of settings that are newer than a stored sweep.

    Args:
      old: the task in the sweep's identity.
    Returns: {} for what a newer version stored, or for damage: it differs from every task.
    """
    try:
        generation = complete_generation(old["generation"])
        beside = {"rules": old["rules"], "generation": generation}
        beside["outputs"] = old.get("outputs", old["metric"] == "choice")
        left_out = ("name", "items", *beside)
        settings = {key: value for key, value in old.items() if key not in left_out}
        length = generated_length(generation)
        return score_settings(read_task({"name": name, **settings}, length)) | beside
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def complete_generation(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored `generation_facts`, with the defaults of the sampler's settings that are newer."""
    sampler = {cls.__name__.lower(): cls for cls in get_args(SamplerConfig)}.get(
        stored.get("sampler")
    )
    if sampler is None:
        return dict(stored)
    defaults = {f.name: f.default for f in fields(sampler) if f.default is not MISSING}
    return json.loads(json.dumps(defaults)) | stored


def read_results(
    found: Mapping[str, Any],
    new: Mapping[str, Any],
    items: Mapping[str, Sequence[Item]],
    check: Check,
) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """Makes identity and records from the results.json of a version that had no records.

    Args:
      found: results.json.
      new: the identity of the sweep that continues.
      items: of the tasks of this call, by name.
      check: raises for an object that is not a record.
    Raises: a plain error for damaged results.
    """
    cfg = {EvalConfig.RENAMED.get(name, name): value for name, value in found["config"].items()}
    tasks = {}
    for stored in cfg["tasks"]:
        name = stored["name"]
        length = stored_answer_length(stored, items.get(name, ()))
        tasks[name] = read_task(stored, length, "results.json: config.tasks")
    records = [{"environment": dict(found["environment"])}]
    for run in found["runs"]:
        if run["task"] not in tasks:
            raise ValueError(f"a run of task {run['task']!r}, which config does not have")
        task = tasks[run["task"]]
        if (run["metric"], run.get("cache", "none")) != (task.metric, cache_name(task.cache)):
            raise ValueError(f"a run of task {run['task']!r} with another metric or cache")
        # By which rules outputs were scored is of use only where they are stored.
        records.append({"run": {name: x for name, x in run.items() if name != "rules"}})
        check(records[-1])
    return _identity_of_results(found, cfg, tasks, new, items), records


def _identity_of_results(
    found: Mapping[str, Any],
    cfg: Mapping[str, Any],
    tasks: Mapping[str, EvalTask],
    new: Mapping[str, Any],
    items: Mapping[str, Sequence[Item]],
) -> dict[str, Any]:
    """The `sweep_identity` of results; what they do not tell is taken from the new sweep."""
    digests, rules, routers = (found.get(name, {}) for name in ("items", "rules", "routers"))
    counts = {run["task"]: len(run["items"]) for run in found["runs"]}
    policies = [run["policy"] for run in found["runs"]]
    routed = [policy["label"] for policy in policies if policy["kind"] == "routed"]
    return {
        "kind": new["kind"],
        "seed": cfg["seed"],
        "dtype": found["environment"]["dtype"],
        "weights": found["model"]["fingerprint"],
        "tasks": {
            name: {
                **score_settings(task),
                "rules": rules.get(name, 1),
                "items": [digests[name], counts[name]]
                if name in digests and name in counts
                else [items_digest(items.get(name, ())), len(items.get(name, ()))],
                "generation": generation_facts(task, items[name]) if name in items else None,
                "outputs": False,
            }
            for name, task in tasks.items()
        },
        "routers": {
            label: {
                "digests": _router_digests(new, label, routers),
                "threshold": cfg["skip_threshold"],
            }
            for label in routed
        },
    }


def _router_digests(new: Mapping[str, Any], label: str, stored: Mapping[str, Any]) -> Any:
    """The digests of a router, stored under its label or its path, as those of this call tell."""
    now = [x["digests"] for x in new["routers"].values() if x["label"] == label]
    known = [x for x in now if not stored or x in stored.values()]
    return stored.get(label) or (known[0] if known else sorted(stored.values(), key=str))


class EarlierRecords:
    """Completes records of earlier versions by what they took from `sweep.json`.

    Those named neither seed nor router, and digests of items and prompts were not in them.
    """

    def __init__(self, identity: Mapping[str, Any], items: Mapping[str, Sequence[Item]]):
        """Args: items: of the tasks of this call, by their names in the records."""
        self._seed, self._tasks, self._items = identity["seed"], identity["tasks"], items
        self._routers = {
            name: router.get("router") or router_id(router)
            for name, router in identity["routers"].items()
        }
        self._facts = {
            self._routers[name]: {
                fact: router[fact]
                for fact in (*ROUTER_FACTS, "threshold")
                if type(router.get(fact)) in (str, int, float)
            }
            for name, router in identity["routers"].items()
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        if "run" in record:
            run = self._with_source(record["run"])
            found = {"items_digest": self._digest(run["task"], len(run["items"]))}
            return {"run": found | run}
        if "policy" in record:
            return self._with_source(record)
        if "similarities" in record and "prompts" not in record:
            return {**record, "prompts": self._digest(record["task"], record["num_prompts"])}
        return record

    def _with_source(self, record: dict[str, Any]) -> dict[str, Any]:
        policy = dict(record["policy"])
        if policy.get("kind") == "routed":
            label = policy.get("label")
            policy.setdefault("router", self._routers.get(label, label))
            policy = self._facts.get(policy["router"], {}) | policy
        return {"seed": self._seed, **record, "policy": policy}

    def _digest(self, task: str, count: int) -> str:
        """The digest of a task's first items, if they are what they were."""
        digest, total = self._tasks.get(task, {}).get("items") or ("", 0)
        if count == total:
            return digest
        items = self._items.get(task, ())
        unchanged = bool(total) and items_digest(items[:total]) == digest
        return items_digest(items[:count]) if unchanged else f"{count} items"
