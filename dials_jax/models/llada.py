"""LLaDA: a bidirectional Llama-shaped transformer that predicts masked tokens.

Source: Nie et al. 2025, "Large Language Diffusion Models"; `modeling_llada.py` of the published
checkpoints for the numerics.
"""

from __future__ import annotations

from dials_jax.config import ModelConfig


def llada_8b(**changes) -> ModelConfig:
    """The published LLaDA-8B (Base and Instruct)."""
    values = dict(
        vocab_size=126464, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32,
        head_dim=128, d_ff=12288, max_length=4096, rope_theta=500000.0, norm_eps=1e-5,
        mask_id=126336, eos_id=126081, pad_id=126081, eot_id=126348,
    )  # fmt: skip
    return ModelConfig(**(values | changes))


def small(
    num_layers: int,
    d_model: int,
    vocab_size: int,
    mask_id: int,
    eos_id: int,
    pad_id: int,
    **changes,
) -> ModelConfig:
    """A LLaDA of any size with heads of 64 (32 below width 256) and a SwiGLU of 8/3 the width."""
    head_dim = changes.pop("head_dim", 64 if d_model >= 256 else 32)
    values = dict(
        vocab_size=vocab_size, d_model=d_model, num_layers=num_layers,
        num_heads=d_model // head_dim, num_kv_heads=d_model // head_dim, head_dim=head_dim,
        d_ff=-(-8 * d_model // 3 // 64) * 64, max_length=1024, rope_theta=10000.0, norm_eps=1e-5,
        mask_id=mask_id, eos_id=eos_id, pad_id=pad_id,
    )  # fmt: skip
    return ModelConfig(**(values | changes))
