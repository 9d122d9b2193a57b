"""Opens a checkpoint of the MDLM authors' training code: a PyTorch Lightning `.ckpt`.

Such a file is a pickle, which is read only if the user allows it, by torch with
`weights_only=True`: no code of the file is run. It also holds the settings and the tokenizer, as
objects of classes that are not needed here; objects of `Ignored` replace them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from dials_jax import trees
from dials_jax.config import ModelConfig
from dials_jax.convert import mdlm
from dials_jax.convert.hugging_face import translate_checkpoint
from dials_jax.convert.table import is_buffer, strip_wrappers
from dials_jax.errors import InputError, require, require_packages
from dials_jax.files import read_json

SUFFIX = ".ckpt"
PREFIX = "backbone."  # of the denoiser's tensors; a noise schedule with weights is not supported
PUBLISHED_LENGTH = 1024
# Settings of the authors' code that change the model but no tensor, and the value implemented here.
REQUIRED = {"parameterization": "subs", "backbone": "dit", "diffusion": "absorbing_state"}


class Ignored:
    """Replaces an object of any class in the file: keeps its state and runs no code."""

    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def open_lightning(
    source: str | Path,
    dtype: Any = None,
    *,
    allow_pickle: bool = False,
    ema: bool = True,
    mask_id: int | None = None,
    eos_id: int | None = None,
) -> tuple[ModelConfig, trees.Params]:
    """Reads the configuration and the parameters of a checkpoint, layers unrolled.

    Sizes come from the tensors. The length, and whether the model is conditioned on time, come from
    a `config.json` beside the file, else from the settings saved in it, else from the published
    model: 1024, and no. Special tokens are those of the tokenizer that the settings name.

    Args:
      dtype: of the configuration; None: float32.
      allow_pickle: the user's consent to read a pickle.
      ema: take the averaged weights, which the authors evaluate, and not those of the last step.
      mask_id: the id of [MASK], if the tokenizer is unknown.
      eos_id: the id of the end of text, likewise; also used for padding.

    Raises: InputError without consent or PyTorch, if the file is not such a checkpoint, if it was
      trained as another kind of model, and for an unknown tokenizer without `mask_id`.
    """
    path = Path(source).expanduser()
    require(path.is_file(), f"{path} is missing; give a Lightning checkpoint")
    require(
        allow_pickle,
        f"{path} is a pickle; if you trust where it comes from, add --allow-pickle",
    )
    require((mask_id is None) == (eos_id is None), "--mask-id and --eos-id go together; give both")
    content = _read_pickle(path)
    state = content.get("state_dict")
    require(isinstance(state, dict), f"{path} has no state_dict; give a Lightning checkpoint")
    saved = _saved_settings(content)
    _require_mdlm(path, saved)
    named = {name: x for name, x in state.items() if _is_named_tensor(name, x)}
    state = strip_wrappers(named, path)
    tensors = {k.removeprefix(PREFIX): x for k, x in state.items() if k.startswith(PREFIX)}
    require(bool(tensors), f"{path}: no tensor of its state_dict starts with {PREFIX!r} (MDLM)")
    if ema:
        tensors |= _averaged_weights(path, content, tensors)
    arrays = {name: _to_array(path, name, x) for name, x in tensors.items() if _is_read(name, x)}
    values = _config_values(path, saved, arrays)
    if mask_id is not None:
        given = {"mask_token_id": mask_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    else:
        given = _special_tokens(path, saved, values)
    return translate_checkpoint(values | given, arrays, path, dtype)


def _read_pickle(path: Path) -> dict[str, Any]:
    require_packages("torch", "torch")
    import torch

    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Ignored, name) for name in others]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} cannot be read as weights only ({reason})") from error
    require(isinstance(content, dict), f"{path} holds no dictionary; give a Lightning checkpoint")
    return content


def _is_named_tensor(name: Any, x: Any) -> bool:
    return isinstance(name, str) and hasattr(x, "detach")


def _is_read(name: str, x: Any) -> bool:
    """False for buffers of integers. Rotary angles are read: they tell the number of heads."""
    return x.is_floating_point() or not is_buffer(name)


def _to_array(path: Path, name: str, x: Any) -> np.ndarray:
    dense = str(x.layout) == "torch.strided" and x.device.type == "cpu"
    require(
        dense and x.is_floating_point(),
        f"{path}: {PREFIX + name!r} is of {x.dtype} ({x.layout}, {x.device}); weights must be "
        "dense and real",
    )
    return x.detach().float().numpy()


def _averaged_weights(path: Path, content: dict, tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns the averages by name; they are saved without names, in the order of the parameters.

    Raises: InputError if there are none, or if they are not in that order.
    """
    average = content.get("ema")
    shadow = average.get("shadow_params") if isinstance(average, dict) else None
    require(
        isinstance(shadow, list) and all(hasattr(x, "detach") for x in shadow),
        f"{path} holds no averaged weights; add --no-ema for the last step's",
    )
    names = [name for name in tensors if not is_buffer(name)]
    require(
        [x.shape for x in shadow] == [tensors[name].shape for name in names],
        f"{path}: its {len(shadow)} averaged weights are not in the order of its {len(names)} "
        "parameters; add --no-ema for the last step's weights",
    )
    return dict(zip(names, shadow, strict=True))


