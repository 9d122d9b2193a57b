"""Tokens per pass, the curves along a sampler's setting, and the area under them."""

import copy

import numpy as np
import pytest

from dials_jax.reporting import speed, sweep_report
from dials_jax.reporting.speed import accuracy_under_parallelism, find_curves
from dials_jax.reporting.sweep_report import write_report
from dials_jax.reporting.sweep_rows import compute_sweep_rows
from tests.reporting.pages import read_page
from tests.reporting.sweep_results import make_results

NUM_ITEMS = 10
GENERATION = {
    "sampler": "confidence", "gen_length": 64, "steps": 64, "temperature": 0.0, "threshold": None,
    "entropy_bound": None, "edit_threshold": None, "stop_at_eos": False, "cache": "dual",
    "until": [],
}  # fmt: skip


def make_run(base, task, num_right, passes, **settings):
    """A run of NUM_ITEMS texts of 32 tokens, each in as many passes."""
    run = copy.deepcopy(base)
    names = [f"item-{i}" for i in range(NUM_ITEMS)]
    run |= {
        "task": task,
        "items": {name: float(i < num_right) for i, name in enumerate(names)},
        "generation": GENERATION | settings,
        "passes": {name: [passes, 32] for name in names},
        "num_calls": 3 * passes,
    }
    run["flops"]["seconds"] = passes / 8
    return run


@pytest.fixture
def results():
    results = make_results(tasks=("sums",), kinds=("full",))
    (base,) = results["runs"]
    results["runs"] = [
        make_run(base, "sums quota", 10, 32),
        make_run(base, "sums threshold 0.7", 7, 4, threshold=0.7),
        make_run(base, "sums threshold 0.9", 10, 16, threshold=0.9),
        make_run(base, "sums bound 0.1", 9, 8, entropy_bound=0.1),
        make_run(base, "sums bound 0.1, edited", 9, 8, entropy_bound=0.1, edit_threshold=0.9),
        make_run(base, "sums bound 0.5, edited", 10, 4, entropy_bound=0.5, edit_threshold=0.9),
    ]
    return results


def test_without_any_loss_the_area_is_plain():
    assert accuracy_under_parallelism([(1.0, 80.0), (3.0, 80.0), (6.0, 80.0)], 80.0) == 6 * 80


def test_the_penalised_area_by_hand():
    # y W(y): 80 and 78 exp(-3 * 2 / 80); the third point lies 6 below the first.
    points = [(1.0, 80.0), (3.0, 78.0), (9.0, 74.0)]
    expected = 80 + 2 * (80 + 78 * np.exp(-0.075)) / 2
    assert accuracy_under_parallelism(points, 80.0) == pytest.approx(expected)
    # Against a better method all points count less, but for the rectangle before the first.
    weights = np.exp(-3 * (1 - np.array([80, 78]) / 90))
    expected = 80 + 80 * weights[0] + 78 * weights[1]
    assert accuracy_under_parallelism(points, 90.0) == pytest.approx(expected)
    assert accuracy_under_parallelism([(1.0, 0.0), (2.0, 0.0)], 0.0) == 0


def test_runs_of_one_rule_make_a_curve(results):
    (title,) = found = find_curves(results["runs"])
    assert title == "sums"
    by_label = {curve.label: curve for curve in found[title]}
    assert {name: len(curve.runs) for name, curve in by_label.items()} == {
        "steps": 1, "threshold": 2, "entropy_bound": 1, "entropy_bound, edit_threshold 0.9": 2,
    }  # fmt: skip
    line = by_label["threshold"]
    assert [run["generation"]["threshold"] for run in line.runs] == [0.9, 0.7]
    assert [speed.tokens_per_pass(run) for run in line.runs] == [2.0, 8.0]
    assert line.aup == pytest.approx(2 * 100)  # at 8 tokens a pass 30 % are lost: left out
    edited = by_label["entropy_bound, edit_threshold 0.9"]
    assert edited.aup == pytest.approx(4 * 90 + 4 * (90 * np.exp(-0.3) + 100) / 2)


@pytest.mark.parametrize("change", ["one value", "other items", "older"])
def test_other_runs_make_none(results, change):
    runs = results["runs"][:3]
    if change == "one value":
        runs = runs[:2]
    elif change == "other items":
        runs[2]["items"] = {f"{name}x": x for name, x in runs[2]["items"].items()}
        runs[2]["passes"] = {f"{name}x": x for name, x in runs[2]["passes"].items()}
    else:  # a part was scored by a version that did not count
        runs[2]["passes"].popitem()
    assert find_curves(runs) == {}
    figures = sweep_report.sweep_report(
        results | {"runs": runs}, compute_sweep_rows({"runs": runs})
    ).figures
    assert "tokens_per_pass" not in [figure.name for figure in figures]


def test_rows_and_page_show_passes(results, tmp_path, drawn, draw_only):
    draw_only("tokens_per_pass")
    rows = write_report(results, tmp_path)
    assert [row.nfe for row in rows] == [32, 4, 16, 8, 8, 4]
    assert [row.tokens_per_pass for row in rows] == [1, 8, 2, 4, 4, 8]
    assert [row.passes_per_second for row in rows] == [24.0] * 6
    assert rows[1].aup == rows[2].aup == pytest.approx(200) and rows[0].aup == 100
    visible = read_page(tmp_path).visible
    assert "Accuracy against tokens a pass" in visible and "passes a second" in visible
    (figure,) = (f for f in drawn if f.axes[0].get_xlabel() == "tokens a pass")
    left, right = figure.axes
    assert right.get_xlabel() == "seconds" and right.has_data()
    assert [text.get_text() for text in left.texts] == ["64", "0.9", "0.7", "0.1", "0.1", "0.5"]


def test_seconds_of_other_devices_are_not_compared(results, tmp_path, drawn, draw_only):
    draw_only("tokens_per_pass")
    results["runs"][0]["measured"] = [{"device": "another"}]
    write_report(results, tmp_path)
    (figure,) = (f for f in drawn if f.axes[0].get_xlabel() == "tokens a pass")
    assert len(figure.axes) == 1


def test_a_sweep_without_generations_has_no_columns_of_passes(tmp_path, without_plots):
    rows = write_report(make_results(tasks=("text",)), tmp_path)
    assert {(row.nfe, row.aup) for row in rows} == {(None, None)}
    assert "tokens a pass" not in (tmp_path / "report.html").read_text().split("<tbody>")[0]
