"""Attention with grouped key/value heads: bidirectional, causal or block-causal."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from dials_jax.config import ModelConfig
from dials_jax.nn.fusing import split_outputs
from dials_jax.nn.kernels.dispatch import ATTENTION
from dials_jax.nn.kernels.implementation import dispatch
from dials_jax.nn.kv import KV
from dials_jax.nn.linear import linear
from dials_jax.nn.mask import Mask
from dials_jax.nn.modules import normal, residual_depth, zeros_if
from dials_jax.nn.norm import RMSNorm
from dials_jax.nn.rope import apply_rope


class Attention(nnx.Module):
    """Self-attention in which every token sees every valid token, or those to its left (causal).

    `fused`: the parts in which queries, keys and values are joined: see `dials_jax.nn.fusing`.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, fused: int = 0):
        d, n, k, h = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.fused, self.num_heads, self.num_kv_heads = fused, n, k
        for name, heads in ({"qkv": n + 2 * k} if fused else {"q": n, "k": k, "v": k}).items():
            setattr(self, name, nnx.Param(normal(rngs, (d, heads, h))))
            setattr(self, f"{name}_bias", zeros_if(cfg.qkv_bias, (heads, h)))
        self.q_norm = RMSNorm(h, cfg.norm_eps, rngs) if cfg.qk_norm else None
        self.k_norm = RMSNorm(h, cfg.norm_eps, rngs) if cfg.qk_norm else None
        self.o = nnx.Param(normal(rngs, (n, h, d), depth=residual_depth(cfg)))
        self.o_bias = zeros_if(cfg.o_bias, (d,))

    def rotated(
        self, x: Float[Array, "B T D"], sin_cos: Float[Array, "B T 2 _"] | None
    ) -> tuple[Float[Array, "B T N H"], KV]:
        """Rotated queries, and the tokens' rotated keys and values; None: nothing turns."""
        project = partial(linear, x, axes="BTD,DNH->BTNH")
        if self.fused:
            sizes = self.num_heads, self.num_kv_heads, self.num_kv_heads
            q, k, v = split_outputs(project(self.qkv, self.qkv_bias), sizes, 2, self.fused)
        else:
            q = project(self.q, self.q_bias)
            k = project(self.k, self.k_bias)
            v = project(self.v, self.v_bias)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if sin_cos is None:
            return q, KV(k, v)
        return apply_rope(q, sin_cos), KV(apply_rope(k, sin_cos), v)

    def out(
        self, y: Float[Array, "B T N H"], added_to: Float[Array, "B T D"] | None = None
    ) -> Float[Array, "B T D"]:
        """Args: added_to: the residual stream; None: the output is returned by itself."""
        axes = "BTNH,NHD->BTD"
        return linear(y, self.o, self.o_bias, axes=axes, split=True, added_to=added_to)


@jax.named_scope("attention")
def attend(
    q: Float[Array, "B T N H"],
    kv: KV,
    mask: Mask = Mask(),
    *,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of queries to the keys that the mask lets them see.

    Args:
      implementation: one of `nn.kernels.dispatch.ATTENTION` by name; None: the first that fits.
    """
    return dispatch(ATTENTION, q, kv, mask, implementation=implementation)
