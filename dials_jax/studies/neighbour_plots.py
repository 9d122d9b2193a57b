"""Draws the cosine of neighbouring tokens within hidden states (Goel, Figures 6 and 9 to 14)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from dials_jax.errors import require
from dials_jax.reporting.figure import figure_at, series_styles
from dials_jax.studies.profile import Profile
from dials_jax.studies.representation_plots import NARROWEST, POSITION, Profiles, at_decoded

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.figure import Figure

NEIGHBOURS = "cosine to the next token"
QUARTERS = ("early", "early-middle", "late-middle", "late")


def quarter_states(num_layers: int) -> list[Int[np.ndarray, "n"]]:
    """The outputs of each quarter of the layers: hidden states 1 to L in four parts."""
    return np.array_split(np.arange(1, num_layers + 1), len(QUARTERS))


def neighbour_rows(
    profiles: Profiles, path: str | Path | None = None, num_decoded: int | None = 32
) -> Figure:
    """Draws neighbours by position: a row per depth, a column per model (Goel, Figure 6).

    Rows are the outputs of the first layer and of the last one of each quarter. Two lines: where
    `num_decoded` tokens are decoded, and where all are.
    """
    times = {f"{num_decoded} decoded": num_decoded, "all decoded": None}
    if num_decoded is None:
        times = {"all decoded": None}
    rows = ["first layer", *(f"end of the {name} layers" for name in QUARTERS)]
    with figure_at(
        path, max(NARROWEST, 1.2 + 3.4 * len(profiles)), 0.8 + 1.5 * len(rows)
    ) as figure:
        axes = figure.subplots(len(rows), len(profiles), sharex="col", sharey=True, squeeze=False)
        for column, (label, profile) in zip(axes.T, profiles.items(), strict=True):
            states = [
                1,
                *(own[-1] if len(own) else 1 for own in quarter_states(profile.num_layers)),
            ]
            for name, style in series_styles(times).items():
                values = at_decoded(profile.token_cosine.mean, profile, times[name])
                for ax, state in zip(column, states, strict=True):
                    ax.plot(profile.positions[:-1], values[state], **style | {"linewidth": 1.3})
                    ax.set_title(f"{label}, after layer {state - 1}", fontsize=9)
            column[-1].set_xlabel(POSITION)
        for ax in axes[:, 0]:
            ax.set_ylabel(NEIGHBOURS, fontsize=8)
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9
        )
    return figure


def neighbour_quarters(
    profiles: Profiles, path: str | Path | None = None, num_decoded: int | None = None
) -> Figure:
    """Draws neighbours by position, a panel per quarter of the depth (Goel, Figures 9 to 12).

    A line per model: the mean over the layers of the quarter; the band reaches from the lowest to
    the highest of them.
    """
    with figure_at(path, 9.6, 5.6) as figure:
        axes = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
        for label, style in series_styles(profiles).items():
            profile = profiles[label]
            values = at_decoded(profile.token_cosine.mean, profile, num_decoded)
            for ax, states in zip(axes, quarter_states(profile.num_layers), strict=True):
                if len(states):
                    _quarter(ax, profile.positions[:-1], values[states], style)
        for ax, name in zip(axes, QUARTERS, strict=True):
            ax.set_title(f"{name} quarter of the layers")
        for ax in axes[2:]:
            ax.set_xlabel(POSITION)
        for ax in axes[::2]:
            ax.set_ylabel(NEIGHBOURS)
        axes[0].legend(fontsize=9)
    return figure


def _quarter(ax, positions, values: Float[np.ndarray, "n pairs"], style) -> None:
    seen = np.isfinite(values).all(axis=0)
    positions, values = positions[seen], values[:, seen]
    ax.plot(positions, values.mean(axis=0), **style)
    ax.fill_between(
        positions, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15,
        linewidth=0,
    )  # fmt: skip


def neighbour_grid(
    profile: Profile, path: str | Path | None = None, num_decoded: int | None = None
) -> Figure:
    """Draws neighbours by position within every hidden state (Goel, Figures 13 and 14)."""
    values = at_decoded(profile.token_cosine.mean, profile, num_decoded)
    require(len(values) > 0, "a profile without hidden states cannot be drawn; measure it again")
    columns = min(6, math.ceil(math.sqrt(len(values))))
    rows = math.ceil(len(values) / columns)
    (style,) = series_styles([profile.facts.label]).values()
    with figure_at(path, max(NARROWEST, 0.8 + 1.7 * columns), 1.1 + 1.2 * rows) as figure:
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for state, ax in enumerate(axes.ravel()):
            if state >= len(values):
                ax.set_visible(False)
                continue
            ax.plot(profile.positions[:-1], values[state], **style | {"linewidth": 1})
            ax.set_title(f"after layer {state - 1}" if state else "embedding", fontsize=9)
            ax.xaxis.get_major_locator().set_params(integer=True, nbins=4)
            below = state + columns < len(values)
            ax.tick_params(labelsize=8, labelbottom=not below)
        figure.suptitle(profile.facts.label, fontsize=11, fontweight="bold")
        figure.supxlabel(POSITION, fontsize=9)
        figure.supylabel(NEIGHBOURS, fontsize=9)
    return figure
