import math
import shlex
import sys

from dials_jax.reporting.environment import command
from dials_jax.reporting.publish import file_name, write_csv


def test_a_text_is_no_formula(tmp_path):
    rows = [{"task": "=1+1", "value": -1.5}, {"task": "a\udcff", "value": math.nan}]
    write_csv(tmp_path / "x.csv", ["task", "value"], rows)
    assert (tmp_path / "x.csv").read_text().split() == ["task,value", "'=1+1,-1.5", "a\\udcff,"]


def test_files_are_named_after_any_text():
    assert file_name("L1,H2") == "L1,H2"
    assert "/" not in file_name("a/b") and file_name("a/b") != file_name("a b")
    long = "H1,L1," * 100
    assert len(file_name(long)) < 200 and file_name(long) != file_name(long + "H1")


def test_the_command_can_be_typed_again(monkeypatch):
    argv = ["eval.py", "--workdir", "my run", "--extract", r"(\d+) *$"]
    monkeypatch.setattr(sys, "argv", argv)
    assert shlex.split(command()) == ["python", *argv]
