import json
import sys

import numpy as np
import pytest

import dials_jax as dj
from dials_jax.errors import InputError
from dials_jax.reporting.publish import publish
from dials_jax.reporting.results import SweepResults
from dials_jax.studies.report import study_report
from tests.reporting.sweep_results import make_results, make_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "results.json").write_text(json.dumps(make_results(("sums", "text"))))
    return folder


@pytest.fixture
def results(workdir):
    return dj.load_results(workdir)


def test_results_of_a_sweep_are_its_json_with_a_short_repr(results, workdir):
    assert results == json.loads((workdir / "results.json").read_text())
    head, first, *_, more = repr(results).splitlines()
    assert head == f"SweepResults({str(workdir)!r}, 2 tasks, 12 policies)"
    assert first.split() == ["sums:", "full", "0.7833", "100.0%", "of", "layers"]
    assert more == "... and 12 more" and len(repr(results)) < 1200
    assert (
        repr(SweepResults({"runs": []}, "runs/x")) == "SweepResults('runs/x', 0 tasks, 0 policies)"
    )


def test_rows_are_found_by_policy_and_task(results):
    row = results.row("static k=1", "sums")
    assert (row.task, row.policy) == ("sums", "static k=1")
    assert row in results.rows and row.difference is not None
    assert results.select(task="sums").row("static k=1") == row
    with pytest.raises(InputError, match=r"name the task: task= one of \['sums', 'text'\]"):
        results.row("full")
    with pytest.raises(InputError, match="there is no policy 'static k=11'; did you mean"):
        results.row("static k=11", "sums")


def test_one_seed_of_several(results):
    again = {**make_run("sums", {"kind": "full", "label": "full"}), "seed": 1}
    again["items"] = dict.fromkeys(again["items"], 1)
    both = SweepResults(
        {**results, "runs": [*({**r, "seed": 0} for r in results["runs"]), again]}, ""
    )
    assert both.row("full", "sums").num_seeds == 2
    one = both.select(seed=1)
    assert [row.value for row in one.rows] == [1.0]
    assert both.select(seed=0).rows == results.rows
    with pytest.raises(InputError, match="there is no seed 3; valid names: 0, 1"):
        both.select(seed=3)


def test_a_data_frame_has_a_line_per_row(results, monkeypatch):
    frame = results.to_dataframe()
    assert len(frame) == 24 and list(frame["policy"][:2]) == ["full", "static k=1"]
    assert frame["value"][1] == results.row("static k=1", "sums").value
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"^pandas missing; pip install 'dials_jax\[eval\]'$"):
        results.to_dataframe()


def test_figures_are_drawn_by_name_and_written_nowhere(results, workdir):
    assert results.plots[0] == "tradeoff" and "mask_ratio_sums" in results.plots
    figure = results.plot()
    assert [ax.get_title() for ax in figure.axes] == ["sums", "text"]
    heatmap = results.plot("layers_sums")
    assert len(heatmap.axes[0].get_yticklabels()) == 12
    assert heatmap._repr_png_().startswith(b"\x89PNG")
    assert [path.name for path in workdir.iterdir()] == ["results.json"]
    with pytest.raises(InputError, match="no figure 'tradeof'; did you mean 'tradeoff'"):
        results.plot("tradeof")


def test_metrics_of_a_training(tmp_path):
    lines = [{"step": s, "loss": 4.0 / s, "skip_rate": s / 100} for s in (1, 2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = dj.load_results(tmp_path)
    shown = f"TrainingResults({str(tmp_path)!r}, step 4, loss 4.000 to 1.000, skip rate 4.0%)"
    assert repr(found) == shown
    assert found.rows == lines and found["loss"] == 1.0
    assert list(found.to_dataframe()["loss"]) == [4.0, 2.0, 1.0]
    assert [ax.get_ylabel() for ax in found.plot().axes] == ["loss", "skip rate"]


def test_results_of_a_study(tmp_path):
    from matplotlib.image import imsave

    (tmp_path / "results.json").write_text(json.dumps({"kind": "SearchStudy", "schedules": []}))
    (tmp_path / "results.csv").write_text("schedule,perplexity,saved_time\nL4,12.5,\nH4,11,0.25\n")
    (tmp_path / "plots").mkdir()
    pixels = np.random.default_rng(0).uniform(size=(60, 80, 3)).astype(np.float32)
    imsave(tmp_path / "plots" / "influence.png", pixels)
    found = dj.load_results(tmp_path / "results.json")
    assert repr(found) == f"StudyResults(SearchStudy, {str(tmp_path)!r}, 2 rows)"
    assert found.rows[0] == {"schedule": "L4", "perplexity": 12.5, "saved_time": None}
    assert list(found.to_dataframe()["perplexity"]) == [12.5, 11.0]
    assert found.plots == ["influence"]
    [image] = found.plot().images
    np.testing.assert_allclose(image.get_array()[..., :3], pixels, atol=1 / 128)


def test_a_damaged_table_of_a_study_is_refused(tmp_path):
    results = {"kind": "SearchStudy", "config": {}, "environment": {}, "examples": {}}
    report = study_report("Title", results, [{"a": 1.5}], {}, [], [], "")
    publish(report, tmp_path)
    assert dj.load_results(tmp_path).rows == [{"a": 1.5}]
    table = tmp_path / "results.csv"
    table.write_text(table.read_text().replace("1.5", "1.7"))
    with pytest.raises(InputError, match=r"results.csv is damaged or was edited; run the study"):
        _ = dj.load_results(tmp_path).rows


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds neither results"):
        dj.load_results(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="is not of a sweep or a study"):
        dj.load_results(tmp_path)
    (tmp_path / "results.json").write_text('{"runs": [{"task": "sums"}]}')
    with pytest.raises(InputError, match="is damaged"):
        dj.load_results(tmp_path)
