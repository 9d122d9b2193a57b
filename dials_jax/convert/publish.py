"""What a model is in the published layout of its family: config.json and tensors.

The inverse of `hugging_face`, by the same tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from dials_jax.config import ModelConfig
from dials_jax.convert.hugging_face import MODEL_TYPES, layout_of
from dials_jax.convert.table import published_tensors
from dials_jax.errors import InputError, require
from dials_jax.models.groups import group_shapes, progress

ReadHostGroup = Callable[[str], PyTree]  # a group's name -> its arrays on the host
COMPARED_ROWS = 4096  # of the embedding, at a time


class Family(NamedTuple):
    model_type: str  # of config.json
    module: ModuleType


def family_of(cfg: ModelConfig) -> Family:
    """Raises: InputError for a model whose kind is not published."""
    for name, module in MODEL_TYPES.items():
        if name.lower() == cfg.model_type.lower():
            return Family(name, module)
    raise InputError(
        f"model type {cfg.model_type!r} has no published layout; these have one: "
        f"{', '.join(MODEL_TYPES)}"
    )


def published_config(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json, of a model whose head is not tied to its embedding.

    Args:
      dtype: of the weights.

    Raises: InputError if the layout cannot say what `cfg` says, naming the setting.
    """
    model_type, module = family_of(cfg)
    values = {
        "model_type": model_type,
        "architectures": [module.ARCHITECTURES[0]],
        **module.publish_config(cfg),
        "torch_dtype": dtype,
    }
    if can_tie(module):
        values["tie_word_embeddings"] = False
    _require_same(cfg, values, module)
    return values


def _require_same(cfg: ModelConfig, values: dict[str, Any], module: ModuleType) -> None:
    """Raises: InputError unless `values` are read as `cfg`."""
    kept = "such a model stays in this library's own folder"
    try:
        found = module.translate_config(values, cfg.dtype)
    except InputError as error:
        raise InputError(f"{values['model_type']} has no such model ({error}); {kept}") from error
    for field in dataclasses.fields(cfg):
        ours, theirs = getattr(cfg, field.name), getattr(found, field.name)
        known_end = field.name == "eot_id" and ours is None  # of a known tokenizer
        require(
            ours == theirs or known_end,
            f"the published layout of {values['model_type']} cannot say {field.name}={ours!r} "
            f"({theirs!r} is what it would mean); {kept}",
        )


def can_tie(module: ModuleType) -> bool:
    return any(entry.tied for entry in module.TABLE)


def is_tied(cfg: ModelConfig, read: ReadHostGroup) -> bool:
    """Whether the head is the embedding, bit by bit, in a family that can leave it out."""
    if not can_tie(family_of(cfg).module):
        return False
    head, table = (_bits(read(name)[key]) for name, key in (("head", "kernel"), ("embed", "table")))
    return all(
        np.array_equal(head[:, i : i + COMPARED_ROWS].T, table[i : i + COMPARED_ROWS])
        for i in range(0, len(table), COMPARED_ROWS)
    )


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def all_tensors(
    cfg: ModelConfig, read: ReadHostGroup, dtype: str, tied: bool, label: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every published tensor, one group of parameters after the other.

    Args:
      label: shown with the progress; empty: none is shown.
    """
    module = family_of(cfg).module
    names = [name for name in group_shapes(cfg) if not (tied and name == "head")]
    for name in progress(names, label) if label else names:
        tensors = published_tensors(module.TABLE, layout_of(module), name, read(name))
        while tensors:  # each one, and so the group, is released before the next is read
            key = next(iter(tensors))
            yield key, tensors.pop(key).astype(dtype, copy=False)
    yield from getattr(module, "computed_tensors", lambda cfg: {})(cfg).items()


def tensor_shapes(cfg: ModelConfig, dtype: str, tied: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `all_tensors` yields, in its order."""
    shapes = group_shapes(cfg)

    def without_memory(x):
        return np.broadcast_to(np.zeros((), dtype), x.shape)

    tensors = all_tensors(cfg, lambda name: jax.tree.map(without_memory, shapes[name]), dtype, tied)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors}
