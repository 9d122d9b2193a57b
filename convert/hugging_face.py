"""Opens a Hugging Face folder as a configuration and a tree of parameters.

To add a kind of model, write a module with `translate(values, dtype) -> ModelConfig` and `TABLE`
(see `convert/llada.py`; `convert/settings.py` reads numbers) and list it in `MODEL_TYPES`. Where
its tensors need more than new names, `arrange(values, tensors) -> tensors` comes first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import dream, gpt2, llada, mdlm, qwen2
from convert.safetensors_reader import open_tensors
from convert.table import fill
from dials_jax import trees
from dials_jax.config import ModelConfig, nearest, read_json, require
from dials_jax.models.checkpoint import dtype_name, save_model
from dials_jax.models.groups import abstract_params

MODEL_TYPES = {  # the `model_type` of config.json
    "llada": llada,
    "Dream": dream,
    "qwen2": qwen2,
    "mdlm": mdlm,
    "gpt2": gpt2,
}

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
    return from_tensors(values, open_tensors(source), source, dtype)


def from_tensors(
    values: dict[str, Any], tensors: dict[str, np.ndarray], source: Path, dtype: Any = None
) -> tuple[ModelConfig, trees.Params]:
    """The same, from the content of config.json and the tensors."""
    family = MODEL_TYPES[values["model_type"]]
    all_bfloat16 = all(x.dtype == ml_dtypes.bfloat16 for x in tensors.values())
    dtype = dtype_name(dtype) or ("bfloat16" if all_bfloat16 else "float32")
    cfg = family.translate(values, dtype)
    if hasattr(family, "arrange"):
        tensors = family.arrange(values, tensors)
    tied = bool(values.get("tie_word_embeddings"))
    return cfg, fill(family.TABLE, abstract_params(cfg), tensors, source, tied)


def convert(source: str | Path, target: str | Path, dtype: Any = None) -> ModelConfig:
    """Writes a Hugging Face folder as a model folder, one layer at a time in memory."""
    return write(target, *open_folder(source, dtype), Path(source).expanduser())


def write(target: str | Path, cfg: ModelConfig, params: trees.Params, beside: Path) -> ModelConfig:
    """Writes a model folder, with the tokenizer's files of the folder `beside`."""
    present = [file for name in TOKENIZER_FILES if (file := beside / name).is_file()]
    save_model(target, cfg, params, dtype=cfg.dtype, tokenizer_files=present)
    return cfg
