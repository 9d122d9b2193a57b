"""What a sampler or a cache of one's own does, as far as its class says it.

A sweep continues only with the settings that it has. The settings of a class that a user wrote are
its fields and also its code: the same name may compute something else today.
"""

from __future__ import annotations

import types
from typing import Any

from dials_jax.digests import content_id

METHOD_KINDS = (staticmethod, classmethod)


def code_facts(**values: Any) -> dict[str, str]:
    """`{"code of NAME": digest}` for each value of a class that is not this library's.

    The digest is of the instructions of all its methods, without comments and places of lines.
    Another version of Python may give another one.
    """
    found = {name: _codes(type(value)) for name, value in values.items()}
    return {f"code of {name}": content_id(codes) for name, codes in found.items() if codes}


def _codes(cls: type) -> list[Any]:
    own = [x for x in cls.__mro__ if x.__module__.split(".")[0] not in ("dials_jax", "builtins")]
    own = [x for x in own if x.__module__ not in ("typing", "abc")]
    return [_members(x) for x in own]


def _members(cls: type) -> dict[str, Any]:
    """Methods and constants, by name; what `dataclass` adds comes from the fields."""
    members = {}
    for name, value in vars(cls).items():
        value = value.fget if isinstance(value, property) else value
        value = value.__func__ if isinstance(value, METHOD_KINDS) else value
        if isinstance(value, types.FunctionType):
            members[name] = _instructions(value.__code__)
        elif isinstance(value, int | float | str | tuple | None) and not name.startswith("__"):
            members[name] = repr(value)
    return members


def _instructions(code: types.CodeType) -> list[Any]:
    return [code.co_code.hex(), list(map(_constant, code.co_consts)), code.co_names]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _instructions(value)
    if isinstance(value, frozenset):  # in another order in each process
        return sorted(map(repr, value))
    return repr(value)
