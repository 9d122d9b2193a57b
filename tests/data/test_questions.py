"""Records become the texts that lm-evaluation-harness makes of them, in training and evaluation."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dials_jax.config import TaskData
from dials_jax.data.questions import read_questions
from dials_jax.data.tasks import load_task_rows
from dials_jax.errors import InputError

ARC = [
    {"question": "Sky?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]},
     "answerKey": "B"},
    {"question": "Gas?", "choices": {"text": ["air", "ice", "wood"], "label": ["1", "2", "3"]},
     "answerKey": "1"},
    {"question": "Wet?", "choices": {"text": ["sand", "sun", "sea", "sky"],
                                     "label": ["A", "B", "C", "D"]}, "answerKey": "C"},
]  # fmt: skip
RIGHT = ["blue", "air", "sea"]


@pytest.fixture
def arc(write_jsonl):
    return TaskData(
        paths=(write_jsonl(ARC, "arc.jsonl"),),
        prompt="Question: {question}\nAnswer:",
        choice_list="choices.text",
        label="answerKey",
        label_names="choices.label",
        pad_answer=False,
        prompt_length=48,
        answer_length=12,
    )


def questions(cfg):
    return [question for _, question in read_questions(cfg)]


def test_training_is_on_the_right_choice_spaced_as_in_evaluation(arc, tokenizer, model_config):
    tokens, answer, _ = load_task_rows(arc, model_config, tokenizer).rows([0, 1, 2])
    texts = [tokenizer.decode(row[mask]) for row, mask in zip(tokens, answer, strict=True)]
    assert texts == [f" {right}" for right in RIGHT]
    prompts = [tokenizer.decode(row[:48]) for row in tokens]
    assert prompts == [f"Question: {record['question']}\nAnswer:" for record in ARC]
    both = dataclasses.replace(arc, answer="{choices.text.0}")
    with pytest.raises(InputError, match="not clear what to train on; leave out one of them"):
        load_task_rows(both, model_config, tokenizer)


def test_a_list_of_choices_is_no_text(arc, tokenizer, model_config):
    alone = dataclasses.replace(arc, choice_list="", answer="{choices.text}")
    with pytest.raises(InputError, match=r"jsonl:1: .*for multiple choice set choice_list and lab"):
        load_task_rows(alone, model_config, tokenizer)
    counted = dataclasses.replace(arc, label_names="")
    with pytest.raises(InputError, match=r"jsonl:1: field 'answerKey' is 'B', not an index"):
        load_task_rows(counted, model_config, tokenizer)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, " red"),  # the two would touch
        ({"prompt": "{question} "}, "red"),
        ({"target_delimiter": ""}, "red"),
        ({"target_delimiter": "\n"}, "\nred"),
        ({"choice_list": "", "choices": ("red", "not")}, "red"),  # templates have their own
        ({"choice_list": "", "choices": ("red", "not"), "target_delimiter": " "}, " red"),
    ],
)
def test_the_delimiter_between_prompt_and_choice(arc, write_jsonl, change, expected):
    one = dataclasses.replace(arc, paths=(write_jsonl(ARC[:1]),), label_names="choices.label")
    (question,) = questions(dataclasses.replace(one, **change))
    assert question.answers[0] == expected and question.characters[0] == 3


def test_few_shot_examples_are_joined_as_the_harness_joins_them(arc, write_jsonl):
    few = dataclasses.replace(
        arc, few_shot=(write_jsonl(ARC, "train.jsonl"), 2), description="About {answerKey}.\n\n"
    )
    last = questions(few)[-1]
    assert last.prompt == (
        "About C.\n\n"
        "Question: Sky?\nAnswer: blue\n\n"
        "Question: Gas?\nAnswer: air\n\n"
        "Question: Wet?\nAnswer:"
    )
    # No question is its own example.
    first = questions(few)[0]
    assert "Sky?\nAnswer: blue" not in first.prompt and "Wet?\nAnswer: sea" in first.prompt
    with pytest.raises(InputError, match=r"arc\.jsonl:1: .*has 2 other records for 3 few-shot"):
        questions(dataclasses.replace(few, few_shot=(few.few_shot[0], 3)))


def test_a_record_that_is_there_twice_leaves_examples_for_itself(write_jsonl):
    records = [{"prompt": f"{q}=", "answer": q.upper()} for q in "aabbc"]
    path = write_jsonl(records)
    cfg = TaskData(paths=(path,), few_shot=(path, 2), few_shot_delimiter=";")
    prompts = [q.prompt for q in questions(cfg)]
    assert prompts == ["b=B;b=B;a="] * 2 + ["a=A;a=A;b="] * 2 + ["a=A;a=A;c="]


def test_examples_may_be_of_the_same_group(write_jsonl):
    records = [{"s": s, "q": f"{s}{i}", "a": i} for i in range(3) for s in "xy"]
    cfg = TaskData(
        paths=(write_jsonl([{"s": "y", "q": "new", "a": 9}]),), prompt="{q}=", answer="{a}",
        few_shot=(write_jsonl(records, "dev.jsonl"), 2), few_shot_by="s", few_shot_delimiter=";",
    )  # fmt: skip
    assert [q.prompt for q in questions(cfg)] == ["y0=0;y1=1;new="]
    with pytest.raises(InputError, match="few_shot_by='s' chooses among examples; give few_shot"):
        dataclasses.replace(cfg, few_shot=None)
    other = dataclasses.replace(
        cfg, paths=(write_jsonl([{"s": "z", "q": "n", "a": 9}], "z.jsonl"),)
    )
    with pytest.raises(InputError, match="has 0 other records for 2 few-shot examples"):
        questions(other)


def test_records_of_hellaswag_and_mmlu(write_jsonl):
    record = {
        "activity_label": "Roof [title]", "ctx_a": "[header] A man  sits. [title] He",
        "ctx_b": "then Works", "endings": ["[step] goes.", " stays  put."], "label": "1",
    }  # fmt: skip
    cfg = TaskData(
        paths=(write_jsonl([record]),), preparation="hellaswag", prompt="{query}",
        choice_list="endings", target_delimiter=" ",
    )  # fmt: skip
    (question,) = questions(cfg)
    assert question.prompt == "Roof. : A man sits.. He Then works"
    assert question.answers == ["  goes.", " stays put."] and question.label == 1
    record = {
        "subject": "abstract_algebra",
        "question": " 1+1? ",
        "choices": ["1", "2"],
        "answer": 1,
    }
    cfg = TaskData(
        paths=(write_jsonl([record], "mmlu.jsonl"),), preparation="mmlu", label="answer",
        prompt="{question}\nA. {choices.0}\nB. {choices.1}\nAnswer:", choices=("A", "B"),
        target_delimiter=" ", description="About {subject_words}.\n\n",
    )  # fmt: skip
    (question,) = questions(cfg)
    assert question.prompt == "About abstract algebra.\n\n1+1?\nA. 1\nB. 2\nAnswer:"
    assert question.answers[question.label] == " B"


# ---------------------------------------------------------------------------------- other formats


def test_parquet_is_read_as_json_lines_are(arc, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path = tmp_path / "arc.parquet"
    parquet.write_table(pa.Table.from_pylist(ARC), path)
    assert questions(dataclasses.replace(arc, paths=(str(path),))) == questions(arc)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"arc\.parquet:1: .*; mend or replace the file"):
        questions(dataclasses.replace(arc, paths=(str(path),)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """ARC as tensorflow-datasets has it: names are classes, the choices a sequence."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    letters = tfds.features.ClassLabel(names=["A", "B", "C", "D", "E"])
    folder = tmp_path_factory.mktemp("tfds")
    with tfds.core.registered.skip_registration():

        class Arc(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                choices = tfds.features.Sequence({"text": tfds.features.Text(), "label": letters})
                features = {
                    "question": tfds.features.Text(),
                    "choices": choices,
                    "answerKey": letters,
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features),
                    disable_shuffling=True,
                )  # fmt: skip

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield from enumerate((ARC[0], ARC[2]))

    tfds.disable_progress_bar()
    builder = Arc(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_a_folder_of_tensorflow_datasets(arc, prepared):
    found = questions(dataclasses.replace(arc, paths=(f"{prepared}:train",)))
    texts = [(q.prompt, q.answers, q.label) for q in found]
    assert texts == [
        (q.prompt, q.answers, q.label) for q in questions(arc) if "Gas" not in q.prompt
    ]
    for path in (str(prepared), f"{prepared}:test"):
        with pytest.raises(InputError, match=f"put one behind the path: {prepared}:train"):
            questions(dataclasses.replace(arc, paths=(path,)))


def copy_prepared(prepared, folder, change):
    """A copy whose dataset_info.json is changed."""
    shutil.copytree(prepared, folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    change(info)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return f"{folder}:train"


def test_a_folder_in_another_format_or_with_lost_records(arc, prepared, tmp_path):
    def as_tfrecord(info):
        info["fileFormat"] = "tfrecord"

    def lose_a_record(info):  # which the package's Parquet writer does
        info["splits"][0]["shardLengths"] = ["3"]

    for change, message in (
        (as_tfrecord, "in the format tfrecord, which needs TensorFlow; prepare the data set again"),
        (lose_a_record, "record 3 of 3 cannot be read .*; prepare the data set again"),
    ):
        path = copy_prepared(prepared, tmp_path / change.__name__, change)
        with pytest.raises(InputError, match=message):
            questions(dataclasses.replace(arc, paths=(path,)))


def test_rows_of_training_do_not_depend_on_the_format(arc, tmp_path, tokenizer, model_config):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    parquet.write_table(pa.Table.from_pylist(ARC), tmp_path / "arc.parquet")
    other = dataclasses.replace(arc, paths=(str(tmp_path / "arc.parquet"),))
    rows = [load_task_rows(cfg, model_config, tokenizer).rows([0, 1, 2]) for cfg in (arc, other)]
    for one, two in zip(*rows, strict=True):
        np.testing.assert_array_equal(one, two)
