"""The training benchmark runs, writes what it prints, and refuses names in one line."""

import json

import pytest

from benchmarks import command, train


@pytest.fixture(autouse=True)
def quietly(monkeypatch):
    """No compilation cache is set up in the process of the tests."""
    monkeypatch.setattr(command, "keep_programs", lambda: None)


def test_train_prints_and_writes_a_row_per_depth(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = "--model tiny --blocks 1 --batch 2 --length 8 --steps 1 --repeats 1 --warm-up 1"
    saves = ["--save-to", str(tmp_path)]
    assert train.main([*arguments.split(), *saves, "--out", str(path)]) == 0
    [row] = json.loads(path.read_text())["rows"]
    assert row["blocks"] == 1 and row["parameters"] > 0 and row["compile_s"] > 0
    assert row["tokens_a_second"] == pytest.approx(2 * 8 / (row["ms"] / 1e3))
    assert row["save_percent"] > -100 and row["save_spread"] == 0
    assert list(tmp_path.iterdir()) == [path]  # the checkpoints are removed
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_routers_are_trained_on_a_frozen_model(capsys):
    arguments = "--objective dials --model tiny --blocks 2 --batch 2 --length 8 --steps 1"
    assert train.main([*arguments.split(), "--repeats", "1", "--warm-up", "1"]) == 0
    assert "dials           2 " in capsys.readouterr().out
    cfg = train.make_case("tiny", "dials", 2)
    assert train.step_flops(cfg, "dials", 1, 8) == 2 / 3 * train.step_flops(cfg, "llada", 1, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--model tinny", "model 'tinny' is not known; did you mean 'tiny'?"),
        ("--model gpt2 --blocks 1", "objective.kind='mdlm' does not fit a model with causal=True"),
        ("--model tiny --warm-up 0", "--steps, --warm-up and --repeats must be positive"),
        ("--model tiny --save-to nowhere", "--save-to nowhere is no folder; make it first"),
        ("--model tiny --batch 6 --microbatches 4", "--batch 6 must be divisible by --micro"),
    ],
)
def test_what_does_not_fit_gives_one_line(capsys, arguments, message):
    assert train.main(arguments.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
