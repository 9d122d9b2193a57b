"""Damage to files, and what a command makes of it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dials_jax.errors import InputError


def flip(path: Path, rng: random.Random) -> str:
    """One bit, as a disk does it: size and date stay."""
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    _put(path, bytes(content))
    return f"bit {bit}"


def cut(path: Path, rng: random.Random) -> str:
    size = rng.randrange(path.stat().st_size)
    _put(path, path.read_bytes()[:size])
    return f"cut to {size}"


def folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


DAMAGES = {"one bit flipped": flip, "cut short": cut, "an empty folder": folder}


def _put(path: Path, content: bytes) -> None:
    """In place: the file keeps its number and its date."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


EQUAL, REFUSED, NAMED = "equal", "refused", "named and left out"
GOOD = (EQUAL, REFUSED, NAMED)
SILENT, UNNAMED, TRACEBACK = "used in silence", "refused without a name", "traceback"


def outcome(
    use: Callable[[Path], Any],
    copy: Path,
    file: Path,
    expected: Any,
) -> tuple[str, str]:
    """What `use(copy)` makes of a damaged file, and the line that says so.

    A result that lacks lines of the damaged file, which a warning names, is `NAMED`.
    """
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            found = use(copy)
    except (InputError, OSError) as error:
        line = str(error)
        return (REFUSED if _names(line, file, copy) else UNNAMED), line
    except Exception:
        return TRACEBACK, traceback.format_exc()[-1500:]
    finally:
        logging.getLogger().removeHandler(handler)
    if found == expected:
        return EQUAL, ""
    if _names(said.getvalue(), file, copy) and _only_lacks_lines(found, expected):
        return NAMED, said.getvalue()[-300:]
    return SILENT, difference(found, expected)


def _names(text: str, file: Path, copy: Path) -> bool:
    """Whether the text names the file, or the folder within the workdir that it is a part of."""
    single = "\n" not in text.strip() or not text.startswith("error")
    inside = [file, *(p for p in file.parents if copy in p.parents)]
    return single and any(str(path) in text or path.name in text for path in inside)


def _only_lacks_lines(found: Any, expected: Any) -> bool:
    """Whether all that is there is right, and only lines of metrics are missing."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return False
    rest = {k: v for k, v in found.items() if k != "metrics"}
    same = rest == {k: v for k, v in expected.items() if k != "metrics"}
    return same and set(found["metrics"]) <= set(expected["metrics"])


def difference(found: Any, expected: Any, name: str = "") -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}, key=str):
            if found.get(key) != expected.get(key):
                return difference(found.get(key), expected.get(key), f"{name}.{key}")
    return f"{name}: {str(found)[:150]} instead of {str(expected)[:150]}"


def copy_of(state: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(state, to, symlinks=True)
    return to
