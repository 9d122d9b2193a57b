"""Opens a Hugging Face folder as a `ModelConfig` and a tree of parameters.

To add a kind of model, write a module and list it in `MODEL_TYPES`. The module has

    ARCHITECTURES                       the classes that its config.json may name
    TABLE                               the names of its tensors and ours
    translate_config(values, dtype)     its config.json as a ModelConfig
    publish_config(cfg)                 the inverse: what its authors' code needs in config.json
    LAYOUT                              optional: how it stores the tensors of TABLE
    BUFFERS                             optional: a pattern of names of tensors that are no weights
    computed_tensors(cfg)               optional: such tensors that its authors' code has to find

`llada.py` is an example; `settings.py` reads numbers from a config.json.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from dials_jax import trees
from dials_jax.config import EightBits, ModelConfig
from dials_jax.convert import dream, fast_dllm, gpt2, illada, llada, mdlm, qwen2, sdar
from dials_jax.convert.safetensors_reader import open_tensors
from dials_jax.convert.settings import flag
from dials_jax.convert.table import TensorLayout, fill_params, is_buffer, strip_wrappers
from dials_jax.data.tokenizer import has_tokenizer, load_tokenizer
from dials_jax.errors import InputError, nearest, require
from dials_jax.files import CHAT_TEMPLATES, read_json
from dials_jax.models.folders import MODEL_FORMAT, dtype_name, load_model, save_model
from dials_jax.models.groups import abstract_params

MODEL_TYPES = {  # the `model_type` of config.json
    "llada": llada,
    "illada": illada,
    "Dream": dream,
    "sdar": sdar,
    "Fast_dLLM_Qwen": fast_dllm,
    "qwen2": qwen2,
    "mdlm": mdlm,
    "gpt2": gpt2,
}

# Only a mixture of experts has one of these options, or "moe" in its model type (LLaDA2, SDAR).
MOE_OPTIONS = ("num_experts", "num_local_experts", "n_routed_experts", "expert_intermediate_size")
# Diffusion models of today that work otherwise than those here, by how their model type begins.
OTHER_DIFFUSION = {
    "diffusion_gemma": "DiffusionGemma denoises random tokens, over Gemma's layers",
}
FLOAT_DTYPES = tuple(np.dtype(x) for x in (ml_dtypes.bfloat16, np.float32, np.float16))

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def open_hugging_face(source: str | Path, dtype: Any = None) -> tuple[ModelConfig, trees.Params]:
    """Opens a folder with config.json and safetensors.

    Args:
      dtype: of the configuration. None: bfloat16 if all tensors are bfloat16, otherwise float32,
        which holds every value exactly.

    Returns: the configuration, and the parameters, layers unrolled. These are views of the mapped
      files, in their own dtype; nothing is read yet.
    Raises: InputError for anything wrong with the folder.
    """
    source = Path(source).expanduser()
    require(source.is_dir(), f"{source} is not a folder; give a downloaded checkpoint")
    values = read_json(source / "config.json")
    require_known_model_type(values, source)
    return translate_checkpoint(values, open_tensors(source), source, dtype)


def require_known_model_type(values: dict[str, Any], source: Path) -> None:
    """Raises: InputError for a model type that is not in `MODEL_TYPES`, naming those that are."""
    require(
        values.get("format") != MODEL_FORMAT,
        f"{source} is a model folder of this library already; load it, or `dials export` it",
    )
    is_workdir = "model_type" not in values and (source / "model" / "config.json").is_file()
    require(
        not is_workdir,
        f"{source} is the folder of a training, whose model is of this library already; load it, "
        "or `dials export` it",
    )
    kind, found = values.get("model_type"), values.get("architectures")
    names = found if isinstance(found, list) else []
    names = [name for name in names if isinstance(name, str)]
    what = names[0] if names else f"model type {kind!r}"
    supported = f"is not supported; these are: {', '.join(MODEL_TYPES)}"
    for beginning, difference in OTHER_DIFFUSION.items():
        other = isinstance(kind, str) and kind.lower().startswith(beginning)
        require(not other, f"{source}: model type {kind!r} {supported} ({difference})")
    experts = any(values.get(option) for option in MOE_OPTIONS)
    require(
        not experts and "moe" not in str(kind).lower(),
        f"{source}: a mixture of experts ({what}) {supported}",
    )
    require(
        not values.get("quantization_config"),
        f"{source}: quantised weights are not supported; take the checkpoint in BF16 or F32",
    )
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        ours = {name for family in MODEL_TYPES.values() for name in family.ARCHITECTURES}
        other = {*names} - ours  # published under that type, so not a misspelt name
        hint = (
            f"; these are: {', '.join(MODEL_TYPES)}" if other else nearest(str(kind), MODEL_TYPES)
        )
        named = f" ({what})" if names else ""
        raise InputError(f"{source}: model type {kind!r}{named} is not supported{hint}")
    known = MODEL_TYPES[kind].ARCHITECTURES
    require(
        not names or bool({*names} & {*known}),
        f"{source}: {what} is not supported; of model type {kind!r} only {' or '.join(known)} is",
    )


def translate_checkpoint(
    values: dict[str, Any], tensors: dict[str, np.ndarray], source: Path, dtype: Any = None
) -> tuple[ModelConfig, trees.Params]:
    """As `open_hugging_face`, from the content of config.json and the tensors.

    Args:
      source: where they come from, for messages.
    """
    family = MODEL_TYPES[values["model_type"]]
    own_buffers, layout = getattr(family, "BUFFERS", ""), layout_of(family)
    tensors = strip_wrappers(tensors, source)
    tensors = {name: x for name, x in tensors.items() if not is_buffer(name, own_buffers)}
    for name, x in tensors.items():
        require(
            x.dtype in FLOAT_DTYPES,
            f"{source}: {name!r} is {x.dtype}; weights must be {', '.join(map(str, FLOAT_DTYPES))}",
        )
    all_bfloat16 = all(x.dtype == ml_dtypes.bfloat16 for x in tensors.values())
    dtype = dtype_name(dtype) or ("bfloat16" if all_bfloat16 else "float32")
    try:
        cfg = family.translate_config(values, dtype)
        tied = flag(values, "tie_word_embeddings", layout.tied)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return cfg, fill_params(family.TABLE, abstract_params(cfg), tensors, source, tied, layout)


def layout_of(family: ModuleType) -> TensorLayout:
    return getattr(family, "LAYOUT", TensorLayout())


def convert_folder(
    source: str | Path, target: str | Path, dtype: Any = None, weights: EightBits | None = None
) -> ModelConfig:
    """Converts a Hugging Face folder to a model folder, with one layer at a time in memory.

    Args:
      weights: to be stored in 8 bits: see `save_model`.
    """
    opened = open_hugging_face(source, dtype)
    return write_model_folder(target, *opened, Path(source).expanduser(), weights)


def quantise_folder(
    source: Path, target: str | Path, dtype: Any, weights: EightBits
) -> ModelConfig:
    """Writes a model folder of this library again, with weights in 8 bits.

    Raises: InputError if they are so already.
    """
    model = load_model(source, dtype, layout="stacked")
    files = tokenizer_paths(source).values()
    save_model(target, model.config, model.params, weights=weights, tokenizer_files=files)
    return model.config


def write_model_folder(
    target: str | Path,
    cfg: ModelConfig,
    params: trees.Params,
    beside: Path,
    weights: EightBits | None = None,
) -> ModelConfig:
    """Writes a model folder, and into it the files of the tokenizer in the folder `beside`."""
    with tempfile.TemporaryDirectory() as temporary:
        files = collect_tokenizer_files(beside, Path(temporary))
        save_model(target, cfg, params, dtype=cfg.dtype, weights=weights, tokenizer_files=files)
    return cfg


def tokenizer_paths(source: Path) -> dict[str, Path]:
    """The files of a folder that say what its tokenizer is, by their names in it."""
    named = {name: source / name for name in TOKENIZER_FILES}
    templates = sorted((source / CHAT_TEMPLATES).glob("*.jinja"))
    named |= {f"{CHAT_TEMPLATES}/{file.name}": file for file in templates}
    return {name: file for name, file in named.items() if file.is_file()}


def collect_tokenizer_files(source: Path, temporary: Path) -> list[Path]:
    """Returns the tokenizer's files to copy into a model folder.

    A published folder's tokenizer may depend on its config.json, which the model folder replaces.
    If the copied files would not give the same tokenizer, a tokenizer.json is written into the
    folder `temporary` and returned with them. Links are followed, since Hugging Face's cache
    consists of them; a warning names any other link that leads out of the folder.
    """
    files = tokenizer_paths(source)
    root = source.resolve()
    for file in files.values():
        target = file.resolve()
        if not any(map(target.is_relative_to, (root, root.parent.parent / "blobs"))):
            warnings.warn(f"{file} is a link; {target} is copied", stacklevel=3)
    if not has_tokenizer(source):
        return list(files.values())
    try:
        tokenizer, complete = load_tokenizer(source), files.get("tokenizer.json")
        if not complete or load_tokenizer(complete).fingerprint != tokenizer.fingerprint:
            tokenizer.save(temporary)
            files["tokenizer.json"] = temporary / "tokenizer.json"
    except (ImportError, InputError) as error:
        warnings.warn(f"the tokenizer's files are copied as they are: {error}", stacklevel=3)
    return list(files.values())
