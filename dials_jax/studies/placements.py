"""The ways to place light segments in a trajectory: numbered, and built only when needed.

Their number grows fast: 11 light segments of 22 have 705,432 placements, 15 of 30 have 155 million.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, count
from math import comb, fsum

import numpy as np
from jaxtyping import Bool, Float

LISTED = 50_000  # up to this many placements are compared all at once
PERMUTED = 10_000_000  # up to this many numbers are shuffled in memory


@dataclass(frozen=True)
class Placements:
    """All ways to place `num_light` light segments, in the order of `itertools.combinations`."""

    num_segments: int
    num_light: int

    @property
    def number(self) -> int:
        return comb(self.num_segments, self.num_light)

    def chosen(self, number: int) -> list[int]:
        """The light segments of one placement."""
        found, segment = [], 0
        for left in range(self.num_light - 1, -1, -1):
            while number >= (num_with_it := comb(self.num_segments - segment - 1, left)):
                number -= num_with_it
                segment += 1
            found.append(segment)
            segment += 1
        return found

    def number_of(self, chosen: Sequence[int]) -> int:
        """The inverse of `chosen`."""
        number, segment = 0, 0
        for left, light in zip(range(self.num_light - 1, -1, -1), chosen, strict=True):
            number += sum(comb(self.num_segments - i - 1, left) for i in range(segment, light))
            segment = light + 1
        return number

    def light(self, number: int) -> Bool[np.ndarray, "n"]:
        """One placement, True where a segment is light."""
        found = np.zeros(self.num_segments, bool)
        found[self.chosen(number)] = True
        return found

    @cached_property
    def table(self) -> Bool[np.ndarray, "S n"]:
        """`light` of all placements."""
        found = np.zeros((self.number, self.num_segments), bool)
        chosen = list(combinations(range(self.num_segments), self.num_light))
        np.put_along_axis(found, np.array(chosen), True, axis=1)
        return found

    def in_order_of(self, costs: Float[np.ndarray, "n"]) -> Iterator[int]:
        """All numbers, by the sum of the costs of their light segments, the smallest first.

        Of equal sums the lower number comes first. Among more than `LISTED` placements that holds
        for segments of equal cost, but not for sums that are equal by chance.
        """
        if self.number <= LISTED:
            return map(int, np.argsort(self.table @ costs, kind="stable"))
        return map(self.number_of, cheapest_subsets(costs, self.num_light))

    def in_random_order(self, seed: int) -> Iterator[int]:
        """All numbers, each once."""
        if self.number <= PERMUTED:
            rank = np.random.default_rng(seed).permutation(self.number)
            return map(int, np.argsort(rank))
        draws = random.Random(seed)
        return distinct(draws.randrange(self.number) for _ in count())


def distinct(numbers: Iterator[int]) -> Iterator[int]:
    """Leaves out numbers that came before."""
    seen = set()
    for number in numbers:
        if number not in seen:
            seen.add(number)
            yield number


def cheapest_subsets(costs: Float[np.ndarray, "n"], size: int) -> Iterator[list[int]]:
    """Subsets of `size` of the numbers 0 to n - 1, each sorted, by the sum of their costs.

    Every subset but the cheapest follows from one that is not dearer, by exchanging one number for
    the next dearer one. So only such neighbours of the subsets already given wait in the heap.
    """
    by_cost = np.argsort(costs, kind="stable").tolist()

    def entry(ranks):
        chosen = sorted(by_cost[i] for i in ranks)
        return fsum(costs[i] for i in chosen), chosen, ranks

    waiting = [entry(tuple(range(size)))]
    seen = {waiting[0][2]}
    while waiting:
        _, chosen, ranks = heapq.heappop(waiting)
        yield chosen
        for i, rank in enumerate(ranks):
            moved = (*ranks[:i], rank + 1, *ranks[i + 1 :])
            free = rank + 1 < (ranks[i + 1] if i + 1 < size else len(costs))
            if free and moved not in seen:
                seen.add(moved)
                heapq.heappush(waiting, entry(moved))
