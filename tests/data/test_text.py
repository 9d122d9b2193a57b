import dataclasses
import fcntl
import functools
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from dials_jax.config import CorpusData, TextData
from dials_jax.data import encoding, text
from dials_jax.data.batches import batch_at
from dials_jax.data.text import pack_text, packed_summary
from dials_jax.data.tokenizer import character_tokenizer
from dials_jax.errors import InputError

DOCUMENTS = ["abc", "", "hello world", "x" * 25]
EOS = 1


@pytest.fixture
def cfg(write_jsonl, tmp_path):
    path = write_jsonl([{"text": document} for document in DOCUMENTS])
    return TextData(paths=(path,), length=8, random_length_prob=0.0, cache=str(tmp_path / "cache"))


@pytest.fixture
def pack(tokenizer, model_config):
    return lambda cfg: pack_text(cfg, EOS, model_config.mask_id, tokenizer)


def stream(tokenizer):
    return [i for d in DOCUMENTS if d for i in [*tokenizer.encode(d), EOS]]


def test_rows_hold_the_documents_end_to_end(cfg, pack, tokenizer):
    data = pack(cfg)
    expected = stream(tokenizer)
    assert data.num_rows == len(expected) // 8
    assert data.tokens.ravel().tolist() == expected[: data.num_rows * 8]
    tokens, answer, valid = data.rows([2, 0])
    assert tokens[1].tolist() == expected[:8] and tokens[0].tolist() == expected[16:24]
    assert tokens.dtype == np.int32 and answer.all() and valid is None


def test_the_size_of_a_tokenising_batch_does_not_matter(cfg, pack, monkeypatch):
    first = np.array(pack(cfg).tokens)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1)
    again = pack(dataclasses.replace(cfg, cache=cfg.cache + "2"))
    np.testing.assert_array_equal(first, again.tokens)


