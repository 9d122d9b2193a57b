"""Enumerates the ways to place light segments in a trajectory; each is built only when needed.

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

MAX_SORTED = 50_000  # up to this many placements are sorted by cost in memory
MAX_SHUFFLED = 10_000_000  # up to this many numbers are shuffled in memory


@dataclass(frozen=True)
class Placements:
    """All ways to place `num_light` light segments, in the order of `itertools.combinations`."""

    num_segments: int
    num_light: int

    @property
    def total(self) -> int:
        """The number of placements."""
        return comb(self.num_segments, self.num_light)

    def chosen(self, number: int) -> list[int]:
        """The light segments of placement `number`."""
        found, segment = [], 0
        for left in range(self.num_light - 1, -1, -1):
            while number >= (num_with_it := comb(self.num_segments - segment - 1, left)):
                number -= num_with_it
                segment += 1
            found.append(segment)
            segment += 1
        return found

    def number_of(self, chosen: Sequence[int]) -> int:
        """The number of the placement with these light segments: the inverse of `chosen`."""
        number, segment = 0, 0
        for left, light in zip(range(self.num_light - 1, -1, -1), chosen, strict=True):
            number += sum(comb(self.num_segments - i - 1, left) for i in range(segment, light))
            segment = light + 1
        return number

    def light(self, number: int) -> Bool[np.ndarray, "n"]:
        """Placement `number` as an array, True where a segment is light."""
        found = np.zeros(self.num_segments, bool)
        found[self.chosen(number)] = True
        return found

    @cached_property
    def table(self) -> Bool[np.ndarray, "S n"]:
        """`light` of all placements, in their order."""
        found = np.zeros((self.total, self.num_segments), bool)
        chosen = list(combinations(range(self.num_segments), self.num_light))
        np.put_along_axis(found, np.array(chosen), True, axis=1)
        return found

    def sorted_by_cost(self, costs: Float[np.ndarray, "n"]) -> Iterator[int]:
        """Yields all numbers by the sum of the costs of their light segments, the smallest first.

        Of equal sums the lower number comes first. With more than `MAX_SORTED` placements this
        holds for segments of equal cost, but not for sums that are equal by chance.
        """
        if self.total <= MAX_SORTED:
            return map(int, np.argsort(self.table @ costs, kind="stable"))
        return map(self.number_of, cheapest_subsets(costs, self.num_light))

    def shuffled(self, seed: int) -> Iterator[int]:
        """Yields all numbers in random order, each once."""
        if self.total <= MAX_SHUFFLED:
            rank = np.random.default_rng(seed).permutation(self.total)
            return map(int, np.argsort(rank))
        draws = random.Random(seed)
        return skip_repeats(draws.randrange(self.total) for _ in count())


def skip_repeats(numbers: Iterator[int]) -> Iterator[int]:
    """Leaves out numbers that occurred before."""
    seen = set()
    for number in numbers:
        if number not in seen:
            seen.add(number)
            yield number


def cheapest_subsets(costs: Float[np.ndarray, "n"], size: int) -> Iterator[list[int]]:
    """Yields the subsets of `size` of the numbers 0 to n - 1, each sorted, by rising total cost.

    Every subset but the cheapest results from one that does not cost more, by exchanging a number
    for the next more expensive one. So the heap needs only such neighbours of subsets that were
    yielded already.
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
