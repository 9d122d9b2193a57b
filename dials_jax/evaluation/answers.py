"""What exact match compares: the text before a stop, the answer in it, numbers spelt alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from dials_jax.errors import InputError, require
from dials_jax.evaluation.task import EvalTask

Match = Literal["first", "last"] | None

# 1234, 1,234 or 12,34,567, then perhaps digits after a period. "3,4" is a pair, not a number.
_NUMBER = re.compile(
    r"(?P<sign>[-+]?\$?|\$[-+])"
    r"(?P<digits>(?:\d+|\d{1,3}(?:,\d{2,3})*,\d{3})(?:\.\d+)?|\.\d+)"
    r"[$%]?,*\.?,*"
)


def is_right(task: EvalTask, output: str, reference: str) -> bool:
    """Whether an output has the reference's answer, in the part before the first stop string."""
    found = normalise_answer(before_stop(output, task.until), task.extract, task.match)
    return found == normalise_answer(reference, task.extract, task.match)


def check_reference(task: EvalTask, reference: str) -> None:
    """Raises: InputError for a reference that no output could match, or whose answer is unclear."""
    end = reference[-60:]
    found = {normalise_number(text) for text in _found(reference, task.extract)}
    answer = normalise_answer(reference, task.extract, task.match)
    require(answer != "", f"extract={task.extract!r} finds nothing in the answer {end!r}")
    require(
        task.match is not None or len(found) == 1,
        f"extract={task.extract!r} finds {len(found)} answers in {end!r}; say which one counts: "
        "match='first' or match='last'",
    )
    require(
        is_right(task, reference, reference),
        f"a string of until={task.until!r} stands before what counts in the answer {end!r}; "
        "correct until",
    )


def before_stop(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings; all of it where there is none."""
    return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]


def normalise_answer(text: str, extract: str, match: Match = None) -> str:
    """What exact match compares, in reference and output alike.

    Args:
      extract: regular expression. Of a match the first group that took part counts, all of it
        where the expression has no groups. "" takes all of `text`, and no match gives "".
      match: the match that counts; None is the first.

    Returns: the stripped answer, as `normalise_number` spells it.
    Raises: InputError if `extract` is not a regular expression.
    """
    found = _found(text, extract)
    return normalise_number(found[-1 if match == "last" else 0]) if found else ""


def _found(text: str, extract: str) -> list[str]:
    if not extract:
        return [text]
    try:
        matches = re.finditer(extract, text)
    except re.error as error:
        raise InputError(f"extract={extract!r}: {error}; correct the expression") from error
    return [next(filter(None, m.groups()), "") if m.re.groups else m.group() for m in matches]


def normalise_number(text: str) -> str:
    """A number without dollar and percent signs, thousands separators, or a comma or period at its
    end; any other text as it is, stripped.

    So lm-evaluation-harness scores GSM8K: its expressions leave the percent sign out, and its
    exact match ignores the others. It also ignores commas where they separate no thousands: there
    "3,4" equals "34", and here it does not.
    """
    text = text.strip()
    number = _NUMBER.fullmatch(text)
    if not number:
        return text
    return (number["sign"] + number["digits"]).replace("$", "").replace(",", "")
