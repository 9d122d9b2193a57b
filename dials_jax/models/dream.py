"""Dream: Qwen2.5 trained on to fill in masked tokens, each predicted one row to its left.

Source: Ye et al. 2025, "Dream 7B: Diffusion Large Language Models"; `modeling_dream.py` of the
published checkpoints for the numerics.
"""

from __future__ import annotations

from dials_jax.config import ModelConfig
from dials_jax.models.qwen2 import qwen2_5_7b


def dream_7b(**changes) -> ModelConfig:
    """The published Dream-v0-7B (Base and Instruct)."""
    # In bfloat16 the published code rounds the rotary sines and cosines, too. Here they stay
    # float32, as in every model; in float32 both agree.
    values = dict(
        model_type="dream", max_length=2048, causal=False, shift=True, mask_id=151666,
        eot_id=151645,
    )  # fmt: skip
    return qwen2_5_7b(**(values | changes))
