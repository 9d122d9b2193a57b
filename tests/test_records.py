"""Records survive being killed, and never mix two studies."""

import json
import math

import pytest

from dials_jax.errors import InputError
from dials_jax.records import RECORDS, Records
from dials_jax.studies.study_records import STUDY, continued_study, read_records

IDENTITY = {"config": {"seed": 0, "models": [["H", "a"]]}, "weights": {"H": "12ab"}}


def check(record):
    record["n"]


def opened(workdir, identity=IDENTITY):
    return Records(workdir, identity, check, STUDY, continued_study)


def test_records_continue_after_half_a_line(tmp_path):
    records = opened(tmp_path)
    records.add({"n": 1})
    records.add({"n": 2})
    with records.path.open("a") as file:
        file.write('{"n": 3, "va')
    assert read_records(records.path, check) == [{"n": 1}, {"n": 2}]
    again = opened(tmp_path)
    assert again.all == [{"n": 1}, {"n": 2}]
    again.add({"n": 3})
    assert opened(tmp_path).all == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert not (tmp_path / "runs.odd.jsonl").exists()


def test_records_are_json_that_strict_readers_take(tmp_path):
    records = opened(tmp_path)
    records.add({"n": [0.5, math.nan, math.inf]})
    (line,) = records.path.read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert record["n"] == [0.5, None, None] and [*record] == ["n", "digest"]


def test_no_flipped_bit_is_used_in_silence(tmp_path):
    """Wherever a bit of the file flips, each record is as it was, or it is set aside."""
    records = opened(tmp_path)
    for n in range(3):
        records.add({"n": n, "value": [0.25, 1e-7]})
    whole, before = records.path.read_bytes(), records.all
    lengths = set()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        records.path.write_bytes(flipped)
        left = [{k: r.get(k) for k in ("n", "value")} for r in opened(tmp_path).all]
        assert all(record in before for record in left)
        lengths.add(len(left))
    assert lengths <= {1, 2, 3}
    odd = (tmp_path / "runs.odd.jsonl").read_bytes()
    assert len(odd) > len(whole)


def test_odd_lines_are_set_aside_and_named(tmp_path, capsys):
    records = opened(tmp_path)
    odd = ['{"n": 1}', "oops", '{"m": 1}', "[" * 10**5, '"\\ud800"', "3"]
    records.add({"n": 0})
    good = records.path.read_text()
    records.path.write_text("\n".join([*odd, good]))  # none comes after a line with a digest
    assert opened(tmp_path).all == [{"n": 1}, {"n": 0}]
    assert records.path.read_text() == odd[0] + "\n" + good
    assert (tmp_path / "runs.odd.jsonl").read_text() == "\n".join([*odd[1:], ""])
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(" is ")[0] for line in shown] == [
        f"{records.path}, line {number}" for number in range(2, 7)
    ]
    with records.path.open("a") as file:
        file.write('{"n": 7}\n')
    assert len(opened(tmp_path).all) == 2
    assert "line 3 has lost its digest" in capsys.readouterr().err


def test_records_of_another_run_are_read_but_not_mended(tmp_path):
    records = opened(tmp_path)
    records.add({"n": 1})
    text = records.path.read_text().replace("1", "2", 1)
    records.path.write_text(text)
    with pytest.raises(InputError, match=r"runs.jsonl, line 1 is damaged.*run that study again"):
        read_records(records.path, check)
    assert records.path.read_text() == text


def test_what_differs_is_named(tmp_path):
    opened(tmp_path)
    other = {"config": {**IDENTITY["config"], "seed": 1}, "weights": {"H": "34cd"}}
    with pytest.raises(InputError, match=r"\(config.seed, weights.H differ\); choose another"):
        opened(tmp_path, other)
    with pytest.raises(InputError, match=r"\(config.steps differ\)"):
        opened(tmp_path, {**IDENTITY, "config": {**IDENTITY["config"], "steps": 3}})


def test_a_broken_identity_is_named(tmp_path):
    opened(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(InputError, match=r"study.json is not valid JSON.*; put it back, or"):
        opened(tmp_path)
    (tmp_path / "study.json").write_text('{"kind": "SearchStudy", "config": 3}')
    with pytest.raises(InputError, match="holds another study"):
        opened(tmp_path)


def test_records_of_nobody_knows_what_are_refused(tmp_path):
    opened(tmp_path).add({"n": 1})
    (tmp_path / "study.json").unlink()
    with pytest.raises(InputError, match=r"holds runs.jsonl but no study.json.*put it back"):
        opened(tmp_path, {**IDENTITY, "config": {"seed": 1}})
    (tmp_path / RECORDS).unlink()
    assert opened(tmp_path).all == []
