"""What evaluations write down besides their numbers: machine, versions, command; and CSV."""

from __future__ import annotations

import csv
import datetime
import hashlib
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import flax
import jax

from dials_jax.files import finite
from dials_jax.models.model import Model

LONGEST_NAME = 120  # of a file, without its ending; file systems take 255


def environment(model: Model, seed: int) -> dict[str, Any]:
    devices = model.mesh.devices
    return {
        "device": f"{devices.size} x {devices.flat[0].device_kind}",
        "mesh": ", ".join(f"{name} {size}" for name, size in model.mesh.shape.items()),
        "dtype": model.config.dtype,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": command(),
        "seed": seed,
    }


def command() -> str:
    """What was typed, to be typed again."""
    return shlex.join(["python", *sys.argv])


def file_name(text: str) -> str:
    """A file's name for any text: what names may not hold is quoted, what is too long is cut."""
    quoted = quote(text, safe=",")
    if len(quoted) <= LONGEST_NAME:
        return quoted
    return f"{quoted[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Unrounded values; what is None or not finite is an empty cell.

    A text that a spreadsheet would take for a formula is quoted by an apostrophe.
    """
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in finite(dict(row)).items()})


def _cell(value: Any) -> Any:
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value
