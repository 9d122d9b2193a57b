"""Configuration files, by path or by name: Python with a function `get_config()`."""

from __future__ import annotations

import contextlib
import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import dials_jax.config
from dials_jax.config.typed import replaced, shown
from dials_jax.errors import InputError, nearest, require
from dials_jax.files import local_path

C = TypeVar("C")
OTHER_COMMAND = "the other command; in Python dj.train, dj.sweep or dj.study"
SHIPPED = Path(__file__).parent / "configs"  # in a clone a link to configs/


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the library: `demo/model` and its file."""
    files = sorted(SHIPPED.rglob("*.py"))
    return {file.relative_to(SHIPPED).with_suffix("").as_posix(): file for file in files}


def find_config(path: str) -> Path:
    """The file at `path`, or the shipped one of this name: `demo/model`, `configs/demo/model.py`.

    Raises: InputError for neither, naming the nearest shipped one.
    """
    file = local_path(path, "--config")
    if file.is_file():
        return file
    require(not file.is_dir(), f"configuration {path} is a folder; name a file in it")
    shipped, name = shipped_configs(), path.removeprefix("configs/").removesuffix(".py")
    if name in shipped:
        return shipped[name]
    hint = nearest(name, shipped)
    if "did you mean" not in hint:  # all names are too many for a line
        hint = "; --help lists those that come with the library"
    raise InputError(f"configuration {path} is missing{hint}")


def load_config(path: str, config_class: type[C] | UnionType) -> C:
    """Runs a configuration file and returns what its `get_config()` returns.

    Raises: InputError for anything that goes wrong in it, with the line.
    """
    file, make = find_config(path), None
    try:
        with _imports_beside(file):
            make = runpy.run_path(str(file)).get("get_config")
            require(callable(make), "it has no function get_config()")
            config = make()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also what calls exit()
        where = f"configuration {path}{_line(str(file), error, make)}"
        raise InputError(f"{where}: {_reason(error)}") from error
    require_kind(config, config_class, f"configuration {path}", f"use {OTHER_COMMAND}")
    return config


_BESIDE: set[str] = set()  # modules that the last configuration imported from its folder


@contextlib.contextmanager
def _imports_beside(file: Path) -> Iterator[None]:
    """A configuration may import what lies beside it.

    Its modules stay, since their classes need them, until the next configuration runs: that may
    have others of these names.
    """
    folder, path = file.absolute().parent, list(sys.path)
    for name in _BESIDE:
        sys.modules.pop(name, None)
    _BESIDE.clear()
    known = set(sys.modules)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            at = getattr(sys.modules[name], "__file__", None)
            if at and Path(at).parent == folder:
                _BESIDE.add(name)


def open_config(
    config: C | str | Path, config_class: type[C] | UnionType, overrides: Mapping[str, Any]
) -> C:
    """A configuration, or that of a file or of a shipped name, with other values of some fields.

    Args:
      overrides: values by dotted name, as {"optimizer.num_steps": 100}.

    Raises: InputError for another kind of configuration, and for a name or value that does not fit.
    """
    if isinstance(config, str | Path):
        config = load_config(str(config), config_class)
    require_kind(config, config_class, "the configuration", "give one, or the name of its file")
    require(
        isinstance(overrides, Mapping),
        f'overrides={shown(overrides)}: give values by name, as {{"seed": 1}}',
    )
    for name, value in overrides.items():
        config = replaced(config, name, value)
    return config


def require_kind(config: Any, config_class: Any, what: str, remedy: str) -> None:
    """Raises: InputError for a configuration of another class."""
    taken = " or ".join(c.__name__ for c in get_args(config_class) or (config_class,))
    require(
        isinstance(config, config_class),
        f"{what} is of class {type(config).__name__}, but this command takes {taken}; {remedy}",
    )


def _line(file: str, error: BaseException, make: Any) -> str:
    """Where in the file an error arose."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    if not lines and inspect.isfunction(make):  # it needs an argument
        lines = [make.__code__.co_firstlineno]
    return f", line {lines[-1]}" if lines else ""


def _reason(error: BaseException) -> str:
    """An error of a configuration file in one line."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, SystemExit):
        return "it calls exit; a configuration only returns settings"
    try:
        message = " ".join(str(error).split())
    except Exception:  # its class says it wrongly
        message = "without a message"
    if isinstance(error, TypeError):
        message += _field_hint(message)
    return f"{type(error).__name__}: {message}"


def _field_hint(message: str) -> str:
    """The remedy for a field that a class of `dials_jax.config` does not have, or lacks."""
    match = re.match(r"(\w+)\.__init__\(\) (?:.*unexpected.*'(\w+)'|missing)", message)
    config_class = match and (
        getattr(dials_jax.config, match[1], None) or getattr(dials_jax, match[1], None)
    )
    if not config_class:
        return ""
    fields = getattr(config_class, "__dataclass_fields__", ())
    return nearest(match[2], fields) if match[2] else "; add it"
