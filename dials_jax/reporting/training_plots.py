"""Draws the metrics of training runs, from their metrics.jsonl."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from dials_jax.errors import require
from dials_jax.records import Lines
from dials_jax.reporting.figure import blue_shades, figure_at

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

EXECUTION = "validation/execution"  # the beginning of names in metrics.jsonl
SAMPLED = f"{EXECUTION}_sampled"
MAX_POINTS = 2000  # more than the pixels of a figure; smoothing costs its square


def training_curves(
    metrics: str | Path | Sequence[str | Path], path: str | Path | None = None
) -> Figure:
    """Draws the loss, and the skip rate of routers, against the step.

    A panel of its own shows the share of layers that routers run on held-out data, under the votes
    of training and as inference takes it (DIALS, Figure 7).

    Smoothed lines lie over the faint raw values. A long run is drawn with at most `MAX_POINTS`
    points: means of neighbours, and the range of the raw values. A line of a file that is not the
    record of a step is left out, with a warning.

    Args:
      metrics: one `metrics.jsonl`, or several, which are named by their folders.
      path: of the PNG file to write; None: none.

    Raises: InputError if a file is missing or logs no loss.
    """
    files = [Path(m) for m in ([metrics] if isinstance(metrics, str | Path) else metrics)]
    require(len(files) > 0, "training_curves: no files; give at least one metrics.jsonl")
    runs = {file: read_metrics(file) for file in files}
    panels = [("loss", "loss")]
    names = {name for records in runs.values() for record in records for name in record}
    if "skip_rate" in names:
        panels.append(("skip_rate", "skip rate"))
    validated = EXECUTION in names
    with figure_at(path, 5.4 * (len(panels) + validated), 3.6) as figure:
        axes = figure.subplots(1, len(panels) + validated, squeeze=False)[0]
        for ax, (name, ylabel) in zip(axes, panels, strict=False):
            _training_panel(ax, runs, name)
            ax.set(xlabel="step", ylabel=ylabel)
        if validated:
            _execution_panel(axes[-1], runs)
        if len(files) > 1:
            axes[0].legend(fontsize=9)
    return figure


def _training_panel(ax: Axes, runs: Mapping[Path, list[dict]], name: str) -> None:
    raw = []
    for (file, records), color in zip(runs.items(), blue_shades(len(runs)), strict=True):
        points = [(r["step"], r[name]) for r in records if is_finite(r.get(name))]
        if points:
            steps, means, spread = _thin_out(*np.array(points, dtype=float).T)
            smooth = _smooth(means)
            ax.plot(steps, smooth, color=color, linewidth=2, label=file.parent.name)
            raw.append((*spread, color))
    # The smoothed lines set the range: a loss weighted by 1 / p has spikes that would flatten them.
    ax.margins(y=0.25)
    ax.autoscale_view()
    ax.set_ylim(bottom=max(0, ax.get_ylim()[0]))  # neither is ever negative
    ax.autoscale(False)
    for steps, values, color in raw:
        ax.plot(steps, values, color=color, linewidth=0.8, alpha=0.25, zorder=1)


def _execution_panel(ax: Axes, runs: Mapping[Path, list[dict]]) -> None:
    """One line per run and threshold; dashed under the votes of training."""
    for (file, records), color in zip(runs.items(), blue_shades(len(runs)), strict=True):
        names = sorted({name for record in records for name in record if EXECUTION in name})
        for name in names:
            points = [(r["step"], r[name]) for r in records if is_finite(r.get(name))]
            sampled, tau = name == SAMPLED, name.partition("@")[2]
            label = "votes of training" if sampled else f"tau={tau}" if tau else "at inference"
            ax.plot(
                *np.array(points, dtype=float).T,
                color=color,
                linestyle="--" if sampled else "-",
                alpha=0.5 if tau else 1.0,
                marker="." if len(points) < 30 else None,
                label=f"{file.parent.name}: {label}" if len(runs) > 1 else label,
            )
    ax.set(xlabel="step", ylabel="share of layers run, held-out data")
    ax.legend(fontsize=8)


def _thin_out(
    steps: Float[np.ndarray, "n"], values: Float[np.ndarray, "n"]
) -> tuple[
    Float[np.ndarray, "m"],
    Float[np.ndarray, "m"],
    tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]],
]:
    """Reduces a line to at most `MAX_POINTS` points, each the mean of a group of neighbours.

    Returns: their steps and values, and a line through the least and greatest value of each group.
    """
    size = -(-len(values) // MAX_POINTS)
    if size == 1:
        return steps, values, (steps, values)
    starts = np.arange(0, len(values), size)
    counts = np.diff(starts, append=len(values))
    steps, means = (np.add.reduceat(x, starts) / counts for x in (steps, values))
    ends = [ends.reduceat(values, starts) for ends in (np.minimum, np.maximum)]
    return steps, means, (np.repeat(steps, 2), np.stack(ends, axis=1).ravel())


def is_finite(value: Any) -> bool:
    """Whether this is a number that fits a float; JSON allows others."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _smooth(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Smooths by a centred Hann-weighted mean over a twentieth of the run, less at its ends."""
    window = np.hanning(2 * (len(values) // 40) + 3)[1:-1]
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics.jsonl that have a loss, one per step, in order of steps."""
    require(file.is_file(), f"{file} is missing; give the metrics.jsonl of a training run")
    lines = Lines.read(file, _check_record)
    if lines.odd:
        log.warning("%s, %s: no record of a step; left out", file, lines.name_odd())
    if lines.lines[-1]:
        log.warning("%s ends with half a line, which is left out", file)
    # A run that was resumed may repeat steps.
    by_step = {record["step"]: record for record in lines.good.values() if "loss" in record}
    require(len(by_step) > 0, f"{file} logs no loss; give the metrics.jsonl of a training run")
    return [by_step[step] for step in sorted(by_step)]


def _check_record(record: Any) -> None:
    if not is_finite(record["step"]):
        raise ValueError("no finite step")
