"""The transformer block, and the two ends of the stack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dials_jax.config import ModelConfig
from dials_jax.nn.attention import Attention
from dials_jax.nn.initializers import normal, zeros_if
from dials_jax.nn.mlp import SwiGLU
from dials_jax.nn.norm import RMSNorm


class Block(nnx.Module):
    """Pre-norm residual block: attention, then SwiGLU."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps, rngs)
        self.attention = Attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps, rngs)
        self.mlp = SwiGLU(cfg, rngs)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        sin_cos: Float[Array, "B T 2 _"],
        valid: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        h = h + self.attention(self.attention_norm(h), sin_cos, valid)
        return h + self.mlp(self.mlp_norm(h))


class Embed(nnx.Module):
    """Token embedding."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.table = nnx.Param(normal(rngs, (cfg.vocab_size, cfg.d_model)))
        self.dtype = cfg.dtype

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Gather, then round: half of all training tokens are [MASK], and their gradients are summed
        # into one row. In bfloat16 that sum is both wrong and, by contended atomics, slow.
        return self.table[...][tokens].astype(self.dtype)


class Head(nnx.Module):
    """Untied projection to the vocabulary; float32 logits from products in the stream's dtype."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(rngs, (cfg.d_model, cfg.vocab_size)))
        self.bias = zeros_if(cfg.bias, (cfg.vocab_size,))

    @jax.named_scope("head")
    def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        kernel = self.kernel[...].astype(h.dtype)
        logits = jnp.einsum("BTD,DV->BTV", h, kernel, preferred_element_type=jnp.float32)
        return logits if self.bias is None else logits + self.bias[...].astype(jnp.float32)
