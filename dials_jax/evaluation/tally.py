"""The record of a scored batch, and the sum of the records of one policy on one task.

A task has pairs of prompt and answer, and copies of each pair: one where an answer is generated,
`num_samples` masked ones where a likelihood is estimated. A record holds plain JSON values. The sum
of records does not depend on their order or on how sequences were batched, so a task that was
stopped continues from the records it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dials_jax.sampling.generation import Generation
from dials_jax.skipping.flops import Flops

NUM_BINS = 10  # equal bins of the mask ratio over (0, 1]
Record = Mapping[str, Any]


class LayerCounts:
    """Counts which layers ran, by the share of the answer that was still masked.

    A model call counts once for each of its sequences, unless nothing of it is masked.

    Attributes:
      calls: model calls per bin of the mask ratio.
      executed: those of them that ran a layer, per bin and layer.
    """

    def __init__(self, num_layers: int):
        self.executed: Int[np.ndarray, "bins L"] = np.zeros((NUM_BINS, num_layers), np.int64)
        self.calls: Int[np.ndarray, "bins"] = np.zeros(NUM_BINS, np.int64)

    def add(
        self, gates: Bool[np.ndarray, "*S L R"], masked_share: Float[np.ndarray, "*S _"]
    ) -> None:
        """Adds model calls; under guidance R counts both halves, which have the same shares."""
        repeats = gates.shape[-1] // masked_share.shape[-1]
        share = np.concatenate([masked_share] * repeats, axis=-1).reshape(-1)
        by_sequence = np.moveaxis(gates, -2, -1).reshape(share.size, -1)
        bins = np.ceil(share * NUM_BINS - 1e-6).astype(int) - 1
        np.add.at(self.executed, bins[bins >= 0], by_sequence[bins >= 0])
        np.add.at(self.calls, bins[bins >= 0], 1)

    def add_stored(self, counts: Mapping[str, Sequence[Any]]) -> None:
        """Adds the counts that another's `to_dict` gave."""
        self.executed += np.asarray(counts["executed"])
        self.calls += np.asarray(counts["rows"])

    def to_dict(self) -> dict[str, Any]:
        """The counts as records store them, where calls are named `rows`."""
        return {"executed": self.executed.tolist(), "rows": self.calls.tolist()}


def make_batch_record(
    names: Sequence[str],
    copies: Sequence[int],
    values: Sequence[float],
    flops: Flops,
    layer_counts: LayerCounts,
    examples: Mapping[str, Any] | None = None,
    generation: Generation | None = None,
    outputs: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Makes the record of one batch.

    Args:
      names, copies, values: per sequence: the name of its pair, which copy of the pair it is, and
        its score, which is 0 for an output: those are scored when all are there.
      examples: whatever else is to be kept, by the name of the pair.
      outputs: generated tokens, by the name of the pair.
      generation: of the batch, if answers were generated: the record keeps how many model calls
        there were, and each sequence's own passes and tokens, by the name of the pair.
    """
    # Adjacent copies of a pair share an entry: name, first copy, number of copies, sum of scores.
    scores: list[list[Any]] = []
    for name, copy, value in zip(names, copies, values, strict=True):
        last = scores[-1] if scores else None
        if last and last[0] == name and last[1] + last[2] == copy:
            last[2:] = last[2] + 1, last[3] + float(value)
        else:
            scores.append([name, int(copy), 1, float(value)])
    record = {"scores": scores, "flops": flops.to_dict(), "execution": layer_counts.to_dict()}
    if generation is not None:
        counts = zip(generation.passes.tolist(), generation.num_tokens.tolist(), strict=True)
        passes = dict(zip(names, map(list, counts), strict=True))
        record |= {"num_calls": generation.nfe, "passes": passes}
    kept = {"examples": examples, "outputs": outputs}
    return record | {name: dict(x) for name, x in kept.items() if x}


class Tally:
    """Sums the records of one policy on one task, and knows which copies have no score yet.

    Attributes:
      num_done: scored sequences, counting all copies.
      layer_counts: which layers ran in them.
      outputs: generated tokens, by the name of the pair. Earlier versions stored scores alone,
        and some texts as `examples`.
      verdicts: of the outputs' programs, each after the digest of its program.
      passes: of generated answers, each one's own model calls and its tokens, by the name.
      num_calls: model calls of the batches that generated them.
    """

    def __init__(
        self, num_layers: int, num_copies: Mapping[str, int], records: Iterable[Record] = ()
    ):
        """Starts from the records of earlier batches.

        Args:
          num_copies: of each pair, by its name.
        """
        self.layer_counts = LayerCounts(num_layers)
        self.outputs: dict[str, list[int]] = {}
        self.verdicts: dict[str, list[str]] = {}
        self.examples: dict[str, Any] = {}
        self.passes: dict[str, list[int]] = {}
        self.num_calls = self.num_done = 0
        self._costs: list[Flops] = []
        self._unscored = {name: np.ones(number, bool) for name, number in num_copies.items()}
        self._sums: dict[str, list[float]] = {name: [] for name in num_copies}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Adds a batch; ignores one with a copy that has a score already or is not of the task."""
        if "verdicts" in record:
            self.verdicts |= record["verdicts"]
            return
        parts = [(name, slice(first, first + n), n) for name, first, n, _ in record["scores"]]
        if not all(self._unscored.get(name, _NONE)[span].sum() == n for name, span, n in parts):
            return
        for name, span, n in parts:
            self._unscored[name][span] = False
            self.num_done += n
        for name, _, _, total in record["scores"]:
            # null: not finite, which JSON cannot hold; only log 0 is possible.
            self._sums[name].append(-math.inf if total is None else total)
        self.layer_counts.add_stored(record["execution"])
        self._costs.append(Flops.from_dict(record["flops"]))
        self.outputs |= record.get("outputs", {})
        self.examples |= record.get("examples", {})
        self.passes |= record.get("passes", {})
        self.num_calls += record.get("num_calls", 0)

    def keep_only(self, names: Iterable[str]) -> None:
        """Takes all other pairs for scored, so that only these are left to score."""
        for name in self._unscored.keys() - set(names):
            self._unscored[name][:] = False

    def unscored(self, names: Sequence[str]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """The copies without a score: the position of each one's pair in `names`, and its number.

        Copies of a pair are adjacent.
        """
        copies = [np.flatnonzero(self._unscored[name]) for name in names]
        pairs = np.repeat(np.arange(len(names)), [len(found) for found in copies])
        return pairs, np.concatenate([np.zeros(0, int), *copies])

    def mean(self, name: str) -> float:
        """The mean score of a pair's copies; the sum is exact, so the order does not matter."""
        return math.fsum(self._sums[name]) / len(self._unscored[name])

    @property
    def flops(self) -> Flops:
        return Flops.sum(self._costs)


_NONE = np.zeros(0, bool)
