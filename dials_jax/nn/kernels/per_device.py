"""Where hand-written kernels run, and how on a mesh: the compiler cannot split them itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from dials_jax.nn.kv import KV
from dials_jax.sharding import AXES, BATCH_AXES


class Device(NamedTuple):
    """A kind of device that kernels are written for.

    Attributes:
      name: for messages.
      is_here: whether programs are compiled for it.
    """

    name: str
    is_here: Callable[[], bool]


def on_tpu() -> bool:
    """From the mesh in context: a program may be compiled for TPUs of another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "tpu"


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


@lru_cache
def on_hopper() -> bool:
    """Whether all GPUs are Hopper's, with a JAX that has all that kernels need."""
    if not on_gpu() or jax.__version_info__ < (0, 11):
        return False
    return all(getattr(x, "compute_capability", None) == "9.0" for x in jax.local_devices())


@lru_cache
def multiplies_fp8() -> bool:
    """Whether all devices are NVIDIA's that multiply e4m3 themselves: Ada, Hopper and newer."""
    if not on_gpu():
        return False
    capabilities = (device.compute_capability.split(".") for device in jax.local_devices())
    return all(c[0].isdecimal() and tuple(map(int, c)) >= (8, 9) for c in capabilities)


ANY = Device("any device", lambda: True)
TPU = Device("a mesh of TPUs", lambda: on_tpu())
GPU = Device("a GPU", lambda: on_gpu())
HOPPER = Device("Hopper GPUs and JAX 0.11", lambda: on_hopper())


def free_axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes for sequences and heads that no enclosing `shard_map` has split already."""
    mesh = jax.sharding.get_abstract_mesh()
    free = [] if mesh.empty else [a for a in AXES if a not in mesh.manual_axes]
    return tuple(a for a in free if a in BATCH_AXES), tuple(a for a in free if a not in BATCH_AXES)


def splits() -> tuple[int, int]:
    """Over how many devices sequences and heads are still to be split."""
    mesh = jax.sharding.get_abstract_mesh()
    sequences, heads = (math.prod(mesh.shape[a] for a in axes) for axes in free_axes())
    return sequences, heads


def mesh_refusal(x: Float[Array, "B ..."]) -> str | None:
    """Why every device cannot multiply its own sequences by the whole weight; None: it can."""
    sequences, others = splits()
    if others > 1:
        return "the mesh splits the weight"
    if x.shape[0] % sequences:
        return f"the mesh does not divide {x.shape[0]} sequences"
    return None


def divides(q: Float[Array, "B T N H"], kv: KV) -> bool:
    """Whether every device gets equally many sequences, and whole groups of heads."""
    sequences, heads = splits()
    return q.shape[0] % sequences == kv.k.shape[2] % heads == 0


def splits_itself(q: Float[Array, "B T N H"], kv: KV) -> bool:
    """Whether a call with its own partitioning rules (`custom_partitioning`) compiles here.

    Inside a `shard_map` over some axes of the mesh it does not: JAX passes the other axes to the
    compiler, and those of size 1 have lost their names. And cuDNN's rules split keys and values as
    queries, which is impossible for grouped heads that do not divide. In both cases
    `attention_per_device` leaves nothing to partition.
    """
    mesh = jax.sharding.get_abstract_mesh()
    partly_manual = not mesh.empty and 0 < len(mesh.manual_axes) < len(mesh.axis_names)
    return not partly_manual and divides(q, kv)


def attention_per_device(
    attention: Callable[[Array, KV, Array | None], Array],
    q: Float[Array, "B T N H"],
    kv: KV,
    mask: Bool[Array, "B *_"] | None,
) -> Float[Array, "B T N H"]:
    """Each device attends in its sequences and heads; in all of them if they do not divide."""
    (batch_axes, head_axes), (num_sequences, num_heads) = free_axes(), splits()
    sequences = batch_axes if q.shape[0] % num_sequences == 0 else None
    heads = head_axes if kv.k.shape[2] % num_heads == 0 else None
    spec = P(sequences, None, heads)
    return _per_device(attention, (q, kv, mask), (spec, spec, P(sequences)), spec)


def sequences_per_device(
    fn: Callable[[Array, Any], Array], x: Float[Array, "B ..."], weights: Any
) -> Float[Array, "B ..."]:
    """Each device computes its own tokens, with all of the weights (a tree of arrays)."""
    sequences = P(free_axes()[0])
    return _per_device(fn, (x, weights), (sequences, P()), sequences)


def split_over_tensor(
    fn: Callable[..., Array], x: Float[Array, "..."], weight: Array, axis: int, *whole: Any
) -> Float[Array, "..."]:
    """Each device computes with its part of x, along `axis`, and of the weight, along its first,
    and all of `whole`."""
    specs = P(*[None] * axis, "tensor"), P("tensor"), *(P() for _ in whole)
    return _per_device(fn, (x, weight, *whole), specs, P())


def on_each_device(fn: Callable[[], Array]) -> Array:
    """What every device makes for itself; JAX takes it for one array that all of them hold."""
    return _per_device(fn, (), (), P())


def _per_device(fn: Callable[..., Array], args: tuple[Any, ...], in_specs: Any, out_specs: Any):
    names = {axis for axes in free_axes() for axis in axes}
    if not names:
        return fn(*args)
    return jax.shard_map(
        fn, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
    )(*args)
