"""The rows of an evaluation sweep: the numbers of every policy on every task.

A sweep that was stopped may have few runs, or none of the full model; what cannot be compared is
then None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dials_jax.errors import InputError, require
from dials_jax.reporting.seeds import pool_seeds, seed_interval
from dials_jax.reporting.speed import ACCURACIES, find_curves, pass_columns
from dials_jax.sampling.confidence import PARALLEL_RULES
from dials_jax.skipping.flops import KEYS as FLOPS_KEYS
from dials_jax.statistics import (
    mean_and_stderr,
    mean_interval,
    paired_ratio,
    paired_test,
    wilson_interval,
)

GENERATED = ("exact_match", "code")  # metrics of generated texts


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One policy on one task. A comparison that cannot be made is None."""

    task: str
    metric: str
    cache: str  # "none" without a cache, and where the run names none
    policy: str  # its label
    kind: str  # full, static, random or routed
    value: float  # mean over items
    stderr: float
    low: float  # 95 % interval of the value
    high: float
    difference: float | None  # to the full model on this task, like the next two
    difference_stderr: float | None
    p_value: float | None
    layers_run: float  # share of the layers
    flops_share: float  # share of full execution, the whole model counted; `model` in the CSV
    seconds: float  # measured, without compilation
    speedup: float | None  # time of the full model / time, if measured alike and out of the noise
    num_items: int
    num_dropped: int | None  # items left out of all the above (too long); None: not recorded
    sampler: str | None  # with its settings; None: nothing is generated, or older results
    temperature: float | None
    steps: int | None  # denoising steps; None where confidence decides
    stop: str | None  # what ends a generation, and which text counts
    nfe: float | None  # own passes per sequence, on average; None, like the next two: not recorded
    tokens_per_pass: float | None
    passes_per_second: float | None  # that each sequence of a batch gets
    aup: float | None  # accuracy under parallelism of its curve; None: it lies on none
    num_seeds: int  # runs of which this row is the mean
    seed_stdev: float | None  # standard deviation of their values; None for one
    num_timings: int  # repeated times, in turns with the other policies'; 0: only `seconds`
    timed_median: float | None  # seconds of them, like the next two
    timed_low: float | None  # the shortest
    timed_high: float | None
    in_noise: bool  # the median lies in the range of the full model's repeats
    batch_size: str | None  # in which it was scored; "any": batch-invariant; None: not recorded
    # Settings as numbers, for plots of one's own; None: the run has no such setting.
    num_samples: int | None  # Monte-Carlo samples of a likelihood
    limit: int | None  # of items
    skip_weight: float | None  # lambda of a router; so named in the CSV
    num_skipped: int | None  # layers of a static or random policy
    static_layers: str | None  # those of a static policy, counted from 0
    adjacent: bool  # Goel, Algorithm 1 was allowed to choose neighbours
    per_token: float | None  # accuracy by log-likelihood per token (choice)
    chance: float | None  # accuracy of guessing (choice)
    # Against the full model. None: not known, or of the full model itself; so are their intervals.
    retention: float | None  # value / its value, for accuracies above 0
    retention_low: float | None  # 95 % interval, like all of these
    retention_high: float | None
    equivalence: float | None  # share of generations that are identical, token for token
    equivalence_low: float | None
    equivalence_high: float | None
    kl: float | None  # KL(full || this), nats per token
    kl_low: float | None
    kl_high: float | None


