"""A corpus is prepared once, by a process that may stop anywhere, and read by any reader alike."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dials_jax.config import CorpusData, EvalTask, TextData
from dials_jax.data import arrayrecord, corpus, documents, packing
from dials_jax.data import prepare as preparing
from dials_jax.data.batches import batch_at
from dials_jax.data.corpus import load_corpus
from dials_jax.data.encoding import EncodedPiece
from dials_jax.data.prepare import prepare_corpus
from dials_jax.data.records import file_sha256
from dials_jax.data.sources import load_training_data
from dials_jax.data.text import pack_text
from dials_jax.errors import InputError
from dials_jax.evaluation.items import load_items
from dials_jax.files import read_json

ROOT = Path(__file__).parents[2]
EOS = 1
DOCUMENTS = ["hello world", "", "abc", "x" * 25, *(f"document {i} of many" for i in range(43))]
HAS_RECORDS = not arrayrecord.missing_grain_packages()
needs_records = pytest.mark.skipif(not HAS_RECORDS, reason="needs Grain and tensorflow-datasets")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Batches of 4 documents and parts of 8, so that 47 documents make several of each."""
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(preparing, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(preparing, "PART_BATCHES", 2)


@pytest.fixture
def cfg(tmp_path, tokenizer, write_jsonl):
    tokenizer.save(tmp_path / "tokenizer")
    path = write_jsonl([{"text": document} for document in DOCUMENTS])
    return CorpusData(
        folder=str(tmp_path / "corpus"), paths=(path,), tokenizer=str(tmp_path / "tokenizer"),
        length=16, num_validation=9, reader="numpy",
    )  # fmt: skip


def all_rows(cfg, tokenizer, split="train"):
    data = load_corpus(dataclasses.replace(cfg, split=split), EOS, tokenizer)
    return data.rows(range(data.num_rows))[0]


def files_of(folder):
    """Content by name, but for what depends on dates."""
    paths = [p for p in Path(folder).rglob("*") if p.is_file() and "array_record" not in str(p)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != "files.json"}


def expected_mdlm(tokenizer, texts, length):
    """Written from the description: 4 documents at a time, pieces of length - 2 between EOS."""
    rows = []
    for first in range(0, len(texts), 4):
        ids = [i for d in texts[first : first + 4] for i in [*tokenizer.encode(d), EOS]]
        for start in range(0, len(ids) - (length - 2) + 1, length - 2):
            rows.append([EOS, *ids[start : start + length - 2], EOS])
    return rows


def encoded(*documents):
    return [EncodedPiece(ids, True, is_empty_document=len(ids) == 1) for ids in documents]


def test_rows_by_hand():
    dtype, pieces = np.dtype("<u2"), encoded([5, 6, 7, 1], [1], [8, 9, 1], [4, 1])
    expected = [[1, 5, 6, 7, 1], [1, 1, 1, 8, 1], [1, 9, 1, 4, 1]]
    rows, rest = packing.pack_mdlm(pieces, [], 5, EOS, dtype)
    assert rows.tolist() == expected and rest == [1] and rows.dtype == dtype
    assert packing.pack_mdlm(encoded([4, 1]), [], 5, EOS, dtype)[0].shape == (0, 5)
    rows, rest = packing.pack_stream(pieces, [2, 3], 5, EOS, dtype)
    assert rows.tolist() == [[2, 3, 5, 6, 7], [1, 8, 9, 1, 4]] and rest == [1]


def test_pieces_of_a_document_give_the_rows_of_the_whole():
    dtype = np.dtype("<u2")
    whole = encoded([5, 6, 7, 8, 1], [1], [9, 1])
    parts = [
        [EncodedPiece([5], False, False)],
        [EncodedPiece([6, 7, 8], False, False), EncodedPiece([1], True, False), *whole[1:]],
    ]
    for rows_of in (packing.pack_mdlm, packing.pack_stream):
        expected, expected_rest = rows_of(whole, [], 4, EOS, dtype)
        found, rest = [], []
        for pieces in parts:
            rows, rest = rows_of(pieces, rest, 4, EOS, dtype)
            found += rows.tolist()
        assert found == expected.tolist() and rest == expected_rest


def test_rows_are_written_as_numpy_saves_them(tmp_path):
    """So that a prepared folder is the same whichever version began it."""
    rows = np.arange(30, dtype="<u2").reshape(6, 5)
    for batches in ([rows[:4], rows[4:]], []):
        with (tmp_path / "rows.npy").open("wb") as out:
            sums = packing.write_rows(out, batches, 5, rows.dtype)
            assert len(sums) == sum(map(len, batches))
        np.save(tmp_path / "expected.npy", np.concatenate([rows[:0], *batches]))
        assert (tmp_path / "rows.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_mdlm_packing_splits_off_the_last_documents(cfg, model_config, tokenizer):
    manifest = prepare_corpus(cfg, model_config)
    for name, texts in (("train", DOCUMENTS[:-9]), ("validation", DOCUMENTS[-9:])):
        expected = expected_mdlm(tokenizer, texts, 16)
        assert all_rows(cfg, tokenizer, name).tolist() == expected
        split = manifest["splits"][name]
        assert (split["documents"], split["rows"]) == (len(texts), len(expected))
        assert split["tokens"] == sum(len(tokenizer.encode(d)) + 1 for d in texts)


def test_stream_packing_equals_the_packing_of_small_texts(cfg, model_config, tokenizer):
    cfg = dataclasses.replace(cfg, packing="stream", num_validation=0)
    assert list(prepare_corpus(cfg, model_config)["splits"]) == ["train"]
    small = TextData(paths=cfg.paths, length=16, cache=cfg.folder + "-cache")
    expected = pack_text(small, EOS, model_config.mask_id, tokenizer)
    np.testing.assert_array_equal(all_rows(cfg, tokenizer), expected.tokens)


@pytest.mark.parametrize("packing_name", ["mdlm", "stream"])
def test_stopped_at_any_rename_it_continues_to_the_same_bytes(
    cfg, model_config, monkeypatch, packing_name
):
    cfg = dataclasses.replace(cfg, packing=packing_name)
    prepare_corpus(cfg, model_config)
    stopped = dataclasses.replace(cfg, folder=cfg.folder + "-stopped")
    replace, budget = Path.replace, [0]

    def failing(path, target):
        if budget[0] == 0:
            raise KeyboardInterrupt
        budget[0] -= 1
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    for stops in range(40):
        # Two renames note the files and the settings; a part has three: rows, sums, note.
        budget[0] = 2 + min(stops + 1, 4)
        with contextlib.suppress(KeyboardInterrupt):
            prepare_corpus(stopped, model_config)
            break
        with pytest.raises(InputError, match=r"is (only half|not) prepared"):
            corpus.read_manifest(stopped)
    assert 5 < stops < 39
    assert files_of(stopped.folder) == files_of(cfg.folder)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.conftest import small_config
from dials_jax.config import CorpusData, from_dict
from dials_jax.data import packing, prepare as preparing
from dials_jax.files import read_json
import json
packing.BATCH_DOCUMENTS = preparing.BATCH_DOCUMENTS = 4
preparing.PART_BATCHES = 2
cfg = from_dict(CorpusData, json.loads(sys.argv[1]))
write = preparing.write_rows
def save(file, *rest):
    if "train-00003" in file.name:
        file.write(b"half of a part")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, *rest)
preparing.write_rows = save
preparing.prepare_corpus(cfg, small_config(vocab_size=99, mask_id=int(sys.argv[2]), eos_id=1))
"""


def test_killed_while_it_writes_it_continues_to_the_same_bytes(cfg, model_config, monkeypatch):
    killed = dataclasses.replace(cfg, folder=cfg.folder + "-killed")
    settings = json.dumps(dataclasses.asdict(killed))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, settings, str(model_config.mask_id)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    written = sorted(p.name for p in (Path(killed.folder) / "parts").glob("train-*.json"))
    assert written == [f"train-{i:05d}.json" for i in range(3)]
    counted = []
    encode = preparing.encode_documents

    def encode_counted(documents, *rest):
        documents = list(documents)
        counted.extend(documents)
        return encode(documents, *rest)

    monkeypatch.setattr(preparing, "encode_documents", encode_counted)
    prepare_corpus(killed, model_config)
    # What was finished, validation and three parts, is not tokenised again.
    assert len(counted) == len(DOCUMENTS) - 9 - 3 * 8
    prepare_corpus(cfg, model_config)
    assert files_of(killed.folder) == files_of(cfg.folder)


def test_a_validation_split_that_fills_no_row_is_known_before_the_training_split(cfg, model_config):
    cfg = dataclasses.replace(cfg, length=64, num_validation=1)
    with pytest.raises(InputError, match=r"validation: .* do not fill one row of length=64"):
        prepare_corpus(cfg, model_config)
    assert not list((Path(cfg.folder) / "parts").glob("train-*"))


def test_the_corpus_is_read_once_for_each_split(cfg, model_config, monkeypatch):
    """Not once for each part, which would be quadratic."""
    read, calls = documents.read_documents, []
    monkeypatch.setattr(
        documents, "read_documents", lambda path, field: calls.append(path) or read(path, field)
    )
    prepare_corpus(cfg, model_config)
    assert len(calls) == 1 + 2  # the survey, training and validation
    calls.clear()
    prepare_corpus(cfg, model_config)
    assert not calls


def test_a_part_holds_what_it_held_when_it_was_written(cfg, model_config):
    prepare_corpus(cfg, model_config)
    before = files_of(cfg.folder)
    prepare_corpus(cfg, model_config)  # verifies
    assert files_of(cfg.folder) == before
    path = Path(cfg.folder) / "parts" / "train-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train-00001\.npy is damaged; delete its \.json"):
        prepare_corpus(cfg, model_config)
    path.with_suffix(".json").unlink()
    prepare_corpus(cfg, model_config)
    assert files_of(cfg.folder) == before


@pytest.mark.parametrize("part", ["train-00001", "train-00004"])
def test_a_flipped_bit_of_any_row_is_not_trained_on(cfg, model_config, part, monkeypatch):
    prepare_corpus(cfg, model_config)
    load_training_data(cfg, model_config)
    path = Path(cfg.folder) / "parts" / f"{part}.npy"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{part}\.npy is damaged; delete its \.json and run"):
        load_training_data(cfg, model_config)
    path.with_suffix(".json").unlink()
    prepare_corpus(cfg, model_config)
    load_training_data(cfg, model_config)


def test_every_row_is_read_once_to_verify_and_again_when_its_file_changes(
    cfg, model_config, monkeypatch
):
    read = []
    monkeypatch.setattr(
        corpus, "file_sha256", lambda path: read.append(path.name) or file_sha256(path)
    )
    prepare_corpus(cfg, model_config)
    train = [f"train-{i:05d}.npy" for i in range(5)]
    assert sorted(x for x in read if x.endswith(".npy")) == [
        *train, "validation-00000.npy", "validation-00001.npy"
    ]  # fmt: skip
    for split in ("train", "validation"):
        read.clear()
        load_training_data(dataclasses.replace(cfg, split=split), model_config)
        assert read == []  # noted when it was prepared
    read.clear()
    os.utime(Path(cfg.folder) / "parts" / train[2])
    for expected in ([train[2]], []):
        load_training_data(cfg, model_config)
        assert [x for x in read if x.endswith(".npy")] == expected
        read.clear()
    (Path(cfg.folder) / "files.json").write_text("half of")  # or of a version without such notes
    monkeypatch.setattr(
        corpus, "write_json", lambda *_, **__: (_ for _ in ()).throw(OSError("closed"))
    )
    for _ in range(2):  # a folder that is only read: again at every start
        load_training_data(cfg, model_config)
        assert [x for x in read if x.endswith(".npy")] == train
        read.clear()


def flip_a_bit(path, place):
    """As a disk does it: size and date stay."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 4
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("suffix", [".npy", ".crc"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_flipped_bit_shows_when_its_row_is_read(cfg, model_config, suffix, opened):
    """Also one that no date tells of, and one that comes while a training reads the rows."""
    prepare_corpus(cfg, model_config)
    data, _ = load_training_data(cfg, model_config)
    path = Path(cfg.folder) / "parts" / f"train-00001{suffix}"
    if suffix == ".npy" or not opened:  # sums are in memory once the rows are open
        flip_a_bit(path, path.stat().st_size - 2)
        data = data if opened else load_training_data(cfg, model_config)[0]
        data.rows(np.arange(3))
        with pytest.raises(InputError, match=r"train-00001\.npy, or .*is damaged; delete its"):
            data.rows(np.arange(data.num_rows))
        with pytest.raises(InputError, match=f"train-00001{suffix} is damaged; delete its .json"):
            prepare_corpus(cfg, model_config)


def test_rows_without_sums_are_those_of_an_earlier_version(cfg, model_config):
    prepare_corpus(cfg, model_config)
    before = load_training_data(cfg, model_config)[0]
    for file in (Path(cfg.folder) / "parts").glob("*.crc"):
        file.unlink()
    after = load_training_data(cfg, model_config)[0]
    everything = np.arange(before.num_rows)
    assert np.array_equal(before.rows(everything)[0], after.rows(everything)[0])


def edited(manifest, path, value):
    *inner, last = path
    for name in inner:
        manifest = manifest[name]
    if value is None:
        del manifest[last]
    else:
        manifest[last] = value


@pytest.mark.parametrize("name", ["../../outside.npy", "/outside.npy", "..", "", 3, "a/b.npy"])
def test_a_part_lies_in_its_folder(cfg, model_config, name):
    prepare_corpus(cfg, model_config)
    path = Path(cfg.folder) / "manifest.json"
    manifest = read_json(path)
    manifest["splits"]["train"]["parts"][0]["file"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json is damaged; run prepare\.py again"):
        load_training_data(cfg, model_config)
    prepare_corpus(cfg, model_config)  # which writes it anew
    load_training_data(cfg, model_config)
    note = Path(cfg.folder) / "parts" / "train-00000.json"
    note.write_text(json.dumps({**read_json(note), "file": name}))
    with pytest.raises(InputError, match=r"train-00000\.json is damaged; delete it and run"):
        prepare_corpus(cfg, model_config)


@pytest.mark.parametrize("value", [None, [], "7", -1, {"a": 1}])
@pytest.mark.parametrize(
    "path",
    [
        ("splits",), ("splits", "train"), ("splits", "train", "parts"), ("splits", "train", "rows"),
        ("splits", "train", "parts", 1), ("splits", "train", "parts", 1, "rows"), ("settings",),
        ("splits", "train", "parts", 1, "sha256"), ("settings", "tokenizer"),
        ("settings", "eos_id"), ("settings", "length"),
    ],
)  # fmt: skip
def test_an_edited_manifest_is_one_line(cfg, model_config, path, value):
    prepare_corpus(cfg, model_config)
    file = Path(cfg.folder) / "manifest.json"
    manifest = read_json(file)
    edited(manifest, path, value)
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError) as error:
        load_training_data(cfg, model_config)
    assert "\n" not in str(error.value)


def test_rows_of_another_kind_are_one_line(cfg, model_config):
    """Though their digest is the manifest's."""
    prepare_corpus(cfg, model_config)
    manifest = corpus.read_manifest(cfg)
    [part, *_] = manifest["splits"]["train"]["parts"]
    path = Path(cfg.folder) / "parts" / part["file"]
    for rows in (np.zeros((part["rows"], 16)), np.zeros((part["rows"], 15), "u2"), np.zeros(3)):
        np.save(path, rows)
        part["sha256"] = file_sha256(path)
        (Path(cfg.folder) / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=r"instead of .* rows of 16 tokens"):
            load_training_data(cfg, model_config)


@pytest.mark.parametrize("notes", ["half of", "[]", '{"parts/": 3}', None])
def test_notes_on_files_are_only_a_help(cfg, model_config, notes):
    manifest = prepare_corpus(cfg, model_config)
    path = Path(cfg.folder) / "files.json"
    path.write_text(notes or json.dumps({**read_json(path), cfg.paths[0]: 3}))
    load_training_data(cfg, model_config)
    assert prepare_corpus(cfg, model_config) == manifest


def test_a_folder_in_the_place_of_a_file_is_one_line(cfg, model_config):
    prepare_corpus(cfg, model_config)
    path = Path(cfg.folder) / "tokenizer.json"
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"not prepared \(Is a directory: .*tokenizer\.json\)"):
        prepare_corpus(cfg, model_config)
    path.rmdir()
    prepare_corpus(cfg, model_config)
    assert path.read_bytes() == content


@needs_records
def test_damaged_records_are_one_line_and_import_nothing(cfg, model_config):
    cfg = dataclasses.replace(cfg, reader="grain", num_validation=0)
    prepare_corpus(cfg, model_config)
    folder = Path(cfg.folder) / "array_record"
    features = folder / "features.json"
    original = features.read_text()
    for module in (
        "wave.Wave",
        "tensorflow_datasets.core.features.wave",
        "tensorflow_datasets.x.Y",
    ):
        sys.modules.pop("wave", None)
        features.write_text(re.sub(r"tensorflow_datasets[\w.]*\.Tensor\b", module, original))
        assert features.read_text() != original
        with pytest.raises(InputError, match=r"features\.json names .*; delete the folder and run"):
            load_training_data(cfg, model_config)
        assert "wave" not in sys.modules
    features.write_text(original)
    data, _ = load_training_data(cfg, model_config)
    [path] = folder.glob("*array_record-0*")
    content = bytearray(path.read_bytes())
    middle = content.index(data.tokens[np.array([0])].tobytes()[:8])
    content[middle] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"array_record cannot be read \(.*hash mismatch"):
        load_training_data(cfg, model_config)[0].rows(range(data.num_rows))


def test_a_folder_that_cannot_be_written_is_one_line(cfg, model_config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/corpus"):
        with pytest.raises(InputError, match=r"no folder that can be written to"):
            prepare_corpus(dataclasses.replace(cfg, folder=str(tmp_path / folder)), model_config)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "parts/train-00000.tmp")

    monkeypatch.setattr(preparing, "write_rows", full)
    with pytest.raises(
        InputError, match=r"not prepared \(No space left .*train-00000\.tmp\); mend"
    ):
        prepare_corpus(cfg, model_config)


def test_batches_do_not_depend_on_the_number_of_processes(cfg, model_config):
    prepare_corpus(cfg, model_config)
    data, _ = load_training_data(cfg, model_config)
    for step in (0, 7):
        whole = batch_at(data, 3, step, 8)
        shares = [batch_at(data, 3, step, 8, p, 4) for p in range(4)]
        np.testing.assert_array_equal(whole.tokens, np.concatenate([s.tokens for s in shares]))
        assert whole.tokens.dtype == np.int32 and whole.valid is None and whole.answer.all()


@needs_records
def test_grain_and_the_memory_map_give_equal_batches(cfg, model_config):
    cfg = dataclasses.replace(cfg, reader="grain")
    prepare_corpus(cfg, model_config)
    for split in ("train", "validation"):
        grain = dataclasses.replace(cfg, split=split)
        mapped = dataclasses.replace(grain, reader="numpy")
        (a, _), (b, _) = (load_training_data(c, model_config) for c in (grain, mapped))
        assert type(a.tokens) is arrayrecord.ArrayRecordRows and type(b.tokens) is corpus.PartRows
        assert a.num_rows == b.num_rows and a.fingerprint == b.fingerprint
        for step in range(3):
            for x, y in zip(batch_at(a, 0, step, 8), batch_at(b, 0, step, 8), strict=True):
                np.testing.assert_array_equal(x, y)
    splits = dataclasses.replace(cfg, split="train", reader="auto")
    assert type(load_training_data(splits, model_config)[0].tokens) is arrayrecord.ArrayRecordRows
    assert not (Path(cfg.folder) / "array_record.tmp").exists()


@needs_records
def test_array_record_can_be_added_later_and_is_verified(cfg, model_config, monkeypatch):
    prepare_corpus(cfg, model_config)
    grain = dataclasses.replace(cfg, reader="grain")
    with pytest.raises(InputError, match=r"array_record is missing; run prepare\.py again"):
        load_training_data(grain, model_config)
    with monkeypatch.context() as patch:
        patch.setattr(arrayrecord, "require_equal_ends", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # stopped before the folder got its name
            prepare_corpus(grain, model_config)
    assert not (Path(cfg.folder) / "array_record").exists()
    prepare_corpus(grain, model_config)
    data, _ = load_training_data(grain, model_config)
    with pytest.raises(InputError, match=r"holds .* rows, or other ones"):
        arrayrecord.require_equal_ends(data.tokens, data.tokens[np.arange(3)], "here")
    monkeypatch.setattr(arrayrecord, "_builder", lambda *_: pytest.fail("written twice"))
    prepare_corpus(grain, model_config)


def test_without_the_packages_numpy_serves_and_grain_is_refused(
    cfg, model_config, monkeypatch, capsys
):
    monkeypatch.setattr(
        arrayrecord.importlib.util, "find_spec", lambda name: None if name == "grain" else 1
    )
    auto = dataclasses.replace(cfg, reader="auto")
    prepare_corpus(auto, model_config)
    assert "grain is not installed; the .npy parts are read instead" in capsys.readouterr().out
    assert type(load_training_data(auto, model_config)[0].tokens) is corpus.PartRows
    for command in (prepare_corpus, load_training_data):
        with pytest.raises(InputError, match=r"needs grain; pip install 'dials_jax\[data\]'"):
            command(dataclasses.replace(cfg, reader="grain"), model_config)


def test_files_that_cannot_be_read_are_named_counted_and_skipped_only_when_asked(
    cfg, model_config, tokenizer, tmp_path, capsys
):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, document in enumerate(DOCUMENTS):
        (folder / f"{i:03d}.txt").write_text(document)
    (folder / "900.txt").write_bytes(b"\xff\xfe\xfd")
    (folder / "901.jsonl.gz").write_bytes(b"no archive")
    (folder / "902.jsonl").write_text('{"text": "good"}\n{"text": "\\ud800"}\n')
    cfg = dataclasses.replace(cfg, paths=(str(folder),))
    with pytest.raises(InputError) as error:
        prepare_corpus(cfg, model_config)
    assert str(error.value).startswith(f"3 of {len(DOCUMENTS) + 3} files cannot be read: ")
    for part in ("900.txt is not UTF-8", "901.jsonl.gz:1", "902.jsonl:2", "skip_bad_files=True"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    manifest = prepare_corpus(dataclasses.replace(cfg, skip_bad_files=True), model_config)
    assert [Path(p).name for p in manifest["skipped"]] == ["900.txt", "901.jsonl.gz", "902.jsonl"]
    assert "3 of 50 files" in capsys.readouterr().err
    expected = expected_mdlm(tokenizer, DOCUMENTS[:-9], 16)
    assert all_rows(cfg, tokenizer).tolist() == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"length": 8}, "prepared with length=16, not 8"),
        ({"packing": "stream"}, "prepared with packing='mdlm', not 'stream'"),
        ({"num_validation": 3}, "prepared with num_validation=9, not 3"),
        ({"dataset": "x/y", "paths": ()}, "prepared with dataset='', not 'x/y'"),
        (
            {"folder": "nowhere"},
            r"nowhere is not prepared \(it has no manifest\.json\); run prepare\.py",
        ),
    ],
)
def test_a_folder_made_otherwise_is_refused(cfg, model_config, change, message):
    prepare_corpus(cfg, model_config)
    other = dataclasses.replace(cfg, **change)
    with pytest.raises(InputError, match=message):
        load_training_data(other, model_config)
    if not {"folder", "dataset"} & change.keys():
        with pytest.raises(InputError, match=r"was begun with .*; choose another folder"):
            prepare_corpus(other, model_config)


