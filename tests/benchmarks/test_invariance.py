"""The benchmark finds what changes with the batch, and counts it only against the mode."""

import json

import numpy as np
import pytest

from benchmarks import command, invariance
from benchmarks.invariance import Compared, in_batches, some_sequences
from benchmarks.random_model import make_config


@pytest.fixture(autouse=True)
def quietly(monkeypatch):
    """No compilation cache is set up in the process of the tests."""
    monkeypatch.setattr(command, "keep_programs", lambda: None)


def test_differences_are_counted_in_bits():
    zeros = np.zeros((3, 4), np.float32)
    one = Compared(np.ones((3, 4), int), zeros, np.ones((3, 2)))
    tokens, numbers, layers = one.tokens.copy(), zeros.copy(), one.layers.copy()
    tokens[0, 1], numbers[2, 3], layers[2, 1] = 5, -0.0, 7
    found = one.differences(Compared(tokens, numbers, layers))
    assert found == {
        "sequences": "2/3", "tokens": "1/12", "numbers": "1/12", "differ": 2, "layer": "2",
    }  # fmt: skip
    assert one.differences(one)["layer"] == "none" and one.differences(one)["differ"] == 0


def test_sequences_come_back_in_their_order_with_their_keys():
    some, seen = some_sequences(make_config("tiny"), 5, 3), []

    def run(part):
        seen.append(len(part.prompts))
        return Compared(part.prompts, np.asarray(part.prompts, np.float32))

    for rows, size in ((np.arange(5), 2), (np.arange(5)[::-1], 5), (np.arange(5), 1)):
        np.testing.assert_array_equal(in_batches(run, some, rows, size).tokens, some.prompts)
    assert seen == [2, 2, 2, 5, 1, 1, 1, 1, 1]  # the last batch is filled


def test_it_writes_a_row_for_every_batch(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = "--model tiny --layers 1 --prompt 4 --gen 2 --block 2 --sizes 2 --caches none"
    arguments += " --policies full --temperatures 0 --modes on --parts table kernels"
    assert invariance.main([*arguments.split(), "--out", str(path)]) == 1  # without a Hopper GPU
    *rows, kernels = json.loads(path.read_text())["rows"]
    assert [row["batch"] for row in rows] == ["again", "padded", "reversed"] * 3
    assert {row["differ"] for row in rows} == {0}
    assert "needs a Hopper GPU" in kernels["error"]
    assert "1 failed or differ" in capsys.readouterr().out


def test_wrong_arguments_give_one_line(capsys):
    assert invariance.main(["--model", "tiny", "--caches", "duel"]) == 2
    assert capsys.readouterr().err.startswith("error: cache 'duel' is not known")
