"""A copy of a training state in the host's memory, made between two steps: a thread saves it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dials_jax.stored import saves_without_devices

PINNED_BYTES = 32 * 2**30  # of a state that is copied to pinned memory: XLA has 64 GiB of it


def begin_copy(flat: dict[str, jax.Array]) -> Callable[[], dict[str, jax.Array]] | None:
    """Begins to copy a state: a later step reuses its memory.

    Returns: what gives the copy as arrays in the host's memory; None where no thread can save: JAX
      has no device of the host, the state of several processes is too large for pinned memory (it
      is read back to it, too), or Orbax is of a version that is not known.
    """
    if jax.process_count() > 1:
        small = _bytes_of_a_process(flat) <= 3 * PINNED_BYTES // 4
        if not (small and saves_without_devices()):
            return None
        pinned = _pinned(flat)
        return lambda: pinned
    host = _host_device()
    if host is None:
        return None
    copied = _copy_to_host(flat)
    # One by one, so that what a copy is made of is let go.
    return lambda: {n: jax.device_put(copied.pop(n).joined(), host) for n in list(copied)}


def _host_device() -> jax.Device | None:
    """Where one process keeps a copy of what it saves; None: there is no such place."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names no "cpu"
        return None


def _bytes_of_a_process(flat: dict[str, jax.Array]) -> int:
    """Bytes that the devices of one process hold: the mean, so that all get the same number."""
    shards = (
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * len(x.sharding.device_set)
        for x in flat.values()
    )
    return sum(shards) // jax.process_count()


def _pinned(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays in pinned memory, copied between two steps. No process waits for another one."""

    def one(x: jax.Array) -> jax.Array:
        shards = [s.data for s in x.addressable_shards]
        places = [s.sharding.with_memory_kind("pinned_host") for s in shards]
        return jax.make_array_from_single_device_arrays(
            x.shape, x.sharding.with_memory_kind("pinned_host"), jax.device_put(shards, places)
        )

    return {name: one(x) for name, x in flat.items()}


class _Copied(NamedTuple):
    """An array in memory of its own on the host: pieces, and where in it they are."""

    like: jax.ShapeDtypeStruct
    pieces: list[tuple[Any, jax.Array | np.ndarray]]

    def joined(self) -> np.ndarray:
        """Waits for the pieces. Returns: the whole array."""
        (_, first), *others = self.pieces
        if not others:
            return np.asarray(first)
        whole = np.empty(self.like.shape, self.like.dtype)
        for where, piece in self.pieces:
            whole[where] = np.asarray(piece)
        return whole


def _copy_to_host(flat: dict[str, jax.Array]) -> dict[str, _Copied]:
    """Each device copies what no other has copied to pinned memory, between two steps; the host
    does not wait for it."""
    likes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}
    if sum(x.nbytes for x in flat.values()) > PINNED_BYTES:
        # On a CPU the host's arrays are views of the state; elsewhere they are the copy.
        own = np.array if jax.default_backend() == "cpu" else np.asarray
        host = jax.device_get(flat)
        return {name: _Copied(like, [(..., own(host[name]))]) for name, like in likes.items()}

    shards = {
        name: [s for s in x.addressable_shards if s.replica_id == 0] for name, x in flat.items()
    }
    on_devices = {name: [s.data for s in some] for name, some in shards.items()}
    places = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), on_devices)
    pinned = jax.device_put(on_devices, places)
    return {
        name: _Copied(like, [(s.index, x) for s, x in zip(shards[name], pinned[name], strict=True)])
        for name, like in likes.items()
    }
