"""Calls with arrays of other shapes, or values of other types, are refused at run time."""

import dataclasses
import sys

import numpy as np
import pytest

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np
from jaxtyping import Float

def add(a: Float[np.ndarray, "B D"], b: Float[np.ndarray, "D"]) -> Float[np.ndarray, "B D"]:
    return a + b

def lost(a: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B D"]:
    return a[1:]

def first(a: Float[np.ndarray, "N"], size: int) -> Float[np.ndarray, "{size}"]:
    return a[:size]

@dataclass(frozen=True)
class Steps:
    count: int = 2

    @property
    def times(self) -> Float[np.ndarray, "{self.count}+1"]:
        return np.zeros(3)

    @classmethod
    def of(cls, count: int) -> Steps:
        return cls(count)
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A module of `SOURCE`, imported as this library's are."""
    from tests.type_checks import check_types

    folder = tmp_path_factory.mktemp("checked")
    (folder / "typed_example.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    check_types("typed_example")
    import typed_example

    sys.path.remove(str(folder))
    return typed_example


def test_what_fits_passes(checked):
    assert checked.add(np.ones((2, 3)), np.ones(3)).sum() == 12
    assert checked.first(np.ones(3), 2).shape == (2,)
    assert checked.Steps().times.shape == (3,) and checked.Steps.of(2) == checked.Steps()


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.add(np.ones((2, 3)), np.ones(2)),  # D is 3 and 2
        lambda m: m.add(np.ones((2, 3), int), np.ones(3)),
        lambda m: m.add(np.ones(3), np.ones(3)),
        lambda m: m.lost(np.ones((2, 3))),  # B is 2 and 1
        lambda m: m.first(np.ones(3), 4),
        lambda m: m.first(np.ones(3), size=4),
        lambda m: m.first(np.ones(3), "2"),
        lambda m: m.Steps("2"),
        lambda m: m.Steps(3).times,
        lambda m: m.Steps.of("2"),
        lambda m: dataclasses.replace(m.Steps(), count=None),
    ],
)
def test_what_does_not_fit_is_refused(checked, call):
    with pytest.raises(Exception, match=r"[Vv]iolat"):
        call(checked)