def test_file_formats_give_the_same_rows(cfg, pack, tmp_path):
    lines = "".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS)
    (tmp_path / "same.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    folder = tmp_path / "documents"
    folder.mkdir()
    for i, document in enumerate(DOCUMENTS):
        (folder / f"{i}.txt").write_text(document)
    for path in (tmp_path / "same.jsonl.xz", folder):
        other = pack(dataclasses.replace(cfg, paths=(str(path),)))
        np.testing.assert_array_equal(pack(cfg).tokens, other.tokens)


def test_packing_happens_once_and_again_when_something_changes(cfg, pack, monkeypatch, tmp_path):
    first = pack(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(text, "_pack", lambda *_: pytest.fail("packed twice"))
        assert pack(cfg).fingerprint == first.fingerprint
    changed = [pack(dataclasses.replace(cfg, length=7))]
    records = [{"text": document} for document in [*DOCUMENTS[:-1], "y" * 25]]  # of equal size
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    changed.append(pack(cfg))
    other = character_tokenizer("".join(sorted(set("".join(DOCUMENTS) + "y"), reverse=True)))
    changed.append(pack_text(cfg, EOS, other.token_to_id("[MASK]"), other))
    assert len({first.fingerprint, *(data.fingerprint for data in changed)}) == 4
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix == ".tmp"]


@pytest.mark.parametrize("kind", ["npy", "json"])
@pytest.mark.parametrize("damage", [lambda x: x[:-9], lambda x: b"", lambda x: x[:-1] + b"\x7f"])
def test_damaged_rows_are_packed_again(damage, kind, cfg, pack):
    """A flipped bit would be another token, or one that no vocabulary has."""
    expected = np.array(pack(cfg).tokens)
    [packed] = Path(cfg.cache).glob(f"*.{kind}")
    packed.write_bytes(damage(packed.read_bytes()))
    np.testing.assert_array_equal(pack(cfg).tokens, expected)


def test_the_summary_counts_what_was_packed(cfg, pack, tokenizer):
    data = pack(cfg)
    summary = packed_summary(cfg, data)
    assert summary["documents"] == 3  # the empty one left nothing
    assert summary["tokens"] == len(stream(tokenizer))
    assert summary["rows"] == data.num_rows
    assert summary["files"] == list(cfg.paths)
    assert summary["tokenizer"] == tokenizer.fingerprint


def test_large_vocabularies_are_stored_in_four_bytes(cfg):
    small = character_tokenizer("".join(map(chr, range(32, 127))))
    large = character_tokenizer("".join(map(chr, [*range(32, 127), *range(0x10000, 0x20100)])))
    for tokenizer, itemsize in ((small, 2), (large, 4)):
        mask_id = tokenizer.token_to_id("[MASK]")
        assert pack_text(cfg, EOS, mask_id, tokenizer).tokens.itemsize == itemsize


def test_the_prompt_is_never_an_answer(cfg, pack):
    _, answer, valid = pack(dataclasses.replace(cfg, prompt_length=3)).rows([0, 1])
    assert not answer[:, :3].any() and answer[:, 3:].all() and valid is None


def test_random_lengths_cut_whole_batches_at_the_stated_rate(cfg, pack):
    data = pack(dataclasses.replace(cfg, prompt_length=3, random_length_prob=0.5))
    lengths = []
    for step in range(400):
        batch = batch_at(data, 0, step, 2)
        # None stands for no padding.
        valid = np.ones((2, 8), bool) if batch.valid is None else batch.valid
        (length,) = set(valid.sum(axis=1))
        keep = np.arange(8) < length
        assert (valid == keep).all()
        assert (batch.answer == (keep & (np.arange(8) >= 3))).all()
        assert (batch.tokens[:, length:] == EOS).all()
        assert batch.tokens.shape == (2, 8) and batch.tokens.dtype == np.int32
        lengths.append(length)
    assert set(lengths) == {4, 5, 6, 7, 8}
    # Half stay whole, and a fifth of the cut ones are "cut" to 8: 0.6 +- 4 standard errors.
    assert abs(np.mean(np.array(lengths) == 8) - 0.6) < 0.1
    share = batch_at(data, 0, 5, 2, process_index=1, process_count=2)
    np.testing.assert_array_equal(share.valid, batch_at(data, 0, 5, 2).valid[1:])


@pytest.mark.parametrize("kind", [TextData, functools.partial(CorpusData, folder="rows")])
@pytest.mark.parametrize("share", [-0.1, 1.5, 50.0])
def test_a_share_of_random_lengths_in_percent_is_refused(kind, share):
    with pytest.raises(InputError, match=rf"random_length_prob={share} must lie in \[0, 1\]"):
        kind(random_length_prob=share)


def test_the_name_of_the_mask_token_in_a_document_is_text(cfg, pack, write_jsonl, model_config):
    path = write_jsonl([{"text": "[MASK]" * 8}], "mask.jsonl")
    data = pack(dataclasses.replace(cfg, paths=(path,)))
    assert data.num_rows == 6 and not (data.tokens == model_config.mask_id).any()


@pytest.mark.parametrize(
    "record, message",
    [
        ({"txt": "a"}, r"bad\.jsonl:2: no field 'text'; did you mean 'txt'"),
        ({"text": 3}, r"bad\.jsonl:2: field 'text' is 3"),
    ],
)
def test_a_bad_record_is_named_and_leaves_nothing_behind(
    cfg, pack, write_jsonl, tmp_path, record, message
):
    path = write_jsonl([{"text": "good"}, record], "bad.jsonl")
    with pytest.raises(InputError, match=message):
        pack(dataclasses.replace(cfg, paths=(path,)))
    assert not list((tmp_path / "cache").iterdir())


def test_what_killed_packings_left_is_removed_and_nothing_else(cfg, pack):
    cache = Path(cfg.cache)
    cache.mkdir()
    name = f"{'0' * 16}.{'1' * 32}"
    living = f"{'0' * 16}.{'2' * 32}.part"
    others = {"notes.part", f"{'0' * 16}.part", f"{'3' * 16}.{'4' * 32}.txt", living}
    for file in (f"{name}.part", f"{name}.json", *others):
        (cache / file).write_text("")
    with (cache / living).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        data = pack(cfg)
    packed = {f"{data.fingerprint}.npy", f"{data.fingerprint}.json"}
    assert {p.name for p in cache.iterdir()} == others | packed


def test_a_packing_holds_a_lock_until_its_rows_have_their_name(cfg, pack, monkeypatch):
    """Otherwise another process would take its file for a dead one."""
    write, locked = text.write_json, []

    def look(path, values, digest):
        with Path(path).with_suffix(".part").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(path)
        write(path, values, digest)

    monkeypatch.setattr(text, "write_json", look)
    pack(cfg)
    assert len(locked) == 1


def test_a_file_that_another_process_took_for_dead_before_its_lock_is_made_anew(
    cfg, pack, monkeypatch
):
    lock, taken = fcntl.flock, []

    def late(file, how):
        if how == fcntl.LOCK_EX and not taken:
            taken.append(file.name)
            Path(file.name).unlink()
        lock(file, how)

    monkeypatch.setattr(text.fcntl, "flock", late)
    assert pack(cfg).num_rows > 0 and taken


def test_a_cache_that_cannot_be_written_is_an_input_error(cfg, pack, tmp_path):
    (tmp_path / "file").write_text("")
    for cache in ("file", "file/cache"):
        with pytest.raises(InputError, match=r"cannot be written to \(.*\); choose another cache"):
            pack(dataclasses.replace(cfg, cache=str(tmp_path / cache)))


def test_a_token_outside_of_the_vocabulary_is_not_trained_on(cfg, pack):
    data = pack(cfg)
    bad = dataclasses.replace(data, tokens=np.full((2, 8), data.vocab_size, "<u2"))
    for rows in (data, dataclasses.replace(bad, vocab_size=data.vocab_size + 1)):
        rows.rows([0, 1])
    with pytest.raises(InputError, match=f"hold token {data.vocab_size}, but the tokenizer has"):
        bad.rows([0, 1])


def test_bad_settings_and_too_little_text_are_input_errors(cfg, pack, tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfd")
    for change, message in [
        ({"prompt_length": 8}, "prompt_length=8"),
        ({"paths": ()}, "paths is empty"),
        ({"paths": (str(tmp_path / "short.txt"),)}, "do not fill one row"),
        ({"paths": (str(tmp_path / "latin.txt"),)}, "not UTF-8"),
    ]:
        with pytest.raises(InputError, match=message):
            pack(dataclasses.replace(cfg, **change))
