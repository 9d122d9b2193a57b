"""Exact match: cut a text at its stop string, extract the answer, and compare it as normalised.

The rules are described in docs/evaluation.md.
"""

from __future__ import annotations

import re
from typing import Literal

from dials_jax.errors import InputError, require
from dials_jax.evaluation.task import EvalTask
from dials_jax.evaluation.text_end import cut_at_stop

Match = Literal["first", "last"] | None

# 1234, 1,234 or 12,34,567, and maybe digits after a period. "3,4" is a pair, not a number.
_NUMBER = re.compile(
    r"(?P<sign>[-+]?\$?|\$[-+])"
    r"(?P<digits>(?:\d+|\d{1,3}(?:,\d{2,3})*,\d{3})(?:\.\d+)?|\.\d+)"
    r"[$%]?,*\.?,*"
)


def is_correct(task: EvalTask, output: str, reference: str) -> bool:
    """Whether the output, cut at its first stop string, has the reference's answer."""
    found = normalise_answer(cut_at_stop(output, task.until), task.extract, task.match)
    expected = normalise_answer(reference, task.extract, task.match)
    return found == expected or (task.compare == "math" and is_same_value(found, expected))


def is_same_value(output: str, reference: str) -> bool:
    """Whether an output states the reference's value: a LaTeX expression, or a number in text."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${reference}$"), parse(output)))


def check_reference(task: EvalTask, reference: str) -> None:
    """Refuses a reference that no output could match, or with several answers.

    Raises: InputError saying what is wrong with it.
    """
    end = reference[-60:]
    found = {normalise_number(text) for text in _extract_all(reference, task.extract)}
    answer = normalise_answer(reference, task.extract, task.match)
    require(answer != "", f"extract={task.extract!r} finds nothing in the answer {end!r}")
    require(
        task.match is not None or len(found) == 1,
        f"extract={task.extract!r} finds {len(found)} answers in {end!r}; say which one counts: "
        "match='first' or match='last'",
    )
    require(
        is_correct(task, reference, reference),
        f"a string of until={task.until!r} stands before what counts in the answer {end!r}; "
        "correct until",
    )


def normalise_answer(text: str, extract: str, match: Match = None) -> str:
    """Extracts the answer of a text, in the form in which exact match compares it.

    Args:
      extract: regular expression. The answer is the first group that took part in the match, or
        the whole match if the expression has no groups. "" takes all of `text`.
      match: which of several matches counts; None is the first.

    Returns: the answer as `normalise_number` spells it; "" without a match.
    Raises: InputError if `extract` is not a regular expression.
    """
    found = _extract_all(text, extract)
    return normalise_number(found[-1 if match == "last" else 0]) if found else ""


def _extract_all(text: str, extract: str) -> list[str]:
    if not extract:
        return [text]
    try:
        matches = re.finditer(extract, text)
    except re.error as error:
        raise InputError(f"extract={extract!r}: {error}; correct the expression") from error
    return [next(filter(None, m.groups()), "") if m.re.groups else m.group() for m in matches]


def normalise_number(text: str) -> str:
    """Strips a text. Of a number it also removes dollar and percent signs, thousands separators,
    and a comma or period at the end.

    lm-evaluation-harness does the same for GSM8K: its expressions leave out the percent sign, and
    its exact match ignores the rest. But it ignores every comma, so that "3,4" equals "34"; here
    only commas between thousands are ignored.
    """
    text = text.strip()
    number = _NUMBER.fullmatch(text)
    if not number:
        return text
    return (number["sign"] + number["digits"]).replace("$", "").replace(",", "")
