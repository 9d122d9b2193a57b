"""Reads text files and JSON lines. Messages about what is read name the file and the line."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import lzma
import os
import reprlib
import warnings
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dials_jax.errors import InputError, nearest, require
from dials_jax.files import local_path

TEXT_SUFFIXES = (".txt",)
JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz")
PIECE_CHARACTERS = 1 << 16  # of a text, read at a time
LONGEST_LINE = 1 << 28  # in bytes; a line of JSON is held in memory as a whole
# Its file and line, for messages, and its text in pieces of any size.
Document = tuple[str, Iterable[str]]
_OPEN = {".xz": lzma.open, ".gz": gzip.open}
# What a truncated or damaged archive, or an unreadable file, raises.
_BROKEN = (EOFError, OSError, lzma.LZMAError, zlib.error)


@contextlib.contextmanager
def prefix_errors(where: str) -> Iterator[None]:
    """Puts `where`, such as "train.jsonl:12", before the message of an InputError raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def expand_paths(
    paths: Iterable[str | Path], suffixes: tuple[str, ...] = JSON_LINES_SUFFIXES
) -> list[Path]:
    """Returns the files among `paths`, and for each folder the sorted files at any depth.

    Hidden files and folders (`.git`, the copies in `.ipynb_checkpoints`) are left out. A warning
    names and counts files of other formats, since they may be half of the corpus.

    Raises: InputError if a path is missing, has another suffix, or is a folder without such files.
    """
    paths, wanted = list(paths), ", ".join(suffixes)
    require(bool(paths), f"paths is empty; name at least one file or folder ({wanted})")
    files = []
    for given in paths:
        local_path(given, "paths")  # Path("") would be the current folder
        path = Path(given)
        require(path.exists(), f"{path} is missing; correct paths")
        try:
            there = sorted(_visible_files(path)) if path.is_dir() else [path]
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; mend or remove it") from error
        found = [p for p in there if p.is_file() and p.name.endswith(suffixes)]
        require(bool(found), f"{path} is not, and does not hold, a file of type {wanted}")
        files += found
        warn_unread_files(path, there, suffixes)
    return files


def warn_unread_files(folder: Path, files: list[Path], suffixes: tuple[str, ...]) -> None:
    """Warns about those of `files` that have other suffixes, with their number and names."""
    unread = [path.name for path in files if not path.name.endswith(suffixes)]
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        warnings.warn(
            f"{folder}: {len(unread)} of {len(files)} files are not read, being no "
            f"{', '.join(suffixes)}: {', '.join(unread[:3])}{more}",
            stacklevel=3,
        )


def _visible_files(folder: Path) -> Iterator[Path]:
    """Yields all files below `folder` that are not hidden. Raises: OSError if it is unreadable."""

    def stop(error: OSError) -> None:  # os.walk would ignore it
        raise error

    for inside, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(inside, name) for name in names if not name.startswith("."))


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file of documents; for a text without its byte order mark.

    Raises: InputError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            marked = path.suffix in TEXT_SUFFIXES and file.read(len(BOM_UTF8)) == BOM_UTF8
            file.seek(len(BOM_UTF8) if marked else 0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; mend or remove it") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, record) of a .jsonl file, compressed or not. Lines count from 1.

    Blank lines are skipped.

    Raises: InputError, "path:line: ...", at the first line that is not one JSON object.
    """
    path, line_number = Path(path), 0
    require(path.is_file(), f"{path} is missing")
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                line_number += 1
                if line_number == 1:
                    require_utf8(line)
                if len(line) > LONGEST_LINE:
                    size = f"{LONGEST_LINE >> 20} MiB"
                    raise InputError(f"a line of more than {size}; write such a text to a .txt")
                if line.strip():
                    record = json.loads(line.removeprefix(BOM_UTF8).decode())
                    require(isinstance(record, dict), "expected one JSON object per line")
                    yield line_number, record
    # InputError and JSONDecodeError are ValueErrors too. Errors of the caller never arrive here: a
    # generator catches only what its own body raises.
    except (ValueError, RecursionError, *_BROKEN) as error:
        # A damaged archive fails while the next line is read.
        broken = line_number + isinstance(error, _BROKEN)
        reason = getattr(error, "msg", error)  # without JSON's own "line 1 column 8"
        if isinstance(error, RecursionError):
            reason = "nested too deep"
        raise InputError(f"{path}:{broken}: {reason}; mend or delete the line") from error


def require_utf8(head: bytes) -> None:
    """Raises: InputError if `head`, the first bytes of a file, is UTF-16 or UTF-32."""
    marked = head.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
    require(
        not (marked or b"\0" in head[:4]),
        "is not UTF-8 but UTF-16 or UTF-32; convert it, with iconv or an editor",
    )


def read_documents(path: Path, field: str = "text") -> Iterator[Document]:
    """Yields documents as (where, text in pieces): a whole .txt file, or `field` of each JSON line.

    All pieces of a document have to be taken before the next document.

    Raises: InputError for a file that cannot be read, and for a line whose `field` is not text.
    """
    if path.suffix in TEXT_SUFFIXES:
        yield str(path), _read_text(path)
        return
    for line_number, record in read_jsonl(path):
        where = f"{path}:{line_number}"
        with prefix_errors(where):
            text = get_field(record, field)
            require_text(text, field)
        yield where, (text,)


def _read_text(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            require_utf8(file.read(4))
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(PIECE_CHARACTERS):
                yield piece
    except UnicodeDecodeError as error:
        odd = error.object[error.start]
        raise InputError(
            f"{path} is not UTF-8 ({error.reason}: byte {odd:#x}); convert or remove it"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; mend or remove it") from error
    except InputError as error:
        raise InputError(f"{path} {error}") from error


def require_text(text: Any, field: str) -> None:
    """Raises: InputError if `text`, from the field named `field`, is no Unicode string."""
    if not isinstance(text, str):
        raise InputError(f"field {field!r} is {reprlib.repr(text)}; it must be a string")
    _require_unicode(text, field)


def _require_unicode(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"field {field!r} holds half of a surrogate pair, {text[error.start]!a}, which is no "
            "character; mend or delete it"
        ) from error


def get_field(record: dict[str, Any], name: str) -> Any:
    """Returns the field `name`; a dot steps into an object or a list: "choices.text", "tests.0".

    Raises: InputError for an unknown field, naming the nearest one, and for text that is no
      Unicode.
    """
    value: Any = record
    for part in name.split("."):
        if isinstance(value, list):
            value = {str(i): inner for i, inner in enumerate(value)}
        # Not `require`: the messages take longer than all the rest of reading.
        if not isinstance(value, dict):
            raise InputError(f"field {name!r}: nothing lies inside {reprlib.repr(value)}")
        if part not in value:
            raise InputError(f"no field {name!r}{nearest(part, value)}")
        value = value[part]
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            _require_unicode(text, name)
    return value
