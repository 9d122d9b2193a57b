"""Paired tests of any two rows of sweeps: policies, settings or models, on one set of items.

`dials compare` prints what stands here, and a sweep's report has it for its own rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dials_jax.errors import InputError, require
from dials_jax.reporting.publish import Table
from dials_jax.reporting.seeds import pool_seeds, seed_sources
from dials_jax.reporting.speed import SweepRun
from dials_jax.statistics import adjust_by_holm, combined_interval, paired_test

Results = Mapping[str, Any]  # results.json of a sweep

PAIRS_LEGEND = (
    "Below the diagonal: value of the row - value of the column, on the same items. Above it: p of "
    "the two-sided paired test, the exact McNemar test for items scored 0 or 1, a paired t-test "
    "otherwise (so for means over several seeds). p covers the choice of items{}."
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two rows on the same items, in the units of the scores."""

    task: str
    row: str
    other: str
    difference: float  # mean of row - other
    stderr: float  # over items
    low: float  # 95 % interval of the difference
    high: float
    covers: str  # what the interval covers: "items", or "items and seeds"
    p_value: float  # covers the choice of items
    p_holm: float  # corrected for all pairs of the task
    num_items: int
    test: str


def compare_all(task: str, rows: Sequence[SweepRun]) -> list[Comparison]:
    """Compares every two pooled runs; later rows with earlier ones."""
    pairs = [(row, other) for other, row in itertools.combinations(rows, 2)]
    tests = [paired_test(row["items"], other["items"]) for row, other in pairs]
    corrected = adjust_by_holm([test.p_value for test in tests])
    found = []
    for (row, other), test, p_holm in zip(pairs, tests, corrected, strict=True):
        seeds = [*seed_sources(row), *seed_sources(other)]
        errors = [(test.stderr, test.num_items - 1), *seeds]
        low, high = combined_interval(test.difference, errors)
        found.append(
            Comparison(
                task=task,
                row=row["policy"]["label"],
                other=other["policy"]["label"],
                difference=test.difference,
                stderr=test.stderr,
                low=low,
                high=high,
                covers="items and seeds" if seeds else "items",
                p_value=test.p_value,
                p_holm=p_holm,
                num_items=test.num_items,
                test=test.test,
            )
        )
    return found


def pairs_table(rows: Sequence[SweepRun], pairs: Sequence[Comparison], corrected: bool) -> Table:
    """A matrix: differences below the diagonal, p above it.

    Args:
      corrected: show Holm's p.
    """
    labels = [row["policy"]["label"] for row in rows]
    cells = {(label, label): "" for label in labels}
    for pair in pairs:
        cells[pair.row, pair.other] = f"{pair.difference:+.4f}"
        p_value = pair.p_holm if corrected else pair.p_value
        cells[pair.other, pair.row] = "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
    lines = [
        [f"{number} {label}", *(cells[label, column] for column in labels)]
        for number, label in enumerate(labels, start=1)
    ]
    return Table(["", *map(str, range(1, len(labels) + 1))], lines)


def pairs_legend(corrected: bool) -> str:
    """How to read the matrix."""
    correction = ", corrected for all pairs of the task (Holm)" if corrected else ", not corrected"
    return PAIRS_LEGEND.format(f"{correction}; seeds are covered by the intervals in the CSV")


# ------------------------------------------------------------------------------- rows on one set


def rows_by_items(runs: Sequence[SweepRun], rules: Mapping[str, int]) -> dict[str, list[SweepRun]]:
    """Pools seeds, and groups the rows that can be compared: one metric, rules and set of items.

    Where a group has several tasks, such as one data set under two samplers, labels name the task.

    Args:
      rules: the version of the rules of each task; 1 if missing. Runs may have a digest of them.
    Returns: rows by the names of their tasks.
    """
    groups: dict[Any, list[SweepRun]] = {}
    for run in pool_seeds(runs):
        by = rules.get(run["task"], 1), run.get("rules")
        key = run["metric"], by, frozenset(run["items"])
        groups.setdefault(key, []).append(run)
    found = {}
    for group in groups.values():
        tasks = list(dict.fromkeys(run["task"] for run in group))
        if len(tasks) > 1:
            group = [_labelled(run, f"{run['task']}: {run['policy']['label']}") for run in group]
        found["; ".join(tasks)] = group
    return found


