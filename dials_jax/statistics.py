"""Standard errors, intervals, paired tests, and the one table that every report shares.

Everything here is classical and exact where it can be; nothing is resampled. A score belongs to an
item, so two policies are compared item by item: most of the noise is the items', and it cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dials_jax.errors import InputError, require

ACCURACIES = ("exact_match", "choice")  # metrics scored 0 or 1 an item; others are real numbers


@dataclass(frozen=True)
class Paired:
    """A policy against a baseline on the same items. Units are those of the scores."""

    difference: float  # mean of score - baseline
    stderr: float  # of that mean
    p_value: float  # two-sided, not corrected for the number of comparisons
    num_items: int
    test: str  # "McNemar" or "paired t"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy on one task. A comparison that cannot be made is None."""

    task: str
    metric: str
    cache: str  # "none" without, as in runs that name none
    policy: str  # its label
    kind: str  # full, static, random or routed
    value: float  # mean over items
    stderr: float
    low: float  # 95 % interval of the value
    high: float
    difference: float | None  # to the full model on this task, as are the next two
    difference_stderr: float | None
    p_value: float | None
    layers_run: float  # share of full execution
    model: float  # share of full execution, the whole model counted
    seconds: float  # measured, compilation apart
    speedup: float | None  # seconds of the full model / seconds, if they compare
    num_items: int
    num_dropped: int | None  # items left out of all the above: too long; None: not recorded
    sampler: str | None  # and its settings; None: nothing is generated, or older results
    temperature: float | None
    steps: int | None  # denoising steps; None where confidence decides
    stop: str | None  # what ends a generation, and the text that counts


def mean_and_stderr(scores: Sequence[int | float] | np.ndarray) -> tuple[float, float]:
    """The mean and its standard error, sample standard deviation / sqrt(n).

    The error of a single score is unknown: NaN.
    """
    require(len(scores) > 0, "no scores: a mean needs at least one item")
    mean = float(np.mean(scores))
    if len(scores) == 1:
        return mean, math.nan
    return mean, float(np.std(scores, ddof=1)) / math.sqrt(len(scores))


