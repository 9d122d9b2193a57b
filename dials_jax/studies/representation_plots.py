"""Draws profiles by layer, position and step (Goel, Figures 3 to 5 and 7), and what changes near
new tokens. `neighbour_plots.py` has neighbouring tokens.

Layers and hidden states count from 0: hidden state 0 is the embedding, and layer l takes state l to
state l + 1. Positions count from the start of the answer; those of the prompt are negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from dials_jax.errors import require
from dials_jax.reporting.figure import GREY, SEQUENTIAL, figure_at, log_y, series_styles, shades
from dials_jax.reporting.labels import Label, place_labels
from dials_jax.studies.profile import Profile

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

Profiles = Mapping[str, Profile]  # by label
POSITION = "position (0: first of the answer)"
LAYER = "layer (from 0)"
COSINE = "cosine of input and output"
SINKS = 3  # that a figure names per model
SINK = "#b03a5b"
NARROWEST = 6.6  # inches at least, so that text is as large as in other figures of a page


def group_at(profile: Profile, num_decoded: int | None) -> int:
    """The group of steps whose first call saw so many decoded tokens. None: the last group.

    Every step is taken to decode equally many.
    """
    if num_decoded is None or num_decoded >= profile.facts.gen_length:
        return profile.num_bins - 1
    return num_decoded * profile.num_bins // profile.facts.gen_length


def at_decoded(
    values: Float[np.ndarray, "S n T"], profile: Profile, num_decoded: int | None
) -> Float[np.ndarray, "n T"]:
    """Values at the group of steps where so many tokens are decoded; None: all.

    A causal model has only as many positions then, and what they are never changes.
    """
    found = values[group_at(profile, num_decoded)].copy()
    if profile.facts.family == "causal" and num_decoded is not None:
        found[:, profile.facts.prompt_length + num_decoded :] = np.nan
    return found


# ------------------------------------------------------------------------------------- by layer


def depth_curves(profiles: Profiles, path: str | Path | None = None) -> Figure:
    """Draws the mean cosine of each layer's input and output in answers (Goel, Figure 3).

    Left: the band is a standard deviation over groups of steps, as in the paper; a causal model has
    one. Right: the band is a 95 % interval of the mean over sequences (Student's).
    """
    _require_any(profiles)
    with figure_at(path, 9.6, 3.8) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for label, style in series_styles(profiles).items():
            profile = profiles[label]
            answer = profile.layer_cosine.mean[..., profile.positions >= 0]
            by_step = np.nanmean(answer, axis=2)
            spread = by_step.std(axis=0, ddof=1) if len(by_step) > 1 else np.zeros(answer.shape[1])
            _band(axes[0], by_step.mean(axis=0), spread, style)
            by_sequence = profile.sequence_layer
            _band(axes[1], np.nanmean(by_sequence, axis=0), _half_interval(by_sequence), style)
        for ax, title in zip(axes, ("± deviation over steps", "95 % over sequences"), strict=True):
            ax.set(title=title, xlabel=LAYER)
            _whole_numbers(ax)
        axes[0].set_ylabel(COSINE)
        axes[0].legend(fontsize=9)
    return figure


def depth_shapes(profiles: Profiles, path: str | Path | None = None) -> Figure:
    """Draws the depth profiles that are correlated: at equal mean and deviation, by relative depth.

    Left: of layers, without layer 0; right: of neighbouring tokens, without the embedding.
    """
    _require_any(profiles)
    with figure_at(path, 9.6, 3.8) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for label, style in series_styles(profiles).items():
            profile = profiles[label]
            both = (profile.sequence_layer, profile.sequence_token)
            for ax, values in zip(axes, both, strict=True):
                mean = np.nanmean(values[:, 1:], axis=0)
                deviation = mean.std()
                shape = (mean - mean.mean()) / (deviation if deviation > 0 else 1)
                ax.plot(np.linspace(0, 1, len(mean)), shape, **style)
        titles = ("layers: input and output", "neighbouring tokens")
        for ax, title in zip(axes, titles, strict=True):
            ax.set(title=title, xlabel="depth (0: after layer 0, 1: last layer)")
        axes[0].set_ylabel("cosine, in deviations from its mean")
        axes[0].legend(fontsize=9)
    return figure


def norm_curves(profiles: Profiles, path: str | Path | None = None) -> Figure:
    """Draws the L2 norms of hidden states, and names the largest sinks (Goel, Figure 7).

    A line is the mean over positions and steps; the thin one the largest norm of any position. A
    sink is named with its position and its multiple of that hidden state's mean norm.
    """
    _require_any(profiles)
    with figure_at(path, max(NARROWEST, 1.2 + 3.6 * len(profiles)), 3.8) as figure:
        axes = figure.subplots(1, len(profiles), sharey=True, squeeze=False)[0]
        labels = {}
        for ax, (label, style) in zip(axes, series_styles(profiles).items(), strict=True):
            profile = profiles[label]
            mean = profile.norm.pooled((0, 2)).mean
            largest = profile.largest_norm
            ax.plot(mean, **style | {"label": "mean"})
            ax.plot(largest.max(axis=1), color=GREY, linewidth=1, label="largest")
            ax.set(title=label, xlabel="hidden state (0: embedding)")
            log_y(ax)
            ax.margins(x=0.1, y=0.2)
            _whole_numbers(ax)
            sinks = [
                Label(
                    f"{profile.positions[position]}: {largest[state, position] / mean[state]:.1f}x",
                    state, largest[state, position], SINK,
                )
                for state, position in named_sinks(profile)
            ]  # fmt: skip
            for sink in sinks:
                ax.plot(sink.x, sink.y, "o", color=SINK, markersize=4)
            labels[ax] = sinks
        axes[0].set_ylabel("L2 norm")
        axes[0].legend(fontsize=9)
        for ax, sinks in labels.items():
            place_labels(ax, sinks)
    return figure


def named_sinks(profile: Profile, count: int = SINKS) -> list[tuple[int, int]]:
    """Hidden state and index of the positions that are sinks most often, each where it is most so.

    A state's largest norm against its mean decides between states of equal counts.
    """
    often = profile.sinks.sum(axis=0)
    mean = profile.norm.pooled((0, 2)).mean
    chosen = [int(i) for i in np.argsort(-often, kind="stable")[:count] if often[i]]
    found = []
    for i in chosen:
        multiple = np.where(profile.sinks[:, i] > 0, profile.largest_norm[:, i] / mean, 0)
        found.append((int(multiple.argmax()), i))
    return found


# ----------------------------------------------------------------------------------- heat maps


def layer_heatmaps(
    profiles: Profiles, path: str | Path | None = None, num_decoded: int | None = None
) -> Figure:
    """Draws the cosine of each layer's input and output by position, a row per model.

    Args:
      num_decoded: at the step where so many tokens are decoded (32 in Goel, Figure 4); None: all of
        them (Figure 5).
    """
    _require_any(profiles)
    maps = {
        label: at_decoded(profile.layer_cosine.mean, profile, num_decoded)
        for label, profile in profiles.items()
    }
    low = lowest(list(maps.values()))
    with figure_at(path, 9.6, 0.9 + 2.0 * len(profiles)) as figure:
        axes = figure.subplots(len(profiles), 1, squeeze=False)[:, 0]
        for ax, (label, values) in zip(axes, maps.items(), strict=True):
            edges = np.append(profiles[label].positions, profiles[label].positions[-1] + 1) - 0.5
            image = _cells(ax, values, edges, low)
            ax.axvline(-0.5, color="white", linewidth=1.5, linestyle="--")
            ax.set(title=_when(profiles[label], num_decoded), ylabel=LAYER)
        axes[-1].set_xlabel(POSITION)
        _cosine_bar(figure, image, axes)
    return figure


def step_heatmaps(profiles: Profiles, path: str | Path | None = None) -> Figure:
    """Draws the mean cosine of each layer in answers by denoising step, a row per model.

    Causal models, which are looked at once, have none.
    """
    maps = {}
    for label, profile in profiles.items():
        if profile.num_bins > 1:
            answer = profile.layer_cosine.mean[..., profile.positions >= 0]
            maps[label] = np.nanmean(answer, axis=2).T
    _require_any(maps)
    low = lowest(list(maps.values()))
    with figure_at(path, 9.6, 0.9 + 2.0 * len(maps)) as figure:
        axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
        for ax, (label, values) in zip(axes, maps.items(), strict=True):
            edges = np.linspace(0, profiles[label].facts.steps, values.shape[1] + 1)
            image = _cells(ax, values, edges, low)
            ax.set(title=label, ylabel=LAYER)
        axes[-1].set_xlabel("denoising step (0: all masked)")
        _cosine_bar(figure, image, axes)
    return figure


def lowest(maps: Sequence[np.ndarray]) -> float:
    """Where a scale that all maps share begins: one value in 50 lies below.

    Layer 0 does not count: it makes an embedding something else, and would take half of the scale.

    Args:
      maps: [L, m] of each model, which may differ in both.
    """
    rest = [values[1:] if len(values) > 1 else values for values in maps]
    values = np.concatenate([values[np.isfinite(values)] for values in rest])
    return float(min(np.quantile(values, 0.02), 0.98))


def _cells(
    ax: Axes, values: Float[np.ndarray, "L m"], edges: Float[np.ndarray, "m+1"], low: float
) -> QuadMesh:
    """A row per layer, layer 0 below."""
    layers = np.arange(len(values) + 1) - 0.5
    image = ax.pcolormesh(edges, layers, values, cmap=SEQUENTIAL, vmin=low, vmax=1, rasterized=True)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    ax.yaxis.get_major_locator().set_params(integer=True, nbins=6)
    return image


def _cosine_bar(figure: Any, image: QuadMesh, axes: Sequence[Axes]) -> None:
    bar = figure.colorbar(image, ax=list(axes), pad=0.01, extend="min", aspect=10 * len(axes) + 10)
    bar.set_label(COSINE)
    bar.outline.set_visible(False)


def _when(profile: Profile, num_decoded: int | None) -> str:
    """The title of a model's map: which steps are shown."""
    label, steps, groups = profile.facts.label, profile.facts.steps, profile.num_bins
    if profile.facts.family == "causal":
        return f"{label}: one forward pass"
    group = group_at(profile, num_decoded)
    first, last = (-(-steps * (group + i) // groups) - i for i in (0, 1))
    some = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"{label}: {some} of {steps}, from 0"


# --------------------------------------------------------------------------------------- recency


def change_curves(profiles: Profiles, path: str | Path | None = None) -> Figure:
    """Draws how far states move from one step to the next, by distance to the tokens just decoded.

    A panel per diffusion model, a line per layer. Distance 0 is the decoded position itself, which
    changes from [MASK] to a token.
    """
    chosen = {label: profile for label, profile in profiles.items() if profile.change.mean.size}
    _require_any(chosen)
    with figure_at(path, max(NARROWEST, 1.6 + 4.0 * len(chosen)), 3.9) as figure:
        axes = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
        for ax, (label, profile) in zip(axes, chosen.items(), strict=True):
            layers = profile.facts.change_layers
            for layer, values, color in zip(
                layers, profile.change.mean, shades(len(layers)), strict=True
            ):
                seen = np.isfinite(values)
                ax.plot(
                    profile.distances[seen], values[seen], color=color, linewidth=1.6,
                    label=f"{layer}",
                )  # fmt: skip
            ax.set(title=label, xlabel="distance to the nearest new token, positions")
            log_y(ax, linear_below=1e-3)
            ax.legend(
                fontsize=8, title="after layer", title_fontsize=8, loc="upper right", ncols=2,
                columnspacing=1,
            )  # fmt: skip
        axes[0].set_ylabel("1 - cosine to the step before")
    return figure


# ---------------------------------------------------------------------------------------- shared


def _require_any(profiles: Mapping[str, Any]) -> None:
    require(len(profiles) > 0, "no model has what the figure shows; give at least one profile")


def _band(
    ax: Axes, mean: Float[np.ndarray, "L"], half: Float[np.ndarray, "L"], style: dict[str, Any]
) -> None:
    layers = np.arange(len(mean))
    ax.plot(layers, mean, **style)
    ax.fill_between(layers, mean - half, mean + half, color=style["color"], alpha=0.2, linewidth=0)


def _half_interval(by_sequence: Float[np.ndarray, "N L"]) -> Float[np.ndarray, "L"]:
    """Half of Student's 95 % interval of each column's mean; NaN for one sequence."""
    import scipy.stats

    count = len(by_sequence)
    return scipy.stats.t.ppf(0.975, count - 1) * scipy.stats.sem(by_sequence, nan_policy="omit")


def _whole_numbers(ax: Axes) -> None:
    ax.xaxis.get_major_locator().set_params(integer=True)
