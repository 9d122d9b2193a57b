"""Records survive being killed, and never mix two studies."""

import json
import math
import os
import shlex
import sys

import pytest

from dials_jax.config import InputError
from dials_jax.evaluation.results import (
    RECORDS,
    Records,
    command,
    differing,
    file_name,
    read_records,
)

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


def test_records_are_json_that_strict_readers_take(tmp_path):
    records = Records(tmp_path, IDENTITY)
    records.add({"kl": [0.5, math.nan, math.inf]})
    (line,) = records.path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"kl": [0.5, None, None]}


def test_what_differs_is_named(tmp_path):
    Records(tmp_path, IDENTITY)
    other = {"config": {**IDENTITY["config"], "seed": 1}, "weights": {"H": "34cd"}}
    with pytest.raises(InputError, match=r"\(config.seed, weights.H differ\); choose another"):
        Records(tmp_path, other)
    with pytest.raises(InputError, match=r"\(config.steps differ\)"):
        Records(tmp_path, {**IDENTITY, "config": {**IDENTITY["config"], "steps": 3}})


def test_only_paths_are_compared_as_paths():
    assert not differing({"scorer": "runs/a"}, {"scorer": os.path.abspath("runs/a")})
    assert differing({"extract": "(.*)/"}, {"extract": "(.*)"}) == ["extract"]


def test_broken_files_are_named(tmp_path):
    records = Records(tmp_path, IDENTITY)
    records.add({"n": 1})
    records.path.write_text("oops\n" + records.path.read_text())
    with pytest.raises(InputError, match=r"runs.jsonl, line 1 is not valid JSON.*remove that line"):
        Records(tmp_path, IDENTITY)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(InputError, match=r"study.json is not valid JSON.*; remove .* to start"):
        Records(tmp_path, IDENTITY)


def test_records_of_nobody_knows_what_are_refused(tmp_path):
    Records(tmp_path, IDENTITY).add({"n": 1})
    (tmp_path / "study.json").unlink()
    with pytest.raises(InputError, match=r"holds runs.jsonl but no study.json.*remove the folder"):
        Records(tmp_path, {**IDENTITY, "config": {"seed": 1}})
    (tmp_path / RECORDS).unlink()
    assert Records(tmp_path, IDENTITY).all == []


def test_files_are_named_after_any_text():
    assert file_name("L1,H2") == "L1,H2"
    assert "/" not in file_name("a/b") and file_name("a/b") != file_name("a b")
    long = "H1,L1," * 100
    assert len(file_name(long)) < 200 and file_name(long) != file_name(long + "H1")


def test_the_command_can_be_typed_again(monkeypatch):
    argv = ["eval.py", "--workdir", "my run", "--extract", r"(\d+) *$"]
    monkeypatch.setattr(sys, "argv", argv)
    assert shlex.split(command()) == ["python", *argv]
