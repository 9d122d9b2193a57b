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

from dials_jax.config import to_dict
from dials_jax.errors import InputError, require
from dials_jax.evaluation.items import Item
from dials_jax.evaluation.older_sweeps import read_results
from dials_jax.evaluation.sweep_identity import SWEEP_FILE, continue_identity
from dials_jax.evaluation.tally import NUM_BINS
from dials_jax.evaluation.task import PADDING_FIELDS, EvalConfig, EvalTask
from dials_jax.files import read_json
from dials_jax.models.model import Model
from dials_jax.records import RECORDS, Check, Records, require_numbers, require_sound, require_texts
from dials_jax.reporting.environment import environment
from dials_jax.skipping.flops import KEYS as FLOPS_KEYS
from dials_jax.workdir import require_unclaimed

SWEEP_FILES = (RECORDS, "results.json", "results.csv", "report.html", "plots")
POLICY_KINDS = ("full", "static", "routed", "random")  # in the order of the report


class SweepRecords:
    """The records of a sweep.

    Attributes:
      runs: the finished runs, by task and label of the policy.
      similarities: of the layers, by task and number of prompts, for Goel, Algorithm 1.
      environment: that of the last measurement; None before the first.
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
          rules: `rules_digest` by task.
        Raises: InputError if the workdir holds files of others that this sweep would overwrite, or
          results that depend on other settings.
        """
        self.runs: dict[tuple[str, str], dict[str, Any]] = {}
        self.similarities: dict[tuple[str, int], list[float]] = {}
        self.environment: dict[str, Any] | None = None
        self._newest_rules: dict[str, str | None] = {}
        self._batches: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._now = environment(model, identity["seed"])
        self._measuring = False
        check = partial(check_record, num_layers=model.num_layers)
        before = _find_results_without_records(workdir, identity, items, check)
        agree = partial(continue_identity, items=items)
        self._records = Records(workdir, identity, check, SWEEP_FILE, agree, before)
        stored = self._records.identity["tasks"]
        self._rules = {name: x for name, x in rules.items() if stored[name].get("outputs")}
        for record in self._records.all:
            self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        if "run" in record:
            run = record["run"]  # a bound on log 0 is infinite, which JSON cannot hold
            items = {name: math.inf if x is None else x for name, x in run["items"].items()}
            run = {**run, "items": items}
            self.runs[run["task"], run["policy"]["label"]] = run
            self._newest_rules[run["task"]] = run.get("rules")
        elif "scores" in record or "verdicts" in record:
            self._batches[_batch_key(record["task"], record["policy"])].append(record)
        elif "similarities" in record:
            where = record["task"], record["num_prompts"]
            self.similarities[where] = record["similarities"]
        else:
            self.environment = record["environment"]

    def add_run(self, run: dict[str, Any]) -> None:
        """Stores a finished run, with the rules by which its outputs were scored."""
        rules = self._rules.get(run["task"])
        self.add({"run": run | ({"rules": rules} if rules else {})})

    def add(self, record: dict[str, Any]) -> None:
        """Stores a record; before the first one of a process, also the environment."""
        new = [record] if self._measuring else [{"environment": self._now}, record]
        self._measuring = True
        for each in new:
            self._records.add(each)
            self._remember(each)

    def batches(self, task: str, policy: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The records of the batches of one policy on one task.

        Args:
          policy: as `Candidate.describe` returns it.
        """
        return self._batches[_batch_key(task, policy)]

    def is_finished(self, task: str, policy: Mapping[str, Any], num_items: int) -> bool:
        """Whether a run of this policy, with the same static layers, has scores of all items.

        They have to be by the rules of now, if all outputs are stored.
        """
        run = self.runs.get((task, policy["label"]))
        same = run is not None and run["policy"].get("layers") == policy.get("layers")
        same = same and run.get("rules") == self._rules.get(task)
        return same and len(run["items"]) == num_items

    def results(self, cfg: EvalConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The results of the finished runs; tasks that are only of earlier calls come last.

        If a task got more items, only runs on all of them are included, and if it got other rules
        for outputs, only runs by these.
        """
        newest = self._newest_rules
        runs = [run for run in self.runs.values() if run.get("rules") == newest[run["task"]]]
        most: dict[str, int] = defaultdict(int)
        for run in runs:
            most[run["task"]] = max(most[run["task"]], len(run["items"]))
        runs = [run for run in runs if len(run["items"]) == most[run["task"]]]
        names = {task.name: number for number, task in enumerate(cfg.tasks)}

        def report_order(run):
            policy = run["policy"]
            strength = policy.get("lambda", policy.get("num_skipped", 0))
            tau = policy.get("threshold", math.inf), -policy.get("execution_ratio", 0)
            task = names.get(run["task"], len(names))
            return (
                task,
                run["task"] if task == len(names) else "",
                POLICY_KINDS.index(policy["kind"]),
                strength,
                *tau,
            )

        return {
            "config": to_dict(cfg),
            **facts,
            "environment": self.environment or self._now,
            "runs": sorted(runs, key=report_order),
        }


def _batch_key(task: str, policy: Mapping[str, Any]) -> str:
    return json.dumps([task, policy], sort_keys=True)


def timing_conditions(cfg: EvalConfig, task: EvalTask, model: Model) -> dict[str, Any]:
    """Everything besides task and policy that measured seconds depend on."""
    where = environment(model, cfg.seed)
    return {
        **{name: where[name] for name in ("device", "mesh")},
        **{name: getattr(cfg, name) for name in ("layout", "batch_size")},
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
        dict(record["policy"])
        for name, *numbers in record["scores"]:
            require_texts(name)
            require_numbers(numbers, 3)
        for tokens in record.get("outputs", {}).values():
            require_numbers(tokens)
        _check_costs(record, num_layers)
    elif "verdicts" in record:
        require_texts(record["task"])
        dict(record["policy"])
        for digest, verdict in record["verdicts"].values():
            require_texts(digest, verdict)
    elif "similarities" in record:
        require_texts(record["task"])
        require_numbers([record["num_prompts"]])
        require_numbers(record["similarities"], num_layers)
    else:
        dict(record["environment"])


def _check_run(run: Mapping[str, Any], num_layers: int) -> None:
    policy = run["policy"]
    require_texts(run["task"], run["metric"], policy["label"])
    if policy["kind"] not in POLICY_KINDS:
        raise ValueError(f"policy of kind {policy['kind']!r}")
    names = ("lambda", "num_skipped", "threshold", "execution_ratio")
    require_numbers([policy.get(name, 0) for name in names], len(names))
    require_numbers(list(run["items"].values()))
    if not run["items"] or (run["metric"] != "nelbo" and None in run["items"].values()):
        raise ValueError("no items, or no score of one")
    require_numbers([run.get("num_dropped") or 0], 1)
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
