"""Fills a parameter tree from tensors with upstream names, by one table per kind of model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from dials_jax import trees
from dials_jax.errors import require

T = TypeVar("T")


class TensorEntry(NamedTuple):
    """One tensor upstream and its path in our tree.

    A torch Linear stores [out, in]; we store [in..., out...]. `inputs` is the number of our leading
    axes that are inputs: 1 or 2 for a Linear, 0 for its bias, None for a tensor of the same shape.
    """

    upstream: str  # `{i}` is the number of the layer
    ours: str  # a path below the parameters, without the number of the layer
    inputs: int | None = None
    tied: str = ""  # the tensor that replaces it if config.json ties the two


def fill_params(
    table: Iterable[TensorEntry],
    shapes: trees.Params,
    tensors: dict[str, np.ndarray],
    source: Path,
    tied: bool = False,
) -> trees.Params:
    """Our tree, layers unrolled, as views of the tensors: nothing is read or copied.

    Args:
      shapes: the tree to fill, layers stacked.
      tensors: names with or without the leading `model.`.
      source: where the tensors come from, for messages.
      tied: a missing tensor is replaced by the one that its row of the table is tied to.

    Raises: InputError for a tensor that is missing, unknown or of another shape.
    """
    rows = {row.ours: row for row in table}
    unused = set(tensors)

    def take(name: str, shape: tuple[int, ...], layer: int | None = None) -> np.ndarray:
        row = rows[name]
        key = row.upstream.format(i=layer)
        keys = (key, row.tied) if tied else (key,)
        found = next((n for k in keys for n in (k, k.removeprefix("model.")) if n in tensors), None)
        require(found is not None, f"{source} lacks tensor {key!r}, which fills {name}")
        unused.discard(found)
        return _view(found, tensors[found], shape, row.inputs)

    def take_layer(layer: int) -> trees.Params:
        return trees.map_named(
            lambda name, x: take(f"layers/{name}", x.shape[1:], layer), shapes["layers"]
        )

    rest = {k: v for k, v in shapes.items() if k != "layers"}
    params = trees.map_named(lambda name, x: take(name, x.shape), rest)
    params["layers"] = tuple(map(take_layer, range(trees.num_layers(shapes["layers"]))))
    require(
        not unused,
        f"{source} holds {len(unused)} tensor(s) that its config.json does not account for, "
        f"{min(unused, default='')!r} first",
    )
    return params


# Wrappers of a module add their name to those of the tensors inside: torch.compile, data
# parallelism, sharding, checkpointing of activations.
WRAPPERS = (
    "_orig_mod",
    "module",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
# What torch saves beside weights: angles and positions, which we compute.
COMMON_BUFFERS = r"(.+\.)?(rotary_emb\.\w*(inv_freq|cached)|position_ids)"


def strip_wrappers(tensors: dict[str, T], source: Path) -> dict[str, T]:
    """The tensors, in their order, under their names in a module without wrappers."""

    def plain(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in WRAPPERS)

    out = {plain(name): x for name, x in tensors.items()}
    require(
        len(out) == len(tensors),
        f"{source} holds the same tensors twice, plain and compiled or wrapped; keep one of them",
    )
    return out


def is_buffer(name: str, also: str = "") -> bool:
    """Whether a tensor is computed, not learned; `also`: a pattern of more buffers."""
    return bool(re.fullmatch(COMMON_BUFFERS, name) or (also and re.fullmatch(also, name)))


def split_projections(
    tensors: dict[str, np.ndarray], module: str, parts: tuple[str, ...], axis: int
) -> dict[str, np.ndarray]:
    """Tensors that hold several projections, cut into equal parts: `x.weight` to `x.q.weight`.

    Args:
      module: a pattern of the names that are cut, without `.weight` or `.bias`.
    """
    out = {}
    for name, x in tensors.items():
        stem, _, kind = name.rpartition(".")
        if re.fullmatch(module, stem) is None:
            out[name] = x
            continue
        require(
            x.shape[axis] % len(parts) == 0,
            f"{name} has shape {x.shape}, which does not divide into {', '.join(parts)}",
        )
        pieces = np.split(x, len(parts), axis)
        out |= {f"{stem}.{part}.{kind}": y for part, y in zip(parts, pieces, strict=True)}
    return out


def _view(key: str, tensor: np.ndarray, shape: tuple[int, ...], inputs: int | None) -> np.ndarray:
    """The tensor transposed and split into our axes, as a view."""
    expected = shape if inputs is None else _torch_shape(shape, inputs)
    require(
        tensor.shape == expected,
        f"{key} has shape {tensor.shape}; its config.json makes that {expected}",
    )
    return tensor.T.reshape(shape) if inputs else tensor.reshape(shape)


def _torch_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    out = math.prod(shape[inputs:])
    return (out, math.prod(shape[:inputs])) if inputs else (out,)
