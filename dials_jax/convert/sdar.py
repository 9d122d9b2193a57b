"""SDAR checkpoints as published (JetLM/SDAR-1.7B to -8B, the dense sizes): settings and names.

Qwen3's body under a block-causal mask. `BlockDiffusion` generates by it.

Source: `configuration_sdar.py` and `modeling_sdar.py` of those checkpoints.
"""

from __future__ import annotations

from typing import Any

from dials_jax.config import ModelConfig
from dials_jax.convert import llama_names
from dials_jax.convert.settings import flag, integer, require_options
from dials_jax.convert.table import TensorEntry

_BLOCK = "model.layers.{i}"

TABLE = (
    *llama_names.TABLE,
    TensorEntry(f"{_BLOCK}.self_attn.q_norm.weight", "layers/attention/q_norm/scale"),
    TensorEntry(f"{_BLOCK}.self_attn.k_norm.weight", "layers/attention/k_norm/scale"),
)

ARCHITECTURES = ("SDARForCausalLM", "SDARModel")

REQUIRED = {"hidden_act": "silu", "use_sliding_window": False}

# Of the authors' training; their class has no defaults for what it may read of it.
_PUBLISHED = {
    "attn_implementation": "flex_attention",
    "debug": False,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "micro_forward": False,
    "skip_checkpoint": False,
    "use_deepep": False,
}


def translate_config(values: dict[str, Any], dtype: str) -> ModelConfig:
    """Translates a published `config.json` into a `ModelConfig`.

    Raises: InputError for an option that is not implemented and for a missing number, such as
      `block_size` and `mask_token_id` in the oldest configurations.
    """
    require_options(values, REQUIRED)
    bias, eos_id = flag(values, "attention_bias"), integer(values, "eos_token_id")
    return ModelConfig(
        model_type="sdar",
        **llama_names.read_shape(values),
        head_dim=integer(values, "head_dim"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        block_length=integer(values, "block_size"),
        mask_id=integer(values, "mask_token_id"),
        eos_id=eos_id,
        pad_id=integer(values, "pad_token_id", eos_id),
        dtype=dtype,
    )


def publish_config(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `translate_config`."""
    return {
        **_PUBLISHED,
        **llama_names.publish_shape(cfg),
        "head_dim": cfg.head_dim,
        "attention_bias": cfg.qkv_bias,
        "use_sliding_window": False,
        "block_size": cfg.block_length,
        "mask_token_id": cfg.mask_id,
        "eos_token_id": cfg.eos_id,
        "pad_token_id": cfg.pad_id,
    }