def _saved_settings(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of the training, with those of its algorithm; {} if there are none."""
    saved = _plain_values(content.get("hyper_parameters"))
    saved = saved.get("config", saved) if isinstance(saved, dict) else {}
    saved = saved if isinstance(saved, dict) else {}
    return saved | _section(saved, "algo")  # where newer code of the authors has them


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _require_mdlm(path: Path, saved: dict[str, Any]) -> None:
    """Raises: InputError for a model that uses the same tensors differently."""
    wanted = REQUIRED | ({"name": "mdlm"} if "algo" in saved else {})
    for name, only in wanted.items():
        given = saved.get(name, only)
        require(
            given == only,
            f"{path} was trained with {name}={given!r}, which is not supported; only {only!r} "
            "(MDLM) is",
        )
    noise = _section(saved, "noise").get("type", "loglinear")
    require(
        noise == "loglinear" or not saved.get("time_conditioning"),
        f"{path} is conditioned on the time of noise {noise!r}, which is not supported; only "
        "'loglinear' is",
    )


def _config_values(
    path: Path, saved: dict[str, Any], arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Returns what the `config.json` of a published folder would hold."""
    beside = path.with_name("config.json")
    if beside.is_file():
        return read_json(beside) | {"model_type": "mdlm"}
    needed = ("vocab_embed.embedding", "sigma_map.mlp.2.bias")
    for name in needed:
        require(name in arrays, f"{path} lacks tensor {PREFIX + name!r}; give an MDLM checkpoint")
    table, cond = (arrays[name] for name in needed)
    require(
        table.ndim == 2 and cond.ndim == 1,
        f"{path}: {PREFIX}{needed[0]} has shape {table.shape}, {needed[1]} {cond.shape}; "
        "give an MDLM checkpoint",
    )
    blocks = {m[1] for name in arrays if (m := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "model_type": "mdlm",
        "vocab_size": table.shape[0],
        "hidden_dim": table.shape[1],
        "cond_dim": cond.shape[0],
        "n_blocks": len(blocks),
        "n_heads": _num_heads(path, saved, arrays, table.shape[1]),
        "model_length": _section(saved, "model").get("length", PUBLISHED_LENGTH),
        "time_conditioning": saved.get("time_conditioning", False),
    }


def _num_heads(path: Path, saved: dict, arrays: dict[str, np.ndarray], width: int) -> int:
    """Finds the number of heads, by the rotary angles (one per two units of a head) or settings."""
    angles = arrays.get("rotary_emb.inv_freq")
    if angles is not None and angles.size:
        return width // (2 * angles.size)
    num_heads = _section(saved, "model").get("n_heads")
    require(
        num_heads is not None,
        f"{path} holds neither {PREFIX}rotary_emb.inv_freq nor settings, which tell the number of "
        "heads; put the model's config.json beside it",
    )
    return num_heads


def _special_tokens(path: Path, saved: dict, values: dict[str, Any]) -> dict[str, int]:
    """Returns the special ids of the training's tokenizer; {} if `translate_config` finds them.

    Raises: InputError for an unknown tokenizer.
    """
    if values.get("mask_token_id") is not None:
        return {}
    vocab_size = values.get("vocab_size")
    named = _section(saved, "data").get("tokenizer_name_or_path")
    name = str(named).rstrip("/").rpartition("/")[2]
    known = mdlm.KNOWN_TOKENIZERS.get(name)
    if known and known.vocab_size == vocab_size:
        ids = known._asdict()
        return {f"{key.removesuffix('_id')}_token_id": ids[key] for key in ids if "_id" in key}
    like = mdlm.tokenizer_of_size(vocab_size)
    require(
        name in mdlm.LAST_ID_IS_MASK or (named is None and like is None),
        f"{path}: the special tokens of {named or like!r} with {vocab_size} tokens are not known; "
        "add their ids by --mask-id and --eos-id",
    )
    return {}


def _plain_values(settings: Any) -> Any:
    """Turns the authors' settings, nested containers of OmegaConf, into plain values."""
    if isinstance(settings, Ignored) and isinstance(settings.state, dict):
        settings = settings.state.get("_content", settings.state.get("_val", settings))
    if isinstance(settings, dict):
        return {name: _plain_values(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [_plain_values(value) for value in settings]
    known = settings is None or isinstance(settings, str | int | float)
    return settings if known else f"<{type(settings).__name__}>"
