import dataclasses
import json

import pytest

from dials_jax.data.tokenizer import (
    Tokenizer,
    character_tokenizer,
    check_tokenizer,
    encode_pair,
    load_tokenizer,
)
from dials_jax.data.tokenizer_files import backend_fingerprint
from dials_jax.errors import InputError
from tests.data import published

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
    assert mask_id not in tokenizer.for_documents().encode(text)
    assert tokenizer.for_documents().decode(tokenizer.for_documents().encode(text)) == text
    assert tokenizer.for_documents().fingerprint == tokenizer.fingerprint


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


def harness_pair(tokenizer, prompt, answer):
    """What lm-evaluation-harness's `_encode_pair` does."""
    stripped = prompt.rstrip()
    whole = tokenizer.encode(prompt + answer)
    return tokenizer.encode(stripped), whole[len(tokenizer.encode(stripped)) :]


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE that learned to join signs, words and spaces as GPT-2's does."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    text = ["x =-5 y=-7 (-3) = -1 Answer:-4 the cat sat ::- --- 1000 10-10\n\n\nnot this\n"] * 3
    backend.train_from_iterator(text, trainer)
    return Tokenizer(backend)


PROMPTS = ("x =", "y=", "(", "Answer:", "Answer: ", "2-", "the c", "10", "\n", "x =\n\n", "é", "")
ANSWERS = ("-5", " -5", "5", "-", "--- 3)", "at", " cat sat", "00", "\n\nthis", "\u0301e", " é ")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_pair_loses_no_text_where_a_token_spans_the_cut(trained, prompt):
    for answer in ANSWERS:
        prompt_ids, answer_ids = encode_pair(trained, prompt, answer)
        assert trained.decode(prompt_ids + answer_ids) == prompt + answer
        assert prompt_ids == trained.encode(prompt.rstrip())  # one for all choices
        assert trained.decode(answer_ids) == prompt[len(prompt.rstrip()) :] + answer
        whole = trained.encode(prompt + answer)
        if whole[: len(prompt_ids)] == prompt_ids:
            assert (prompt_ids, answer_ids) == harness_pair(trained, prompt, answer)


def test_a_minus_sign_is_scored(trained):
    prompt_ids, answer_ids = encode_pair(trained, "x =", "-5")
    assert trained.encode("x =-5")[: len(prompt_ids)] != prompt_ids  # "=-" is a token
    assert trained.decode(answer_ids) == "-5"
    assert trained.decode(harness_pair(trained, "x =", "-5")[1]) == "5"


def test_a_cut_that_a_tokenizer_cannot_make_is_an_input_error():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    pieces = {"▁": 0, "▁foo": 1, "▁foobar": 2, "▁bar": 3}
    merges = [(a, b) for piece in ("▁foobar", "▁bar") for a, b in _merges(piece, pieces)]
    backend = Backend(models.BPE(pieces, list(dict.fromkeys(merges))))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert encode_pair(Tokenizer(backend), "foo", " bar") == ([1], [3])
    with pytest.raises(InputError, match="a token spans the end of the prompt 'foo' and the answ"):
        encode_pair(Tokenizer(backend), "foo", "bar")


def _merges(piece, pieces):
    """Merges that build a piece from its left, whose parts join `pieces`."""
    left = piece[0]
    for character in piece[1:]:
        for part in (character, left + character):
            pieces.setdefault(part, len(pieces))
        yield left, character
        left += character


def test_encoding_adds_no_special_tokens(bpe):
    from tokenizers.processors import TemplateProcessing

    bpe.backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 5)]
    )
    assert Tokenizer(bpe.backend).encode("ab") == [3]


def test_what_a_bpe_cannot_spell_is_named_not_left_out(bpe):
    assert bpe.encode("ab ab[MASK]") == [3, 4, 6]
    with pytest.raises(InputError, match="cannot encode '78c'"):
        bpe.encode_batch(["ab 7", "bc 78 ab"])
    with pytest.raises(InputError, match=r"cannot encode 'KMS\[\]'|cannot encode 'AKMS\[\]'"):
        bpe.for_documents().encode("ab[MASK]")
    assert bpe.encode("abb") == [3, 1]  # what was refused is not remembered as fine
    with pytest.raises(InputError, match="cannot encode '7'"):
        bpe.encode("7")


@pytest.mark.parametrize("character", ["é", "€", "😀", "\x00", "e\u0301"])
def test_one_missing_symbol_of_256_is_enough(tmp_path, character):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    [(piece, _)] = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(character)
    for missing in {*piece} - {"e"}:
        vocab = {s: i for i, s in enumerate(s for s in symbols if s != missing)}
        backend = Backend(models.BPE(vocab, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = Tokenizer(backend)
        assert len(tokenizer.encode("plain text 78")) == 13
        with pytest.raises(InputError, match="its BPE has no symbol"):
            tokenizer.encode(f"some {character}")


def test_a_bpe_of_characters_names_what_it_lacks_too():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    vocab = {"a": 0, "##b": 1, "a##b": 2}
    backend = Backend(models.BPE(vocab, [], continuing_subword_prefix="##"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert Tokenizer(backend).encode("ab a") == [0, 1, 0]
    with pytest.raises(InputError, match="cannot encode 'c'"):
        Tokenizer(backend).encode("ab ac")


def test_whole_vocabularies_are_not_searched(tmp_path):
    published.two_files(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer._spelling is None
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000, 7)]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_that_are_not_special_are_text_in_documents(bpe):
    bpe.backend.add_tokens(["abab", "  "])
    tokenizer = Tokenizer(bpe.backend)
    name, spaces = tokenizer.token_to_id("abab"), tokenizer.token_to_id("  ")
    assert tokenizer.encode("abab") == [name]
    assert tokenizer.for_documents().encode("abab") == [3, 3]
    assert tokenizer.for_documents().encode("ab  ab") == [
        3,
        spaces,
        3,
    ]  # no name, only a run of spaces
    assert tokenizer.for_documents().fingerprint == tokenizer.fingerprint
    # Version 0.1 read them as tokens, so its fingerprint is an earlier one.
    assert tokenizer.fingerprint != tokenizer.fingerprints[1] == backend_fingerprint(bpe.backend)
