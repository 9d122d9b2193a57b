"""Dream checkpoints as published (Dream-org/Dream-v0-Base-7B and -Instruct-7B): settings.

The tensors are those of Qwen2, from which Dream was trained.

Source: `configuration_dream.py` and `modeling_dream.py` of those checkpoints.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dials_jax.config import ModelConfig
from dials_jax.convert import qwen2
from dials_jax.convert.settings import integer, token_id

TABLE = qwen2.TABLE

ARCHITECTURES = ("DreamModel",)

# The configuration states Qwen's number of positions; Dream's README states this one.
USABLE_POSITIONS = 2048

# The published tokenizer's [MASK] and end-of-turn token; the configuration names only the first.
DREAM_MASK_ID, DREAM_EOT_ID = 151666, 151645


def translate_config(values: dict[str, Any], dtype: str) -> ModelConfig:
    """Translates a published `config.json` into a `ModelConfig`.

    Raises: InputError for an option that is not implemented and for a missing number.
    """
    cfg = qwen2.translate_config(values, dtype)
    mask_id = integer(values, "mask_token_id")
    return dataclasses.replace(
        cfg,
        model_type="dream",
        max_length=min(cfg.max_length, USABLE_POSITIONS),
        causal=False,
        right_shift=True,
        mask_id=mask_id,
        eos_id=integer(values, "eos_token_id"),
        eot_id=token_id(values, "eot_token_id", DREAM_EOT_ID if mask_id == DREAM_MASK_ID else None),
    )


def publish_config(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `translate_config`; the authors' heads are always the width over their number.

    Their configuration has no `eot_token_id`, and keeps it.
    """
    values = qwen2.publish_config(cfg) | {"eot_token_id": cfg.eot_id}
    return {name: value for name, value in values.items() if name != "head_dim"}
