"""Checks that fields and arguments have the types of their hints.

A configuration comes from Python, a command line or JSON, and Python accepts anything: a text for a
number, one path for a tuple of paths, a misspelt name. So one function, `as_type`, compares values
with type hints. `Typed` calls it for the fields of a dataclass,
`typed` for the arguments of a function. Hints that it does not know, such as arrays, are not
checked.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import operator
import os
import typing
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

import numpy as np

from dials_jax.errors import InputError, nearest, require
from dials_jax.files import require_local

T = TypeVar("T")
F = TypeVar("F", bound=Callable)


@dataclasses.dataclass(frozen=True)
class Range:
    """The integers that a field takes, both ends included: `Annotated[int, Range(0, 9)]`."""

    low: int
    high: int


INT32 = Range(-(2**31), 2**31 - 1)  # integers without another range: arrays hold no others
Count = Annotated[int, Range(0, 2**63 - 1)]  # of parameters, tokens or bytes, in files
# JAX keeps 32 bits of a seed: the key of 2**32 is the key of 0.
Seed = Annotated[int, Range(0, 2**32 - 1)]


class Local:
    """Marks texts that name a file or folder: see `Place`."""


# A file or folder of this machine. What is at another address, as gs://, is refused with the
# settings, before any work. An empty text is none.
Place = Annotated[str, Local]


class Typed:
    """A dataclass whose fields are compared with their hints when it is made.

    Harmless differences are corrected: lists become tuples, numpy's numbers Python's, integers
    floats for a float field, paths texts. A class with checks of its own begins them with
    `super().__post_init__()`.

    Raises: InputError for a value of another type, an unknown name of a closed set, infinity and
      NaN, and integers beyond 32 bits or the field's `Range`.

    Attributes:
      RENAMED: the names that fields had in earlier versions, and those they have now. Stored
        settings are read under either (`from_dict`); anyone else is told the new name.
    """

    RENAMED: ClassVar[dict[str, str]] = {}

    def __new__(cls, *args: Any, **kwargs: Any):
        old = [name for name in kwargs if name in cls.RENAMED]
        words = ", ".join(
            f"{name!r} of {cls.__name__} is now {_place(cls.RENAMED[name])}" for name in old
        )
        require(not old, f"{words}; rename {'it' if len(old) == 1 else 'them'}")
        return super().__new__(cls)

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Stored settings of an earlier version as this one stores them.

        A class whose values changed too, and not their names alone, extends this.
        """
        for old, new in cls.RENAMED.items():
            require(
                old not in values or new not in values, f"{old!r} is now {new!r}; give only that"
            )
        return {cls.RENAMED.get(name, name): value for name, value in values.items()}

    def __post_init__(self):
        for name, hint in field_hints(type(self)).items():
            object.__setattr__(self, name, as_type(hint, getattr(self, name), name))


def _place(name: str) -> str:
    """A field, for messages: of a part as code that gives it."""
    part, _, field = name.rpartition(".")
    return f"{part}=...({field}=...)" if part else repr(field)


@functools.cache
def field_hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def typed(function: F) -> F:
    """A function whose arguments are compared with their hints, as the fields of `Typed` are.

    Raises: InputError for an argument of an unknown name, too, naming the nearest valid one.
    """
    signature = inspect.signature(function)
    named = signature.parameters.keys() - {"self", "cls"}
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds

    @functools.cache
    def hints() -> dict[str, Any]:
        return typing.get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs if not takes_any else ():
            if name not in signature.parameters:
                hint = nearest(name, named)
                raise InputError(f"{function.__name__} takes no argument {name!r}{hint}")
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in hints():
                bound.arguments[name] = as_type(hints()[name], value, name)
        return function(*bound.args, **bound.kwargs)

    return checked


def as_list(values: Any) -> list[Any]:
    """A list; of one, where there is a text or a path alone, whose letters nobody means.

    Raises: InputError for what has no items.
    """
    if isinstance(values, str | Path):
        return [values]
    require(isinstance(values, Iterable), f"{shown(values)} is no list; give one, as [...]")
    return list(values)


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """A `Typed` dataclass from stored JSON values: the inverse of `to_dict`.

    Values of earlier versions are read under their old names.

    Args:
      where: what messages begin with, such as the file.

    Raises: InputError for an unknown or missing field, naming the nearest valid one, and for what
      the class refuses.
    """
    try:
        return _from_dict(cls, values)
    except InputError as error:
        raise InputError(f"{where}: {error}" if where else str(error)) from None


