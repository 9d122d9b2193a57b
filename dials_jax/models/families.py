"""The configurations of the families of models: published ones, and any size.

Sources, for the shapes and for the numerics:
- LLaDA: Nie et al. 2025, "Large Language Diffusion Models"; `modeling_llada.py` of the published
  checkpoints.
- iLLaDA: `modeling_illada.py` of the published checkpoints (2026), whose sizes are read from their
  config.json.
- Dream: Ye et al. 2025, "Dream 7B: Diffusion Large Language Models"; `modeling_dream.py` of the
  published checkpoints.
- Qwen2: Yang et al. 2024, "Qwen2.5 Technical Report"; `modeling_qwen2.py` of transformers.
- MDLM: Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models"; `models/dit.py`
  of the authors' code.
- GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
  `modeling_gpt2.py` of transformers.
"""

from __future__ import annotations

from typing import Any

from dials_jax.config import ModelConfig

COND_DIM = 128  # MDLM's conditioning


def llada_8b(**changes) -> ModelConfig:
    """The published LLaDA-8B (Base and Instruct): Llama's shape, bidirectional."""
    values = dict(
        vocab_size=126464, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32,
        head_dim=128, d_ff=12288, max_length=4096, rope_theta=500000.0, norm_eps=1e-5,
        mask_id=126336, eos_id=126081, pad_id=126081, eot_id=126348,
    )  # fmt: skip
    return ModelConfig(**(values | changes))


def llada_small(
    num_layers: int,
    d_model: int,
    vocab_size: int,
    mask_id: int,
    eos_id: int,
    pad_id: int,
    **changes,
) -> ModelConfig:
    """A LLaDA of any size with heads of 64 (32 below width 256) and a SwiGLU of 8/3 the width."""
    values = dict(
        vocab_size=vocab_size, d_ff=-(-8 * d_model // 3 // 64) * 64, rope_theta=10000.0,
        mask_id=mask_id, eos_id=eos_id, pad_id=pad_id,
    )  # fmt: skip
    return _of_any_size(num_layers, d_model, values, changes)


def qwen2_5_7b(**changes) -> ModelConfig:
    """The published Qwen2.5-7B, the base model: causal, biases on queries, keys and values."""
    values = dict(
        model_type="qwen2", vocab_size=152064, d_model=3584, num_layers=28, num_heads=28,
        num_kv_heads=4, head_dim=128, d_ff=18944, max_length=131072, rope_theta=1000000.0,
        norm_eps=1e-6, qkv_bias=True, causal=True, mask_id=None, eos_id=151643, pad_id=151643,
    )  # fmt: skip
    return ModelConfig(**(values | changes))


def dream_7b(**changes) -> ModelConfig:
    """The published Dream-v0-7B (Base and Instruct): Qwen2.5, trained to fill in masked tokens.

    Each token is predicted at the position to its left (right shift).
    """
    # In bfloat16 the published code rounds the rotary sines and cosines, too. Here they stay
    # float32, as in every model; in float32 both agree.
    values = dict(
        model_type="dream", max_length=2048, causal=False, right_shift=True, mask_id=151666,
        eot_id=151645,
    )  # fmt: skip
    return qwen2_5_7b(**(values | changes))


def mdlm(num_blocks: int = 12, time_conditioning: bool = False, **changes) -> ModelConfig:
    """The published width over GPT-2's vocabulary and a [MASK]; 12 blocks are 169.6M parameters."""
    values = dict(vocab_size=50258, mask_id=50257, eos_id=50256, pad_id=50256, head_dim=64)
    values |= dict(time_conditioning=time_conditioning) | changes
    return mdlm_small(num_blocks, 768, **values)


def mdlm_small(
    num_blocks: int,
    d_model: int,
    vocab_size: int,
    mask_id: int,
    eos_id: int,
    pad_id: int,
    **changes,
) -> ModelConfig:
    """An MDLM of any size with heads of 64 (32 below width 256) and an MLP of 4 times the width.

    A diffusion transformer (DiT) over tokens, modulated by the time or by a constant.
    """
    values = dict(
        model_type="mdlm", vocab_size=vocab_size, d_ff=4 * d_model, rope_theta=10000.0,
        mlp_bias=True, head_bias=True, norm="layer", mlp="gelu", cond_dim=COND_DIM,
        mask_id=mask_id, eos_id=eos_id, pad_id=pad_id, subs=not changes.get("causal", False),
    )  # fmt: skip
    return _of_any_size(num_blocks, d_model, values, changes)


def gpt2(**changes) -> ModelConfig:
    """The published GPT-2: 124M parameters, 163M with a head of its own (a copy of its embedding).

    It scores generated text.
    """
    return gpt2_small(12, 768, **(_GPT2_IDS | changes))


def gpt2_large(**changes) -> ModelConfig:
    """The published GPT-2 large: 774M parameters, 838M with a head of its own."""
    return gpt2_small(36, 1280, **(_GPT2_IDS | changes))


def gpt2_small(
    num_layers: int,
    d_model: int,
    vocab_size: int,
    eos_id: int | None,
    pad_id: int,
    mask_id: int | None = None,
    **changes,
) -> ModelConfig:
    """A GPT-2 of any size with heads of 64 (32 below width 256) and an MLP of 4 times the width.

    Causal, with learned positions.
    """
    values = dict(
        model_type="gpt2", vocab_size=vocab_size, d_ff=4 * d_model, rope_theta=None, qkv_bias=True,
        o_bias=True, mlp_bias=True, norm="layer", norm_bias=True, mlp="gelu", causal=True,
        mask_id=mask_id, eos_id=eos_id, pad_id=pad_id,
    )  # fmt: skip
    return _of_any_size(num_layers, d_model, values, changes)


_GPT2_IDS = dict(vocab_size=50257, eos_id=50256, pad_id=50256)


def _of_any_size(
    num_layers: int, d_model: int, values: dict[str, Any], changes: dict[str, Any]
) -> ModelConfig:
    """What small models of all families share; `changes` win over everything."""
    head_dim = changes.get("head_dim", 64 if d_model >= 256 else 32)
    num_heads = d_model // head_dim
    shared = dict(
        d_model=d_model, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads,
        head_dim=head_dim, max_length=1024, norm_eps=1e-5,
    )  # fmt: skip
    return ModelConfig(**(shared | values | changes))
