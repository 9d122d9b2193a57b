"""Parameter trees: path names, counts, casts, layer layouts and digests.

A model's parameters are a nested dict of arrays. Its layers come in two layouts: *stacked* (one
tree whose leaves have a leading axis of layers) and *unrolled* (a tuple with one tree a layer).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

Params = PyTree

FINGERPRINT_ELEMENTS = 256  # elements read from each array


def named_leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Pairs of a path such as `layers/attention/q` and the leaf there."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield path_name(path), leaf


def map_named(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` whose function also receives the path's name, first."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: fn(path_name(p), *x), tree, *rest)


def path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def count_parameters(tree: PyTree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Casts floating-point leaves; None leaves the tree as it is."""
    if dtype is None:
        return tree

    def one(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


# --------------------------------------------------------------------------------- layer layouts


def is_unrolled(layers: PyTree) -> bool:
    return type(layers) is tuple  # a NamedTuple is one tree


def num_layers(layers: PyTree) -> int:
    return len(layers) if is_unrolled(layers) else jax.tree.leaves(layers)[0].shape[0]


def stack(layers: tuple[PyTree, ...]) -> PyTree:
    """One stacked tree from a tuple of layers; each leaf is stacked on its own, to bound memory."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def layer_slice(layers: PyTree, layer: int | Int[Array, ""]) -> PyTree:
    """One layer, in either layout; a traced number needs stacked layers."""
    return layers[layer] if is_unrolled(layers) else jax.tree.map(lambda x: x[layer], layers)


def unstack(stacked: PyTree) -> tuple[PyTree, ...]:
    return tuple(layer_slice(stacked, i) for i in range(num_layers(stacked)))


# --------------------------------------------------------------------------------------- digests


@jax.jit
def digest(tree: PyTree) -> PyTree:
    """Two 32-bit sums over the bits of each leaf.

    Integer sums do not depend on sharding or on the order of reduction. The second sum weighs
    every element by its place, so that exchanged elements are seen.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

    def one(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize]).astype(jnp.uint32)
        weights = flat_index(x.shape) * jnp.uint32(2654435761) | jnp.uint32(1)
        # One reduction of both: as two, XLA on CPU writes `bits` out, twice the size of the leaf.
        zero, axes = jnp.uint32(0), tuple(range(x.ndim))
        return jnp.stack(lax.reduce((bits, bits * weights), (zero, zero), add_pairs, axes))

    def add_pairs(a, b):
        return a[0] + b[0], a[1] + b[1]

    return jax.tree.map(one, tree)


def flat_index(shape: tuple[int, ...]) -> jax.Array:
    """Every element's place in row-major order, modulo 2^32. Sharded axes need no gather."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def digest_hex(tree: PyTree) -> dict[str, str]:
    """`digest` on the host: a path's name to 16 hexadecimal digits."""
    pairs = jax.device_get(dict(named_leaves(digest(tree))))
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in pairs.items()}


def fingerprint(params: Params, plain: Callable[[PyTree], PyTree] = lambda layer: layer) -> str:
    """Names a set of weights, whatever their layout, sharding or dtype (float32 or bfloat16).

    Reads the first elements of each array, as bfloat16. A router belongs to one fingerprint.

    Args:
      plain: turns an unrolled layer into the arrays that it is saved as.
    """
    sha = hashlib.sha256()
    layers = params["layers"]
    for i in range(num_layers(layers)):
        if is_unrolled(layers):
            _hash_into(sha, plain(layers[i]), None)
        else:
            _hash_into(sha, layers, i)
    _hash_into(sha, {k: v for k, v in params.items() if k != "layers"}, None)
    return sha.hexdigest()[:16]


def _hash_into(sha, tree: PyTree, layer: int | None) -> None:
    for name, x in sorted(named_leaves(tree), key=lambda pair: pair[0]):
        shape = x.shape if layer is None else x.shape[1:]
        start = 0 if layer is None else layer * int(np.prod(shape))
        head = first_elements(x, start, min(FINGERPRINT_ELEMENTS, int(np.prod(shape))))
        sha.update(f"{name}{tuple(shape)}".encode())
        sha.update(np.asarray(head, dtype=jnp.bfloat16).tobytes())


def first_elements(x: Any, start: int, count: int) -> np.ndarray:
    """`count` elements from flat index `start` on, touching no more of the array than it must."""
    index = np.unravel_index(np.arange(start, start + count), x.shape)
    return np.asarray(x[index])
