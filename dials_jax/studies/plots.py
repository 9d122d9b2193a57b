"""Draws the figures of studies of model schedules (Sedykh) as PNG files.

Every function takes plain data, returns the figure, and writes it to a file if a path is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax.reporting.figure import COLORS, GREY, blue_shades, figure_at
from dials_jax.studies.divergence import Curve
from dials_jax.studies.search import Influence, Regret

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT, HEAVY = COLORS["static"], "#dfe6ee"  # the light model stands out
HARM, SAFE = "#c0392b", COLORS["random"]
Series = tuple[Float[np.ndarray, "S"], Float[np.ndarray, "2 S"]]  # values, and their intervals
SEGMENTS = "segment (0 is fully masked)"
CURVE_LABELS = {
    "loss": "|difference in cross-entropy|, nats",
    "gap": "cross-entropy above the heavy model's, nats",
    "kl": "KL(heavy || model), nats",
    "relative_kl": "KL(heavy || model),\nless a second heavy model's, nats",
}


def schedule_points(
    labels: Sequence[str],
    values: Float[np.ndarray, "S"],
    intervals: Float[np.ndarray, "2 S"],
    path: str | Path | None = None,
    title: str = "",
    label: str = "generative perplexity (lower is better)",
    changes: Mapping[str, Series] | None = None,
) -> Figure:
    """Draws one number per schedule with its interval, the lowest on top (Sedykh, Figure 1).

    Args:
      changes: of a second panel: differences to the first schedule, sample by sample. Schedules
        share most of their noise, so only these intervals tell them apart.
    """
    order = np.argsort(-values, kind="stable")
    width = 10.6 if changes else 6.6
    with figure_at(path, width, 1.3 + 0.36 * len(labels)) as figure:
        left, *right = np.atleast_1d(figure.subplots(1, 2 if changes else 1, sharey=True))
        _draw_points(left, values[order], intervals[:, order], COLORS["routed"])
        left.set_yticks(range(len(labels)), [labels[i] for i in order])
        left.margins(y=0.6 / len(labels))
        left.tick_params(axis="y", length=0)
        left.set(title=title, xlabel=label)
        for ax in right:
            shift = 0.15
            for (name, (value, ends)), color in zip(changes.items(), COLORS.values(), strict=False):
                _draw_points(ax, value[order], ends[:, order], color, shift, name)
                shift = -shift
            ax.axvline(0, color=GREY, linewidth=1)
            ax.tick_params(axis="y", length=0)
            ax.set(title=f"against {labels[0]}", xlabel="log perplexity above it, nats per token")
            ax.legend(fontsize=9)
    return figure


def fraction_curves(
    fractions: Float[np.ndarray, "S"],
    values: Float[np.ndarray, "S"],
    intervals: Float[np.ndarray, "2 S"],
    savings: Mapping[str, Float[np.ndarray, "S"]],
    path: str | Path | None = None,
) -> Figure:
    """Draws perplexity, and what is saved, against the share of light steps (Sedykh, Table 2)."""
    order = np.argsort(fractions)
    x = 100 * fractions[order]
    with figure_at(path, 9.6, 3.6) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(x, values[order], color=COLORS["routed"], marker="o", markersize=5)
        left.fill_between(x, *intervals[:, order], color=COLORS["routed"], alpha=0.15, linewidth=0)
        left.set(xlabel="light steps, %", ylabel="generative perplexity")
        for (label, saved), color in zip(savings.items(), COLORS.values(), strict=False):
            right.plot(x, 100 * saved[order], color=color, marker="o", markersize=4, label=label)
        right.set(xlabel="light steps, %", ylabel="saved, %")
        right.legend(fontsize=9)
    return figure


def placement_rows(
    best: Bool[np.ndarray, "k n"],
    worst: Bool[np.ndarray, "k n"],
    perplexities: tuple[Sequence[float], Sequence[float]],
    path: str | Path | None = None,
) -> Figure:
    """Draws which segments are light in the best and the worst schedules (Sedykh, Figure 2)."""
    with figure_at(path, 9.6, 1.4 + 0.36 * len(best)) as figure:
        axes = figure.subplots(1, 2)
        names = (f"best {len(best)}", f"worst {len(worst)}")
        for ax, light, values, name in zip(axes, (best, worst), perplexities, names, strict=True):
            for row, segments in enumerate(light):
                colors = [LIGHT if on else HEAVY for on in segments]
                ax.barh(np.full(len(segments), row), 0.94, 0.74, np.arange(len(segments)) - 0.47,
                        color=colors)  # fmt: skip
            ax.set_yticks(range(len(light)), [f"{value:.2f}" for value in values])
            ax.set_xticks(range(light.shape[1]))
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
            ax.grid(False)
            ax.invert_yaxis()
            ax.set(title=f"{name} (light in orange)", xlabel=SEGMENTS, ylabel="perplexity")
    return figure


def segment_frequencies(
    best: Int[np.ndarray, "n"],
    worst: Int[np.ndarray, "n"],
    num_extremes: int,
    path: str | Path | None = None,
) -> Figure:
    """Draws how often segments are light among the best and worst (Sedykh, Figures 3 and 4)."""
    with figure_at(path, 9.6, 3.2) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        panels = ((best, f"best {num_extremes}", SAFE), (worst, f"worst {num_extremes}", HARM))
        for ax, (count, name, color) in zip(axes, panels, strict=True):
            ax.bar(range(len(count)), count, color=color, width=0.7)
            _label_segments(ax, len(count))
            ax.set(title=name)
        axes[0].set(ylabel="schedules in which it is light")
    return figure


def influence_bars(influence: Influence, path: str | Path | None = None) -> Figure:
    """Draws the influence of segments (Sedykh, Figure 7); above 0 a light model does harm there."""
    with figure_at(path, 6.6, 3.4) as figure:
        ax = figure.subplots()
        segments = np.arange(len(influence.value))
        colors = [HARM if value > 0 else SAFE for value in influence.value]
        ax.bar(segments, influence.value, color=colors, width=0.7)
        _draw_intervals(ax, segments, influence.value, np.array([influence.low, influence.high]))
        ax.axhline(0, color=GREY, linewidth=1)
        _label_segments(ax, len(segments))
        ax.set(ylabel="perplexity above the mean schedule")
    return figure


def importance_curves(
    curves: Mapping[str, Curve],
    labels: Mapping[str, str],
    ylabel: str,
    path: str | Path | None = None,
) -> Figure:
    """Draws light models against the heavy one by noise level (Sedykh, Figures 5 and 6)."""
    with figure_at(path, 6.6, 3.8) as figure:
        ax = figure.subplots()
        for (letter, curve), color in zip(curves.items(), blue_shades(len(curves)), strict=True):
            ax.plot(
                curve.times, curve.value, color=color, marker="o", markersize=4, linewidth=2,
                label=labels.get(letter, letter),
            )  # fmt: skip
            ax.fill_between(
                curve.times, curve.low, curve.high, color=color, alpha=0.18, linewidth=0
            )
        ax.axhline(0, color=GREY, linewidth=1)
        ax.set(
            xlabel="t (1 is fully masked; sampling moves from right to left)",
            ylabel=ylabel,
            xlim=(0, 1),
        )
        ax.legend(fontsize=9)
    return figure


def regret_curves(
    budgets: Sequence[int], regrets: Mapping[str, Sequence[Regret]], path: str | Path | None = None
) -> Figure:
    """Draws what a method's choice loses to the exhaustive one, against the number of trials.

    The line of a method `X + Y` has the colour of X, and is dashed.
    """
    bases = dict.fromkeys(name.split(" + ")[0] for name in regrets)
    colors = dict(zip(bases, (GREY, *COLORS.values()), strict=False))
    with figure_at(path, 9.2, 3.8) as figure:
        ax = figure.subplots()
        for name, found in regrets.items():
            base, *more = name.split(" + ")
            ax.plot(
                budgets, [r.mean for r in found], color=colors[base], marker="o", markersize=5,
                linewidth=2, linestyle="--" if more else "-", label=name,
            )  # fmt: skip
        ax.axhline(0, color=GREY, linewidth=1)
        ax.set_xscale("log")
        ax.set_xticks(list(budgets), [str(b) for b in budgets])
        ax.minorticks_off()
        ax.set(xlabel="schedules tried", ylabel="perplexity above the exhaustive choice")
        figure.legend(fontsize=9, loc="outside right center")  # lines may be anywhere in the axes
    return figure


def predicted_scatter(
    predicted: Float[np.ndarray, "S"],
    measured: Float[np.ndarray, "S"],
    title: str,
    path: str | Path | None = None,
) -> Figure:
    """Draws each schedule's perplexity against the harm that the importance predicts."""
    with figure_at(path, 5.2, 3.8) as figure:
        ax = figure.subplots()
        ax.scatter(predicted, measured, s=14, color=COLORS["routed"], alpha=0.6, linewidth=0)
        ax.set(
            title=title,
            xlabel="predicted harm, nats per token",
            ylabel="generative perplexity",
        )
        ax.locator_params(axis="x", nbins=6)
    return figure


def _draw_points(
    ax: Axes,
    values: Float[np.ndarray, "S"],
    intervals: Float[np.ndarray, "2 S"],
    color: str,
    shift: float = 0.0,
    label: str | None = None,
) -> None:
    rows = np.arange(len(values)) + shift
    ax.plot(values, rows, "o", color=color, markersize=8 if not shift else 6, zorder=3, label=label)
    _draw_intervals(ax, rows, values, intervals, horizontal=True)


def _label_segments(ax: Axes, num_segments: int) -> None:
    ax.set_xticks(range(num_segments))
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", visible=False)
    ax.set_xlabel(SEGMENTS)


def _draw_intervals(ax: Axes, positions, values, intervals, horizontal: bool = False) -> None:
    errors = np.stack([values - intervals[0], intervals[1] - values])
    style = {"fmt": "none", "ecolor": "#1b2733", "elinewidth": 1.2, "capsize": 3}
    if horizontal:
        ax.errorbar(values, positions, xerr=errors, **style)
    else:
        ax.errorbar(positions, values, yerr=errors, **style)
