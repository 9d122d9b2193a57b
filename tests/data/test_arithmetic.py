import collections
import dataclasses

import numpy as np
import pytest

from dials_jax.config import ArithmeticData
from dials_jax.data.arithmetic import SYMBOLS, ArithmeticTask
from dials_jax.data.batches import batch_at
from dials_jax.errors import InputError

CFG = ArithmeticData(operations=tuple(SYMBOLS), num_items=400)


def training_texts(task):
    """(prompt, answer) of every training row."""
    tokens, _, _ = task.training_rows.rows(range(task.training_rows.num_rows))
    cut = task.prompt_length
    return [(task.tokenizer.decode(t[:cut]), task.tokenizer.decode(t[cut:])) for t in tokens]


def right_answer(prompt):
    """Worked out from the prompt's text alone."""
    digits = [int(c) for c in prompt if c.isdigit()]
    a, b = (int(part) for part in prompt[1:-1].split(","))
    half = len(digits) // 2
    number = {"+": a + b, ">": max(a, b)}.get(prompt[0])
    if number is not None:
        return number, half + (prompt[0] == "+")
    ordered = digits[::-1] if prompt[0] == "r" else sorted(digits)
    return int("".join(map(str, ordered))), 2 * half


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_answers_are_right_and_of_fixed_width(digits):
    task = ArithmeticTask(dataclasses.replace(CFG, digits=digits, num_items=40))
    pairs = [(r["prompt"], r["answer"]) for r in task.test_records(8)] + training_texts(task)
    for prompt, answer in pairs:
        assert len(prompt) == task.prompt_length
        assert (int(answer), len(answer)) == right_answer(prompt)
    assert max(len(answer) for _, answer in pairs) + 1 == task.answer_length


def test_training_items_are_distinct_and_balanced():
    prompts = [prompt for prompt, _ in training_texts(ArithmeticTask(CFG))]
    assert len(set(prompts)) == len(prompts) == 400
    assert collections.Counter(p[0] for p in prompts) == dict.fromkeys(SYMBOLS.values(), 100)


def test_no_test_prompt_is_in_any_training_set():
    largest = dataclasses.replace(CFG, num_items=30_000)
    training = {prompt for prompt, _ in training_texts(ArithmeticTask(largest))}
    records = ArithmeticTask(CFG).test_records(2000)
    assert not training & {r["prompt"] for r in records}
    counts = collections.Counter(r["operation"] for r in records)
    assert counts == dict.fromkeys(CFG.operations, 500)


def test_the_split_depends_on_split_seed_only():
    task = ArithmeticTask(CFG)
    records = task.test_records(50)
    assert ArithmeticTask(dataclasses.replace(CFG, num_items=8)).test_records(80)[:50] == records
    other = ArithmeticTask(dataclasses.replace(CFG, split_seed=1))
    tests = {r["prompt"] for r in other.test_records(50)}
    assert tests & {r["prompt"] for r in task.records(held_out=False)}  # others are held out
    assert other.training_rows.fingerprint != ArithmeticTask(CFG).training_rows.fingerprint
    assert (
        ArithmeticTask(CFG).training_rows.fingerprint
        == ArithmeticTask(CFG).training_rows.fingerprint
    )


def test_training_rows_are_whole_and_the_fill_is_trained_on():
    task = ArithmeticTask(CFG)
    batch = batch_at(task.training_rows, 0, 0, 64)
    assert batch.tokens.shape == (64, task.prompt_length + task.answer_length)
    assert batch.valid.all()
    assert (batch.answer == (np.arange(batch.tokens.shape[1]) >= task.prompt_length)).all()
    assert (batch.tokens[:, -1] == task.tokenizer.token_to_id("[EOS]")).all()
    assert not (batch.tokens == task.tokenizer.token_to_id("[MASK]")).any()


def test_the_tokenizer_does_not_depend_on_the_operations_chosen():
    only = ArithmeticTask(dataclasses.replace(CFG, operations=("max",)))
    assert only.tokenizer.fingerprint == ArithmeticTask(CFG).tokenizer.fingerprint
    assert {prompt[0] for prompt, _ in training_texts(only)} == {">"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"operations": ("ad",)}, "did you mean 'add'"),
        ({"operations": ()}, "operations is empty"),
        ({"operations": ("add", "add")}, "names one twice"),
        ({"digits": 4}, "digits=4"),
        ({"num_items": 0}, "num_items=0"),
    ],
)
def test_bad_settings_are_input_errors(change, message):
    with pytest.raises(InputError, match=message):
        ArithmeticTask(dataclasses.replace(CFG, **change))


def test_more_items_than_there_are_is_an_input_error():
    task = ArithmeticTask(ArithmeticData(digits=1, num_items=401))
    with pytest.raises(InputError, match="401 training items are asked for, but digits=1 gives"):
        _ = task.training_rows
    with pytest.raises(InputError, match="400 test items"):
        task.test_records(400)
