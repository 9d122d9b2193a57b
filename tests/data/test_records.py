import gzip
import lzma
import tracemalloc
from codecs import BOM_UTF8

import pytest

from dials_jax.data import records
from dials_jax.data.record_files import read_task_records
from dials_jax.data.records import (
    content_sha256,
    expand_paths,
    file_sha256,
    get_field,
    read_documents,
    read_jsonl,
)
from dials_jax.errors import InputError

GOOD = '{"text": "one"}\n\n{"text": "twö"}\n'


def text_of(path):
    return "".join(piece for _, chunks in read_documents(path) for piece in chunks)


def test_plain_and_compressed_files_give_the_same_numbered_records(tmp_path):
    contents = {
        "a.jsonl": GOOD.encode(),
        "a.jsonl.xz": lzma.compress(GOOD.encode()),
        "a.jsonl.gz": gzip.compress(GOOD.encode()),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        expected = [(1, {"text": "one"}), (3, {"text": "twö"})]
        assert list(read_jsonl(tmp_path / name)) == expected


BAD_LINES = [
    b'{"text": \n',
    b"[1, 2]\n",
    b'{"text": "\xff"}\n',
    b'{"text": "\xed\xa0\x80"}\n',  # half of a surrogate pair as bytes
    b'{"a": ' * 100_000 + b"1" + b"}" * 100_000 + b"\n",
    b'{"a": ' + b"9" * 5000 + b"}\n",
    b'{"a": {"b": "\x00',
]


@pytest.mark.parametrize("bad", BAD_LINES)
@pytest.mark.parametrize("compress", [False, True])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, bad, compress):
    path = tmp_path / ("a.jsonl.xz" if compress else "a.jsonl")
    content = GOOD.encode() + bad
    path.write_bytes(lzma.compress(content) if compress else content)
    with pytest.raises(InputError, match=rf"{path.name}:4: ") as error:
        list(read_jsonl(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "not an archive"])
@pytest.mark.parametrize("archive", [lzma, gzip])
def test_a_damaged_archive_is_an_input_error(tmp_path, damage, archive):
    path = tmp_path / f"a.jsonl.{'xz' if archive is lzma else 'gz'}"
    path.write_bytes(archive.compress(GOOD.encode() * 99)[:-20] if damage == "cut" else b"hello")
    with pytest.raises(InputError, match=r"a\.jsonl\.[xg]z:\d+: "):
        list(read_jsonl(path))


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        content = BOM_UTF8 + GOOD.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("z") else content)
        assert [record["text"] for _, record in read_jsonl(tmp_path / name)] == ["one", "twö"]
    plain, marked = tmp_path / "a.txt", tmp_path / "b.txt"
    plain.write_bytes("twö\r\nlines".encode())
    marked.write_bytes(BOM_UTF8 + "twö\r\nlines".encode())
    assert [text_of(path) for path in (plain, marked)] == ["twö\nlines"] * 2
    assert content_sha256(marked) == content_sha256(plain) == file_sha256(plain)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.xz"])
def test_other_encodings_are_named(tmp_path, name, encoding):
    content = GOOD.encode(encoding)
    (tmp_path / name).write_bytes(lzma.compress(content) if name.endswith("xz") else content)
    with pytest.raises(InputError, match=rf"{name}.* is not UTF-8 but UTF-16 or UTF-32; convert"):
        for _, chunks in read_documents(tmp_path / name):
            list(chunks)


def test_a_text_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE_CHARACTERS", 4)
    (tmp_path / "a.txt").write_bytes("ab\r\ncdäé\rfg\n".encode())
    [(where, chunks)] = read_documents(tmp_path / "a.txt")
    assert list(chunks) == ["ab\nc", "däé\n", "fg\n"] and where == f"{tmp_path}/a.txt"
    (tmp_path / "a.txt").write_bytes(b"abcdefg\xffh")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 \(.*0xff\); convert or remove it"):
        text_of(tmp_path / "a.txt")


