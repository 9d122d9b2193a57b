"""Qwen2 and Qwen2.5 checkpoints as published: settings and names.

Source: `configuration_qwen2.py` and `modeling_qwen2.py` of transformers.
"""

from __future__ import annotations

from typing import Any

from dials_jax.config import ModelConfig
from dials_jax.convert.settings import (
    derive_head_dim,
    integer,
    number,
    require_options,
    section,
    token_id,
)
from dials_jax.convert.table import TensorEntry
from dials_jax.errors import require

_BLOCK = "model.layers.{i}"

# Only the projections of queries, keys and values have biases.
TABLE = (
    TensorEntry("model.embed_tokens.weight", "embed/table"),
    TensorEntry(f"{_BLOCK}.input_layernorm.weight", "layers/attention_norm/scale"),
    TensorEntry(f"{_BLOCK}.self_attn.q_proj.weight", "layers/attention/q", 1),
    TensorEntry(f"{_BLOCK}.self_attn.k_proj.weight", "layers/attention/k", 1),
    TensorEntry(f"{_BLOCK}.self_attn.v_proj.weight", "layers/attention/v", 1),
    TensorEntry(f"{_BLOCK}.self_attn.o_proj.weight", "layers/attention/o", 2),
    TensorEntry(f"{_BLOCK}.self_attn.q_proj.bias", "layers/attention/q_bias", 0),
    TensorEntry(f"{_BLOCK}.self_attn.k_proj.bias", "layers/attention/k_bias", 0),
    TensorEntry(f"{_BLOCK}.self_attn.v_proj.bias", "layers/attention/v_bias", 0),
    TensorEntry(f"{_BLOCK}.post_attention_layernorm.weight", "layers/mlp_norm/scale"),
    TensorEntry(f"{_BLOCK}.mlp.gate_proj.weight", "layers/mlp/gate", 1),
    TensorEntry(f"{_BLOCK}.mlp.up_proj.weight", "layers/mlp/up", 1),
    TensorEntry(f"{_BLOCK}.mlp.down_proj.weight", "layers/mlp/down", 1),
    TensorEntry("model.norm.weight", "final_norm/scale"),
    TensorEntry("lm_head.weight", "head/kernel", 1, tied="model.embed_tokens.weight"),
)

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
        vocab_size=integer(values, "vocab_size"),
        d_model=integer(values, "hidden_size"),
        num_layers=integer(values, "num_hidden_layers"),
        num_heads=integer(values, "num_attention_heads"),
        num_kv_heads=integer(values, "num_key_value_heads"),
        head_dim=integer(values, "head_dim", head_dim),
        d_ff=integer(values, "intermediate_size"),
        max_length=integer(values, "max_position_embeddings"),
        rope_theta=rope_theta(values),
        norm_eps=number(values, "rms_norm_eps"),
        qkv_bias=True,
        causal=True,
        mask_id=None,
        eos_id=eos_id,
        # Padding is never attended to, so any id serves.
        pad_id=integer(values, "pad_token_id", eos_id or 0),
        dtype=dtype,
    )


def rope_theta(values: dict[str, Any]) -> float:
    """Reads the base of the rotary angles, which transformers 5 moved into `rope_parameters`.

    Raises: InputError for scaled angles, which are not implemented.
    """
    rope = section(values, "rope_parameters")
    for options in (rope, section(values, "rope_scaling")):
        kind = options.get("rope_type", options.get("type", "default"))
        require(
            kind == "default",
            f"config.json: rope_type={kind!r} is not implemented; only 'default' is",
        )
    return number(rope if "rope_theta" in rope else values, "rope_theta")
