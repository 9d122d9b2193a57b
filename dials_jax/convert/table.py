"""Fills a parameter tree from the tensors of a published checkpoint, by a table of names."""

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
    """The name of one published tensor and its path in our tree.

    A torch Linear stores [out, in]; our kernel is [in..., out...].

    Attributes:
      upstream: the published name; `{i}` is the number of the layer.
      ours: the path in our tree, without the number of the layer.
      num_inputs: how many leading axes of ours are inputs: 1 or 2 for the kernel of a Linear, 0 for
        its bias, None for a tensor of the same shape.
      tied: the published tensor that replaces it if config.json ties the two.
    """

    upstream: str
    ours: str
    num_inputs: int | None = None
    tied: str = ""


def fill_params(
    table: Iterable[TensorEntry],
    shapes: trees.Params,
    tensors: dict[str, np.ndarray],
    source: Path,
    tied: bool = False,
) -> trees.Params:
    """Returns our tree, layers unrolled, as views of the tensors: nothing is read or copied.

    Args:
      shapes: the tree to fill, layers stacked.
      tensors: by published name, with or without the leading `model.`.
      source: where the tensors come from, for messages.
      tied: fill a missing tensor with the one that its entry is tied to.

    Raises: InputError for a tensor that is missing, unknown or of another shape.
    """
    entries = {entry.ours: entry for entry in table}
    unused = set(tensors)

    def take_tensor(name: str, shape: tuple[int, ...], layer: int | None = None) -> np.ndarray:
        entry = entries[name]
        key = entry.upstream.format(i=layer)
        keys = (key, entry.tied) if tied else (key,)
        found = next((n for k in keys for n in (k, k.removeprefix("model.")) if n in tensors), None)
        require(found is not None, f"{source} lacks tensor {key!r}, which fills {name}")
        unused.discard(found)
        return _reshaped_view(found, tensors[found], shape, entry.num_inputs)

    def take_layer(layer: int) -> trees.Params:
        return trees.map_named(
            lambda name, x: take_tensor(f"layers/{name}", x.shape[1:], layer), shapes["layers"]
        )

    rest = {k: v for k, v in shapes.items() if k != "layers"}
    params = trees.map_named(lambda name, x: take_tensor(name, x.shape), rest)
    params["layers"] = tuple(map(take_layer, range(trees.num_layers(shapes["layers"]))))
    require(
        not unused,
        f"{source} holds {len(unused)} tensor(s) that its config.json does not account for, "
        f"{min(unused, default='')!r} first",
    )
    return params


# A wrapper of a module adds its name to those of the tensors inside: torch.compile, data
# parallelism, sharding, checkpointing of activations.
WRAPPERS = (
    "_orig_mod",
    "module",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
# Rotary angles and positions, which torch saves with the weights; we compute them.
COMMON_BUFFERS = r"(.+\.)?(rotary_emb\.\w*(inv_freq|cached)|position_ids)"


def strip_wrappers(tensors: dict[str, T], source: Path) -> dict[str, T]:
    """Renames tensors as in a module without wrappers, and keeps their order.

    Raises: InputError if two tensors get the same name.
    """

    def strip(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in WRAPPERS)

    out = {strip(name): x for name, x in tensors.items()}
    require(
        len(out) == len(tensors),
        f"{source} holds the same tensors twice, plain and compiled or wrapped; keep one of them",
    )
    return out


def is_buffer(name: str, also: str = "") -> bool:
    """Whether a tensor is computed and not learned.

    Args:
      also: a pattern of names of more buffers.
    """
    return bool(re.fullmatch(COMMON_BUFFERS, name) or (also and re.fullmatch(also, name)))


def split_projections(
    tensors: dict[str, np.ndarray], module: str, parts: tuple[str, ...], axis: int
) -> dict[str, np.ndarray]:
    """Splits tensors that hold several projections into equal parts, as `x.weight` to `x.q.weight`.

    Args:
      module: a pattern of the names to split, without `.weight` or `.bias`.
      parts: the names of the projections, in their order along `axis`.

    Raises: InputError for a tensor that does not divide into these parts.
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


def _reshaped_view(
    key: str, tensor: np.ndarray, shape: tuple[int, ...], num_inputs: int | None
) -> np.ndarray:
    """Returns a view of the tensor, transposed and reshaped to our `shape`.

    Raises: InputError if the tensor has another shape than the configuration says.
    """
    expected = shape if num_inputs is None else _torch_shape(shape, num_inputs)
    require(
        tensor.shape == expected,
        f"{key} has shape {tensor.shape}; its config.json makes that {expected}",
    )
    return tensor.T.reshape(shape) if num_inputs else tensor.reshape(shape)


def _torch_shape(shape: tuple[int, ...], num_inputs: int) -> tuple[int, ...]:
    """Returns the shape that torch gives a Linear's kernel (or its bias, without inputs)."""
    out = math.prod(shape[num_inputs:])
    return (out, math.prod(shape[:num_inputs])) if num_inputs else (out,)
