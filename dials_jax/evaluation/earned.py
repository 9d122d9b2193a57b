"""The scores of one policy on one task, summed over batches, and what is left to score.

A task is a number of pairs of prompt and answer, and of copies of each: one copy where an answer is
generated, `num_samples` masked copies where a likelihood is estimated. Every batch gives a record
of plain JSON values. The records add up to the scores, in any order and from any batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from dials_jax.evaluation.execution import Execution
from dials_jax.skipping.flops import Flops

Record = Mapping[str, Any]


def batch_record(
    names: Sequence[str],
    copies: Sequence[int],
    values: Sequence[float],
    flops: Flops,
    execution: Execution,
    examples: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of one batch.

    Args:
      names, copies, values: of every sequence: its pair, which copy of it, and the score.
      examples: texts to look at, by the name of the pair.
    """
    scores: list[list[Any]] = []  # of a pair's copies in a row: name, first, how many, their sum
    for name, copy, value in zip(names, copies, values, strict=True):
        last = scores[-1] if scores else None
        if last and last[0] == name and last[1] + last[2] == copy:
            last[2:] = last[2] + 1, last[3] + float(value)
        else:
            scores.append([name, int(copy), 1, float(value)])
    record = {"scores": scores, "flops": flops.to_dict(), "execution": execution.to_dict()}
    return record | ({"examples": dict(examples)} if examples else {})


class Earned:
    """The sum of the records of one policy on one task.

    Attributes:
      num_done: sequences that are scored, all copies counted.
      execution: which layers ran in them.
      examples: texts to look at, by the name of the pair.
    """

    def __init__(self, num_layers: int, pairs: Mapping[str, int], records: Iterable[Record] = ()):
        """Args: pairs: the number of copies of each, by name."""
        self.execution = Execution(num_layers)
        self.examples: dict[str, Any] = {}
        self.num_done = 0
        self._costs: list[Flops] = []
        self._left = {name: np.ones(number, bool) for name, number in pairs.items()}
        self._sums: dict[str, list[float]] = {name: [] for name in pairs}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Adds a batch, unless a part of it is scored already or does not belong to the task."""
        parts = [(name, slice(first, first + n), n) for name, first, n, _ in record["scores"]]
        if not all(self._left.get(name, _NONE)[span].sum() == n for name, span, n in parts):
            return
        for name, span, n in parts:
            self._left[name][span] = False
            self.num_done += n
        for name, _, _, total in record["scores"]:
            # null: not finite, which JSON cannot hold; only log 0 is possible.
            self._sums[name].append(-math.inf if total is None else total)
        self.execution.add_counts(**record["execution"])
        self._costs.append(Flops.from_dict(record["flops"]))
        self.examples |= record.get("examples", {})

    def left(self, names: Sequence[str]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """The copies that are not scored yet: numbers of the names, and of the copies."""
        copies = [np.flatnonzero(self._left[name]) for name in names]
        pairs = np.repeat(np.arange(len(names)), [len(found) for found in copies])
        return pairs, np.concatenate([np.zeros(0, int), *copies])

    def mean(self, name: str) -> float:
        """The mean score of a pair's copies, summed exactly, because batches come in any order."""
        return math.fsum(self._sums[name]) / len(self._left[name])

    @property
    def flops(self) -> Flops:
        return Flops.sum(self._costs)


_NONE = np.zeros(0, bool)
