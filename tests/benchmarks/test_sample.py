"""The benchmark of sampling runs, and counts what its schedules save."""

import json

import pytest

from benchmarks import command, sample


@pytest.fixture(autouse=True)
def quietly(monkeypatch):
    """No compilation cache is set up in the process of the tests."""
    monkeypatch.setattr(command, "keep_programs", lambda: None)


def test_it_prints_and_writes_a_row_per_case(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = "--model tiny_mdlm --blocks 3 1 --batch 2 --length 32 --steps 4 --repeats 1"
    assert sample.main(f"{arguments} --light-fractions 0 0.5 --out {path}".split()) == 0
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["3 blocks", "1 blocks", "H4", "L1,H2,L1"]
    assert rows["H4"]["saved_blocks"] == rows["H4"]["saved_flops"] == 0
    half = rows["L1,H2,L1"]
    assert half["nfe"] == 4 and half["saved_blocks"] == pytest.approx(0.5 * 2 / 3)
    assert 0 < half["saved_flops"] < half["saved_blocks"] < rows["1 blocks"]["saved_flops"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_a_sweep_of_one_depth_is_refused(capsys):
    assert sample.main("--model tiny_mdlm --blocks 4 --light-fractions 0.5".split()) == 2
    assert "needs two depths" in capsys.readouterr().err
