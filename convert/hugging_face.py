"""Opens a Hugging Face folder as a configuration and a tree of parameters.

To add a kind of model, write a module with `translate(values, dtype) -> ModelConfig` and `TABLE`
(see `convert/llada.py`; `convert/settings.py` reads numbers) and list it in `MODEL_TYPES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes

from convert import dream, llada, qwen2
from convert.safetensors_reader import open_tensors
from convert.table import fill
from dials_jax import trees
from dials_jax.config import ModelConfig, nearest, read_json, require
from dials_jax.models.checkpoint import dtype_name, save_model
from dials_jax.models.groups import abstract_params

MODEL_TYPES = {"llada": llada, "Dream": dream, "qwen2": qwen2}  # the `model_type` of config.json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def open_folder(source: str | Path, dtype: Any = None) -> tuple[ModelConfig, trees.Params]:
    """The configuration, and the parameters as views of the mapped files, layers unrolled.

    Args:
      dtype: goes into the configuration; the views keep their own. None is bfloat16 for a
        checkpoint all of bfloat16 and float32 for any other, which holds every value exactly.

    Raises: InputError for anything about the folder that is not as it should be.
    """
    source = Path(source).expanduser()
    require(source.is_dir(), f"{source} is not a folder; give a downloaded checkpoint")
    values = read_json(source / "config.json")
    kind = values.get("model_type")
    require(
        kind in MODEL_TYPES,
        f"{source}: model type {kind!r} is not known{nearest(str(kind), MODEL_TYPES)}",
    )
    tensors = open_tensors(source)
    all_bfloat16 = all(x.dtype == ml_dtypes.bfloat16 for x in tensors.values())
    dtype = dtype_name(dtype) or ("bfloat16" if all_bfloat16 else "float32")
    cfg = MODEL_TYPES[kind].translate(values, dtype)
    tied = bool(values.get("tie_word_embeddings"))
    return cfg, fill(MODEL_TYPES[kind].TABLE, abstract_params(cfg), tensors, source, tied)


def convert(source: str | Path, target: str | Path, dtype: Any = None) -> ModelConfig:
    """Writes a Hugging Face folder as a model folder, one layer at a time in memory."""
    cfg, params = open_folder(source, dtype)
    files = [Path(source).expanduser() / name for name in TOKENIZER_FILES]
    present = [file for file in files if file.is_file()]
    save_model(target, cfg, params, dtype=cfg.dtype, tokenizer_files=present)
    return cfg
