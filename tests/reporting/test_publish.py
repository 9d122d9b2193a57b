"""What a study shows: its tables, and the page that holds everything."""

import csv
import json

import pytest

from dials_jax.reporting.publish import Shown, Table, publish
from tests.reporting.pages import HOSTILE, read_page

PNG = b"\x89PNG"


@pytest.fixture
def shown(tmp_path):
    def draw(folder):
        assert (folder.parent / "results.json").exists()  # what was measured is safe by now
        figure = tmp_path / "figure.png"
        figure.write_bytes(PNG)
        return {figure: HOSTILE}

    return Shown(
        title=HOSTILE,
        tables={"Numbers": Table(("name", "value"), [(f"row {i}", HOSTILE) for i in range(5)])},
        reading=[("value", HOSTILE)],
        draw=draw,
    )


def test_a_page_holds_everything_and_runs_nothing(shown, tmp_path):
    results = {
        "config": {"models": [["H", HOSTILE]], "steps": 7, "scorer": "", "mesh": {"data": -1}},
        "environment": {"device": HOSTILE, "command": HOSTILE},
        "examples": {"H7": HOSTILE, "L7": HOSTILE},
    }
    publish(results, [{"a": 1, "b": None}], shown, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == results
    with (tmp_path / "new" / "results.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}]
    page = read_page(tmp_path / "new")
    assert "script" not in page.tags and page.images == [PNG]
    for text in ("H " + HOSTILE, "data -1", "row 4", "L7", "Reproduce"):
        assert text in page.visible
    assert "scorer" not in page.visible  # nothing was set


def test_a_long_table_shows_its_ends(shown):
    table = shown.tables["Numbers"]
    whole, ends = table.text().splitlines(), table.text(ends=2).splitlines()
    assert len(whole) == 6 and len({len(line) for line in whole}) == 1
    assert ends == [*whole[:3], *whole[4:]]
    assert table.text(ends=3) == table.text()
