import dataclasses

import numpy as np
import pytest

from dials_jax.config import TaskData
from dials_jax.data.questions import fill_template
from dials_jax.data.tasks import load_task_rows
from dials_jax.errors import InputError

EOS, PAD = 1, 0


@pytest.fixture
def cfg(write_jsonl):
    path = write_jsonl([{"q": "2+3", "a": "5"}, {"q": "12+30", "a": "42"}])
    return TaskData(paths=(path,), prompt="{q}=", answer="{a}", prompt_length=7, answer_length=4)


def test_templates_take_nested_fields_numbers_and_braces():
    record = {"q": "why", "tests": ["t0", "t1"], "n": 3, "inner": {"x": 0.5}}
    assert fill_template("{q}? {tests.1} {n} {inner.x}", record) == "why? t1 3 0.5"
    assert fill_template("{{q}} {} { q } {", record) == "{q} {} { q } {"
    assert fill_template("{q}", {"q": "{n}"}) == "{n}"  # values are not templates


def test_templates_refuse_unknown_and_structured_fields():
    with pytest.raises(InputError, match="did you mean 'question'"):
        fill_template("{questoin}", {"question": "x", "answer": "y"})
    with pytest.raises(InputError, match="'tests' is list"):
        fill_template("{tests}", {"tests": []})
    with pytest.raises(InputError, match="'q' is NoneType"):
        fill_template("{q}", {"q": None})


def test_a_row_is_padding_prompt_answer_eos_and_fill(cfg, model_config, tokenizer):
    data = load_task_rows(cfg, model_config, tokenizer)
    tokens, answer, valid = data.rows([1, 0])
    ids = tokenizer.encode
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [
        [PAD, *ids("12+30="), *ids("42"), EOS, EOS],
        [PAD, PAD, PAD, *ids("2+3="), *ids("5"), EOS, EOS, EOS],
    ]
    assert answer.astype(int).tolist() == [[0] * 7 + [1] * 4] * 2
    assert valid.astype(int).tolist() == [[0] + [1] * 10, [0] * 3 + [1] * 8]


def test_without_pad_answer_the_fill_is_neither_valid_nor_an_answer(cfg, model_config, tokenizer):
    data = load_task_rows(dataclasses.replace(cfg, pad_answer=False), model_config, tokenizer)
    _, answer, valid = data.rows([0])
    assert answer[0].astype(int).tolist() == [0] * 7 + [1, 1, 0, 0]  # "5" and its EOS
    assert valid[0].astype(int).tolist() == [0] * 3 + [1] * 6 + [0, 0]


def test_the_tokenizer_is_loaded_from_the_settings(cfg, model_config, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok")
    loaded = load_task_rows(dataclasses.replace(cfg, tokenizer=str(tmp_path / "tok")), model_config)
    given = load_task_rows(cfg, model_config, tokenizer)
    np.testing.assert_array_equal(loaded.rows([0, 1])[0], given.rows([0, 1])[0])
    assert loaded.fingerprint == given.fingerprint


def test_the_fingerprint_follows_rows_and_layout(cfg, model_config, tokenizer):
    changes = [
        {},
        {"pad_answer": False},
        {"answer_length": 5},
        {"answer": "{q}", "answer_length": 6},
    ]
    data = [load_task_rows(dataclasses.replace(cfg, **c), model_config, tokenizer) for c in changes]
    assert len({d.fingerprint for d in data}) == len(changes)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_length": 5}, r"records\.jsonl:2: the prompt has 6 tokens but prompt_length=5"),
        ({"answer_length": 2}, r"records\.jsonl:2: the answer has 3 tokens but answer_length=2"),
    ],
)
def test_a_pair_that_is_too_long_is_named_or_dropped(cfg, model_config, tokenizer, change, message):
    short = dataclasses.replace(cfg, **change)
    with pytest.raises(InputError, match=message):
        load_task_rows(short, model_config, tokenizer)
    with pytest.warns(UserWarning, match="dropped 1 of 2"):
        data = load_task_rows(dataclasses.replace(short, too_long="drop"), model_config, tokenizer)
    assert data.num_rows == 1


@pytest.mark.parametrize("field", ["q", "a"])
def test_a_mask_token_in_the_data_is_refused(cfg, model_config, tokenizer, write_jsonl, field):
    record = {"q": "x", "a": "y"} | {field: "[MASK]"}
    path = write_jsonl([{"q": "x", "a": "y"}, record], "mask.jsonl")
    with pytest.raises(InputError, match=r"mask\.jsonl:2: the \w+ contains \[MASK\]"):
        load_task_rows(dataclasses.replace(cfg, paths=(path,)), model_config, tokenizer)


def test_a_missing_field_and_an_empty_file_are_input_errors(
    cfg, model_config, tokenizer, write_jsonl
):
    with pytest.raises(InputError, match=r"records\.jsonl:1: no field 'answer'"):
        load_task_rows(dataclasses.replace(cfg, answer="{answer}"), model_config, tokenizer)
    empty = dataclasses.replace(cfg, paths=(write_jsonl([], "empty.jsonl"),))
    with pytest.raises(InputError, match=r"empty\.jsonl: no prompt/answer pair"):
        load_task_rows(empty, model_config, tokenizer)
