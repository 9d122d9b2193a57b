"""iLLaDA checkpoints as published (GSAI-ML/iLLaDA-8B-Base and -Instruct): settings and names.

LLaDA's successor under Llama's names: grouped heads, and a head tied to the embedding.

Source: `configuration_illada.py` and `modeling_illada.py` of those checkpoints.
"""

from __future__ import annotations

from typing import Any

from dials_jax.config import ModelConfig
from dials_jax.convert import llama_names
from dials_jax.convert.settings import (
    derive_head_dim,
    flag,
    integer,
    require_options,
)
from dials_jax.errors import require

TABLE = llama_names.TABLE

ARCHITECTURES = ("ILLaDAForCausalLM", "ILLaDAModel")

# The id of the published tokenizer's [MASK], which the configuration does not name.
ILLADA_MASK_ID = 5


def translate_config(values: dict[str, Any], dtype: str) -> ModelConfig:
    """Translates a published `config.json` into a `ModelConfig`.

    Raises: InputError for an option that is not implemented and for a missing number.
    """
    require_options(values, {"hidden_act": "silu"})
    eps = values.get("layer_norm_eps")
    require(
        eps is None,
        f"config.json: layer_norm_eps={eps!r} asks for layer norms; only rms_norm_eps is "
        "implemented",
    )
    bias, eos_id = flag(values, "attention_bias"), integer(values, "eos_token_id")
    return ModelConfig(
        model_type="illada",
        **llama_names.read_shape(values),
        head_dim=derive_head_dim(values, "hidden_size", "num_attention_heads"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(values, "mlp_bias"),
        mask_id=integer(values, "mask_token_id", ILLADA_MASK_ID),
        eos_id=eos_id,
        pad_id=integer(values, "pad_token_id", eos_id),
        dtype=dtype,
    )


def publish_config(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `translate_config`."""
    return {
        **llama_names.publish_shape(cfg),
        "attention_bias": cfg.qkv_bias,
        "mlp_bias": cfg.mlp_bias,
        "layer_norm_eps": None,
        "mask_token_id": cfg.mask_id,
        "eos_token_id": cfg.eos_id,
        "pad_token_id": cfg.pad_id,
    }
