"""Chooses few lengths to pad items of many lengths to: each length is a program to compile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int


def padded_lengths(
    lengths: Sequence[int], multiple: int, max_sizes: int, batch_size: int = 1
) -> list[int]:
    """Returns the length to pad each item to, so that the device computes the fewest tokens.

    A padded length is a multiple of `multiple`, or the longest length if that is less. It depends
    on the lengths of the items and not on their order.

    Args:
      max_sizes: the greatest number of different padded lengths.
      batch_size: a batch that is not full costs as much as a full one.
    """
    lengths = np.asarray(lengths)
    rounded = np.minimum(-(-lengths // multiple) * multiple, lengths.max())
    sizes, counts = np.unique(rounded, return_counts=True)
    chosen = _fewest_tokens(sizes, counts, max_sizes, batch_size)
    return chosen[np.searchsorted(chosen, rounded)].tolist()


def batches_by_length(lengths: Sequence, batch_size: int) -> Iterator[list[int]]:
    """Yields the indices of at most `batch_size` items of one padded length, the longest first.

    Longest first, so that a batch that does not fit in memory fails at once. The caller puts
    results back in order by index: `results[i]` belongs to `items[i]`.

    Args:
      lengths: of each item, from `padded_lengths`.
    """
    members_of = defaultdict(list)
    for i, length in enumerate(lengths):
        members_of[length].append(i)
    for _, members in sorted(members_of.items(), reverse=True):
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _fewest_tokens(
    sizes: Int[np.ndarray, "n"], counts: Int[np.ndarray, "n"], max_sizes: int, batch_size: int
) -> Int[np.ndarray, "k"]:
    """Returns the sizes to keep, by dynamic programming. Among equal costs the fewest sizes win.

    least[k, j] is the fewest tokens for the items of the j smallest sizes in k buckets. The last
    bucket holds the sizes first[k, j] to j - 1, padded to size j - 1.
    """
    n, max_sizes = len(sizes), min(max_sizes, len(sizes))
    before = np.append(0, np.cumsum(counts))
    least = np.full((max_sizes + 1, n + 1), np.inf)
    least[0, 0] = 0
    first = np.zeros((max_sizes + 1, n + 1), int)
    for k in range(1, max_sizes + 1):
        for j in range(1, n + 1):
            items = -(-(before[j] - before[:j]) // batch_size) * batch_size
            cost: Float[np.ndarray, "j"] = least[k - 1, :j] + items * sizes[j - 1]
            first[k, j] = np.argmin(cost)
            least[k, j] = cost[first[k, j]]
    k, j, kept = int(np.argmin(least[:, n])), n, []
    while k:
        kept.append(sizes[j - 1])
        k, j = k - 1, first[k, j]
    return np.array(kept[::-1])
