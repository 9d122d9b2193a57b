"""Writes a model in the published layout of its family, for PyTorch and other tools."""

from __future__ import annotations

import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from dials_jax.config import EightBits, ModelConfig, typed
from dials_jax.convert import publish
from dials_jax.convert.hugging_face import collect_tokenizer_files, open_hugging_face
from dials_jax.convert.safetensors_writer import num_bytes, write_shards
from dials_jax.data.tokenizer import load_tokenizer
from dials_jax.data.tokenizer_training import tokenizer_settings
from dials_jax.errors import require
from dials_jax.files import copy_tokenizer_file, local_path, write_json
from dials_jax.loading import find_model
from dials_jax.models import folders, groups
from dials_jax.models.model import Model
from dials_jax.nn.eight_bits import is_quantised
from dials_jax.stored import new_folder, require_new, require_space, writing

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}  # as transformers counts
# Of config.json, also in generation_config.json: Dream's class does not load without that file.
GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")


class Weights(NamedTuple):
    """Where the weights come from, one group of parameters at a time."""

    config: ModelConfig
    dtype: str  # of all that is in no 8 bits
    read: publish.ReadHostGroup  # with weights in 8 bits as the numbers that they stand for
    folder: Path | None  # with the tokenizer
    eight_bits: EightBits | None = None


@typed
def export_model(
    model: str | Path | Model,
    folder: str | Path,
    dtype: Any = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes config.json, safetensors and the tokenizer's files as the family's authors publish.

    `dials_jax.load` reads the folder, with the same weights bit by bit; so does the authors' code.
    One group of parameters is in memory at a time (embedding and head together where the family
    may tie them), beside the model itself if that is given.

    Args:
      model: one in memory, or what `load` takes.
      folder: to write; it must not exist.
      dtype: of the written weights, "bfloat16" or "float32"; None keeps theirs. Published layouts
        have no weights in 8 bits: with a dtype, the rounded numbers are written.
      max_shard_size: of a file, as "5GB" or "500MB".

    Returns: the folder.
    Raises: InputError, before anything is written, for a model that the layout cannot describe, for
      weights in 8 bits without a dtype, a folder that exists and a disk that is too full.
    """
    require(jax.process_count() == 1, "several processes run; export from a single one")
    shard_bytes = _read_size(max_shard_size)
    target = local_path(folder, "the folder of the export")
    require_new(target)
    weights = _open_model(model) if isinstance(model, Model) else _open_folder(model)
    require(
        weights.eight_bits is None or dtype is not None,
        f"the published layout has no weights in {weights.eight_bits}; give dtype bfloat16 to "
        "write the rounded ones, or export the model that they were quantised from",
    )
    dtype = folders.dtype_name(dtype) or weights.dtype
    values = publish.published_config(weights.config, dtype)
    tied = publish.is_tied(weights.config, weights.read)
    if tied:
        values["tie_word_embeddings"] = True
    shapes = publish.tensor_shapes(weights.config, dtype, tied)
    require_space(target, sum(map(num_bytes, shapes.values())))
    again = "make room and run the command again"
    with new_folder(target, again) as unfinished, writing(unfinished, again):
        tensors = publish.all_tensors(weights.config, weights.read, dtype, tied, "exporting")
        write_shards(unfinished, shapes, tensors, shard_bytes)
        write_json(unfinished / "config.json", values)
        ids = {name: values[name] for name in GENERATION_IDS if values.get(name) is not None}
        write_json(unfinished / "generation_config.json", {"_from_model_config": True, **ids})
        if weights.folder is not None:
            _copy_tokenizer(weights.folder, unfinished, weights.config)
        open_hugging_face(unfinished)  # checks headers, names and shapes; reads no weight
    return target


def _read_size(text: str) -> int:
    """Bytes of a text such as 5GB. Raises: InputError for any other."""
    number, unit = text[:-2], text[-2:].upper()
    right = unit in UNITS and number.isdecimal() and len(number) < 10 and int(number) > 0
    require(right, f"max_shard_size={text[:20]} is no size; give one as 5GB or 500MB")
    return int(number) * UNITS[unit]


def _copy_tokenizer(source: Path, target: Path, cfg: ModelConfig) -> None:
    """Copies the tokenizer's files. To a tokenizer.json alone it adds what AutoTokenizer needs."""
    with tempfile.TemporaryDirectory() as temporary:
        for file in collect_tokenizer_files(source, Path(temporary)):
            copy_tokenizer_file(file, target)
    complete, settings = target / "tokenizer.json", target / "tokenizer_config.json"
    if complete.is_file() and not settings.is_file() and find_spec("tokenizers"):
        ids = {"pad": cfg.pad_id, "eos": cfg.eos_id, "mask": cfg.mask_id}
        write_json(settings, tokenizer_settings(load_tokenizer(complete), **ids))


def _open_model(model: Model) -> Weights:
    cfg = model.config

    def read(name: str) -> PyTree:
        return _on_host(name, groups.get_group(cfg, model.params, name))

    others = jax.tree.leaves(model.params, is_leaf=is_quantised)
    dtype = jnp.result_type(*(x for x in others if not is_quantised(x))).name
    folder = Path(model.path) if model.path else None
    return Weights(cfg, dtype, read, folder, model.weights)


def _open_folder(path: str | Path) -> Weights:
    folder, is_own = find_model(path)
    if not is_own:
        cfg, params = open_hugging_face(folder)
        return Weights(cfg, cfg.dtype, partial(groups.get_group, cfg, params), folder)
    info = folders.read_info(folder)
    shapes = folders.folder_shapes(info)
    device = SingleDeviceSharding(jax.local_devices()[0])

    def read(name: str) -> PyTree:
        placed = jax.tree.map(lambda x: device, shapes[name])
        return _on_host(name, folders.read_group(folder, info, name, shapes[name], placed))

    return Weights(info.model, info.dtype, read, folder, info.weights)


def _on_host(name: str, group: PyTree) -> PyTree:
    return jax.tree.map(np.asarray, groups.dequantise_group(name, group, jnp.float32))
