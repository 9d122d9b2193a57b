"""The tables that benchmarks print and write."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from dials_jax.commands import keep_programs
from dials_jax.errors import InputError, require
from dials_jax.files import write_json


def machine() -> dict[str, Any]:
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
    """Peak device memory since the start; None if the backend does not tell."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None


def exit_status(run: Callable[[], None]) -> int:
    """Runs a benchmark; the exit status is 0, or 2 after one line about the wrong input."""
    keep_programs()
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class Table:
    """Prints rows as they are measured, and writes them as JSON."""

    def __init__(self, columns: dict[str, str], out: str | None, settings: dict[str, Any]):
        """
        Args:
          columns: column's name -> its format, such as `>10.2f`.
          out: file for JSON, rewritten after every row; None writes none.

        Raises: InputError for a folder as `out`.
        """
        folder = out is not None and Path(out).is_dir()
        require(not folder, f"--out {out} is a folder; name a file")
        self._columns, self._out = columns, out
        self._results = {"machine": machine(), "settings": settings, "rows": []}
        print(json.dumps(self._results["machine"]))
        self._print([name for name in columns])

    def add(self, **values: Any) -> None:
        self._results["rows"].append(values)
        cells = []
        for name, form in self._columns.items():
            value = values.get(name)
            cells.append("" if value is None else format(value, form.lstrip("<>0123456789")))
        self._print(cells)
        if self._out:
            write_json(self._out, self._results)

    def _print(self, cells: Sequence[str]) -> None:
        widths = [
            int("".join(c for c in f.split(".")[0] if c.isdigit())) for f in self._columns.values()
        ]
        aligned = [
            cell.ljust(width) if form.startswith("<") else cell.rjust(width)
            for cell, width, form in zip(cells, widths, self._columns.values(), strict=True)
        ]
        print("  ".join(aligned), flush=True)
