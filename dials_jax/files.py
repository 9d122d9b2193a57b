"""Files: where users may give them, and JSON in and out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dials_jax.errors import InputError, require

DIGEST = "digest"  # in a file of JSON, of all the rest
ALGORITHM = "sha256:"  # how such a digest begins
CHAT_TEMPLATES = "chat_templates"  # a folder beside a tokenizer's files: NAME.jinja for each


def parse_json(text: str | bytes, where: str) -> Any:
    """Parses JSON of any kind.

    Args:
      where: what the message begins with: a file, or a file and a line.

    Raises: InputError for text that is not JSON, not UTF-8, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(f"{where} is not valid JSON: it is nested too deep") from error
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise InputError(f"{where} is not valid JSON: {error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object; the digest of `write_json` is compared and left out.

    Raises: InputError if the file is missing, cannot be read, holds none or has changed.
    """
    path = Path(path)
    try:
        require(path.is_file(), f"{path} is missing")
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    values = parse_json(text, str(path))
    require(isinstance(values, dict), f"{path} does not hold a JSON object")
    return _without_digest(values, path)


def finite(values: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by None."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file to write that replaces `path` once it is complete.

    It is written beside `path` and renamed, so that half a file is never read, even after a loss of
    power. After an error it is removed, and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: str | Path, values: Any, digest: bool = False) -> None:
    """Writes JSON by `replacing`. What is not finite becomes null.

    Args:
      digest: add one of all values, so that `read_json` notices damage: for files that this library
        alone reads.
    """
    values = finite(values)
    values = values | {DIGEST: _digest(values)} if digest else values
    text = json.dumps(values, indent=1, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def _without_digest(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Raises: InputError for values that do not fit their digest. Older files have none."""
    digest = values.get(DIGEST)
    if not (isinstance(digest, str) and digest.startswith(ALGORITHM)):
        return values
    values = {name: value for name, value in values.items() if name != DIGEST}
    require(
        digest == _digest(values),
        f"{path} is damaged or was edited (its digest does not fit); bring back a copy, or remove "
        f'its "{DIGEST}" if it is as you want it',
    )
    return values


def _digest(values: dict[str, Any]) -> str:
    """Of what JSON holds: whatever its spaces, and its order of names."""
    text = json.dumps(values, sort_keys=True)
    return ALGORITHM + hashlib.sha256(text.encode()).hexdigest()


LONGEST_NAME = 255  # bytes, in usual file systems; in a folder that is missing none complains
# `gs://bucket`, and what pathlib makes of it. A single letter is a drive of Windows.
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | Path, name: str) -> Path:
    """Returns the absolute path of a local file or folder, whether it exists or not.

    Args:
      name: of the option or field that gave it, for messages.
    Raises: InputError for what cannot be a local path: an empty text, an address of another file
      system (`gs://`), the home of an unknown user, a name that is too long.
    """
    known = isinstance(path, str | os.PathLike)
    require(known, f"{name} is a {type(path).__name__} and no path; give a text or a Path")
    text = str(path)
    require(bool(text), f"{name} is empty; give a folder (is a variable of the shell unset?)")
    require_local(text, name)
    try:
        text.encode()  # a name that is no UTF-8 could not be printed in a report
        absolute = Path(text).expanduser().absolute()
        os.stat(absolute)
        reason = None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        reason = None  # callers check whether it has to exist
    except (OSError, RuntimeError, ValueError) as error:  # too long; ~nobody; NUL; no UTF-8
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    if reason is None and max(len(os.fsencode(part)) for part in absolute.parts) > LONGEST_NAME:
        reason = "a name in it is too long"
    require(not reason, f"{name}={_shortened(text)} is no path ({reason}); choose another")
    return absolute


def require_local(text: str, name: str) -> None:
    """Raises: InputError for an address of another file system, as `gs://bucket`."""
    given = re.sub(":/(?!/)", "://", text, count=1)  # pathlib takes `gs://` for `gs:/`
    require(
        not SCHEME.match(text),
        f"{name}={given} is no local path, and only those are read and written; mount or copy it "
        "(dials copy knows gs:// and s3://; a run copies its workdir by --mirror)",
    )


def require_writable(folder: str | Path, name: str = "--workdir") -> None:
    """Raises: InputError for a folder that cannot be made or written to. Makes nothing.

    Args:
      name: of the option or field that gave the folder, for the message.
    """
    folder = Path(folder).absolute()
    nearest_existing = next(path for path in (folder, *folder.parents) if path.exists())
    require(
        nearest_existing.is_dir() and os.access(nearest_existing, os.W_OK),
        f"{nearest_existing} is no folder that can be written to; choose another {name}",
    )


def file_to_write(path: str | Path, name: str, example: str) -> Path:
    """Returns the absolute path of a file that may be written: call it before long work.

    Args:
      name: of the option or field that gave it, for messages.
      example: a file's name, for messages.
    Raises: InputError for a folder, for a file in a folder that cannot be made or written to, and
      for what is no path.
    """
    file = local_path(path, name)
    require(not file.is_dir(), f"{name}={path} is a folder; name a file in it, as {example}")
    require_writable(file.parent, name)
    writable = not file.exists() or os.access(file, os.W_OK)
    require(writable, f"{name}={path} cannot be written to; name another file")
    return file


def _shortened(text: str, most: int = 80) -> str:
    printable = text.encode(errors="backslashreplace").decode().replace("\0", "\\0")
    return printable if len(printable) <= most else f"{printable[:most]}..."


def copy_tokenizer_file(file: Path, folder: Path) -> None:
    """Copies a file into a folder; one of several chat templates stays in a folder of theirs."""
    if file.parent.name == CHAT_TEMPLATES:
        folder = folder / CHAT_TEMPLATES
        folder.mkdir(exist_ok=True)
    shutil.copy(file, folder)
