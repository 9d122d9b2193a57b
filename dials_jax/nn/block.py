"""The transformer block, and the two ends of the stack."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dials_jax.config import ModelConfig
from dials_jax.nn.attention import Attention, attend
from dials_jax.nn.dropout import AFTER_ATTENTION, AFTER_MLP, Dropout, dropped
from dials_jax.nn.eight_bits import Quantised, is_quantised
from dials_jax.nn.kernels.dispatch import LOOKUP
from dials_jax.nn.kernels.implementation import dispatch
from dials_jax.nn.kv import KV, Slots, gather
from dials_jax.nn.linear import linear, scaled, shifted
from dials_jax.nn.mask import Mask
from dials_jax.nn.mlp import MLP
from dials_jax.nn.modulation import IN_BLOCK, Modulation
from dials_jax.nn.modules import PLAIN, Form, normal, zeros_if
from dials_jax.nn.norm import make_norm

VOCABULARY_UNIT = 128  # matmuls with the vocabulary run several times as fast on whole tiles


class BlockInputs(NamedTuple):
    """What a block needs beside the hidden states; every leaf leads with the batch.

    Attributes:
      angles: sines and cosines of the positions; None: positions are learned.
      mask: of the keys; the block adds where the queries stand.
      slots: the tokens' positions on the canvas.
      c: conditioning on the denoising time; None: precomputed modulations are used.
      dropout: of this layer, in training.
      output_positions: of the tokens whose new states are asked for; None: of all.
    """

    angles: Float[Array, "B T 2 _"] | None
    mask: Mask
    slots: Slots
    c: Float[Array, "B C"] | None = None
    dropout: Dropout | None = None
    output_positions: Int[Array, "B W"] | None = None


class Block(nnx.Module):
    """Pre-norm residual block: attention, then MLP, both modulated where the model has adaLN.

    `form` is that of its parameters.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, form: Form = PLAIN):
        self.attention_norm = make_norm(cfg, rngs)
        self.attention = Attention(cfg, rngs, form.fused)
        self.mlp_norm = make_norm(cfg, rngs)
        self.mlp = MLP(cfg, rngs, form.fused)
        self.modulation = Modulation(cfg, IN_BLOCK, form.modulated) if cfg.cond_dim else None

    def __call__(self, h: Float[Array, "B T D"], inputs: BlockInputs) -> Float[Array, "B W D"]:
        """The tokens' new hidden states, where they are all there is to attend to."""
        q, kv = self.project(h, inputs)
        if inputs.output_positions is not None:
            return self.mix(gather(h, inputs.output_positions), q, kv, inputs)
        return self.finish(h, attend(q, kv, inputs.mask), inputs)

    def project(
        self, h: Float[Array, "B T D"], inputs: BlockInputs
    ) -> tuple[Float[Array, "B W N H"], KV]:
        """Queries at the output positions, keys and values of all tokens."""
        normed = self.attention_norm(h, *self.modulations(inputs)[0:2])
        q, kv = self.attention.rotated(normed, inputs.angles)
        return q if inputs.output_positions is None else gather(q, inputs.output_positions), kv

    def mix(
        self,
        h: Float[Array, "B W D"],
        q: Float[Array, "B W N H"],
        kv: KV,
        inputs: BlockInputs,
    ) -> Float[Array, "B W D"]:
        """The rest of the block, from h and q at the output positions, once all keys are there."""
        mask, index, positions = inputs.mask, inputs.slots.index, inputs.output_positions
        if mask.ordered:
            mask = mask.at(index if positions is None else gather(index, positions))
        return self.finish(h, attend(q, kv, mask), inputs)

    def finish(
        self, h: Float[Array, "B W D"], attended: Float[Array, "B W N H"], inputs: BlockInputs
    ) -> Float[Array, "B W D"]:
        """Adds to the stream what attention returned, then the output of the MLP."""
        m = self.modulations(inputs)
        if not m and inputs.dropout is None:  # nothing comes between matmul and addition
            h = self.attention.out(attended, added_to=h)
            return self.mlp(self.mlp_norm(h), added_to=h)
        update = self.attention.out(attended)
        h = h + gated(dropped(update, inputs.dropout, AFTER_ATTENTION), *m[2:3])
        update = self.mlp(self.mlp_norm(h, *m[3:5]))
        return h + gated(dropped(update, inputs.dropout, AFTER_MLP), *m[5:6])

    def modulations(self, inputs: BlockInputs) -> list[Float[Array, "b 1 D"]]:
        """Shift, scale and gate of attention, then of the MLP; none without adaLN."""
        return [] if self.modulation is None else self.modulation(inputs.c)


def gated(
    update: Float[Array, "B T D"], gate: Float[Array, "b 1 D"] | None = None
) -> Float[Array, "B T D"]:
    return update if gate is None else scaled(update, gate)


class Embed(nnx.Module):
    """Token embedding, and that of positions where they are learned."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.table = nnx.Param(normal(rngs, (cfg.vocab_size, cfg.d_model)))
        learned = cfg.rope_theta is None
        shape = (cfg.max_length, cfg.d_model)
        self.positions = nnx.Param(normal(rngs, shape)) if learned else None
        self.dtype = cfg.dtype

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        if self.positions is None:
            return dispatch(LOOKUP, self.table[...], tokens, self.dtype)
        h = dispatch(LOOKUP, self.table[...], tokens, "float32") + self.positions[...][positions]
        return h.astype(self.dtype)


class Head(nnx.Module):
    """Untied projection to the vocabulary; float32 logits from matmuls in the stream's dtype, or
    in 8 bits.

    In the form `padded_head` it holds the kernel a second time, zeros added until the vocabulary
    fills whole tiles.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, form: Form = PLAIN):
        self.kernel = nnx.Param(normal(rngs, (cfg.d_model, cfg.vocab_size)))
        self.bias = zeros_if(cfg.head_bias, (cfg.vocab_size,))
        self.padded = nnx.Param(pad_vocabulary(self.kernel[...])) if form.padded_head else None
        self.vocab_size = cfg.vocab_size

    @jax.named_scope("head")
    def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        kernel = self.kernel if self.padded is None else self.padded  # either may be in 8 bits
        logits = linear(h, kernel, axes="BTD,DV->BTV", dtype=jnp.float32)[..., : self.vocab_size]
        return logits if self.bias is None else shifted(logits, self.bias[...])


def pad_vocabulary(kernel: Float[Array, "D V"] | Quantised) -> Float[Array, "D _"] | Quantised:
    """The kernel with zeros added until the vocabulary fills whole tiles."""
    if is_quantised(kernel):  # the vocabulary comes first, and scales have no other axis
        return jax.tree.map(lambda x: _padded(x, axis=0), kernel)
    return _padded(kernel, axis=1)


def _padded(x: Array, axis: int) -> Array:
    extra = -x.shape[axis] % VOCABULARY_UNIT
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])
