"""Draws static skipping: which layers, and what it keeps (Goel, Figures 1, 2 and 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from dials_jax.errors import require
from dials_jax.reporting.figure import GREY, figure_at, series_styles

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.figure import Figure

RUN, SKIPPED = "#1f5fa8", "#dfe4ea"


class Kept(NamedTuple):
    """What a model keeps of its score, by number of layers skipped: one line of `retention_curves`.

    All are shares, not percentages. `low` and `high` are an interval of `retention`.
    """

    num_skipped: Sequence[int]
    saved: Sequence[float]  # of the FLOPs
    retention: Sequence[float]  # score / that of the whole model
    low: Sequence[float]
    high: Sequence[float]


def retention_curves(
    models: Mapping[str, Kept], path: str | Path | None = None, title: str = ""
) -> Figure:
    """Draws retention against FLOPs saved, a line per model (Goel, Figure 1).

    Points are labelled with the number of layers skipped. The dotted line is the whole model.
    """
    require(len(models) > 0, "retention_curves: no models; give at least one")
    with figure_at(path, 6.6, 4.2) as figure:
        ax = figure.subplots()
        markers = "osD^vP"
        for number, (label, style) in enumerate(series_styles(models).items()):
            kept = models[label]
            saved, retention, low, high = (
                100 * np.asarray(x, float)
                for x in (kept.saved, kept.retention, kept.low, kept.high)
            )
            ax.errorbar(
                saved, retention, [retention - low, high - retention], **style, capsize=2,
                elinewidth=1, marker=markers[number % len(markers)], markersize=6,
            )  # fmt: skip
            for k, x, y in zip(kept.num_skipped, saved, retention, strict=True):
                if k:
                    ax.annotate(
                        str(k), (x, y), (5, 5), textcoords="offset points", fontsize=8,
                        color=style["color"],
                    )  # fmt: skip
        ax.axhline(100, color=GREY, linewidth=1, linestyle=":")
        ax.set(title=title, xlabel="FLOPs saved, %", ylabel="score kept, %")
        ax.legend(fontsize=9)
    return figure


def skipping_grid(
    executed: Bool[np.ndarray, "steps L"], path: str | Path | None = None, title: str = ""
) -> Figure:
    """Draws which layers a sequence ran at each denoising step (Goel, Figure 2).

    Args:
      executed: the gates of one sequence: `generate(...).gates[:, :, b]`.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    steps, num_layers = executed.shape
    with figure_at(path, 8.0, 1.3 + 0.22 * min(num_layers, 24)) as figure:
        ax = figure.subplots()
        lines = {"edgecolors": "white", "linewidth": 0.8 if steps <= 64 else 0}
        ax.pcolormesh(
            np.arange(steps + 1) - 0.5, np.arange(num_layers + 1) - 0.5, executed.T,
            cmap=ListedColormap([SKIPPED, RUN]), vmin=0, vmax=1, rasterized=True, **lines,
        )  # fmt: skip
        ax.spines[:].set_visible(False)
        ax.grid(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
        ax.set(title=title, xlabel="denoising step", ylabel="layer (from 0)")
        patches = [Patch(color=RUN, label="run"), Patch(color=SKIPPED, label="skipped")]
        figure.legend(handles=patches, loc="outside right upper", fontsize=9)
    return figure


def choice_bars(
    shares: Mapping[str, Mapping[str, Float[np.ndarray, "L"]]], path: str | Path | None = None
) -> Figure:
    """Draws how often each layer is chosen to be skipped (Goel, Figure 8).

    Args:
      shares: of the prompts whose own choice holds a layer, by model and by rule: a row of panels
        per model, a column per rule (neighbours allowed, and not).
    """
    require(len(shares) > 0, "choice_bars: no models; give at least one")
    rules = list(next(iter(shares.values())))
    with figure_at(path, 4.8 * len(rules), 1.0 + 1.7 * len(shares)) as figure:
        axes = figure.subplots(len(shares), len(rules), sharey=True, squeeze=False)
        for row, (label, own) in zip(axes, shares.items(), strict=True):
            for ax, rule in zip(row, rules, strict=True):
                ax.bar(range(len(own[rule])), 100 * np.asarray(own[rule]), color=RUN, width=0.75)
                ax.set(title=f"{label}: {rule}", ylim=(0, 105))
                ax.grid(axis="x", visible=False)
                ax.xaxis.get_major_locator().set_params(integer=True)
            row[0].set_ylabel("% of prompts")
        for ax in axes[-1]:
            ax.set_xlabel("layer (from 0)")
    return figure
