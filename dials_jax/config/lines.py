"""Files of one JSON object a line, as runs that may be stopped write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dials_jax.config.base import InputError, parse_json


def json_lines(path: str | Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Yields every whole line: its number from 1, its bytes, and its object or None.

    None is for what is no JSON object in UTF-8. What follows the last newline is left out: a kill
    has cut it short.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield number, line, _object(line)


def named(numbers: Sequence[int]) -> str:
    """`line 3`, or `line 3 and 2 more`."""
    return f"line {numbers[0]}" + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else "")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line, "")
    except InputError:
        return None
    return value if isinstance(value, dict) else None
