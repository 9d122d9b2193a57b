"""Draws the figures of an evaluation sweep as PNG files.

Every function takes plain data and the path of the file to write, and returns that path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes


LINE_COLORS = (COLORS["routed"], COLORS["static"], COLORS["random"], *OTHER_COLORS)


@dataclass(frozen=True)
class Point:
    """One policy in a trade-off panel."""

    kind: str  # of the policy: full, static, random, routed or another
    label: str  # lambda or k, written next to the point
    share: float  # of layers run
    value: float
    low: float  # ends of the error bar
    high: float


@dataclass(frozen=True)
class Panel:
    """One task in the trade-off figure."""

    title: str
    ylabel: str
    points: tuple[Point, ...]
    lower_is_better: bool = False


@dataclass(frozen=True)
class Line:
    """The layers that one policy executes, by mask ratio."""

    kind: str
    label: str
    shares: tuple[float, ...]  # of layers executed, one per bin of (0, 1]; NaN where nothing ran


# --------------------------------------------------------------------------------------- trade-off


def tradeoff_curve(panels: Sequence[Panel], path: str | Path) -> Path:
    """Draws quality against layers run: a panel per task, a line per kind of policy."""
    require(len(panels) > 0, "tradeoff_curve: no panels; give at least one task")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with figure_at(path, 4.4 * columns + 0.6, 3.5 * rows + 0.5) as figure:
        figure.get_layout_engine().set(hspace=0.08, wspace=0.06)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, panel in zip(axes, panels, strict=False):
            _tradeoff_panel(ax, panel)
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
    return Path(path)


def _tradeoff_panel(ax: Axes, panel: Panel) -> None:
    present = {point.kind for point in panel.points}
    known = [kind for kind in ("random", "static", "routed") if kind in present]
    for kind in [*known, *sorted(present - {*known, "full"})]:
        points = sorted((p for p in panel.points if p.kind == kind), key=lambda p: p.share)
        ax.errorbar(
            [p.share for p in points],
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
        for index, point in enumerate(points):
            _label_point(ax, point, panel.lower_is_better, high=index % 2)
    for p in panel.points:
        if p.kind == "full":
            ax.axhline(p.value, color=GREY, linestyle="--", linewidth=1, zorder=1)
            star = {"markersize": 15, "markeredgecolor": "#7a5c00", "markeredgewidth": 0.6}
            ax.plot(p.share, p.value, "*", color=kind_color("full"), zorder=5, label="full", **star)
    ax.margins(x=0.1, y=0.1)
    ax.set(title=panel.title, xlabel="layers run / layers", ylabel=panel.ylabel)


def _label_point(ax: Axes, point: Point, lower_is_better: bool, high: int) -> None:
    """Writes a label beside the curve, which rises to the right if higher is better.

    Labels of routers are above, those of static skips below, because the two curves may be close.
    Policies of one kind lie close together, so every second label of a router is higher.

    Args:
      high: 1 for a label that is higher than its neighbours, else 0.
    """
    from matplotlib.patheffects import withStroke

    dx, dy, align = {
        "static": (4, -4, "left"),
        "random": (-4, 4, "right"),
    }.get(point.kind, (0, 6 + 10 * high, "center"))
    dy = -dy if lower_is_better else dy
    ax.annotate(
        point.label,
        (point.share, point.value),
        (dx, dy),
        textcoords="offset points",
        ha=align,
        va="bottom" if dy > 0 else "top",
        fontsize=8,
        color=kind_color(point.kind),
        path_effects=[withStroke(linewidth=2, foreground="white")],
        zorder=6,
    )


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


def speed_curves(panels: Sequence[SpeedPanel], path: str | Path) -> Path:
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
    return Path(path)


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
    labels: Sequence[str], shares: Float[np.ndarray, "P L"], path: str | Path, title: str = ""
) -> Path:
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
        image = ax.pcolormesh(values, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
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
        every = 1 if num_layers <= 32 else math.ceil(num_layers / 24)
        layers = range(0, num_layers, every)
        ax.set_xticks([layer + 0.5 for layer in layers], layers, fontsize=9)
        ax.set_yticks(np.arange(num_policies) + 0.5, labels)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.grid(False)
        ax.invert_yaxis()
        ax.set(title=title, xlabel="layer (from 0)")
        bar = figure.colorbar(image, ax=ax, pad=0.01, ticks=[0, 0.5, 1])
        bar.set_label("share executed")
        bar.outline.set_visible(False)
    return Path(path)


def _share_text(value: float) -> str:
    """Writes a share with two digits and no leading zero; 1 and 0 only if exact."""
    if not 0 < value < 1:
        return "" if math.isnan(value) else f"{value:g}"
    return f"{min(max(value, 0.01), 0.99):.2f}".removeprefix("0")


def executed_by_mask_ratio(lines: Sequence[Line], path: str | Path, title: str = "") -> Path:
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
        _label_ends(ax, references)
        ax.set(title=title, xlabel="mask ratio", ylabel="layers run / layers", xlim=(0, 1))
        lowest, highest = ax.get_ylim()
        ax.set_ylim(max(0, lowest), min(1.02, highest))
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        if handles:
            figure.legend(handles.values(), handles, loc="outside right upper", fontsize=9)
    return Path(path)


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
    for label, y in ends.items():
        ax.annotate(
            label,
            (1, y),
            (4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=GREY,
            annotation_clip=False,
        )