def test_another_tokenizer_corpus_or_end_of_text_is_refused(cfg, model_config, tmp_path):
    prepare_corpus(cfg, model_config)
    path = Path(cfg.tokenizer) / "tokenizer.json"
    original = path.read_text()
    path.write_text(original.replace('"a":2,', '"¤":2,').replace('"a": 2,', '"¤": 2,'))
    assert path.read_text() != original
    with pytest.raises(InputError, match="was prepared with another tokenizer; take"):
        load_training_data(cfg, model_config)
    path.write_text(original)
    with pytest.raises(InputError, match="eos_id=1, but the model has 0"):
        load_training_data(cfg, dataclasses.replace(model_config, eos_id=0))
    documents = Path(cfg.paths[0]).read_text()
    for changed in ('{"text": "something else"}\n' * 47, documents.replace("hello", "jello")):
        Path(cfg.paths[0]).write_text(documents)
        prepare_corpus(cfg, model_config)
        Path(cfg.paths[0]).write_text(changed)  # the second is of the same size
        with pytest.raises(InputError, match="was begun with source="):
            prepare_corpus(cfg, model_config)
    # The folder alone is enough to train: neither the corpus nor the tokenizer need be there.
    moved = dataclasses.replace(cfg, tokenizer="", paths=("gone",))
    assert load_training_data(moved, model_config)[0].num_rows > 0


