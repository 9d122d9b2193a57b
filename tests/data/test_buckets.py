"""The lengths that items are padded to: the cheapest, few, and the same in any order."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from dials_jax.data.buckets import batches_by_length, padded_lengths


def cheapest(lengths, multiple, max_sizes, batch_size):
    """The fewest tokens, by trying every choice of sizes."""
    largest = max(lengths)
    rounded = [min(-(-n // multiple) * multiple, largest) for n in lengths]
    found = []
    for k in range(1, max_sizes + 1):
        for sizes in combinations(sorted(set(rounded)), k):
            if sizes[-1] == largest:
                counts = {size: 0 for size in sizes}
                for n in rounded:
                    counts[next(size for size in sizes if size >= n)] += 1
                found.append(sum(-(-c // batch_size) * batch_size * s for s, c in counts.items()))
    return min(found)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_sizes, batch_size", [(1, 1), (2, 1), (3, 1), (3, 4), (4, 7)])
def test_no_choice_of_sizes_computes_fewer_tokens(seed, max_sizes, batch_size):
    rng = np.random.default_rng(seed)
    lengths, multiple = rng.integers(0, 40, rng.integers(1, 25)).tolist(), int(rng.integers(1, 6))
    sizes = padded_lengths(lengths, multiple, max_sizes, batch_size)
    assert all(size >= length for size, length in zip(sizes, lengths, strict=True))
    assert len(set(sizes)) <= max_sizes and max(sizes) == max(lengths)
    assert all(size % multiple == 0 or size == max(lengths) for size in sizes)
    tokens = sum(size * len(group) for group, size in full_batches(sizes, batch_size))
    assert tokens == cheapest(lengths, multiple, max_sizes, batch_size)


def full_batches(sizes, batch_size):
    for group in batches_by_length(sizes, batch_size):
        yield group + [None] * (batch_size - len(group)), sizes[group[0]]


def test_order_changes_no_items_size():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 90, 50)
    order = rng.permutation(50)
    sizes = np.array(padded_lengths(lengths.tolist(), 8, 3))
    np.testing.assert_array_equal(padded_lengths(lengths[order].tolist(), 8, 3), sizes[order])


def test_sizes_by_hand():
    assert padded_lengths([1, 32, 33, 64, 0], 32, 9) == [32, 32, 64, 64, 0]
    assert padded_lengths([5, 9], 4, 2) == [8, 9], "never longer than the longest"
    assert padded_lengths([2, 3, 90, 100], 1, 2) == [3, 3, 100, 100]
    # One batch of both costs 2 x 4 tokens, two batches would cost 2 x 2 + 2 x 4.
    assert padded_lengths([2, 4], 1, 2, batch_size=2) == [4, 4]


def test_batches_cover_every_item_once_and_never_mix_buckets():
    lengths = np.random.default_rng(0).permutation(np.arange(1, 100)).tolist()
    sizes = padded_lengths(lengths, 32, 4)
    groups = list(batches_by_length(sizes, batch_size=7))
    assert sorted(i for group in groups for i in group) == list(range(99))
    assert all(len(group) <= 7 for group in groups)
    assert all(len({sizes[i] for i in group}) == 1 for group in groups)
    longest_first = [sizes[group[0]] for group in groups]
    assert longest_first == sorted(longest_first, reverse=True)
    assert len(groups) == sum(-(-n // 7) for n in (32, 32, 32, 3))


class Counted(Sequence):
    """Counts how often one of its items is read."""

    def __init__(self, items):
        self.items, self.steps = items, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        self.steps += 1
        return item


@pytest.mark.parametrize("num_items", [500, 1000])
def test_every_item_is_looked_at_a_few_times_however_many_there_are(num_items):
    lengths = Counted([i % 50 for i in range(num_items)])
    padded_lengths(lengths, 8, 4)
    assert num_items <= lengths.steps <= 4 * num_items
    list(batches_by_length(lengths, 16))
    assert lengths.steps <= 8 * num_items
