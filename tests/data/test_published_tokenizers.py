"""Folders of published tokenizers give transformers' ids, and say no where files contradict."""

import json
import shutil
import sys
import warnings

import pytest
from tokenizers import Tokenizer as Backend

from dials_jax.config import TextData
from dials_jax.data.text import pack_text
from dials_jax.data.tokenizer import Tokenizer, load_tokenizer
from dials_jax.data.tokenizer_files import backend_fingerprint
from dials_jax.errors import InputError
from tests.data import published

TEXTS = published.texts()


def auto(folder, **options):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)


def assert_alike(ours, theirs, texts=TEXTS):
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    for text, a, b in zip(texts, ours.encode_batch(texts), expected, strict=True):
        assert a == b, repr(text)
    for name, i in theirs.get_added_vocab().items():
        assert ours.token_to_id(name) == i and ours.is_added(i)
    for ids in expected[:80]:
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    published.gpt2(root / "gpt2")
    published.gpt2(root / "gpt2_two_files", complete=False)
    shutil.copytree(published.gpt2(root / "gpt2_json"), root / "x")
    for name in ("vocab.json", "merges.txt"):
        (root / "gpt2_json" / name).unlink()
    published.qwen2(root / "qwen2_slow")
    auto(published.qwen2(root / "qwen2_source")).save_pretrained(root / "qwen2")
    shutil.copy(root / "qwen2_source" / "config.json", root / "qwen2")
    published.qwen2(root / "qwen2_no_config")
    (root / "qwen2_no_config" / "tokenizer_config.json").unlink()
    published.llada(root / "llada")
    published.dream(root / "dream")
    return root


def test_there_are_many_texts():
    assert len(set(TEXTS)) >= 250


@pytest.mark.parametrize(
    "name",
    ["gpt2", "gpt2_two_files", "gpt2_json", "qwen2_slow", "qwen2", "qwen2_no_config", "llada"],
)
def test_ids_equal_those_of_transformers(folders, name):
    assert_alike(load_tokenizer(folders / name), auto(folders / name, trust_remote_code=False))


def test_dreams_own_class_is_qwen2s_and_its_code_is_not_run(folders):
    ours = load_tokenizer(folders / "dream")
    assert_alike(ours, auto(folders / "dream", tokenizer_type="qwen2"))
    assert ours.encode("<|mask|>") == [ours.token_to_id("<|mask|>")]
    digits = [ours.token_to_id(c) for c in "2024"]
    assert ours.encode("2024") == digits  # Qwen2 splits numbers, GPT-2 does not
    assert ours.encode("cafe\u0301") == ours.encode("café")  # NFC


def test_the_copy_for_documents_differs_in_names_only(folders):
    for name in ("gpt2", "dream", "llada"):
        tokenizer = load_tokenizer(folders / name)
        plain, added = tokenizer.for_documents(), set(tokenizer.backend.get_added_tokens_decoder())
        assert plain.fingerprint == tokenizer.fingerprint
        for text, ids in zip(TEXTS, plain.encode_batch(TEXTS), strict=True):
            assert not added & set(ids)
            if not added & set(tokenizer.encode(text)):
                assert ids == tokenizer.encode(text)
        assert plain.decode(plain.encode("<tool_call>[MASK]")) == "<tool_call>[MASK]"


def test_gpt2_is_one_tokenizer_in_whatever_files(folders, tmp_path):
    n = published.two_files(tmp_path / "bare", end_of_text=True)
    bare = load_tokenizer(tmp_path / "bare")
    assert (bare.token_to_id("[MASK]"), bare.vocab_size) == (n, n + 1)
    for name in ("gpt2", "gpt2_two_files", "gpt2_json"):
        found = load_tokenizer(folders / name)
        if name != "gpt2_json":  # it tells of offsets, too
            assert found.fingerprint == bare.fingerprint
        assert (found.token_to_id("[MASK]"), found.vocab_size) == (n, n + 1)
    # Without tokenizer_config.json, and without transformers.
    shutil.copy(folders / "gpt2" / "tokenizer.json", tmp_path / "bare")
    assert load_tokenizer(tmp_path / "bare").fingerprint == bare.fingerprint


