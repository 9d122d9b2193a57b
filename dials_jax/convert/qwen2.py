"""Qwen2 and Qwen2.5 checkpoints as published: settings and names.

Source: `configuration_qwen2.py` and `modeling_qwen2.py` of transformers.
"""

from __future__ import annotations

from typing import Any

from dials_jax.config import ModelConfig
from dials_jax.convert import llama_names
from dials_jax.convert.settings import (
    derive_head_dim,
    integer,
    require_options,
    token_id,
)
from dials_jax.errors import require

TABLE = llama_names.TABLE  # only queries, keys and values have biases

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2Model")

REQUIRED = {"hidden_act": "silu", "use_sliding_window": False}


def translate_config(values: dict[str, Any], dtype: str) -> ModelConfig:
    """Translates a published `config.json` into a `ModelConfig`.

    Raises: InputError for an option that is not implemented and for a missing number.
    """
    require_options(values, REQUIRED)
    kinds = values.get("layer_types") or []
    require(
        isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds),
        f"config.json: layer_types={kinds!r} are not implemented; only 'full_attention' is",
    )
    head_dim = derive_head_dim(values, "hidden_size", "num_attention_heads")
    eos_id = token_id(values, "eos_token_id")
    return ModelConfig(
        model_type="qwen2",
        **llama_names.read_shape(values),
        head_dim=integer(values, "head_dim", head_dim),
        qkv_bias=True,
        causal=True,
        mask_id=token_id(values, "mask_token_id"),  # of one that was made to be continued with it
        eos_id=eos_id,
        # Padding is never attended to, so any id serves.
        pad_id=integer(values, "pad_token_id", eos_id or 0),
        dtype=dtype,
    )


def publish_config(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `translate_config`."""
    own_head_dim = cfg.head_dim * cfg.num_heads != cfg.d_model
    return {
        **llama_names.publish_shape(cfg),
        **({"head_dim": cfg.head_dim} if own_head_dim else {}),
        "use_sliding_window": False,
        "mask_token_id": cfg.mask_id,
        "eos_token_id": cfg.eos_id,
        "pad_token_id": cfg.pad_id,
    }
