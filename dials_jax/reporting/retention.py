"""Retention against the number of skipped layers, of one model or of several: Goel, Tables 1 to 3.

Goel, Figure 1 is the same against the share of layers left out, a line per model, and Goel,
Figure 8 shows which layers the prompts of a task choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from dials_jax.errors import require
from dials_jax.reporting import html
from dials_jax.reporting.comparison import Results
from dials_jax.reporting.publish import Figure, Report, Table, file_name
from dials_jax.reporting.seeds import pool_seeds
from dials_jax.reporting.skipping_plots import Kept, choice_bars, retention_curves
from dials_jax.reporting.sweep_rows import SweepRow, compute_sweep_rows, group_runs_by_task
from dials_jax.reporting.sweep_table import (
    AGAINST_FULL,
    SWEEP_LEGEND,
    UNKNOWN,
    p_text,
    percent_interval,
)
from dials_jax.statistics import paired_test

CHOSEN = "static k="  # how labels of layers that Goel, Algorithm 1 chose begin
# Whether neighbours may both be chosen.
CHOICE_RULES = {"neighbours not allowed": False, "neighbours allowed": True}

RETENTION_CAPTION = (
    "Retention against the share of layers left out, the FLOPs saved of the paper (Goel, Figure 1);"
    " at the points k. Bars are 95 % intervals."
)
CHOICE_CAPTION = (
    "Share of the calibration prompts whose own choice by Goel, Algorithm 1 holds each layer "
    "(Goel, Figure 8), for the most layers that the sweep skips."
)
RETENTION_LEGEND = (
    ("not allowed, allowed", "Retention where Goel, Algorithm 1 may not, or may, choose two "
     "neighbours. p is of the paired test of the two on the same items; it is 1 where both choose "
     "the same layers."),
    ("layers out, %", "Layers left out / layers: the FLOPs reduction of the paper."),
)  # fmt: skip


def chosen_label(num_skipped: int, adjacent: bool) -> str:
    """The label of so many layers that Goel, Algorithm 1 chose; adjacent: neighbours allowed."""
    return f"{CHOSEN}{num_skipped}{' adjacent' if adjacent else ''}"


@dataclass(frozen=True, kw_only=True)
class RetentionRow:
    """One number of layers that Goel, Algorithm 1 chose, for one model on one task."""

    model: str
    num_skipped: int  # 0: the full model
    p_kinds: float | None  # paired test: neighbours allowed or not, at this number of layers
    row: SweepRow

    @property
    def layers_out(self) -> float:
        return 1 - self.row.layers_run


def retention_rows(sweeps: Mapping[str, Results]) -> list[RetentionRow]:
    """The full model and the chosen static policies of every sweep, by task and rising k.

    Args:
      sweeps: results by the name of the model.
    """
    found = []
    for model, results in sweeps.items():
        kinds = _compare_kinds(results)
        for row in compute_sweep_rows(results):
            if row.kind == "full" or (row.kind == "static" and row.policy.startswith(CHOSEN)):
                k = row.num_skipped or 0
                found.append(
                    RetentionRow(
                        model=model, num_skipped=k, p_kinds=kinds.get((row.task, k)), row=row
                    )
                )
    return found


def _compare_kinds(results: Results) -> dict[tuple[str, int], float]:
    """p of the paired test between the two kinds of choice, by task and number of layers."""
    found = {}
    for task, runs in group_runs_by_task(pool_seeds(results["runs"])).items():
        kinds: dict[int, dict[bool, Any]] = {}
        for run in runs:
            if run["policy"]["label"].startswith(CHOSEN):
                policy = run["policy"]
                own = kinds.setdefault(policy["num_skipped"], {})
                own[policy.get("adjacent", False)] = run["items"]
        for k, own in kinds.items():
            if len(own) == 2:
                found[task, k] = paired_test(own[True], own[False]).p_value
    return found


def retention_report(sweeps: Mapping[str, Results]) -> Report:
    """The tables and figures of several models.

    Raises: InputError if a sweep has no chosen static layers, or no full model to compare with.
    """
    rows = retention_rows(sweeps)
    for model in sweeps:
        own = [one for one in rows if one.model == model]
        require(
            any(one.row.retention is not None for one in own),
            f"{model} has no static layers beside a full model that scores above 0; give a sweep "
            "with num_static=",
        )
    tables = retention_tables(rows)
    return Report(
        title="Retention under static layer skipping",
        results={"models": list(sweeps), "rows": [_flat(one) for one in rows]},
        columns=_columns(),
        rows=[_flat(one) for one in rows],
        tables=tables,
        legend=(*RETENTION_LEGEND, *(entry for entry in SWEEP_LEGEND if entry[0] in _LEGEND_NAMES)),
        figures=[*retention_figures(rows), *choice_figures(sweeps)],
        text="\n\n".join(f"{name}\n{table.text()}" for name, table in tables.items()),
        above={"Models": html.definition_list(_models(sweeps), "facts")},
        below={},
        paper=next(iter(tables.values())),
    )


_LEGEND_NAMES = ("retention, %", "identical, %", "KL", "p", "seconds")


def _models(sweeps: Mapping[str, Results]) -> list[tuple[str, str]]:
    return [
        (name, f"{found['model'].get('path', '')}, {found['model']['num_layers']} layers")
        for name, found in sweeps.items()
    ]


def _columns() -> list[str]:
    return ["model", "layers_out", "p_kinds", *(field.name for field in fields(SweepRow))]


def _flat(one: RetentionRow) -> dict[str, Any]:
    own = {"model": one.model, "layers_out": one.layers_out, "p_kinds": one.p_kinds}
    return own | asdict(one.row)


# -------------------------------------------------------------------------------------- tables


def retention_tables(rows: Sequence[RetentionRow]) -> dict[str, Table]:
    """All models side by side (Goel, Table 1), the kinds of choice (Goel, Tables 2 and 3), and all
    that was measured."""
    tables = {"Retention, %": _models_table(rows)} | _kinds_tables(rows)
    return tables | {"Against the full model": _details_table(rows)}


def kinds_tables(results: Results) -> dict[str, Table]:
    """Goel, Tables 2 and 3 of one sweep; none unless it has both kinds of choice."""
    return _kinds_tables(retention_rows({"": results})) if _compare_kinds(results) else {}


def _kinds_tables(rows: Sequence[RetentionRow]) -> dict[str, Table]:
    both = any(one.p_kinds is not None for one in rows)
    return {"Neighbours allowed or not, retention in %": _kinds_table(rows)} if both else {}


def _by_task(rows: Sequence[RetentionRow]) -> Iterator[tuple[str, list[RetentionRow]]]:
    for task in dict.fromkeys(one.row.task for one in rows):
        yield task, [one for one in rows if one.row.task == task]


def _models_table(rows: Sequence[RetentionRow]) -> Table:
    """Goel, Table 1: a line per task and k, a column per model; neighbours not allowed if known."""
    models = list(dict.fromkeys(one.model for one in rows))
    lines, headings = [], {}
    for task, group in _by_task(rows):
        headings[len(lines)] = task, group[0].row.metric
        for k in sorted({one.num_skipped for one in group}):
            own = {one.model: one for one in reversed(_preferred(group)) if one.num_skipped == k}
            cells = [_retention_cell(own.get(model)) for model in models]
            lines.append((f"{task}, {k or '0 (full)'}", *cells))
    return Table(("layers skipped", *models), lines, headings)


def _preferred(rows: Sequence[RetentionRow]) -> list[RetentionRow]:
    """Choices without neighbours first."""
    return sorted(rows, key=lambda one: one.row.adjacent)


def _retention_cell(one: RetentionRow | None) -> str:
    if one is None:
        return UNKNOWN
    row = one.row
    if row.kind == "full":
        return f"100.0 ({row.value:.2f})"
    return percent_interval(row.retention, row.retention_low, row.retention_high)


def _kinds_table(rows: Sequence[RetentionRow]) -> Table:
    """Goel, Tables 2 and 3: where neighbours may not, or may, be skipped."""
    lines, headings = [], {}
    several = len({one.model for one in rows}) > 1
    for task, group in _by_task(rows):
        headings[len(lines)] = task, group[0].row.metric
        for model in dict.fromkeys(one.model for one in group):
            own = [one for one in group if one.model == model]
            for k in sorted({one.num_skipped for one in own if one.p_kinds is not None}):
                kinds = {one.row.adjacent: one for one in own if one.num_skipped == k}
                p = kinds[True].p_kinds
                name = f"{model}, k={k}" if several else f"k={k}"
                cells = [_retention_cell(kinds[adjacent]) for adjacent in (False, True)]
                lines.append((f"{task}, {name}", *cells, p_text(p)))
    return Table(("layers skipped", "not allowed", "allowed", "p"), lines, headings)


def _details_table(rows: Sequence[RetentionRow]) -> Table:
    """Every number of every policy."""
    texts = {
        "layers": lambda r: r.static_layers or "",
        "layers out, %": lambda r: f"{100 * (1 - r.layers_run):.2f}",
        "value": lambda r: f"{r.value:.4f}",
        **AGAINST_FULL,
        "p": lambda r: p_text(r.p_value),
        "seconds": lambda r: f"{r.seconds:.1f}",
        "speed-up": lambda r: UNKNOWN if r.speedup is None else f"{r.speedup:.2f}x",
        "items": lambda r: str(r.num_items),
    }
    lines, headings = [], {}
    for task, group in _by_task(rows):
        headings[len(lines)] = task, group[0].row.metric
        for one in group:
            cells = [text(one.row) for text in texts.values()]
            lines.append((f"{task}, {one.model}: {one.row.policy}", *cells))
    return Table(("policy", *texts), lines, headings)


# ------------------------------------------------------------------------------------- figures


def retention_figures(rows: Sequence[RetentionRow]) -> list[Figure]:
    """Goel, Figure 1 of every task: a line per model and kind of choice; none without retention."""
    figures = []
    for task, group in _by_task(rows):
        lines = {}
        for model in dict.fromkeys(one.model for one in group):
            for rule, adjacent in CHOICE_RULES.items():
                label = f"{model}, {rule}" if adjacent else model
                own = [
                    one
                    for one in group
                    if (one.model, one.row.adjacent) == (model, adjacent)
                    and one.row.retention is not None
                ]
                lines |= {label: _kept(own)} if own else {}
        if lines:
            data = {"models": lines, "title": task}
            name = f"retention_{file_name(task)}"
            figures.append(Figure(name, RETENTION_CAPTION, retention_curves, data))
    return figures


def _kept(rows: Sequence[RetentionRow]) -> Kept:
    """One line, by rising number of skipped layers."""
    known = sorted(rows, key=lambda one: one.num_skipped)
    return Kept(
        [one.num_skipped for one in known],
        [one.layers_out for one in known],
        [one.row.retention for one in known],
        [one.row.retention_low for one in known],
        [one.row.retention_high for one in known],
    )


def choice_figures(sweeps: Mapping[str, Results]) -> list[Figure]:
    """Goel, Figure 8, a row per model and task; none for sweeps of earlier versions.

    A column per rule by which any of them chose; a panel is empty where its model did not.
    """
    panels = {}
    for model, results in sweeps.items():
        for task, found in results.get("static_choice", {}).items():
            largest = max(map(_chosen_number, found["shares"]))
            title = f"{model}, {task}, k={largest}" if model else f"{task}, k={largest}"
            unknown = np.full(len(found["similarities"]), np.nan)
            panels[title] = {
                rule: np.array(found["shares"].get(chosen_label(largest, adjacent), unknown))
                for rule, adjacent in reversed(CHOICE_RULES.items())
            }
    used = [
        rule
        for rule in reversed(CHOICE_RULES)
        if any(np.isfinite(own[rule]).any() for own in panels.values())
    ]
    panels = {title: {rule: own[rule] for rule in used} for title, own in panels.items()}
    data = {"shares": panels}
    return [Figure("chosen_layers", CHOICE_CAPTION, choice_bars, data)] if panels else []


def _chosen_number(label: str) -> int:
    return int(label.removeprefix(CHOSEN).split()[0])
