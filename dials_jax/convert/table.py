"""Published tensors as our parameters, and back, by one table of names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import PyTree

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


class TensorLayout(NamedTuple):
    """How a kind of checkpoint stores the tensors of its table.

    Attributes:
      prefix: may be missing from the names that begin with it.
      joined: a pattern of modules that hold several projections, which are separate in the table:
        `x.weight` holds `x.q.weight`, `x.k.weight` and `x.v.weight`, along its first axis. The
        default fits nothing.
      parts: the names of these projections, in their order.
      transposed: a pattern of weights that are stored [in, out], unlike those of a torch Linear.
      tied: whether a config.json that does not say so ties the head to the embedding.
    """

    prefix: str = "model."
    joined: str = "(?!)"
    parts: tuple[str, ...] = ("q", "k", "v")
    transposed: str = "(?!)"
    tied: bool = False


def fill_params(
    table: Iterable[TensorEntry],
    shapes: trees.Params,
    tensors: dict[str, np.ndarray],
    source: Path,
    tied: bool = False,
    layout: TensorLayout = TensorLayout(),
) -> trees.Params:
    """Returns our tree, layers unrolled, as views of the tensors: nothing is read or copied.

    Args:
      shapes: the tree to fill, layers stacked.
      tensors: by published name, with or without the prefix of the `layout`.
      source: where the tensors come from, for messages.
      tied: fill a missing tensor with the one that its entry is tied to.

    Raises: InputError for a tensor that is missing, unknown or of another shape.
    """
    entries = {entry.ours: entry for entry in table}
    tensors = _separated(tensors, layout)
    unused = set(tensors)

    def take_tensor(name: str, shape: tuple[int, ...], layer: int | None = None) -> np.ndarray:
        entry = entries[name]
        key = entry.upstream.format(i=layer)
        keys = (key, entry.tied) if tied else (key,)
        bare = layout.prefix
        found = next((n for k in keys for n in (k, k.removeprefix(bare)) if n in tensors), None)
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


def published_tensors(
    table: Iterable[TensorEntry], layout: TensorLayout, group: str, params: PyTree
) -> dict[str, np.ndarray]:
    """Returns a group of parameters under published names: the inverse of `fill_params`.

    Args:
      group: its name, as in `models.groups`: "embed", "layers/003".
      params: its arrays, on the host.

    Returns: views of the arrays, but for the modules that hold several projections.
    """
    entries = {entry.ours: entry for entry in table}
    room, _, number = group.partition("/")
    out = {}
    for name, x in trees.named_leaves(params):
        entry = entries[f"{room}/{name}"]
        view = x if entry.num_inputs is None else _torch_view(x, entry.num_inputs)
        out[entry.upstream.format(i=int(number or 0))] = view
    return _joined(out, layout)


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


def _separated(tensors: dict[str, np.ndarray], layout: TensorLayout) -> dict[str, np.ndarray]:
    """Names and turns tensors as the table does: a Linear is [out, in], projections are separate.

    Raises: InputError for a tensor that does not divide into its projections.
    """
    out = {}
    for name, x in tensors.items():
        x = x.T if re.fullmatch(layout.transposed, name) else x
        stem, _, kind = name.rpartition(".")
        if re.fullmatch(layout.joined, stem) is None:
            out[name] = x
            continue
        require(
            len(x) % len(layout.parts) == 0,
            f"{name} has shape {x.shape}, which does not divide into {', '.join(layout.parts)}",
        )
        pieces = np.split(x, len(layout.parts))
        out |= {f"{stem}.{p}.{kind}": y for p, y in zip(layout.parts, pieces, strict=True)}
    return out


def _joined(tensors: dict[str, np.ndarray], layout: TensorLayout) -> dict[str, np.ndarray]:
    """The inverse of `_separated`."""
    out: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        module, _, kind = name.rpartition(".")
        stem, _, part = module.rpartition(".")
        if part in layout.parts and re.fullmatch(layout.joined, stem):
            pieces = [tensors[f"{stem}.{p}.{kind}"] for p in layout.parts]
            name, x = f"{stem}.{kind}", np.concatenate(pieces)
        if name not in out:
            out[name] = x.T if re.fullmatch(layout.transposed, name) else x
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


def _torch_view(x: np.ndarray, num_inputs: int) -> np.ndarray:
    """The inverse of `_reshaped_view`."""
    shape = _torch_shape(x.shape, num_inputs)
    return x.reshape(shape[::-1]).T
