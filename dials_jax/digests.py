"""Digests of weights, and fingerprints that tell two models apart."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

from dials_jax.trees import Params, is_unrolled, layer_slice, named_leaves, num_layers

log = logging.getLogger(__name__)
FINGERPRINT_ELEMENTS = 256  # of each array; the first half of a fingerprint is computed from them
EARLIER_DIGITS = 16  # of the fingerprints of earlier versions, which had only this half


@jax.jit
def digest(tree: PyTree) -> PyTree:
    """Sums the bits of each leaf, in two 32-bit sums.

    Integer sums do not depend on sharding or on the order of reduction. The second sum weighs
    every element by its index, so that it changes if elements are exchanged.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

    def one(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize]).astype(jnp.uint32)
        weights = flat_index(x.shape) * jnp.uint32(2654435761) | jnp.uint32(1)
        # One reduction for both: with two, XLA on CPU stores `bits`, twice the size of the leaf.
        zero, axes = jnp.uint32(0), tuple(range(x.ndim))
        return jnp.stack(lax.reduce((bits, bits * weights), (zero, zero), add_pairs, axes))

    def add_pairs(a, b):
        return a[0] + b[0], a[1] + b[1]

    return jax.tree.map(one, tree)


def content_id(content: Any) -> str:
    """A short digest of JSON values, whatever the order of their names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def flat_index(shape: tuple[int, ...]) -> jax.Array:
    """Returns every element's index in row-major order, modulo 2^32; gathers no sharded axis."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def digest_hex(tree: PyTree) -> dict[str, str]:
    """Returns the `digest` on the host: path's name -> 16 hexadecimal digits."""
    return as_hex(digest(tree))


def as_hex(sums: PyTree) -> dict[str, str]:
    """The same of what `digest` has returned."""
    pairs = jax.device_get(dict(named_leaves(sums)))
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in pairs.items()}


def fingerprint(params: Params, plain: Callable[[PyTree], PyTree] = lambda layer: layer) -> str:
    """Identifies weights in any layout, sharding or dtype (float32 or bfloat16).

    One pass over the weights on their devices; every element counts as bfloat16, so the rounding to
    it changes nothing. A router belongs to one fingerprint.

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
    """A fingerprint of weights that are added group by group, in any order."""

    def __init__(self):
        self.layers: dict[int, list[_Piece]] = {}
        self.others: list[_Piece] = []

    def add_layer(self, number: int, layer: PyTree, stacked: bool = False) -> None:
        """Adds a layer. Args: stacked: `layer` holds all layers, and this one of them counts."""
        self.layers[number] = _pieces(layer, number if stacked else None)

    def add(self, tree: PyTree) -> None:
        """Adds parameters outside the layers, under their names."""
        self.others += _pieces(tree, None)

    def add_group(self, name: str, group: PyTree) -> None:
        """Adds a layer, of a name such as "layers/003", or the group that has another name."""
        key, _, layer = name.partition("/")
        if layer:
            self.add_layer(int(layer), group)
        else:
            self.add({key: group})

    def hex(self) -> str:
        """Returns 32 hexadecimal digits: 16 of the first elements of each array, 16 of all.

        Earlier versions had the first half only.
        """
        first, every = hashlib.sha256(), hashlib.sha256()
        for pieces in (*(self.layers[i] for i in sorted(self.layers)), self.others):
            for piece in sorted(pieces):
                first.update(piece.label + piece.first)
                every.update(piece.label + piece.every)
        return first.hexdigest()[:EARLIER_DIGITS] + every.hexdigest()[:EARLIER_DIGITS]


def same_weights(stored: Any, now: Any, where: str) -> bool:
    """Compares two fingerprints; a shorter one of an earlier version is enough.

    Args:
      where: the place where it is stored, for the warning that the short one may miss a difference.
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
    """The part of a fingerprint that one array gives."""

    name: str
    label: bytes  # name and shape
    first: bytes  # its first elements
    every: bytes  # a digest of all


def _pieces(tree: PyTree, layer: int | None) -> list[_Piece]:
    """Args: layer: of a stacked tree, the one that counts."""
    found = jax.device_get(_first_and_every(tree, layer))
    first, every = (dict(named_leaves(part)) for part in found)
    pieces = []
    for name, x in named_leaves(tree):
        shape = tuple(x.shape if layer is None else x.shape[1:])
        pieces.append(
            _Piece(
                name,
                f"{name}{shape}".encode(),
                np.asarray(first[name], dtype=jnp.bfloat16).tobytes(),
                np.asarray(every[name], "<u4").tobytes(),
            )
        )
    return pieces


@jax.jit
def _first_and_every(tree: PyTree, layer: int | Int[Array, ""] | None) -> tuple[PyTree, PyTree]:
    """The first elements of each array, and a digest of all.

    The digest is that of every element as bfloat16, its bits mixed with its index. Plain sums of
    bits miss, for example, two elements that exchange their signs.
    """

    def one(x):
        bits = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        return mixed(bits ^ (flat_index(x.shape) * jnp.uint32(2654435761)))

    def first(x):
        return first_elements(x, 0, min(FINGERPRINT_ELEMENTS, x.size))

    tree = tree if layer is None else layer_slice(tree, layer)
    return jax.tree.map(first, tree), digest(jax.tree.map(one, tree))


def mixed(x: Array) -> Array:
    """Permutes 32-bit numbers so that every bit depends on every other (MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def first_elements(x: Any, start: int, count: int) -> Any:
    """Reads `count` elements from flat index `start` on, and no more of the array."""
    index = np.unravel_index(np.arange(start, start + count), x.shape)
    return x[index]
