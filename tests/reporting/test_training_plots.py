import json
import math

import numpy as np
import pytest

from dials_jax.errors import InputError
from dials_jax.reporting import training_plots as plots


def write_metrics(path, records, tail=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_training_curves_read_resumed_and_interrupted_logs(drawn, tmp_path):
    first = [{"step": step, "loss": 9.0} for step in (0, 10, 20)]
    again = [{"step": step, "loss": 2.0} for step in (10, 20, 30)]
    other = [{"step": 5, "eval_seconds": 1.0}, {"step": 40, "loss": math.nan}]
    file = write_metrics(tmp_path / "run" / "metrics.jsonl", first + again + other, '{"step": 5')
    plots.training_curves(file, tmp_path / "t.png")
    assert (tmp_path / "t.png").is_file()
    (ax,) = drawn[0].axes
    _smooth, raw = ax.lines
    assert raw.get_xydata().tolist() == [[0, 9], [10, 2], [20, 2], [30, 2]]
    assert ax.get_ylabel() == "loss"


def test_training_curves_show_skip_rates_and_name_runs(drawn, tmp_path):
    records = [{"step": i, "loss": 1.0, "skip_rate": i / 100} for i in range(100)]
    files = [write_metrics(tmp_path / name / "metrics.jsonl", records) for name in "ab"]
    plots.training_curves(files, tmp_path / "t.png")
    loss, skip_rate = drawn[0].axes
    assert [text.get_text() for text in loss.get_legend().texts] == ["a", "b"]
    assert skip_rate.get_ylabel() == "skip rate" and len(skip_rate.lines) == 4
    assert skip_rate.get_ylim()[0] == 0  # a frame that shows nothing below


def test_training_curves_show_what_runs_on_held_out_data(drawn, tmp_path):
    """DIALS, Figure 7, also at other thresholds, and dashed under the votes of training."""
    records = [{"step": i, "loss": 1.0, "skip_rate": 0.3} for i in range(20)]
    for i in (9, 19):
        records[i] |= {
            "validation/execution": 1 - i / 100,
            "validation/execution@0.05": 0.8,
            "validation/execution_sampled": 0.6,
        }
    file = write_metrics(tmp_path / "run" / "metrics.jsonl", records)
    plots.training_curves(file, tmp_path / "t.png")
    *_, ax = drawn[0].axes
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {"at inference", "tau=0.05", "votes of training"}
    assert lines["at inference"].get_xydata().tolist() == [[9, 0.91], [19, 0.81]]
    assert lines["votes of training"].get_linestyle() == "--"


def test_smoothing_keeps_lines_and_ends_and_shrinks_noise():
    assert np.allclose(plots._smooth(np.full(400, 3.0)), 3.0)
    assert np.allclose(plots._smooth(np.arange(400.0))[50:-50], np.arange(400)[50:-50])
    noise = np.random.default_rng(0).normal(size=4000)
    assert plots._smooth(noise).std() < 0.2
    assert plots._smooth(np.array([4.0])).tolist() == [4.0]


def test_bad_logs_are_errors_of_one_line(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing"):
        plots.training_curves(tmp_path / "metrics.jsonl", tmp_path / "t.png")
    file = write_metrics(tmp_path / "metrics.jsonl", [{"step": 1}])
    with pytest.raises(InputError, match="logs no loss"):
        plots.training_curves(file, tmp_path / "t.png")


def test_odd_lines_and_values_are_left_out(drawn, tmp_path, caplog):
    file = write_metrics(tmp_path / "run" / "metrics.jsonl", [{"step": 0, "loss": 1}])
    odd = ["nonsense", "3", '{"step": "1", "loss": 2}', '{"loss": 2}']
    huge, text, none = '{"step": 4, "loss": 1' + "0" * 400 + "}", '{"step": 5, "loss": "6"}', "null"
    rest = [huge, text, f'{{"step": 6, "loss": {none}}}', '{"step": 7, "loss": 3}']
    file.write_text(file.read_text() + "\n".join(odd + rest) + "\n")
    plots.training_curves(file, tmp_path / "t.png")
    assert drawn[0].axes[0].lines[1].get_xydata().tolist() == [[0, 1], [7, 3]]
    assert "metrics.jsonl, line 2 and 3 more: no record of a step; left out" in caplog.text


def test_drawing_takes_no_more_than_its_points_however_long_the_run(drawn, tmp_path, monkeypatch):
    """Multiplications of the smoothing, and points drawn; both grew with the run."""
    work, convolve = [], np.convolve

    def counted(a, b, mode):
        work.append(len(a) * len(b))
        return convolve(a, b, mode)

    monkeypatch.setattr(np, "convolve", counted)
    totals = []
    for length in (plots.MAX_POINTS, 10 * plots.MAX_POINTS + 1):
        work.clear()
        records = [{"step": i, "loss": 1 + i % 7} for i in range(length)]
        records[length // 2]["loss"] = 50.0
        file = write_metrics(tmp_path / "run" / "metrics.jsonl", records)
        plots.training_curves(file, tmp_path / "t.png")
        smooth, raw = drawn[-1].axes[0].lines
        totals.append(sum(work))
        assert len(smooth.get_xdata()) <= plots.MAX_POINTS
        assert len(raw.get_xdata()) <= 2 * plots.MAX_POINTS
        # What stands out is still seen, where it was.
        at = raw.get_xdata()[np.argmax(raw.get_ydata())]
        assert raw.get_ydata().max() == 50 and abs(at - length // 2) <= 11
        assert raw.get_ydata().min() == 1
    assert totals[1] <= totals[0]


def test_thinned_points_are_means_and_ranges_of_neighbours(monkeypatch):
    monkeypatch.setattr(plots, "MAX_POINTS", 3)
    steps, means, (x, y) = plots._thin_out(np.arange(7.0), np.array([1.0, 2, 6, 0, 0, 3, 9]))
    assert steps.tolist() == [1, 4, 6] and means.tolist() == [3, 1, 9]
    assert x.tolist() == [1, 1, 4, 4, 6, 6] and y.tolist() == [1, 6, 0, 3, 9, 9]
