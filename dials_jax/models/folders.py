"""The folder of a model: its configuration, and its weights in groups of parameters.

    config.json          describes the weights: see `ModelInfo`
    params/embed/        one Orbax checkpoint per group, so that one group at a time is in memory
    params/time/         only where adaLN modulates the layers
    params/layers/000/
    ...
    params/final_norm/
    params/head/
    tokenizer.json ...   the files of the tokenizer, if there is one

A folder is written under a temporary name and renamed when it is complete. The digest of a group is
compared whenever the group is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from dials_jax import digests, sharding, trees
from dials_jax.config import (
    Count,
    EightBits,
    Layout,
    ModelConfig,
    Typed,
    WeightDtype,
    as_type,
    from_dict,
    shown,
    to_dict,
)
from dials_jax.errors import InputError, require
from dials_jax.files import copy_tokenizer_file, local_path, read_json, write_json
from dials_jax.models import groups
from dials_jax.models.model import Model
from dials_jax.nn.eight_bits import cast_others, weights_kind
from dials_jax.stored import (
    MARK,
    UnreadableTree,
    is_empty,
    load_tree,
    new_folder,
    require_parent,
    require_space,
    save_tree,
    unfinished_name,
    writing,
)

MODEL_FORMAT = "dials_jax model"
VERSION = 1
WEIGHT_DTYPES = get_args(WeightDtype)
GROUP_NAMES = ("embed", "time", "layers", "final_norm", "head")
CHUNK_BYTES = 2**26  # small enough that a device reads little more than its own slice


@dataclass(frozen=True, kw_only=True)
class ModelInfo(Typed):
    """The content of a model folder's `config.json`."""

    format: str = MODEL_FORMAT
    version: int = VERSION
    model: ModelConfig
    dtype: WeightDtype  # of the stored weights; training keeps float32 under bfloat16 activations
    parameters: Count
    fingerprint: str  # of the weights, before they were quantised; routers remember it
    digests: dict[str, str]  # group's name -> digest of its stored bits
    weights: EightBits | None = None  # those of layers are stored in 8 bits, and so is the head,
    head_in_8_bits: bool = False  # but in folders from before it was quantised


# ----------------------------------------------------------------------------------- saving


def save_model(
    folder: str | Path,
    cfg: ModelConfig,
    params: trees.Params,
    *,
    dtype: Any = None,
    weights: EightBits | None = None,
    tokenizer_files: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> None:
    """Writes a model folder, group by group.

    Args:
      params: arrays of JAX or numpy, layers stacked or unrolled. Memory-mapped arrays stay on disk
        until their group's turn.
      dtype: of the stored weights; None keeps theirs.
      weights: store those of layers and head in 8 bits, "fp8" or "int8".
      overwrite: replace an existing model folder, once the new one is complete.

    Raises: InputError, before anything is written, if the folder exists, the disk is too full or
      the parameters are in 8 bits already.
    """
    require(
        weights_kind(params) is None,
        "the parameters are in 8 bits already; save those that they were quantised from, with "
        "weights=",
    )
    folder = local_path(folder, "the model's folder")
    leaves = jax.tree.leaves(params)
    dtype = dtype_name(dtype) or jnp.result_type(*leaves).name
    num_parameters = trees.count_parameters(params)
    require(overwrite or not folder.exists(), f"{folder} exists; name another folder")
    require_parent(folder)
    require_replaceable_model(folder)
    shapes = stored_shapes(cfg, dtype, weights)
    require_space(folder, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)))
    again = "make room and run the command again"
    with new_folder(folder, again) as unfinished:
        stored_digests, fingerprint = {}, digests.Fingerprint()
        for name in groups.progress(groups.group_shapes(cfg), "saving"):
            group = jax.tree.map(
                partial(groups.materialise, dtype=dtype), groups.get_group(cfg, params, name)
            )
            fingerprint.add_group(name, group)
            if weights is not None:
                group = groups.quantise_group(name, group, weights)
            stored_digests[name] = group_digest(group)
            save_tree(unfinished / "params" / name, group, again, CHUNK_BYTES)
        info = ModelInfo(
            model=cfg,
            dtype=dtype,
            parameters=num_parameters,
            fingerprint=fingerprint.hex(),
            digests=stored_digests,
            weights=weights,
            head_in_8_bits=weights is not None,
        )
        about = to_dict(info)
        if weights is None:  # earlier versions read the folder
            del about["weights"], about["head_in_8_bits"]

        def describe():
            for file in tokenizer_files:
                copy_tokenizer_file(Path(file), unfinished)
            write_json(unfinished / "config.json", about, digest=True)

        with writing(unfinished, again):
            sharding.on_first_process(describe)


def require_replaceable_model(folder: Path) -> None:
    """Raises: InputError where `save_model` would remove a folder that it did not make."""
    unfinished = unfinished_name(folder)
    require(
        not os.path.lexists(folder) or is_empty(folder) or _says_model(folder),
        f"{folder} is no {MODEL_FORMAT} and would be overwritten; move it away",
    )
    require(
        not os.path.lexists(unfinished) or is_empty(unfinished) or _is_unfinished(unfinished),
        f"{unfinished} was not left by a save that was stopped, and would be removed; move it away",
    )


def _says_model(folder: Path) -> bool:
    try:
        return not folder.is_symlink() and is_model_folder(folder)
    except InputError:  # an unreadable config.json
        return False


