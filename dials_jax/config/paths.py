"""Paths that users give, checked before anything is read from them or made there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dials_jax.config.base import require

LONGEST_NAME = 255  # bytes, in usual file systems; in a folder that is missing none complains
# `gs://bucket`, and what pathlib makes of it. A single letter is a drive of Windows.
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | Path, name: str) -> Path:
    """The absolute path of a local file or folder, whether it exists or not.

    Args:
      name: of the option or field that gave it, for messages.
    Raises: InputError for what no local file can be called: nothing at all, an address of another
      file system (`gs://`), the home of nobody, a name that is too long.
    """
    text = str(path)
    require(bool(text), f"{name} is empty; give a folder (is a variable of the shell unset?)")
    require(
        not SCHEME.match(text),
        f"{name}={text} is no local path, and only those are read and written; mount or copy it",
    )
    try:
        text.encode()  # a name that is no UTF-8 could not be printed in a report
        absolute = Path(text).expanduser().absolute()
        os.stat(absolute)
        reason = None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        reason = None  # whether it has to exist, others say
    except (OSError, RuntimeError, ValueError) as error:  # too long; ~nobody; NUL; no UTF-8
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    if reason is None and max(len(os.fsencode(part)) for part in absolute.parts) > LONGEST_NAME:
        reason = "a name in it is too long"
    require(not reason, f"{name}={_shortened(text)} is no path ({reason}); choose another")
    return absolute


def _shortened(text: str, most: int = 80) -> str:
    printable = text.encode(errors="backslashreplace").decode().replace("\0", "\\0")
    return printable if len(printable) <= most else f"{printable[:most]}..."
