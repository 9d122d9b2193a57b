"""The transformer block, and the two ends of the stack."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dials_jax.config import ModelConfig
from dials_jax.nn.attention import Attention, attend
from dials_jax.nn.initializers import normal, zeros_if
from dials_jax.nn.kv import KV, Slots, gather
from dials_jax.nn.mlp import SwiGLU
from dials_jax.nn.norm import RMSNorm


class Rows(NamedTuple):
    """What a block needs beside the hidden states; every leaf leads with the batch."""

    angles: Float[Array, "B T 2 _"]  # sines and cosines of the tokens' positions
    valid: Bool[Array, "B S"] | None  # False at keys that are padding; None: no padding
    slots: Slots  # the tokens' places on the canvas


class Block(nnx.Module):
    """Pre-norm residual block: attention, then SwiGLU. `fused`: see `dials_jax.nn.fusing`."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, fused: bool = False):
        self.causal = cfg.causal
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps, rngs)
        self.attention = Attention(cfg, rngs, fused)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps, rngs)
        self.mlp = SwiGLU(cfg, rngs, fused)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        rows: Rows,
        wanted: Int[Array, "B W"] | None = None,
    ) -> Float[Array, "B W D"]:
        """The tokens' new hidden states, where they are all there is to attend to.

        Args:
          wanted: places of the tokens whose hidden states are asked for; None: all.
        """
        q, new = self.project(h, rows, wanted)
        return self.mix(h if wanted is None else gather(h, wanted), q, new, rows, wanted)

    def project(
        self, h: Float[Array, "B T D"], rows: Rows, wanted: Int[Array, "B W"] | None = None
    ) -> tuple[Float[Array, "B W N H"], KV]:
        """Queries of the wanted tokens, keys and values of all."""
        q, new = self.attention.rotated(self.attention_norm(h), rows.angles)
        return q if wanted is None else gather(q, wanted), new

    def mix(
        self,
        h: Float[Array, "B W D"],
        q: Float[Array, "B W N H"],
        seen: KV,
        rows: Rows,
        wanted: Int[Array, "B W"] | None = None,
    ) -> Float[Array, "B W D"]:
        """The rest of the block, once all keys and values that the queries see are there."""
        index = None
        if self.causal:
            index = rows.slots.index if wanted is None else gather(rows.slots.index, wanted)
        h = h + self.attention.out(attend(q, seen, rows.valid, index))
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
