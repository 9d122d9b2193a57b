"""Fast-dLLM v2 checkpoints as published (Efficient-Large-Model/Fast_dLLM_v2_7B and _1.5B).

Qwen2.5's body under a block-causal mask, which predicts the next token: Dream's shift.

Source: `configuration.py` and `modeling.py` of those checkpoints.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dials_jax.config import ModelConfig
from dials_jax.convert import qwen2
from dials_jax.convert.settings import integer
from dials_jax.errors import require

TABLE = qwen2.TABLE

ARCHITECTURES = ("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_QwenModel")

# The id of the published tokenizer's [MASK], which the configuration does not name.
FAST_DLLM_MASK_ID = 151665


def translate_config(values: dict[str, Any], dtype: str) -> ModelConfig:
    """Translates a published `config.json` into a `ModelConfig`.

    Raises: InputError for an option that is not implemented and for a missing number.
    """
    cfg = qwen2.translate_config(values, dtype)
    mask_id = integer(values, "mask_token_id", FAST_DLLM_MASK_ID)
    require(
        mask_id < cfg.vocab_size,
        f"config.json: the published id of [MASK], {mask_id}, is outside the vocabulary of "
        f"{cfg.vocab_size} tokens; add mask_token_id",
    )
    return dataclasses.replace(
        cfg,
        model_type="fast_dllm_qwen",
        causal=False,
        block_length=integer(values, "bd_size"),
        right_shift=True,
        mask_id=mask_id,
        eos_id=integer(values, "eos_token_id"),
    )


def publish_config(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `translate_config`; their configuration names no [MASK], and keeps it."""
    values = qwen2.publish_config(cfg)
    # The second key is that of the authors' training, as they spell it.
    return values | {"bd_size": cfg.block_length, "conplemenrary_mask": True}
