"""The benchmark finds what changes with the batch, and counts it only against the mode."""

import argparse
import dataclasses
import json

import numpy as np
import pytest

from benchmarks import command, invariance, invariance_answers
from benchmarks.invariance import in_batches, neighbour_rows, of_mixed_lengths
from benchmarks.invariance_cases import Compared, divergent, layer_inputs, some_sequences
from benchmarks.random_model import make_config, make_model
from dials_jax import trees
from dials_jax.skipping.routed import votes_to_skip


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


def test_gates_count_and_how_often_sequences_disagree():
    numbers, gates = np.zeros((2, 1), np.float32), np.ones((2, 3, 4), bool)
    gates[0, 1, 2] = False
    one = Compared(numbers.astype(int), numbers, gates=gates)
    assert one.differences(one) == {
        "sequences": "0/2", "differ": 0, "tokens": "0/2", "numbers": "0/2", "gates": "0/24",
        "diverged": 1 / 12, "open": 23 / 24,
    }  # fmt: skip
    other = one._replace(gates=~gates)
    assert one.differences(other)["differ"] == 2 and one.differences(other)["gates"] == "24/24"


def test_routers_of_the_benchmark_disagree():
    model = make_model(make_config("tiny", 3))
    options = argparse.Namespace(sizes=[4], prompt=16, gen=4)
    routed = divergent(model, options)
    some = some_sequences(model.config, 4, 16)
    h = layer_inputs(model, some, routed, gen=4)
    for i in (1, 2):
        with model.context():
            votes = votes_to_skip(trees.layer_slice(routed.router, i), h[i]).mean(axis=1)
        assert len(set((votes > routed.threshold).tolist())) == 2


@pytest.mark.parametrize("reads", ["nothing", "the others", "its place"])
def test_what_a_sequence_reads_of_its_batch_is_found(reads):
    some, others = (some_sequences(make_config("tiny"), 4, 8, seed) for seed in (0, 1))
    some, others = of_mixed_lengths(some, 1), of_mixed_lengths(others, 3)
    assert (some.valid != others.valid).any() and some.valid[:, -1].all()

    def run(part):
        numbers = part.prompts.astype(np.float32)
        if reads == "the others":
            numbers = numbers + part.prompts.sum(axis=0)
        if reads == "its place":
            numbers = numbers + np.arange(4)[:, None]
        return Compared(part.prompts, numbers)

    found = {row["batch"]: row["differ"] for row in neighbour_rows(run, some, others)}
    assert set(found) == {"others", "moved", "reversed", "filled"}
    expected = {"nothing": set(), "the others": {"others", "filled"}}
    expected["its place"] = {"moved", "reversed", "filled"}
    assert {name for name, count in found.items() if count} == expected[reads]


def test_answers_are_counted_and_paired_with_the_largest_batch(arithmetic_model, monkeypatch):
    def answers(model, prompts, *, batch_size, sampler, **settings):
        found = np.full((len(prompts), sampler.gen_length), 5)
        found[: 4 - batch_size] += 1
        return found

    def score(task, item, ids, tokenizer):
        return argparse.Namespace(score=float(ids[0] == 5))

    few = dataclasses.replace(invariance_answers.TASK, limit=5)
    monkeypatch.setattr(invariance_answers, "TASK", few)
    monkeypatch.setattr(invariance_answers, "generate_all", answers)
    monkeypatch.setattr(invariance_answers, "score_output", score)
    options = argparse.Namespace(router=None, text=None, sizes=[1, 4])
    model = invariance.load(arithmetic_model)
    large, small = invariance_answers.answer_rows(model, options)
    assert (large["batch"], large["differ"], large["worse"]) == ("4", 0, 0)
    assert (small["differ"], small["better"], small["worse"]) == (3, 0, 3)
    assert small["paired"]["p_value"] == 0.25  # 2 * 0.5 ** 3


def test_a_text_goes_on_and_its_own_tokens_are_counted(arithmetic_model, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("12345678901234567890")
    monkeypatch.chdir(tmp_path)  # packed rows go into its cache
    model = invariance.load(arithmetic_model)
    options = argparse.Namespace(
        text=str(text), model=str(arithmetic_model), prompt=3, gen=2, block=2, items=3
    )
    items, sampler, score = invariance_answers.texts(model, options)
    assert len(items) == 3 and sampler.gen_length == sampler.block_length == 2
    (own,) = items[0].answers
    assert [len(items[0].prompt), len(own)] == [3, 2]
    assert [score(items[0], [*own]), score(items[0], [own[0], -1])] == [1, 0.5]


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
    assert invariance.main(["--model", "tiny", "--data", "100"]) == 2
    assert capsys.readouterr().err.startswith("error: --data 100: give 2 to ")
