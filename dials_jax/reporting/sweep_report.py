"""The report of an evaluation sweep, written after every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dials_jax.files import write_json
from dials_jax.reporting import html, sweep_plots
from dials_jax.reporting.comparison import compare_all, pairs_legend, pairs_table, rows_by_items
from dials_jax.reporting.publish import Figure, Report, file_name, publish
from dials_jax.reporting.seeds import pool_seeds
from dials_jax.reporting.speed import (
    ACCURACIES,
    SpeedCurve,
    find_curves,
    rule_value,
    tokens_per_pass,
)
from dials_jax.reporting.sweep_table import (
    SWEEP_LEGEND,
    SweepRow,
    compute_sweep_rows,
    csv_columns,
    csv_rows,
    format_table,
    group_runs_by_task,
    page_table,
    speed_table,
    timed_alike,
    value_interval,
)

SHOWN_EXAMPLES = 3  # generations per run

YLABELS = {
    "exact_match": "accuracy (exact match)",
    "code": "accuracy (tests passed, pass@1)",
    "choice": "accuracy (multiple choice)",
    "nelbo": "NELBO, nats per token (lower is better)",
}

TRADEOFF_CAPTION = (
    "Quality against the share of layers run: a policy that beats the random one at the same "
    "share chose its layers well; bars are 95 % intervals of each value alone, so take the "
    "paired p of the table to compare two policies."
)
SPEED_CAPTION = (
    "Accuracy against tokens a pass and against seconds, along the value of one sampler's setting "
    "(written at the points); AUP is the penalised area under the left curve. Seconds are shown "
    "where all runs were timed alike."
)
HEATMAP_CAPTION = (
    "Share of the forward passes in which each policy executed each layer: pale layers are skipped."
)
MASK_RATIO_CAPTION = (
    "Share of layers executed against the share of answer tokens still masked: generation moves "
    "from right to left, and a flat line is a policy that does not react to it."
)


def write_report(results: Mapping[str, Any], folder: str | Path) -> list[SweepRow]:
    """Writes results.json, results.csv, plots/*.png and a self-contained report.html.

    Returns: the rows of the table.
    Raises: the errors of `compute_sweep_rows`, but only after results.json is written.
    """
    folder = Path(folder)
    write_json(folder / "results.json", results)
    rows = compute_sweep_rows(results)
    publish(sweep_report(results, rows), folder)
    return rows


def sweep_report(results: Mapping[str, Any], rows: Sequence[SweepRow]) -> Report:
    """Makes the report of what a sweep has found so far; `rows` are those of the results."""
    environment = dict(results["environment"])
    command = environment.pop("command", "")
    facts = html.describe_values(results["model"]) + html.describe_values(environment)
    runs = pool_seeds(results["runs"])
    curves = find_curves(runs)
    speed = {"Accuracy against tokens a pass": speed_table(curves)} if curves else {}
    return Report(
        title=f"Layer skipping on {Path(results['model'].get('path', 'a model')).name}",
        results=results,
        columns=csv_columns(),
        rows=csv_rows(rows),
        tables={"Results": page_table(rows), **speed},
        legend=SWEEP_LEGEND,
        figures=[*_speed_figure(curves), *_figures(runs, rows)] if rows else [],
        text=format_table(rows),
        above={"Model and environment": html.definition_list(facts, "facts")},
        below={
            "All pairs": _pairs_html(results),
            "Example generations": _examples_html(runs),
            "Reproduce": html.preformatted(command),
        },
    )


# -------------------------------------------------------------------------------------- figures


def _speed_figure(curves: Mapping[str, Sequence[SpeedCurve]]) -> list[Figure]:
    """Accuracy against tokens per pass and seconds; none without curves."""
    panels = []
    for title, found in curves.items():
        first = found[0].runs[0]
        alike = all(timed_alike(run, first) for curve in found for run in curve.runs)
        lines = tuple(
            sweep_plots.SpeedLine(
                f"{curve.label} (AUP {curve.aup:.1f})",
                tuple(_speed_point(run, alike) for run in curve.runs),
            )
            for curve in found
        )
        panels.append(sweep_plots.SpeedPanel(title, YLABELS[first["metric"]], lines))
    plot = sweep_plots.speed_curves
    return [Figure("tokens_per_pass", SPEED_CAPTION, plot, {"panels": panels})] if panels else []


def _speed_point(run: Mapping[str, Any], timed: bool) -> sweep_plots.SpeedPoint:
    scores = list(run["items"].values())
    low, high = value_interval(run)
    seconds = run["flops"]["seconds"] if timed else None
    value = sum(scores) / len(scores)
    return sweep_plots.SpeedPoint(tokens_per_pass(run), seconds, value, low, high, rule_value(run))


def _figures(runs: Sequence[Mapping], rows: Sequence[SweepRow]) -> list[Figure]:
    """The trade-off of all tasks, then for each task which layers its policies executed."""
    panels, figures, next_rows = [], [], iter(rows)  # rows are in the order of the groups
    for task, group in group_runs_by_task(runs).items():
        points = [
            sweep_plots.Point(
                row.kind, _short_label(run["policy"]), row.layers_run, row.value, row.low, row.high
            )
            for run, row in zip(group, islice(next_rows, len(group)), strict=True)
        ]
        metric = group[0]["metric"]
        lower = metric not in ACCURACIES
        panels.append(sweep_plots.Panel(task, YLABELS.get(metric, metric), tuple(points), lower))
        figures += _execution_figures(task, group)
    tradeoff = Figure("tradeoff", TRADEOFF_CAPTION, sweep_plots.tradeoff_curve, {"panels": panels})
    return [tradeoff, *figures]


def _execution_figures(task: str, runs: Sequence[Mapping]) -> list[Figure]:
    name = file_name(task)  # a task may have a / in its name
    shares = np.array([_share_by_layer(run["execution"]) for run in runs])
    labels = [run["policy"]["label"] for run in runs]
    data = {"labels": labels, "shares": shares, "title": task}
    heatmap = Figure(f"layers_{name}", HEATMAP_CAPTION, sweep_plots.execution_heatmap, data)
    lines = [
        sweep_plots.Line(
            run["policy"]["kind"],
            _short_label(run["policy"]),
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


def _short_label(policy: Mapping[str, Any]) -> str:
    """The label that tells policies of one kind apart: lambda or k."""
    if policy.get("lambda") is not None:
        tau = f" τ={policy['threshold']:g}" if "threshold" in policy else ""
        ratio = f" at {policy['execution_ratio']:g}" if "execution_ratio" in policy else ""
        return f"λ={policy['lambda']:g}{tau}{ratio}"
    if policy.get("num_skipped") is not None:
        return f"k={policy['num_skipped']}"
    return policy["label"]


def _share_by_layer(execution: Mapping[str, Any]) -> Float[np.ndarray, "L"]:
    """Share of model calls, counted per sequence, that executed each layer."""
    return _divide(np.sum(execution["executed"], axis=0), np.sum(execution["rows"]))


def _share_by_bin(execution: Mapping[str, Any]) -> Float[np.ndarray, "bins"]:
    """Share of layers executed in each bin of mask ratio."""
    return _divide(np.mean(execution["executed"], axis=1), np.array(execution["rows"]))


def _divide(executed: np.ndarray, calls: np.ndarray | np.integer) -> np.ndarray:
    """The share of the calls; NaN where nothing ran."""
    return np.where(calls > 0, executed / np.maximum(calls, 1), np.nan)


# --------------------------------------------------------------------------------------- page


def _pairs_html(results: Mapping[str, Any]) -> str:
    """A matrix of paired tests per set of items, to open on a click."""
    groups = rows_by_items(results["runs"], results.get("rules", {}))
    tables = {
        task: pairs_table(rows, compare_all(task, rows), corrected=False).html()
        for task, rows in groups.items()
        if len(rows) > 1
    }
    sections = html.collapsible_sections(tables.items(), first_open=False)
    return html.paragraph(pairs_legend(corrected=False)) + sections if tables else ""


def _examples_html(runs: Sequence[Mapping]) -> str:
    shown = [run for run in runs if run.get("examples")]
    return html.collapsible_sections(
        (
            f"{run['task']}: {run['policy']['label']}",
            "".join(map(_example_html, run["examples"][:SHOWN_EXAMPLES])),
        )
        for run in shown
    )


def _example_html(example: Mapping[str, Any]) -> str:
    verdict = "correct" if example["correct"] else "wrong"
    texts = {name: html.preformatted(example[name]) for name in ("prompt", "output", "reference")}
    return html.html_definition_list(texts | {"verdict": verdict}, verdict)
