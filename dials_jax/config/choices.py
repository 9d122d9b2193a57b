"""Reads options that choose one of several dataclasses for a field, written as in Python.

--tasks.0.sampler 'Dream(max_new_tokens=64, steps=32)'
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any, TypeVar

from dials_jax.config.typed import Typed, dataclasses_of, field_hints, replaced
from dials_jax.errors import InputError, nearest, require

C = TypeVar("C")


def choice_flags(config: Any, flag: str = "--") -> Iterator[tuple[str, tuple[type, ...]]]:
    """Yields (flag, classes) for each field, at any depth, that is one of several dataclasses.

    Args:
      flag: the beginning of every flag.
    """
    if isinstance(config, tuple):
        for i, item in enumerate(config):
            yield from choice_flags(item, f"{flag}{i}.")
    elif isinstance(config, Typed):
        for name in field_hints(type(config)):
            flag_of = f"{flag}{name.replace('_', '-')}"
            classes = dataclasses_of(field_hints(type(config))[name])
            if classes:
                yield flag_of, classes
            yield from choice_flags(getattr(config, name), f"{flag_of}.")


def apply_choices(config: C, arguments: list[str]) -> tuple[C, list[str]]:
    """Applies the arguments that choose a dataclass. Returns the configuration, and the others.

    Raises: InputError for an unknown class or field, and for a field of a choice that is None.
    """
    left, given = [], iter(arguments)
    for argument in given:
        flag, equals, text = argument.partition("=")
        known, parent = dict(choice_flags(config)), flag.rpartition(".")[0]
        if (classes := known.get(flag.replace("_", "-"))) is not None:
            value = parse_choice(text if equals else next(given, ""), classes, flag)
            config = replaced(config, flag[2:].replace("-", "_"), value)
            continue
        # No field of None can be set.
        if (classes := known.get(parent)) and _at(config, parent) is None:
            names = ", ".join(cls.__name__ for cls in classes)
            raise InputError(
                f"{flag}: {parent} is None; choose one of {names}, as {parent} "
                f"'{classes[0].__name__}({flag.rpartition('.')[2].replace('-', '_')}=...)'"
            )
        left.append(argument)
    return config, left


def _at(config: Any, flag: str) -> Any:
    """Returns the value of the field with this flag."""
    for name in flag[2:].replace("-", "_").split("."):
        config = config[int(name)] if isinstance(config, tuple) else getattr(config, name)
    return config


def parse_choice(text: str, classes: tuple[type, ...], flag: str) -> Any:
    """Parses `Name(field=value, ...)`, `Name` or `None`. Raises: InputError for anything else."""
    kinds = {cls.__name__: cls for cls in classes}
    if text == "None":
        return None
    try:
        call = ast.parse(text, mode="eval").body
        name, args, keywords = (
            (call.func.id, call.args, call.keywords)
            if isinstance(call, ast.Call)
            else (call.id, [], [])
        )
        args = [ast.literal_eval(arg) for arg in args]
        settings = {keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords}
    except (AttributeError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{flag} {text!r}: give {next(iter(kinds))}(field=value, ...), in quotes; one of "
            f"{', '.join(kinds)}"
        ) from error
    require(name in kinds, f"{flag}: {name!r} is not known{nearest(name, kinds)}")
    fields = kinds[name].__dataclass_fields__
    for field in settings:
        require(field in fields, f"{flag}: unknown field {field!r}{nearest(str(field), fields)}")
    try:
        return kinds[name](*args, **settings)
    except TypeError as error:  # a field is missing, or given twice
        raise InputError(f"{flag}: {name}: {error}; give each field once") from error
