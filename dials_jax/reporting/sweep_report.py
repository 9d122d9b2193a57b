"""The report of an evaluation sweep: results.json, results.csv, plots and one HTML page.

A sweep reports after every task. One that was stopped may have few runs, or none of the full model.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dials_jax.files import write_json
from dials_jax.reporting import html, sweep_plots
from dials_jax.reporting.environment import file_name
from dials_jax.reporting.figure import kind_color
from dials_jax.reporting.publish import Figure, Report, Table, as_dicts, publish
from dials_jax.statistics import ACCURACIES, Row, by_task, summarise

WIDTH = 110  # columns of the terminal table
SHOWN_EXAMPLES = 3  # generations per run
UNKNOWN = "-"

YLABELS = {
    "exact_match": "accuracy (exact match)",
    "choice": "accuracy (multiple choice)",
    "nelbo": "NELBO, nats per token (lower is better)",
}

TRADEOFF_CAPTION = (
    "Quality against the share of layers run: a policy that beats the random one at the same "
    "share chose its layers well; bars are 95 % intervals of each value alone, so take the "
    "paired p of the table to compare two policies."
)
HEATMAP_CAPTION = (
    "Share of the forward passes in which each policy executed each layer: pale layers are skipped."
)
MASK_RATIO_CAPTION = (
    "Share of layers executed against the share of answer tokens still masked: generation moves "
    "from right to left, and a flat line is a policy that does not react to it."
)

SWEEP_LEGEND = (
    ("value", "The mean over items: accuracy for exact_match and choice (higher is better), nats "
     "per token for nelbo (lower is better). ± is one standard error, the sample standard "
     "deviation / √n. It covers the choice of items, not the seeds of training or of random "
     "skipping."),
    ("95 % interval", "Wilson's interval for accuracies, Student's t for nelbo."),
    ("vs full", "The mean difference to the full model on the same items, ± its standard error."),
    ("p", "Two-sided paired test against the full model: the exact McNemar test for items scored "
     "0 or 1, a paired t-test otherwise. It is not corrected for the number of rows, and a large p "
     "does not show that two policies are equal."),
    ("items", "Scored items, and of how many if some were left out: their prompt or answer is "
     "too long (too_long=\"drop\"). Published numbers count those as wrong."),
    ("layers", "Layers run / layers, the normalised FLOPs of the papers: head, embeddings and "
     "router are left out."),
    ("model", "FLOPs of the whole model as a share of full execution: the head, attention by "
     "length and the router are counted. results.json also holds the absolute number."),
    ("seconds", "Measured time of the run on the device above, without compilation. Speed-up is "
     "the full model's time / this time, where both were measured with the same device, mesh, "
     "layout, batch size and padding."),
)  # fmt: skip


def write_report(results: Mapping[str, Any], folder: str | Path) -> list[Row]:
    """Writes results.json, results.csv, plots/*.png and a self-contained report.html.

    Returns: the rows of the table.
    Raises: what `summarise` raises, but only after results.json is safe.
    """
    folder = Path(folder)
    write_json(folder / "results.json", results)
    rows = summarise(results)
    publish(sweep_report(results, rows), folder)
    return rows


def sweep_report(results: Mapping[str, Any], rows: Sequence[Row]) -> Report:
    """What a sweep found so far; `rows` are the `summarise`d results."""
    environment = dict(results["environment"])
    command = environment.pop("command", "")
    facts = html.facts(results["model"]) + html.facts(environment)
    return Report(
        title=f"Layer skipping on {Path(results['model'].get('path', 'a model')).name}",
        results=results,
        columns=[field.name for field in dataclasses.fields(Row)],  # also without any rows
        rows=as_dicts(rows),
        tables={"Results": _table(rows)},
        legend=SWEEP_LEGEND,
        figures=_figures(results["runs"], rows) if rows else [],
        text=format_table(rows),
        above={"Model and environment": html.pairs(facts, "facts")},
        below={
            "Example generations": _examples(results["runs"]),
            "Reproduce": html.text(command),
        },
    )


# --------------------------------------------------------------------------------------- table


def _text(value: float | None, spec: str, unit: str = "") -> str:
    return UNKNOWN if value is None or math.isnan(value) else f"{value:{spec}}{unit}"


def _with_error(value: float | None, stderr: float | None, sign: str = "") -> str:
    mean, error = _text(value, f"{sign}.4f"), _text(stderr, ".4f")
    return mean if error == UNKNOWN else f"{mean} ±{error}"


def _p_text(p_value: float | None) -> str:
    return "<0.001" if p_value is not None and p_value < 0.001 else _text(p_value, ".3f")


# Columns, and how a row's cell is written on the terminal and on the page.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "policy": lambda r: r.policy,
    "value": lambda r: _with_error(r.value, r.stderr),
    "vs full": lambda r: _with_error(r.difference, r.difference_stderr, "+"),
    "p": lambda r: _p_text(r.p_value),
    "layers": lambda r: _text(r.layers_run, ".4f"),
    "model": lambda r: _text(r.model, ".4f"),
    "seconds": lambda r: _text(r.seconds, ".1f"),
    "speed-up": lambda r: _text(r.speedup, ".2f", "x"),
    "items": lambda r: _items(r),
}
INTERVAL = {"95 % interval": lambda r: f"{_text(r.low, '.4f')} to {_text(r.high, '.4f')}"}


def format_table(rows: Sequence[Row]) -> str:
    """The table for a terminal: under a heading per task, one aligned line per policy."""
    cells = [[text(row) for text in COLUMNS.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    room = WIDTH - sum(widths[1:]) - 2 * len(widths)
    widths[0] = min(widths[0], max(room, len("policy")))

    def line(label: str, *numbers: str) -> str:
        aligned = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        return "  " + "  ".join([_shorten(label, widths[0]).ljust(widths[0]), *aligned])

    text, task = [line(*COLUMNS)], None
    for row, row_cells in zip(rows, cells, strict=True):
        if row.task != task:
            task = row.task
            text += textwrap.wrap(f"{task} ({_how(row)})", WIDTH)
        text.append(line(*row_cells))
    return "\n".join(text)


def _how(row: Row) -> str:
    """A task's metric, how its texts are generated, and how many items were left out."""
    parts = [row.metric]
    if row.sampler is not None:
        steps = "" if row.steps is None else f", {row.steps} steps"
        drawn = "" if row.temperature is None else f", temperature {row.temperature:g}"
        parts += [f"sampler {row.sampler}{drawn}{steps}"]
    if row.sampler is not None or row.cache != "none":
        parts += [f"cache {row.cache}"]
    if row.stop is not None:
        parts += [row.stop]
    if row.num_dropped:
        total = row.num_items + row.num_dropped
        parts += [f"{row.num_dropped} of {total} items left out: too long"]
    return ", ".join(parts)


def _items(row: Row) -> str:
    """How many were scored, and of how many where some were left out."""
    total = row.num_items + (row.num_dropped or 0)
    return f"{row.num_items} of {total}" if row.num_dropped else str(total)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


# -------------------------------------------------------------------------------------- figures


def _figures(runs: Sequence[Mapping], rows: Sequence[Row]) -> list[Figure]:
    """The trade-off of all tasks, then what each task's policies executed."""
    panels, figures, left = [], [], iter(rows)  # rows are in the order of the groups
    for task, group in by_task(runs).items():
        points = [
            sweep_plots.Point(
                row.kind, _tag(run["policy"]), row.layers_run, row.value, row.low, row.high
            )
            for run, row in zip(group, islice(left, len(group)), strict=True)
        ]
        metric = group[0]["metric"]
        lower = metric not in ACCURACIES
        panels.append(sweep_plots.Panel(task, YLABELS.get(metric, metric), tuple(points), lower))
        figures += _execution_figures(task, group)
    tradeoff = Figure("tradeoff", TRADEOFF_CAPTION, sweep_plots.tradeoff_curve, {"panels": panels})
    return [tradeoff, *figures]


def _execution_figures(task: str, runs: Sequence[Mapping]) -> list[Figure]:
    name = file_name(task)  # a task may have a / in its name
    policies = [run["policy"] for run in runs]
    shares = np.array([_share_by_layer(run["execution"]) for run in runs])
    labels = [policy["label"] for policy in policies]
    data = {"labels": labels, "shares": shares, "title": task}
    heatmap = Figure(f"layers_{name}", HEATMAP_CAPTION, sweep_plots.execution_heatmap, data)
    lines = [
        sweep_plots.Line(policy["kind"], _tag(policy), tuple(_share_by_bin(run["execution"])))
        for policy, run in zip(policies, runs, strict=True)
        if policy["kind"] != "full"
    ]
    if not lines:
        return [heatmap]
    data = {"lines": lines, "title": task}
    by_ratio = sweep_plots.executed_by_mask_ratio
    return [heatmap, Figure(f"mask_ratio_{name}", MASK_RATIO_CAPTION, by_ratio, data)]


def _tag(policy: Mapping[str, Any]) -> str:
    """A short label that tells policies of one kind apart: lambda or k."""
    if policy.get("lambda") is not None:
        return f"λ={policy['lambda']:g}"
    if policy.get("num_skipped") is not None:
        return f"k={policy['num_skipped']}"
    return policy["label"]


def _share_by_layer(execution: Mapping[str, Any]) -> Float[np.ndarray, "L"]:
    """Share of the sequences' steps that executed each layer."""
    return _divide(np.sum(execution["executed"], axis=0), np.sum(execution["rows"]))


def _share_by_bin(execution: Mapping[str, Any]) -> Float[np.ndarray, "bins"]:
    """Share of layers executed in each bin of mask ratio."""
    return _divide(np.mean(execution["executed"], axis=1), np.array(execution["rows"]))


def _divide(executed: np.ndarray, rows: np.ndarray | np.integer) -> np.ndarray:
    """NaN where nothing ran."""
    return np.where(rows > 0, executed / np.maximum(rows, 1), np.nan)


# --------------------------------------------------------------------------------------- page


def _table(rows: Sequence[Row]) -> Table:
    """One line for each row, under a heading for each task."""
    columns = COLUMNS | INTERVAL
    starts = [i for i, row in enumerate(rows) if i == 0 or row.task != rows[i - 1].task]
    return Table(
        tuple(columns),
        [[text(row) for text in columns.values()] for row in rows],
        groups={i: (rows[i].task, _how(rows[i])) for i in starts},
        colors=[kind_color(row.kind) for row in rows],
    )


def _examples(runs: Sequence[Mapping]) -> str:
    shown = [run for run in runs if run.get("examples")]
    return html.folds(
        (
            f"{run['task']}: {run['policy']['label']}",
            "".join(map(_example, run["examples"][:SHOWN_EXAMPLES])),
        )
        for run in shown
    )


def _example(example: Mapping[str, Any]) -> str:
    verdict = "correct" if example["correct"] else "wrong"
    texts = {name: html.text(example[name]) for name in ("prompt", "output", "reference")}
    return html.blocks(texts | {"verdict": verdict}, verdict)
