"""MDLM checkpoints: the published folder (kuleshov-group/mdlm-owt) and those of training.

Source: `models/dit.py` of the authors' code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dials_jax.config import ModelConfig
from dials_jax.convert.settings import derive_head_dim, flag, integer, token_id
from dials_jax.convert.table import TensorEntry, TensorLayout
from dials_jax.errors import require
from dials_jax.models import families

_BLOCK = "backbone.blocks.{i}"
_OUT = "backbone.output_layer"

TABLE = (
    TensorEntry("backbone.vocab_embed.embedding", "embed/table"),
    TensorEntry("backbone.sigma_map.mlp.0.weight", "time/up", 1),
    TensorEntry("backbone.sigma_map.mlp.0.bias", "time/up_bias", 0),
    TensorEntry("backbone.sigma_map.mlp.2.weight", "time/down", 1),
    TensorEntry("backbone.sigma_map.mlp.2.bias", "time/down_bias", 0),
    TensorEntry(f"{_BLOCK}.norm1.weight", "layers/attention_norm/scale"),
    TensorEntry(f"{_BLOCK}.attn_qkv.q.weight", "layers/attention/q", 1),
    TensorEntry(f"{_BLOCK}.attn_qkv.k.weight", "layers/attention/k", 1),
    TensorEntry(f"{_BLOCK}.attn_qkv.v.weight", "layers/attention/v", 1),
    TensorEntry(f"{_BLOCK}.attn_out.weight", "layers/attention/o", 2),
    TensorEntry(f"{_BLOCK}.norm2.weight", "layers/mlp_norm/scale"),
    TensorEntry(f"{_BLOCK}.mlp.0.weight", "layers/mlp/up", 1),
    TensorEntry(f"{_BLOCK}.mlp.0.bias", "layers/mlp/up_bias", 0),
    TensorEntry(f"{_BLOCK}.mlp.2.weight", "layers/mlp/down", 1),
    TensorEntry(f"{_BLOCK}.mlp.2.bias", "layers/mlp/down_bias", 0),
    TensorEntry(f"{_BLOCK}.adaLN_modulation.weight", "layers/modulation/kernel", 1),
    TensorEntry(f"{_BLOCK}.adaLN_modulation.bias", "layers/modulation/bias", 0),
    TensorEntry(f"{_OUT}.norm_final.weight", "final_norm/scale"),
    TensorEntry(f"{_OUT}.adaLN_modulation.weight", "final_norm/modulation/kernel", 1),
    TensorEntry(f"{_OUT}.adaLN_modulation.bias", "final_norm/modulation/bias", 0),
    TensorEntry(f"{_OUT}.linear.weight", "head/kernel", 1),
    TensorEntry(f"{_OUT}.linear.bias", "head/bias", 0),
)

LAYOUT = TensorLayout(prefix="backbone.", joined=r"(backbone\.)?blocks\.\d+\.attn_qkv")

ARCHITECTURES = ("MDLM",)


class KnownTokenizer(NamedTuple):
    """The size and the special ids of a tokenizer that has a [MASK]."""

    vocab_size: int
    mask_id: int
    eos_id: int
    pad_id: int


# Names of tokenizers in the authors' settings. GPT-2's have no [MASK]; training adds it as last id.
LAST_ID_IS_MASK = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
KNOWN_TOKENIZERS = {
    "text8": KnownTokenizer(35, mask_id=4, eos_id=3, pad_id=5),
    "bert-base-uncased": KnownTokenizer(30522, mask_id=103, eos_id=102, pad_id=0),
}


def tokenizer_of_size(vocab_size: int) -> str | None:
    """Returns the name of the known tokenizer with this vocabulary size, or None."""
    return next((name for name, t in KNOWN_TOKENIZERS.items() if t.vocab_size == vocab_size), None)


def translate_config(values: dict[str, Any], dtype: str) -> ModelConfig:
    """Translates a published `config.json` into a `ModelConfig`.

    Without `mask_token_id` the vocabulary is taken for GPT-2's: the last token is the end of text,
    and [MASK] is the id after it.

    Raises: InputError if the size is that of another tokenizer, whose [MASK] has to be given.
    """
    d_model, vocab_size = integer(values, "hidden_dim"), integer(values, "vocab_size")
    mask_id, name = token_id(values, "mask_token_id"), tokenizer_of_size(vocab_size)
    if mask_id is None:
        require(
            name is None,
            f"config.json: mask_token_id is missing, and {vocab_size} tokens are those of {name}, "
            "whose [MASK] is not the last; add mask_token_id and eos_token_id",
        )
        mask_id = vocab_size - 1
    # If the ids are not GPT-2's, the end of text is unknown too.
    eos_id = integer(values, "eos_token_id", vocab_size - 2 if mask_id == vocab_size - 1 else None)
    return families.mdlm_small(
        integer(values, "n_blocks"),
        d_model,
        vocab_size,
        mask_id,
        eos_id,
        integer(values, "pad_token_id", eos_id),
        head_dim=derive_head_dim(values, "hidden_dim", "n_heads"),
        cond_dim=integer(values, "cond_dim"),
        max_length=integer(values, "model_length"),
        time_conditioning=flag(values, "time_conditioning"),
        dtype=dtype,
    )


def publish_config(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `translate_config`."""
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_dim": cfg.d_model,
        "cond_dim": cfg.cond_dim,
        "n_blocks": cfg.num_layers,
        "n_heads": cfg.num_heads,
        "model_length": cfg.max_length,
        "time_conditioning": cfg.time_conditioning,
        "dropout": 0.1,  # the published one; only training reads it
        "mask_token_id": cfg.mask_id,
        "eos_token_id": cfg.eos_id,
        "pad_token_id": cfg.pad_id,
    }


def computed_tensors(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The rotary angles, which the authors' class takes from the file."""
    exponents = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    powers = cfg.rope_theta ** exponents.astype(np.float64)  # NumPy's float32 rounds unlike torch's
    return {"backbone.rotary_emb.inv_freq": 1 / powers.astype(np.float32)}
