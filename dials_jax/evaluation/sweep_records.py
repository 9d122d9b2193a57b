"""What a sweep has earned: its records in `runs.jsonl`, and the runs that they add up to.

Every batch is a record, so a sweep that was stopped goes on. What scores do not depend on (batch
size, mesh, layout) may change on the way, policies and tasks may come and go, and a task may get
more items.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dials_jax.caching.parse import cache_name
from dials_jax.config import to_dict
from dials_jax.errors import InputError, require
from dials_jax.evaluation.items import Item, items_digest
from dials_jax.evaluation.older import generated_length, read_task, stored_answer_length
from dials_jax.evaluation.scoring import METRIC_RULES
from dials_jax.evaluation.tally import NUM_BINS
from dials_jax.evaluation.task import EvalConfig, EvalTask
from dials_jax.evaluation.task_setup import generation_facts
from dials_jax.files import read_json
from dials_jax.models.model import Model
from dials_jax.records import RECORDS, Records, require_numbers, require_sound
from dials_jax.reporting.environment import environment
from dials_jax.skipping.flops import KEYS as FLOPS_KEYS
from dials_jax.workdir import require_same, require_unclaimed

SWEEP = "sweep.json"  # what the records depend on
FILES = (RECORDS, "results.json", "results.csv", "report.html", "plots")
GROWING_GROUPS = ("tasks", "static", "routers")  # parts of the identity that may grow
KINDS = ("full", "static", "routed", "random")  # of policies, in the order of the report
# Settings of a task that decide how its sequences are padded, and so only what they cost.
PADDING = ("bucket", "max_programs")
GENERATING = ("sampler", "cache")  # all of them are in `generation_facts`
CHOOSING = ("similarity_threshold", "num_calibration")  # which layers are static


class SweepRecords:
    """The records of a sweep.

    Attributes:
      runs: what is finished, by task and label of the policy.
      similarities: of the layers, by task and number of prompts, for Goel, Algorithm 1.
      environment: that of the last measurement; None before the first.
    """

    def __init__(
        self,
        workdir: Path,
        identity: Mapping[str, Any],
        items: Mapping[str, Sequence[Item]],
        model: Model,
    ):
        """Continues what the workdir holds, results of versions without records too, or starts.

        Raises: InputError if the workdir holds something that this sweep would spoil, or results
          that depend on something else.
        """
        self.runs: dict[tuple[str, str], dict[str, Any]] = {}
        self.similarities: dict[tuple[str, int], list[float]] = {}
        self.environment: dict[str, Any] | None = None
        self._batches: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._now = environment(model, identity["seed"])
        self._measuring = False
        check = partial(check_record, num_layers=model.num_layers)
        before = _before(workdir, identity, items, model.num_layers)
        agree = partial(_agree, items=items)
        self._records = Records(workdir, identity, check, SWEEP, agree, before)
        for record in self._records.all:
            self._note(record)

    def _note(self, record: dict[str, Any]) -> None:
        if "run" in record:
            run = record["run"]  # a bound on log 0 is infinite, which JSON cannot hold
            items = {name: math.inf if x is None else x for name, x in run["items"].items()}
            run = {**run, "items": items}
            self.runs[run["task"], run["policy"]["label"]] = run
        elif "scores" in record:
            self._batches[_key(record["task"], record["policy"])].append(record)
        elif "similarities" in record:
            where = record["task"], record["num_prompts"]
            self.similarities[where] = record["similarities"]
        else:
            self.environment = record["environment"]

    def add(self, record: dict[str, Any]) -> None:
        """Keeps a record; the first one of a process also says where it was measured."""
        found = [record] if self._measuring else [{"environment": self._now}, record]
        self._measuring = True
        for one in found:
            self._records.add(one)
            self._note(one)

    def batches(self, task: str, policy: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Those of one policy, as `Candidate.describe` has it, on one task."""
        return self._batches[_key(task, policy)]

    def finished(self, task: str, policy: Mapping[str, Any], num_items: int) -> bool:
        """Whether a policy is scored on all items, with the layers that it skips now."""
        run = self.runs.get((task, policy["label"]))
        same = run is not None and run["policy"].get("layers") == policy.get("layers")
        return same and len(run["items"]) == num_items

    def results(self, cfg: EvalConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What the report shows: the finished runs, those of tasks of other calls last.

        Of a task that got more items since, only runs on all of them.
        """
        most: dict[str, int] = defaultdict(int)
        for run in self.runs.values():
            most[run["task"]] = max(most[run["task"]], len(run["items"]))
        runs = [run for run in self.runs.values() if len(run["items"]) == most[run["task"]]]
        names = {task.name: number for number, task in enumerate(cfg.tasks)}

        def place(run):
            policy = run["policy"]
            strength = policy.get("lambda", policy.get("num_skipped", 0))
            task = names.get(run["task"], len(names))
            return (
                task,
                run["task"] if task == len(names) else "",
                KINDS.index(policy["kind"]),
                strength,
            )

        return {
            "config": to_dict(cfg),
            **facts,
            "environment": self.environment or self._now,
            "runs": sorted(runs, key=place),
        }


def _key(task: str, policy: Mapping[str, Any]) -> str:
    return json.dumps([task, policy], sort_keys=True)


def circumstances(cfg: EvalConfig, task: EvalTask, model: Model) -> dict[str, Any]:
    """What measured seconds depend on beside task and policy."""
    where = environment(model, cfg.seed)
    return {
        **{name: where[name] for name in ("device", "mesh")},
        **{name: getattr(cfg, name) for name in ("layout", "batch_size")},
        **{name: getattr(task, name) for name in PADDING},
    }


# ------------------------------------------------------------------------------------ identity


def sweep_identity(
    cfg: EvalConfig,
    model: Model,
    tasks: Sequence[tuple[EvalTask, Sequence[Item]]],
    routers: Mapping[str, Any],
) -> dict[str, Any]:
    """What scores depend on. Args: routers: their digests, by the label of the policy."""
    static = {name: getattr(cfg, name) for name in CHOOSING}
    identity = {
        "kind": type(cfg).__name__,
        "seed": cfg.seed,
        "dtype": model.config.dtype,
        "weights": model.fingerprint,
        "tasks": {
            task.name: {
                **_settings(task),
                "rules": METRIC_RULES[task.metric],
                "items": [items_digest(items), len(items)],
                "generation": generation_facts(task, items),
            }
            for task, items in tasks
        },
        "static": static if cfg.num_static else {},
        "routers": {
            label: {"digests": digests, "threshold": cfg.skip_threshold}
            for label, digests in routers.items()
        },
    }
    return json.loads(json.dumps(identity))  # as it is read back


def _settings(task: EvalTask) -> dict[str, Any]:
    left_out = ("name", *PADDING, *GENERATING)
    return {name: x for name, x in to_dict(task).items() if name not in left_out}


def _agree(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    workdir: Path,
    items: Mapping[str, Sequence[Item]],
) -> Mapping[str, Any]:
    """The identity of a sweep that goes on: what is only in one of the two is no contradiction.

    Nor are more items at the end of a task, by a higher limit or in its files.

    Raises: InputError naming the settings that differ and would change scores.
    """
    require(
        old.get("kind") == new["kind"] and all(type(old.get(x)) is dict for x in GROWING_GROUPS),
        f"{workdir / SWEEP} is of no sweep, or damaged; put it back, or choose another --workdir",
    )
    tasks = {name: _completed(name, task) for name, task in old["tasks"].items()}
    for name in tasks.keys() & items.keys():
        digest, count = tasks[name].get("items") or (None, 0)
        if items_digest(items[name][:count]) == digest:
            tasks[name] |= {kind: new["tasks"][name][kind] for kind in ("limit", "items")}
    old = {**old, "tasks": tasks}
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


def _completed(name: str, old: Any) -> Any:
    """The settings of a task with the defaults of those that are newer than the sweep."""
    try:
        beside = {key: old[key] for key in ("rules", "items", "generation")}
        digest, count = beside["items"]
        _require_text(digest)
        require_numbers([count])
        settings = {key: value for key, value in old.items() if key not in beside}
        length = generated_length(beside["generation"])
        return _settings(read_task({"name": name, **settings}, length)) | beside
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}  # of a newer version, or damaged: it differs


# ------------------------------------------------------------------------- what was there before


def _before(
    workdir: Path,
    identity: Mapping[str, Any],
    items: Mapping[str, Sequence[Item]],
    num_layers: int,
) -> tuple[Mapping[str, Any], list[dict[str, Any]]] | None:
    """Identity and records of a sweep by a version that kept `results.json` alone, if there is one.

    Raises: InputError for results of something else, and for files of others that would be
      overwritten.
    """
    path, known = workdir / "results.json", (workdir / SWEEP).exists()
    try:
        found = read_json(path) if path.exists() else None
    except InputError as error:
        if known:
            return None  # the records have it all
        raise InputError(f"{error}; move it away to start the sweep again") from error
    require(found is None or "runs" in found, f"{path} is not of a sweep; choose another --workdir")
    if known or found is None:
        require_unclaimed(workdir, SWEEP, FILES)
        return None
    with require_sound(path, "put it back, or choose another --workdir"):
        return _read_before(found, identity, items, num_layers)


def _read_before(
    found: Mapping[str, Any],
    new: Mapping[str, Any],
    items: Mapping[str, Sequence[Item]],
    num_layers: int,
) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    runs, where = found["runs"], found["environment"]
    cfg = {EvalConfig.RENAMED.get(name, name): value for name, value in found["config"].items()}
    tasks = {}
    for stored in cfg["tasks"]:
        name = stored["name"]
        length = stored_answer_length(stored, items.get(name, ()))
        tasks[name] = read_task(stored, length, "results.json: config.tasks")
    records = [{"environment": dict(where)}]
    for run in runs:
        if run["task"] not in tasks:
            raise ValueError(f"a run of task {run['task']!r}, which config does not have")
        task = tasks[run["task"]]
        if (run["metric"], run.get("cache", "none")) != (task.metric, cache_name(task.cache)):
            raise ValueError(f"a run of task {run['task']!r} with another metric or cache")
        records.append({"run": run})
        check_record(records[-1], num_layers)
    digests, counts = found.get("items", {}), {run["task"]: len(run["items"]) for run in runs}
    rules, routers = found.get("rules", {}), found.get("routers", {})
    routed = [run["policy"]["label"] for run in runs if run["policy"]["kind"] == "routed"]
    identity = {
        "kind": new["kind"],
        "seed": cfg["seed"],
        "dtype": where["dtype"],
        "weights": found["model"]["fingerprint"],
        "tasks": {
            name: {
                **_settings(task),
                "rules": rules.get(name, 1),
                "items": [digests[name], counts[name]]
                if name in digests and name in counts
                else new["tasks"].get(name, {}).get("items"),
                "generation": generation_facts(task, items[name]) if name in items else None,
            }
            for name, task in tasks.items()
        },
        "static": {name: cfg[name] for name in CHOOSING} if cfg["num_static"] else {},
        "routers": {
            label: {"digests": _digests(new, label, routers), "threshold": cfg["skip_threshold"]}
            for label in routed
        },
    }
    return identity, records


def _digests(new: Mapping[str, Any], label: str, kept: Mapping[str, Any]) -> Any:
    """Those of a router now if it is among the kept ones, which are by path and not by label."""
    now = new["routers"].get(label, {}).get("digests")
    return now if not kept or now in kept.values() else sorted(kept.values(), key=str)


# ---------------------------------------------------------------------------------- what is sound


def check_record(record: Any, num_layers: int) -> None:
    """Raises: a plain error for what is no record of a sweep."""
    if "run" in record:
        _check_run(record["run"], num_layers)
    elif "scores" in record:
        _require_text(record["task"])
        dict(record["policy"])
        for name, *numbers in record["scores"]:
            _require_text(name)
            require_numbers(numbers, 3)
        _check_costs(record, num_layers)
    elif "similarities" in record:
        _require_text(record["task"])
        require_numbers([record["num_prompts"]])
        require_numbers(record["similarities"], num_layers)
    else:
        dict(record["environment"])


def _check_run(run: Mapping[str, Any], num_layers: int) -> None:
    policy = run["policy"]
    _require_text(run["task"], run["metric"], policy["label"])
    if policy["kind"] not in KINDS:
        raise ValueError(f"policy of kind {policy['kind']!r}")
    require_numbers([policy.get("lambda", 0), policy.get("num_skipped", 0)], 2)
    require_numbers(list(run["items"].values()))
    if not run["items"] or (run["metric"] != "nelbo" and None in run["items"].values()):
        raise ValueError("no items, or no score of one")
    require_numbers([run.get("num_dropped") or 0], 1)
    _check_costs(run, num_layers)
    if run.get("generation"):
        _require_text(run["generation"]["sampler"], *run["generation"]["until"])
        require_numbers([run["generation"][name] for name in ("temperature", "steps")])
    for example in run.get("examples", []):
        _require_text(*(example[name] for name in ("prompt", "output", "reference")))
        bool(example["correct"])


def _check_costs(record: Mapping[str, Any], num_layers: int) -> None:
    flops, execution = record["flops"], record["execution"]
    require_numbers([flops[name] for name in FLOPS_KEYS.values()], len(flops))
    if None in flops.values():
        raise ValueError("a number of flops is null")
    require_numbers(execution["rows"], NUM_BINS)
    if len(execution["executed"]) != NUM_BINS:
        raise ValueError("execution of another number of mask ratios")
    for counts in execution["executed"]:
        require_numbers(counts, num_layers)


def _require_text(*values: Any) -> None:
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"{str(values)[:40]} is no text")
