import threading
import time

import numpy as np
import pytest

from dials_jax.data.batches import batch_at, prefetch, random_generator, steps_per_epoch
from dials_jax.errors import InputError


class Numbers:
    """Row i holds the number i."""

    fingerprint = "numbers"

    def __init__(self, num_rows):
        self.num_rows = num_rows

    def rows(self, indices):
        tokens = np.asarray(indices, np.int32)[:, None]
        return tokens, np.ones(tokens.shape, bool), np.ones(tokens.shape, bool)


def drawn(data, seed, steps, batch_size):
    batches = [batch_at(data, seed, step, batch_size).tokens[:, 0] for step in steps]
    return np.concatenate(batches)


@pytest.mark.parametrize("batch_size", [3, 5, 24])  # inside, across and beyond an epoch of 10
def test_every_epoch_is_a_fresh_permutation_and_batches_run_through_its_end(batch_size):
    numbers = drawn(Numbers(10), 0, range(40 // batch_size + 1), batch_size)[:40].reshape(4, 10)
    assert (np.sort(numbers, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in numbers}) == 4


def test_a_batch_depends_on_seed_and_step_only():
    data = Numbers(1000)
    late = batch_at(data, 7, 130, 8)
    for step in (0, 500, 3):  # whatever was asked for in between
        batch_at(data, 8, step, 8)
    for a, b in zip(late, batch_at(data, 7, 130, 8), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(late.tokens, batch_at(data, 8, 130, 8).tokens)
    assert not np.array_equal(late.tokens, batch_at(data, 7, 131, 8).tokens)


def test_processes_share_the_batch_that_one_process_would_see():
    whole = batch_at(Numbers(10), 0, 1, 8)
    shares = [batch_at(Numbers(10), 0, 1, 8, p, 4) for p in range(4)]
    for field, parts in zip(whole, zip(*shares, strict=True), strict=True):
        np.testing.assert_array_equal(field, np.concatenate(parts))
    np.testing.assert_array_equal(whole.sequence_index, np.arange(8))
    assert [field.dtype for field in whole] == [np.int32, bool, bool, np.int32]
    with pytest.raises(InputError, match="batch_size=8"):
        batch_at(Numbers(10), 0, 1, 8, 0, 3)


def test_a_data_set_may_finish_its_batches():
    class Marked(Numbers):
        def finish_batch(self, batch, seed, step):
            return batch._replace(tokens=batch.tokens * 0 + 100 * seed + step)

    assert (batch_at(Marked(10), 3, 4, 2).tokens == 304).all()


def test_generators_of_two_purposes_or_numbers_are_independent():
    draws = [
        random_generator(*a).random() for a in [("a", 1, 2), ("b", 1, 2), ("a", 2, 1), ("a", -1, 2)]
    ]
    assert len(set(draws)) == 4
    assert random_generator("a", 1, 2).random() == draws[0]


def test_steps_per_epoch_is_the_nearest_whole_number_and_never_none():
    assert [steps_per_epoch(Numbers(10), size) for size in (5, 4, 3, 30)] == [2, 2, 3, 1]


def test_prefetch_yields_every_step_in_order_and_works_ahead():
    started, consumed = [], []

    def fn(step):
        started.append(step)
        return step**2

    for step, square in prefetch(fn, 3, 8, depth=2):
        consumed.append((step, square))
        deadline = time.monotonic() + 5
        while len(started) < min(len(consumed) + 2, 5) and time.monotonic() < deadline:
            time.sleep(0.001)  # the thread gets two ahead of the consumer, and no further
        assert len(started) == min(len(consumed) + 2, 5)
    assert consumed == [(step, step**2) for step in range(3, 8)]
    assert list(prefetch(fn, 4, 4)) == []


def test_an_exception_surfaces_at_its_own_step():
    def fn(step):
        if step == 2:
            raise InputError("step two")
        return step

    seen = []
    with pytest.raises(InputError, match="step two"):
        for step, _ in prefetch(fn, 0, 5, depth=4):
            seen.append(step)
    assert seen == [0, 1]


def test_closing_a_prefetch_stops_its_thread():
    before = threading.active_count()
    batches = prefetch(lambda step: step, 0, 10**9)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
