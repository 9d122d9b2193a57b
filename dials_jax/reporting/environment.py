"""What evaluations record besides their numbers: machine, versions and command; and CSV."""

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

LONGEST_STEM = 120  # characters of a file name before its ending; file systems allow 255


def environment(model: Model, seed: int) -> dict[str, Any]:
    """The device, mesh, versions, date, command and seed of a run."""
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
    """The command line of this process, quoted for a shell."""
    return shlex.join(["python", *sys.argv])


def file_name(text: str) -> str:
    """A file name for any text: special characters are quoted, a long text is cut and hashed."""
    quoted = quote(text, safe=",")
    if len(quoted) <= LONGEST_STEM:
        return quoted
    return f"{quoted[:LONGEST_STEM]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes unrounded values; None, NaN and infinity become empty cells.

    A text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in finite(dict(row)).items()})


def _cell(value: Any) -> Any:
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value
