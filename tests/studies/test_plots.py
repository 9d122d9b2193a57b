import dataclasses

import numpy as np

from dials_jax.reporting.publish import draw_figures
from dials_jax.statistics import RankCorrelation
from dials_jax.studies import plots
from dials_jax.studies.divergence import Curve
from dials_jax.studies.placements import Placements
from dials_jax.studies.search import Influence, Regret

METHODS = ("a", "b", "c", "d", "e", "c + b", "d + b", "e + b")  # as many as a study has at most
REGRETS = [Regret(1, 0, 2), Regret(0, 0, 0)]


def test_schedules_are_sorted_and_keep_their_intervals(drawn, tmp_path):
    values = np.array([3.0, 1.0, 2.0])
    intervals = np.stack([values - 0.5, values + 0.25])
    path = tmp_path / "new" / "s.png"
    plots.schedule_points(["a", "b", "c"], values, intervals, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    ax = drawn[0].axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "c", "b"]  # best on top
    assert ax.lines[0].get_xdata().tolist() == [3, 2, 1]
    segments = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([s[:, 0] for s in segments], [[2.5, 3.25], [1.5, 2.25], [0.5, 1.25]])


def test_changes_stand_beside_their_schedules(drawn, tmp_path):
    values, ends = np.array([3.0, 1.0, 2.0]), np.array([[2.0, 0.0, 1.0], [4.0, 2.0, 3.0]])
    changes = {"one": (values - 3, ends - 3), "two": (values - 4, ends - 4)}
    plots.schedule_points(["a", "b", "c"], values, ends, tmp_path / "s.png", changes=changes)
    left, right = drawn[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "c", "b"]
    names = [text.get_text() for text in right.get_legend().get_texts()]
    assert names == ["one", "two"] and right.get_title() == "against a"
    one, two = (line for line in right.lines if line.get_label() in names)
    assert one.get_xdata().tolist() == [0, -1, -2] and two.get_xdata().tolist() == [-1, -2, -3]
    assert (np.round(one.get_ydata()) == np.round(two.get_ydata())).all()
    assert (one.get_ydata() != two.get_ydata()).all()  # neither hides the other


def test_fractions_are_in_order(drawn, tmp_path):
    fractions, values = np.array([1.0, 0.0, 0.5]), np.array([9.0, 5.0, 6.0])
    savings = {"time": np.array([0.6, 0.0, 0.2])}
    plots.fraction_curves(
        fractions, values, np.stack([values, values]), savings, tmp_path / "f.png"
    )
    left, right = drawn[0].axes
    assert left.lines[0].get_xydata().tolist() == [[0, 5], [50, 6], [100, 9]]
    np.testing.assert_allclose(right.lines[0].get_ydata(), [0, 20, 60])


def test_light_segments_stand_out(drawn, tmp_path):
    from matplotlib.colors import to_hex

    light = Placements(3, 1).table
    plots.placement_rows(light[:1], light[2:], ([1.5], [2.5]), tmp_path / "p.png")
    colors = [[to_hex(bar.get_facecolor()) for bar in ax.patches] for ax in drawn[0].axes]
    assert [c.index(plots.LIGHT) for c in colors] == [0, 2]
    assert all(c.count(plots.HEAVY) == 2 for c in colors)
    assert drawn[0].axes[1].get_yticklabels()[0].get_text() == "2.50"


def test_harmful_segments_are_red(drawn, tmp_path):
    from matplotlib.colors import to_hex

    value = np.array([-1.0, 2.0])
    plots.influence_bars(Influence(value, value - 1, value + 1), tmp_path / "i.png")
    bars = drawn[0].axes[0].patches
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [plots.SAFE, plots.HARM]
    assert [bar.get_height() for bar in bars] == [-1, 2]


def test_every_other_figure_is_written(tmp_path):
    x = np.array([0.1, 0.9])
    for drawn in (
        plots.importance_curves({"L": Curve(x, x, x, x)}, {}, "KL", tmp_path / "c.png"),
        plots.segment_frequencies(np.array([2, 0]), np.array([0, 2]), 2, tmp_path / "n.png"),
        plots.regret_curves([1, 5], dict.fromkeys(METHODS, REGRETS), tmp_path / "r.png"),
        plots.predicted_scatter(x, x, "title", tmp_path / "s.png"),
    ):
        assert drawn.axes
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{x}.png" for x in "cnrs"]


def test_names_fit_into_the_figures(drawn, tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from dials_jax.studies import predictions, proposals

    x = np.linspace(0.1, 0.9, 3)
    curve = Curve(x, 400 * x, 400 * x, 400 * x)
    for quantity, label in plots.CURVE_LABELS.items():
        plots.importance_curves({"L": curve}, {}, label, tmp_path / f"{quantity}.png")
    row = predictions.Prediction(
        schedule="L30,H180,L30", value=0.2, low=0.1, high=0.3, quantity="gap",
        difference=0.0, difference_low=0.0, difference_high=0.0,
    )  # fmt: skip
    figures = predictions.prediction_figures([row, dataclasses.replace(row, quantity="kl")])
    light, found = Placements(3, 1).table, RankCorrelation(-0.36, -0.53, -0.02, 0.01)
    harms = dict.fromkeys(proposals.HARM_LABELS, x)
    noise = np.ones((3, 2))
    figures += proposals.proposal_figures(
        {"a": REGRETS}, [1, 5], light, noise, harms, dict.fromkeys(harms, found)
    )
    draw_figures(figures, tmp_path)
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
        ax, inside = figure.axes[0], figure.bbox
        for text in filter(lambda text: text.get_text(), (ax.title, ax.yaxis.label)):
            box = text.get_window_extent()
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1
            assert inside.y0 <= box.y0 and box.y1 <= inside.y1


def test_the_methods_names_cover_no_line(drawn, tmp_path):
    plots.regret_curves([1, 10], dict.fromkeys(METHODS, REGRETS), tmp_path / "r.png")
    (figure,) = drawn
    assert figure.legends[0].get_window_extent().x0 >= figure.axes[0].get_window_extent().x1
