"""The figure of training runs, from the metrics.jsonl of each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from dials_jax.analysis.figure import figure_at, shades
from dials_jax.config import InputError, require

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes


def training_curves(metrics: str | Path | Sequence[str | Path], path: str | Path) -> Path:
    """Loss, and skip rate where there is one, against step: smoothed over the faint raw values.

    Args:
      metrics: one `metrics.jsonl` or several; several are named by their folders.
    Raises: InputError if a file is missing or logs no loss.
    """
    files = [Path(m) for m in ([metrics] if isinstance(metrics, str | Path) else metrics)]
    require(len(files) > 0, "training_curves: no files; give at least one metrics.jsonl")
    runs = {file: _read_metrics(file) for file in files}
    panels = [("loss", "loss")]
    if any("skip_rate" in record for records in runs.values() for record in records):
        panels.append(("skip_rate", "skip rate"))
    with figure_at(path, 5.4 * len(panels), 3.6) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (name, ylabel) in zip(axes, panels, strict=True):
            _training_panel(ax, runs, name)
            ax.set(xlabel="step", ylabel=ylabel)
        if len(files) > 1:
            axes[0].legend(fontsize=9)
    return Path(path)


def _training_panel(ax: Axes, runs: Mapping[Path, list[dict]], name: str) -> None:
    raw = []
    for (file, records), color in zip(runs.items(), shades(len(runs)), strict=True):
        points = [(r["step"], r[name]) for r in records if math.isfinite(r.get(name, math.nan))]
        if points:
            steps, values = np.array(points, dtype=float).T
            ax.plot(steps, _smooth(values), color=color, linewidth=2, label=file.parent.name)
            raw.append((steps, values, color))
    # The smoothed lines set the frame: a loss weighted by 1 / p has spikes that would flatten it.
    ax.margins(y=0.25)
    ax.autoscale_view()
    ax.set_ylim(bottom=max(0, ax.get_ylim()[0]))  # neither is ever negative
    ax.autoscale(False)
    for steps, values, color in raw:
        ax.plot(steps, values, color=color, linewidth=0.8, alpha=0.25, zorder=1)


def _smooth(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Centred Hann-weighted mean over a twentieth of the run; the ends average what there is."""
    window = np.hanning(2 * (len(values) // 40) + 3)[1:-1]
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    """Records of one metrics.jsonl with a loss, one a step, in order of steps."""
    require(file.is_file(), f"{file} is missing; give the metrics.jsonl of a training run")
    # A run that was stopped may end in half a line; one that was resumed repeats some steps.
    complete, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    by_step = {}
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file}, line {number} is not valid JSON: {error}") from error
        if "loss" in record:
            by_step[record["step"]] = record
    require(len(by_step) > 0, f"{file} logs no loss; give the metrics.jsonl of a training run")
    return [by_step[step] for step in sorted(by_step)]