def test_a_line_without_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n' + b" " * (50 << 20)))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"a\.jsonl\.gz:2: a line of more than 1 MiB"):
        list(read_jsonl(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_half_a_surrogate_pair_is_named_where_it_is_used(tmp_path):
    """It is no text; in a field that nobody reads it does no harm."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "title": "\\ud83d"}\n{"text": "x\\udc00"}\n')
    documents = read_documents(path)
    assert next(documents)[1] == ("one",)
    with pytest.raises(InputError, match=r"a\.jsonl:2: .*'text' .*'\\udc00', which is"):
        next(documents)
    for value in ("\ud800", ["fine", "\ud800"]):
        with pytest.raises(InputError, match=r"field 'a' holds half"):
            get_field({"a": value}, "a")


def test_an_error_of_the_consumer_is_not_blamed_on_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^mine$"):
        for _ in read_jsonl(path):
            raise ValueError("mine")


def test_folders_expand_to_sorted_files_of_the_wanted_kind(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "notes.md", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(GOOD, encoding="utf-8")
    with pytest.warns(UserWarning, match=r": 1 of 4 files are not read, .*: notes\.md$"):
        found = expand_paths([str(tmp_path)])
    names = [p.relative_to(tmp_path).as_posix() for p in found]
    assert names == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    places = [where for where, _ in read_task_records([str(tmp_path / "b.jsonl")])]
    assert places == [f"{tmp_path}/b.jsonl:1", f"{tmp_path}/b.jsonl:3"]


def test_hidden_copies_are_not_read_unless_named(tmp_path, recwarn):
    hidden = [".ipynb_checkpoints/a-checkpoint.jsonl", ".a.jsonl", "deep/._c.jsonl", ".git/x/y.txt"]
    for name in ("a.jsonl", "deep/c.jsonl", *hidden):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(GOOD, encoding="utf-8")
    names = [p.relative_to(tmp_path).as_posix() for p in expand_paths([str(tmp_path)])]
    assert names == ["a.jsonl", "deep/c.jsonl"] and not recwarn.list
    inside = tmp_path / ".ipynb_checkpoints"
    assert expand_paths([str(inside)]) == [inside / "a-checkpoint.jsonl"]


def test_unread_files_are_named_and_counted(tmp_path):
    for name in ("a.jsonl", "b.json.gz", "c.jsonl.zst", "d.parquet", "e.csv"):
        (tmp_path / name).write_text(GOOD, encoding="utf-8")
    message = r": 4 of 5 files are not read, .*: b\.json\.gz, c\.jsonl\.zst, d\.parquet and 1 more$"
    with pytest.warns(UserWarning, match=message):
        expand_paths([str(tmp_path)])


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "a\ud800b"])
def test_impossible_names_are_input_errors(path):
    with pytest.raises(InputError, match=r"^paths=.* is no path \(.*\); choose another$"):
        expand_paths([path])


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"^paths is empty; give a folder"):
        expand_paths(["a.jsonl", ""])


def test_paths_that_name_nothing_are_input_errors(tmp_path):
    (tmp_path / "notes.md").write_text("")
    for paths in ([], [str(tmp_path / "none")], [str(tmp_path)], [str(tmp_path / "notes.md")]):
        with pytest.raises(InputError, match=r"paths is empty|is missing|is not"):
            expand_paths(paths)


def test_lookup_steps_into_objects_and_lists():
    record = {"choices": {"text": ["x", "y"]}}
    assert get_field(record, "choices.text") == ["x", "y"]
    assert get_field(record, "choices.text.1") == "y"


@pytest.mark.parametrize(
    "name, hint",
    [
        ("choises", "did you mean 'choices'"),
        ("choices.texts", "did you mean 'text'"),
        ("choices.text.7", "valid names: 0, 1"),
        ("choices.text.0.z", "nothing lies inside 'x'"),
    ],
)
def test_an_unknown_field_names_the_nearest(name, hint):
    with pytest.raises(InputError, match=hint):
        get_field({"choices": {"text": ["x", "y"]}}, name)