def _labelled(run: SweepRun, label: str) -> SweepRun:
    return {**run, "policy": {**run["policy"], "label": label}}


# -------------------------------------------------------------------------------------- workdirs


def merge_results(results: Mapping[str, Results]) -> tuple[list[SweepRun], dict[str, int]]:
    """Puts the runs of several sweeps together, and gives the rules of their tasks.

    Runs of one model and one way to score a task that differ in the seed make one row; a run that
    two sweeps have counts once. Where sweeps differ in the model or in a task's settings, labels
    name the sweep.

    Args:
      results: by the name of the sweep.
    Raises: InputError naming the items or rules that differ.
    """
    named = list(results.items())
    for (name, first), (other, second) in itertools.combinations(named, 2):
        _require_comparable(name, first, other, second)
    rules = {task: x for found in results.values() for task, x in found.get("rules", {}).items()}
    meanings: dict[str, list[Any]] = {}
    for found in results.values():
        for run in found["runs"]:
            meaning = _meaning(found, run)
            if meaning not in meanings.setdefault(run["task"], []):
                meanings[run["task"]].append(meaning)
    runs: dict[str, SweepRun] = {}
    for name, found in named:
        for run in found["runs"]:
            if len(meanings[run["task"]]) > 1:
                run = _labelled(run, f"{name}: {run['policy']['label']}")
            same = run["task"], run["policy"]["label"], run.get("seed"), run["policy"].get("router")
            runs.setdefault(repr(same), run)
    return list(runs.values()), rules


def _meaning(found: Results, run: SweepRun) -> Any:
    """What the scores of a task depend on beside policy, seed and items."""
    settings = dict(found.get("tasks", {}).get(run["task"]) or run.get("generation") or {})
    for name in ("name", "limit", "data", "items", "outputs"):  # the items themselves are compared
        settings.pop(name, None)
    return found["model"].get("fingerprint"), found["environment"].get("dtype"), settings


def _require_comparable(name: str, first: Results, other: str, second: Results) -> None:
    ours, theirs = ({run["task"]: run for run in found["runs"]} for found in (first, second))
    tasks = [task for task in ours if task in theirs]
    require(bool(tasks), f"{name} and {other} have no task in common; compare sweeps of one task")
    for task in tasks:
        what = f"{name} and {other} cannot be compared on {task!r}: "
        one, two = ours[task]["metric"], theirs[task]["metric"]
        require(one == two, f"{what}the metrics are {one!r} and {two!r}; score both by one")
        one, two = (found.get("rules", {}).get(task, 1) for found in (first, second))
        require(one == two, f"{what}the rules are of version {one} and {two}; score both by one")
        one, two = ours[task]["items"], theirs[task]["items"]
        require(
            one.keys() == two.keys(),
            f"{what}the items differ ({len(one)} and {len(two)}, {len(one.keys() & two.keys())} "
            "in common); score both with the same data and limit",
        )
        one, two = ours[task].get("rules"), theirs[task].get("rules")
        require(
            one == two or None in (one, two),
            f"{what}the settings by which outputs are scored differ; score both by the same",
        )
        one, two = (found.get("items", {}).get(task) for found in (first, second))
        require(
            one == two or None in (one, two),
            f"{what}labels or references of the items differ; score both with the same data",
        )


def require_pairs(groups: Mapping[str, Sequence[SweepRun]]) -> None:
    """Raises: InputError if there is nothing to compare."""
    if not any(len(rows) > 1 for rows in groups.values()):
        raise InputError("there is only one row; give a sweep of several policies, or two sweeps")