def mean_interval(scores: Sequence[int | float] | np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of the mean; NaN for a single score."""
    import scipy.stats

    mean, stderr = mean_and_stderr(scores)
    half_width = float(scipy.stats.t.ppf(0.975, len(scores) - 1)) * stderr
    return mean - half_width, mean + half_width


def mean_at_zero(
    values: Sequence[float] | np.ndarray, covariate: Sequence[float] | np.ndarray
) -> tuple[float, float, float]:
    """What the mean of `values` is where `covariate` is 0, by least squares: value, low, high.

    Of differences between two policies, item by item, it is the difference with the covariate held
    equal. A covariate that never changes explains nothing: the plain mean. The interval is
    Student's, of 95 %, and NaN for fewer than 3 items.
    """
    import scipy.stats

    values, covariate = np.asarray(values, float), np.asarray(covariate, float)
    if len(values) < 2 or np.ptp(covariate) == 0:
        return (mean_and_stderr(values)[0], *mean_interval(values))
    fit = scipy.stats.linregress(covariate, values)
    if len(values) < 3:
        return float(fit.intercept), math.nan, math.nan
    half_width = float(scipy.stats.t.ppf(0.975, len(values) - 2) * fit.intercept_stderr)
    intercept = float(fit.intercept)
    return intercept, intercept - half_width, intercept + half_width


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion. It stays within [0, 1], and is not empty at 0 or n successes.

    Source: Wilson (1927), without continuity correction.
    """
    import scipy.stats

    require(0 <= successes <= n > 0, f"{successes} successes of {n}: need 0 <= successes <= n")
    require(0 < level < 1, f"level={level} must lie in (0, 1)")
    interval = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def paired_test(scores: Mapping[str, int | float], baseline: Mapping[str, int | float]) -> Paired:
    """Compares two policies on the same items, matched by key.

    Scores that are all 0 or 1 take the exact McNemar test, others a paired t-test.

    Raises: InputError if the two do not score the same items.
    Source: McNemar (1947), in the exact binomial form over discordant pairs.
    """
    unmatched = scores.keys() ^ baseline.keys()
    if unmatched:
        raise InputError(
            f"{len(unmatched)} items are scored on one side only (such as {min(unmatched)!r}); "
            "score both policies on the same items"
        )
    pairs = np.array([(scores[key], baseline[key]) for key in scores], dtype=np.float64)
    require(len(pairs) > 0, "no scores: a paired test needs at least one item")
    deltas = pairs[:, 0] - pairs[:, 1]
    if np.isin(pairs, (0, 1)).all():
        test, p_value = "McNemar", _mcnemar(deltas)
    else:
        test, p_value = "paired t", _paired_t(deltas)
    return Paired(*mean_and_stderr(deltas), p_value, len(deltas), test)


def _mcnemar(deltas: np.ndarray) -> float:
    """Items that both policies get right, or both wrong, say nothing about which is better."""
    import scipy.stats

    won, lost = int((deltas > 0).sum()), int((deltas < 0).sum())
    return float(scipy.stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _paired_t(deltas: np.ndarray) -> float:
    """Equals scipy.stats.ttest_rel, and says 1 (not NaN) when no item differs."""
    import scipy.stats

    if not deltas.any():
        return 1.0
    mean, stderr = mean_and_stderr(deltas)
    t = abs(mean) / stderr if stderr else math.inf
    return float(2 * scipy.stats.t.sf(t, len(deltas) - 1))


def by_task(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of each task, in order of its first run."""
    groups: dict[str, list] = {}
    for run in runs:
        groups.setdefault(run["task"], []).append(run)
    return groups


def summarise(results: Mapping[str, Any]) -> list[Row]:
    """One row a run, in the order of `by_task`.

    The paired columns and the speed-up are None where the task has no full run (yet). The full run
    is not compared with itself.

    Raises: InputError if a run has no items, or not those of the full run of its task.
    """
    rows = []
    for runs in by_task(results["runs"]).values():
        full = next((run for run in runs if run["policy"]["kind"] == "full"), None)
        rows += [_row(run, full) for run in runs]
    return rows


def _row(run: Mapping[str, Any], full: Mapping[str, Any] | None) -> Row:
    scores = list(run["items"].values())
    label, seconds = run["policy"]["label"], run["flops"]["seconds"]
    try:
        value, stderr = mean_and_stderr(scores)
        compare = full is not None and full is not run
        paired = paired_test(run["items"], full["items"]) if compare else None
        low, high = _interval(run["metric"], scores)
    except InputError as error:
        raise InputError(f"task {run['task']!r}, policy {label!r}: {error}") from error
    return Row(
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
        model=run["flops"]["model"],
        seconds=seconds,
        speedup=full["flops"]["seconds"] / seconds if seconds and _as_timed(run, full) else None,
        num_items=len(scores),
        num_dropped=run.get("num_dropped"),
        **_decoding(run.get("generation") or {}),
    )


# Settings with a column of their own.
_NAMED = ("sampler", "temperature", "steps", "cache", "until", "stop_at_eos")


def _decoding(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that say how texts were generated."""
    if not generation:
        return dict.fromkeys(("sampler", "temperature", "steps", "stop"))
    others = [
        f"{name} {value}"
        for name, value in generation.items()
        if name not in _NAMED and value is not None and value is not False
    ]
    by_confidence = generation.get("threshold") is not None or generation.get("factor") is not None
    until = ["end of text", *map(repr, generation["until"])]
    stops = generation.get("stop_at_eos") or generation["sampler"] == "autoregressive"
    early = "sequence ends at end of text" if stops else "all steps"
    return {
        "sampler": ", ".join([generation["sampler"], *others]),
        "temperature": generation["temperature"],
        "steps": None if by_confidence else generation["steps"],
        "stop": f"{early}; text up to {' or '.join(until)}",
    }


def _as_timed(run: Mapping[str, Any], full: Mapping[str, Any] | None) -> bool:
    """Whether both took their time under the same circumstances: device, mesh, batch size..."""
    if full is None:
        return False
    measured = run.get("measured", [])
    return len(measured) <= 1 and measured == full.get("measured", [])


def _interval(metric: str, scores: Sequence[int | float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for an accuracy, Student's t otherwise."""
    if metric in ACCURACIES:
        require(set(scores) <= {0, 1}, f"metric {metric!r}: scores must be 0 or 1")
        return wilson_interval(int(sum(scores)), len(scores))
    return mean_interval(scores)
