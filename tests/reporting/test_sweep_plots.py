import itertools
import math
import sys

import numpy as np
from matplotlib.text import Text

from dials_jax.reporting import figure, sweep_plots
from dials_jax.reporting.figure import kind_color
from dials_jax.reporting.labels import spread_out
from tests.conftest import PDF_FONTS


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
    path = tmp_path / "new" / "t.png"
    sweep_plots.tradeoff_curve([sweep_plots.Panel("$um_^$", "accuracy", POINTS)], path)
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


def boxes_of(ax):
    """The corners of each label in pixels, without the line to its point."""
    ax.get_figure().set_dpi(100)  # a PDF file has changed it
    ax.get_figure().draw_without_rendering()
    return {text.get_text(): Text.get_window_extent(text) for text in ax.texts}


def test_labels_collide_neither_with_each_other_nor_with_points(drawn, tmp_path):
    """Seven policies within a hundredth of each other, and three that coincide."""
    close = [(f"λ={i}", 0.9 + 0.002 * i, 0.7 + 0.001 * i) for i in range(7)]
    equal = [(f"k={i}", 0.8, 0.6) for i in range(3)]
    points = [
        *(point("routed", *where) for where in close),
        *(point("static", *where) for where in equal),
        point("full", "full", 1.0, 0.71),
    ]
    panel = sweep_plots.Panel("a", "y", tuple(points), chance=0.5)
    sweep_plots.tradeoff_curve([panel], tmp_path / "t.png")
    ax = drawn[0].axes[0]
    boxes = boxes_of(ax)
    assert boxes.keys() == {label for label, *_ in close + equal}
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.overlaps(other)
    for where in ax.transData.transform([(p.cost, p.value) for p in points]):
        assert not any(box.contains(*where) for box in boxes.values())
    left, bottom, right, top = ax.bbox.extents
    for box in boxes.values():
        assert left <= box.x0 and box.x1 <= right and bottom <= box.y0 and box.y1 <= top


def test_numbers_are_spread_around_their_mean_in_their_order():
    assert spread_out(np.array([5.0, 0.0, 5.0]), 2.0).tolist() == [4.0, 0.0, 6.0]
    spread = spread_out(np.array([0.0, 1.0, 2.0, 10.0]), 2.0)
    assert spread.tolist() == [-1.0, 1.0, 3.0, 10.0]
    assert spread_out(np.zeros(0), 1.0).size == 0


def test_guessing_is_a_dotted_line(drawn, tmp_path):
    panels = [sweep_plots.Panel("a", "y", POINTS, chance=0.25), sweep_plots.Panel("b", "y", POINTS)]
    sweep_plots.tradeoff_curve(panels, tmp_path / "t.png", "seconds")
    first, second = drawn[0].axes
    (line,) = (line for line in first.lines if line.get_label() == "chance")
    assert list(line.get_ydata()) == [0.25, 0.25]
    assert "chance" not in [line.get_label() for line in second.lines]
    assert "chance" in [text.get_text() for text in drawn[0].legends[0].texts]
    assert first.get_xlabel() == "seconds"
    assert (tmp_path / "t.pdf").read_bytes().startswith(b"%PDF")


def test_letters_of_a_pdf_stay_text(monkeypatch, tmp_path):
    monkeypatch.setitem(figure.STYLE, "pdf.fonttype", PDF_FONTS)
    with figure.figure_at(tmp_path / "t.png", 2.0, 2.0) as one:
        one.text(0.5, 0.5, "λ=1")
    assert b"/CIDFontType2" in (tmp_path / "t.pdf").read_bytes()  # TrueType, and no shapes


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


def test_one_heatmap_shows_every_task_over_all_calls_and_by_mask_ratio(drawn, tmp_path):
    tasks = [
        sweep_plots.TaskLayers(
            name, np.linspace(0, 1, 5), np.stack([np.full(5, np.nan), np.full(5, share)])
        )
        for name, share in (("sums", 0.5), ("text, a long name of λ=0.5 and τ=0.3", 1.0))
    ]
    sweep_plots.execution_by_task(tasks, tmp_path / "h.png")
    whole, *by_ratio, bar = drawn[0].axes
    assert [tick.get_text() for tick in whole.get_yticklabels()] == [x.title for x in tasks]
    for ax in by_ratio:  # a title is no wider than the picture of a few layers, beside the bar
        assert ax.title.get_window_extent().x1 < bar.get_window_extent().x0
    assert whole.yaxis_inverted() and not by_ratio[0].yaxis_inverted()  # 0 is at the bottom
    for ax, task in zip(by_ratio, tasks, strict=True):
        assert ax.get_title() == task.title
        shown = ax.collections[0].get_array().filled(np.nan)
        assert np.array_equal(shown, task.by_mask_ratio, equal_nan=True)


def test_figures_leave_no_global_state(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    sweep_plots.tradeoff_curve([sweep_plots.Panel("a", "y", POINTS)], tmp_path / "t.png")
    assert dict(matplotlib.rcParams) == before
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )
