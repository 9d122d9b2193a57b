"""The device mesh, and how arrays are split over it.

Axes: `data` (sequences), `fsdp` (sequences, and parameters split over devices), `tensor` (heads,
hidden units and vocabulary). Placement is one table of (regular expression, PartitionSpec); the
compiler inserts the collectives. One device is a mesh of one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import PyTree

from dials_jax import trees
from dials_jax.config import MeshConfig, shown
from dials_jax.errors import InputError, require
from dials_jax.meeting import problem_on_first_process

AXES = ("data", "fsdp", "tensor")
SIZES = "give sizes, as dj.MeshConfig(data=2, tensor=2)"
BATCH_AXES = ("data", "fsdp")

# Each parameter matches exactly one line. `layers/` leaves may carry a leading axis of layers,
# which is never split.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/table", P("tensor", "fsdp")),
    (r"embed/positions", P(None, None)),
    (r"time/(up|down)(_bias)?", P()),
    (r"(layers/.*|final_norm/)modulation/kernel", P("fsdp", None, None)),
    (r"(layers/.*|final_norm/)modulation/(bias|constant)", P(None, None)),
    (r"layers/.*attention/(qkv|[qkv])", P("fsdp", "tensor", None)),
    (r"layers/.*attention/(qkv|[qkv])/values", P("tensor", None, "fsdp")),  # in 8 bits
    (r"layers/.*attention/(qkv|[qkv])(_bias|/scales)", P("tensor", None)),
    (r"layers/.*attention/o", P("tensor", None, "fsdp")),
    (r"layers/.*attention/o/values", P("fsdp", "tensor", None)),
    (r"layers/.*mlp/(gate|up|gate_up)", P("fsdp", "tensor")),
    (r"layers/.*mlp/(gate|up|gate_up)/values", P("tensor", "fsdp")),
    (r"layers/.*mlp/(gate|up|gate_up)(_bias|/scales)", P("tensor")),
    (r"layers/.*mlp/down", P("tensor", "fsdp")),
    (r"layers/.*mlp/down/values", P("fsdp", "tensor")),
    (r"layers/.*(attention/o|mlp/down)(_bias|/scales)", P(None)),
    (r"(layers/.*)?\w*norm/(scale|bias)", P(None)),
    (r"head/(kernel|padded)", P("fsdp", "tensor")),
    (r"head/(kernel|padded)/values", P("tensor", "fsdp")),  # in 8 bits
    (r"head/(bias|(kernel|padded)/scales)", P("tensor")),
    (r"routers/norm/scale", P(None)),
    (r"routers/(down|inner|vote)(_bias)?", P()),
)


def make_mesh(cfg: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or over those given, laid out to follow their network.

    With several TPU slices, which have a slower network between them, `data` spans the slices.

    Raises: InputError if the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    fixed = int(np.prod([s for s in sizes if s != -1]))
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    require(
        int(np.prod(sizes)) == len(devices),
        f"mesh data={cfg.data} fsdp={cfg.fsdp} tensor={cfg.tensor} does not fit "
        f"{len(devices)} devices; make the product of the axes equal to that number",
    )
    return Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def as_mesh(mesh: Mesh | MeshConfig | None) -> Mesh:
    """A mesh of this library, of sizes or as it is; None: over all devices.

    Raises: InputError for a mesh with other axes.
    """
    if mesh is None or isinstance(mesh, MeshConfig):
        return make_mesh(mesh or MeshConfig())
    require(isinstance(mesh, Mesh), f"mesh={shown(mesh)} is no mesh; {SIZES}")
    require_axes(mesh)
    return mesh


def require_axes(mesh: Mesh | AbstractMesh) -> None:
    """Raises: InputError for a mesh with other axes."""
    axes = ", ".join(map(str, mesh.axis_names))
    require(
        mesh.empty or mesh.axis_names == AXES,
        f"the mesh has axes {axes}, not {', '.join(AXES)}; {SIZES}",
    )


def _arranged(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    # An axis of the mesh may be a part of an axis of the network: 2 x 64 x 2 on a pod of 16 x 16.
    split = {"devices": devices, "allow_split_physical_axes": True}
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, **split)
    data, *inner = sizes
    require(
        data % slices == 0,
        f"mesh data={data} does not divide over {slices} slices; make it a multiple",
    )
    return mesh_utils.create_hybrid_device_mesh([data // slices, *inner], [slices, 1, 1], **split)


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The spec of the parameter called `name`; an axis that does not divide is not split."""
    matches = [spec for pattern, spec in RULES if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise ValueError(f"parameter {name!r} matches {len(matches)} sharding rules, not one")
    spec = (None,) * (len(shape) - len(matches[0])) + tuple(matches[0])
    fits = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape, strict=True)]
    return P(*fits)