def _is_unfinished(folder: Path) -> bool:
    """Whether a stopped save left the folder: it has the mark, or, from versions before there was
    one, holds only groups of parameters."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if (folder / MARK).is_file() or _says_model(folder):
        return True
    groups_there = {path.name.partition(".")[0] for path in (folder / "params").glob("*")}
    others = [path for path in folder.iterdir() if path.is_dir() and path.name != "params"]
    return not others and 0 < len(groups_there) and groups_there <= set(GROUP_NAMES)


# ----------------------------------------------------------------------------------- loading


def is_model_folder(folder: str | Path) -> bool:
    """Whether the folder's `config.json` says that it holds a model of this library."""
    file = Path(folder) / "config.json"
    return file.is_file() and read_json(file).get("format") == MODEL_FORMAT


def read_info(folder: str | Path) -> ModelInfo:
    """Reads `config.json`. Raises: InputError if it is not a model folder's."""
    file = Path(folder) / "config.json"
    values = read_json(file)
    require(values.get("format") == MODEL_FORMAT, f"{file} does not describe a {MODEL_FORMAT}")
    require(
        values.get("version") == VERSION,
        f"{file} has version {values.get('version')} and this library reads {VERSION}; "
        "convert the model again, or install the library that wrote it",
    )
    return from_dict(ModelInfo, values, where=str(file))


def load_model(
    folder: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    layout: Layout = "auto",
    weights: EightBits | None = None,
    batch_invariant: bool = False,
) -> Model:
    """Reads a model folder, every array directly to its devices.

    Args:
      dtype: of weights and activations; None keeps those stored.
      mesh: None is a mesh over all devices.
      layout: of the layers; "auto": see `groups.chosen_layout`.
      weights: in 8 bits, "fp8" or "int8"; None keeps those stored.
      batch_invariant: see `dials_jax.load`.

    Raises: InputError if something is missing, broken or changed since it was saved.
    """
    folder = Path(folder).absolute()
    info, dtype = read_info(folder), dtype_name(dtype)
    require(
        weights in (None, info.weights) or info.weights is None,
        f"{folder} holds its weights in {info.weights}, not {weights}; leave weights= out, or give "
        "the model that it was converted from",
    )
    cfg = info.model if dtype is None else dataclasses.replace(info.model, dtype=dtype)
    shapes, mesh = folder_shapes(info), mesh or sharding.make_mesh()

    def read(name: str, shardings: PyTree) -> PyTree:
        group = cast_others(read_group(folder, info, name, shapes[name], shardings), dtype)
        if name == "head" and info.weights is not None and not info.head_in_8_bits:
            return groups.quantise_placed(name, group, info.weights, mesh)
        return group

    if info.weights is None:
        return build_model(cfg, read, mesh, layout, str(folder), weights, batch_invariant)
    params = groups.assemble(cfg, read, mesh, layout, shapes)
    return Model(cfg, params, mesh, str(folder), info.fingerprint, batch_invariant)


def build_model(
    cfg: ModelConfig,
    read: groups.ReadGroup,
    mesh: Mesh | None,
    layout: Layout,
    path: str,
    weights: EightBits | None = None,
    batch_invariant: bool = False,
) -> Model:
    """A model of the groups that `read` gives, one after the other, quantised where asked for."""
    mesh = mesh or sharding.make_mesh()
    if weights is None:
        params = groups.assemble(cfg, read, mesh, layout)
        return Model(cfg, params, mesh, path, batch_invariant=batch_invariant)
    found = digests.Fingerprint()
    quantised = groups.quantising(read, weights, mesh, found)
    params = groups.assemble(cfg, quantised, mesh, layout)
    return Model(cfg, params, mesh, path, found.hex(), batch_invariant)


def stored_shapes(
    cfg: ModelConfig, dtype: str, weights: EightBits | None = None
) -> dict[str, PyTree]:
    """Shapes and dtypes of the groups that `save_model` writes, by name."""
    cast = partial(cast_others, dtype=dtype)
    return jax.eval_shape(cast, groups.group_shapes(cfg, weights))


def folder_shapes(info: ModelInfo) -> dict[str, PyTree]:
    """Shapes and dtypes of the groups in the folder that `info` describes, by name."""
    shapes = stored_shapes(info.model, info.dtype, info.weights)
    if not info.head_in_8_bits:
        shapes["head"] = stored_shapes(info.model, info.dtype)["head"]
    return shapes


def read_group(
    folder: Path, info: ModelInfo, name: str, shapes: PyTree, shardings: PyTree
) -> PyTree:
    """Reads one group as it is stored.

    Args:
      shapes: of `folder_shapes`.

    Raises: InputError if it is missing, broken or changed.
    """

    def abstract(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    path, again = folder / "params" / name, "convert or copy the model again"
    require(path.is_dir(), f"{path} is missing; {again}")
    like = jax.tree.map(abstract, shapes, shardings)
    try:
        return load_tree(path, like, info.digests.get(name), group_digest)
    except UnreadableTree as error:
        raise InputError(f"{path} cannot be read ({error}); {again}") from error


# ----------------------------------------------------------------------------------- helpers


def group_digest(group: PyTree) -> str:
    """16 hexadecimal digits; any flipped bit changes them."""
    text = json.dumps(digests.digest_hex(group), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dtype_name(dtype: Any) -> str | None:
    """The name of a dtype of weights. Raises: InputError unless bfloat16, float32 or None."""
    if dtype is None:
        return None
    try:
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        name = shown(dtype)
    return as_type(WeightDtype, name, "dtype")
