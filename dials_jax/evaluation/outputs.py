"""Scores of generated outputs: exact match with a reference, and tests that a program passes.

Outputs are stored as token ids, and scored when all of them are there. So the rules may change
without generating again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dials_jax import sharding
from dials_jax.data.tokenizer import Tokenizer
from dials_jax.evaluation.exact_match import is_correct
from dials_jax.evaluation.items import OUTPUT, Item
from dials_jax.evaluation.run_code import PASSED, execute_programs
from dials_jax.evaluation.task import METRIC_RULES, RULE_FIELDS, EvalTask
from dials_jax.evaluation.text_end import cut_at_stop, cut_tokens

NUM_PROGRAMS = 64  # executed before their verdicts are stored


@dataclass(frozen=True)
class Scored:
    """An output as text, and its score."""

    text: str
    score: float
    verdict: str = ""  # of a program: `PASSED`, or why it failed


def output_text(task: EvalTask, tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Decodes an output. A stop string that is a single token ends it here: if it is a special
    token, it is not decoded."""
    return tokenizer.decode(cut_tokens(tokens, [tokenizer.token_to_id(x) for x in task.until]))


def score_output(
    task: EvalTask, item: Item, tokens: Sequence[int], tokenizer: Tokenizer, verdict: str = ""
) -> Scored:
    """Scores one output 0 or 1. Args: verdict: of its program, if the metric executes code."""
    text = output_text(task, tokens, tokenizer)
    if task.metric == "code":
        return Scored(text, float(verdict == PASSED), verdict)
    return Scored(text, float(is_correct(task, text, item.reference)))


def rules_digest(task: EvalTask, items: Sequence[Item]) -> str | None:
    """A digest of everything that decides how outputs are scored, but for the references.

    None: the rules of all versions, by which outputs are not needed.
    """
    settings = {name: getattr(task, name) for name in RULE_FIELDS}
    if task.metric == "nelbo" or (task.metric == "choice" and task.normalise == "none"):
        return f"mean over {task.mean_over}" if task.mean_over else None
    return _digest(METRIC_RULES[task.metric], settings, [item.program for item in items])


def _digest(*content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ code


def _program(task: EvalTask, item: Item, tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    text = cut_at_stop(output_text(task, tokens, tokenizer), task.until)
    return item.program.replace(OUTPUT, text)


def execute_outputs(
    task: EvalTask,
    items: Mapping[str, Item],
    outputs: Mapping[str, Sequence[int]],
    known: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
) -> Iterator[dict[str, Any]]:
    """Executes the programs without a verdict, on the first process; yields records of verdicts.

    Args:
      items, outputs: by name of the item.
      known: stored verdicts, each after the digest of its program.
    """
    programs = {
        name: _program(task, items[name], tokens, tokenizer) for name, tokens in outputs.items()
    }
    digests = {name: _digest(text, task.time_limit) for name, text in programs.items()}
    left = [name for name in programs if known.get(name, [""])[0] != digests[name]]
    for first in range(0, len(left), NUM_PROGRAMS):
        names = left[first : first + NUM_PROGRAMS]
        execute = partial(execute_programs, [programs[name] for name in names], task.time_limit)
        verdicts = sharding.from_first_process(execute)
        stored = zip(names, verdicts, strict=True)
        yield {"verdicts": {name: [digests[name], verdict] for name, verdict in stored}}
