"""What a sampler, a cache or a policy of one's own does, as far as its code says it.

A sweep continues only with the settings that it has. The settings of a class that a user wrote are
its fields and also its code: the same name may compute something else today.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from typing import Any

from dials_jax.digests import content_id

NOT_OWN = ("dials_jax", "builtins", "typing", "abc")


def code_facts(**values: Any) -> dict[str, str]:
    """`{"code of NAME": digest}` for each value of a class that is not this library's.

    The digest is of the instructions, defaults and plain constants of its methods, and of what they
    use of their own module; not of comments and places of lines. What is imported from other
    modules is not in it. Another version of Python may give another one.
    """
    found = {name: _classes(type(value)) for name, value in values.items()}
    return {f"code of {name}": content_id(codes) for name, codes in found.items() if codes}


def _classes(cls: type) -> list[Any]:
    own = [x for x in cls.__mro__ if x.__module__.split(".")[0] not in NOT_OWN]
    seen: set[int] = set()
    return [{name: _facts(value, seen) for name, value in _members(x)} for x in own]


def _members(cls: type) -> list[tuple[str, Any]]:
    """Methods and constants; what `dataclass` notes of the fields is in the settings."""
    left_out = ("__annotations__", "__module__", "__qualname__", "__doc__", "__match_args__")
    return [(name, value) for name, value in vars(cls).items() if name not in left_out]


def _facts(value: Any, seen: set[int]) -> Any:
    """JSON values for code and plain constants; None for others."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    if isinstance(value, functools.partial):
        return [_facts(x, seen) for x in (value.func, value.args, value.keywords)]
    if callable(value):
        value = inspect.unwrap(value)  # of `jax.jit`, for example
    if isinstance(value, types.FunctionType):
        return _function(value, seen)
    if isinstance(value, tuple | list):
        return [_facts(x, seen) for x in value]
    if isinstance(value, dict):
        return {str(name): _facts(x, seen) for name, x in value.items()}
    return repr(value) if isinstance(value, bool | int | float | str | None) else None


def _function(fn: types.FunctionType, seen: set[int]) -> Any:
    if id(fn) in seen:
        return None
    seen.add(id(fn))
    names, code = fn.__globals__, _instructions(fn.__code__)
    used = [name for name in sorted(_globals(fn.__code__)) if name in names]
    used = [name for name in used if _is_of(names[name], fn.__module__)]
    beside = {name: _facts(names[name], seen) for name in used}
    return [code, _facts(fn.__defaults__, seen), _facts(fn.__kwdefaults__, seen), beside]


def _is_of(value: Any, module: str) -> bool:
    """Whether a global is of this module: a function of it, or a constant."""
    return getattr(value, "__module__", module) == module and not isinstance(value, type)


def _globals(code: types.CodeType) -> set[str]:
    """Names of globals that a function reads; `co_names` has those of attributes as well."""
    inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    read = {x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"}
    return read.union(*map(_globals, inner))


def _instructions(code: types.CodeType) -> list[Any]:
    return [code.co_code.hex(), list(map(_constant, code.co_consts)), code.co_names]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _instructions(value)
    if isinstance(value, frozenset):  # in another order in each process
        return sorted(map(repr, value))
    return repr(value)
