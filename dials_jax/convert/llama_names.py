"""What the published models with Llama's names share: tensors, and most of `config.json`."""

from __future__ import annotations

from typing import Any

from dials_jax.config import ModelConfig
from dials_jax.convert.settings import integers, number, section, stated
from dials_jax.convert.table import TensorEntry
from dials_jax.errors import require

_BLOCK = "model.layers.{i}"

# The entries of biases are used only if the configuration asks for biases.
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
    TensorEntry(f"{_BLOCK}.self_attn.o_proj.bias", "layers/attention/o_bias", 0),
    TensorEntry(f"{_BLOCK}.post_attention_layernorm.weight", "layers/mlp_norm/scale"),
    TensorEntry(f"{_BLOCK}.mlp.gate_proj.weight", "layers/mlp/gate", 1),
    TensorEntry(f"{_BLOCK}.mlp.up_proj.weight", "layers/mlp/up", 1),
    TensorEntry(f"{_BLOCK}.mlp.down_proj.weight", "layers/mlp/down", 1),
    TensorEntry(f"{_BLOCK}.mlp.gate_proj.bias", "layers/mlp/gate_bias", 0),
    TensorEntry(f"{_BLOCK}.mlp.up_proj.bias", "layers/mlp/up_bias", 0),
    TensorEntry(f"{_BLOCK}.mlp.down_proj.bias", "layers/mlp/down_bias", 0),
    TensorEntry("model.norm.weight", "final_norm/scale"),
    TensorEntry("lm_head.weight", "head/kernel", 1, tied="model.embed_tokens.weight"),
)


_SIZES = {  # fields of `ModelConfig` and the options that state them
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "max_length": "max_position_embeddings",
}


def read_shape(values: dict[str, Any]) -> dict[str, Any]:
    """Reads the fields of `ModelConfig` that all configurations with these names state alike."""
    return {
        **integers(values, _SIZES),
        "rope_theta": rope_theta(values),
        "norm_eps": number(values, "rms_norm_eps"),
    }


def publish_shape(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_shape`."""
    return {
        **stated(cfg, _SIZES),
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }


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
