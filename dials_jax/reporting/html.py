"""Makes the parts of a report's page: one HTML file with embedded images; all text is escaped."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any


def render_page(title: str, sections: Mapping[str, str]) -> str:
    """Makes the whole page; sections without content are left out."""
    body = "".join(f"<h2>{escape(name)}</h2>\n{html}\n" for name, html in sections.items() if html)
    return PAGE.format(title=escape(title), style=CSS, body=body)


def describe_values(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Turns names and values into readable text."""

    def text(name: str, value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {text(key, inner)}" for key, inner in value.items())
        if isinstance(value, int) and name == "parameters":
            return f"{value:,}"
        return str(value)

    return [(name.replace("_", " "), text(name, value)) for name, value in values.items()]


def definition_list(values: Iterable[tuple[str, str]], style: str = "") -> str:
    """A list of names with their values or explanations."""
    items = "".join(
        f"<dt>{_breakable(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in values
    )
    return f'<dl class="{style}">{items}</dl>' if items else ""


def _breakable(name: str) -> str:
    """The name of a setting, which narrow pages break behind its periods and underscores."""
    return re.sub(r"(?<=[._])(?=[a-z])", "<wbr>", escape(name))


def html_definition_list(values: Mapping[str, str], style: str = "") -> str:
    """A list of names with HTML from functions of this module."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{html}</dd>" for name, html in values.items())
    return f'<dl class="{style}">{items}</dl>'


def preformatted(content: Any) -> str:
    """A text that keeps its line breaks and spaces."""
    return f"<pre>{escape(str(content))}</pre>"


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{escape(text)}</p>"


def table(columns: Iterable[str], rows: Iterable[str]) -> str:
    """A table of rows made by `table_row` and `table_heading`; the first column is text, the others
    are numbers."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def table_row(cells: Sequence[str], color: str = "") -> str:
    """A row of a table; the colour marks its left edge."""
    style = f' style="--kind: {color}"' if color else ""
    return f"<tr{style}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def table_heading(title: str, note: str, num_columns: int) -> str:
    """A row that is a heading for the rows below it."""
    heading = f"{escape(title)} <small>{escape(note)}</small>"
    return f'<tr class="task"><th colspan="{num_columns}"><div>{heading}</div></th></tr>'


def images(captions: Mapping[Path, str]) -> str:
    """Embedded images with their captions."""
    return "".join(_embed_image(path, caption) for path, caption in captions.items())


def _embed_image(path: Path, caption: str) -> str:
    content = path.read_bytes()
    image = base64.b64encode(content).decode()
    width = int.from_bytes(content[16:20], "big")  # in pixels, from the header of a PNG file
    return (
        f'<figure><img alt="{escape(caption)}" style="--legible: {LEGIBLE * width:.0f}px" '
        f'src="data:image/png;base64,{image}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def collapsible_sections(items: Iterable[tuple[str, str]], num_open: int = 1) -> str:
    """Titles whose content opens and closes on a click. The first `num_open` are open."""
    return "\n".join(
        f"<details{' open' if i < num_open else ''}>"
        f"<summary>{escape(title)}</summary>{html}</details>"
        for i, (title, html) in enumerate(items)
    )


LEGIBLE = 0.36  # of a picture's width in pixels: at less its text is too small to read

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

CSS = """
body { max-width: 80rem; margin: 3rem auto; padding: 0 1.5rem; color: #1f2933; background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.8rem; margin-bottom: .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .8rem; padding-bottom: .3rem;
     border-bottom: 1px solid #e3e7ec; }
/* A shadow at the right edge while there is more to scroll to. */
.scroll { overflow-x: auto;
          background: linear-gradient(to left, #fff 40%, #fff0) right / 3rem 100% no-repeat local,
                      linear-gradient(to left, #1f293333, #1f293300) right / 1rem 100% no-repeat; }
table { border-collapse: collapse; width: 100%; font-size: .84rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: #66707c; font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody td { border-top: 1px solid #eef1f4; }
tbody td:first-child { border-left: 4px solid var(--kind, #d5dae0); position: sticky; left: 0;
                       background: #fff; }
.task th { padding-top: 1.1rem; white-space: normal; overflow-wrap: anywhere; }
.task th > div { position: sticky; left: 0; max-width: min(76rem, 100vw - 3.2rem); }
small { color: #66707c; font-weight: 400; margin-left: .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0; }
dl.facts { grid-template-columns: repeat(2, max-content minmax(0, 1fr)); }
dt { color: #66707c; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
figure { margin: 0 0 2rem; text-align: center; overflow-x: auto; }
img { max-width: min(100%, 54rem); }
figcaption { color: #66707c; font-size: .9rem; text-align: left; max-width: 54rem; margin: auto; }
pre { margin: 0; padding: .4rem .7rem; border-radius: 4px; background: #f5f7f9; font-size: .85rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-bottom: .6rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
details dl, details .scroll { margin: .8rem 0 1.2rem; }
details dl { padding-left: 1rem; border-left: 3px solid #d5dae0; font-size: .92rem; }
details dl.correct { border-left-color: #3a9457; }
details dl.wrong { border-left-color: #c0392b; }
@media (max-width: 48rem) {
  body { margin: 1.2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.4rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dl.facts { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: .2rem .8rem; }
  dt { overflow-wrap: anywhere; }
  dd { margin-bottom: .5rem; }
  td:first-child { max-width: 42vw; overflow: hidden; text-overflow: ellipsis; }
  img { max-width: none; width: max(100%, var(--legible, 0px)); }
  figcaption { position: sticky; left: 0; }
}
"""
