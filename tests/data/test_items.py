import dataclasses

import numpy as np
import pytest

from dials_jax.config import ArithmeticData, EvalTask, TaskData, TextData
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.errors import InputError
from dials_jax.evaluation.items import load_items, make_item
from dials_jax.models.padding import pad_prompts

QUESTIONS = [
    {"q": "sky", "sol1": "blue", "sol2": "red", "label": 0, "text": "so #### 1,234."},
    {"q": "grass", "sol1": "black", "sol2": "green", "label": "1", "text": "so #### 7"},
]


@pytest.fixture
def questions(write_jsonl):
    return TaskData(paths=(write_jsonl(QUESTIONS),), prompt="{q}?", answer=" {text}")


@pytest.fixture
def load(tokenizer, model_config):
    return lambda task: load_items(task, tokenizer, model_config)


def test_exact_match_items_hold_the_prompt_alone_and_one_answer_with_eos(
    questions, load, tokenizer
):
    task = EvalTask(name="t", metric="exact_match", data=questions, extract="#### (.*)")
    item = load(task)[0]
    assert item.prompt == tuple(tokenizer.encode("sky?"))
    assert item.answers == ((*tokenizer.encode(" so #### 1,234."), 1),)
    assert item.reference == " so #### 1,234."
    with pytest.raises(InputError, match=r"records\.jsonl:1: extract='A: .*' finds nothing"):
        load(dataclasses.replace(task, extract="A: (.*)"))


def test_choice_items_from_templates(questions, load, tokenizer):
    task = EvalTask(name="t", metric="choice", data=questions, choices=(" {sol1}", " {sol2}"))
    items = load(task)
    assert [item.label for item in items] == [0, 1]
    assert [tokenizer.decode(a) for a in items[1].answers] == [" black", " green"]
    assert items[1].prompt == tuple(tokenizer.encode("grass?"))


def arc(write_jsonl, **record):
    record = {"q": "x", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "key": "B"} | record
    return EvalTask(
        name="arc",
        metric="choice",
        data=TaskData(paths=(write_jsonl([record], "arc.jsonl"),), prompt="{q}: "),
        choice_list="choices.text",
        label="key",
        label_names="choices.label",
    )


def test_choice_items_from_a_list_take_the_space_of_the_prompt(load, tokenizer, write_jsonl):
    (item,) = load(arc(write_jsonl))
    assert tokenizer.decode(item.prompt) == "x:"
    assert [tokenizer.decode(a) for a in item.answers] == [" p", " q"]
    assert item.label == 1


def test_a_label_is_looked_up_among_the_names_before_it_is_an_index(load, write_jsonl):
    named = {"choices": {"text": ["p", "q"], "label": ["1", "2"]}, "key": "1"}
    assert load(arc(write_jsonl, **named))[0].label == 0
    assert load(dataclasses.replace(arc(write_jsonl, **named), label_names=""))[0].label == 1


@pytest.mark.parametrize(
    "record, change, message",
    [
        ({"key": "C"}, {}, r"arc\.jsonl:1: field 'key' is 'C'; .* lists \['A', 'B'\]"),
        ({"choices": {"text": ["p", "q"], "label": ["B", "B"]}}, {}, "label' must list it once"),
        ({"key": "B"}, {"label_names": ""}, "not an index; name the field"),
        ({"key": 2}, {"label_names": ""}, "there are 2 choices; count from 0"),
        ({"key": -1}, {"label_names": ""}, "'key' is -1, not an index"),
        ({}, {"label": "kee"}, "did you mean 'key'"),
        ({}, {"choice_list": "q"}, "must be a list of strings"),
        ({}, {"choice_list": ""}, "give either choices="),
        ({}, {"choices": ("{q}", "{key}")}, "give either choices="),
        ({"choices": {"text": ["p", "q"], "label": ["B"]}}, {}, "among a name per choice"),
        ({"choices": {"text": ["p", "q"], "label": ["A", "B", "C"]}}, {}, "among a name per"),
        ({"choices": {"text": ["p"], "label": ["B"]}}, {}, r"jsonl:1: the choices \['p'\] must be"),
        (
            {"choices": {"text": ["p", "p"], "label": ["A", "B"]}},
            {},
            "must be several, and all diff",
        ),
    ],
)
def test_bad_labels_and_choices_are_input_errors(load, write_jsonl, record, change, message):
    with pytest.raises(InputError, match=message):
        load(dataclasses.replace(arc(write_jsonl, **record), **change))


def test_choices_are_of_the_task_or_of_its_data(questions, load):
    templates = ("{sol1}", "{sol2}")
    with pytest.raises(InputError, match=r"choices= .* not both"):
        dataclasses.replace(questions, choices=templates, choice_list="q")
    data = dataclasses.replace(questions, choices=templates)
    of_data = EvalTask(name="t", metric="choice", data=data)
    of_task = EvalTask(name="t", metric="choice", data=questions, choices=templates)
    assert load(of_data) == load(of_task)
    swapped = load(dataclasses.replace(of_data, choices=templates[::-1]))
    assert [item.answers[::-1] for item in swapped] == [item.answers for item in load(of_data)]


def test_arithmetic_items_are_the_held_out_ones(model_of):
    cfg = ArithmeticData(num_items=100)
    procedural = ArithmeticTask(cfg)
    task = EvalTask(name="sums", metric="exact_match", data=cfg, limit=30)
    items = load_items(task, None, model_of(procedural.tokenizer))
    texts = [(procedural.tokenizer.decode(i.prompt), i.reference) for i in items]
    assert texts == [(r["prompt"], r["answer"]) for r in procedural.test_records(30)]
    assert all(item.answers[0][-1] == 1 for item in items)