def param_shardings(params: PyTree, mesh: Mesh, prefix: str = "") -> PyTree:
    """The NamedSharding of every parameter, by the table."""

    def one(name, x):
        return NamedSharding(mesh, partition_spec(prefix + name, x.shape, mesh))

    return trees.map_named(one, params)


def state_shardings(state: PyTree, params: PyTree, mesh: Mesh, prefix: str = "") -> PyTree:
    """Shardings of an optimiser state: a leaf whose path ends in a parameter's lies beside it."""
    specs = dict(trees.named_leaves(param_shardings(params, mesh, prefix)))
    shapes = {name: x.shape for name, x in trees.named_leaves(params)}

    def one(name, x):
        parts = name.split("/")
        for i in range(len(parts)):
            tail = "/".join(parts[i:])
            if tail in specs and shapes[tail] == x.shape:
                return specs[tail]
        return NamedSharding(mesh, P())

    return trees.map_named(one, state)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences split over the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Host arrays to global arrays; every process passes its own slice of the batch."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def place_sequences(x: ArrayLike, mesh: Mesh) -> jax.Array:
    """A whole batch, the same on every process, to a global array split over sequences."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = place_sequences(jax.random.key_data(x), mesh)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = x if isinstance(x, jax.Array) else np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def constrain_batch(x: jax.Array, axis: int = 0, heads: int | None = None) -> jax.Array:
    """Keeps the axis of sequences split over devices, and that of heads as parameters split it.

    What a program hands on to the next one is made so at its start: placed in another way, all of
    it would be moved between them. Without a mesh in context, or where the sequences do not divide
    over it: x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Inside `shard_map` the batch axes are manual: the sequences are already local.
    if mesh.empty or mesh.manual_axes or x.shape[axis] % num_batch_shards(mesh):
        return x
    spec: list[Any] = [None] * x.ndim
    spec[axis] = BATCH_AXES
    if heads is not None and x.shape[heads] % mesh.shape["tensor"] == 0:
        spec[heads] = "tensor"
    return jax.lax.with_sharding_constraint(x, P(*spec))


def placement_of(tree: PyTree) -> tuple[Sharding, ...]:
    """Where the arrays of a tree lie; hashable, so that it can be a static argument."""
    return tuple(x.sharding for x in jax.tree.leaves(tree))


def keep_placed(tree: PyTree, placement: tuple[Sharding, ...]) -> PyTree:
    """Within a program: its arrays lie where `placement_of` saw those of a tree like this one.

    For a state that programs hand on to each other. The compiler may leave it in another place,
    for which the next program is not compiled; moved between them, it would go by way of the host.
    """
    leaves, structure = jax.tree.flatten(tree)
    kept = [
        jax.lax.with_sharding_constraint(x, where) if len(where.device_set) > 1 else x
        for x, where in zip(leaves, placement, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def to_host(tree: PyTree) -> PyTree:
    """The whole arrays as NumPy arrays, on every process; all processes must call it."""

    def whole(x):
        spread = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return _replicate(x) if spread else x

    return jax.device_get(jax.tree.map(whole, tree))


def _replicate(x: jax.Array) -> jax.Array:
    return jax.jit(_same, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)


def _same(x):  # a function of the module: one made for each call would be compiled for each
    return x


def on_first_process(action: Callable[[], Any]) -> None:
    """Runs `action` on one process while the others wait: for files that all of them share.

    Raises: what `action` raises; on the other processes an InputError that says so.
    """
    problem = problem_on_first_process(action)
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.array(problem is not None))
        if failed and problem is None:
            raise InputError("the first process has stopped; its message says why")
    if problem:
        raise problem


def from_first_process(make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process, on all of them: plain JSON values.

    Raises: as `on_first_process`.
    """
    made = bytearray()
    on_first_process(lambda: made.extend(json.dumps(make()).encode()))
    if jax.process_count() > 1:
        size = multihost_utils.broadcast_one_to_all(np.array(len(made), np.int32))
        sent = np.frombuffer(made, np.uint8) if made else np.zeros(int(size), np.uint8)
        made = np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes()
    return json.loads(bytes(made))


def require_same_everywhere(facts: Mapping[str, Any]) -> None:
    """Checks, by digests, that every process has the same values. All processes must call it.

    Args:
      facts: plain JSON values, by what they are in words: in the plural, or without an article.
    Raises: on all processes, InputError naming what differs, and the first process that it does on.
    """
    if jax.process_count() == 1:
        return
    texts = [json.dumps(value, sort_keys=True).encode() for value in facts.values()]
    own = np.array([list(hashlib.sha256(text).digest()[:16]) for text in texts], np.uint8)
    differs = multihost_utils.process_allgather(own)  # [processes, facts, digest]
    differs = (differs != differs[:1]).any(axis=-1)
    for number, what in enumerate(facts):
        others = np.flatnonzero(differs[:, number]).tolist()
        require(
            not others,
            f"process {others[0] if others else ''} of {jax.process_count()} has other {what} than "
            "the first one; start the same command on all hosts, with the same files",
        )
