"""The parts that the reports of all studies share: settings, environment and first samples."""

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
    """Makes the report of a study.

    Args:
      results: of results.json; `config` in it holds the settings.
      text: for a terminal.
    """
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
        below=_shared_sections(results),
    )


def _shared_sections(results: Mapping[str, Any]) -> dict[str, str]:
    """The sections of the page below the figures: HTML by heading."""
    environment = dict(results.get("environment", {}))
    command = environment.pop("command", "")
    settings = {
        name: _lists_as_text(value)
        for name, value in results["config"].items()
        if value not in (None, "", [], ()) and name != "schedules"
    }
    examples = results.get("examples", {})
    return {
        "The first sample of each schedule": html.collapsible_sections(
            (name, html.preformatted(example)) for name, example in examples.items()
        ),
        "Settings": html.definition_list(html.describe_values(settings), "facts"),
        "Environment": html.definition_list(html.describe_values(environment), "facts"),
        "Reproduce": html.preformatted(command) if command else "",
    }


def _lists_as_text(value: Any) -> Any:
    """The same value with lists joined to text."""
    if isinstance(value, Mapping):
        return {name: _lists_as_text(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return ", ".join(
            " ".join(map(str, x)) if isinstance(x, list | tuple) else str(x) for x in value
        )
    return value
