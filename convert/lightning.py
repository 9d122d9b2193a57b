"""Opens a checkpoint that MDLM's own training left: a PyTorch Lightning `.ckpt`.

Such a file is a pickle. torch reads it with `weights_only=True`, which runs no code from it, and
only if the user allows a pickle at all. Beside weights it holds the settings and the tokenizer as
objects of classes that nobody needs here; plain ones take their place.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from convert.hugging_face import from_tensors
from convert.mdlm import BUFFERS
from dials_jax import trees
from dials_jax.config import InputError, ModelConfig, read_json, require

SUFFIX = ".ckpt"
PREFIX = "backbone."  # of the denoiser's tensors; a noise schedule with weights is not supported
PUBLISHED_LENGTH = 1024


class Ignored:
    """Stands for an object of any other class: keeps the state it would have, and runs nothing."""

    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def open_checkpoint(
    source: str | Path, dtype: Any = None, *, allow_pickle: bool = False, ema: bool = True
) -> tuple[ModelConfig, trees.Params]:
    """The configuration and the parameters of a checkpoint, layers unrolled.

    Sizes are read off the tensors. The length and whether the time matters come from a
    `config.json` beside the file, else from the settings saved in it, else they are the published
    model's: 1024, and no.

    Args:
      allow_pickle: the user's consent to read a pickle.
      ema: take the averaged weights, which the authors evaluate, not the last step's.

    Raises: InputError without consent or PyTorch, or if the file is not such a checkpoint.
    """
    path = Path(source).expanduser()
    require(path.is_file(), f"{path} is missing; give a Lightning checkpoint")
    require(
        allow_pickle,
        f"{path} is a pickle; if you trust where it comes from, add --allow-pickle",
    )
    content = _read(path)
    state = content.get("state_dict")
    require(isinstance(state, dict), f"{path} has no state_dict; give a Lightning checkpoint")
    tensors = {k.removeprefix(PREFIX): x for k, x in state.items() if k.startswith(PREFIX)}
    require(bool(tensors), f"{path}: no tensor of its state_dict starts with {PREFIX!r} (MDLM)")
    if ema:
        tensors |= _averaged(path, content, tensors)
    arrays = {name: x.float().numpy() for name, x in tensors.items()}
    values = _settings(path, content, arrays)
    return from_tensors(values, arrays, path, dtype)


def _read(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise InputError("reading a .ckpt needs PyTorch: pip install torch") from error
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Ignored, name) for name in others]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the pickle holds
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} cannot be read as weights only ({reason})") from error
    require(isinstance(content, dict), f"{path} holds no dictionary; give a Lightning checkpoint")
    return content


def _averaged(path: Path, content: dict, tensors: dict[str, Any]) -> dict[str, Any]:
    """The averages, which are saved as a list in the order of the parameters, without names."""
    shadow = (content.get("ema") or {}).get("shadow_params")
    require(bool(shadow), f"{path} holds no averaged weights; add --no-ema for the last step's")
    names = [name for name in tensors if name not in BUFFERS]
    require(
        [x.shape for x in shadow] == [tensors[name].shape for name in names],
        f"{path}: its {len(shadow)} averaged weights are not in the order of its {len(names)} "
        "parameters; add --no-ema for the last step's weights",
    )
    return dict(zip(names, shadow, strict=True))


def _settings(path: Path, content: dict, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the `config.json` of a published folder says."""
    beside = path.with_name("config.json")
    if beside.is_file():
        return read_json(beside) | {"model_type": "mdlm"}
    needed = ("vocab_embed.embedding", "sigma_map.mlp.2.bias", "rotary_emb.inv_freq")
    for name in needed:
        require(name in arrays, f"{path} lacks tensor {PREFIX + name!r}; give an MDLM checkpoint")
    table, cond, angles = (arrays[name] for name in needed)
    saved = _plain(content.get("hyper_parameters"))
    saved = saved.get("config", saved) if isinstance(saved, dict) else {}
    saved = saved if isinstance(saved, dict) else {}
    blocks = {m[1] for name in arrays if (m := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "model_type": "mdlm",
        "vocab_size": table.shape[0],
        "hidden_dim": table.shape[1],
        "cond_dim": cond.shape[0],
        "n_blocks": len(blocks),
        "n_heads": table.shape[1] // (2 * angles.shape[0]),
        "model_length": (saved.get("model") or {}).get("length", PUBLISHED_LENGTH),
        "time_conditioning": bool(saved.get("time_conditioning", False)),
    }


def _plain(settings: Any) -> Any:
    """Settings as dictionaries: the authors' are kept in nested containers of OmegaConf."""
    if isinstance(settings, Ignored) and isinstance(settings.state, dict):
        settings = settings.state.get("_content", settings.state.get("_val", settings))
    if isinstance(settings, dict):
        return {name: _plain(value) for name, value in settings.items()}
    return settings
