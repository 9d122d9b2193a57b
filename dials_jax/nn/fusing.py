"""Matmuls of the same input as one: queries, keys and values; the MLP's gate and up projection.

A block of 512 tokens runs 5 % faster so on one H200: the wide matmul fills the chip better. Only
whole arrays can be joined, so heads that are split over devices stay separate.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dials_jax.config import ModelConfig
from dials_jax.nn.eight_bits import is_quantised
from dials_jax.trees import Params

FUSED_PARTS = {"attention": {"qkv": ("q", "k", "v")}, "mlp": {"gate_up": ("gate", "up")}}
SUFFIXES = {"": 1, "_bias": 0}  # of a name, and the axis along which its arrays are joined


def fuse(layer: Params) -> Params:
    """One layer with its matmuls joined."""
    out = {module: dict(arrays) for module, arrays in layer.items()}
    for module, joined in FUSED_PARTS.items():
        for name, parts in joined.items():
            for suffix, axis in SUFFIXES.items():
                if parts[0] + suffix in out[module]:
                    pieces = [out[module].pop(part + suffix) for part in parts]
                    join = partial(_join, axis=_output_axis(pieces[0], axis))
                    out[module][name + suffix] = jax.tree.map(join, *pieces)
    return out


def unfuse(layer: Params, cfg: ModelConfig) -> Params:
    """The inverse."""
    sizes = {"qkv": (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads), "gate_up": (cfg.d_ff,) * 2}
    out = {module: dict(arrays) for module, arrays in layer.items()}
    for module, joined in FUSED_PARTS.items():
        for name, parts in joined.items():
            for suffix, axis in SUFFIXES.items():
                whole = out[module].pop(name + suffix, None)
                if whole is not None:
                    pieces = _split(whole, np.cumsum(sizes[name])[:-1], _output_axis(whole, axis))
                    names = (part + suffix for part in parts)
                    out[module] |= dict(zip(names, pieces, strict=True))
    return out


def _output_axis(weight: Any, axis: int) -> int:
    return 0 if is_quantised(weight) else axis


def _join(*pieces: Any, axis: int) -> Array:
    return jnp.concatenate(pieces, axis=axis)


def _split(weight: Any, edges: np.ndarray, axis: int) -> list[Any]:
    leaves, structure = jax.tree.flatten(weight)
    pieces = zip(*(jnp.split(x, edges, axis=axis) for x in leaves), strict=True)
    return [jax.tree.unflatten(structure, piece) for piece in pieces]