def group_runs_by_task(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Groups runs by task; tasks are in the order of their first run."""
    groups: dict[str, list] = {}
    for run in runs:
        groups.setdefault(run["task"], []).append(run)
    return groups


def compute_sweep_rows(results: Mapping[str, Any]) -> list[SweepRow]:
    """Computes one row per policy and task, in the order of `group_runs_by_task`.

    The paired columns and the speed-up are None where the task has no full run (yet). The full run
    is not compared with itself.

    Args:
      results: of a sweep, as in its results.json.

    Raises: InputError if a run has no items, or other items than the full run of its task.
    """
    pooled = pool_seeds(results["runs"])
    curves = [curve for found in find_curves(pooled).values() for curve in found]
    aup = {id(run): curve.aup for curve in curves for run in curve.runs}
    rows = []
    for runs in group_runs_by_task(pooled).values():
        full = next((run for run in runs if run["policy"]["kind"] == "full"), None)
        rows += [_row(run, full, aup.get(id(run))) for run in runs]
    return rows


def _row(run: Mapping[str, Any], full: Mapping[str, Any] | None, aup: float | None) -> SweepRow:
    scores = list(run["items"].values())
    label, seconds = run["policy"]["label"], run["flops"]["seconds"]
    seed_means = run.get("seed_means", ())
    try:
        value, stderr = mean_and_stderr(scores)
        compare = full is not None and full is not run
        paired = paired_test(run["items"], full["items"]) if compare else None
        accuracy = run["metric"] in ACCURACIES
        retained = paired_ratio(run["items"], full["items"]) if compare and accuracy else None
        low, high = value_interval(run)
    except InputError as error:
        raise InputError(f"task {run['task']!r}, policy {label!r}: {error}") from error
    return SweepRow(
        task=run["task"],
        metric=run["metric"],
        cache=run.get("cache", "none"),
        policy=label,
        kind=run["policy"]["kind"],
        value=value,
        stderr=stderr,
        low=low,
        high=high,
        difference=paired and paired.difference,
        difference_stderr=paired and paired.stderr,
        p_value=paired and paired.p_value,
        layers_run=run["flops"]["layers_run"],
        flops_share=run["flops"][FLOPS_KEYS["flops_share"]],
        seconds=seconds,
        num_items=len(scores),
        num_dropped=run.get("num_dropped"),
        **_generation_columns(run.get("generation") or {}),
        **pass_columns(run),
        aup=aup,
        num_seeds=len(seed_means) or 1,
        seed_stdev=float(np.std(seed_means, ddof=1)) if seed_means else None,
        **_timing_columns(run, full),
        batch_size=_batch_size(run.get("measured", [])),
        **_setting_columns(run),
        **_with_interval("retention", retained),
        **_with_interval("equivalence", _equivalence(run.get("identical", {}))),
        **_with_interval("kl", _mean_with_interval(run.get("kl", {}))),
    )


def _with_interval(name: str, estimate: tuple[float, float, float] | None) -> dict[str, Any]:
    """The columns of an estimate and of the ends of its interval."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), estimate or [None] * 3, strict=True))


def _equivalence(identical: Mapping[str, float]) -> tuple[float, float, float] | None:
    """The share of items that are 1, with Wilson's interval; of means over seeds Student's."""
    if not identical or not set(identical.values()) <= {0, 1}:
        return _mean_with_interval(identical)
    same, count = int(sum(identical.values())), len(identical)
    return same / count, *wilson_interval(same, count)


def _mean_with_interval(values: Mapping[str, float]) -> tuple[float, float, float] | None:
    numbers = list(values.values())
    return (mean_and_stderr(numbers)[0], *mean_interval(numbers)) if numbers else None


def _setting_columns(run: Mapping[str, Any]) -> dict[str, Any]:
    policy, also, settings = (run.get(name) or {} for name in ("policy", "also", "settings"))
    layers = policy.get("layers")
    return {
        "num_samples": settings.get("num_samples") if run["metric"] not in GENERATED else None,
        "limit": settings.get("limit"),
        "skip_weight": policy.get("lambda"),
        "num_skipped": policy.get("num_skipped"),
        "static_layers": None if layers is None else " ".join(map(str, layers)),
        "adjacent": policy.get("adjacent", False),
        "per_token": also.get("accuracy_per_token"),
        "chance": also.get("chance"),
    }


# Settings of a generation that have a column of their own.
_OWN_COLUMN = ("sampler", "temperature", "steps", "cache", "until", "stop_at_eos")


def _generation_columns(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that tell how texts were generated."""
    if not generation:
        return dict.fromkeys(("sampler", "temperature", "steps", "stop"))
    settings = [
        f"{name} {value}"
        for name, value in generation.items()
        if name not in _OWN_COLUMN and value is not None and value is not False and value != []
        if not name.startswith("end_think_") or generation.get("end_think_ids")
    ]
    by_confidence = any(generation.get(rule) is not None for rule in PARALLEL_RULES)
    until = ["end of text", *map(repr, generation["until"])]
    stops = generation.get("stop_at_eos") or generation["sampler"] == "autoregressive"
    early = "sequence ends at end of text" if stops else "all steps"
    return {
        "sampler": ", ".join([generation["sampler"], *settings]),
        "temperature": generation["temperature"],
        "steps": None if by_confidence else generation["steps"],
        "stop": f"{early}; text up to {' or '.join(until)}",
    }


def _timing_columns(run: Mapping[str, Any], full: Mapping[str, Any] | None) -> dict[str, Any]:
    """The speed-up and the repeated times; a speed-up within the noise is none."""
    own, base = (_repeated_seconds(one) for one in (run, full or {}))
    seconds, alike = run["flops"]["seconds"], timed_alike(run, full)
    speedup, in_noise = None, False
    if own and base and run["timing"]["measured"] == full["timing"]["measured"]:
        median, speedup = np.median(own), float(np.median(base) / np.median(own))
        in_noise = run is not full and bool(min(base) <= median <= max(base))
    elif not own and seconds and alike:
        speedup = full["flops"]["seconds"] / seconds
    return {
        "speedup": None if in_noise else speedup,
        "num_timings": len(own),
        "timed_median": float(np.median(own)) if own else None,
        "timed_low": min(own, default=None),
        "timed_high": max(own, default=None),
        "in_noise": in_noise,
    }


def _batch_size(measured: Sequence[Mapping[str, Any]]) -> str | None:
    """The batch sizes of a run, or of several seeds of one, between spaces."""
    if measured and all(one.get("batch_invariant") for one in measured):
        return "any"
    sizes = dict.fromkeys(str(one["batch_size"]) for one in measured if one.get("batch_size"))
    return " ".join(sizes) or None


def _repeated_seconds(run: Mapping[str, Any]) -> list[float]:
    return list((run.get("timing") or {}).get("seconds", ()))


def timed_alike(run: Mapping[str, Any], full: Mapping[str, Any] | None) -> bool:
    """Whether both were timed under the same conditions: device, mesh, batch size, ..."""
    if full is None:
        return False
    measured = run.get("measured", [])
    return len(measured) <= 1 and measured == full.get("measured", [])


def value_interval(run: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for an accuracy of one seed, else Student's t.

    That of an accuracy ends at 0 and 1.
    """
    scores = list(run["items"].values())
    if "seed_means" in run:
        low, high = seed_interval(run)
        return (max(low, 0.0), min(high, 1.0)) if run["metric"] in ACCURACIES else (low, high)
    if run["metric"] in ACCURACIES:
        require(set(scores) <= {0, 1}, f"metric {run['metric']!r}: scores must be 0 or 1")
        return wilson_interval(int(sum(scores)), len(scores))
    return mean_interval(scores)


def csv_columns() -> list[str]:
    """The columns of results.csv, under the names that every version wrote."""
    names = FLOPS_KEYS | {"skip_weight": "lambda"}
    return [names.get(field.name, field.name) for field in dataclasses.fields(SweepRow)]


def csv_rows(rows: Sequence[SweepRow]) -> list[dict[str, Any]]:
    """The rows of results.csv."""
    return [dict(zip(csv_columns(), dataclasses.astuple(row), strict=True)) for row in rows]
