"""The records of a sweep, in `runs.jsonl`: every batch, and the runs that they add up to.

A sweep that was stopped continues from its records.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dials_jax import sharding
from dials_jax.config import to_dict
from dials_jax.errors import InputError, require
from dials_jax.evaluation.items import Item, items_digest
from dials_jax.evaluation.older_sweeps import EarlierRecords, read_results
from dials_jax.evaluation.sweep_groups import POLICY_KINDS, shown_groups
from dials_jax.evaluation.sweep_identity import SWEEP_FILE, grow_identity, stored_name
from dials_jax.evaluation.tally import NUM_BINS
from dials_jax.evaluation.task import PADDING_FIELDS, EvalConfig, EvalTask
from dials_jax.files import read_json
from dials_jax.models.model import Model
from dials_jax.records import RECORDS, Check, Records, require_numbers, require_sound, require_texts
from dials_jax.reporting.environment import environment
from dials_jax.skipping.flops import KEYS as FLOPS_KEYS
from dials_jax.workdir import require_unclaimed

SWEEP_FILES = (RECORDS, "results.json", "results.csv", "results.tex", "report.html", "plots")
# What a stored policy says beside what its answers depend on; `router` includes its threshold.
DESCRIPTIONS = ("label", "training", "folder", "threshold", "adjacent")


class SweepRecords:
    """The records of a sweep.

    Attributes:
      runs: the finished runs, by all that their scores depend on.
      similarities: records of the layers' similarities, for Goel, Algorithm 1, by task and digest
        of the prompts.
      environment: that of the last measurement; None before the first.
      commands: of all measurements, each with its date and version.
      names: in the records, by the name of a task in this call.
    """

    def __init__(
        self,
        workdir: Path,
        identity: Mapping[str, Any],
        items: Mapping[str, Sequence[Item]],
        model: Model,
        rules: Mapping[str, str | None],
    ):
        """Continues the sweep in the workdir, which any version may have started, or starts one.

        Args:
          items: of the tasks of this call, by name.
          rules: `rules_digest` by task.
        Raises: InputError if the workdir holds files of others that this sweep would overwrite, or
          results of another model.
        """
        self.runs: dict[str, dict[str, Any]] = {}
        self.similarities: dict[tuple[str, str], dict[str, Any]] = {}
        self.environment: dict[str, Any] | None = None
        self.commands: list[str] = []
        self._batches: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._newest_rules: dict[str, str | None] = {}
        self._timings: dict[str, dict[str, dict[int, float]]] = defaultdict(dict)
        self._outputs: dict[str, dict[str, list[int]]] = defaultdict(dict)
        self._kl: dict[str, dict[str, float]] = defaultdict(dict)
        self._now = environment(model, identity["seed"])
        self._seed = identity["seed"]
        self._measuring = False
        check = partial(check_record, num_layers=model.num_layers)
        before = _find_results_without_records(workdir, identity, items, check)
        self._records = Records(workdir, identity, check, SWEEP_FILE, grow_identity, before)
        self._identity = stored = self._records.identity
        self.names = {
            name: stored_name(stored["tasks"], task) for name, task in identity["tasks"].items()
        }
        self._rules = {
            name: rules[name] if stored["tasks"][known].get("outputs") else None
            for name, known in self.names.items()
        }
        self._digests = {name: items_digest(of_task) for name, of_task in items.items()}
        sharding.require_same_everywhere({"items of its tasks": self._digests})
        self._completed = EarlierRecords(stored, {self.names[name]: x for name, x in items.items()})
        for record in self._records.all:
            self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        record = self._completed(record)
        if "run" in record:
            run = record["run"]  # a bound on log 0 is infinite, which JSON cannot hold
            items = {name: math.inf if x is None else x for name, x in run["items"].items()}
            self.runs.pop(_run_key(run), None)  # the newest come last
            self.runs[_run_key(run)] = {**run, "items": items}
            self._newest_rules[_row_key(run)] = run.get("rules")
        elif "scores" in record or "verdicts" in record:
            key = _key(record["task"], record["policy"], record["seed"])
            self._batches[key].append(record)
            self._outputs[key] |= record.get("outputs", {})
        elif "kl" in record:
            self._kl[_key(record["task"], record["policy"], record["seed"])] |= record["kl"]
        elif "timing" in record:
            timing = record["timing"]
            conditions = json.dumps(timing["measured"], sort_keys=True)
            known = self._timings[_timing_key(record)]
            known[conditions] = known.pop(conditions, {}) | {timing["repeat"]: timing["seconds"]}
        elif "similarities" in record:
            self.similarities[record["task"], record["prompts"]] = record
        else:
            self.environment = where = record["environment"]
            about = ", ".join(str(where[name]) for name in ("date", "library") if name in where)
            command = f"{where.get('command', '')}  # {about}"
            self.commands += [] if command in self.commands else [command]

    def add(self, record: dict[str, Any]) -> None:
        """Stores a record; before the first one of a process, also the environment."""
        new = [record] if self._measuring else [{"environment": self._now}, record]
        self._measuring = True
        for each in new:
            self._records.add(each)
            self._remember(each)

    def about(self, task: str, policy: Mapping[str, Any]) -> dict[str, Any]:
        """What a record of this call says that its answers depend on, but for the items.

        Args:
          policy: as `Candidate.describe` returns it.
        """
        return {"task": self.names[task], "policy": dict(policy), "seed": self._seed}

    def batches(self, task: str, policy: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The records of the batches of one policy on one task, whatever the items."""
        return self._batches[_key(**self.about(task, policy))]

    def outputs(self, task: str, policy: Mapping[str, Any]) -> dict[str, list[int]]:
        """The stored tokens of one policy's outputs on one task, by name of the item."""
        return self._outputs[_key(**self.about(task, policy))]

    def kl(self, task: str, policy: Mapping[str, Any]) -> dict[str, float]:
        """The stored KL of one policy to the full model, by name of the item."""
        return self._kl[_key(**self.about(task, policy))]

    def timings(self, task: str, policy: Mapping[str, Any], measured: Any) -> dict[int, float]:
        """The stored seconds of one policy under the same conditions, by repeat."""
        conditions = json.dumps(measured, sort_keys=True)
        return self._timings[_timing_key(self._run(task, policy))].get(conditions, {})

    def add_timing(
        self, task: str, policy: Mapping[str, Any], measured: Any, repeat: int, seconds: float
    ) -> None:
        """Stores one measured time of a policy."""
        timing = {"measured": measured, "repeat": repeat, "seconds": seconds}
        self.add(self._run(task, policy) | {"timing": timing})

    def is_finished(self, task: str, policy: Mapping[str, Any]) -> bool:
        """Whether the newest run of this policy on exactly these items is by the rules of now.

        Where its outputs count, too, they have to be there: damaged records are set aside.
        """
        run = self._run(task, policy)
        newest = self._newest_rules.get(_row_key(run))
        found = self.runs.get(_run_key(run))
        if found is None or newest != self._rules[task]:
            return False
        generated = found.get("passes", {}).keys() if self._rules[task] else set()
        return generated <= self.outputs(task, policy).keys()

    def num_finished(self, task: str, kind: str) -> int:
        """How many policies of this kind have a finished run on exactly these items."""
        here = self.names[task], self._digests[task], self._seed
        found = {
            _row_key(run): run["policy"]
            for run in self.runs.values()
            if (run["task"], run["items_digest"], run["seed"]) == here
        }
        policies = [policy for policy in found.values() if policy["kind"] == kind]
        return sum(self.is_finished(task, policy) for policy in policies)

    def _run(self, task: str, policy: Mapping[str, Any]) -> dict[str, Any]:
        """What a run says that its scores depend on."""
        rules = {"rules": self._rules[task]} if self._rules[task] else {}
        return self.about(task, policy) | {"items_digest": self._digests[task]} | rules

    def add_run(self, task: str, policy: Mapping[str, Any], run: dict[str, Any]) -> None:
        """Stores a finished run."""
        self.add({"run": self._run(task, policy) | run})

    def results(self, cfg: EvalConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The results of the finished runs; what is only of earlier calls comes last."""
        current = [
            (self.names[task.name], self._digests[task.name], self._rules[task.name])
            for task in cfg.tasks
        ]
        groups = shown_groups(list(self.runs.values()), current)
        tasks = self._identity["tasks"]
        return {
            "config": to_dict(cfg),
            **facts,
            "items": {title: group[0]["items_digest"] for title, group in groups.items()},
            "rules": {t: tasks[group[0]["task"]].get("rules", 1) for t, group in groups.items()},
            "tasks": {title: tasks[group[0]["task"]] for title, group in groups.items()},
            "environment": self.environment or self._now,
            "commands": self.commands,
            "runs": [
                {**run, **self._newest_timing(run), **self._against_full(run), "task": title}
                for title, group in groups.items()
                for run in group
            ],
        }

    def _against_full(self, run: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """What compares a run's tokens with the full model's, by name of the item.

        `identical`: 1 where its output is the full model's, token for token, else 0; where both
        have stored all of them. `kl`: nats per token, of the items that were measured.
        """
        if run["policy"]["kind"] == "full":
            return {}
        full = _key(run["task"], {"kind": "full"}, run["seed"])
        own = _key(run["task"], run["policy"], run["seed"])
        ours, theirs = self._outputs.get(own, {}), self._outputs.get(full, {})
        found = {}
        if run["items"].keys() <= ours.keys() & theirs.keys():
            found["identical"] = {name: float(ours[name] == theirs[name]) for name in run["items"]}
        measured = self._kl.get(own, {})
        kl = {name: measured[name] for name in run["items"] if name in measured}
        return found | ({"kl": kl} if kl else {})

    def _newest_timing(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """The repeated times of a run, under the conditions that were measured last."""
        known = self._timings.get(_timing_key(run))
        if not known:
            return {}
        conditions, seconds = list(known.items())[-1]
        return {"timing": {"measured": json.loads(conditions), "seconds": list(seconds.values())}}


def _key(task: str, policy: Mapping[str, Any], seed: int) -> str:
    """Everything that answers to items depend on: labels and other descriptions do not count."""
    counts = {name: x for name, x in policy.items() if name not in DESCRIPTIONS}
    return json.dumps([task, counts, seed], sort_keys=True)


def _timing_key(run: Mapping[str, Any]) -> str:
    return _key(run["task"], run["policy"], run["seed"]) + run["items_digest"]


def _row_key(run: Mapping[str, Any]) -> str:
    """Policies of the same layers are rows of their own where they were chosen otherwise."""
    return _timing_key(run) + (" adjacent" if run["policy"].get("adjacent") else "")


def _run_key(run: Mapping[str, Any]) -> str:
    return f"{_row_key(run)}, {run.get('rules')}"


def timing_conditions(cfg: EvalConfig, task: EvalTask, model: Model) -> dict[str, Any]:
    """Everything besides task and policy that measured seconds depend on."""
    where = environment(model, cfg.seed)
    return {
        **{name: where[name] for name in ("device", "mesh")},
        **{name: getattr(cfg, name) for name in ("layout", "batch_size")},
        **({"batch_invariant": True} if model.batch_invariant else {}),
        **{name: getattr(task, name) for name in PADDING_FIELDS},
    }


# ------------------------------------------------------------------------- results without records


def _find_results_without_records(
    workdir: Path,
    identity: Mapping[str, Any],
    items: Mapping[str, Sequence[Item]],
    check: Check,
) -> tuple[Mapping[str, Any], list[dict[str, Any]]] | None:
    """The identity and records of a sweep by a version that wrote results.json alone, if any.

    Raises: InputError for results of something else, and for files of others that would be
      overwritten.
    """
    path, known = workdir / "results.json", (workdir / SWEEP_FILE).exists()
    try:
        found = read_json(path) if path.exists() else None
    except InputError as error:
        if known:
            return None  # the records have it all
        raise InputError(f"{error}; move it away to start the sweep again") from error
    require(found is None or "runs" in found, f"{path} is not of a sweep; choose another --workdir")
    if known or found is None:
        require_unclaimed(workdir, SWEEP_FILE, SWEEP_FILES)
        return None
    with require_sound(path, "put it back, or choose another --workdir"):
        return read_results(found, identity, items, check)


# ------------------------------------------------------------------------------- checking records


def check_record(record: Any, num_layers: int) -> None:
    """Checks that an object is a record of a sweep.

    Raises: one of `records.PLAIN_ERRORS` for anything else.
    """
    if "run" in record:
        _check_run(record["run"], num_layers)
    elif "scores" in record:
        require_texts(record["task"])
        require_numbers([record.get("seed", 0)])
        dict(record["policy"])
        for name, *numbers in record["scores"]:
            require_texts(name)
            require_numbers(numbers, 3)
        for tokens in record.get("outputs", {}).values():
            require_numbers(tokens)
        require_numbers([record.get("measured", {}).get("batch_size", 1)], 1)
        _check_costs(record, num_layers)
    elif "verdicts" in record:
        require_texts(record["task"])
        dict(record["policy"])
        for digest, verdict in record["verdicts"].values():
            require_texts(digest, verdict)
    elif "kl" in record:
        require_texts(record["task"], *record["kl"])
        dict(record["policy"])
        require_numbers([record["seed"], *record["kl"].values()])
    elif "timing" in record:
        require_texts(record["task"], record["items_digest"])
        dict(record["policy"])
        dict(record["timing"]["measured"])
        require_numbers([record["seed"], *(record["timing"][x] for x in ("repeat", "seconds"))])
    elif "similarities" in record:
        require_texts(record["task"])
        require_texts(record.get("prompts", ""))
        require_numbers([record.get("num_prompts", 0)])
        for similarities in (record["similarities"], *record.get("by_prompt", ())):
            require_numbers(similarities, num_layers)
    else:
        dict(record["environment"])


def _check_run(run: Mapping[str, Any], num_layers: int) -> None:
    policy = run["policy"]
    require_texts(run["task"], run["metric"], policy["label"], run.get("items_digest", ""))
    require_numbers([run.get("seed", 0)])
    if policy["kind"] not in POLICY_KINDS:  # a caller's own
        require_texts(policy["kind"], policy["digest"])
    names = ("lambda", "num_skipped", "threshold", "execution_ratio")
    require_numbers([policy.get(name, 0) for name in names], len(names))
    require_numbers(list(run["items"].values()))
    if not run["items"] or (run["metric"] != "nelbo" and None in run["items"].values()):
        raise ValueError("no items, or no score of one")
    require_numbers([run.get("num_dropped") or 0], 1)
    for name in ("identical", "kl"):  # in results.json
        require_numbers(list(run.get(name, {}).values()))
    _check_costs(run, num_layers)
    if run.get("generation"):
        require_texts(run["generation"]["sampler"], *run["generation"]["until"])
        require_numbers([run["generation"][name] for name in ("temperature", "steps")])
    for example in run.get("examples", []):
        require_texts(*(example[name] for name in ("prompt", "output", "reference")))
        bool(example["correct"])


def _check_costs(record: Mapping[str, Any], num_layers: int) -> None:
    flops, execution = record["flops"], record["execution"]
    require_numbers([record.get("num_calls", 0)], 1)
    for counts in record.get("passes", {}).values():
        require_numbers(counts, 2)
    require_numbers([flops[name] for name in FLOPS_KEYS.values()], len(flops))
    if None in flops.values():
        raise ValueError("a number of flops is null")
    require_numbers(execution["rows"], NUM_BINS)
    if len(execution["executed"]) != NUM_BINS:
        raise ValueError("execution of another number of mask ratios")
    for counts in execution["executed"]:
        require_numbers(counts, num_layers)
