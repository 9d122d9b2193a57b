"""Parameter trees: path names, counts, casts, layer layouts, digests and fingerprints.

A model's parameters are a nested dict of arrays. Its layers come in two layouts: *stacked* (one
tree whose leaves have a leading axis of layers) and *unrolled* (a tuple with one tree a layer).
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

Params = PyTree

FINGERPRINT_ELEMENTS = 256  # of each array, that the first half of a fingerprint is of
EARLIER_DIGITS = 16  # of the fingerprints of versions that had this half only

log = logging.getLogger(__name__)


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


def relayout(tree: PyTree, unrolled: bool) -> PyTree:
    """Every model's parameters in a tree, its moments in an optimiser's state too, in one layout.

    Values stay what they are; what has no layers is passed through.
    """

    def is_model(node):
        return isinstance(node, dict) and "layers" in node

    def one(node):
        if not is_model(node) or is_unrolled(node["layers"]) == unrolled:
            return node
        return {**node, "layers": (unstack if unrolled else stack)(node["layers"])}

    return jax.tree.map(one, tree, is_leaf=is_model)


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


# ---------------------------------------------------------------------------------- fingerprints


def fingerprint(params: Params, plain: Callable[[PyTree], PyTree] = lambda layer: layer) -> str:
    """Names a set of weights, whatever their layout, sharding or dtype (float32 or bfloat16).

    One pass over the weights where they are, of every element as bfloat16: what is lost in that
    rounding does not count. A router belongs to one fingerprint.

    Args:
      plain: turns an unrolled layer into the arrays that it is saved as.
    """
    found, layers = Fingerprint(), params["layers"]
    for i in range(num_layers(layers)):
        if is_unrolled(layers):
            found.add_layer(i, plain(layers[i]))
        else:
            found.add_layer(i, layers, stacked=True)
    found.add({name: x for name, x in params.items() if name != "layers"})
    return found.hex()


class Fingerprint:
    """A fingerprint of weights that come one group after the other, in any order."""

    def __init__(self):
        self.layers: dict[int, list[_Piece]] = {}
        self.others: list[_Piece] = []

    def add_layer(self, number: int, layer: PyTree, stacked: bool = False) -> None:
        """Args: stacked: `layer` is all layers, and this one of them counts."""
        self.layers[number] = _pieces(layer, number if stacked else None)

    def add(self, tree: PyTree) -> None:
        """Parameters outside the layers, under their names."""
        self.others += _pieces(tree, None)

    def hex(self) -> str:
        """32 hexadecimal digits: 16 of the first elements of each array, all that versions before
        this one had, and 16 of every element."""
        first, every = hashlib.sha256(), hashlib.sha256()
        for pieces in (*(self.layers[i] for i in sorted(self.layers)), self.others):
            for piece in sorted(pieces):
                first.update(piece.label + piece.first)
                every.update(piece.label + piece.every)
        return first.hexdigest()[:EARLIER_DIGITS] + every.hexdigest()[:EARLIER_DIGITS]


def same_weights(stored: Any, now: Any, where: str) -> bool:
    """Whether two fingerprints are equal, the stored one as far as an earlier version knew it.

    Args:
      where: it is stored, for the warning that so short a fingerprint may miss a difference.
    """
    if stored == now:
        return True
    both = (EARLIER_DIGITS, stored), (2 * EARLIER_DIGITS, now)
    if not all(type(x) is str and re.fullmatch(f"[0-9a-f]{{{n}}}", x) for n, x in both):
        return False
    if not now.startswith(stored):
        return False
    log.warning(
        "%s: fingerprint %s is of an earlier version and knows the first %d elements of each array "
        "only; weights that differ elsewhere would not be noticed",
        where, stored, FINGERPRINT_ELEMENTS,
    )  # fmt: skip
    return True


class _Piece(NamedTuple):
    """What fingerprints know of one array."""

    name: str
    label: bytes  # name and shape
    first: bytes  # its first elements
    every: bytes  # a digest of all


def _pieces(tree: PyTree, layer: int | None) -> list[_Piece]:
    """Args: layer: of a stacked tree, the one that counts."""
    digests = jax.device_get(dict(named_leaves(_digest_mixed(tree, layer))))
    pieces = []
    for name, x in named_leaves(tree):
        shape = tuple(x.shape if layer is None else x.shape[1:])
        size = math.prod(shape)
        first = first_elements(x, size * (layer or 0), min(FINGERPRINT_ELEMENTS, size))
        pieces.append(
            _Piece(
                name,
                f"{name}{shape}".encode(),
                np.asarray(first, dtype=jnp.bfloat16).tobytes(),
                np.asarray(digests[name], "<u4").tobytes(),
            )
        )
    return pieces


@jax.jit
def _digest_mixed(tree: PyTree, layer: int | Int[Array, ""] | None) -> PyTree:
    """`digest` of every element as bfloat16, its bits mixed with its place.

    Plain sums of bits miss, for example, two elements that exchange their signs.
    """

    def one(x):
        bits = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        return mixed(bits ^ (flat_index(x.shape) * jnp.uint32(2654435761)))

    return digest(jax.tree.map(one, tree if layer is None else layer_slice(tree, layer)))


def mixed(x: Array) -> Array:
    """A permutation of 32-bit numbers in which every bit depends on every other (MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def first_elements(x: Any, start: int, count: int) -> np.ndarray:
    """`count` elements from flat index `start` on, touching no more of the array than it must."""
    index = np.unravel_index(np.arange(start, start + count), x.shape)
    return np.asarray(x[index])
