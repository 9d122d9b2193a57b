"""Records survive being killed, and never mix two studies."""

import pytest

from dials_jax.config import InputError
from dials_jax.evaluation.results import Records, read_records

IDENTITY = {"config": {"seed": 0, "models": [["H", "a"]]}, "weights": {"H": "12ab"}}


def test_records_continue_after_half_a_line(tmp_path):
    records = Records(tmp_path, IDENTITY)
    records.add({"n": 1})
    records.add({"n": 2})
    with records.path.open("a") as file:
        file.write('{"n": 3, "va')
    assert read_records(records.path)[0] == [{"n": 1}, {"n": 2}]
    again = Records(tmp_path, IDENTITY)
    assert again.all == [{"n": 1}, {"n": 2}]
    again.add({"n": 3})
    assert Records(tmp_path, IDENTITY).all == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_what_differs_is_named(tmp_path):
    Records(tmp_path, IDENTITY)
    other = {"config": {**IDENTITY["config"], "seed": 1}, "weights": {"H": "34cd"}}
    with pytest.raises(InputError, match=r"\(config.seed, weights.H differ\); choose another"):
        Records(tmp_path, other)
    with pytest.raises(InputError, match=r"\(config.steps differ\)"):
        Records(tmp_path, {**IDENTITY, "config": {**IDENTITY["config"], "steps": 3}})


def test_broken_files_are_named(tmp_path):
    records = Records(tmp_path, IDENTITY)
    records.add({"n": 1})
    records.path.write_text("oops\n" + records.path.read_text())
    with pytest.raises(InputError, match=r"runs.jsonl, line 1 is not valid JSON.*remove that line"):
        Records(tmp_path, IDENTITY)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(InputError, match=r"study.json is not valid JSON.*remove it"):
        Records(tmp_path, IDENTITY)
