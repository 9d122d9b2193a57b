"""What benchmarks measure besides time, and the tables that they print and write."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from dials_jax.compiling import total_compile_seconds
from dials_jax.errors import require
from dials_jax.files import write_json

T = TypeVar("T")


def describe_machine() -> dict[str, Any]:
    """The device, JAX's version, the date and the command."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", *_module_and_arguments()]),
    }


def _module_and_arguments() -> list[str]:
    name = Path(sys.argv[0])
    return [f"{name.parent.name}.{name.stem}", *sys.argv[1:]]


def peak_gigabytes() -> float | None:
    """Peak device memory since the start; None if the backend does not report it."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None


def run_and_count_compilation(
    function: Callable[..., T], *args: Any, **kwargs: Any
) -> tuple[T, float]:
    """Calls a function; returns its result, and the seconds that its programs took to compile."""
    before = total_compile_seconds()
    result = function(*args, **kwargs)
    return result, total_compile_seconds() - before


class LiveTable:
    """Prints each row as soon as it is measured, and rewrites a JSON file of all rows."""

    def __init__(self, columns: dict[str, str], out: str | None, settings: dict[str, Any]):
        """Prints the machine and the header.

        Args:
          columns: format by name of the column, such as `>10.2f`.
          out: the JSON file; None writes none.
          settings: what the file says about the measurement.

        Raises: InputError if `out` is a folder.
        """
        is_folder = out is not None and Path(out).is_dir()
        require(not is_folder, f"--out {out} is a folder; name a file")
        self._columns, self._out = columns, out
        self._results = {"machine": describe_machine(), "settings": settings, "rows": []}
        print(json.dumps(self._results["machine"]))
        self._print_cells(list(columns))

    def add_row(self, **values: Any) -> None:
        """Adds a row. Values without a column are only written; a missing one is an empty cell."""
        self._results["rows"].append(values)
        cells = []
        for name, form in self._columns.items():
            value = values.get(name)
            cells.append("" if value is None else format(value, form.lstrip("<>0123456789")))
        self._print_cells(cells)
        if self._out:
            write_json(self._out, self._results)

    def _print_cells(self, cells: Sequence[str]) -> None:
        widths = [
            int("".join(c for c in f.split(".")[0] if c.isdigit())) for f in self._columns.values()
        ]
        aligned = [
            cell.ljust(width) if form.startswith("<") else cell.rjust(width)
            for cell, width, form in zip(cells, widths, self._columns.values(), strict=True)
        ]
        print("  ".join(aligned), flush=True)
