"""adaLN-zero: what shifts, scales and gates the parts of a DiT block.

A vector c of the denoising time goes through one affine map per block. In a model without time
conditioning c is a learned constant, and so is every modulation: `precompute_modulation` computes
them once for all layers, which then run in the modulated form.

Source: Peebles & Xie 2023, section 3.2; Sahoo et al. 2024 (MDLM), appendix.
"""

from __future__ import annotations

from math import log

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dials_jax.config import ModelConfig
from dials_jax.nn.linear import linear
from dials_jax.nn.modules import PLAIN, Form, normal, zeros_if
from dials_jax.nn.norm import LayerNorm, make_norm
from dials_jax.trees import Params

NUM_WAVES = 256  # sines and cosines of the time
IN_BLOCK = 6  # shift, scale and gate of attention, then of the MLP


class TimeEmbed(nnx.Module):
    """From sigma, the total noise of the time, to the conditioning c; all in float32."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        width = cfg.cond_dim
        for name, size in {"up": NUM_WAVES, "down": width}.items():
            setattr(self, name, nnx.Param(normal(rngs, (size, width))))
            setattr(self, f"{name}_bias", zeros_if(True, (width,)))

    def __call__(self, sigma: Float[Array, "B"]) -> Float[Array, "B C"]:
        half = NUM_WAVES // 2
        frequencies = jnp.exp(-log(10000) * jnp.arange(half) / half)
        angles = sigma[:, None] * frequencies
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        hidden = jax.nn.silu(linear(waves, self.up, self.up_bias))
        return jax.nn.silu(linear(hidden, self.down, self.down_bias))


class Modulation(nnx.Module):
    """`count` vectors of the stream's width; zero until they are trained.

    Args:
      modulated: holds what a constant c gives, and the map itself only if the time matters.
    """

    def __init__(self, cfg: ModelConfig, count: int, modulated: bool = False):
        if cfg.time_conditioning or not modulated:
            self.kernel = nnx.Param(jnp.zeros((cfg.cond_dim, count, cfg.d_model)))
            self.bias = nnx.Param(jnp.zeros((count, cfg.d_model)))
        if modulated:
            self.constant = nnx.Param(jnp.zeros((count, cfg.d_model)))

    def __call__(self, c: Float[Array, "B C"] | None) -> list[Float[Array, "b 1 D"]]:
        """float32 vectors per sequence; without c, the constant ones for all sequences."""
        if c is None:
            out = self.constant[...][None]
        else:
            out = affine(c, self.kernel[...], self.bias[...])
        return [x[:, None] for x in jnp.unstack(out, axis=1)]


class AdaptiveNorm(LayerNorm):
    """A layer norm with its own shift and scale: the one before the head."""

    def __init__(self, cfg: ModelConfig, modulated: bool = False):
        super().__init__(cfg.d_model, cfg.norm_eps, cfg.norm_bias)
        self.modulation = Modulation(cfg, 2, modulated)

    def __call__(
        self, x: Float[Array, "B T D"], c: Float[Array, "B C"] | None = None
    ) -> Float[Array, "B T D"]:
        return super().__call__(x, *self.modulation(c))


def make_final_norm(cfg: ModelConfig, rngs: nnx.Rngs, form: Form = PLAIN) -> nnx.Module:
    """The norm before the head."""
    return AdaptiveNorm(cfg, form.modulated) if cfg.cond_dim else make_norm(cfg, rngs)


def affine(
    c: Float[Array, "*B C"], kernel: Float[Array, "*L C E D"], bias: Float[Array, "*L E D"]
) -> Float[Array, "*M E D"]:
    """c through the map of a module, or one c through those of all stacked layers; float32."""
    return linear(c, kernel, bias, axes="...C,...CED->...ED")


def precompute_modulation(cfg: ModelConfig, module: Params, c: Float[Array, "C"]) -> Params:
    """A layer (or all, stacked) or the final norm, with its modulations of a constant c."""
    old = module["modulation"]
    constant = affine(c, old["kernel"], old["bias"])
    kept = old if cfg.time_conditioning else {}
    return {**module, "modulation": {**kept, "constant": constant}}
