import math
import sys

import numpy as np

from dials_jax.reporting import sweep_plots
from dials_jax.reporting.figure import kind_color


def texts(ax):
    return [text.get_text() for text in ax.texts]


def point(kind, label, share, value):
    return sweep_plots.Point(kind, label, share, value, value - 0.05, value + 0.02)


POINTS = (
    point("routed", "λ=3", 0.8, 0.62),
    point("full", "full", 1.0, 0.7),
    point("static", "k=1", 0.9, 0.65),
    point("routed", "λ=0.3", 0.95, 0.69),
)


def test_tradeoff_joins_a_kind_by_share_and_marks_full(drawn, tmp_path):
    path = sweep_plots.tradeoff_curve(
        [sweep_plots.Panel("$um_^$", "accuracy", POINTS)], tmp_path / "new" / "t.png"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    ax = drawn[0].axes[0]
    lines = {bars.get_label(): bars for bars in ax.containers}
    assert set(lines) == {"routed", "static"}
    x, y = lines["routed"].lines[0].get_data()
    assert (list(x), list(y)) == ([0.8, 0.95], [0.62, 0.69])
    bars = lines["routed"].lines[2][0].get_segments()
    assert np.allclose([bar[:, 1] for bar in bars], [[0.57, 0.64], [0.64, 0.71]])
    assert sorted(texts(ax)) == ["k=1", "λ=0.3", "λ=3"]
    assert lines["routed"].lines[0].get_color() == kind_color("routed")
    star = next(line for line in ax.lines if line.get_marker() == "*")
    assert star.get_xydata().tolist() == [[1.0, 0.7]]


def test_tradeoff_has_one_panel_a_task_and_one_legend(drawn, tmp_path):
    panels = [sweep_plots.Panel("a", "y", POINTS[:1]), sweep_plots.Panel("b", "y", POINTS[1:])]
    sweep_plots.tradeoff_curve([*panels, sweep_plots.Panel("c", "y", POINTS)], tmp_path / "t.png")
    figure = drawn[0]
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["full", "routed", "static"]


def test_labels_stay_clear_of_the_curve(drawn, tmp_path):
    for lower_is_better in (False, True):
        sweep_plots.tradeoff_curve(
            [sweep_plots.Panel("a", "y", POINTS, lower_is_better)], tmp_path / "t.png"
        )
    higher, lower = ({t.get_text(): t.get_position()[1] for t in f.axes[0].texts} for f in drawn)
    above = {point.label: point.kind != "static" for point in POINTS if point.kind != "full"}
    assert above.keys() == higher.keys() and len(set(above.values())) == 2
    assert all((higher[label] > 0) == above[label] for label in higher)
    assert all(lower[label] == -higher[label] for label in higher)
    assert higher["λ=3"] != higher["λ=0.3"]  # neighbours stand at different heights


def test_heatmap_shows_each_share_from_layer_zero(drawn, tmp_path):
    shares = np.array([[1, 0.996, 0.5], [0, 0.004, math.nan]])
    sweep_plots.execution_heatmap(["full", "routed"], shares, tmp_path / "h.png", "task")
    ax = drawn[0].axes[0]
    assert np.array_equal(ax.collections[0].get_array().filled(np.nan), shares, equal_nan=True)
    # Only layers that always or never run are written as 1 or 0.
    assert texts(ax) == ["1", ".99", ".50", "0", ".01", ""]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "2"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["full", "routed"]


def test_a_large_heatmap_has_no_numbers(drawn, tmp_path):
    sweep_plots.execution_heatmap(["a", "b"], np.ones((2, 80)), tmp_path / "h.png")
    ax = drawn[0].axes[0]
    assert ax.collections[0].get_clim() == (0, 1)  # whatever the shares
    assert texts(ax) == [] and len(ax.get_xticklabels()) <= 24


def test_lines_join_the_bins_that_hold_rows(drawn, tmp_path):
    routed = sweep_plots.Line("routed", "λ=1", (math.nan, 0.5, math.nan, 0.75))
    static = sweep_plots.Line("static", "k=1", (0.9, 0.9, 0.9, 0.9))
    random = sweep_plots.Line("random", "k=1", (0.9, 0.9, 0.9, 0.9))
    sweep_plots.executed_by_mask_ratio([routed, static, random], tmp_path / "m.png")
    ax = drawn[0].axes[0]
    line = next(line for line in ax.lines if line.get_label() == "routed λ=1")
    assert np.allclose(line.get_xydata(), [(0.375, 0.5), (0.875, 0.75)])
    assert texts(ax) == ["k=1"]  # coinciding references are labelled once
    assert len(drawn[0].legends[0].texts) == 3


def test_figures_leave_no_global_state(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    sweep_plots.tradeoff_curve([sweep_plots.Panel("a", "y", POINTS)], tmp_path / "t.png")
    assert dict(matplotlib.rcParams) == before
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )
