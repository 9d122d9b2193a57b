"""What is wrong with what the user gave, in one line that names the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the thing, then the remedy.

    What the user gave may hold characters that end a line; they become spaces.
    """

    def __init__(self, message: object = ""):
        super().__init__(" ".join(str(message).splitlines()))


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; did you mean 'd_model'?`, or the list of valid names; none for one of them.

    So a message may be made before it is known whether it is needed.
    """
    valid = sorted(valid)
    if name in valid:
        return ""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid names: {', '.join(valid)}"


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_packages(extra: str, *names: str) -> None:
    """Raises: InputError for packages that are not installed, before work that ends with them."""
    missing = [name for name in names if find_spec(name) is None]
    require(not missing, f"{', '.join(missing)} missing; pip install 'dials_jax[{extra}]'")
