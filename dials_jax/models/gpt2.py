"""GPT-2: a causal transformer with learned positions; the scorer of generated text.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
`modeling_gpt2.py` of transformers for the numerics. The published head is the embedding; here it
has an array of its own, a copy after conversion.
"""

from __future__ import annotations

from dials_jax.config import ModelConfig


def gpt2(**changes) -> ModelConfig:
    """The published GPT-2: 124M parameters, 163M with a head of its own."""
    return _published(12, 768, changes)


def gpt2_large(**changes) -> ModelConfig:
    """The published GPT-2 large: 774M parameters, 838M with a head of its own."""
    return _published(36, 1280, changes)


def small(
    num_layers: int,
    d_model: int,
    vocab_size: int,
    eos_id: int | None,
    pad_id: int,
    mask_id: int | None = None,
    **changes,
) -> ModelConfig:
    """A GPT-2 of any size with heads of 64 (32 below width 256) and an MLP of 4 times the width."""
    head_dim = changes.pop("head_dim", 64 if d_model >= 256 else 32)
    values = dict(
        model_type="gpt2", vocab_size=vocab_size, d_model=d_model, num_layers=num_layers,
        num_heads=d_model // head_dim, num_kv_heads=d_model // head_dim, head_dim=head_dim,
        d_ff=4 * d_model, max_length=1024, rope_theta=None, norm_eps=1e-5, qkv_bias=True, bias=True,
        head_bias=False, norm="layer", norm_bias=True, mlp="gelu", causal=True, mask_id=mask_id,
        eos_id=eos_id, pad_id=pad_id,
    )  # fmt: skip
    return ModelConfig(**(values | changes))


def _published(num_layers: int, d_model: int, changes: dict) -> ModelConfig:
    values = dict(vocab_size=50257, eos_id=50256, pad_id=50256)
    return small(num_layers, d_model, **(values | changes))
