"""Figures of the page of `benchmarks.families`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.families_claims import Results, increases, kept_likelihood, retained
from dials_jax.reporting.figure import COLORS, GREY, blue_shades, figure_at
from dials_jax.studies.claims import AT_END

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes

FAMILY_COLORS = {
    "native": COLORS["routed"], "causal": COLORS["static"], "continued": COLORS["random"],
}  # fmt: skip
NAMES = {
    "layer": ("cosine of input and output", "layer"),
    "token": ("cosine of neighbouring tokens", "hidden state"),
    "end": (f"the same{AT_END}", "hidden state"),
}


def draw_all(results: Results, folder: Path) -> dict[str, Path]:
    """Writes every figure as PNG and PDF; returns the PNG files by name."""
    figures = {
        "profiles": draw_profiles, "training": draw_training, "skipping": draw_skipping,
        "change": draw_change, "retention": draw_retention,
    }  # fmt: skip
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, draw in figures.items():
        draw(results, paths[name])
    return paths


def draw_profiles(results: Results, path: Path) -> None:
    """Cosines by depth: means over sequences, each seed a line (Goel, Figure 3)."""
    rows = len(results.sizes)
    with figure_at(path, 13.0, 3.2 * rows) as figure:
        axes = figure.subplots(rows, len(NAMES), squeeze=False)
        for size, own_axes in zip(results.sizes, axes, strict=True):
            for name, ax in zip(NAMES, own_axes, strict=True):
                for family, color in FAMILY_COLORS.items():
                    for i, own in enumerate(results.by_sequence(name, size, family)):
                        ax.plot(np.nanmean(own, axis=0), color=color, label=family if not i else "")
                _label(ax, name, size)
        axes[0, 0].legend()


def draw_training(results: Results, path: Path) -> None:
    """Layer cosines of the models along the way, first seed; darker is later."""
    rows, families = len(results.sizes), list(FAMILY_COLORS)
    with figure_at(path, 11.0, 3.2 * rows) as figure:
        axes = figure.subplots(rows, len(families), squeeze=False, sharey="row")
        for size, own_axes in zip(results.sizes, axes, strict=True):
            for family, ax in zip(families, own_axes, strict=True):
                steps = results.steps(size, family)
                for step, color in zip(steps, blue_shades(len(steps)), strict=True):
                    first = results.by_sequence("layer", size, family, step)[0]
                    ax.plot(np.nanmean(first, axis=0), color=color, label=f"step {step}")
                _label(ax, "layer", f"{family}, {size}")
                ax.legend(fontsize=8)


def draw_skipping(results: Results, path: Path) -> None:
    """What leaving out a layer costs, against how much it changes its input (Algorithm 1)."""
    with figure_at(path, 6.0 * len(results.sizes), 4.4) as figure:
        axes = figure.subplots(1, len(results.sizes), squeeze=False)[0]
        for size, ax in zip(results.sizes, axes, strict=True):
            for family, color in FAMILY_COLORS.items():
                for profile in results.profiles(size, family):
                    (losses,) = results.of("losses", size=size, family=family, seed=profile["seed"])
                    change = 1 - np.nanmean(np.array(profile["prompt_layer"], float), axis=0)
                    cost = np.maximum(increases(losses).mean(axis=0), 1e-6)
                    first = profile["seed"] == results.seeds[0]
                    ax.scatter(change, cost, color=color, s=18, label=family if first else "")
                    _number(ax, change, cost)
            ax.set(
                title=size, xlabel="1 - cosine of a layer's input and output, prompts",
                ylabel="nats per token without it", xscale="log", yscale="log",
            )  # fmt: skip
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
        axes[0].legend()


def draw_retention(results: Results, path: Path) -> None:
    """Likelihood per token that is left, against the share of layers left out (Goel, Figure 1).

    Thick lines are means, thin ones seeds.
    """
    with figure_at(path, 5.0 * len(results.sizes), 3.6) as figure:
        axes = figure.subplots(1, len(results.sizes), squeeze=False, sharey=True)[0]
        for size, ax in zip(results.sizes, axes, strict=True):
            layers = len(results.of("losses", size=size)[0]["without"])
            for family, color in FAMILY_COLORS.items():
                for adjacent, runs in retained(results, size, family).items():
                    out = np.array([0, *runs]) / layers
                    style = {"color": color, "linestyle": "--" if adjacent else "-"}
                    label = f"{family}, neighbours allowed" if adjacent else family
                    mean = [1, *(kept_likelihood(x.cost)[0] for x in runs.values())]
                    ax.plot(out, mean, **style, marker="o", markersize=3, label=label)
                    # The intervals, over few seeds, are in the table: they may hide the lines.
                    for seed in range(len(results.seeds)):
                        own = np.exp([0, *(-x.cost.by_seed[seed] for x in runs.values())])
                        ax.plot(out, own, **style, linewidth=0.7, alpha=0.5)
            ax.set(title=size, xlabel="layers left out", ylabel="likelihood per token that is left")
            ax.xaxis.set_major_formatter("{x:.0%}")
            ax.set_ylim(bottom=0)
        axes[0].legend(fontsize=8)


def draw_change(results: Results, path: Path) -> None:
    """How much states change from step to step, by distance to the nearest token just revealed."""
    families = ("native", "continued")
    with figure_at(path, 9.0, 3.2 * len(results.sizes)) as figure:
        axes = figure.subplots(len(results.sizes), 2, squeeze=False, sharey="row")
        for size, own_axes in zip(results.sizes, axes, strict=True):
            for family, ax in zip(families, own_axes, strict=True):
                rows = results.profiles(size, family)
                layers = rows[0]["change_layers"]
                for i, color in enumerate(blue_shades(len(layers))):
                    change = [np.array(row["change"][i], float) for row in rows]
                    ax.plot(
                        rows[0]["distances"], np.mean(change, axis=0), color=color,
                        label=f"layer {layers[i]}",
                    )  # fmt: skip
                ax.set(
                    title=f"{family}, {size}", xlabel="distance to the nearest token just revealed",
                    ylabel="1 - cosine to the step before",
                )  # fmt: skip
        axes[0, 0].legend(fontsize=8)


def _label(ax: Axes, name: str, title: str) -> None:
    y, x = NAMES[name]
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.xaxis.get_major_locator().set_params(integer=True)


def _number(ax: Axes, x: Sequence[float] | np.ndarray, y: Any) -> None:
    for layer, point in enumerate(zip(x, y, strict=True)):
        ax.annotate(str(layer), point, fontsize=6, color=GREY)