def test_nelbo_items_of_text_are_packed_rows_cut_after_the_prompt(load, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijkl")
    cfg = TextData(paths=(str(tmp_path),), length=6, prompt_length=2, cache=str(tmp_path / "cache"))
    task = EvalTask(name="t", metric="nelbo", data=cfg)
    items = load(task)
    assert [tokenizer.decode(i.prompt) for i in items] == ["ab", "gh"]
    assert [[tokenizer.decode(a) for a in i.answers] for i in items] == [["cdef"], ["ijkl"]]
    assert len(load(dataclasses.replace(task, limit=1))) == 1
    for prompt_length in (0, 6):
        bad = dataclasses.replace(cfg, prompt_length=prompt_length)
        with pytest.raises(InputError, match=f"prompt_length={prompt_length}"):
            load(dataclasses.replace(task, data=bad))
    with pytest.raises(InputError, match="metric 'choice' needs"):
        load(dataclasses.replace(task, metric="choice"))


def test_nelbo_items_of_a_task_are_pairs(questions, load, tokenizer):
    item = load(EvalTask(name="t", metric="nelbo", data=questions))[1]
    assert tokenizer.decode(item.prompt) == "grass?"
    assert item.answers == (tuple(tokenizer.encode(" so #### 7")),)  # no EOS: the text's own NELBO


def test_limits_lengths_and_masks(questions, load, write_jsonl):
    task = EvalTask(name="t", metric="nelbo", data=questions)
    assert [i.key for i in load(dataclasses.replace(task, limit=1))] == [load(task)[0].key]
    short = dataclasses.replace(questions, prompt_length=4)
    with pytest.raises(InputError, match=r"records\.jsonl:2: the prompt has 6 tokens"):
        load(dataclasses.replace(task, data=short))
    with pytest.warns(UserWarning, match="dropped 1 of 2"):
        assert len(
            load(dataclasses.replace(task, data=dataclasses.replace(short, too_long="drop")))
        )
    masked = write_jsonl([{"q": "[MASK]", "text": "x"}], "mask.jsonl")
    with pytest.raises(InputError, match=r"mask\.jsonl:1: the prompt contains \[MASK\]"):
        load(dataclasses.replace(task, data=dataclasses.replace(questions, paths=(masked,))))
    empty = write_jsonl([], "empty.jsonl")
    with pytest.raises(InputError, match="'t' has no items"):
        load(dataclasses.replace(task, data=dataclasses.replace(questions, paths=(empty,))))


@pytest.mark.parametrize("metric", ["exact_match", "choice", "nelbo"])
def test_lengths_mean_the_same_to_every_metric(metric, load, write_jsonl):
    records = [{"q": "q", "a": "a" * n, "b": "b", "label": 0} for n in (1, 3, 4)]
    records.append({"q": "q" * 5, "a": "a", "b": "b", "label": 0})
    data = TaskData(
        paths=(write_jsonl(records),), prompt="{q}", answer="{a}", prompt_length=4, answer_length=3
    )
    choices = {"choices": ("{b}", "{a}")} if metric == "choice" else {}
    task = EvalTask(name="t", metric=metric, data=data, **choices)
    with pytest.raises(InputError, match=r"jsonl:3: the answer has 4 tokens but answer_length=3"):
        load(task)
    with pytest.warns(UserWarning, match="dropped 2 of 4"):
        items = load(dataclasses.replace(task, data=dataclasses.replace(data, too_long="drop")))
    assert len(items) == 2 and items.num_dropped == 2
    longer = dataclasses.replace(data, prompt_length=5, answer_length=4)
    items = load(dataclasses.replace(task, data=longer))  # no end of text is needed
    assert len(items) == 4 and items.num_dropped == 0


def test_of_a_reference_only_what_is_compared_must_have_room(load, write_jsonl):
    data = TaskData(
        paths=(write_jsonl([{"q": "q", "a": "abcd:efg"}]),), prompt="{q}", answer="{a}",
        prompt_length=4, answer_length=3,
    )  # fmt: skip
    task = EvalTask(name="t", metric="exact_match", data=data, extract=":(.*)")
    assert len(load(task)) == 1
    with pytest.raises(InputError, match="the answer has 3 tokens but answer_length=2"):
        load(dataclasses.replace(task, data=dataclasses.replace(data, answer_length=2)))
    with pytest.raises(InputError, match="the answer has 8 tokens"):
        load(dataclasses.replace(task, extract=""))


def test_keys_depend_on_content_and_not_on_labels_or_order():
    base = make_item([1, 2], [[3], [4]])
    assert all(0 <= make_item([i], [[1]]).key < 2**31 for i in range(20))
    assert make_item((1, 2), ((3,), (4,)), label=1, reference="x").key == base.key
    assert make_item(np.array([1, 2], np.int32), list(np.array([[3], [4]]))) == base
    others = [make_item([1], [[2, 3], [4]]), make_item([1, 2], [[3, 4]]), make_item([1, 2], [[4]])]
    assert len({base.key, *(o.key for o in others)}) == 4


def test_prompts_are_padded_on_the_left():
    tokens, valid = pad_prompts([[5, 6], [], [7, 8, 9]], 3, pad_id=0)
    assert tokens.tolist() == [[0, 5, 6], [0, 0, 0], [7, 8, 9]]
    assert valid.sum(axis=1).tolist() == [2, 0, 3] and valid[0].tolist() == [False, True, True]
    assert np.issubdtype(tokens.dtype, np.integer) and valid.dtype == bool
    with pytest.raises(InputError, match="prompt 0 has 2 tokens"):
        pad_prompts([[5, 6]], 1, pad_id=0)
