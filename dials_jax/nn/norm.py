"""RMS and layer normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dials_jax.config import ModelConfig
from dials_jax.nn.kernels.hopper_rows import norm_refusal, run_norm
from dials_jax.nn.kernels.implementation import (
    Implementation,
    alike_on_hopper,
    dispatch,
    fixed_tiles,
    plain_jax,
)
from dials_jax.nn.kernels.per_device import HOPPER
from dials_jax.nn.kernels.row_sums import row_mean
from dials_jax.nn.kernels.row_tiles import in_tiles
from dials_jax.nn.linear import scaled
from dials_jax.nn.modules import zeros_if


class RMSNorm(nnx.Module):
    """Root-mean-square norm: statistics in float32, multiplied by the scale in x's dtype.

    LLaDA rounds to the activations' dtype before it multiplies by the scale, and so does this.
    """

    def __init__(self, size: int, eps: float, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return dispatch(RMS_NORM, x, self.scale[...], self.eps)


def xla_rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float
) -> Float[Array, "*B D"]:
    x32 = x.astype(jnp.float32)
    variance = row_mean(x32 * x32, keepdims=True)
    normed = (x32 * jax.lax.rsqrt(variance + eps)).astype(x.dtype)
    return scaled(normed, scale)


RMS_NORM = (  # (x, scale, eps) -> x, normed along the last axis
    Implementation("hopper_rows", HOPPER, norm_refusal, run_norm, "invariant"),
    alike_on_hopper(xla_rms_norm),
    fixed_tiles(in_tiles(xla_rms_norm)),
    plain_jax(xla_rms_norm),
)


class LayerNorm(nnx.Module):
    """Layer norm, in float32 to the end; a bias only if asked for (GPT-2; MDLM has none)."""

    def __init__(self, size: int, eps: float, bias: bool):
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = zeros_if(bias, (size,))
        self.eps = eps

    def __call__(
        self,
        x: Float[Array, "B T D"],
        shift: Float[Array, "b 1 D"] | None = None,
        scale: Float[Array, "b 1 D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Normalised x, then `x * (1 + scale) + shift` (adaLN) where these are given."""
        y = dispatch(STANDARDISE, x.astype(jnp.float32), self.eps)
        y = y * self.scale[...].astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        if shift is not None:
            y = y * (1 + scale) + shift
        return y.astype(x.dtype)


def xla_standardise(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    x = x - row_mean(x, keepdims=True)
    return x * jax.lax.rsqrt(row_mean(x * x, keepdims=True) + eps)


STANDARDISE = (  # (x, eps) -> x, of mean 0 and variance 1 along the last axis
    alike_on_hopper(xla_standardise),
    fixed_tiles(in_tiles(xla_standardise)),
    plain_jax(xla_standardise),
)


def make_norm(cfg: ModelConfig, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
    """The norm that the configuration names."""
    if cfg.norm == "rms":
        return RMSNorm(cfg.d_model, cfg.norm_eps, rngs)
    return LayerNorm(cfg.d_model, cfg.norm_eps, cfg.norm_bias)
