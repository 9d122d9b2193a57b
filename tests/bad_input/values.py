"""What malformed inputs are made of: values, texts and damaged files."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st


class Case(NamedTuple):
    """One input.

    Attributes:
      wrong: that it must be refused is known from how it was made; of others either is right.
    """

    value: Any
    wrong: bool


# Of no field's and no argument's type, or beyond all of their ranges.
ALIEN = (
    object(), b"x", 1j, frozenset({1}), float("nan"), float("inf"), 10**400, -(10**400), "\ud800",
    len, Exception("x"), [object()], {object(): 1}, slice(2),
)  # fmt: skip
ODD = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 0.5, -0.5, 1e308, "", "x", "3", "~nobody/x",
    "a" * 5000, "a\0b", [], (), {}, [None], (1, 2), {"kind": "x"}, np.arange(3),
    np.float32(1), Path("x"),
)  # fmt: skip
TEXTS = (
    "", "x", "-1", "0", "3", "1e999", "nan", "9" * 30, "9" * 5000, "é", "\udcff", "a\0b", "²", "٣",
    "~nobody/x", "a" * 5000, "[", "{}", "Confidence(", "Confidence(10**30)", "Dream(steps='x')",
    "None", "es-1-", "es-0-0", "gs://bucket/x", "--", "=", "../x", "static=", "random=9", "2+3",
    "True", "((" * 500, "\n",
)  # fmt: skip
NO_FIELD = {"odd": [{}]}  # no typed field takes it, at any depth
JSON_VALUES = (
    None, True, -1, 0, 3, 2**31, 2**70, 0.5, 1e308, float("nan"), "", "x", "../x", "a" * 5000,
    "\ud800", [], {}, [[]], [None], {"a": 1},
)  # fmt: skip

alien_values = st.sampled_from(ALIEN)
# Also what nobody thought of.
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
odd_values = st.sampled_from(ODD) | st.recursive(
    plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2)
)
odd_texts = st.sampled_from(TEXTS) | st.text(max_size=12)


def places(values: Any, place: tuple = ()) -> list[tuple]:
    """The place of every value inside JSON values."""
    if not isinstance(values, dict | list):
        return [place]
    inner = values.items() if isinstance(values, dict) else enumerate(values)
    return [place] * bool(place) + [p for name, x in inner for p in places(x, (*place, name))]


def at(values: Any, place: tuple) -> Any:
    for name in place:
        values = values[name]
    return values


@st.composite
def edited_json(draw, valid: dict, required: tuple = (), typed: bool = False):
    """A JSON object with another, no or one more value somewhere.

    Args:
      required: fields at the top without which it is wrong.
      typed: whether every value is compared with a type.
    """
    values = deepcopy(valid)
    place = draw(st.sampled_from(places(values)))
    holder, name = at(values, place[:-1]), place[-1]
    how = draw(st.sampled_from(["value", "no field", "remove", "add"]))
    wrong = False
    if how == "value":
        holder[name] = draw(st.sampled_from(JSON_VALUES))
    elif how == "no field":
        holder[name], wrong = NO_FIELD, typed
    elif how == "remove":
        del holder[name]
        wrong = len(place) == 1 and name in required
    else:
        values[draw(st.sampled_from(["odd", "", "kind", "digest"]))], wrong = 3, typed
    return Case(values, wrong)


def json_bytes(values: Any) -> bytes:
    return json.dumps(values).encode()


@st.composite
def broken_json(draw, valid: Any):
    """Bytes that are no JSON object."""
    text = json_bytes(valid)
    cut = draw(st.integers(0, len(text) - 1))
    number = b'{"a": ' + b"9" * 5000 + b"}"
    deep = [b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"]
    others = [b"", b"null", b"3", b"[]", b'"x"', b"\xff\xfe", b"\0" * 9, number, *deep]
    options = [text[:cut], text[:cut] + b"\xff" + text[cut:], text + b"}", *others]
    return Case(draw(st.sampled_from(options)), True)


def damaged_json(valid: dict, required: tuple = (), typed: bool = False):
    """A JSON file that was edited or damaged, as bytes."""
    edited = edited_json(valid, required, typed)
    return edited.map(lambda x: Case(json_bytes(x.value), x.wrong)) | broken_json(valid)


@st.composite
def damaged_lines(draw, records: list[dict], typed: bool = False):
    """A file of JSON lines with one that was edited or damaged, as bytes."""
    number = draw(st.integers(0, len(records) - 1))
    line = draw(damaged_json(records[number], typed=typed))
    lines = [json_bytes(record) for record in records]
    lines[number] = line.value
    blank = line.value.strip() in (b"", b"\0" * 9)
    return Case(b"\n".join(lines) + b"\n", line.wrong and not blank)
