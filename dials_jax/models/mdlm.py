"""MDLM: a diffusion transformer (DiT) over tokens, modulated by the time or by a constant.

Source: Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models"; `models/dit.py`
of the authors' code for the numerics.
"""

from __future__ import annotations

from dials_jax.config import ModelConfig

COND_DIM = 128


def mdlm(num_blocks: int = 12, time_conditioning: bool = False, **changes) -> ModelConfig:
    """The published width over GPT-2's vocabulary and a [MASK]; 12 blocks are 169.6M parameters."""
    values = dict(vocab_size=50258, mask_id=50257, eos_id=50256, pad_id=50256, head_dim=64)
    values |= dict(time_conditioning=time_conditioning) | changes
    return small(num_blocks, 768, **values)


def small(
    num_blocks: int,
    d_model: int,
    vocab_size: int,
    mask_id: int,
    eos_id: int,
    pad_id: int,
    **changes,
) -> ModelConfig:
    """An MDLM of any size with heads of 64 (32 below width 256) and an MLP of 4 times the width."""
    head_dim = changes.pop("head_dim", 64 if d_model >= 256 else 32)
    values = dict(
        model_type="mdlm", vocab_size=vocab_size, d_model=d_model, num_layers=num_blocks,
        num_heads=d_model // head_dim, num_kv_heads=d_model // head_dim, head_dim=head_dim,
        d_ff=4 * d_model, max_length=1024, rope_theta=10000.0, norm_eps=1e-5, bias=True,
        o_bias=False, norm="layer", mlp="gelu", cond_dim=COND_DIM, mask_id=mask_id, eos_id=eos_id,
        pad_id=pad_id, subs=not changes.get("causal", False),
    )  # fmt: skip
    return ModelConfig(**(values | changes))