def _from_dict(cls: type[T], values: Any) -> T:
    require(isinstance(values, dict), f"{shown(values)} is no {cls.__name__}; give its fields")
    hints, values = field_hints(cls), cls.upgraded(values)
    for name in values:
        require(name in hints, f"unknown field {shown(name)}{nearest(str(name), hints)}")
    for f in dataclasses.fields(cls):
        has_default = (f.default, f.default_factory) != (dataclasses.MISSING,) * 2
        require(has_default or f.name in values, f"field {f.name!r} is missing")
    return cls(**{name: as_type(hints[name], value, name) for name, value in values.items()})


def replaced(config: T, name: str, value: Any) -> T:
    """A configuration with another value of a field.

    Args:
      name: dotted, as "optimizer.num_steps" or "tasks.0.limit".

    Raises: InputError for an unknown name, naming the nearest one, and for what the field refuses.
    """
    field, _, rest = name.partition(".")
    if isinstance(config, tuple):
        known = field.isdigit() and int(field) < len(config)
        require(known, f"{name!r}: number {field!r} is none of the {len(config)} there are, from 0")
        i = int(field)
        return (*config[:i], replaced(config[i], rest, value) if rest else value, *config[i + 1 :])
    known = isinstance(config, Typed)
    require(known, f"{name!r}: {shown(config)} has no fields; give the field above as a whole")
    fields = field_hints(type(config))
    new = config.RENAMED.get(field)
    require(new is None, f"{field!r} of {type(config).__name__} is now {new!r}; rename it")
    hint = nearest(field, fields)
    require(field in fields, f"{type(config).__name__} has no field {field!r}{hint}")
    inner = replaced(getattr(config, field), rest, value) if rest else value
    return dataclasses.replace(config, **{field: inner})


# ------------------------------------------------------------------------- one value, one hint


def as_type(hint: Any, value: Any, name: str, whole: Any = None) -> Any:
    """`value` as a hint means it.

    Args:
      name: what messages call it.
      whole: the hint that messages describe; None: this one.

    Raises: InputError, see `Typed`.
    """
    whole = hint if whole is None else whole
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is int:
        return _as_int(value, name, whole, INT32)
    if origin is Annotated:
        for bounds in args[1:]:
            if isinstance(bounds, Range):
                return _as_int(value, name, whole, bounds)
        value = as_type(args[0], value, name, whole)
        if Local in args[1:]:
            require_local(value, name)
        return value
    if origin in (Union, UnionType):
        return _as_one_of(args, value, name, whole)
    if origin is Literal:
        return _as_choice(args, value, name, whole)
    if origin is tuple:
        return _as_tuple(args, value, name)
    if origin is dict:
        _require_type(isinstance(value, dict), whole, value, name)
        return {as_type(args[0], k, name): as_type(args[1], v, name) for k, v in value.items()}
    if hint in _PLAIN:
        return _PLAIN[hint](value, name, whole)
    if _is_typed(hint) and isinstance(value, dict):
        return from_dict(hint, value, name)
    if type(hint) is type and hint is not object:
        _require_type(isinstance(value, hint), whole, value, name)
    return value


def _as_one_of(options: tuple, value: Any, name: str, whole: Any) -> Any:
    if NoneType in options and value is None:
        return None
    options = tuple(option for option in options if option is not NoneType)
    if not all(_is_known(option) for option in options):
        return value
    if len(options) == 1:
        return as_type(options[0], value, name, whole)
    if isinstance(value, dict) and all(_is_typed(option) for option in options):
        cls = _of_kind(options, value, name)
        fields = {key: x for key, x in value.items() if key != "kind" or key in field_hints(cls)}
        return from_dict(cls, fields, name)
    for option in options:
        try:
            return as_type(option, value, name)
        except InputError:
            continue
    raise InputError(f"{name}={shown(value)} must be {_described(whole)}")


def _of_kind(classes: tuple[type, ...], value: dict, name: str) -> type:
    """The one of several dataclasses that a value says it is of."""
    kinds = {kind_of(cls): cls for cls in classes}
    kind = value.get("kind")
    known = isinstance(kind, str) and kind in kinds
    require(known, f"{name}: unknown kind {shown(kind)}{nearest(str(kind), kinds)}")
    return kinds[kind]


