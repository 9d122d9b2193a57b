"""A model's parameters as groups: the embedding, every layer, the final norm and the head.

Saving, loading and converting handle one group at a time, so that the host needs little more memory
than the model and one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import PyTree

from dials_jax import sharding, trees
from dials_jax.config import EightBits, Layout, ModelConfig
from dials_jax.digests import Fingerprint
from dials_jax.errors import require
from dials_jax.keys import seed_key
from dials_jax.models import transformer
from dials_jax.nn import fusing
from dials_jax.nn.eight_bits import dequantise_modules, quantise_modules
from dials_jax.nn.modules import Form, form_of

ReadGroup = Callable[[str, PyTree], PyTree]  # a group's name, its shardings -> its placed arrays


def abstract_params(cfg: ModelConfig) -> trees.Params:
    """Shapes of all parameters, layers stacked."""
    return jax.tree.map(lambda x: x, _abstract_params(cfg))


@lru_cache(maxsize=16)  # flax traces an initialisation slowly
def _abstract_params(cfg: ModelConfig) -> trees.Params:
    return jax.eval_shape(lambda: transformer.init(cfg, seed_key(0)))


def group_shapes(cfg: ModelConfig, weights: EightBits | None = None) -> dict[str, PyTree]:
    """Each group's tree of shapes, under the group's name; the largest groups come first.

    So the embedding is read before the layers fill the memory.

    Args:
      weights: in 8 bits; None: as they are initialised.
    """
    kinds = abstract_params(cfg)
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), kinds["layers"])
    kinds["layers"] = layer
    if weights is not None:
        for kind, group in kinds.items():
            kinds[kind] = jax.eval_shape(partial(quantise_group, kind, weights=weights), group)
    layer = kinds.pop("layers")
    return kinds | {f"layers/{i:03d}": layer for i in range(cfg.num_layers)}


def get_group(cfg: ModelConfig, params: trees.Params, name: str) -> PyTree:
    key, _, layer = name.partition("/")
    if not layer:
        return params[key]
    i, layers = int(layer), params[key]
    if trees.is_unrolled(layers):
        fused = form_of(params).fused
        return fusing.unfuse(layers[i], cfg, fused) if fused else layers[i]
    return trees.layer_slice(layers, i)


def place(
    cfg: ModelConfig, params: trees.Params, mesh: Mesh | None = None, layout: Layout = "auto"
) -> trees.Params:
    """Places host arrays (memory-mapped ones, too) on the mesh, in `cfg.dtype`.

    A device receives only its own part of an array, and one group at a time is on the host.
    """

    return assemble(cfg, placing(cfg, params), mesh or sharding.make_mesh(), layout)


def placing(cfg: ModelConfig, params: trees.Params) -> ReadGroup:
    """Reads groups of host arrays in `cfg.dtype`."""

    def put(x: np.ndarray, sharding: Any) -> jax.Array:
        def part(index):
            return materialise(x[index], cfg.dtype)

        return jax.make_array_from_callback(x.shape, sharding, part)

    def read(name: str, shardings: PyTree) -> PyTree:
        return jax.tree.map(put, get_group(cfg, params, name), shardings)

    return read


def quantising(read: ReadGroup, weights: EightBits, mesh: Mesh, found: Fingerprint) -> ReadGroup:
    """Reads groups, whose weights are in 8 bits before the next group is read.

    Args:
      found: is told the groups as they were read.
    """

    def read_quantised(name: str, shardings: PyTree) -> PyTree:
        group = read(name, shardings)
        found.add_group(name, group)
        return quantise_placed(name, group, weights, mesh)

    return read_quantised


def quantise_placed(name: str, group: PyTree, weights: EightBits, mesh: Mesh) -> PyTree:
    """`quantise_group`, placed on the mesh as weights in 8 bits are."""
    group = quantise_group(name, group, weights)
    return jax.device_put(group, sharding.param_shardings(group, mesh, f"{_kind(name)}/"))


def quantise_group(name: str, group: PyTree, weights: EightBits) -> PyTree:
    """A layer or the head with its weights in 8 bits; another group as it is."""
    if _kind(name) == "layers":
        return _quantise(group, name=weights)
    return _quantise({name: group}, name=weights)[name] if name == "head" else group


def dequantise_group(name: str, group: PyTree, dtype: Any) -> PyTree:
    """The same in the plain form, with the rounded weights."""
    if _kind(name) == "layers":
        return dequantise_modules(group, dtype)
    return dequantise_modules({name: group}, dtype)[name] if name == "head" else group


_quantise = jax.jit(quantise_modules, static_argnames="name")


def _kind(name: str) -> str:
    return name.partition("/")[0]


def assemble(
    cfg: ModelConfig,
    read: ReadGroup,
    mesh: Mesh,
    layout: Layout,
    shapes: dict[str, PyTree] | None = None,
) -> trees.Params:
    """All groups, read one after the other, with the layers in the layout asked for.

    Args:
      shapes: of the groups as they are read; None: as they are initialised.
    """
    layout, parts = chosen_layout(layout, mesh, cfg), mesh.shape["tensor"]
    params: dict[str, Any] = {"layers": ()}
    if layout == "fused":
        params["form"] = Form(fused=parts)
    for name, shape in progress((shapes or group_shapes(cfg)).items(), "loading"):
        key, _, layer = name.partition("/")
        group = read(name, sharding.param_shardings(shape, mesh, f"{key}/"))
        if not layer:
            params[key] = group
        elif layout != "stacked":
            params[key] += (_fuse(group, parts=parts) if layout == "fused" else group,)
        else:
            stacked = params[key] or _empty_stack(group, cfg.num_layers, mesh)
            params[key] = _set_layer(stacked, group, int(layer))
    return params


def chosen_layout(layout: Layout, mesh: Mesh, cfg: ModelConfig) -> Layout:
    """The layout that "auto" stands for.

    A scan over stacked layers copies each layer's weights out of the stack, 6 to 8 ms per pass of
    8B parameters on an H200, but compiles in seconds: for TPUs, CPUs and many hosts. On GPUs
    every layer has its own arrays, fused unless devices get unequal numbers of heads.
    """
    choices = ("auto", "stacked", "unrolled", "fused")
    require(layout in choices, f"layout={layout!r}: give one of {', '.join(map(repr, choices))}")
    parts = mesh.shape["tensor"]
    fits = fusing.can_fuse(cfg, parts)
    require(
        fits or layout != "fused",
        f"layout='fused' needs equally many heads and hidden units on every device, but tensor="
        f"{parts} does not divide them; use 'unrolled'",
    )
    if layout != "auto":
        return layout
    if jax.default_backend() != "gpu":
        return "stacked"
    return "fused" if fits else "unrolled"


_fuse = jax.jit(fusing.fuse, static_argnames="parts")


def _empty_stack(layer: PyTree, num_layers: int, mesh: Mesh) -> PyTree:
    leaves, structure = jax.tree.flatten(layer)
    shapes = [jax.ShapeDtypeStruct((num_layers, *x.shape), x.dtype) for x in leaves]
    stack = jax.tree.unflatten(structure, shapes)
    shardings = sharding.param_shardings(stack, mesh, "layers/")
    return jax.jit(_make_zeros(structure, tuple(shapes)), out_shardings=shardings)()


@lru_cache(maxsize=16)  # so that the next model of this shape finds the program
def _make_zeros(structure: Any, shapes: tuple) -> Callable[[], PyTree]:
    return lambda: jax.tree.unflatten(structure, [jnp.zeros(x.shape, x.dtype) for x in shapes])


@partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: PyTree, layer: PyTree, i: Any) -> PyTree:
    """Writes one layer into the stack in place, so that no second copy of the model exists."""
    return jax.tree.map(
        lambda s, x: lax.dynamic_update_index_in_dim(s, x, i, axis=0), stacked, layer
    )


def materialise(x: Any, dtype: str) -> Any:
    """The array in `dtype`; a numpy view becomes a contiguous copy."""
    if isinstance(x, np.ndarray):
        return np.array(x, dtype, order="C")
    return x.astype(dtype)


def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """The items, with a progress bar on stderr if that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, label, disable=None)