def test_a_saved_tokenizer_needs_nothing_else(folders, tmp_path, monkeypatch):
    found = {name: load_tokenizer(folders / name) for name in ("gpt2", "dream", "llada", "qwen2")}
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    for name, tokenizer in found.items():
        tokenizer.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_without_transformers_a_published_folder_names_the_extra(folders, monkeypatch):
    monkeypatch.setattr("dials_jax.errors.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"tokenizers missing; pip install 'dials_jax\[data\]'"):
        load_tokenizer(folders / "dream")


def test_another_class_of_its_own_without_tokenizer_json_is_refused(tmp_path):
    folder = published.dream(tmp_path / "other")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    published.write(
        folder / "tokenizer_config.json", config | {"tokenizer_class": "OtherTokenizer"}
    )
    with pytest.raises(InputError, match=r"\(OtherTokenizer\), which is not run"):
        load_tokenizer(folder)
    # With it, all is told, and the class does not matter.
    source = load_tokenizer(published.dream(tmp_path / "dream"))
    source.save(folder)
    assert load_tokenizer(folder).encode_batch(TEXTS) == source.encode_batch(TEXTS)


def test_ids_that_are_not_those_of_the_files_are_refused(tmp_path):
    folder = published.qwen2(tmp_path / "holes")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    last = max(added, key=int)
    added[str(int(last) + 50)] = added.pop(last)  # transformers reads it as `last`
    published.write(folder / "tokenizer_config.json", config)
    (folder / "added_tokens.json").unlink()
    with pytest.raises(InputError, match=f"id {int(last) + 50}, but it would be read as {last}"):
        load_tokenizer(folder)


def test_added_tokens_take_no_id_in_use(tmp_path):
    n = published.two_files(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab["Ġthe"], holes = n + 5, n + 6  # as many tokens as before, and six ids unused
    published.write(tmp_path / "vocab.json", vocab)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_to_id("<|endoftext|>") == holes
    assert tokenizer.token_to_id("[MASK]") == holes + 1
    assert tokenizer.id_to_token(n + 5) == "Ġthe"
    assert tokenizer.encode(" the[MASK]") == [n + 5, holes + 1]
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(" the[MASK]") == [n + 5, holes + 1]
    # Where the package has given an id twice, there is no saying what it means.
    values = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    del values["model"]["vocab"]["<|endoftext|>"], values["model"]["vocab"]["[MASK]"]
    values["added_tokens"] = values["added_tokens"][:1]
    vocab = values["model"]["vocab"]
    rest = max(vocab.values())
    vocab["Ġthe"] = len(vocab)
    assert rest != len(vocab)
    published.write(tmp_path / "tokenizer.json", values)
    with pytest.raises(InputError, match=f"share the id {len(vocab)}"):
        load_tokenizer(tmp_path / "tokenizer.json")


# --------------------------------------------------------------------- what version 0.1 has packed


def before(folder):
    """The tokenizer that version 0.1 read: tokenizer.json, else GPT-2's rules."""
    from tokenizers import decoders, models, pre_tokenizers

    if (folder / "tokenizer.json").is_file():
        return Tokenizer(Backend.from_file(str(folder / "tokenizer.json")))
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    backend = Backend(models.BPE.from_file(*files))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "[MASK]"])
    return Tokenizer(backend)


