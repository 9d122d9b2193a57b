"""The report of an evaluation sweep, written after every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dials_jax.files import write_json
from dials_jax.reporting import html, sweep_plots
from dials_jax.reporting.comparison import compare_all, pairs_legend, pairs_table, rows_by_items
from dials_jax.reporting.layers_run import execution_figures, figure_over_tasks, short_label
from dials_jax.reporting.publish import Figure, Report, publish
from dials_jax.reporting.retention import choice_figures, kinds_tables
from dials_jax.reporting.seeds import pool_seeds
from dials_jax.reporting.speed import SpeedCurve, find_curves, rule_value, tokens_per_pass
from dials_jax.reporting.sweep_rows import (
    SweepRow,
    compute_sweep_rows,
    csv_columns,
    csv_rows,
    group_runs_by_task,
    timed_alike,
    value_interval,
)
from dials_jax.reporting.sweep_settings import settings_html
from dials_jax.reporting.sweep_table import (
    SWEEP_LEGEND,
    format_table,
    page_table,
    paper_table,
    speed_table,
)

SHOWN_EXAMPLES = 3  # generations per run

YLABELS = {
    "exact_match": "accuracy (exact match)",
    "code": "accuracy (tests passed, pass@1)",
    "choice": "accuracy (multiple choice)",
    "nelbo": "NELBO, nats per token (lower is better)",
}

TRADEOFF_CAPTION = (
    "Quality against the share of layers run; dashed is the full model, dotted what guessing gets "
    "in multiple choice. A policy that beats the random one at the same share chose its layers "
    "well; bars are 95 % intervals of each value alone, so take the paired p of the table to "
    "compare two policies."
)
COSTS = {  # figure and label of the axis, by the cost of a row
    "layers_run": ("tradeoff", "layers run / layers"),
    "flops_share": ("tradeoff_flops", "FLOPs of the whole model / those of full execution"),
    "seconds": ("tradeoff_seconds", "seconds"),
}
FLOPS_CAPTION = (
    "The same against the FLOPs of the whole model: head, attention by length and routers count."
)
SPEED_CAPTION = (
    "Accuracy against tokens a pass and against seconds, along the value of one sampler's setting "
    "(written at the points); AUP is the penalised area under the left curve. Seconds are shown "
    "where all runs were timed alike."
)
SECONDS_CAPTION = (
    "The same against measured seconds, for runs that were timed under the same conditions."
)


def _short(path: str) -> str:
    """Its last two names: the last one of a workdir is often `model`."""
    return "/".join(Path(path).parts[-2:])


def write_report(results: Mapping[str, Any], folder: str | Path) -> list[SweepRow]:
    """Writes results.json, results.csv, plots/*.png and a self-contained report.html.

    Returns: the rows of the table.
    Raises: the errors of `compute_sweep_rows`, but only after results.json is written.
    """
    folder = Path(folder)
    write_json(folder / "results.json", results, digest=True)
    rows = compute_sweep_rows(results)
    publish(sweep_report(results, rows), folder)
    return rows


def sweep_report(results: Mapping[str, Any], rows: Sequence[SweepRow]) -> Report:
    """Makes the report of what a sweep has found so far; `rows` are those of the results."""
    environment = dict(results["environment"])
    command = environment.pop("command", "")
    model = {name: value for name, value in results["model"].items() if name != "trained"}
    facts = html.describe_values(model) + html.describe_values(environment)
    runs = pool_seeds(results["runs"])
    curves = find_curves(runs)
    tables = {"Results": page_table(rows)}
    tables |= {"Accuracy against tokens a pass": speed_table(curves)} if curves else {}
    tables |= kinds_tables(results)
    plots = [*_speed_figure(curves), *_figures(runs, rows, results)] if rows else []
    return Report(
        title=f"Layer skipping on {_short(results['model'].get('path', 'a model'))}",
        results=results,
        columns=csv_columns(),
        rows=csv_rows(rows),
        tables=tables,
        legend=SWEEP_LEGEND,
        figures=plots,
        text=format_table(rows),
        above={"Model and environment": html.definition_list(facts, "facts")},
        below={
            "All pairs": _pairs_html(results),
            "Settings": settings_html(results) if rows else "",
            "Example generations": _examples_html(runs),
            "Reproduce": html.preformatted("\n".join(results.get("commands") or [command])),
        },
        paper=paper_table(rows),
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


def _figures(
    runs: Sequence[Mapping], rows: Sequence[SweepRow], results: Mapping[str, Any]
) -> list[Figure]:
    """The trade-offs of all tasks, which layers their policies executed, and which were chosen."""
    next_rows = iter(rows)  # in the order of the groups
    groups = {
        task: list(zip(group, islice(next_rows, len(group)), strict=True))
        for task, group in group_runs_by_task(runs).items()
    }
    figures = [
        figure
        for cost, caption in zip(
            COSTS, (TRADEOFF_CAPTION, FLOPS_CAPTION, SECONDS_CAPTION), strict=True
        )
        for figure in _tradeoff(groups, cost, caption)
    ]
    figures += figure_over_tasks(groups)
    for task, group in groups.items():
        figures += execution_figures(task, [run for run, _ in group])
    return figures + choice_figures({"": results})


def _tradeoff(
    groups: Mapping[str, Sequence[tuple[Mapping[str, Any], SweepRow]]], cost: str, caption: str
) -> list[Figure]:
    """Quality against one cost, a panel per task; none where nothing can be compared."""
    panels = []
    for task, group in groups.items():
        shown = _timed_alike(group) if cost == "seconds" else group
        points = tuple(
            sweep_plots.Point(
                row.kind,
                short_label(run["policy"]),
                getattr(row, cost),
                row.value,
                row.low,
                row.high,
            )
            for run, row in shown
        )
        if points:
            metric = group[0][1].metric
            ylabel = YLABELS.get(metric, metric)
            panels.append(sweep_plots.Panel(task, ylabel, points, group[0][1].chance))
    name, xlabel = COSTS[cost]
    data = {"panels": panels, "xlabel": xlabel}
    return [Figure(name, caption, sweep_plots.tradeoff_curve, data)] if panels else []


def _timed_alike(
    group: Sequence[tuple[Mapping[str, Any], SweepRow]],
) -> list[tuple[Mapping[str, Any], SweepRow]]:
    """Runs whose seconds can be compared with those of the full model, or else of the first."""
    base = next((run for run, row in group if row.kind == "full"), group[0][0])
    alike = [(run, row) for run, row in group if timed_alike(run, base)]
    return alike if len(alike) > 1 else []


# --------------------------------------------------------------------------------------- page


def _pairs_html(results: Mapping[str, Any]) -> str:
    """A matrix of paired tests per set of items, to open on a click."""
    groups = rows_by_items(results["runs"], results.get("rules", {}))
    tables = {
        task: pairs_table(rows, compare_all(task, rows), corrected=False).html()
        for task, rows in groups.items()
        if len(rows) > 1
    }
    sections = html.collapsible_sections(tables.items(), num_open=0)
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
