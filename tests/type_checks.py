"""Checks the types and shapes of all calls in this library at run time.

`jaxtyping.jaxtyped` binds each call's arguments by name and checks them once before and once after
the function: a tenth of the tests' time. Here beartype checks each argument and result once, all
of a call within one scope of axis names, which states the same.
"""

import dataclasses
import functools
import inspect
import types
import typing

import jaxtyping
from beartype import beartype

with_arguments = jaxtyping.jaxtyped
scope = jaxtyping.jaxtyped("context")  # holds nothing: the names are in jaxtyping's own stack


def checked(fn=None, *, typechecker=None):
    """In place of `jaxtyped`: a function, or a dataclass's `__init__`, that checks its calls."""
    if fn is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = checked(fn.__init__)
        return fn
    if not fn.__annotations__:
        return fn

    known_hints = with_known_hints(fn)

    @functools.cache  # made at the first call: most functions are never called by a process
    def strict():
        checks = beartype(known_hints)
        if any("{" in str(hint) for hint in fn.__annotations__.values()):  # sizes of its arguments
            checks = with_arguments(checks, typechecker=None)
        return checks

    @functools.wraps(fn)
    def call(*args, **kwargs):
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        with scope:
            return strict()(*args, **kwargs)

    return call


def with_known_hints(fn):
    """The same function; those of its hints that nothing defines yet are not checked."""
    copy = types.FunctionType(
        fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__ = fn.__kwdefaults__, fn.__qualname__
    copy.__annotations__ = {
        name: known(hint, fn.__globals__) for name, hint in fn.__annotations__.items()
    }
    return copy


def known(hint, names):
    holder = types.SimpleNamespace(__annotations__={"hint": hint})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["hint"]
    except Exception:  # a name that only type checkers import, or one that is defined below
        return typing.Any


def check_types(package):
    """From here on, what is imported of this package checks its calls."""
    jaxtyping.jaxtyped = checked  # the name that the hook decorates with
    jaxtyping.install_import_hook(package, "beartype.beartype")
