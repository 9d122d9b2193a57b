"""Reading files of documents and records, with the place of every line kept for messages."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dials_jax.config import InputError, nearest, require

TEXT = (".txt",)
JSON_LINES = (".jsonl", ".jsonl.xz", ".jsonl.gz")
_OPEN = {".xz": lzma.open, ".gz": gzip.open}
# What a truncated or damaged archive raises, or a file that the disk does not give.
_BROKEN = (EOFError, OSError, lzma.LZMAError, zlib.error)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Puts `where`, such as "train.jsonl:12", in front of an InputError's message."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def expand_paths(paths: Iterable[str], suffixes: tuple[str, ...] = JSON_LINES) -> list[Path]:
    """The files that `paths` name, folders replaced by their sorted contents.

    Raises: InputError if a path is missing, has another suffix, or is a folder without such files.
    """
    paths, wanted = [Path(p) for p in paths], ", ".join(suffixes)
    require(bool(paths), f"paths is empty; name at least one file or folder ({wanted})")
    files = []
    for path in paths:
        require(path.exists(), f"{path} is missing; correct paths")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [p for p in found if p.is_file() and p.name.endswith(suffixes)]
        require(bool(found), f"{path} is not, and does not hold, a file of type {wanted}")
        files += found
    return files


def file_sha256(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, record) from a .jsonl file, compressed or not; skips blank lines.

    Raises: InputError, "path:line: ...", at the first line that is not one JSON object.
    """
    path, line_number = Path(path), 0
    require(path.is_file(), f"{path} is missing")
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as file:
            for line_number, line in enumerate(file, start=1):
                if line.strip():
                    record = json.loads(line)
                    require(isinstance(record, dict), "expected one JSON object a line")
                    yield line_number, record
    # InputError and JSONDecodeError are ValueErrors too, but the consumer's own errors never
    # arrive here: a generator sees only what its own body raises.
    except (ValueError, *_BROKEN) as error:
        # A broken archive fails before it hands out the line that follows.
        broken = line_number + isinstance(error, _BROKEN)
        reason = getattr(error, "msg", error)  # without JSON's own "line 1 column 8"
        raise InputError(f"{path}:{broken}: {reason}; mend or delete the line") from error


def read_documents(path: Path, field: str = "text") -> Iterator[tuple[str, str]]:
    """Yields (where, text): a .txt file is one document, a line of JSON its `field`.

    Raises: InputError for what cannot be read or has no such text.
    """
    if path.suffix in TEXT:
        try:
            yield str(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8: {error}; convert or remove it") from error
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; mend or remove it") from error
        return
    for line_number, record in read_jsonl(path):
        where = f"{path}:{line_number}"
        with located(where):
            text = lookup(record, field)
            require_text(text, field)
        yield where, text


def require_text(text: Any, field: str) -> None:
    """Raises: InputError for a document's field that holds no text."""
    require(isinstance(text, str), f"field {field!r} is {text!r}; it must be a string")
    try:
        text.encode()  # JSON can spell half of a surrogate pair, which is no character
    except UnicodeEncodeError as error:
        raise InputError(f"field {field!r} is not Unicode; mend or delete it") from error


def read_records(paths: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("path:line", record) over all JSON-lines files of `paths`."""
    for path in expand_paths(paths):
        for line_number, record in read_jsonl(path):
            yield f"{path}:{line_number}", record


def lookup(record: dict[str, Any], name: str) -> Any:
    """The field `name`, dots stepping into inner objects and lists: "choices.text", "tests.0".

    Raises: InputError naming the nearest field that exists.
    """
    value: Any = record
    for part in name.split("."):
        if isinstance(value, list):
            value = {str(i): inner for i, inner in enumerate(value)}
        require(isinstance(value, dict), f"field {name!r}: nothing lies inside {value!r}")
        require(part in value, f"no field {name!r}{nearest(part, value)}")
        value = value[part]
    return value
