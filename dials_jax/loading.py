"""Loads models from every kind of folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dials_jax.config import Layout, typed
from dials_jax.errors import InputError, require
from dials_jax.files import local_path, read_json
from dials_jax.models import folders, groups
from dials_jax.models.model import Model


@typed
def load(
    path: str | Path, dtype: Any = None, mesh: Mesh | None = None, layout: Layout = "auto"
) -> Model:
    """Loads a converted model, the model in a training workdir, or a Hugging Face folder.

    Args:
      path: a folder of one of these kinds. Hugging Face folders hold safetensors.
      dtype: of weights and activations, "bfloat16" or "float32"; None keeps those stored.
      mesh: None is a mesh over all devices.
      layout: of the layers; "auto": see `groups.chosen_layout`.

    Raises: InputError for any other path, and for a folder that is broken.
    """
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
            return folders.load_model(candidate, dtype, mesh, layout)
    config_file = folder / "config.json"
    if config_file.is_file() and "model_type" in read_json(config_file):
        return _load_hugging_face(folder, dtype, mesh, layout)
    raise InputError(
        f"{path} holds no model: give a folder made by `dials convert`, a training workdir "
        "with model/ inside, or a Hugging Face folder with config.json and safetensors"
    )


def _load_hugging_face(folder: Path, dtype: Any, mesh: Mesh | None, layout: Layout) -> Model:
    from dials_jax.convert.hugging_face import (
        open_hugging_face,  # names of other libraries stay out of this one
    )

    cfg, params = open_hugging_face(folder, dtype)
    return Model(cfg, groups.place(cfg, params, mesh, layout), mesh, str(folder.absolute()))
