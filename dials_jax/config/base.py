"""How settings are checked, read and written."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


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


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """The inverse of `to_dict`.

    Raises: InputError for an unknown or missing field, naming the nearest valid one.
    """
    hints = typing.get_type_hints(cls)
    prefix = f"{where}: " if where else ""
    for name in values:
        require(name in hints, f"{prefix}unknown field {name!r}{nearest(name, hints)}")
    for f in dataclasses.fields(cls):
        has_default = (f.default, f.default_factory) != (dataclasses.MISSING,) * 2
        require(has_default or f.name in values, f"{prefix}field {f.name!r} is missing")
    return cls(**{name: _parse(hints[name], v, f"{where}.{name}") for name, v in values.items()})


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(args, value, where)
    if origin is tuple:
        return tuple(_parse(args[0], v, where) for v in value)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where.lstrip("."))
    return value


def _parse_union(options: tuple, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        return value
    classes = [o for o in options if dataclasses.is_dataclass(o)]
    if len(classes) == 1:
        return from_dict(classes[0], value, where.lstrip("."))
    kinds = {typing.get_args(typing.get_type_hints(c)["kind"])[0]: c for c in classes}
    kind = value.get("kind")
    require(kind in kinds, f"{where}: unknown kind {kind!r}{nearest(str(kind), kinds)}")
    return from_dict(kinds[kind], value, where.lstrip("."))


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object. Raises: InputError if the file is missing or holds none."""
    path = Path(path)
    require(path.is_file(), f"{path} is missing")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{path} is not valid JSON: {error}") from error
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
    """Writes through a temporary file, so a reader never sees half of it.

    What is not finite becomes null.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(finite(values), indent=1, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def finite(values: Any) -> Any:
    """Plain values with None for NaN and infinity: JSON has neither, and strict readers stop."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
