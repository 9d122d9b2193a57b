"""MDLM checkpoints: the published folder (kuleshov-group/mdlm-owt) and what training leaves.

Source: `models/dit.py` of the authors' code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.settings import integer, width_of_heads
from convert.table import Row, split
from dials_jax.config import ModelConfig, require
from dials_jax.models import mdlm

_BLOCK = "blocks.{i}"
_OUT = "output_layer"

TABLE = (
    Row("vocab_embed.embedding", "embed/table"),
    Row("sigma_map.mlp.0.weight", "time/up", 1),
    Row("sigma_map.mlp.0.bias", "time/up_bias", 0),
    Row("sigma_map.mlp.2.weight", "time/down", 1),
    Row("sigma_map.mlp.2.bias", "time/down_bias", 0),
    Row(f"{_BLOCK}.norm1.weight", "layers/attention_norm/scale"),
    Row(f"{_BLOCK}.attn_qkv.q.weight", "layers/attention/q", 1),
    Row(f"{_BLOCK}.attn_qkv.k.weight", "layers/attention/k", 1),
    Row(f"{_BLOCK}.attn_qkv.v.weight", "layers/attention/v", 1),
    Row(f"{_BLOCK}.attn_out.weight", "layers/attention/o", 2),
    Row(f"{_BLOCK}.norm2.weight", "layers/mlp_norm/scale"),
    Row(f"{_BLOCK}.mlp.0.weight", "layers/mlp/up", 1),
    Row(f"{_BLOCK}.mlp.0.bias", "layers/mlp/up_bias", 0),
    Row(f"{_BLOCK}.mlp.2.weight", "layers/mlp/down", 1),
    Row(f"{_BLOCK}.mlp.2.bias", "layers/mlp/down_bias", 0),
    Row(f"{_BLOCK}.adaLN_modulation.weight", "layers/modulation/kernel", 1),
    Row(f"{_BLOCK}.adaLN_modulation.bias", "layers/modulation/bias", 0),
    Row(f"{_OUT}.norm_final.weight", "final_norm/scale"),
    Row(f"{_OUT}.adaLN_modulation.weight", "final_norm/modulation/kernel", 1),
    Row(f"{_OUT}.adaLN_modulation.bias", "final_norm/modulation/bias", 0),
    Row(f"{_OUT}.linear.weight", "head/kernel", 1),
    Row(f"{_OUT}.linear.bias", "head/bias", 0),
)

BUFFERS = ("rotary_emb.inv_freq",)  # computed, not learned


def translate(values: dict[str, Any], dtype: str) -> ModelConfig:
    """A published `config.json` as ours.

    The vocabulary is GPT-2's, whose last token is the end of text, and [MASK] after it.
    """
    d_model, vocab_size = integer(values, "hidden_dim"), integer(values, "vocab_size")
    conditioned = values.get("time_conditioning") or False
    require(
        isinstance(conditioned, bool),
        f"config.json: time_conditioning={conditioned!r} must be true or false",
    )
    mask_id = integer(values, "mask_token_id", vocab_size - 1)
    eos_id = integer(values, "eos_token_id", vocab_size - 2)
    return mdlm.small(
        integer(values, "n_blocks"),
        d_model,
        vocab_size,
        mask_id,
        eos_id,
        integer(values, "pad_token_id", eos_id),
        head_dim=width_of_heads(values, "hidden_dim", "n_heads"),
        cond_dim=integer(values, "cond_dim"),
        max_length=integer(values, "model_length"),
        time_conditioning=conditioned,
        dtype=dtype,
    )


def arrange(values: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names of the table: no prefix, no buffers, projections apart."""
    plain = {name.removeprefix("backbone."): x for name, x in tensors.items()}
    plain = {name: x for name, x in plain.items() if name not in BUFFERS}
    return split(plain, r"blocks\.\d+\.attn_qkv", ("q", "k", "v"), axis=0)
