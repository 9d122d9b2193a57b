import json
import math

import numpy as np
import pytest

from dials_jax.analysis import training_plots as plots
from dials_jax.config import InputError


def write_metrics(path, records, tail=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_training_curves_read_resumed_and_interrupted_logs(drawn, tmp_path):
    first = [{"step": step, "loss": 9.0} for step in (0, 10, 20)]
    again = [{"step": step, "loss": 2.0} for step in (10, 20, 30)]
    other = [{"step": 5, "eval_seconds": 1.0}, {"step": 40, "loss": math.nan}]
    file = write_metrics(tmp_path / "run" / "metrics.jsonl", first + again + other, '{"step": 5')
    assert plots.training_curves(file, tmp_path / "t.png").is_file()
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
    file.write_text('{"step": 0, "loss": 1}\nnonsense\n')
    with pytest.raises(InputError, match="line 2 is not valid JSON"):
        plots.training_curves(file, tmp_path / "t.png")
