"""A report as plain values, and how it becomes files: JSON, CSV, plots and a page of HTML.

Sweeps and studies report alike: they make a `Report`, and `publish` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dials_jax.files import write_json
from dials_jax.reporting import html
from dials_jax.reporting.environment import write_csv


class Table(NamedTuple):
    """Cells for a terminal and for a page; the first column is text, the others are numbers."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    groups: Mapping[int, tuple[str, str]] = {}  # heading, and a note, above the line of a number
    colors: Sequence[str] = ()  # of each line's edge on the page

    def text(self, ends: int | None = None) -> str:
        """Aligned columns. `ends`: at most this many lines of each end."""
        lines = self.lines
        if ends is not None and len(lines) > 2 * ends:
            lines = [*lines[:ends], *lines[-ends:]]
        widths = [max(map(len, column)) for column in zip(self.header, *lines, strict=True)]

        def line(cells: Sequence[str]) -> str:
            first, *rest = zip(cells, widths, strict=True)
            return "  ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)])

        return "\n".join(map(line, (self.header, *lines)))

    def html(self) -> str:
        rows = []
        for number, cells in enumerate(self.lines):
            if number in self.groups:
                rows.append(html.group(*self.groups[number], len(self.header)))
            rows.append(html.row(cells, self.colors[number] if self.colors else ""))
        return html.table(self.header, rows)


class Figure(NamedTuple):
    """A plot that is drawn when its report is published."""

    name: str  # of its PNG file, without the ending
    caption: str  # how to read it
    plot: Callable[..., Path]  # takes the data and `path`, the file that it writes
    data: Mapping[str, Any]  # the other arguments of `plot`

    def draw(self, folder: Path) -> Path:
        return self.plot(**self.data, path=folder / f"{self.name}.png")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found.

    The page shows, in this order: `above`, the tables, the legend, the figures, `below`.
    """

    title: str
    results: Mapping[str, Any]  # results.json
    columns: Sequence[str]  # of results.csv
    rows: Sequence[Mapping[str, Any]]  # of results.csv
    tables: Mapping[str, Table]  # by heading
    legend: Sequence[tuple[str, str]]  # names in the tables, and what they mean
    figures: Sequence[Figure]
    text: str  # what a terminal gets
    above: Mapping[str, str]  # sections of HTML, by heading
    below: Mapping[str, str]


def publish(report: Report, workdir: Path) -> None:
    """Writes results.json, results.csv, plots/*.png and report.html.

    The numbers are on disk before anything is drawn.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "results.json", report.results)
    write_csv(workdir / "results.csv", report.columns, report.rows)
    captions = draw_figures(report.figures, workdir / "plots")
    (workdir / "report.html").write_text(
        _page(report, captions), encoding="utf-8", errors="backslashreplace"
    )


def draw_figures(figures: Sequence[Figure], folder: Path) -> dict[Path, str]:
    """The file of each figure, and its caption."""
    return {figure.draw(folder): figure.caption for figure in figures}


def as_dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _page(report: Report, captions: Mapping[Path, str]) -> str:
    sections = {
        **report.above,
        **{heading: table.html() for heading, table in report.tables.items()},
        "How to read the tables": html.pairs(report.legend),
        "Plots": html.figures(captions),
        **report.below,
    }
    return html.render(report.title, sections)
