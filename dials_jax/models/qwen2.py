"""Qwen2: a causal Llama-shaped transformer with biases on queries, keys and values.

Source: Yang et al. 2024, "Qwen2.5 Technical Report"; `modeling_qwen2.py` of transformers for the
numerics.
"""

from __future__ import annotations

from dials_jax.config import ModelConfig


def qwen2_5_7b(**changes) -> ModelConfig:
    """The published Qwen2.5-7B, the base model."""
    values = dict(
        model_type="qwen2", vocab_size=152064, d_model=3584, num_layers=28, num_heads=28,
        num_kv_heads=4, head_dim=128, d_ff=18944, max_length=131072, rope_theta=1000000.0,
        norm_eps=1e-6, qkv_bias=True, causal=True, mask_id=None, eos_id=151643, pad_id=151643,
    )  # fmt: skip
    return ModelConfig(**(values | changes))
