"""What every study reports, whatever it measured: its settings, environment and first samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dials_jax.reporting import html
from dials_jax.reporting.publish import Figure, Report, Table


def study_report(
    title: str,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    tables: Mapping[str, Table],
    legend: Sequence[tuple[str, str]],
    figures: Sequence[Figure],
    text: str,
) -> Report:
    """The report of a study; `results` hold its settings as `config`, `text` is for a terminal."""
    return Report(
        title=title,
        results=results,
        columns=list(rows[0]),
        rows=rows,
        tables=tables,
        legend=legend,
        figures=figures,
        text=text,
        above={},
        below=_sections(results),
    )


def _sections(results: Mapping[str, Any]) -> dict[str, str]:
    """What the page shows below the figures, as HTML by heading."""
    environment = dict(results.get("environment", {}))
    command = environment.pop("command", "")
    settings = {
        name: _plain(value)
        for name, value in results["config"].items()
        if value not in (None, "", [], ()) and name != "schedules"
    }
    examples = results.get("examples", {})
    return {
        "The first sample of each schedule": html.folds(
            (name, html.text(example)) for name, example in examples.items()
        ),
        "Settings": html.pairs(html.facts(settings), "facts"),
        "Environment": html.pairs(html.facts(environment), "facts"),
        "Reproduce": html.text(command) if command else "",
    }


def _plain(value: Any) -> Any:
    """Lists as text."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return ", ".join(
            " ".join(map(str, x)) if isinstance(x, list | tuple) else str(x) for x in value
        )
    return value
