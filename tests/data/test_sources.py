"""Every kind of data configuration becomes rows that fit the model, or one error, early."""

import dataclasses
import string

import pytest

from dials_jax.config import ArithmeticData, CorpusData, TaskData, TextData
from dials_jax.data import sources
from dials_jax.data.arithmetic import ArithmeticTask
from dials_jax.data.batches import batch_at
from dials_jax.data.sources import load_data_tokenizer, load_training_data
from dials_jax.data.tokenizer import character_tokenizer, load_tokenizer
from dials_jax.errors import InputError
from dials_jax.files import write_json


@pytest.fixture
def folder(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def text(tmp_path, write_jsonl):
    path = write_jsonl([{"text": "hello world " * 20}])
    return TextData(paths=(path,), length=16, cache=str(tmp_path / "cache"))


@pytest.fixture
def task(write_jsonl):
    path = write_jsonl(
        [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}], "task.jsonl"
    )
    return TaskData(paths=(path,), prompt_length=6, answer_length=4)


def test_arithmetic_brings_its_tokenizer(model_of):
    tokenizer = ArithmeticTask(ArithmeticData()).tokenizer
    data, found = load_training_data(ArithmeticData(num_items=40), model_of(tokenizer))
    assert data.num_rows == 40
    assert found.fingerprint == tokenizer.fingerprint


def test_text_and_tasks_take_the_models_tokenizer(text, task, model_config, folder, tokenizer):
    for cfg, length in ((text, 16), (task, 10)):
        data, found = load_training_data(cfg, model_config, folder)
        assert found.fingerprint == tokenizer.fingerprint
        assert batch_at(data, 0, 0, 2).tokens.shape == (2, length)


def test_a_tokenizer_in_the_configuration_goes_first(task, model_config, folder, tmp_path):
    cfg = dataclasses.replace(task, tokenizer=folder)
    assert load_training_data(cfg, model_config, str(tmp_path / "missing"))[0].num_rows == 2


def test_without_any_tokenizer_the_remedy_is_named(task, model_config):
    with pytest.raises(InputError, match="set tokenizer="):
        load_training_data(task, model_config)


def test_rows_that_do_not_fit_are_refused_before_text_is_packed(
    text, task, model_config, folder, monkeypatch
):
    def too_early(*args):
        raise AssertionError("read the data before checking the settings")

    monkeypatch.setattr(sources, "pack_text", too_early)
    monkeypatch.setattr(sources, "load_task_rows", too_early)
    for cfg in (
        dataclasses.replace(text, length=65),
        dataclasses.replace(task, prompt_length=61, answer_length=4),
    ):
        with pytest.raises(InputError, match="rows of 65 tokens do not fit the model's 64"):
            load_training_data(cfg, model_config, folder)


def test_a_model_without_an_end_of_text_is_refused_before_data_is_read(
    text, task, model_config, folder, monkeypatch
):
    monkeypatch.setattr(sources, "pack_text", None)
    monkeypatch.setattr(sources, "load_task_rows", None)
    endless = dataclasses.replace(model_config, causal=True, mask_id=None, eos_id=None)
    for cfg in (text, task):
        with pytest.raises(InputError, match="the model has no eos_id, and every text ends with"):
            load_training_data(cfg, endless, folder)


def test_a_tokenizer_without_the_mask_is_refused_before_text_is_packed(
    text, model_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "pack_text", None)
    character_tokenizer(string.digits).save(tmp_path / "small")
    with pytest.raises(InputError, match=f"no token mask_id={model_config.mask_id}"):
        load_training_data(text, model_config, str(tmp_path / "small"))


def test_the_datas_tokenizer_goes_before_the_models_and_the_corpus_has_one_too(
    task, folder, tmp_path
):
    own, other = character_tokenizer("0123456789+="), character_tokenizer("=+9876543210")
    own.save(tmp_path / "own")
    other.save(tmp_path / "corpus")
    write_json(
        tmp_path / "corpus" / "manifest.json",
        {
            "settings": {
                "length": 16, "packing": "mdlm", "num_validation": 0, "eos_id": 1,
                "tokenizer": other.fingerprint,
            },
            "splits": {
                "train": {
                    "rows": 1, "parts": [{"file": "train-00000.npy", "rows": 1, "sha256": ""}],
                },
            },
        },
    )  # fmt: skip
    named = dataclasses.replace(task, tokenizer=str(tmp_path / "own"))
    assert load_data_tokenizer(named, folder).fingerprint == own.fingerprint
    assert load_data_tokenizer(task, folder).fingerprint == load_tokenizer(folder).fingerprint
    corpus = CorpusData(folder=str(tmp_path / "corpus"), length=16, num_validation=0)
    assert load_data_tokenizer(corpus, folder).fingerprint == load_tokenizer(folder).fingerprint
    (tmp_path / "weights").mkdir()  # a model that came without a tokenizer
    for place in ("", str(tmp_path / "weights")):
        assert load_data_tokenizer(corpus, place).fingerprint == other.fingerprint
    with pytest.raises(InputError, match="weights has no tokenizer"):
        load_data_tokenizer(task, str(tmp_path / "weights"))
