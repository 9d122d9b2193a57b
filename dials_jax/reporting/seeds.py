"""Runs of one policy under several seeds, as one row.

Seeds are those of evaluation (random masks, sampling, random skipping) and of router training:
routers that were trained alike but for the seed have one label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dials_jax.errors import require
from dials_jax.reporting.speed import SweepRun
from dials_jax.skipping.flops import Flops
from dials_jax.statistics import combined_interval, mean_and_stderr


def pool_seeds(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Makes one run of all runs of a task that have one label, in the order of the first ones.

    Its scores are the items' means over the seeds, its costs means over the seeds. `seed_means`
    has the value of each seed.
    """
    groups: dict[tuple[str, str], list[SweepRun]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["policy"]["label"]), []).append(run)
    return [_pool(group) if len(group) > 1 else group[0] for group in groups.values()]


def _pool(runs: Sequence[SweepRun]) -> SweepRun:
    first, count = runs[0], len(runs)
    for run in runs:
        require(
            run["items"].keys() == first["items"].keys(),
            f"task {run['task']!r}, policy {run['policy']['label']!r}: its seeds have other items; "
            "score them with the same limit",
        )
    flops = Flops.sum([Flops.from_dict(run["flops"]) for run in runs])
    flops = flops._replace(
        model_total=flops.model_total / count,
        seconds=math.fsum(r["flops"]["seconds"] for r in runs) / count,
    )
    pooled = {
        **first,
        "items": _mean(run["items"] for run in runs),
        "flops": flops.to_dict(),
        "execution": {
            name: np.sum([run["execution"][name] for run in runs], axis=0).tolist()
            for name in ("executed", "rows")
        },
        "measured": _all_different(x for run in runs for x in run.get("measured", [])),
        "seed_means": [float(np.mean(list(run["items"].values()))) for run in runs],
    }
    counted = [run.get("passes", {}).keys() for run in runs]
    if all(counts == first["items"].keys() for counts in counted):
        pooled["passes"] = _mean(run["passes"] for run in runs)
        pooled["num_calls"] = sum(run["num_calls"] for run in runs) / count
    else:
        pooled.pop("passes", None)
    for name in ("identical", "kl"):
        own = [run.get(name, {}) for run in runs]
        if all(x.keys() == own[0].keys() for x in own):
            pooled |= {name: _mean(own)} if own[0] else {}
        else:
            pooled.pop(name, None)
    timings = [run["timing"] for run in runs if run.get("timing")]  # of some seeds, perhaps
    if timings:
        measured = timings[-1]["measured"]
        alike = [timing["seconds"] for timing in timings if timing["measured"] == measured]
        pooled["timing"] = {"measured": measured, "seconds": [s for own in alike for s in own]}
    if first.get("also"):
        pooled["also"] = _mean(run["also"] for run in runs)
    return pooled


def _mean(values: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of numbers, or of lists of them, by name."""
    values = list(values)
    return {name: np.mean([x[name] for x in values], axis=0).tolist() for name in values[0]}


def _all_different(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def seed_sources(run: SweepRun) -> list[tuple[float, int]]:
    """The standard error of the mean over the seeds, with its degrees of freedom; none for one."""
    means = run.get("seed_means", ())
    return [(mean_and_stderr(means)[1], len(means) - 1)] if len(means) > 1 else []


def seed_interval(run: SweepRun) -> tuple[float, float]:
    """A 95 % interval of a pooled run's value that covers both the choice of items and the seeds.

    The two variances are added. What differs between seeds item by item is in both of them, so the
    interval is rather too wide than too narrow.
    """
    value, stderr = mean_and_stderr(list(run["items"].values()))
    return combined_interval(value, [(stderr, len(run["items"]) - 1), *seed_sources(run)])