def test_corpora_that_cannot_be_prepared_are_one_line(cfg, model_config):
    for change, message in [
        ({"paths": ()}, "give either dataset= .* or paths="),
        ({"dataset": "x/y"}, "not both or neither"),
        ({"num_validation": 47}, "num_validation=47 leaves nothing of 47 documents"),
        ({"length": 64, "num_validation": 1}, "do not fill one row of length=64"),
        ({"text_field": "txet"}, "no field 'txet'; did you mean 'text'"),
        ({"tokenizer": ""}, "no tokenizer is given"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare_corpus(dataclasses.replace(cfg, **change), model_config)
    with pytest.raises(InputError, match="length=2 must be more than 2"):
        dataclasses.replace(cfg, length=2)


def test_the_validation_split_can_be_evaluated(cfg, model_config, tokenizer):
    prepare_corpus(cfg, model_config)
    data = dataclasses.replace(cfg, split="validation", prompt_length=4)
    task = EvalTask(name="corpus", metric="nelbo", data=data, limit=2)
    items = load_items(task, tokenizer, model_config)
    rows = [[*item.prompt, *item.answers[0]] for item in items]
    assert rows == all_rows(cfg, tokenizer, "validation")[:2].tolist()
    assert len(items[0].prompt) == 4


def test_causal_models_need_no_mask(cfg, model_config, tokenizer):
    causal = dataclasses.replace(
        model_config, causal=True, mask_id=None, vocab_size=tokenizer.num_text_ids
    )
    prepare_corpus(cfg, causal)
    small = TextData(
        paths=cfg.paths, tokenizer=cfg.tokenizer, length=16, cache=cfg.folder + "-cache"
    )
    for data in (cfg, small):
        rows, _ = load_training_data(data, causal)
        assert rows.num_rows > 0


@pytest.fixture
def hub(cfg):
    """A local data set, not yet written: (its folder, the configuration that reads it)."""
    pytest.importorskip("datasets")
    folder = Path(cfg.folder).parent / "hub"
    folder.mkdir()
    return folder, dataclasses.replace(
        cfg, paths=(), dataset=str(folder), folder=cfg.folder + "-hub"
    )


def test_a_hugging_face_data_set_gives_the_rows_of_its_files(cfg, model_config, tokenizer, hub):
    import datasets

    prepare_corpus(cfg, model_config)
    expected = all_rows(cfg, tokenizer)
    folder, hub = hub
    rows = [json.loads(line) for line in Path(cfg.paths[0]).read_text().splitlines()]
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    prepare_corpus(hub, model_config)
    for reading in (hub, dataclasses.replace(hub, dataset="")):
        np.testing.assert_array_equal(all_rows(reading, tokenizer), expected)
    os.utime(folder / "train.parquet", (1, 1))  # a copy has other dates and the same content
    prepare_corpus(hub, model_config)
    for change, message in [
        ({"text_field": "txet"}, "has no field 'txet'; did you mean 'text'"),
        ({"dataset_split": "tset"}, "tset"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare_corpus(dataclasses.replace(hub, **change), model_config)
    datasets.Dataset.from_list([*rows, {"text": None}]).to_parquet(folder / "train.parquet")
    with pytest.raises(InputError, match=r"hub, train: field 'text' is None in 1 of 48 documents"):
        prepare_corpus(dataclasses.replace(hub, folder=cfg.folder + "-null"), model_config)
    assert not Path(cfg.folder + "-null").exists()  # known before the work, not at that document


def test_a_corpus_that_an_earlier_version_began_goes_on(cfg, model_config, hub, monkeypatch):
    """Its digest was of the package's fingerprint, which knows dates."""
    import datasets

    folder, hub = hub
    datasets.Dataset.from_list([{"text": d} for d in DOCUMENTS]).to_parquet(folder / "a.parquet")
    monkeypatch.setattr(documents, "_local_documents", documents._hub_documents)
    former = prepare_corpus(hub, model_config)
    monkeypatch.undo()
    monkeypatch.setattr(preparing, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(preparing, "PART_BATCHES", 2)
    now = prepare_corpus(hub, model_config)
    assert now["splits"] == former["splits"]
    assert now["settings"]["source"] != former["settings"]["source"]  # from here on without dates
    (folder / "a.parquet").unlink()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    with pytest.raises(InputError, match=r"by an earlier version, .*; train from it as it is, or"):
        prepare_corpus(hub, model_config)
    assert load_training_data(hub, model_config)[0].num_rows == former["splits"]["train"]["rows"]


def test_a_local_data_set_is_read_as_its_paths(cfg, model_config, tokenizer, hub):
    folder, hub = hub
    texts = ["2020-01-01T00:00:00", "2021-02-03", "1e5", "007", *DOCUMENTS]
    (folder / ".ipynb_checkpoints").mkdir()
    for name in ("a.jsonl", ".ipynb_checkpoints/a.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "b.txt").write_text("two\nlines are one document")
    (folder / "c.csv").write_text("text\nnot read")
    with pytest.warns(UserWarning, match=r"1 of 3 files are not read, .*: c\.csv"):
        manifest = prepare_corpus(hub, model_config)
    assert manifest["settings"]["documents"] == len(texts) + 1
    files = dataclasses.replace(cfg, paths=(str(folder),))
    with pytest.warns(UserWarning, match=r"1 of 3 files are not read, .*: c\.csv"):
        prepare_corpus(files, model_config)
    for split in ("train", "validation"):
        expected = all_rows(files, tokenizer, split)
        np.testing.assert_array_equal(all_rows(hub, tokenizer, split), expected)
    for path in folder.glob("*.*"):
        os.utime(path, (1, 1))
    with pytest.warns(UserWarning):
        assert prepare_corpus(hub, model_config) == manifest


def test_a_local_data_set_keeps_its_splits(cfg, model_config, tokenizer, hub):
    folder, hub = hub
    hub = dataclasses.replace(hub, num_validation=0, length=3)
    for name, text in (("train", "a b c d"), ("test", "x y z")):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (folder / "train-more.txt").write_text("more")
    for split, count in (("train", 2), ("test", 1), ("train[:1]", 1)):
        named = dataclasses.replace(hub, dataset_split=split, folder=f"{hub.folder}-{split}")
        assert prepare_corpus(named, model_config)["settings"]["documents"] == count
