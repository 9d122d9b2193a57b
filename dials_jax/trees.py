"""Parameter trees: path names, counts, casts and layer layouts.

A model's parameters are a nested dict of arrays. Its layers come in two layouts: *stacked* (one
tree whose leaves have a leading axis of layers) and *unrolled* (a tuple with one tree per layer).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

Params = PyTree


log = logging.getLogger(__name__)


def named_leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Yields pairs of a path such as `layers/attention/q` and the leaf there."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield path_name(path), leaf


def map_named(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps as `jax.tree.map` does; the function also receives the path's name, first."""
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
    """Stacks a tuple of layers into one tree, leaf by leaf, to bound memory."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def layer_slice(layers: PyTree, layer: int | Int[Array, ""]) -> PyTree:
    """Returns one layer, in either layout; a traced number needs stacked layers."""
    return layers[layer] if is_unrolled(layers) else jax.tree.map(lambda x: x[layer], layers)


def unstack(stacked: PyTree) -> tuple[PyTree, ...]:
    return tuple(layer_slice(stacked, i) for i in range(num_layers(stacked)))


def relayout(tree: PyTree, unrolled: bool) -> PyTree:
    """Puts all parameters of a tree, and their moments in an optimiser's state, in one layout.

    Values do not change; trees without layers are passed through.
    """

    def is_model(node):
        return isinstance(node, dict) and "layers" in node

    def one(node):
        if not is_model(node) or is_unrolled(node["layers"]) == unrolled:
            return node
        return {**node, "layers": (unstack if unrolled else stack)(node["layers"])}

    return jax.tree.map(one, tree, is_leaf=is_model)
