"""Draws retention against layers left out, and which layers are chosen, as PNG and PDF files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dials_jax.errors import require
from dials_jax.reporting.figure import COLORS, GREY, OTHER_COLORS, figure_at

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes

MODEL_COLORS = (COLORS["routed"], COLORS["static"], COLORS["random"], *OTHER_COLORS)


class RetentionPoint(NamedTuple):
    """One number of skipped layers; all but it in percent."""

    layers_out: float  # layers left out / layers
    retention: float
    low: float  # ends of the error bar
    high: float
    num_skipped: int


class RetentionLine(NamedTuple):
    """One model and kind of choice, by rising number of skipped layers."""

    model: str
    adjacent: bool  # neighbours may be skipped
    points: tuple[RetentionPoint, ...]


class RetentionPanel(NamedTuple):
    """The models on one benchmark."""

    title: str
    lines: tuple[RetentionLine, ...]


def retention_curves(panels: Sequence[RetentionPanel], path: str | Path) -> Path:
    """Goel, Figure 1: retention against the layers left out, a line per model, a panel per task."""
    require(len(panels) > 0, "retention_curves: no panels; give at least one task")
    models = list(dict.fromkeys(line.model for panel in panels for line in panel.lines))
    colors = {name: MODEL_COLORS[i % len(MODEL_COLORS)] for i, name in enumerate(models)}
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with figure_at(path, 4.4 * columns + 0.6, 3.4 * rows + 0.5) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        handles = {}
        for ax, panel in zip(axes, panels, strict=False):
            for line in panel.lines:
                _retention_line(ax, line, colors[line.model])
            ax.axhline(100, color=GREY, linestyle="--", linewidth=1, zorder=1)
            ax.set(title=panel.title, xlabel="layers left out, %", ylabel="retention, %")
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        for ax in axes[len(panels) :]:
            ax.remove()
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    return Path(path)


def _retention_line(ax: Axes, line: RetentionLine, color: str) -> None:
    x, y, low, high, numbers = zip(*line.points, strict=True)
    below = [b - a for a, b in zip(low, y, strict=True)]
    above = [b - a for a, b in zip(y, high, strict=True)]
    ax.errorbar(
        x,
        y,
        yerr=[below, above],
        color=color,
        ecolor=color + "55",
        linestyle="--" if line.adjacent else "-",
        marker="s" if line.adjacent else "o",
        markersize=4.5,
        linewidth=1.6,
        label=f"{line.model}, neighbours allowed" if line.adjacent else line.model,
    )
    for at, value, k in zip(x, y, numbers, strict=True):
        offset = {"xytext": (3, 3), "textcoords": "offset points"}
        ax.annotate(str(k), (at, value), color=color, fontsize=7, **offset)


class ChoicePanel(NamedTuple):
    """The share of prompts that choose each layer, with a title; None: this kind is not there."""

    allowed: tuple[str, Sequence[float]] | None
    apart: tuple[str, Sequence[float]] | None


def chosen_layers(panels: Sequence[ChoicePanel], path: str | Path) -> Path:
    """Goel, Figure 8: on the left neighbours may be chosen, on the right not; a row per panel."""
    require(len(panels) > 0, "chosen_layers: no panels; give at least one")
    with figure_at(path, 9.4, 2.2 * len(panels) + 0.3) as figure:
        axes = figure.subplots(len(panels), 2, squeeze=False, sharey=True)
        for pair, panel in zip(axes, panels, strict=True):
            words = ("neighbours allowed", "neighbours not allowed")
            for ax, kind, what in zip(pair, panel, words, strict=True):
                if kind is None:
                    ax.remove()
                    continue
                title, shares = kind
                ax.bar(range(len(shares)), shares, color=COLORS["static"])
                ax.set(xlabel="layer, from 0", ylabel="share of prompts", ylim=(0, 1.02))
                ax.set_title(f"{title}, {what}", fontsize=9)
    return Path(path)
