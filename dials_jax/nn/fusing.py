"""Matmuls of the same input as one: queries, keys and values; the MLP's gate and up projection.

A block of 512 tokens runs 5 % faster so on one H200: the wide matmul fills the chip better. Where
`tensor` splits heads and hidden units over devices, each device's part is joined by itself: the
whole array holds queries, keys and values of the first device's heads, then those of the second's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from dials_jax.config import ModelConfig
from dials_jax.nn.eight_bits import is_quantised
from dials_jax.trees import Params

FUSED_PARTS = {"attention": {"qkv": ("q", "k", "v")}, "mlp": {"gate_up": ("gate", "up")}}
SUFFIXES = {"": 1, "_bias": 0}  # of a name, and the axis along which its arrays are joined


def fuse(layer: Params, parts: int = 1) -> Params:
    """One layer with its matmuls joined.

    Args:
      parts: the devices over which `tensor` splits heads and hidden units.
    """
    out = {module: dict(arrays) for module, arrays in layer.items()}
    for module, joined in FUSED_PARTS.items():
        for name, members in joined.items():
            for suffix, axis in SUFFIXES.items():
                if members[0] + suffix in out[module]:
                    pieces = [out[module].pop(member + suffix) for member in members]
                    join = partial(_join, axis=_output_axis(pieces[0], axis), parts=parts)
                    out[module][name + suffix] = jax.tree.map(join, *pieces)
    return out


def unfuse(layer: Params, cfg: ModelConfig, parts: int = 1) -> Params:
    """The inverse."""
    sizes = {"qkv": (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads), "gate_up": (cfg.d_ff,) * 2}
    out = {module: dict(arrays) for module, arrays in layer.items()}
    for module, joined in FUSED_PARTS.items():
        for name, members in joined.items():
            for suffix, axis in SUFFIXES.items():
                whole = out[module].pop(name + suffix, None)
                if whole is not None:
                    pieces = _split(whole, sizes[name], _output_axis(whole, axis), parts)
                    names = (member + suffix for member in members)
                    out[module] |= dict(zip(names, pieces, strict=True))
    return out


def _output_axis(weight: Any, axis: int) -> int:
    return 0 if is_quantised(weight) else axis


def can_fuse(cfg: ModelConfig, parts: int) -> bool:
    """Whether every device gets equally many heads and hidden units."""
    return cfg.num_heads % parts == cfg.num_kv_heads % parts == cfg.d_ff % parts == 0


def split_outputs(
    x: Shaped[Array | np.ndarray, "..."], sizes: tuple[int, ...], axis: int, parts: int
) -> list[Shaped[Array, "..."]]:
    """The joined outputs, or weights, one by one: of these sizes along the axis, joined in parts.

    Nothing moves between devices that hold a part each.
    """
    apart = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    edges = np.cumsum([size // parts for size in sizes])[:-1]
    pieces = jnp.split(apart, edges, axis=axis + 1)
    return [piece.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]) for piece in pieces]


def _join(*pieces: Any, axis: int, parts: int) -> Array:
    first = pieces[0].shape
    apart = [x.reshape(*first[:axis], parts, -1, *first[axis + 1 :]) for x in pieces]
    joined = jnp.concatenate(apart, axis=axis + 1)
    return joined.reshape(*first[:axis], -1, *first[axis + 1 :])


def _split(weight: Any, sizes: tuple[int, ...], axis: int, parts: int) -> list[Any]:
    leaves, structure = jax.tree.flatten(weight)
    pieces = zip(*(split_outputs(x, sizes, axis, parts) for x in leaves), strict=True)
    return [jax.tree.unflatten(structure, piece) for piece in pieces]
