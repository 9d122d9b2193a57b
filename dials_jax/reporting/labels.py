"""Places the labels of points beside them, clear of each other, of curves and of markers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes

DISTANCES = (6, 11, 17, 24, 32, 42)  # in points, from a point to the edge of its label
DIRECTIONS = np.linspace(0, 2 * np.pi, 16, endpoint=False) + np.pi / 2  # above comes first
LEADER_FROM = 14  # labels that are further away get a line to their point
FONT_SIZE = 8
GAP = 3  # pixels between labels
# Points of a marker of radius 1: at the edge, and half-way to it.
MARKER = np.concatenate(
    [r * np.stack([np.cos(DIRECTIONS), np.sin(DIRECTIONS)], 1) for r in (1, 0.5)]
)


class Label(NamedTuple):
    text: str
    x: float  # of its point, in the units of the axes
    y: float
    color: str


class _Place(NamedTuple):
    """A place for a label: its box in pixels, and how far it is from the point, in points."""

    box: Float[np.ndarray, "4"]  # left, bottom, right, top
    distance: float


def place_labels(ax: Axes, labels: Sequence[Label]) -> None:
    """Writes every label where it covers the least of what is drawn.

    Call it when all else is drawn: what the axes hold is in the way, and their size is final.
    """
    figure = ax.get_figure()
    figure.draw_without_rendering()  # fixes the layout, so that pixels can be counted
    points = ax.transData.transform([(label.x, label.y) for label in labels] or np.zeros((0, 2)))
    choices = [
        _places(point, size, figure.dpi / 72)
        for point, size in zip(points, _sizes(ax, labels), strict=True)
    ]
    drawn, frame = _drawn_pixels(ax), np.array(ax.bbox.extents)
    # What a place costs by itself does not change; what it costs beside the others does.
    alone = [[_cost_alone(place, drawn, frame) for place in own] for own in choices]
    chosen: dict[int, _Place] = {}
    for _, number in itertools.product(range(3), range(len(labels))):
        others = [place.box for other, place in chosen.items() if other != number]
        costs = [
            cost + sum(100 + _overlap(place.box, box) for box in others if _overlap(place.box, box))
            for place, cost in zip(choices[number], alone[number], strict=True)
        ]
        chosen[number] = choices[number][int(np.argmin(costs))]
    for number, label in enumerate(labels):
        _write(ax, label, points[number], chosen[number])


def spread_out(values: Float[np.ndarray, "n"], gap: float) -> Float[np.ndarray, "n"]:
    """Moves numbers apart so that neighbours differ by at least `gap`, keeping their order."""
    order = np.argsort(values, kind="stable")
    groups: list[list[float]] = []  # of numbers that touch: their targets
    for value in values[order]:
        groups.append([value])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = [_bottom(group, gap) + i * gap for group in groups for i in range(len(group))]
    found = np.empty(len(order))
    found[order] = moved
    return found


def _bottom(group: Sequence[float], gap: float) -> float:
    return float(np.mean(group)) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)


def _sizes(ax: Axes, labels: Sequence[Label]) -> Float[np.ndarray, "n 2"]:
    """Width and height of each text with some space around it, in pixels."""
    sizes = []
    for label in labels:
        text = ax.text(0, 0, label.text, fontsize=FONT_SIZE)
        box = text.get_window_extent()
        sizes.append((box.width + GAP, box.height + GAP))
        text.remove()
    return np.array(sizes).reshape(-1, 2)


def _places(
    point: Float[np.ndarray, "2"], size: Float[np.ndarray, "2"], pixels: float
) -> list[_Place]:
    """The places around a point. Args: pixels: per point of length."""
    found = []
    for distance, angle in itertools.product(DISTANCES, DIRECTIONS):
        direction = np.array([np.cos(angle), np.sin(angle)])
        centre = point + direction * (distance * pixels + size / 2)
        found.append(_Place(np.concatenate([centre - size / 2, centre + size / 2]), distance))
    return found


def _drawn_pixels(ax: Axes) -> Float[np.ndarray, "n 2"]:
    """Pixels of all lines, error bars and markers."""
    pixels, paths = [np.zeros((0, 2))], []
    for line in ax.lines:
        paths.append(line.get_transform().transform(line.get_xydata()))
        if line.get_marker() != "None":
            radius = line.get_markersize() / 2 * ax.get_figure().dpi / 72
            pixels += [paths[-1] + shift for shift in radius * MARKER]
    for bars in ax.collections:
        if hasattr(bars, "get_segments"):
            paths += [bars.get_transform().transform(part) for part in bars.get_segments()]
    for path in filter(len, paths):
        for start, end in itertools.pairwise(path):
            count = int(np.nan_to_num(np.hypot(*(end - start)) / 3)) + 1
            pixels.append(np.linspace(start, end, count + 1))
    return np.concatenate(pixels)


def _cost_alone(
    place: _Place, drawn: Float[np.ndarray, "n 2"], frame: Float[np.ndarray, "4"]
) -> float:
    """Covered pixels, and penalties for being outside the axes and for being far away."""
    low, high = place.box[:2] - 1, place.box[2:] + 1
    covered = int(((drawn >= low) & (drawn <= high)).all(axis=1).sum())
    outside = np.maximum(frame[:2] - low, 0).sum() + np.maximum(high - frame[2:], 0).sum()
    return covered + float(outside) + place.distance / 4


def _overlap(one: Float[np.ndarray, "4"], other: Float[np.ndarray, "4"]) -> float:
    """The area that two boxes share."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    return float(np.prod(np.maximum(sides, 0)))


def _write(ax: Axes, label: Label, point: Float[np.ndarray, "2"], place: _Place) -> None:
    from matplotlib.patheffects import withStroke

    centre = (place.box[:2] + place.box[2:]) / 2
    line = {"arrowstyle": "-", "color": label.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    text = ax.annotate(
        label.text,
        (label.x, label.y),
        tuple((centre - point) * 72 / ax.get_figure().dpi),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=FONT_SIZE,
        color=label.color,
        path_effects=[withStroke(linewidth=2, foreground="white")],
        arrowprops=line if place.distance > LEADER_FROM else None,
        zorder=6,
    )
    text.set_in_layout(False)
