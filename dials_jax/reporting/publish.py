"""What every study of schedules writes, whatever it measured: results.json, results.csv, a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dials_jax.files import write_json
from dials_jax.reporting import html
from dials_jax.reporting.environment import write_csv


class Table(NamedTuple):
    """Cells for a terminal and for a page; the first column is text, the others are numbers."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    def text(self, ends: int | None = None) -> str:
        """Aligned columns. `ends`: only so many lines of either end, where there are more."""
        lines = self.lines
        if ends is not None and len(lines) > 2 * ends:
            lines = [*lines[:ends], *lines[-ends:]]
        widths = [max(map(len, column)) for column in zip(self.header, *lines, strict=True)]

        def line(cells: Sequence[str]) -> str:
            first, *rest = zip(cells, widths, strict=True)
            return "  ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)])

        return "\n".join(map(line, (self.header, *lines)))

    def html(self) -> str:
        return html.table(self.header, map(html.row, self.lines))


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a study's page holds beside its settings."""

    title: str
    tables: Mapping[str, Table]  # by heading
    reading: Sequence[tuple[str, str]]  # what the columns mean
    draw: Callable[[Path], Mapping[Path, str]]  # into a folder; the figures with their captions


def publish(
    results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], shown: Shown, workdir: Path
) -> None:
    """Writes results.json, the rows as results.csv, plots and report.html.

    The numbers are safe before anything is drawn.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "results.json", results)
    write_csv(workdir / "results.csv", list(rows[0]), rows)
    figures = shown.draw(workdir / "plots")
    (workdir / "report.html").write_text(
        _page(results, shown, figures), encoding="utf-8", errors="backslashreplace"
    )


def as_dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(row) for row in rows]


def _page(results: Mapping[str, Any], shown: Shown, figures: Mapping[Path, str]) -> str:
    environment = dict(results.get("environment", {}))
    command = environment.pop("command", "")
    settings = {
        name: _plain(value)
        for name, value in results["config"].items()
        if value not in (None, "", [], ()) and name != "schedules"
    }
    examples = results.get("examples", {})
    sections = {
        **{heading: table.html() for heading, table in shown.tables.items()},
        "How to read the tables": html.pairs(shown.reading),
        "Plots": html.figures(figures),
        "The first sample of each schedule": html.folds(
            (name, html.text(example)) for name, example in examples.items()
        ),
        "Settings": html.pairs(html.facts(settings), "facts"),
        "Environment": html.pairs(html.facts(environment), "facts"),
        "Reproduce": html.text(command) if command else "",
    }
    return html.render(shown.title, sections)


def _plain(value: Any) -> Any:
    """Lists as text."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return ", ".join(
            " ".join(map(str, x)) if isinstance(x, list | tuple) else str(x) for x in value
        )
    return value
