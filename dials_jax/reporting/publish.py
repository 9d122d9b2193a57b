"""A report as plain values, and its files: JSON, CSV, LaTeX, plots and an HTML page.

Sweeps and studies both make a `Report`, and `publish` writes it.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from dials_jax.data.records import file_sha256
from dials_jax.files import finite, write_json
from dials_jax.reporting import html

CSV_DIGEST = "csv_sha256"  # in results.json, of results.csv beside it
LONGEST_STEM = 120  # characters of a file name before its ending; file systems allow 255


class Table(NamedTuple):
    """A table for terminal and page; the first column is text, the others are numbers."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    headings: Mapping[int, tuple[str, str]] = {}  # title and note, by index of the line below
    colors: Sequence[str] = ()  # of the edge of each line, on the page

    def text(self, ends: int | None = None) -> str:
        """Aligns the columns.

        Args:
          ends: show at most this many lines from the top and from the bottom; None: all.
        """
        lines = self.lines
        if ends is not None and len(lines) > 2 * ends:
            lines = [*lines[:ends], *lines[-ends:]]
        widths = [max(map(len, column)) for column in zip(self.header, *lines, strict=True)]

        def line(cells: Sequence[str]) -> str:
            first, *rest = zip(cells, widths, strict=True)
            return "  ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)])

        return "\n".join(map(line, (self.header, *lines)))

    def html(self) -> str:
        """The table of the page."""
        rows = []
        for number, cells in enumerate(self.lines):
            if number in self.headings:
                rows.append(html.table_heading(*self.headings[number], len(self.header)))
            rows.append(html.table_row(cells, self.colors[number] if self.colors else ""))
        return html.table(self.header, rows)


class Figure(NamedTuple):
    """A plot that is drawn when its report is published."""

    name: str  # of its PNG file, without the ending
    caption: str  # how to read it
    plot: Callable[..., Any]  # draws `data`, into the file `path` if one is given
    data: Mapping[str, Any]  # the other arguments of `plot`

    def draw(self, folder: Path) -> Path:
        path = folder / f"{self.name}.png"
        self.plot(**self.data, path=path)
        return path


class Chapter(NamedTuple):
    """A part of the page that reads for itself: what is asked, what was found, and its figures."""

    title: str
    html: str  # from functions of `reporting.html`
    figures: Sequence[Figure] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a sweep or a study found.

    The page shows, in this order: `above`, the chapters, the tables, the legend, the figures,
    `below`.
    """

    title: str
    results: Mapping[str, Any]  # results.json
    columns: Sequence[str]  # of results.csv
    rows: Sequence[Mapping[str, Any]]  # of results.csv
    tables: Mapping[str, Table]  # by heading
    legend: Sequence[tuple[str, str]]  # names in the tables, and what they mean
    figures: Sequence[Figure]
    text: str  # for a terminal
    above: Mapping[str, str]  # sections of HTML, by heading
    below: Mapping[str, str]
    paper: Table | None = None  # of results.tex
    chapters: Sequence[Chapter] = ()


def publish(report: Report, workdir: Path) -> None:
    """Writes results.json, results.csv, results.tex, plots/*.png, plots/*.pdf and report.html.

    The numbers are written before anything is drawn.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    table = workdir / "results.csv"
    write_csv(table, report.columns, report.rows)
    results = dict(report.results)
    if "kind" in results:  # of a study, whose rows are read from the CSV
        results[CSV_DIGEST] = file_sha256(table)
    write_json(workdir / "results.json", results, digest=True)
    if report.paper is not None:
        (workdir / "results.tex").write_text(
            latex_table(report.paper), encoding="utf-8", errors="backslashreplace"
        )
    chapters = {
        chapter.title: chapter.html + html.images(draw_figures(chapter.figures, workdir / "plots"))
        for chapter in report.chapters
    }
    captions = draw_figures(report.figures, workdir / "plots")
    (workdir / "report.html").write_text(
        _page(report, chapters, captions), encoding="utf-8", errors="backslashreplace"
    )


LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "±": r"$\pm$", "λ": r"$\lambda$", "τ": r"$\tau$", "…": r"\dots{}"},
}  # fmt: skip


def latex_table(table: Table) -> str:
    """A `tabular` in the style of booktabs, to be included in a paper."""
    rows = []
    for number, cells in enumerate(table.lines):
        if number in table.headings:
            title = rf"\multicolumn{{{len(cells)}}}{{l}}{{{latex_text(table.headings[number][0])}}}"
            rows += [*([r"\addlinespace"] if number else []), rf"{title} \\"]
        rows.append(" & ".join(map(latex_text, cells)) + r" \\")
    lines = [
        "% In the preamble: \\usepackage{booktabs}. Where the table is: \\input{results.tex}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        " & ".join(map(latex_text, table.header)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def latex_text(text: str) -> str:
    """Escapes what LaTeX would take for a command; a sign before a number is one of maths."""
    signed = re.sub(r"(?<![\w.])([+-])(?=\.?\d)", "\0\\1\0", " ".join(text.split()))
    escaped = "".join(LATEX.get(character, character) for character in signed)
    return re.sub("\0([+-])\0", r"$\1$", escaped)


def draw_figures(figures: Sequence[Figure], folder: Path) -> dict[Path, str]:
    """Draws the figures; returns the caption of each file."""
    return {figure.draw(folder): figure.caption for figure in figures}


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes unrounded values; None, NaN and infinity become empty cells.

    Text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in finite(dict(row)).items()})


def _cell(value: Any) -> Any:
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


def file_name(text: str) -> str:
    """Makes a file name of any text: quotes special characters, and cuts and hashes long text."""
    quoted = quote(text, safe=",")
    if len(quoted) <= LONGEST_STEM:
        return quoted
    return f"{quoted[:LONGEST_STEM]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def as_dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Turns dataclasses into rows of results.json and results.csv."""
    return [asdict(row) for row in rows]


def _page(report: Report, chapters: Mapping[str, str], captions: Mapping[Path, str]) -> str:
    sections = {
        **report.above,
        **chapters,
        **{heading: table.html() for heading, table in report.tables.items()},
        "How to read the tables": html.definition_list(report.legend),
        "Plots": html.images(captions),
        **report.below,
    }
    return html.render_page(report.title, sections)
