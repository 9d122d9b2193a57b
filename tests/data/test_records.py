import gzip
import lzma

import pytest

from dials_jax.config import InputError
from dials_jax.data.records import expand_paths, lookup, read_jsonl, read_records

GOOD = '{"text": "one"}\n\n{"text": "twö"}\n'


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


@pytest.mark.parametrize("bad", [b'{"text": \n', b"[1, 2]\n", b'{"text": "\xff"}\n'])
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
    names = [p.relative_to(tmp_path).as_posix() for p in expand_paths([str(tmp_path)])]
    assert names == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    places = [where for where, _ in read_records([str(tmp_path / "b.jsonl")])]
    assert places == [f"{tmp_path}/b.jsonl:1", f"{tmp_path}/b.jsonl:3"]


def test_paths_that_name_nothing_are_input_errors(tmp_path):
    (tmp_path / "notes.md").write_text("")
    for paths in ([], [str(tmp_path / "none")], [str(tmp_path)], [str(tmp_path / "notes.md")]):
        with pytest.raises(InputError, match=r"paths is empty|is missing|is not"):
            expand_paths(paths)


def test_lookup_steps_into_objects_and_lists():
    record = {"choices": {"text": ["x", "y"]}}
    assert lookup(record, "choices.text") == ["x", "y"]
    assert lookup(record, "choices.text.1") == "y"


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
        lookup({"choices": {"text": ["x", "y"]}}, name)
