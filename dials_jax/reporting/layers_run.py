"""Figures of which layers the policies of a sweep ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from dials_jax.reporting import sweep_plots
from dials_jax.reporting.publish import Figure, file_name
from dials_jax.reporting.speed import ACCURACIES
from dials_jax.reporting.sweep_rows import SweepRow

HEATMAP_CAPTION = (
    "Share of the forward passes in which each policy executed each layer: pale layers are skipped."
)
MASK_RATIO_CAPTION = (
    "Share of layers executed against the share of answer tokens still masked: generation moves "
    "from right to left, and a flat line is a policy that does not react to it."
)
TASKS_CAPTION = (
    "Layers that routers ran on each task, over all calls and by the share of answer tokens still "
    "masked. Of each task, the router that ran the fewest layers while no worse than the full "
    "model, or the best one if all are worse. No call was made at mask ratios without a row."
)


def execution_figures(task: str, runs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Which layers the policies ran on a task, and how many by mask ratio."""
    name = file_name(task)  # a task may have a / in its name
    shares = np.array([share_by_layer(run["execution"]) for run in runs])
    labels = [run["policy"]["label"] for run in runs]
    data = {"labels": labels, "shares": shares, "title": task}
    heatmap = Figure(f"layers_{name}", HEATMAP_CAPTION, sweep_plots.execution_heatmap, data)
    lines = [
        sweep_plots.Line(
            run["policy"]["kind"],
            short_label(run["policy"]),
            tuple(_share_by_bin(run["execution"])),
        )
        for run in runs
        if run["policy"]["kind"] != "full"
    ]
    if not lines:
        return [heatmap]
    data = {"lines": lines, "title": task}
    by_ratio = sweep_plots.executed_by_mask_ratio
    return [heatmap, Figure(f"mask_ratio_{name}", MASK_RATIO_CAPTION, by_ratio, data)]


def figure_over_tasks(
    groups: Mapping[str, Sequence[tuple[Mapping[str, Any], SweepRow]]],
) -> list[Figure]:
    """The layers that a router ran on every task: DIALS, Figure 5. None without routers.

    Args:
      groups: runs and their rows, by task.
    """
    tasks = []
    for task, group in groups.items():
        routed = [(run, row) for run, row in group if row.kind == "routed"]
        if not routed:
            continue
        full = next((row for _, row in group if row.kind == "full"), None)
        run, _ = _least_that_keeps(routed, full)
        title = f"{task}, {short_label(run['policy'])}"
        counts = run["execution"]
        by_ratio = _divide(np.array(counts["executed"]), np.array(counts["rows"])[:, None])
        tasks.append(sweep_plots.TaskLayers(title, share_by_layer(counts), by_ratio))
    data = {"tasks": tasks}
    draw = sweep_plots.execution_by_task
    return [Figure("layers_by_task", TASKS_CAPTION, draw, data)] if tasks else []


def _least_that_keeps(
    routed: Sequence[tuple[Mapping[str, Any], SweepRow]], full: SweepRow | None
) -> tuple[Mapping[str, Any], SweepRow]:
    """The run with the fewest FLOPs among those no worse than the full model, else the best."""

    def quality(row: SweepRow) -> float:
        return row.value if row.metric in ACCURACIES else -row.value

    keep = [pair for pair in routed if full is not None and quality(pair[1]) >= quality(full)]
    if keep:
        return min(keep, key=lambda pair: pair[1].flops_share)
    return max(routed, key=lambda pair: quality(pair[1]))


def short_label(policy: Mapping[str, Any]) -> str:
    """The label without the kind of policy: lambda, k, or a set of layers."""
    return policy["label"].removeprefix(f"{policy['kind']} ")


def share_by_layer(execution: Mapping[str, Any]) -> Float[np.ndarray, "L"]:
    """Share of model calls, counted per sequence, that executed each layer."""
    return _divide(np.sum(execution["executed"], axis=0), np.sum(execution["rows"]))


def _share_by_bin(execution: Mapping[str, Any]) -> Float[np.ndarray, "bins"]:
    """Share of layers executed in each bin of mask ratio."""
    return _divide(np.mean(execution["executed"], axis=1), np.array(execution["rows"]))


def _divide(executed: np.ndarray, calls: np.ndarray | np.integer) -> np.ndarray:
    """The share of the calls; NaN where nothing ran."""
    return np.where(calls > 0, executed / np.maximum(calls, 1), np.nan)
