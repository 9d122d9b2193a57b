"""The style of all figures, and their PNG and PDF files.

Figures are made without pyplot: no window, no global state, and nothing to close.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dials_jax.errors import require_packages

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By kind of policy; other kinds take one of OTHER_COLORS.
COLORS = {"routed": "#1f5fa8", "static": "#e07b1a", "random": "#3a9457", "full": "#e5ac00"}
OTHER_COLORS = ("#7b4fa3", "#b03a5b", "#1f8a8a", "#6b6f00", "#a0522d", "#4a5560")
GREY = "#8a8f98"
# Of models, or of other lines that are compared. Colours differ for the colour-blind, too, and the
# style of the line tells them apart in grey.
SERIES = (
    ("#1f5fa8", "-"), ("#e07b1a", "--"), ("#3a9457", "-."), ("#7b4fa3", ":"),
    ("#b03a5b", (0, (7, 2))), ("#1f8a8a", (0, (3, 1, 1, 1, 1, 1))),
)  # fmt: skip
SEQUENTIAL = "viridis"  # of heat maps: brighter is more, and its lightness alone says so
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ebee",
    "legend.frameon": False,
    "text.parse_math": False,  # a task may have a $ in its name
    "pdf.fonttype": 42,  # letters stay text, which some journals ask for
}


def kind_color(kind: str) -> str:
    """The colour of a kind of policy, equal in all figures and tables."""
    return COLORS.get(kind) or OTHER_COLORS[zlib.crc32(kind.encode()) % len(OTHER_COLORS)]


@contextlib.contextmanager
def figure_at(path: str | Path | None, width: float, height: float) -> Iterator[Figure]:
    """Opens a figure of `width` x `height` inches, and writes it when the block ends.

    Args:
      path: of the PNG file; a PDF file with vector graphics is written beside it. None: nothing is
        written, as in a notebook.
    """
    require_packages("eval", "matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure._repr_png_ = partial(_png, figure)
        yield figure
        if path is None:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.dpi = 150
        if figure.axes:  # as matplotlib does, but once: with an engine it draws each file twice
            figure.get_layout_engine().execute(figure)
        figure.set_layout_engine(None)
        figure.savefig(path, dpi=150)
        figure.savefig(Path(path).with_suffix(".pdf"), metadata={"CreationDate": None})


def _png(figure: Figure) -> bytes:
    """What a notebook shows. By itself it would show only figures of pyplot."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def series_styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The colour and line style of each label, as arguments of `plot`."""
    styles = itertools.cycle(SERIES)
    return {
        label: {"color": color, "linestyle": line, "linewidth": 2, "label": label}
        for label, (color, line) in zip(labels, styles, strict=False)
    }


def shades(count: int) -> list:
    """`count` colours of `SEQUENTIAL`, dark to bright, without its palest end."""
    from matplotlib import colormaps

    return [colormaps[SEQUENTIAL](x) for x in np.linspace(0.0, 0.85, count)]


def log_y(ax: Axes, linear_below: float | None = None) -> None:
    """A logarithmic y-axis with plain numbers. Args: linear_below: linear from there down to 0."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    if linear_below is None:
        ax.set_yscale("log")
    else:
        ax.set_yscale("symlog", linthresh=linear_below)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def blue_shades(count: int) -> list:
    """`count` blues from light to dark; a single one is the colour of routed policies."""
    from matplotlib import colormaps

    if count == 1:
        return [COLORS["routed"]]
    return [colormaps["Blues"](x) for x in np.linspace(0.45, 0.95, count)]
