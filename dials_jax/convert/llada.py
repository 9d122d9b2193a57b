"""LLaDA checkpoints as published (GSAI-ML/LLaDA-8B-Base and -Instruct): settings and names.

Source: `configuration_llada.py` and `modeling_llada.py` of those checkpoints.
"""

from __future__ import annotations

from typing import Any

from dials_jax.config import ModelConfig
from dials_jax.convert.settings import (
    derive_head_dim,
    flag,
    integer,
    integers,
    number,
    require_options,
    stated,
    token_id,
)
from dials_jax.convert.table import TensorEntry

_BLOCK = "model.transformer.blocks.{i}"

# In a block `ff_proj` is the gate of SwiGLU and `ff_out` its down projection; outside, `ff_out` is
# the head. The entries of biases are used only if the configuration asks for biases.
TABLE = (
    TensorEntry("model.transformer.wte.weight", "embed/table"),
    TensorEntry(f"{_BLOCK}.attn_norm.weight", "layers/attention_norm/scale"),
    TensorEntry(f"{_BLOCK}.q_proj.weight", "layers/attention/q", 1),
    TensorEntry(f"{_BLOCK}.k_proj.weight", "layers/attention/k", 1),
    TensorEntry(f"{_BLOCK}.v_proj.weight", "layers/attention/v", 1),
    TensorEntry(f"{_BLOCK}.attn_out.weight", "layers/attention/o", 2),
    TensorEntry(f"{_BLOCK}.q_proj.bias", "layers/attention/q_bias", 0),
    TensorEntry(f"{_BLOCK}.k_proj.bias", "layers/attention/k_bias", 0),
    TensorEntry(f"{_BLOCK}.v_proj.bias", "layers/attention/v_bias", 0),
    TensorEntry(f"{_BLOCK}.attn_out.bias", "layers/attention/o_bias", 0),
    TensorEntry(f"{_BLOCK}.ff_norm.weight", "layers/mlp_norm/scale"),
    TensorEntry(f"{_BLOCK}.ff_proj.weight", "layers/mlp/gate", 1),
    TensorEntry(f"{_BLOCK}.up_proj.weight", "layers/mlp/up", 1),
    TensorEntry(f"{_BLOCK}.ff_out.weight", "layers/mlp/down", 1),
    TensorEntry(f"{_BLOCK}.ff_proj.bias", "layers/mlp/gate_bias", 0),
    TensorEntry(f"{_BLOCK}.up_proj.bias", "layers/mlp/up_bias", 0),
    TensorEntry(f"{_BLOCK}.ff_out.bias", "layers/mlp/down_bias", 0),
    TensorEntry("model.transformer.ln_f.weight", "final_norm/scale"),
    TensorEntry("model.transformer.ff_out.weight", "head/kernel", 1),
    TensorEntry("model.transformer.ff_out.bias", "head/bias", 0),
)

ARCHITECTURES = ("LLaDAModelLM",)  # other classes with this model type are other models

# Options that change what the model computes, and the only value implemented. null counts as false.
REQUIRED = {
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "clip_qkv": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "weight_tying": False,
}

# What the authors' code has to be told besides: its defaults are those of another model.
_PUBLISHED = {
    **REQUIRED,
    "clip_qkv": None,
    "rope_full_precision": True,
    "block_group_size": 1,
    "layer_norm_with_affine": True,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "multi_query_attention": None,
    "init_device": "cpu",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "mlp_ratio": 4,
    "precision": "amp_bf16",
    "use_cache": False,
}
_SIZES = {  # fields of `ModelConfig` and the options that state them
    "d_model": "d_model",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "d_ff": "mlp_hidden_size",
    "max_length": "max_sequence_length",
}

# The published tokenizer's [MASK] and end-of-turn token; the configuration names only the first.
LLADA_MASK_ID, LLADA_EOT_ID = 126336, 126348


def translate_config(values: dict[str, Any], dtype: str) -> ModelConfig:
    """Translates a published `config.json` into a `ModelConfig`.

    Raises: InputError for an option that is not implemented and for a missing number.
    """
    require_options(values, REQUIRED)
    sizes, head_dim = integers(values, _SIZES), derive_head_dim(values, "d_model", "n_heads")
    vocab_size = integer(values, "embedding_size", values.get("vocab_size"))
    mask_id, eos_id = integer(values, "mask_token_id"), integer(values, "eos_token_id")
    num_kv_heads = 1 if flag(values, "multi_query_attention") else sizes["num_heads"]
    bias = flag(values, "include_bias")
    has_eot = mask_id == LLADA_MASK_ID and vocab_size > LLADA_EOT_ID
    return ModelConfig(
        model_type="llada",
        vocab_size=vocab_size,
        **sizes,
        num_kv_heads=integer(values, "n_kv_heads", num_kv_heads),
        head_dim=head_dim,
        rope_theta=number(values, "rope_theta"),
        norm_eps=number(values, "rms_norm_eps"),
        qkv_bias=flag(values, "include_qkv_bias") or bias,
        o_bias=bias,
        mlp_bias=bias,
        head_bias=bias,
        mask_id=mask_id,
        eos_id=eos_id,
        pad_id=integer(values, "pad_token_id", eos_id),
        eot_id=token_id(values, "eot_token_id", LLADA_EOT_ID if has_eot else None),
        dtype=dtype,
    )


def publish_config(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `translate_config`.

    The authors' configuration has no `eot_token_id`, and keeps it.
    """
    return {
        **_PUBLISHED,
        **stated(cfg, _SIZES),
        "vocab_size": cfg.vocab_size,
        "embedding_size": cfg.vocab_size,
        "n_kv_heads": cfg.num_kv_heads,
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.norm_eps,
        "include_bias": cfg.o_bias,
        "include_qkv_bias": cfg.qkv_bias,
        "mask_token_id": cfg.mask_id,
        "eos_token_id": cfg.eos_id,
        "pad_token_id": cfg.pad_id,
        "eot_token_id": cfg.eot_id,
    }
