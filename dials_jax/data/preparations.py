"""Fields of published data sets that templates cannot make, as lm-evaluation-harness makes them.

`TaskData.preparation` names one of these functions; it gives fields that are added to a record.
"""

from __future__ import annotations

import re
from typing import Any

from dials_jax.data.records import get_field


def hellaswag_fields(record: dict[str, Any]) -> dict[str, Any]:
    """`query`, `endings` and `label`: without marks of WikiHow ("[step]"), as one sentence each."""
    begin, rest, activity = (get_field(record, x) for x in ("ctx_a", "ctx_b", "activity_label"))
    return {
        "query": _without_marks(f"{activity}: {begin} {rest.capitalize()}"),
        "endings": [_without_marks(ending) for ending in get_field(record, "endings")],
    }


def _without_marks(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def mmlu_fields(record: dict[str, Any]) -> dict[str, Any]:
    """`question` without spaces around it, and `subject_words`, the subject without underscores."""
    return {
        "question": get_field(record, "question").strip(),
        "subject_words": get_field(record, "subject").replace("_", " "),
    }


PREPARATIONS = {"hellaswag": hellaswag_fields, "mmlu": mmlu_fields}
