"""Batches as a pure function of (seed, step), so that a resumed run sees the same data."""

from __future__ import annotations

import functools
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from dials_jax.errors import require

Result = TypeVar("Result")


class Batch(NamedTuple):
    """The sequences of one training step, or one process's share of them."""

    tokens: Int[np.ndarray, "B T"]  # int32
    answer: Bool[np.ndarray, "B T"]  # positions that may be masked
    valid: Bool[np.ndarray, "B T"] | None  # False: padding; None: no padding, so faster attention
    # Number of each sequence in the global batch, from which its random keys are folded.
    sequence_index: Int[np.ndarray, "B"]


Indices = Sequence[int] | Int[np.ndarray, "B"]
RowArrays = tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"], Bool[np.ndarray, "B T"] | None]


@runtime_checkable
class TrainingData(Protocol):
    """A finite set of rows of the same length; each becomes one sequence of a batch.

    A data set may also have `finish_batch(batch, seed, step) -> Batch`. This pure function changes
    a whole batch; `batch_at` calls it last.
    """

    @property
    def num_rows(self) -> int:
        """The number of rows; they are numbered from 0."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest: equal for data sets with equal rows."""
        ...

    def rows(self, indices: Indices) -> RowArrays:
        """Returns (tokens, answer, valid) of these rows, as in `Batch`."""
        ...


def random_generator(purpose: str, *numbers: int) -> np.random.Generator:
    """Returns a generator seeded by `purpose` and `numbers`; others give independent draws."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), *(n % 2**32 for n in numbers)])


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch_order(num_rows: int, seed: int, epoch: int) -> Int[np.ndarray, "num_rows"]:
    order = random_generator("epoch order", seed, epoch).permutation(num_rows)
    order.flags.writeable = False
    return order


def batch_at(
    data: TrainingData,
    seed: int,
    step: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batch:
    """Returns this process's share of the batch of one step.

    Every epoch is a new permutation of the rows; a batch may span two epochs.

    Args:
      batch_size: sequences over all processes. Process p gets the p-th contiguous share, so the
        global batch does not depend on the number of processes.

    Raises: InputError if the processes cannot share the batch evenly.
    """
    require(
        batch_size % process_count == 0,
        f"batch_size={batch_size} must be divisible by the number of processes, {process_count}",
    )
    share = batch_size // process_count
    sequence_index = np.arange(process_index * share, (process_index + 1) * share)
    epochs, offsets = np.divmod(step * batch_size + sequence_index, data.num_rows)
    indices = np.empty(share, np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _epoch_order(data.num_rows, seed, int(epoch))[offsets[chosen]]
    batch = Batch(*data.rows(indices), sequence_index=sequence_index.astype(np.int32))
    finish_batch = getattr(data, "finish_batch", None)
    return finish_batch(batch, seed, step) if finish_batch else batch


def steps_per_epoch(data: TrainingData, batch_size: int) -> int:
    """Returns the steps of one pass over the rows, rounded: a batch may span two epochs."""
    return max(1, round(data.num_rows / batch_size))


def prefetch(
    fn: Callable[[int], Result], start: int, stop: int, depth: int = 2
) -> Iterator[tuple[int, Result]]:
    """Yields (step, fn(step)) in order while one thread works up to `depth` steps ahead.

    An exception of `fn` is raised at its own step. Closing the iterator cancels what is queued.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    ahead = deque(pool.submit(fn, step) for step in range(start, min(start + depth, stop)))
    try:
        for step in range(start, stop):
            result = ahead.popleft().result()
            if step + depth < stop:
                ahead.append(pool.submit(fn, step + depth))
            yield step, result
    finally:
        pool.shutdown(cancel_futures=True)
