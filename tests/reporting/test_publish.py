"""What a study shows: its tables, and the page that holds everything."""

import csv

import pytest

from dials_jax.files import read_json
from dials_jax.reporting.publish import Figure, Table, publish
from dials_jax.studies.report import study_report
from tests.reporting.pages import HOSTILE, read_page

PNG = b"\x89PNG"


@pytest.fixture
def table():
    return Table(("name", "value"), [(f"row {i}", HOSTILE) for i in range(5)])


def plot(text, path):
    results = path.parents[1] / "results.json"
    assert results.exists() and text == HOSTILE  # what was measured is on disk by now
    path.parent.mkdir()
    path.write_bytes(PNG)
    return path


def test_a_page_holds_everything_and_runs_nothing(table, tmp_path):
    results = {
        "config": {"models": [["H", HOSTILE]], "steps": 7, "scorer": "", "mesh": {"data": -1}},
        "environment": {"device": HOSTILE, "command": HOSTILE},
        "examples": {"H7": HOSTILE, "L7": HOSTILE},
    }
    rows, legend = [{"a": 1, "b": None}], [("value", HOSTILE)]
    figure = Figure("figure", HOSTILE, plot, {"text": HOSTILE})
    report = study_report(HOSTILE, results, rows, {"Numbers": table}, legend, [figure], "")
    publish(report, tmp_path / "new")
    assert read_json(tmp_path / "new" / "results.json") == results
    with (tmp_path / "new" / "results.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}]
    page = read_page(tmp_path / "new")
    assert "script" not in page.tags and page.images == [PNG]
    for text in ("H " + HOSTILE, "data -1", "row 4", "L7", "Reproduce"):
        assert text in page.visible
    assert "scorer" not in page.visible  # nothing was set


def test_a_long_table_shows_its_ends(table):
    whole, ends = table.text().splitlines(), table.text(ends=2).splitlines()
    assert len(whole) == 6 and len({len(line) for line in whole}) == 1
    assert ends == [*whole[:3], *whole[4:]]
    assert table.text(ends=3) == table.text()