def test_fingerprints_of_right_ids_stay(folders, tmp_path):
    published.two_files(tmp_path / "bare", end_of_text=True)
    for folder in (tmp_path / "bare", folders / "llada", folders / "gpt2_two_files"):
        assert load_tokenizer(folder).fingerprint == before(folder).fingerprint
        assert load_tokenizer(folder).misread is None
    for name in ("gpt2", "qwen2"):
        assert (
            backend_fingerprint(before(folders / name).backend)
            in load_tokenizer(folders / name).fingerprints
        )
    dream = load_tokenizer(folders / "dream")
    assert dream.misread == before(folders / "dream").fingerprint
    assert dream.misread not in dream.fingerprints


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat in 2024. " * 9)
    paths = (str(tmp_path / "text.txt"),)
    return TextData(paths=paths, length=16, cache=str(tmp_path / "cache"))


def old_rows(cfg, folder, eos_id):
    """Packs as version 0.1 did."""
    old = before(folder)
    old.fingerprints = (backend_fingerprint(old.backend),)
    found = old.for_documents()  # special names are text, others are not
    found.backend = Backend.from_str(old.backend.to_str())
    found.backend.encode_special_tokens = True
    found.fingerprints = old.fingerprints
    found.for_documents = lambda: found
    return pack_text(cfg, eos_id, None, found)


def test_packed_text_of_right_ids_is_taken_as_it_is(folders, text, monkeypatch):
    for name in ("gpt2", "llada", "qwen2"):
        tokenizer = load_tokenizer(folders / name)
        eos_id = tokenizer.token_to_id("<|endoftext|>")
        first = old_rows(text, folders / name, eos_id)
        with monkeypatch.context() as patch:
            patch.setattr("dials_jax.data.text._pack", None)
            again = pack_text(text, eos_id, None, tokenizer)
        assert again.fingerprint == first.fingerprint
        assert again.tokens.tolist() == first.tokens.tolist()


def test_packed_text_of_wrong_ids_is_packed_anew_and_named(folders, text, tmp_path):
    dream, qwen2 = (load_tokenizer(folders / name) for name in ("dream", "qwen2"))
    eos_id = qwen2.token_to_id("<|endoftext|>")
    first = old_rows(text, folders / "dream", eos_id)
    with pytest.warns(
        UserWarning, match=rf"{first.fingerprint}.npy was packed by version 0.1 with"
    ):
        again = pack_text(text, eos_id, None, dream)
    assert again.tokens.tolist() != first.tokens.tolist()
    (tmp_path / "text.txt").write_text("the cat <tool_call> sat on the mat in 2024. " * 9)
    first = old_rows(text, folders / "qwen2", eos_id)
    name = qwen2.token_to_id("<tool_call>")
    assert name in first.tokens
    with pytest.warns(
        UserWarning, match=rf"{first.fingerprint}.npy was packed by version 0.1 with"
    ):
        again = pack_text(text, eos_id, None, qwen2)
    assert name not in again.tokens
    with warnings.catch_warnings(action="error"):  # said once
        assert pack_text(text, eos_id, None, qwen2).fingerprint == again.fingerprint
    assert again.fingerprint != first.fingerprint


def test_packed_text_with_characters_left_out_is_refused(text, tmp_path, monkeypatch):
    """Version 0.1 packed it under the same name."""
    symbols = sorted(set("the cat sat on the mat in 024.".replace(" ", "Ġ")))
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    published.write(tmp_path / "vocab.json", vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = load_tokenizer(tmp_path)
    eos_id = tokenizer.token_to_id("<|endoftext|>")
    first = pack_text(text, eos_id, None, tokenizer)
    again = pack_text(text, eos_id, None, load_tokenizer(tmp_path))
    assert again.fingerprint == first.fingerprint  # a small alphabet is no fault
    (tmp_path / "text.txt").write_text("the cat sat on the mat in 2026. " * 9)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "check_spelling", lambda *_: None)
        pack_text(text, eos_id, None, load_tokenizer(tmp_path))
    with pytest.raises(InputError, match=r"text.txt: the tokenizer cannot encode '6'"):
        pack_text(text, eos_id, None, load_tokenizer(tmp_path))
