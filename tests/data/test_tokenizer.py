import dataclasses
import json

import pytest

from dials_jax.config import InputError
from dials_jax.data.tokenizer import (
    Tokenizer,
    character_tokenizer,
    check_tokenizer,
    encode_pair,
    load_tokenizer,
)

VOCAB = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4, "<|endoftext|>": 5}  # Ġ is a space


@pytest.fixture
def bpe(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(VOCAB))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    return load_tokenizer(tmp_path)


def test_characters_survive_a_round_trip_without_spaces(tokenizer):
    text = "Add 3, 4\n = 7."
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_special_tokens_have_fixed_ids_and_are_not_decoded():
    tokenizer = character_tokenizer("xyx")
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["[PAD]", "[EOS]", "x", "y", "[MASK]"]
    assert tokenizer.vocab_size == 5
    assert tokenizer.decode([0, 2, 4, 3, 1]) == "xy"


def test_an_unknown_character_is_named_not_dropped():
    with pytest.raises(InputError, match="'é'"):
        character_tokenizer("ab").encode("abé")


def test_vocab_json_and_merges_become_byte_level_bpe_with_a_new_mask_token(bpe):
    assert bpe.encode("ab ab") == [3, 4]
    assert bpe.decode([3, 4, 5]) == "ab ab"
    assert bpe.token_to_id("<|endoftext|>") == 5
    assert bpe.token_to_id("[MASK]") == 6
    assert bpe.vocab_size == 7


def test_a_saved_tokenizer_encodes_alike_from_file_and_folder(bpe, tmp_path):
    bpe.save(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == bpe.fingerprint
        assert loaded.encode("ab ab[MASK]") == bpe.encode("ab ab[MASK]") == [3, 4, 6]


def test_fingerprints_differ_between_vocabularies():
    assert character_tokenizer("ab").fingerprint != character_tokenizer("ba").fingerprint


def test_settings_of_the_file_that_cut_or_pad_are_ignored(bpe, tmp_path):
    bpe.backend.enable_truncation(1)
    bpe.backend.enable_padding(length=8)
    bpe.backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("ab ab") == [3, 4]


def test_a_plain_tokenizer_reads_names_of_special_tokens_as_text(tokenizer):
    text = "a [MASK]"
    mask_id = tokenizer.token_to_id("[MASK]")
    assert mask_id in tokenizer.encode(text)
    assert mask_id not in tokenizer.plain().encode(text)
    assert tokenizer.plain().decode(tokenizer.plain().encode(text)) == text
    assert tokenizer.plain().fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("content", [None, "not JSON"])
def test_a_missing_or_broken_tokenizer_is_an_input_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(path)
    with pytest.raises(InputError, match="no tokenizer is given"):
        load_tokenizer("")


def test_model_and_tokenizer_must_belong_together(tokenizer, model_config):
    check_tokenizer(tokenizer, model_config)
    n = tokenizer.vocab_size
    wider = dataclasses.replace(model_config, vocab_size=n + 9)
    check_tokenizer(tokenizer, wider)
    # A model that has no [MASK] needs no row for it: the last id, which text is never spelt with.
    check_tokenizer(
        tokenizer, dataclasses.replace(wider, causal=True, mask_id=None, vocab_size=n - 1)
    )
    for change, message in [
        ({"mask_id": n + 1}, f"no token mask_id={n + 1}"),
        ({"eos_id": n + 2}, f"no token eos_id={n + 2}"),
        ({"mask_id": 5}, "mask_id=5 is the ordinary token"),
        ({"vocab_size": n - 2, "mask_id": None, "causal": True}, f"only vocab_size={n - 2}"),
        ({"vocab_size": n - 1, "mask_id": 0}, f"only vocab_size={n - 1}"),
    ]:
        with pytest.raises(InputError, match=message):
            check_tokenizer(tokenizer, dataclasses.replace(wider, **change))


def test_trailing_spaces_of_a_prompt_move_to_the_answer(bpe):
    # Apart, the space would be a token of its own; together it merges with the next word.
    assert encode_pair(bpe, "ab ", "ab") == ([3], [4])
    assert encode_pair(bpe, "ab", " ab") == ([3], [4])


@pytest.mark.parametrize(
    "prompt, answer", [("Q: 3?\n", "yes"), ("Q: 3?  ", " yes"), ("", "yes"), ("Q", "")]
)
def test_a_pair_joins_to_the_whole_text(tokenizer, prompt, answer):
    prompt_ids, answer_ids = encode_pair(tokenizer, prompt, answer)
    assert prompt_ids + answer_ids == tokenizer.encode(prompt + answer)
    assert tokenizer.decode(prompt_ids) == prompt.rstrip()


def test_encoding_adds_no_special_tokens(bpe):
    from tokenizers.processors import TemplateProcessing

    bpe.backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 5)]
    )
    assert Tokenizer(bpe.backend).encode("ab") == [3]
