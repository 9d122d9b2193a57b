"""Draws the figures of an evaluation sweep.

Every function takes plain data, returns the figure, and writes it to a file if a path is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from dials_jax.errors import require
from dials_jax.reporting.figure import (
    COLORS,
    GREY,
    OTHER_COLORS,
    blue_shades,
    figure_at,
    kind_color,
)
from dials_jax.reporting.labels import Label, place_labels, spread_out

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure


LINE_COLORS = (COLORS["routed"], COLORS["static"], COLORS["random"], *OTHER_COLORS)


@dataclass(frozen=True)
class Point:
    """One policy in a trade-off panel."""

    kind: str  # of the policy: full, static, random, routed or another
    label: str  # lambda or k, written next to the point
    cost: float  # share of layers run, or of FLOPs, or seconds
    value: float
    low: float  # ends of the error bar
    high: float


@dataclass(frozen=True)
class Panel:
    """One task in the trade-off figure."""

    title: str
    ylabel: str
    points: tuple[Point, ...]
    chance: float | None = None  # what guessing gets; None: it is not known


@dataclass(frozen=True)
class Line:
    """The layers that one policy executes, by mask ratio."""

    kind: str
    label: str
    shares: tuple[float, ...]  # of layers executed, one per bin of (0, 1]; NaN where nothing ran


class TaskLayers(NamedTuple):
    """How often one policy executes each layer on a task; NaN where nothing ran."""

    title: str  # the task and the policy
    by_layer: Float[np.ndarray, "L"]
    by_mask_ratio: Float[np.ndarray, "bins L"]  # bins of (0, 1]


# --------------------------------------------------------------------------------------- trade-off


def tradeoff_curve(
    panels: Sequence[Panel], path: str | Path | None = None, xlabel: str = "layers run / layers"
) -> Figure:
    """Draws quality against a cost: a panel per task, a line per kind of policy.

    Args:
      xlabel: what the points' cost is.
    """
    require(len(panels) > 0, "tradeoff_curve: no panels; give at least one task")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with figure_at(path, 4.4 * columns + 0.6, 3.5 * rows + 0.5) as figure:
        figure.get_layout_engine().set(hspace=0.08, wspace=0.06)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, panel in zip(axes, panels, strict=False):
            _tradeoff_panel(ax, panel)
            ax.set(title=panel.title, xlabel=xlabel, ylabel=panel.ylabel)
        for ax in axes[len(panels) :]:
            ax.remove()
        # A panel may lack a kind, so the legend is gathered from all of them.
        handles = {}
        for ax in axes[: len(panels)]:
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        known = [kind for kind in ("full", "routed", "static", "random") if kind in handles]
        order = [*known, *(kind for kind in handles if kind not in known)]
        figure.legend(
            [handles[k] for k in order], order, loc="outside lower center", ncols=len(order)
        )
        for ax, panel in zip(axes, panels, strict=False):
            named = [point for point in panel.points if point.kind != "full"]
            place_labels(ax, [Label(p.label, p.cost, p.value, kind_color(p.kind)) for p in named])
    return figure


def _tradeoff_panel(ax: Axes, panel: Panel) -> None:
    present = {point.kind for point in panel.points}
    known = [kind for kind in ("random", "static", "routed") if kind in present]
    for kind in [*known, *sorted(present - {*known, "full"})]:
        points = sorted((p for p in panel.points if p.kind == kind), key=lambda p: p.cost)
        ax.errorbar(
            [p.cost for p in points],
            [p.value for p in points],
            yerr=[[p.value - p.low for p in points], [p.high - p.value for p in points]],
            color=kind_color(kind),
            marker="o",
            markersize=5,
            linewidth=1.8,
            elinewidth=1,
            ecolor=kind_color(kind) + "55",
            label=kind,
        )
    for p in panel.points:
        if p.kind == "full":
            ax.axhline(p.value, color=GREY, linestyle="--", linewidth=1, zorder=1)
            star = {"markersize": 15, "markeredgecolor": "#7a5c00", "markeredgewidth": 0.6}
            ax.plot(p.cost, p.value, "*", color=kind_color("full"), zorder=5, label="full", **star)
    if panel.chance is not None:
        ax.axhline(panel.chance, color=GREY, linestyle=":", linewidth=1.4, zorder=1, label="chance")
    ax.margins(x=0.12, y=0.12)


# ------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class SpeedPoint:
    """One run of a curve."""

    tokens_per_pass: float
    seconds: float | None  # None: not comparable with the others
    value: float
    low: float  # ends of the error bar
    high: float
    label: str  # the value of the setting that differs along the curve


@dataclass(frozen=True)
class SpeedLine:
    """One curve, by rising tokens per pass."""

    label: str
    points: tuple[SpeedPoint, ...]


@dataclass(frozen=True)
class SpeedPanel:
    """The curves over the same items."""

    title: str
    ylabel: str
    lines: tuple[SpeedLine, ...]


def speed_curves(panels: Sequence[SpeedPanel], path: str | Path | None = None) -> Figure:
    """Accuracy against tokens per pass on the left, against seconds on the right; a row a panel."""
    require(len(panels) > 0, "speed_curves: no panels; give at least one")
    with figure_at(path, 9.4, 3.9 * len(panels)) as figure:
        axes = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
        for (by_pass, by_time), panel in zip(axes, panels, strict=True):
            for number, line in enumerate(panel.lines):
                color = LINE_COLORS[number % len(LINE_COLORS)]
                _speed_line(by_pass, line, [p.tokens_per_pass for p in line.points], color)
                if all(p.seconds is not None for p in line.points):
                    _speed_line(by_time, line, [p.seconds for p in line.points], color)
            by_pass.set(title=panel.title, xlabel="tokens a pass", ylabel=panel.ylabel)
            by_time.set(xlabel="seconds")
            if not by_time.has_data():
                by_time.remove()
            by_pass.legend(loc="best", fontsize=8)
            by_pass.margins(0.1)
    return figure


def _speed_line(ax: Axes, line: SpeedLine, x: Sequence[float], color: str) -> None:
    points = line.points
    errors = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
    style = {"color": color, "ecolor": color + "55", "elinewidth": 1, "linewidth": 1.8}
    values = [p.value for p in points]
    ax.errorbar(x, values, errors, marker="o", markersize=5, label=line.label, **style)
    for at, point in zip(x, points, strict=True):
        offset = {"xytext": (4, 4), "textcoords": "offset points"}
        ax.annotate(point.label, (at, point.value), color=color, fontsize=8, **offset)


# --------------------------------------------------------------------------------------- execution


def execution_heatmap(
    labels: Sequence[str],
    shares: Float[np.ndarray, "P L"],
    path: str | Path | None = None,
    title: str = "",
) -> Figure:
    """Draws how often each of P policies executes each of L layers.

    Args:
      shares: from 0 to 1; NaN if unknown.
    """
    require(len(labels) > 0, "execution_heatmap: no policies; give at least one")
    values = np.asarray(shares, dtype=float)
    num_policies, num_layers = values.shape
    show_numbers = num_layers <= 16 and values.size <= 200
    width = max(5.0, 2.0 + (0.5 if show_numbers else 0.3) * num_layers)
    with figure_at(path, width, 1.4 + 0.32 * num_policies) as figure:
        ax = figure.subplots()
        image = _layer_cells(ax, values)
        if show_numbers:
            for (policy, layer), value in np.ndenumerate(values):
                ax.text(
                    layer + 0.5,
                    policy + 0.5,
                    _share_text(value),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > 0.6 else "#1b2733",
                )
        _layer_ticks(ax, num_layers)
        ax.set_yticks(np.arange(num_policies) + 0.5, labels)
        ax.invert_yaxis()
        ax.set_title(title)
        _share_bar(figure, image, [ax])
    return figure


def _share_text(value: float) -> str:
    """Writes a share with two digits and no leading zero; 1 and 0 only if exact."""
    if not 0 < value < 1:
        return "" if math.isnan(value) else f"{value:g}"
    return f"{min(max(value, 0.01), 0.99):.2f}".removeprefix("0")


def execution_by_task(tasks: Sequence[TaskLayers], path: str | Path | None = None) -> Figure:
    """Draws which layers run on each task: over all calls (DIALS, Figure 5), then by mask ratio.

    The first panel has a row per task, each of the others the mask ratios of one task.
    """
    require(len(tasks) > 0, "execution_by_task: no tasks; give at least one")
    num_bins, num_layers = np.shape(tasks[0].by_mask_ratio)
    heights = [len(tasks), *(num_bins / 2 for _ in tasks)]
    longest = max(len(task.title) for task in tasks)  # beside the first panel, and above others
    width = 1.8 + 0.075 * longest + max(0.11 * longest, 0.3 * num_layers)
    with figure_at(path, width, 0.9 + 0.3 * sum(heights) + 0.3 * len(heights)) as figure:
        axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        image = _layer_cells(axes[0], np.stack([task.by_layer for task in tasks]))
        axes[0].set_yticks(np.arange(len(tasks)) + 0.5, [task.title for task in tasks], fontsize=9)
        axes[0].invert_yaxis()
        axes[0].set_title("all mask ratios")
        for ax, task in zip(axes[1:], tasks, strict=True):
            _layer_cells(ax, task.by_mask_ratio)
            ax.set_yticks([0, num_bins / 2, num_bins], ["0", ".5", "1"], fontsize=9)
            ax.set_ylabel("mask ratio", fontsize=9)
            ax.set_title(task.title, fontsize=10)
        _layer_ticks(axes[-1], num_layers)
        _share_bar(figure, image, list(axes))
    return figure


def _layer_cells(ax: Axes, shares: Float[np.ndarray, "n L"]) -> QuadMesh:
    """A row per line of `shares`, a column per layer."""
    image = ax.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    return image


def _layer_ticks(ax: Axes, num_layers: int) -> None:
    every = 1 if num_layers <= 32 else math.ceil(num_layers / 24)
    layers = range(0, num_layers, every)
    ax.set_xticks([layer + 0.5 for layer in layers], layers, fontsize=9)
    ax.set_xlabel("layer (from 0)")


def _share_bar(figure: Figure, image: QuadMesh, axes: list[Axes]) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=[0, 0.5, 1], fraction=0.05, aspect=40)
    bar.set_label("share executed")
    bar.outline.set_visible(False)


def executed_by_mask_ratio(
    lines: Sequence[Line], path: str | Path | None = None, title: str = ""
) -> Figure:
    """Draws the share of layers executed against the mask ratio.

    Lines of static and random policies are thin, as references. Denoising moves from right (all
    masked) to left. Bins in which nothing ran are left out, because short answers leave bins empty.
    """
    require(len(lines) > 0, "executed_by_mask_ratio: no lines; give at least one policy")
    compared = [line for line in lines if line.kind not in ("random", "static")]
    blues = iter(blue_shades(sum(line.kind == "routed" for line in compared)))
    # Static lines are on top, dashed: at equal k they coincide with random ones.
    references = [line for kind in ("random", "static") for line in lines if line.kind == kind]
    with figure_at(path, 6.6, 3.8) as figure:
        ax = figure.subplots()
        for line in references:
            ax.plot(
                *_filled_bins(line),
                color=kind_color(line.kind),
                linestyle=(0, (5, 5)) if line.kind == "static" else "-",
                linewidth=1.2,
                label=line.kind,
            )
        for line in compared:
            ax.plot(
                *_filled_bins(line),
                color=next(blues) if line.kind == "routed" else kind_color(line.kind),
                marker="o",
                markersize=4.5,
                linewidth=2,
                label=f"{line.kind} {line.label}",
            )
        ax.set(title=title, xlabel="mask ratio", ylabel="layers run / layers", xlim=(0, 1))
        lowest, highest = ax.get_ylim()
        ax.set_ylim(max(0, lowest), min(1.02, highest))
        _label_ends(ax, references)
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        if handles:
            figure.legend(handles.values(), handles, loc="outside right upper", fontsize=9)
    return figure


def _filled_bins(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """The centres and shares of the bins in which something ran."""
    shares = np.array(line.shares)
    filled = np.isfinite(shares)
    return ((np.arange(len(shares)) + 0.5) / len(shares))[filled], shares[filled]


def _label_ends(ax: Axes, lines: Sequence[Line]) -> None:
    """Writes each label once at the right edge, because static and random coincide at equal k."""
    ends = {}
    for line in lines:
        _, shares = _filled_bins(line)
        if len(shares):
            ends.setdefault(line.label, shares[-1])
    figure = ax.get_figure()
    figure.draw_without_rendering()
    height = figure.dpi / 72 * 10  # of a line of text, in pixels
    pixels = ax.transData.transform([(1, y) for y in ends.values()] or np.zeros((0, 2)))[:, 1]
    places = spread_out(pixels, height)
    for (label, y), pixel, place in zip(ends.items(), pixels, places, strict=True):
        ax.annotate(
            label,
            (1, y),
            (4, (place - pixel) * 72 / figure.dpi),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=GREY,
            annotation_clip=False,
        )
