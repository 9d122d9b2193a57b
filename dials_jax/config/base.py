"""How settings are checked, read and written."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the thing, then the remedy."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; did you mean 'd_model'?`, or the list of valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid names: {', '.join(valid)}"


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value} must be positive")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def parse_json(text: str | bytes, where: str) -> Any:
    """JSON of any kind.

    Args:
      where: what the message begins with: a file, or a file and a line.

    Raises: InputError for what is no JSON, no UTF-8, or nested too deep to read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(f"{where} is not valid JSON: it is nested too deep") from error
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise InputError(f"{where} is not valid JSON: {error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises: InputError if the file is missing, cannot be read or holds none.
    """
    path = Path(path)
    try:
        require(path.is_file(), f"{path} is missing")
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    values = parse_json(text, str(path))
    require(isinstance(values, dict), f"{path} does not hold a JSON object")
    return values


def require_writable(workdir: str | Path, name: str = "--workdir") -> None:
    """Raises: InputError for a folder that cannot be made or written to. Makes nothing.

    Args:
      name: of the option or field that gave the folder, for the message.
    """
    workdir = Path(workdir).absolute()
    nearest_existing = next(path for path in (workdir, *workdir.parents) if path.exists())
    require(
        nearest_existing.is_dir() and os.access(nearest_existing, os.W_OK),
        f"{nearest_existing} is no folder that can be written to; choose another {name}",
    )


def require_packages(extra: str, *names: str) -> None:
    """Raises: InputError for packages that are not installed, before work that ends with them."""
    missing = [name for name in names if find_spec(name) is None]
    require(not missing, f"{', '.join(missing)} missing; pip install 'dials_jax[{extra}]'")


def write_json(path: str | Path, values: Any) -> None:
    """Writes through a temporary file, so a reader never sees half of it, nor does a loss of power.

    What is not finite becomes null.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(finite(values), indent=1, allow_nan=False)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def finite(values: Any) -> Any:
    """Plain values with None for NaN and infinity: JSON has neither, and strict readers stop."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
