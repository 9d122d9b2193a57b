"""A tokenizer that is trained here is read by every reader, with ids that a model can take."""

import gzip
import json
from pathlib import Path

import pytest

from dials_jax.cli.tokenizer import tokenizer_command
from dials_jax.config import TextData
from dials_jax.data.chat import read_chat_templates
from dials_jax.data.tokenizer import check_tokenizer, load_tokenizer
from dials_jax.data.tokenizer_training import CHAT_TEMPLATE, model_ids, train_tokenizer
from dials_jax.errors import InputError
from dials_jax.export import export_model
from dials_jax.models.families import llada_small, mdlm_small
from dials_jax.sharding import make_mesh
from dials_jax.text import find_template
from dials_jax.training.run import prepare_run
from tests.conftest import init_params, small_config

TEXT = "the cat sat on the mat, and the cat sat on the hat. " * 4


@pytest.fixture
def text(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    with gzip.open(tmp_path / "texts" / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "zebra zebra zebra"}) + "\n")
    return str(tmp_path / "texts")


def test_every_text_comes_back_and_words_of_the_files_are_tokens(text, tmp_path):
    tokenizer = train_tokenizer([text], 280, tmp_path / "out")
    assert tokenizer.vocab_size == 280
    for word in ("the", " cat", " zebra"):
        assert len(tokenizer.encode(word)) < len(word)
    odd = "Größe \x00 日本 [MASK] <|endoftext|>"
    ids = tokenizer.for_documents().encode(odd)
    assert min(ids) > 2 and tokenizer.decode(ids) == odd
    assert tokenizer.encode("a[MASK]")[-1] == 2
    assert tokenizer.spells_all


def test_equal_text_gives_an_equal_tokenizer_and_readers_agree(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    """One folder may be given alone, as a text or a path."""
    given = {"a": [text], "b": text, "c": Path(text)}
    first, *others = (train_tokenizer(paths, 270, tmp_path / x) for x, paths in given.items())
    loaded = load_tokenizer(tmp_path / "a")
    assert {x.fingerprint for x in (first, *others)} == {loaded.fingerprint}
    assert load_tokenizer(tmp_path / "a" / "tokenizer.json").fingerprint == loaded.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "a"))
    assert theirs(TEXT + "[MASK]").input_ids == loaded.encode(TEXT + "[MASK]")
    special = theirs.mask_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert special == (2, 1, 0)


def test_the_command_prints_what_a_model_needs(text, tmp_path, capsys):
    out = str(tmp_path / "out")
    tokenizer_command(["train", "--text", text, "--vocab-size", "300", "--out", out, "--chat"])
    shown = capsys.readouterr().out
    ids = model_ids(out)
    assert ids.items() >= {"mask_id": 2, "eos_id": 1, "pad_id": 0, "eot_id": 4}.items()
    assert f"--model.vocab-size {ids['vocab_size']} --model.pad-id 0" in shown
    missing = 300 - ids["vocab_size"]
    assert missing > 0 and f"{missing} fewer tokens than asked for" in shown
    for make in (llada_small, mdlm_small):
        check_tokenizer(load_tokenizer(out), make(2, 64, **ids))
    assert read_chat_templates(out)["default"].startswith("{% for message")


@pytest.mark.parametrize(
    "paths, size, message",
    [
        (["nowhere"], 300, "nowhere is missing"),
        (["texts"], 259, "vocab_size=259 is too small: bytes and special tokens take 259"),
        (["empty.txt"], 300, "there is no text in 1 files"),
        (["odd.jsonl"], 300, "odd.jsonl:1: no field 'text'; did you mean 'txt'?"),
    ],
)
def test_what_is_wrong_is_a_line_and_nothing_is_written(
    paths, size, message, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "odd.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(InputError) as caught:
        train_tokenizer(paths, size, "out")
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_a_model_that_is_trained_with_it_keeps_names_and_template(text, tmp_path, train_config):
    train_tokenizer([text], 280, tmp_path / "tokenizer", chat=True)
    cfg = train_config(
        data=TextData(paths=(text,), tokenizer=str(tmp_path / "tokenizer"), length=8),
        model=small_config(num_layers=1, **model_ids(tmp_path / "tokenizer")),
    )
    prepare_run(cfg, make_mesh()).export(tmp_path, init_params(cfg.model))
    folder = export_model(tmp_path, tmp_path / "out")
    assert model_ids(folder) == model_ids(tmp_path / "tokenizer")
    assert find_template(tmp_path / "model") == find_template(folder) == CHAT_TEMPLATE


def test_an_existing_folder_stays(text, tmp_path):
    with pytest.raises(InputError, match="texts exists; name another folder"):
        train_tokenizer([text], 300, text)


def test_a_folder_without_a_mask_is_named(text, tmp_path):
    train_tokenizer([text], 270, tmp_path / "out")
    file = tmp_path / "out" / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"mask_token"', '"other"'))
    with pytest.raises(InputError, match="names no mask_token; add it"):
        model_ids(tmp_path / "out")
