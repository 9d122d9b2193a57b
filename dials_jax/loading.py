"""Loads models from every kind of folder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dials_jax import trees
from dials_jax.compiling import require_32_bits
from dials_jax.config import EightBits, Layout, MeshConfig, ModelConfig, typed
from dials_jax.errors import InputError, require
from dials_jax.files import local_path, read_json
from dials_jax.models import folders, groups
from dials_jax.models.invariance import require_invariant
from dials_jax.models.model import Model
from dials_jax.nn.kernels.implementation import check_kernel_choice
from dials_jax.sharding import as_mesh


@typed
def load(
    path: str | Path,
    dtype: Any = None,
    mesh: Mesh | MeshConfig | None = None,
    layout: Layout = "auto",
    weights: EightBits | None = None,
    batch_invariant: bool = False,
) -> Model:
    """Loads a converted model, the model in a training workdir, or a Hugging Face folder.

    Args:
      path: a folder of one of these kinds. Hugging Face folders hold safetensors.
      dtype: of weights and activations, "bfloat16" or "float32"; None keeps those stored.
      mesh: sizes of its axes, as `MeshConfig(data=2, tensor=2)`, or a mesh with these axes; None is
        one over all devices.
      layout: of the layers; "auto": see `groups.chosen_layout`.
      weights: "fp8" or "int8" quantises the weights of head and layers, one after the other, and
        their inputs in every call (see `dials_jax.nn.eight_bits`); None keeps those stored.
      batch_invariant: a sequence's logits and tokens are then bitwise the same in any batch: by
        kernels whose sums have one order (see docs/evaluation.md). That costs some speed.

    Raises: InputError for any other path, for a folder that is broken, and, before weights are
      read, for a device or a model for which there are no such kernels.
    """
    require_32_bits()
    check_kernel_choice()
    mesh = as_mesh(mesh)
    if batch_invariant:
        require_invariant(read_config(path, dtype), mesh)
    folder, is_own = find_model(path)
    if is_own:
        return folders.load_model(folder, dtype, mesh, layout, weights, batch_invariant)
    cfg, params = _open_hugging_face(folder, dtype)
    read = groups.placing(cfg, params)
    path = str(folder.absolute())
    return folders.build_model(cfg, read, mesh, layout, path, weights, batch_invariant)


def read_config(path: str | Path, dtype: Any = None) -> ModelConfig:
    """The configuration of what `load` would load; no weight is read.

    Raises: InputError as `load`.
    """
    folder, is_own = find_model(path)
    if not is_own:
        return _open_hugging_face(folder, dtype)[0]
    cfg = folders.read_info(folder).model
    return cfg if dtype is None else replace(cfg, dtype=folders.dtype_name(dtype))


def read_formats(
    path: str | Path, dtype: Any = None, weights: EightBits | None = None
) -> tuple[str, EightBits | None]:
    """The number format of the weights that `load` would load, and in which 8 bits those of layers
    and head are; no weight is read."""
    folder, is_own = find_model(path)
    if not is_own:
        return _open_hugging_face(folder, dtype)[0].dtype, weights
    info = folders.read_info(folder)
    return folders.dtype_name(dtype) or info.dtype, weights or info.weights


def find_model(path: str | Path) -> tuple[Path, bool]:
    """The folder that holds the model, and whether it is one of this library."""
    folder = local_path(path, "model")
    may_be_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.parent.exists()
    name = str(path).rpartition("/")[2].lower()
    require(
        not may_be_name,
        f"{path} is not a folder; if it is a name on the Hugging Face hub, download it with "
        f"`hf download {path} --local-dir models/{name}`, and give that folder",
    )
    require(folder.is_dir(), f"{path} is not a folder; give a model, a workdir or a download")
    for candidate in (folder, folder / "model"):
        if folders.is_model_folder(candidate):
            return candidate, True
    config_file = folder / "config.json"
    if config_file.is_file() and "model_type" in read_json(config_file):
        return folder, False
    raise InputError(
        f"{path} holds no model: give a folder made by `dials convert`, a training workdir "
        "with model/ inside, or a Hugging Face folder with config.json and safetensors"
    )


def _open_hugging_face(folder: Path, dtype: Any) -> tuple[ModelConfig, trees.Params]:
    from dials_jax.convert.hugging_face import (
        open_hugging_face,  # names of other libraries stay out of this one
    )

    return open_hugging_face(folder, dtype)
