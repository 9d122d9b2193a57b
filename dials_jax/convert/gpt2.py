"""GPT-2 checkpoints as published (openai-community/gpt2 to gpt2-xl): settings and names.

Source: `configuration_gpt2.py` and `modeling_gpt2.py` of transformers.
"""

from __future__ import annotations

from typing import Any

from dials_jax.config import ModelConfig
from dials_jax.convert.settings import (
    derive_head_dim,
    integer,
    number,
    require_options,
    token_id,
)
from dials_jax.convert.table import TensorEntry, TensorLayout
from dials_jax.models import families

_BLOCK = "transformer.h.{i}"

TABLE = (
    TensorEntry("transformer.wte.weight", "embed/table"),
    TensorEntry("transformer.wpe.weight", "embed/positions"),
    TensorEntry(f"{_BLOCK}.ln_1.weight", "layers/attention_norm/scale"),
    TensorEntry(f"{_BLOCK}.ln_1.bias", "layers/attention_norm/bias"),
    TensorEntry(f"{_BLOCK}.attn.c_attn.q.weight", "layers/attention/q", 1),
    TensorEntry(f"{_BLOCK}.attn.c_attn.k.weight", "layers/attention/k", 1),
    TensorEntry(f"{_BLOCK}.attn.c_attn.v.weight", "layers/attention/v", 1),
    TensorEntry(f"{_BLOCK}.attn.c_attn.q.bias", "layers/attention/q_bias", 0),
    TensorEntry(f"{_BLOCK}.attn.c_attn.k.bias", "layers/attention/k_bias", 0),
    TensorEntry(f"{_BLOCK}.attn.c_attn.v.bias", "layers/attention/v_bias", 0),
    TensorEntry(f"{_BLOCK}.attn.c_proj.weight", "layers/attention/o", 2),
    TensorEntry(f"{_BLOCK}.attn.c_proj.bias", "layers/attention/o_bias", 0),
    TensorEntry(f"{_BLOCK}.ln_2.weight", "layers/mlp_norm/scale"),
    TensorEntry(f"{_BLOCK}.ln_2.bias", "layers/mlp_norm/bias"),
    TensorEntry(f"{_BLOCK}.mlp.c_fc.weight", "layers/mlp/up", 1),
    TensorEntry(f"{_BLOCK}.mlp.c_fc.bias", "layers/mlp/up_bias", 0),
    TensorEntry(f"{_BLOCK}.mlp.c_proj.weight", "layers/mlp/down", 1),
    TensorEntry(f"{_BLOCK}.mlp.c_proj.bias", "layers/mlp/down_bias", 0),
    TensorEntry("transformer.ln_f.weight", "final_norm/scale"),
    TensorEntry("transformer.ln_f.bias", "final_norm/bias"),
    TensorEntry("lm_head.weight", "head/kernel", 1, tied="transformer.wte.weight"),
)

ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")

DEFAULTS = {"activation_function": "gelu_new", "scale_attn_weights": True}
REQUIRED = {
    **DEFAULTS,
    "add_cross_attention": False,
    "scale_attn_by_inverse_layer_idx": False,
}

LAYOUT = TensorLayout(
    prefix="transformer.",
    joined=r"(transformer\.)?h\.\d+\.attn\.c_attn",
    transposed=r"(transformer\.)?h\.\d+\.(attn|mlp)\.c_\w+\.weight",
    tied=True,
)
# The causal mask, in files of transformers before version 5.
BUFFERS = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"


def translate_config(values: dict[str, Any], dtype: str) -> ModelConfig:
    """Translates a published `config.json` into a `ModelConfig`.

    Raises: InputError for an option that is not implemented and for a missing number.
    """
    require_options(DEFAULTS | values, REQUIRED)
    vocab_size, d_model = integer(values, "vocab_size"), integer(values, "n_embd")
    eos_id = token_id(values, "eos_token_id")
    # transformers writes its default id, even for a vocabulary without it.
    if eos_id is not None and eos_id >= vocab_size:
        eos_id = None
    # Padding is never attended to, so any id serves.
    pad_id = integer(values, "pad_token_id", eos_id or 0)
    return families.gpt2_small(
        integer(values, "n_layer"),
        d_model,
        vocab_size,
        eos_id,
        pad_id,
        token_id(values, "mask_token_id"),  # of one that was made to be continued with it
        head_dim=derive_head_dim(values, "n_embd", "n_head"),
        d_ff=integer(values, "n_inner", 4 * d_model),
        max_length=integer(values, "n_positions"),
        norm_eps=number(values, "layer_norm_epsilon"),
        dtype=dtype,
    )


def publish_config(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `translate_config`."""
    return {
        **DEFAULTS,
        "vocab_size": cfg.vocab_size,
        "n_layer": cfg.num_layers,
        "n_embd": cfg.d_model,
        "n_head": cfg.num_heads,
        "n_inner": cfg.d_ff,
        "n_positions": cfg.max_length,
        "layer_norm_epsilon": cfg.norm_eps,
        "mask_token_id": cfg.mask_id,
        "bos_token_id": cfg.eos_id,
        "eos_token_id": cfg.eos_id,
        "pad_token_id": cfg.pad_id,
    }