def kind_of(cls: type) -> str:
    """What tells a dataclass from others in JSON: its field `kind`, or its name without one."""
    hint = field_hints(cls).get("kind")
    return cls.__name__ if hint is None else typing.get_args(hint)[0]


def dataclasses_of(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a hint allows, if these are several; else none."""
    if typing.get_origin(hint) not in (Union, UnionType):
        return ()
    options = tuple(option for option in typing.get_args(hint) if option is not NoneType)
    return options if len(options) > 1 and all(map(_is_typed, options)) else ()


def _as_choice(names: tuple, value: Any, name: str, whole: Any) -> Any:
    _require_type(isinstance(value, str), whole, value, name)
    require(value in names, f"{name}={shown(value)} is not known{nearest(value, names)}")
    return str(value)


def _as_tuple(args: tuple, value: Any, name: str) -> tuple:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str | os.PathLike):
        raise InputError(f"{name} is a text; give a tuple, as ({str(value)[:60]!r},)")
    if not isinstance(value, list | tuple | range):
        raise InputError(f"{name}={shown(value)} is no tuple; give one, as (..., )")
    if args[-1] is Ellipsis:
        return tuple(as_type(args[0], item, name) for item in value)
    require(
        len(value) == len(args), f"{name}: {shown(value)} has {len(value)} parts, not {len(args)}"
    )
    return tuple(as_type(hint, item, name) for hint, item in zip(args, value, strict=True))


def _as_bool(value: Any, name: str, whole: Any) -> bool:
    _require_type(isinstance(value, bool | np.bool_), whole, value, name)
    return bool(value)


def _as_int(value: Any, name: str, whole: Any, bounds: Range) -> int:
    _require_type(not isinstance(value, bool), whole, value, name)
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    _require_type(number is not None, whole, value, name)
    require(
        bounds.low <= number <= bounds.high,
        f"{name}={shown(number)} must lie in {bounds.low} to {bounds.high}",
    )
    return number


def _as_float(value: Any, name: str, whole: Any) -> float:
    _require_type(isinstance(value, Real) and not isinstance(value, bool), whole, value, name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    require(math.isfinite(number), f"{name}={shown(value)} must be a finite number")
    return number


def _as_text(value: Any, name: str, whole: Any) -> str:
    _require_type(isinstance(value, str | os.PathLike), whole, value, name)
    text = os.fspath(value)
    _require_type(isinstance(text, str), whole, value, name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}={shown(value)} holds bytes that are no UTF-8; rename what it names"
        ) from error
    return str(text)


_PLAIN = {bool: _as_bool, float: _as_float, str: _as_text}


def _is_typed(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Typed)


def _is_known(hint: Any) -> bool:
    """Whether `as_type` compares values with it."""
    return typing.get_origin(hint) in (Annotated, Literal, tuple, dict) or type(hint) is type


# ------------------------------------------------------------------------------------- messages


def _require_type(condition: bool, hint: Any, value: Any, name: str) -> None:
    if not condition:
        raise InputError(f"{name}={shown(value)} must be {_described(hint)}")


_WORDS = {
    bool: "True or False", int: "an integer", float: "a number", str: "a text", NoneType: "None",
}  # fmt: skip


def _described(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _described(args[0])
    if origin in (Union, UnionType):
        return " or ".join(_described(option) for option in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (tuple, dict):
        return f"a {origin.__name__}"
    return _WORDS.get(hint) or f"a {hint.__name__}"


def shown(value: Any) -> str:
    """A value in a message: on one line, and short."""
    if isinstance(value, type):
        return value.__name__
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values; one of several that a field allows says its `kind`."""
    return json.loads(json.dumps(_plain(type(config), config)))


def _plain(hint: Any, value: Any) -> Any:
    if isinstance(value, tuple | list):
        args = typing.get_args(hint)
        each = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        return [_plain(each, item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    hints = field_hints(type(value))
    plain = {name: _plain(hints[name], getattr(value, name)) for name in hints}
    return {"kind": kind_of(type(value))} | plain if dataclasses_of(hint) else plain


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value} must be positive")
